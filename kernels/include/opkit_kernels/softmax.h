// What opkit's CPU kernels of softmax share: the greatest of a row, and the sum of its exponentials.
#pragma once

#include <math.h>
#include <opkit_kernels/cpu.h>

namespace opkit_kernels {

template <class A, class T>
A greatest(const T* row, int64_t n) {
  A top = -INFINITY;
#pragma omp simd reduction(max : top)
  for (int64_t i = 0; i < n; ++i) top = A(row[i]) > top ? A(row[i]) : top;
  return top;
}

// sum of exp(row - top), added up in lanes of some thousand numbers, and these in double
template <class A, class T>
double sum_exp(const T* row, int64_t n, A top) {
  constexpr int64_t kLanes = 32, kChunk = 4096;
  double sum = 0;
  for (; n >= kLanes;) {
    const int64_t count = n < kChunk ? n / kLanes * kLanes : kChunk;
    A lanes[kLanes] = {};
    for (int64_t i = 0; i < count; i += kLanes)
      for (int64_t j = 0; j < kLanes; ++j) lanes[j] += fast_exp(A(row[i + j]) - top);
    for (int64_t j = 0; j < kLanes; ++j) sum += double(lanes[j]);
    row += count;
    n -= count;
  }
  A rest = 0;
#pragma omp simd reduction(+ : rest)
  for (int64_t i = 0; i < n; ++i) rest += fast_exp(A(row[i]) - top);
  return sum + double(rest);
}

}  // namespace opkit_kernels

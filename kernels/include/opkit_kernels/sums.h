// How opkit's CPU kernels add up over many rows: in an order that the shape alone decides, never the number of threads.
#pragma once

#include <opkit_kernels/cpu.h>

namespace opkit_kernels {

// Numbers that one loop adds up, a few thousand at most: longer sums go on in double.
constexpr int64_t kChunk = 4096;
// The same where terms of either sign come, whose sum is small beside what is lost.
constexpr int64_t kShort = 256;

// The sum of x, from both halves at once: additions to one sum wait for each other.
template <class T>
Wide<T> sum_of(const T* x, int64_t n) {
  using A = Wide<T>;
  const int64_t half = n / 2;
  A sum = 0, other = 0;
#pragma omp simd reduction(+ : sum, other)
  for (int64_t i = 0; i < half; ++i) {
    sum += A(x[i]);
    other += A(x[i + half]);
  }
  return sum + other + (n % 2 ? A(x[n - 1]) : A(0));
}

// Rows in blocks, each of which adds into sums of its own.
struct RowBlocks {
  int64_t rows, each, count;
  explicit RowBlocks(int64_t rows)
      : rows(rows), each(rows > 64 * 16 ? (rows + 63) / 64 : 16), count((rows + each - 1) / each) {}
  int64_t begin(int64_t block) const { return block * each; }
  int64_t end(int64_t block) const { return (block + 1) * each < rows ? (block + 1) * each : rows; }
};

// out[i] = sum over the blocks of partial[block, i], in their order
template <class A>
void add_blocks(const A* partial, int64_t blocks, int64_t n, const opkit::Tensor& out) {
  dispatch_floating(out, [&](auto zero) {
    using T = decltype(zero);
    T* to = out.data<T>();
    opkit::parallel_for(0, n, row_grain(blocks), [&](int64_t begin, int64_t end) {
      const int64_t count = end - begin;
      const Buffer<A> buffer(count);
      A* sums = buffer.data();
      for (int64_t i = 0; i < count; ++i) sums[i] = 0;
      for (int64_t b = 0; b < blocks; ++b)
        for (int64_t i = 0; i < count; ++i) sums[i] += partial[b * n + begin + i];
      for (int64_t i = 0; i < count; ++i) to[begin + i] = T(Wide<T>(sums[i]));
    });
  });
}

// Mean and sum of squared deviations of numbers that come in chunks, which are joined in double (Chan, Golub and
// LeVeque, "Algorithms for computing the sample variance", 1983).
struct Moments {
  double count = 0, mean = 0, squares = 0;

  template <class T>
  void add(const T* x, int64_t n) {
    using A = Wide<T>;
    for (; n > kChunk; n -= kChunk, x += kChunk) add(x, kChunk);
    const A centre = sum_of(x, n) / A(n);
    double own = 0, rest = 0;  // the rest is what rounding the centre leaves
    for (int64_t at = 0; at < n; at += kShort) {
      const int64_t end = at + kShort < n ? at + kShort : n;
      A some = 0, left = 0;
#pragma omp simd reduction(+ : some, left)
      for (int64_t i = at; i < end; ++i) {
        const A deviation = A(x[i]) - centre;
        some += deviation * deviation;
        left += deviation;
      }
      own += double(some), rest += double(left);
    }
    const double shift = rest / double(n);
    join(double(n), double(centre) + shift, own - rest * shift);
  }

  void join(double n, double other_mean, double other_squares) {
    const double all = count + n, apart = other_mean - mean;
    mean += apart * (n / all);
    squares += other_squares + apart * apart * (count * n / all);
    count = all;
  }

  double average() const { return count > 0 ? mean : __builtin_nan(""); }
  double variance() const { return squares / count; }
};

// A number near the mean of x: the mean of its first chunk.
template <class T>
Wide<T> near_mean(const T* x, int64_t n) {
  using A = Wide<T>;
  n = n < kChunk ? n : kChunk;
  return n > 0 ? sum_of(x, n) / A(n) : 0;
}

// (x - centre) scale + shift = (x - mean) scale + bias, rounded as few times as can be: a mean that is small beside the
// deviation is left to the shift, as x - 0 is exact; of another one the difference is, nearly, and what rounding the
// centre loses is in the shift.
template <class A>
struct Normaliser {
  A centre, scale, shift;

  Normaliser(double mean, double rstd, A weight, A bias) {
    const double mean_in_deviations = mean * rstd;
    const bool small = mean_in_deviations > -1 && mean_in_deviations < 1;
    centre = small ? A(0) : A(mean);
    scale = A(rstd * double(weight));
    shift = A(double(bias) - (mean - double(centre)) * rstd * double(weight));
  }
};

// Sums of d = x - near, d^2, g and g d, where g is the gradient of what was normalised, and `near` is near the mean of
// x. They are all that a gradient needs of both, in one pass; the true mean is near + d / count.
struct GradientSums {
  double d = 0, squares = 0, grad = 0, dot = 0;

  template <class T>
  void add(const T* x, const T* g, int64_t n, Wide<T> near) {
    using A = Wide<T>;
    for (; n > kShort; n -= kShort, x += kShort, g += kShort) add(x, g, kShort, near);
    A d_sum = 0, d_squares = 0, g_sum = 0, g_dot = 0;
#pragma omp simd reduction(+ : d_sum, d_squares, g_sum, g_dot)
    for (int64_t i = 0; i < n; ++i) {
      const A deviation = A(x[i]) - near, grad = A(g[i]);
      d_sum += deviation;
      d_squares += deviation * deviation;
      g_sum += grad;
      g_dot += grad * deviation;
    }
    d += d_sum, squares += d_squares, this->grad += g_sum, dot += g_dot;
  }

  // The sum of g (x - mean).
  double centred(double count) const { return dot - grad * d / count; }
  double rstd(double count, double eps) const {
    return 1 / __builtin_sqrt(squares / count - d / count * (d / count) + eps);
  }
};

}  // namespace opkit_kernels

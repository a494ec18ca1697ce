// How opkit's CPU kernels add up over many rows: in an order that the shape alone decides, never the number of threads.
#pragma once

#include <opkit_kernels/cpu.h>

namespace opkit_kernels {

// Numbers that one loop adds up, a few thousand at most: longer sums go on in double.
constexpr int64_t kChunk = 4096;
// The same for one lane of a vector, where terms of either sign come: their sum is small beside what is lost.
constexpr int64_t kFew = 16;

// Call body(place, count) for the chunks of n numbers from a place on.
template <class Body>
void in_chunks(int64_t place, int64_t n, const Body& body) {
  for (int64_t at = 0; at < n; at += kChunk) body(place + at, n - at < kChunk ? n - at : kChunk);
}

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

// sums[k] += the sum of terms[k] over i = 0 ... n - 1, as body(i, terms) sets them: in lanes, of which none adds more
// than a few terms before it goes on in double.
template <class A, int kCount, class Body>
void add_up(int64_t n, double (&sums)[kCount], const Body& body) {
  constexpr int64_t kLanes = 128 / sizeof(A), kBlock = kFew * kLanes;
  double wide[kCount][kLanes] = {};
  int64_t at = 0;
  while (at + kLanes <= n) {
    const int64_t end = at + kBlock < n ? at + kBlock : at + (n - at) / kLanes * kLanes;
    A lanes[kCount][kLanes] = {};
    for (; at < end; at += kLanes)
      for (int64_t j = 0; j < kLanes; ++j) {
        A terms[kCount];
        body(at + j, terms);
        for (int k = 0; k < kCount; ++k) lanes[k][j] += terms[k];
      }
    for (int k = 0; k < kCount; ++k)
      for (int64_t j = 0; j < kLanes; ++j) wide[k][j] += double(lanes[k][j]);
  }
  for (int k = 0; k < kCount; ++k) {
    for (int64_t half = kLanes / 2; half > 0; half /= 2)
      for (int64_t j = 0; j < half; ++j) wide[k][j] += wide[k][j + half];
    sums[k] += wide[k][0];
  }
  for (; at < n; ++at) {
    A terms[kCount];
    body(at, terms);
    for (int k = 0; k < kCount; ++k) sums[k] += double(terms[k]);
  }
}

// A number near the mean of x: the mean of the first few.
template <class T>
Wide<T> near_mean(const T* x, int64_t n) {
  constexpr int64_t kStart = 64;
  n = n < kStart ? n : kStart;
  return n > 0 ? sum_of(x, n) / Wide<T>(n) : 0;
}

// sums += those of d = x - near and d^2.
template <class T>
void add_deviations(const T* x, int64_t n, Wide<T> near, double (&sums)[2]) {
  using A = Wide<T>;
  add_up<A>(n, sums, [x, near](int64_t i, A(&terms)[2]) {
    const A deviation = A(x[i]) - near;
    terms[0] = deviation;
    terms[1] = deviation * deviation;
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
    if (n <= 0) return;
    const A near = near_mean(x, n);
    double sums[2] = {0, 0};
    add_deviations(x, n, near, sums);
    join_around(double(n), double(near), sums);
  }

  // Joins n numbers by their sums of d = x - near and d^2.
  void join_around(double n, double near, const double (&sums)[2]) {
    const double shift = sums[0] / n;
    join(n, near + shift, sums[1] - sums[0] * shift);
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
    add(x, n, near, [g](int64_t i) { return Wide<T>(g[i]); });
  }

  // grad_of(i) is the gradient for x[i].
  template <class T, class Gradient>
  void add(const T* x, int64_t n, Wide<T> near, const Gradient& grad_of) {
    using A = Wide<T>;
    double sums[4] = {d, squares, grad, dot};
    add_up<A>(n, sums, [x, near, &grad_of](int64_t i, A(&terms)[4]) {
      const A deviation = A(x[i]) - near, of_it = grad_of(i);
      terms[0] = deviation;
      terms[1] = deviation * deviation;
      terms[2] = of_it;
      terms[3] = of_it * deviation;
    });
    d = sums[0], squares = sums[1], grad = sums[2], dot = sums[3];
  }

  // The sum of g (x - mean).
  double centred(double count) const { return dot - grad * d / count; }
  double rstd(double count, double eps) const {
    return 1 / __builtin_sqrt(squares / count - d / count * (d / count) + eps);
  }
};

}  // namespace opkit_kernels

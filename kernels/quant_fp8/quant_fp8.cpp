#include <opkit/kernel.h>
#include <opkit_kernels/cpu.h>
#include <opkit_kernels/fp8.h>

using namespace opkit_kernels;

constexpr int64_t kPart = 4096;

template <class T>
uint32_t largest_of(const T* x, int64_t n) {
  uint32_t largest = 0;
#pragma omp simd reduction(max : largest)
  for (int64_t i = 0; i < n; ++i) {
    const uint32_t own = magnitude(float(x[i]));
    largest = own > largest ? own : largest;
  }
  return largest;
}

template <class T>
void quantise(const T* x, int64_t n, float inverse, opkit::Float8_e4m3fn* q) {
#pragma GCC ivdep
  for (int64_t i = 0; i < n; ++i) q[i] = opkit::Float8_e4m3fn(float(x[i]) * inverse);
}

// One scale for all: parts find their largest magnitude side by side.
template <class T>
void whole(const opkit::Elements<T>& xs, int64_t n, opkit::Float8_e4m3fn* q, float* scale) {
  const int64_t parts = (n + kPart - 1) / kPart;
  const auto length = [&](int64_t part) {
    return n - part * kPart < kPart ? n - part * kPart : kPart;
  };
  const Buffer<uint32_t> found(parts);
  opkit::parallel_for(0, parts, 4, [&](int64_t begin, int64_t end) {
    const Buffer<T> gathered(xs.is_contiguous() ? 0 : kPart);
    for (int64_t p = begin; p < end; ++p)
      found.data()[p] = largest_of(xs.read(p * kPart, length(p), gathered.data()), length(p));
  });
  uint32_t largest = 0;
  for (int64_t p = 0; p < parts; ++p)
    largest = found.data()[p] > largest ? found.data()[p] : largest;
  *scale = scale_of(largest);
  const float inverse = 1 / *scale;
  opkit::parallel_for(0, parts, 4, [&](int64_t begin, int64_t end) {
    const Buffer<T> gathered(xs.is_contiguous() ? 0 : kPart);
    for (int64_t p = begin; p < end; ++p)
      quantise(xs.read(p * kPart, length(p), gathered.data()), length(p), inverse, q + p * kPart);
  });
}

// A scale for every `each` elements of a row of n.
template <class T>
void grouped(const opkit::Elements<T>& xs, int64_t n, int64_t each, opkit::Float8_e4m3fn* q,
             const opkit::Tensor& scale) {
  float* scales = scale.data<float>();
  const int64_t per_row = scale.size(-1);
  opkit::parallel_for(0, scale.numel(), row_grain(each), [&](int64_t begin, int64_t end) {
    const Buffer<T> gathered(xs.is_contiguous() ? 0 : each);
    for (int64_t g = begin; g < end; ++g) {
      const int64_t from = g % per_row * each, first = g / per_row * n + from,
                    count = n - from < each ? n - from : each;
      const T* x = xs.read(first, count, gathered.data());
      scales[g] = scale_of(largest_of(x, count));
      quantise(x, count, 1 / scales[g], q + first);
    }
  });
}

void quant_fp8(opkit::Tensor x, opkit::Optional<int64_t> group, opkit::Tensor q,
               opkit::Tensor scale) {
  dispatch_floating(x, [&](auto zero) {
    using T = decltype(zero);
    const opkit::Elements<T> xs(x);
    opkit::Float8_e4m3fn* to = q.data<opkit::Float8_e4m3fn>();
    if (!group) return whole<T>(xs, x.numel(), to, scale.data<float>());
    const int64_t n = x.size(-1);
    grouped<T>(xs, n, *group < 0 || *group > n ? n : *group, to, scale);
  });
}

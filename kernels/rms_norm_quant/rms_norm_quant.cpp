#include <math.h>
#include <opkit/kernel.h>
#include <opkit_kernels/fp8.h>
#include <opkit_kernels/sums.h>

using namespace opkit_kernels;

void rms_norm_quant(opkit::Tensor x, opkit::Tensor weight, double eps, opkit::Tensor q,
                    opkit::Tensor scale, opkit::Tensor rstd) {
  dispatch_floating(x, [&](auto zero) {
    using T = decltype(zero);
    const int64_t n = x.size(-1);
    const opkit::Elements<T> xs(x);
    const Widened<float> weights(weight);
    const float* w = weights.data();
    auto* to = q.data<opkit::Float8_e4m3fn>();
    float *scales = scale.data<float>(), *rstds = rstd.data<float>();
    opkit::parallel_for(0, rstd.numel(), row_grain(n), [&](int64_t begin, int64_t end) {
      const Buffer<T> gathered(xs.is_contiguous() ? 0 : n);
      const Buffer<float> values(n);
      float* y = values.data();
      for (int64_t r = begin; r < end; ++r) {
        const T* row = xs.read(r * n, n, gathered.data());
        float squares = 0;
#pragma omp simd reduction(+ : squares)
        for (int64_t i = 0; i < n; ++i) squares += float(row[i]) * float(row[i]);
        rstds[r] = 1 / sqrtf(squares / float(n) + float(eps));
        uint32_t largest = 0;
#pragma omp simd reduction(max : largest)
        for (int64_t i = 0; i < n; ++i) {
          y[i] = float(row[i]) * rstds[r] * w[i];
          const uint32_t own = magnitude(y[i]);
          largest = own > largest ? own : largest;
        }
        scales[r] = scale_of(largest);
        const float inverse = 1 / scales[r];
#pragma GCC ivdep
        for (int64_t i = 0; i < n; ++i) to[r * n + i] = opkit::Float8_e4m3fn(y[i] * inverse);
      }
    });
  });
}

#include <cmath>

#include "elements.h"

using namespace opkit_tvm_ffi;

// y = x rstd weight and rstd = 1 / sqrt(mean(x^2) + eps), row by row
static void rms_norm(TensorView x, TensorView weight, double eps, TensorView y, TensorView rstd) {
  dispatch(x, [&](auto zero) {
    using T = decltype(zero);
    const int64_t n = weight.numel(), rows = rstd.numel();
    const T *in = elements<T>(x), *w = elements<T>(weight);
    T* out = elements<T>(y);
    float* factors = elements<float>(rstd);
    for (int64_t r = 0; r < rows; ++r, in += n, out += n) {
      double squares = 0;
#pragma omp simd reduction(+ : squares)
      for (int64_t i = 0; i < n; ++i) squares += double(in[i]) * double(in[i]);
      const double scale = 1 / std::sqrt(squares / double(n) + eps);
      factors[r] = float(scale);
      for (int64_t i = 0; i < n; ++i) out[i] = T(double(in[i]) * scale * double(w[i]));
    }
  });
}

// grad_x = rstd (g w - xhat mean(g w xhat)) and grad_weight = sum over rows of g xhat, with xhat = x rstd;
// grad_weight is of doubles, and zero before
static void rms_norm_backward(TensorView grad_y, TensorView x, TensorView weight, double eps,
                              TensorView grad_x, TensorView grad_weight) {
  dispatch(x, [&](auto zero) {
    using T = decltype(zero);
    const int64_t n = weight.numel(), rows = n ? x.numel() / n : 0;
    const T *g = elements<T>(grad_y), *in = elements<T>(x), *w = elements<T>(weight);
    T* out = elements<T>(grad_x);
    double* sums = elements<double>(grad_weight);
    for (int64_t r = 0; r < rows; ++r, g += n, in += n, out += n) {
      double squares = 0, dot = 0;
#pragma omp simd reduction(+ : squares, dot)
      for (int64_t i = 0; i < n; ++i) {
        squares += double(in[i]) * double(in[i]);
        dot += double(g[i]) * double(w[i]) * double(in[i]);
      }
      const double scale = 1 / std::sqrt(squares / double(n) + eps);
      const double shift = dot * scale * scale / double(n);
      for (int64_t i = 0; i < n; ++i) {
        out[i] = T(scale * (double(g[i]) * double(w[i]) - double(in[i]) * shift));
        sums[i] += double(g[i]) * (double(in[i]) * scale);
      }
    }
  });
}

TVM_FFI_DLL_EXPORT_TYPED_FUNC(rms_norm, rms_norm);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(rms_norm_backward, rms_norm_backward);

#include <cmath>

#include "elements.h"

using namespace opkit_tvm_ffi;

// y = gate sigmoid(gate) up
static void swiglu(TensorView gate, TensorView up, TensorView y) {
  dispatch(gate, [&](auto zero) {
    using T = decltype(zero);
    const T *g = elements<T>(gate), *u = elements<T>(up);
    T* out = elements<T>(y);
    const int64_t count = y.numel();
    for (int64_t i = 0; i < count; ++i)
      out[i] = T(double(g[i]) / (1 + std::exp(-double(g[i]))) * double(u[i]));
  });
}

// grad_gate = grad_y up s (1 + gate (1 - s)) and grad_up = grad_y gate s, with s = sigmoid(gate)
static void swiglu_backward(TensorView grad_y, TensorView gate, TensorView up, TensorView grad_gate,
                            TensorView grad_up) {
  dispatch(gate, [&](auto zero) {
    using T = decltype(zero);
    const T *d = elements<T>(grad_y), *g = elements<T>(gate), *u = elements<T>(up);
    T *to_gate = elements<T>(grad_gate), *to_up = elements<T>(grad_up);
    const int64_t count = gate.numel();
    for (int64_t i = 0; i < count; ++i) {
      const double s = 1 / (1 + std::exp(-double(g[i])));
      to_gate[i] = T(double(d[i]) * double(u[i]) * s * (1 + double(g[i]) * (1 - s)));
      to_up[i] = T(double(d[i]) * double(g[i]) * s);
    }
  });
}

TVM_FFI_DLL_EXPORT_TYPED_FUNC(swiglu, swiglu);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(swiglu_backward, swiglu_backward);

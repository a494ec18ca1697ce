// sine and its gradient as light kernels: the loops of the hand-written ops in _peers.cpp.
#include <math.h>
#include <opkit/kernel.h>

void sine(opkit::Tensor x, opkit::Tensor y) {
  OPKIT_CHECK(x.is_contiguous(), "x is not contiguous");
  const int64_t n = x.numel();
  const float* in = x.data<float>();
  float* out = y.data<float>();
  for (int64_t i = 0; i < n; ++i) out[i] = sinf(in[i]);
}

void sine_backward(opkit::Tensor grad, opkit::Tensor x, opkit::Tensor grad_x) {
  OPKIT_CHECK(x.is_contiguous() && grad.is_contiguous(), "x or grad is not contiguous");
  const int64_t n = x.numel();
  const float *in = x.data<float>(), *by = grad.data<float>();
  float* out = grad_x.data<float>();
  for (int64_t i = 0; i < n; ++i) out[i] = by[i] * cosf(in[i]);
}

// The ops of call.py as torch's C++ tutorials have them: TORCH_LIBRARY, and an autograd::Function where a row asks
// for gradients.
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/ops/add.h>
#include <ATen/ops/cos.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/neg.h>
#include <ATen/ops/sin.h>
#include <math.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>

#include <string_view>
#include <tuple>

namespace {
using at::Tensor;
using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

Tensor sine(const Tensor& x) {
  TORCH_CHECK(x.is_contiguous(), "x is not contiguous");
  Tensor y = at::empty(x.sizes(), x.options());
  const int64_t n = x.numel();
  const float* in = x.const_data_ptr<float>();
  float* out = y.mutable_data_ptr<float>();
  for (int64_t i = 0; i < n; ++i) out[i] = sinf(in[i]);
  return y;
}

Tensor sine_backward(const Tensor& grad, const Tensor& x) {
  TORCH_CHECK(x.is_contiguous() && grad.is_contiguous(), "x or grad is not contiguous");
  Tensor grad_x = at::empty(x.sizes(), x.options());
  const int64_t n = x.numel();
  const float *in = x.const_data_ptr<float>(), *by = grad.const_data_ptr<float>();
  float* out = grad_x.mutable_data_ptr<float>();
  for (int64_t i = 0; i < n; ++i) out[i] = by[i] * cosf(in[i]);
  return grad_x;
}

// What calls a kernel for any device goes through the dispatcher.
template <class F> auto find(const char* name) {
  return c10::Dispatcher::singleton().findSchemaOrThrow(name, "").typed<F>();
}

struct Sine : torch::autograd::Function<Sine> {
  static Tensor forward(AutogradContext* ctx, const Tensor& x) {
    at::AutoDispatchBelowADInplaceOrView below;
    ctx->save_for_backward({x});
    static auto op = find<Tensor(const Tensor&)>("opkit_bench_cpp::sine_with_grad");
    return op.call(x);
  }
  static variable_list backward(AutogradContext* ctx, variable_list grads) {
    static auto op = find<Tensor(const Tensor&, const Tensor&)>("opkit_bench_cpp::sine_backward");
    return {op.call(grads[0], ctx->get_saved_variables()[0])};
  }
};

Tensor sine_with_grad(const Tensor& x) { return Sine::apply(x); }

Tensor fourteen(const Tensor&, const Tensor& b, const Tensor&, const Tensor&, const Tensor&,
                const Tensor&, const Tensor&, const Tensor&, const Tensor&, const Tensor&,
                const Tensor&, const Tensor&, const Tensor&, const Tensor&) {
  return b.clone();
}

Tensor rich(const Tensor& x, const Tensor&, const Tensor&, const Tensor&, at::IntArrayRef,
            at::ArrayRef<double>, at::IntArrayRef, at::ArrayRef<double>, at::IntArrayRef,
            at::ArrayRef<double>, bool, std::string_view) {
  return at::add(x, 1);
}

void ten(Tensor& out, const Tensor& b, const Tensor&, const Tensor&, const Tensor&, const Tensor&,
         const Tensor&, const Tensor&, const Tensor&, const Tensor&) {
  out.copy_(b);
}

Tensor cast(at::TensorList xs, c10::ScalarType dtype, c10::Device) {
  return xs[0].to(dtype, false, true);
}

std::tuple<Tensor, Tensor, Tensor> three(const Tensor& x) {
  return {at::sin(x), at::cos(x), at::neg(x)};
}
}  // namespace

TORCH_LIBRARY(opkit_bench_cpp, m) {
  const std::vector<at::Tag> tags{at::Tag::pt2_compliant_tag};
  m.def("sine(Tensor x) -> Tensor", tags);
  m.def("sine_with_grad(Tensor x) -> Tensor", tags);
  m.def("sine_backward(Tensor grad, Tensor x) -> Tensor", tags);
  m.def(
      "fourteen(Tensor a, Tensor b, Tensor c, Tensor d, Tensor e, Tensor f, Tensor g, Tensor h, "
      "Tensor i, Tensor j, "
      "Tensor k, Tensor l, Tensor m, Tensor n) -> Tensor",
      tags);
  m.def(
      "rich(Tensor x, Tensor y, Tensor z, Tensor w, int[] ints, float[] floats, int[] ints2, "
      "float[] floats2, "
      "int[] ints3, float[] floats3, bool flag, str mode) -> Tensor",
      tags);
  m.def(
      "ten(Tensor(a!) out, Tensor b, Tensor c, Tensor d, Tensor e, Tensor f, Tensor g, Tensor h, "
      "Tensor i, "
      "Tensor j) -> ()",
      tags);
  m.def("cast(Tensor[] xs, ScalarType dtype, Device device) -> Tensor", tags);
  m.def("three(Tensor x) -> (Tensor, Tensor, Tensor)", tags);
}

TORCH_LIBRARY_IMPL(opkit_bench_cpp, CPU, m) {
  m.impl("sine", &sine);
  m.impl("sine_with_grad", &sine);
  m.impl("sine_backward", &sine_backward);
  m.impl("fourteen", &fourteen);
  m.impl("rich", &rich);
  m.impl("ten", &ten);
  m.impl("cast", &cast);
  m.impl("three", &three);
}

TORCH_LIBRARY_IMPL(opkit_bench_cpp, Autograd, m) { m.impl("sine_with_grad", &sine_with_grad); }

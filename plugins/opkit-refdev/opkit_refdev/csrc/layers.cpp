// Ops that the CPU cannot stand in for: torch has those of convolutions and recurrent cells for accelerators alone.
#include "refdev.h"

#include <ATen/TensorOperators.h>
#include <ATen/ops/cat.h>
#include <ATen/ops/convolution.h>
#include <ATen/ops/convolution_backward.h>
#include <ATen/ops/ones_like.h>
#include <ATen/ops/zeros_like.h>
#include <torch/library.h>

namespace refdev {
namespace {

using at::Tensor;
using Optional = std::optional<Tensor>;

Tensor host_or_none(const Optional& tensor) {
  return tensor.has_value() && tensor->defined() ? on_host(*tensor) : Tensor();
}

Optional host_option(const Optional& tensor) {
  return tensor.has_value() && tensor->defined() ? Optional(on_host(*tensor)) : std::nullopt;
}

Tensor convolution(const Tensor& input, const Tensor& weight, const Optional& bias,
                   at::IntArrayRef stride, at::IntArrayRef padding, at::IntArrayRef dilation,
                   bool transposed, at::IntArrayRef output_padding, int64_t groups) {
  const Span span("convolution");
  const auto result = at::convolution(on_host(input), on_host(weight), host_option(bias), stride,
                                      padding, dilation, transposed, output_padding, groups);
  return on_device(result, input.device());
}

std::tuple<Tensor, Tensor, Tensor> convolution_backward(
    const Tensor& grad, const Tensor& input, const Tensor& weight, at::IntArrayRef stride,
    at::IntArrayRef padding, at::IntArrayRef dilation, bool transposed,
    at::IntArrayRef output_padding, int64_t groups, std::array<bool, 3> mask) {
  const Span span("convolution_backward");
  const int64_t channels = transposed ? weight.size(1) * groups : weight.size(0);
  const int64_t bias_sizes[] = {channels};
  const auto sizes = mask[2] ? at::OptionalIntArrayRef(bias_sizes) : std::nullopt;
  const auto [d_input, d_weight, d_bias] =
      at::convolution_backward(on_host(grad), on_host(input), on_host(weight), sizes, stride,
                               padding, dilation, transposed, output_padding, groups, mask);
  const auto device = input.device();
  return {on_device(d_input, device), on_device(d_weight, device), on_device(d_bias, device)};
}

Tensor with_bias(const Tensor& gates, const Optional& bias) {
  const Tensor added = host_or_none(bias);
  return added.defined() ? on_host(gates) + added : on_host(gates);
}

std::tuple<Tensor, Tensor, Tensor> lstm_cell(const Tensor& input_gates, const Tensor& hidden_gates,
                                             const Tensor& cx, const Optional& input_bias,
                                             const Optional& hidden_bias) {
  const Span span("lstm_cell");
  auto gates =
      (with_bias(input_gates, input_bias) + with_bias(hidden_gates, hidden_bias)).chunk(4, 1);
  const Tensor i = gates[0].sigmoid(), f = gates[1].sigmoid(), g = gates[2].tanh(),
               o = gates[3].sigmoid();
  const Tensor cy = f * on_host(cx) + i * g;
  const auto device = cx.device();
  return {on_device(o * cy.tanh(), device), on_device(cy, device),
          on_device(at::cat({i, f, g, o}, 1), device)};
}

std::tuple<Tensor, Tensor, Tensor> lstm_cell_backward(const Optional& grad_hy,
                                                      const Optional& grad_cy, const Tensor& cx,
                                                      const Tensor& cy, const Tensor& workspace,
                                                      bool has_bias) {
  const Span span("lstm_cell_backward");
  const auto saved = on_host(workspace).chunk(4, 1);
  const Tensor &i = saved[0], &f = saved[1], &g = saved[2], &o = saved[3];
  const Tensor tanh = on_host(cy).tanh();
  Tensor d_hy = host_or_none(grad_hy), d_cy = host_or_none(grad_cy);
  if (!d_hy.defined() && !d_cy.defined()) return {};
  if (!d_hy.defined()) d_hy = at::zeros_like(tanh);
  Tensor d_cell = d_hy * o * (1 - tanh * tanh);
  if (d_cy.defined()) d_cell = d_cell + d_cy;
  const Tensor d_gates = at::cat({d_cell * g * i * (1 - i), d_cell * on_host(cx) * f * (1 - f),
                                  d_cell * i * (1 - g * g), d_hy * tanh * o * (1 - o)},
                                 1);
  const auto device = cx.device();
  return {on_device(d_gates, device), on_device(d_cell * f, device),
          has_bias ? on_device(d_gates.sum(0), device) : Tensor()};
}

std::tuple<Tensor, Tensor> gru_cell(const Tensor& input_gates, const Tensor& hidden_gates,
                                    const Tensor& hx, const Optional& input_bias,
                                    const Optional& hidden_bias) {
  const Span span("gru_cell");
  const auto x = with_bias(input_gates, input_bias).chunk(3, 1);
  const auto h = with_bias(hidden_gates, hidden_bias).chunk(3, 1);
  const Tensor r = (x[0] + h[0]).sigmoid(), z = (x[1] + h[1]).sigmoid(),
               n = (x[2] + r * h[2]).tanh();
  const Tensor before = on_host(hx);
  const auto device = hx.device();
  return {on_device(n + z * (before - n), device),
          on_device(at::cat({r, z, n, before, h[2]}, 1), device)};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> gru_cell_backward(const Tensor& grad_hy,
                                                                     const Tensor& workspace,
                                                                     bool has_bias) {
  const Span span("gru_cell_backward");
  const auto saved = on_host(workspace).chunk(5, 1);
  const Tensor &r = saved[0], &z = saved[1], &n = saved[2], &before = saved[3], &hidden = saved[4];
  const Tensor d_hy = on_host(grad_hy);
  const Tensor d_n = d_hy * (1 - z) * (1 - n * n);
  const Tensor d_z = d_hy * (before - n) * z * (1 - z);
  const Tensor d_r = d_n * hidden * r * (1 - r);
  const Tensor d_x = at::cat({d_r, d_z, d_n}, 1), d_h = at::cat({d_r, d_z, d_n * r}, 1);
  const auto device = grad_hy.device();
  const auto bias = [&](const Tensor& gates) {
    return has_bias ? on_device(gates.sum(0), device) : Tensor();
  };
  return {on_device(d_x, device), on_device(d_h, device), on_device(d_hy * z, device), bias(d_x),
          bias(d_h)};
}

// The CPU's takes no generator, and would draw from its own.
std::tuple<Tensor, Tensor> dropout(const Tensor& input, double p, std::optional<bool> train) {
  const Span span("dropout");
  const Tensor x = on_host(input);
  const auto device = input.device();
  Tensor mask = at::ones_like(x, x.options().dtype(at::kBool));
  if (!train.value_or(true)) return {on_device(x.clone(), device), on_device(mask, device)};
  mask.bernoulli_(1 - p, host_generator(std::nullopt, device.index()));
  return {on_device(x * mask * (p == 1 ? 0.0 : 1 / (1 - p)), device), on_device(mask, device)};
}

TORCH_LIBRARY_IMPL(aten, PrivateUse1, m) {
  m.impl("convolution_overrideable", convolution);
  m.impl("convolution_backward_overrideable", convolution_backward);
  m.impl("native_dropout", dropout);
  m.impl("_thnn_fused_lstm_cell", lstm_cell);
  m.impl("_thnn_fused_lstm_cell_backward_impl", lstm_cell_backward);
  m.impl("_thnn_fused_gru_cell", gru_cell);
  m.impl("_thnn_fused_gru_cell_backward", gru_cell_backward);
}

}  // namespace
}  // namespace refdev

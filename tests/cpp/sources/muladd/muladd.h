#pragma once
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>

namespace extension_muladd {

inline void check(const at::Tensor& a, const at::Tensor& b, at::DeviceType device) {
  TORCH_CHECK(a.sizes() == b.sizes());
  TORCH_CHECK(a.dtype() == at::kFloat && b.dtype() == at::kFloat);
  TORCH_CHECK(a.device().type() == device && b.device().type() == device);
}

}  // namespace extension_muladd

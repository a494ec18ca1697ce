// Which ops torch.autocast runs in lower precision, in float32, or in the widest dtype of their arguments: torch's lists.
#include "refdev.h"

#include <ATen/autocast_mode.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <torch/library.h>

namespace refdev {
namespace {

using at::autocast::cached_cast;

size_t first_of(const c10::OperatorHandle& op, const torch::jit::Stack& stack) {
  return stack.size() - op.schema().arguments().size();
}

void cast_all(const c10::OperatorHandle& op, torch::jit::Stack* stack, at::ScalarType dtype) {
  for (size_t i = first_of(op, *stack); i < stack->size(); ++i) {
    auto& value = (*stack)[i];
    if (value.isTensor()) {
      value = cached_cast(dtype, value.toTensor(), kType);
    } else if (value.isTensorList()) {
      value = cached_cast(dtype, value.toTensorVector(), kType);
    }
  }
}

void run(const c10::OperatorHandle& op, torch::jit::Stack* stack) {
  const c10::impl::ExcludeDispatchKeyGuard below(c10::DispatchKey::AutocastPrivateUse1);
  op.callBoxed(stack);
}

void lower_precision(const c10::OperatorHandle& op, torch::jit::Stack* stack) {
  cast_all(op, stack, at::autocast::get_lower_precision_fp_from_device_type(kType));
  run(op, stack);
}

void float32(const c10::OperatorHandle& op, torch::jit::Stack* stack) {
  cast_all(op, stack, at::kFloat);
  run(op, stack);
}

// These take the dtype of their result: float32, unless the caller names one.
void float32_by_dtype(const c10::OperatorHandle& op, torch::jit::Stack* stack) {
  const size_t first = first_of(op, *stack);
  const auto& input = (*stack)[first].toTensor();
  const auto index = op.schema().argumentIndexWithName("dtype");
  if (index && (*stack)[first + *index].isNone() && at::autocast::is_eligible(input, kType))
    (*stack)[first + *index] = at::kFloat;
  run(op, stack);
}

void widest(const c10::OperatorHandle& op, torch::jit::Stack* stack) {
  auto dtype = at::autocast::get_lower_precision_fp_from_device_type(kType);
  for (size_t i = first_of(op, *stack); i < stack->size(); ++i) {
    const auto& value = (*stack)[i];
    if (value.isTensor()) dtype = at::autocast::prioritize(dtype, value.toTensor(), kType);
    if (value.isTensorList())
      dtype = at::autocast::prioritize(dtype, value.toTensorVector(), kType);
  }
  cast_all(op, stack, dtype);
  run(op, stack);
}

template <c10::BoxedKernel::BoxedKernelFunction* kernel>
void implement(torch::Library& m, const char* name, const char* overload = "") {
  const c10::OperatorName op(c10::str("aten::", name), overload);
  if (!c10::Dispatcher::singleton().findSchema(op))
    return;  // some torches have it, and this one has not
  m.impl(c10::toString(op).c_str(), torch::CppFunction::makeFromBoxedFunction<kernel>());
}

TORCH_LIBRARY_IMPL(_, AutocastPrivateUse1, m) { m.fallback(torch::CppFunction::makeFallthrough()); }

#define REFDEV_FIRST(NAME, ...) #NAME
#define REFDEV_SECOND(NAME, ...) __VA_OPT__(REFDEV_TEXT(__VA_ARGS__)) ""
#define REFDEV_TEXT(OVERLOAD) #OVERLOAD
#define REFDEV_LOWER(...) \
  implement<&lower_precision>(m, REFDEV_FIRST(__VA_ARGS__), REFDEV_SECOND(__VA_ARGS__));
#define REFDEV_FLOAT32(...) \
  implement<&float32>(m, REFDEV_FIRST(__VA_ARGS__), REFDEV_SECOND(__VA_ARGS__));
#define REFDEV_BY_DTYPE(...) \
  implement<&float32_by_dtype>(m, REFDEV_FIRST(__VA_ARGS__), REFDEV_SECOND(__VA_ARGS__));
#define REFDEV_WIDEST(...) \
  implement<&widest>(m, REFDEV_FIRST(__VA_ARGS__), REFDEV_SECOND(__VA_ARGS__));

TORCH_LIBRARY_IMPL(aten, AutocastPrivateUse1, m) {
  AT_FORALL_LOWER_PRECISION_FP(REFDEV_LOWER)
  AT_FORALL_FP32(REFDEV_FLOAT32)
  AT_FORALL_FP32_SET_OPT_DTYPE(REFDEV_BY_DTYPE)
  AT_FORALL_PROMOTE(REFDEV_WIDEST)
  for (const auto* overload : {"Scalar", "ScalarOpt_dim", "names_ScalarOpt_dim"})
    implement<&float32>(m, "norm", overload);
}

}  // namespace
}  // namespace refdev

// Every op that the device has no kernel for runs on the CPU, with what is on the device copied there and back.
#include "refdev.h"

#include <ATen/native/CPUFallback.h>
#include <torch/library.h>

namespace refdev {
namespace {

// The device that an op is about: that of its first tensor on one.
c10::DeviceIndex device_index(const torch::jit::Stack& stack, size_t first) {
  for (size_t i = first; i < stack.size(); ++i) {
    const auto& value = stack[i];
    if (value.isTensor() && value.toTensor().defined() && value.toTensor().device().type() == kType)
      return value.toTensor().device().index();
    if (value.isDevice() && value.toDevice().type() == kType && value.toDevice().has_index())
      return value.toDevice().index();
  }
  return current_device();
}

// CPU kernels take no other device's generator, and without one draw from the CPU's: the device's own is put in.
void give_host_generators(const c10::OperatorHandle& op, torch::jit::Stack* stack) {
  const auto& arguments = op.schema().arguments();
  const size_t first = stack->size() - arguments.size();
  static const auto optional_generator = c10::OptionalType::create(c10::GeneratorType::get());
  for (size_t i = 0; i < arguments.size(); ++i) {
    const auto& type = *arguments[i].type();
    if (type != *c10::GeneratorType::get() && type != *optional_generator) continue;
    auto& value = (*stack)[first + i];
    const auto given =
        value.isNone() ? std::nullopt : std::optional<at::Generator>(value.toGenerator());
    value = host_generator(given, device_index(*stack, first));
  }
}

void on_cpu(const c10::OperatorHandle& op, torch::jit::Stack* stack) {
  const Span span(op.schema().name());
  give_host_generators(op, stack);
  at::native::cpu_fallback(op, stack);
}

TORCH_LIBRARY_IMPL(_, PrivateUse1, m) {
  m.fallback(torch::CppFunction::makeFromBoxedFunction<&on_cpu>());
}

}  // namespace
}  // namespace refdev

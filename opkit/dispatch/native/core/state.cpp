#include "state.h"

#include <ATen/Context.h>
#include <ATen/PythonTorchFunctionTLS.h>
#include <ATen/ThreadLocalPythonObjects.h>
#include <c10/core/impl/LocalDispatchKeySet.h>
#include <torch/csrc/PyInterpreter.h>

namespace opkit_core {

namespace {

// The key of tensors with named dimensions, which only torch 2.11 has; its engine excludes it in backward.
template <typename Key, typename = void>
constexpr c10::DispatchKeySet kNamed{};
template <typename Key>
constexpr c10::DispatchKeySet kNamed<Key, std::void_t<decltype(Key::Named)>> =
    c10::DispatchKeySet(Key::Named);

}  // namespace

State State::now() {
  const auto local = c10::impl::tls_local_dispatch_key_set();
  constexpr c10::DispatchKeySet autograd =
      c10::autograd_dispatch_keyset | c10::DispatchKeySet(c10::DispatchKey::ADInplaceOrView);
  constexpr c10::DispatchKeySet handled =
      autograd | c10::autocast_dispatch_keyset | kNamed<DispatchKey>;
  State state;
  state.below_autograd = local.excluded_.has_any(c10::autograd_dispatch_keyset);
  state.autocast = !local.excluded_.isSupersetOf(c10::autocast_dispatch_keyset);
  state.ordinary = c10::default_included_set.isSupersetOf(local.included_) &&
                   (local.excluded_ | handled) == (c10::default_excluded_set | handled);
  return state;
}

bool is_observed() { return at::impl::torch_function_mode_enabled() || is_profiled(); }

bool is_profiled() {
  // at::hasCallbacks() takes a lock and copies what it counts.
  return at::getStepCallbacksUnlessEmpty(at::RecordScope::FUNCTION).has_value();
}

void Range::begin(const Kernel& kernel) {
  auto callbacks = at::getStepCallbacksUnlessEmpty(at::RecordScope::FUNCTION);
  if (!callbacks) { return; }
  recorded_.emplace(std::move(*callbacks));
  recorded_->before(std::string_view(kernel.label));
}

PyObject* preference() {
  static const std::string key = "opkit";
  if (!preferences.load(std::memory_order_relaxed) ||
      !at::impl::ThreadLocalPythonObjects::contains(key)) {
    return nullptr;
  }
  const auto& stashed = at::impl::ThreadLocalPythonObjects::get(key);
  PyObject* found = stashed == nullptr ? nullptr : stashed->ptr(getPyInterpreter());
  return found == Py_None ? nullptr : found;
}

bool has_preference() {
  return at::globalContext().deterministicAlgorithms() || preference() != nullptr;
}

bool is_overridden(const Record& record, const at::Tensor& first) {
  const auto backend = first.key_set().highestBackendKey();
  return record.op.hasKernelForDispatchKey(
             c10::toRuntimePerBackendFunctionalityKey(c10::DispatchKey::Dense, backend)) ||
         record.op.hasKernelForDispatchKey(c10::toRuntimePerBackendFunctionalityKey(
             c10::DispatchKey::AutogradFunctionality, backend));
}

}  // namespace opkit_core

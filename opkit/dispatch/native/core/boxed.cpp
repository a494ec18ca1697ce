#include "boxed.h"

#include "call.h"

#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/core/boxing/KernelFunction.h>
#include <ATen/core/stack.h>
#include <c10/core/GradMode.h>
#include <torch/csrc/Exceptions.h>

namespace opkit_core {
namespace {

using c10::DispatchKey;
using c10::DispatchKeySet;
using torch::jit::Stack;

c10::IValue result_value(const Result& result, PyObject* value) {
  if (value == Py_None) { return {}; }
  if (result.list) {
    const Ref items = checked_ref(
        PySequence_Fast(value, "an op's kernel returned no list where one is declared"));
    c10::List<at::Tensor> list;
    for (Py_ssize_t i = 0; i < PySequence_Fast_GET_SIZE(items.get()); ++i) {
      PyObject* one = PySequence_Fast_GET_ITEM(items.get(), i);
      TORCH_CHECK(THPVariable_Check(one),
                  "an op's kernel returned a list with something else than tensors");
      list.push_back(THPVariable_Unpack(one));
    }
    return list;
  }
  if (result.kind == Kind::Tensor) {
    TORCH_CHECK(THPVariable_Check(value),
                "an op's kernel returned no tensor where one is declared");
    return THPVariable_Unpack(value);
  }
  switch (result.kind) {
    case Kind::Int: return int_result(value);
    case Kind::Float: return PyFloat_AsDouble(value);
    default: return PyObject_IsTrue(value) == 1;
  }
}

// A call from the dispatcher: the op, which may go meanwhile, and the arguments that lie on a stack.
struct BoxedCall {
  explicit BoxedCall(std::shared_ptr<Record> record) : record(std::move(record)) {}

  const std::shared_ptr<Record> record;

 protected:
  c10::ArrayRef<c10::IValue> arguments_on(const Stack& stack) const {
    const size_t count = record->params.size();
    return c10::ArrayRef<c10::IValue>(stack.data() + stack.size() - count, count);
  }

  // Puts results in the place of the arguments.
  void replace(Stack& stack, PyObject* raw) const {
    std::vector<c10::IValue> values;
    const auto flat = flat_results(*record, raw);
    for (size_t i = 0; i < flat.size(); ++i) {
      values.push_back(result_value(record->results[i], flat[i]));
    }
    torch::jit::drop(stack, record->params.size());
    std::move(values.begin(), values.end(), std::back_inserter(stack));
  }

  // Runs the kernel of a call that nothing special is about.
  void run_here(Arguments& arguments, Stack& stack) const {
    const bool arranged = !record->contiguous || arguments.are_contiguous(*record);
    if (!record->mutates && arranged && !has_preference()) {
      const auto device = arguments.first->device().type();
      const auto dtype = arguments.first->scalar_type();
      auto known = record->known_by_all(device, dtype, 0);
      if (!known && record->measured) {
        known = record->known_by_all(device, dtype, bucket_of(*record, arguments));
      }
      if (known && known->how == Kernel::Native) {
        run_known(*known, device_key(*arguments.first), stack);
        return;
      }
    }
    const InPython within;
    Arguments held(std::move(arguments));
    held.wrap(*record, arguments_on(stack));
    held.observed = is_profiled();
    const Calling calling(*record);
    const Chosen kernel = select(*record, held);
    const Returned returned = run(*record, *kernel, held);
    replace(stack, returned.raw.get());
  }

  // Runs a native kernel without Python, which is asked only where it fails, for what is wrong with the arguments.
  void run_known(const Kernel& kernel, DispatchKey key, Stack& stack) const {
    const size_t count = record->params.size(), base = stack.size() - count;
    stack.reserve(stack.size() + count);  // moves the tensors that lie on it
    for (size_t i = 0; i < count; ++i) {
      stack.push_back(
          stack[base + i]);  // the kernel takes these, and the others are there if it fails
    }
    try {
      at::AutoDispatchBelowAutograd below;
      const Range range(kernel, true);
      run_native(kernel, key, stack);
    } catch (const std::exception&) {
      stack.resize(base + count);
      explain(kernel, stack);
      throw;
    }
    const auto first = stack.begin() + static_cast<Stack::difference_type>(base);
    stack.erase(first, first + static_cast<Stack::difference_type>(count));
  }

  // Throws what Python finds wrong with arguments on which a native kernel failed, if it does.
  void explain(const Kernel& kernel, const Stack& stack) const {
    WithGil gil;
    if (!gil.held) { return; }
    Arguments arguments;
    arguments.wrap(*record, arguments_on(stack));
    const Ref values = arguments.tuple();
    called(record->explain.get(), {kernel.owner.get(), values.get()});
  }

  // Calls a function of Python with the arguments, after another value if there is one.
  void call_python(PyObject* function, Stack& stack, const DispatchKeySet* keys) const {
    const InPython within;
    Arguments arguments;
    arguments.wrap(*record, arguments_on(stack));
    Ref first;
    if (keys != nullptr) {
      first = Ref::steal(PyLong_FromUnsignedLongLong(keys->raw_repr()));
      arguments.values.insert(arguments.values.begin(), first.get());
    }
    const Ref raw = called(function, arguments.values);
    replace(stack, raw.get());
  }
};

struct DeviceCall final : BoxedCall {
  using BoxedCall::BoxedCall;

  void serve(const c10::OperatorHandle&, DispatchKeySet, Stack* stack) const {
    Arguments arguments;
    if (!State::now().ordinary || !arguments.bind(*record, arguments_on(*stack)) ||
        arguments.first == nullptr) {
      call_python(record->run.get(), *stack, nullptr);
    } else {
      run_here(arguments, *stack);
    }
  }
};

struct AutogradCall final : BoxedCall {
  using BoxedCall::BoxedCall;

  void serve(const c10::OperatorHandle& op, DispatchKeySet keys, Stack* stack) const {
    Arguments arguments;
    if (!State::now().ordinary || !arguments.bind(*record, arguments_on(*stack))) {
      call_python(record->twin.get(), *stack, &keys);
      return;
    }
    // Without results there is nothing to derive, but the twin refuses gradients that a mutation would lose.
    const bool derive = arguments.requires_grad && c10::GradMode::is_enabled() &&
                        (record->mutates || !record->results.empty());
    const bool direct =
        arguments.first != nullptr && !record->mutates && !is_overridden(*record, *arguments.first);
    if (!derive && direct) {
      run_here(arguments, *stack);
    } else if (!derive) {
      at::AutoDispatchBelowAutograd below;
      op.redispatchBoxed(keys & c10::after_autograd_keyset, stack);
    } else if (!direct) {
      call_python(record->twin.get(), *stack, &keys);
    } else {
      const InPython within;
      Arguments held(std::move(arguments));
      held.wrap(*record, arguments_on(*stack));
      held.observed = is_profiled();
      const Calling calling(*record);
      const Chosen kernel = select(*record, held);
      const Returned returned = differentiate(record, *kernel, held);
      replace(*stack, returned.raw.get());
    }
  }
};

struct VersionCall final : BoxedCall {
  using BoxedCall::BoxedCall;

  void serve(const c10::OperatorHandle& op, DispatchKeySet keys, Stack* stack) const {
    const auto given = arguments_on(*stack);
    for (size_t i = 0; i < given.size(); ++i) {
      if (record->params[i].mutated) { bump_all(given[i]); }
    }
    op.redispatchBoxed(keys & c10::after_ADInplaceOrView_keyset, stack);
  }

 private:
  static void bump_all(const c10::IValue& value) {
    if (value.isTensor()) {
      if (value.toTensor().defined()) { bump(value.toTensor()); }
    } else if (value.isTensorList()) {
      for (const at::Tensor& tensor : value.toTensorList()) { bump(tensor); }
    }
  }
};

// The record of an op, which Python makes at the first call.
class Described {
 public:
  explicit Described(Kept describe) : describe_(std::move(describe)) {}

  std::shared_ptr<Record> record() {
    if (!ready_.load(std::memory_order_acquire)) {
      const InPython within;
      const Ref native = called(describe_.get(), {});
      if (!ready_.load(std::memory_order_relaxed)) {
        record_ = record_of(native.get());
        ready_.store(true, std::memory_order_release);
      }
    }
    return record_;
  }

 private:
  const Kept describe_;
  std::atomic<bool> ready_{false};
  std::shared_ptr<Record> record_;
};

template <typename Call>
struct OpKernel final : c10::OperatorKernel {
  explicit OpKernel(std::shared_ptr<Described> op) : op_(std::move(op)) {}

  void operator()(const c10::OperatorHandle& op, DispatchKeySet keys, Stack* stack) {
    Call(op_->record()).serve(op, keys, stack);
  }

 private:
  std::shared_ptr<Described> op_;
};

template <typename Call>
c10::RegistrationHandleRAII put(const c10::OperatorName& name, DispatchKey key,
                                const std::shared_ptr<Described>& op) {
  auto kernel = c10::KernelFunction::makeFromBoxedFunctor<OpKernel<Call>>(
      std::make_unique<OpKernel<Call>>(op));
  return c10::Dispatcher::singleton().registerImpl(name, key, std::move(kernel), std::nullopt,
                                                   nullptr, "opkit");
}

}  // namespace

std::vector<c10::RegistrationHandleRAII> register_kernels(const c10::OperatorName& name,
                                                          bool mutates, Ref describe) {
  const auto op = std::make_shared<Described>(Kept(std::move(describe)));
  std::vector<c10::RegistrationHandleRAII> handles;
  handles.push_back(put<DeviceCall>(name, DispatchKey::CompositeExplicitAutograd, op));
  handles.push_back(put<AutogradCall>(name, DispatchKey::Autograd, op));
  if (mutates) { handles.push_back(put<VersionCall>(name, DispatchKey::ADInplaceOrView, op)); }
  return handles;
}

}  // namespace opkit_core

// A call: its arguments, whether anything special is in force, the kernel, and the results.
#pragma once

#include "record.h"

#include <torch/csrc/autograd/python_variable.h>

namespace opkit_core {

// Thrown with Python's error set.
[[noreturn]] void throw_python_error();

// The arguments of a call in schema order.
struct Arguments {
  c10::SmallVector<PyObject*, 16>
      values;  // borrowed; in the boxed world made when Python needs them
  c10::SmallVector<Ref, 4> owned;
  c10::SmallVector<const at::Tensor*, 16> tensors;     // null for what is no tensor, or None
  c10::SmallVector<int64_t, 16> ints;                  // 0 for what is none
  std::vector<c10::SmallVector<at::Tensor, 4>> lists;  // of tensors, in order
  const at::Tensor* first = nullptr;                   // also in lists
  bool requires_grad = false;

  // Reads the arguments of a Python call; false where one of them is not what the fast path takes.
  bool bind(const Record& record, PyObject* const* args, size_t count, PyObject* keywords);
  // Reads them from a stack; false where a tensor is special.
  bool bind(const Record& record, c10::ArrayRef<c10::IValue> stack);
  // Makes `values` of a stack.
  void wrap(const Record& record, c10::ArrayRef<c10::IValue> stack);
  Ref tuple() const;

 private:
  void resize(size_t count);
  bool in_order(const Record& record);
  bool take(const Param& param, size_t place, PyObject* value);
  bool take(const at::Tensor& tensor);
};

// What is special around a call.
struct State {
  bool ordinary;  // whether only autograd, autocast and a device can have to do with the call
  bool below_autograd;
  bool autocast;

  static State now();
};

// Whether something is to see the call itself: a profiler, a mode over torch's functions.
bool is_observed();

// Whether this thread prefers, or requires, certain kernels.
bool has_preference();

// Whether somebody else has a kernel of the op on the call's device.
bool is_overridden(const Record& record, const at::Tensor& first);

// What a kernel returned: as torch carries it, and as the caller gets it.
struct Returned {
  Ref raw;
  Ref whole;
};

// Chooses a kernel; Python is asked where that was never done.
std::shared_ptr<const Kernel> select(Record& record, const Arguments& arguments);

// Runs a kernel below autograd.
Returned run(Record& record, const Kernel& kernel, Arguments& arguments);

// Runs a native kernel on a stack of arguments, which it replaces by the results. Needs no GIL.
void run_native(const Kernel& kernel, c10::DispatchKey key, torch::jit::Stack& stack);

// The key of the kernels for the device of a plain tensor.
c10::DispatchKey device_key(const at::Tensor& tensor);

// Runs a kernel, and records how the call is differentiated.
Returned differentiate(std::shared_ptr<Record> record, const Kernel& kernel, Arguments& arguments);

c10::IValue to_ivalue(const Param& param, PyObject* value);
Ref from_ivalue(const c10::IValue& value);
// An int that a kernel or a meta function returned: while an op is traced, a torch.SymInt.
c10::IValue int_result(PyObject* value);

// The results among what was returned, one for each that is declared.
c10::SmallVector<PyObject*, 4> flat_results(const Record& record, PyObject* raw);

}  // namespace opkit_core

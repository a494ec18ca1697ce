// The arguments of a call, and values on their way between Python and torch.
#pragma once

#include "record.h"

#include <torch/csrc/autograd/python_variable.h>

namespace opkit_core {

// Whether only autograd and its device have to do with a tensor.
bool is_plain(const at::Tensor& tensor);

// Raises the version counter of a tensor that is written into.
void bump(const at::Tensor& tensor);

// In schema order.
struct Arguments {
  // Borrowed; of a call from the dispatcher, made when Python needs them.
  c10::SmallVector<PyObject*, 16> values;
  c10::SmallVector<Ref, 4> owned;
  c10::SmallVector<const at::Tensor*, 16> tensors;     // null for what is no tensor, or None
  c10::SmallVector<int64_t, 16> ints;                  // if the shape line reads some
  std::vector<c10::SmallVector<at::Tensor, 4>> lists;  // of tensors, in order
  const at::Tensor* first = nullptr;                   // also in lists
  c10::DispatchKeySet keys;                            // of all tensors
  bool requires_grad = false;                          // one of them at least
  bool observed = false;                               // whether a profile is taken of the call

  // Reads the arguments of a Python call; false where one of them is not what the fast path takes.
  bool bind(const Record& record, PyObject* const* args, size_t count, PyObject* keywords);
  // Reads them from a stack; false where a tensor is special.
  bool bind(const Record& record, c10::ArrayRef<c10::IValue> stack);
  // Makes `values` of a stack.
  void wrap(const Record& record, c10::ArrayRef<c10::IValue> stack);
  Ref tuple() const { return tuple_of(values); }
  bool are_contiguous(const Record& record) const;
  // Whether something holds of all tensors, given with the place of their argument: in the op's order, whatever the
  // order of the call.
  template <typename F>
  bool all(const Record& record, F holds) const;
  // The number of elements of all tensors together.
  uint64_t numel(const Record& record) const;

 private:
  void expect_ints(const Record& record);
  bool bind_named(const Record& record, PyObject* const* args, size_t count, PyObject* keywords);
  bool take(const Param& param, size_t place, PyObject* value);
  bool take_list(const Param& param, size_t place, PyObject* value);
  void note(const at::Tensor& tensor);
  bool are_plain(const Record& record);

  bool metadata_ = false;  // whether autograd keeps some for one of the tensors
};

template <typename F>
bool Arguments::all(const Record& record, F holds) const {
  auto list = lists.begin();
  for (size_t i = 0; i < tensors.size(); ++i) {
    if (tensors[i] != nullptr) {
      if (!holds(i, *tensors[i])) { return false; }
    } else if (record.params[i].list && record.params[i].kind == Kind::Tensor) {
      if (values.empty()) {
        for (const at::Tensor& tensor : *list++) {
          if (!holds(i, tensor)) { return false; }
        }
      } else if (values[i] != Py_None) {
        for (Py_ssize_t k = 0; k < PyList_GET_SIZE(values[i]); ++k) {
          if (!holds(i, THPVariable_Unpack(PyList_GET_ITEM(values[i], k)))) { return false; }
        }
      }
    }
  }
  return true;
}

c10::IValue to_ivalue(const Param& param, PyObject* value);
Ref from_ivalue(const c10::IValue& value);
// The same of an argument, which Python code may see in another form than torch carries it.
Ref from_ivalue(const Param& param, const c10::IValue& value);
c10::ScalarType dtype_of(PyObject* object);
// An int that a kernel or a meta function returned: while an op is traced, a torch.SymInt.
c10::IValue int_result(PyObject* value);

}  // namespace opkit_core

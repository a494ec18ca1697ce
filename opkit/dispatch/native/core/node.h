// The one node that every op is differentiated by: what it saves and the formula are data.
#pragma once

#include "call.h"
#include "context.h"

#include <torch/csrc/autograd/function.h>
#include <torch/csrc/autograd/saved_variable.h>

namespace opkit_core {

using torch::autograd::variable_list;

// What holds a node: a shared_ptr in torch 2.11, an intrusive one since.
using NodePtr = decltype(std::declval<torch::autograd::Node&>().getptr());

// What a gradient of zeros is made of.
struct Zeros {
  std::vector<int64_t> sizes;
  at::TensorOptions options;
};

struct Node : torch::autograd::Node {
  // What `lengths`, `output_lengths` and `saved_counts` have for a lone tensor, and for what is none.
  static constexpr int64_t kLone = -1, kNoTensor = -2;

  std::shared_ptr<Record> record;
  std::shared_ptr<const Formula> formula;
  std::vector<int64_t> lengths;         // of the arguments: kLone for what is no list of tensors
  std::vector<int64_t> output_lengths;  // of the results
  // Of outputs laid flat; none for one whose metadata says it: that has a gradient.
  std::vector<std::optional<Zeros>> zeros;
  // Of an Op: what it is called with after the gradients, None in the place of what is saved.
  std::vector<c10::IValue> values;
  std::vector<int64_t> saved_counts;  // how many tensors are saved for each value
  // Of a formula in Python.
  Kept context;
  Kept lost;  // which of the saved tensors have no history

  ~Node() override;
  std::string name() const override { return record->node_name; }
  void release_variables() override;
  variable_list apply(variable_list&& grads) override;

  // For compiled autograd; in compiled_node.cpp.
  void compiled_args(torch::dynamo::autograd::CompiledNodeArgs& args) const override;
  variable_list apply_with_saved(const variable_list& grads,
                                 torch::dynamo::autograd::SwapSavedVariables& swapped) override;

  void save(const at::Tensor& tensor, bool is_output);
  size_t saved_count() const { return captured_ ? captured_->tensors.size() : saved_.size(); }
  at::Tensor unpack(size_t i);

 private:
  // What a node in a graph of compiled autograd, which is in no other graph, has in the place of the saved tensors
  // and of edges.
  struct Captured {
    std::vector<at::Tensor> tensors;
    std::vector<bool> wanted;
  };

  // An edge: the argument that it is of, which of the tensors if that is a list, and its place among all edges, and
  // among all arguments laid flat.
  struct Slot {
    size_t argument;
    int64_t index;
    size_t edge;
    size_t flat;
  };

  std::vector<torch::autograd::SavedVariable> saved_;
  std::vector<bool> is_output_;
  std::optional<Captured> captured_;

  template <typename Visit>
  void each_slot(Visit visit) const;
  bool is_wanted(size_t edge) const;
  at::Tensor gradient(const variable_list& grads, size_t output) const;
  at::Tensor checked(const Slot& slot, const at::Tensor& grad) const;
  Ref python_lengths() const;
  Ref flattened(PyObject* found) const;

  variable_list apply_op(const variable_list& grads);
  torch::jit::Stack formula_arguments(const variable_list& grads);
  variable_list apply_op_in_python(const variable_list& grads, const torch::jit::Stack& stack);
  variable_list from_stack(const torch::jit::Stack& stack) const;
  at::Tensor from_result(const c10::IValue& value, const Slot& slot) const;

  variable_list apply_python(const variable_list& grads);
  Ref call_formula(PyObject* seen, const variable_list& grads) const;
  Ref call_outside(PyObject* function, c10::ArrayRef<PyObject*> given) const;
  variable_list from_python(Ref found) const;

  std::vector<int64_t> output_sizes(size_t output) const;
  std::shared_ptr<Node> captured() const;
  variable_list replay(std::vector<at::Tensor> tensors, const variable_list& grads) const;
  void copy_to(Node& other) const;
};

template <typename T = Node>
auto make_node() {
  if constexpr (std::is_same_v<NodePtr, std::shared_ptr<torch::autograd::Node>>) {
    return std::shared_ptr<T>(
        new T(), [](T* node) { deleteNode(node); });  // of torch::autograd, where it is
  } else {
    return c10::make_intrusive<T>();
  }
}
using NodeRef = decltype(make_node<>());

}  // namespace opkit_core

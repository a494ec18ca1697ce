#include "node.h"

#include <c10/core/GradMode.h>
#include <torch/csrc/Exceptions.h>

namespace opkit_core {
namespace {

// Says which node has the saved tensors of a context, while that node runs.
class Running {
 public:
  Running(Context* context, Node* node) : context_(context) {
    context_->node = node;
    ++context_->depth;
  }
  ~Running() {
    if (--context_->depth == 0) { context_->node = nullptr; }
  }
  Running(const Running&) = delete;
  Running& operator=(const Running&) = delete;

 private:
  Context* context_;
};

// Whether a gradient is plainly of the kind that an edge leads to. Of what has shapes of its own kind, torch decides.
bool is_like(const at::Tensor& grad, const torch::autograd::InputMetadata& meta) {
  if (meta.is_nested_tensor() || meta.is_tensor_subclass() ||
      grad.unsafeGetTensorImpl()->has_symbolic_sizes_strides()) {
    return true;
  }
  const auto shape = meta.shape_as_dim_vector();
  bool same = grad.scalar_type() == c10::typeMetaToScalarType(meta.dtype()) &&
              grad.device() == meta.device() && static_cast<size_t>(grad.dim()) == shape.size();
  for (size_t i = 0; same && i < shape.size(); ++i) {
    same = shape[i] == grad.size(static_cast<int64_t>(i));
  }
  return same;
}

// Puts the defaults of further arguments on a stack. False where it is not for the op: another one may have the
// formula's name by now.
bool complete(const c10::OperatorHandle& op, torch::jit::Stack& stack, size_t results) {
  const c10::FunctionSchema& schema = op.schema();
  if (schema.returns().size() != results) { return false; }
  const auto& arguments = schema.arguments();
  for (size_t i = stack.size(); i < arguments.size(); ++i) {
    if (!arguments[i].default_value()) { return false; }
    stack.push_back(*arguments[i].default_value());
  }
  return stack.size() == arguments.size();
}

}  // namespace

PyObject* unpack_saved(Node* node) {
  HANDLE_TH_ERRORS
  return tuple_of(node->saved_count(),
                  [&](size_t i) {
                    const at::Tensor tensor = node->unpack(i);
                    return tensor.defined() ? checked_ref(THPVariable_Wrap(tensor))
                                            : Ref::borrow(Py_None);
                  })
      .release();
  END_HANDLE_TH_ERRORS
}

Node::~Node() {
  if (!context) { return; }
  WithGil gil;
  if (gil.held) { reinterpret_cast<Context*>(context.get())->node = nullptr; }
}

void Node::release_variables() {
  const std::lock_guard<std::mutex> lock(mutex_);
  for (auto& one : saved_) { one.reset_data(); }
}

void Node::save(const at::Tensor& tensor, bool is_output) {
  saved_.emplace_back(tensor, is_output);
  is_output_.push_back(is_output);
}

at::Tensor Node::unpack(size_t i) {
  return captured_ ? captured_->tensors[i] : saved_[i].unpack(is_output_[i] ? getptr() : NodePtr());
}

variable_list Node::apply(variable_list&& grads) {
  return formula->form == Formula::Op ? apply_op(grads) : apply_python(grads);
}

template <typename Visit>
void Node::each_slot(Visit visit) const {
  size_t edge = 0, flat = 0;
  for (size_t i = 0; i < lengths.size(); ++i) {
    if (record->params[i].kind != Kind::Tensor) {
      ++flat;
      continue;
    }
    const int64_t count = lengths[i] == kLone ? 1 : lengths[i];
    for (int64_t k = 0; k < count; ++k) { visit(Slot{i, k, edge++, flat++}); }
  }
}

bool Node::is_wanted(size_t edge) const {
  return captured_ ? captured_->wanted[edge] : next_edge(edge).is_valid();
}

// The gradient of an output, zeros where none arrived.
at::Tensor Node::gradient(const variable_list& grads, size_t output) const {
  if (grads[output].defined()) { return grads[output]; }
  if (zeros[output]) { return at::zeros(zeros[output]->sizes, zeros[output]->options); }
  return input_metadata(output).zeros_like();
}

// Holds a gradient to its argument; Python decides where they differ.
at::Tensor Node::checked(const Slot& slot, const at::Tensor& grad) const {
  if (!grad.defined() || !is_wanted(slot.edge)) { return {}; }
  if (captured_) { return grad; }  // torch checks it in the graph
  const torch::autograd::Edge& next = next_edge(slot.edge);
  const auto& meta = next.function->input_metadata(next.input_nr);
  if (is_like(grad, meta)) { return grad; }
  const auto shape = c10::asIntArrayRefSlowOpt(meta.shape_as_dim_vector());
  if (!shape) { return grad; }
  const InPython entered;
  const Ref sizes = tuple_of(
      shape->size(), [&](size_t i) { return checked_ref(PyLong_FromLongLong((*shape)[i])); });
  const Ref like = checked_ref(THPVariable_Wrap(at::empty({0}, meta.options())));
  const Ref its = checked_ref(THPVariable_Wrap(grad));
  const Ref place = checked_ref(PyLong_FromSize_t(slot.flat));
  const Ref all = python_lengths();
  called(record->check.get(), {place.get(), all.get(), its.get(), sizes.get(), like.get()});
  return grad;
}

Ref Node::python_lengths() const {
  return list_of(lengths.size(), [&](size_t i) {
    return lengths[i] == kLone ? Ref::borrow(Py_None)
                               : checked_ref(PyLong_FromLongLong(lengths[i]));
  });
}

// Lays gradients flat, or raises what is wrong with one of them.
Ref Node::flattened(PyObject* found) const {
  const Ref all = python_lengths();
  const Ref flat = called(record->flatten.get(), {found, all.get()});
  return checked_ref(PySequence_Tuple(flat.get()));
}

// Calls a function, which compiled autograd traces, but whose own derivatives are not its business.
Ref Node::call_outside(PyObject* function, c10::ArrayRef<PyObject*> given) const {
  if (!captured_) { return called(function, given); }
  c10::SmallVector<PyObject*, 8> all{function};
  all.append(given.begin(), given.end());
  return called(record->alone.get(), all);
}

variable_list Node::apply_op(const variable_list& grads) {
  torch::jit::Stack stack = formula_arguments(grads);
  const auto op = c10::Dispatcher::singleton().findSchema(formula->op);
  const bool again = !formula->lost.empty() && c10::GradMode::is_enabled();
  if (again || !op || !complete(*op, stack, formula->arguments.size())) {
    return apply_op_in_python(grads, stack);
  }
  op->callBoxed(stack);
  return from_stack(stack);
}

torch::jit::Stack Node::formula_arguments(const variable_list& grads) {
  torch::jit::Stack stack;
  stack.reserve(formula->outputs.size() + values.size() + 2);  // for defaults
  for (const size_t output : formula->outputs) { stack.emplace_back(gradient(grads, output)); }
  {
    const std::lock_guard<std::mutex> lock(mutex_);
    size_t at = 0;
    for (size_t i = 0; i < values.size(); ++i) {
      if (saved_counts[i] == kNoTensor) {
        stack.push_back(values[i]);
      } else if (saved_counts[i] == kLone) {
        stack.emplace_back(unpack(at++));
      } else {
        c10::List<at::Tensor> list;
        for (int64_t k = 0; k < saved_counts[i]; ++k) { list.push_back(unpack(at++)); }
        stack.emplace_back(std::move(list));
      }
    }
  }
  return stack;
}

// Applies an Op as its twin does: where a derivative that saves what has no history may be differentiated once more,
// and where the op is no more, so that the same is raised.
variable_list Node::apply_op_in_python(const variable_list& grads, const torch::jit::Stack& stack) {
  const InPython entered;
  const Ref all = tuple_of(
      grads.size(), [&](size_t i) { return checked_ref(THPVariable_Wrap(gradient(grads, i))); });
  const Ref kept = tuple_of(values.size(), [&](size_t i) {
    const auto& [is_output, place] = formula->saves[i];
    const c10::IValue& value = stack[formula->outputs.size() + i];
    return is_output ? from_ivalue(value) : from_ivalue(record->params[place], value);
  });
  c10::SmallVector<bool, 8> needed(lengths.size(), false);
  each_slot([&](const Slot& slot) {
    needed[slot.argument] = needed[slot.argument] || is_wanted(slot.edge);
  });
  const Ref needs =
      tuple_of(needed.size(), [&](size_t i) { return Ref::steal(PyBool_FromLong(needed[i])); });
  return from_python(call_outside(record->again.get(),
                                  {formula->object.get(), all.get(), kept.get(), needs.get()}));
}

// Reads one gradient, or list of gradients, for each of the formula's arguments.
variable_list Node::from_stack(const torch::jit::Stack& stack) const {
  const auto& arguments = formula->arguments;
  variable_list found;
  found.reserve(next_edges().size());
  each_slot([&](const Slot& slot) {
    const auto place = std::find(arguments.begin(), arguments.end(), slot.argument);
    const bool given = place != arguments.end() && is_wanted(slot.edge);
    found.push_back(given ? checked(slot, from_result(stack[place - arguments.begin()], slot))
                          : at::Tensor());
  });
  return found;
}

// The gradient of an edge among those of its argument.
at::Tensor Node::from_result(const c10::IValue& value, const Slot& slot) const {
  const int64_t length = lengths[slot.argument];
  if (value.isTensor()) { return value.toTensor(); }
  if (length == kLone || !value.isTensorList()) { return {}; }
  const auto list = value.toTensorList();
  if (list.size() != static_cast<size_t>(length)) {
    const InPython entered;
    const Ref found = tuple_of(lengths.size(), [&](size_t i) {
      return i == slot.argument ? from_ivalue(value) : Ref::borrow(Py_None);
    });
    flattened(found.get());  // raises
  }
  return list.get(static_cast<size_t>(slot.index));
}

variable_list Node::apply_python(const variable_list& grads) {
  const InPython entered;
  const NodePtr alive = getptr();
  const Running running(reinterpret_cast<Context*>(context.get()), this);
  Ref seen = Ref::borrow(context.get());
  if (lost && c10::GradMode::is_enabled()) {
    seen = called(record->tracked.get(), {seen.get(), lost.get()});
  }
  return from_python(call_formula(seen.get(), grads));
}

Ref Node::call_formula(PyObject* seen, const variable_list& grads) const {
  const bool materialize = reinterpret_cast<Context*>(context.get())->materialize;
  size_t at = 0;
  const auto wrapped = [&] {
    const size_t output = at++;
    if (!grads[output].defined() && !materialize) { return Ref::borrow(Py_None); }
    return checked_ref(THPVariable_Wrap(gradient(grads, output)));
  };
  c10::SmallVector<Ref, 8> owned;
  c10::SmallVector<PyObject*, 8> given{seen};
  for (const int64_t length : output_lengths) {
    if (length == kNoTensor) {  // None, or a number
      owned.push_back(Ref::borrow(Py_None));
      ++at;
    } else if (length == kLone) {
      owned.push_back(wrapped());
    } else {
      owned.push_back(list_of(static_cast<size_t>(length), [&](size_t) { return wrapped(); }));
    }
    given.push_back(owned.back().get());
  }
  if (formula->form == Formula::Rule) {
    const Ref all = tuple_of(c10::ArrayRef<PyObject*>(given).slice(1));
    return call_outside(formula->gradients.get(), {seen, all.get()});
  }
  Ref found = call_outside(formula->backward.get(), given);
  const bool counted = PyTuple_CheckExact(found.get()) &&
                       static_cast<size_t>(PyTuple_GET_SIZE(found.get())) == record->params.size();
  return counted ? found : called(formula->counted.get(), {found.get()});
}

// Reads one gradient for each argument.
variable_list Node::from_python(Ref found) const {
  found = checked_ref(PySequence_Tuple(found.get()));
  bool special = false;  // a list, or what cannot be a gradient
  for (size_t i = 0; i < lengths.size(); ++i) {
    PyObject* one = PyTuple_GET_ITEM(found.get(), static_cast<Py_ssize_t>(i));
    const bool plain =
        one == Py_None || (record->params[i].kind == Kind::Tensor && THPVariable_Check(one));
    special = special || lengths[i] != kLone || !plain;
  }
  if (special) { found = flattened(found.get()); }
  variable_list result;
  result.reserve(next_edges().size());
  each_slot([&](const Slot& slot) {
    PyObject* one = PyTuple_GET_ITEM(found.get(), static_cast<Py_ssize_t>(slot.flat));
    result.push_back(checked(slot, one == Py_None ? at::Tensor() : THPVariable_Unpack(one)));
  });
  return result;
}

}  // namespace opkit_core

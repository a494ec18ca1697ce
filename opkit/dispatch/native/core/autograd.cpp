// The one node that every op is differentiated by: what it saves and the formula are data.

#include "call.h"
#include "context.h"

#include <ATen/core/LegacyTypeDispatch.h>
#include <c10/core/GradMode.h>
#include <torch/csrc/Exceptions.h>
#include <torch/csrc/autograd/function.h>
#include <torch/csrc/autograd/functions/utils.h>
#include <torch/csrc/autograd/saved_variable.h>
#include <torch/csrc/dynamo/compiled_autograd.h>

#include <type_traits>

namespace opkit_core {

using torch::autograd::Edge;
using torch::autograd::SavedVariable;
using torch::autograd::variable_list;

// What holds a node: a shared_ptr in torch 2.11, an intrusive one since.
using NodePtr = decltype(std::declval<torch::autograd::Node&>().getptr());

struct Node : torch::autograd::Node {
  std::shared_ptr<Record> record;
  std::shared_ptr<const Formula> formula;
  std::vector<SavedVariable> saved;
  // Of an Op: what it is called with after the gradients, a saved tensor where there is none.
  std::vector<c10::IValue> values;
  std::vector<int64_t>
      saved_counts;  // for each value that is in `saved`: of how many tensors, -1 for a lone one
  // Of a formula in Python.
  Kept context;
  Kept lost;  // which of the saved tensors have no history
  std::vector<std::optional<at::TensorOptions>> constant_options;  // of outputs without a gradient
  std::vector<std::vector<int64_t>> constant_sizes;
  std::vector<int64_t> lengths;  // of the arguments: -1 for what is no list of tensors
  std::vector<int64_t> output_lengths;

  ~Node() override {
    if (context) {
      WithGil gil;
      if (gil.held) { reinterpret_cast<Context*>(context.get())->node = nullptr; }
    }
  }

  std::string name() const override { return record->node_name; }

  void release_variables() override {
    const std::lock_guard<std::mutex> lock(mutex_);
    for (SavedVariable& one : saved) { one.reset_data(); }
  }

  variable_list apply(variable_list&& grads) override {
    return formula->form == Formula::Op ? apply_op(grads) : apply_python(grads);
  }

  void compiled_args(torch::dynamo::autograd::CompiledNodeArgs& args) const override {
    args.collect(record->id);
    args.collect(formula->id);
    std::string shape;
    const auto put = [&](const auto& numbers) {
      for (const auto number : numbers) {
        shape += std::to_string(static_cast<int64_t>(number)) + ',';
      }
      shape += ';';
    };
    put(lengths);
    put(output_lengths);
    put(saved_counts);
    for (const auto& options : constant_options) { shape += options ? 'c' : 'd'; }
    for (size_t i = 0; num_inputs() > 1 && i < num_inputs(); ++i) { put(output_sizes(i)); }
    if (context) { shape += reinterpret_cast<Context*>(context.get())->materialize ? 'm' : 'n'; }
    args.collect(shape);
    for (const SavedVariable& one : saved) { args.collect(one, is_output_[&one - saved.data()]); }
    std::string key;  // numbers are constants of what is compiled
    for (const c10::IValue& value : values) { append(key, value); }
    args.collect(key);
    for (const auto& edge : next_edges()) { args.collect(edge.is_valid()); }
    // A formula in Python reads whatever it has put on its context, which is part of what is compiled then.
    const bool bare = !context || (!lost && reinterpret_cast<Context*>(context.get())->is_bare());
    static std::atomic<int64_t> calls{1};
    args.collect(bare ? int64_t{0} : calls.fetch_add(1));
  }

  // Puts the call of the formula into the graph, as torch does with C++ autograd functions: it runs where sizes are
  // known, on a node that has the saved tensors as they are there.
  variable_list apply_with_saved(const variable_list& grads,
                                 torch::dynamo::autograd::SwapSavedVariables& swapped) override {
    struct Swapped {
      Node* node;
      torch::dynamo::autograd::SwapSavedVariables& swapped;
      size_t count = 0;
      ~Swapped() {
        for (size_t i = 0; i < count; ++i) { swapped.after(node->saved[i]); }
      }
    } within{this, swapped};
    for (SavedVariable& one : saved) {
      swapped.before(one);
      ++within.count;
    }
    std::vector<c10::IValue> packed;
    std::vector<at::TypePtr> schema;
    std::vector<bool> present;
    for (size_t i = 0; i < saved.size(); ++i) {
      const at::Tensor tensor = unpack(i);
      present.push_back(tensor.defined());
      if (tensor.defined()) {
        packed.emplace_back(tensor);
        schema.push_back(at::TensorType::get());
      }
    }
    const std::shared_ptr<Node> like = captured();
    const auto run = [like, present](const variable_list& given,
                                     const std::vector<c10::IValue>& args) {
      std::vector<at::Tensor> tensors(present.size());
      size_t at = 0;
      for (size_t i = 0; i < present.size(); ++i) {
        if (present[i]) { tensors[i] = args[at++].toTensor(); }
      }
      return like->run(std::move(tensors), given);
    };
    using torch::dynamo::autograd::get_input_metadata;
    using torch::dynamo::autograd::IValuePacker;
    const auto metadata =
        IValuePacker<std::vector<std::optional<torch::autograd::InputMetadata>>>::pack(
            get_input_metadata(next_edges()));
    const auto& compiler = torch::dynamo::autograd::getPyCompilerInterface();
    const auto function =
        compiler->bind_function(swapped.get_py_compiler(), name(), run, schema, true, true);
    return compiler->call_function(swapped.get_py_compiler(), "apply_functional", function, grads,
                                   packed, metadata);
  }

  void save(const at::Tensor& tensor, bool is_output) {
    saved.emplace_back(tensor, is_output);
    is_output_.push_back(is_output);
  }

  at::Tensor unpack(size_t i) {
    return captured_ ? given_[i] : saved[i].unpack(is_output_[i] ? getptr() : NodePtr());
  }

  size_t saved_count() const { return captured_ ? given_.size() : saved.size(); }

 private:
  std::vector<bool> is_output_;
  // Of a node in a graph of compiled autograd, which is in no other graph:
  bool captured_ = false;
  std::vector<at::Tensor> given_;            // the saved tensors
  std::vector<bool> wanted_;                 // for each gradient, whether there is an edge
  std::vector<std::vector<int64_t>> sizes_;  // of the outputs that have gradients
  std::vector<at::TensorOptions> options_;

  // Of an output that has a gradient; nothing of another one.
  std::vector<int64_t> output_sizes(size_t output) const {
    std::vector<int64_t> sizes;
    if (!constant_options[output]) {
      for (const c10::SymInt& size : input_metadata(output).shape_as_dim_vector()) {
        sizes.push_back(size.guard_int(__FILE__, __LINE__));
      }
    }
    return sizes;
  }

  bool is_wanted(size_t edge) const {
    return captured_ ? wanted_[edge] : next_edge(edge).is_valid();
  }
  std::shared_ptr<Node> captured();
  variable_list run(std::vector<at::Tensor> tensors, const variable_list& grads) const;
  void copy_to(Node& other) const;

  variable_list apply_op(variable_list& grads);
  variable_list apply_op_again(variable_list& grads, torch::jit::Stack& stack);
  variable_list apply_python(variable_list& grads);
  Ref call_python(PyObject* seen, const variable_list& grads);
  void refuse_count(size_t argument, const c10::IValue& found) const;
  Ref call_outside(PyObject* function, c10::ArrayRef<PyObject*> given);
  variable_list from_python(Ref found);
  static void append(std::string& key, const c10::IValue& value);
  at::Tensor zeros(size_t output) const;
  // Holds a gradient to its argument; Python decides where they differ.
  at::Tensor checked(size_t edge, size_t flat, const at::Tensor& grad);
  Ref python_lengths() const;
};

namespace {

template <typename T>
auto make_node() {
  if constexpr (std::is_same_v<NodePtr, std::shared_ptr<torch::autograd::Node>>) {
    return std::shared_ptr<T>(
        new T(), [](T* node) { deleteNode(node); });  // of torch::autograd, where it is
  } else {
    return c10::make_intrusive<T>();
  }
}

Ref checked_ref(PyObject* object) {
  if (object == nullptr) { throw_python_error(); }
  return Ref::steal(object);
}

bool is_differentiable(const at::Tensor& tensor) {
  return tensor.is_floating_point() || tensor.is_complex();
}

}  // namespace

PyObject* unpack_saved(Node* node) {
  HANDLE_TH_ERRORS
  Ref found = checked_ref(PyTuple_New(static_cast<Py_ssize_t>(node->saved_count())));
  for (size_t i = 0; i < node->saved_count(); ++i) {
    const at::Tensor tensor = node->unpack(i);
    PyObject* one = Py_None;
    if (tensor.defined()) {
      one = checked_ref(THPVariable_Wrap(tensor)).release();
    } else {
      Py_INCREF(one);
    }
    PyTuple_SET_ITEM(found.get(), static_cast<Py_ssize_t>(i), one);
  }
  return found.release();
  END_HANDLE_TH_ERRORS
}

at::Tensor Node::zeros(size_t output) const {
  if (constant_options[output]) {
    return at::zeros(constant_sizes[output], *constant_options[output]);
  }
  if (captured_) { return at::zeros(sizes_[output], options_[output]); }
  return input_metadata(output).zeros_like();
}

at::Tensor Node::checked(size_t edge, size_t flat, const at::Tensor& grad) {
  if (captured_) { return is_wanted(edge) ? grad : at::Tensor(); }  // torch checks it in the graph
  const Edge& next = next_edge(edge);
  if (!grad.defined() || !next.is_valid()) { return {}; }
  const auto& meta = next.function->input_metadata(next.input_nr);
  if (!meta.is_nested_tensor() && !grad.unsafeGetTensorImpl()->has_symbolic_sizes_strides() &&
      !meta.is_tensor_subclass()) {
    const auto shape = meta.shape_as_dim_vector();
    bool same = grad.scalar_type() == c10::typeMetaToScalarType(meta.dtype()) &&
                grad.device() == meta.device() && static_cast<size_t>(grad.dim()) == shape.size();
    for (size_t i = 0; same && i < shape.size(); ++i) {
      same = shape[i] == grad.size(static_cast<int64_t>(i));
    }
    if (!same) {
      WithGil gil;
      Ref shape_tuple = checked_ref(PyTuple_New(static_cast<Py_ssize_t>(shape.size())));
      for (size_t i = 0; i < shape.size(); ++i) {
        const auto size = shape[i].maybe_as_int();
        if (!size) { return grad; }
        PyTuple_SET_ITEM(shape_tuple.get(), static_cast<Py_ssize_t>(i), PyLong_FromLongLong(*size));
      }
      const Ref like = checked_ref(THPVariable_Wrap(at::empty({0}, meta.options())));
      const Ref its = checked_ref(THPVariable_Wrap(grad));
      const Ref index = checked_ref(PyLong_FromSize_t(flat));
      const Ref all = python_lengths();
      PyObject* given[] = {index.get(), all.get(), its.get(), shape_tuple.get(), like.get()};
      checked_ref(PyObject_Vectorcall(record->check.get(), given, 5, nullptr));
    }
  }
  return grad;
}

Ref Node::python_lengths() const {
  Ref all = checked_ref(PyList_New(static_cast<Py_ssize_t>(lengths.size())));
  for (size_t i = 0; i < lengths.size(); ++i) {
    PyObject* one = Py_None;
    if (lengths[i] >= 0) {
      one = checked_ref(PyLong_FromLongLong(lengths[i])).release();
    } else {
      Py_INCREF(one);
    }
    PyList_SET_ITEM(all.get(), static_cast<Py_ssize_t>(i), one);
  }
  return all;
}

// Copies all that a formula needs, beside the saved tensors.
void Node::copy_to(Node& other) const {
  other.record = record;
  other.formula = formula;
  other.values = values;
  other.saved_counts = saved_counts;
  other.constant_options = constant_options;
  other.constant_sizes = constant_sizes;
  other.lengths = lengths;
  other.output_lengths = output_lengths;
  other.captured_ = true;
  if (!context) { return; }
  WithGil gil;
  TORCH_CHECK(gil.held, "the interpreter is gone");
  const auto* mine = reinterpret_cast<Context*>(context.get());
  Context* its = new_context(mine->needs);
  other.context = Kept(Ref::steal(reinterpret_cast<PyObject*>(its)));
  its->materialize = mine->materialize;
  Py_XINCREF(mine->attributes);
  its->attributes = mine->attributes;
  other.lost = Kept(Ref::borrow(lost.get()));
}

std::shared_ptr<Node> Node::captured() {
  auto made = std::make_shared<Node>();
  copy_to(*made);
  for (const Edge& edge : next_edges()) { made->wanted_.push_back(edge.is_valid()); }
  for (size_t i = 0; i < num_inputs(); ++i) {
    made->sizes_.push_back(output_sizes(i));
    made->options_.push_back(constant_options[i] ? at::TensorOptions()
                                                 : input_metadata(i).options());
  }
  return made;
}

// Applies the formula to saved tensors and gradients of a graph.
variable_list Node::run(std::vector<at::Tensor> tensors, const variable_list& grads) const {
  auto made = make_node<Node>();
  copy_to(*made);
  made->wanted_ = wanted_;
  made->sizes_ = sizes_;
  made->options_ = options_;
  made->given_ = std::move(tensors);
  return made->apply(variable_list(grads));
}

variable_list Node::apply_op(variable_list& grads) {
  torch::jit::Stack stack;
  stack.reserve(formula->outputs.size() + values.size() + formula->rest.size());
  for (const size_t output : formula->outputs) {
    stack.emplace_back(grads[output].defined() ? grads[output] : zeros(output));
  }
  {
    const std::lock_guard<std::mutex> lock(mutex_);
    size_t at = 0, group = 0;
    for (const c10::IValue& value : values) {
      if (!value.isNone() || saved_counts[group] == -2) {
        stack.push_back(value);
      } else if (saved_counts[group] == -1) {
        stack.emplace_back(unpack(at++));
      } else {
        c10::List<at::Tensor> list;
        for (int64_t i = 0; i < saved_counts[group]; ++i) { list.push_back(unpack(at++)); }
        stack.emplace_back(std::move(list));
      }
      ++group;
    }
  }
  for (const c10::IValue& value : formula->rest) { stack.push_back(value); }
  if (!formula->lost.empty() && c10::GradMode::is_enabled()) {
    return apply_op_again(grads, stack);
  }
  const auto op = c10::Dispatcher::singleton().findSchema(formula->op);
  TORCH_CHECK(op, "differentiating ", record->name, ": its formula ", formula->op.name,
              " is no longer defined. Define it again, or register another one.");
  op->callBoxed(stack);
  // One gradient, or list of gradients, for each of the formula's arguments.
  c10::SmallVector<int64_t, 8> places(lengths.size(), -1);
  for (size_t i = 0; i < formula->arguments.size(); ++i) {
    places[formula->arguments[i]] = static_cast<int64_t>(i);
  }
  variable_list found;
  found.reserve(next_edges().size());
  size_t flat = 0;
  for (size_t i = 0; i < lengths.size(); ++i) {
    if (record->params[i].kind != Kind::Tensor) {
      ++flat;
      continue;
    }
    const int64_t count = std::max<int64_t>(lengths[i], 0);
    const bool list = lengths[i] >= 0;
    for (int64_t k = 0; k < (list ? count : 1); ++k, ++flat) {
      at::Tensor grad;
      if (places[i] >= 0 && is_wanted(found.size())) {
        const c10::IValue& value = stack[static_cast<size_t>(places[i])];
        if (list && value.isTensorList()) {
          if (value.toTensorList().size() != static_cast<size_t>(count)) { refuse_count(i, value); }
          grad = value.toTensorList().get(static_cast<size_t>(k));
        } else if (value.isTensor()) {
          grad = value.toTensor();
        }
      }
      found.push_back(checked(found.size(), flat, grad));
    }
  }
  return found;
}

// A derivative that may be differentiated once more, by a formula that saves what has no history.
variable_list Node::apply_op_again(variable_list& grads, torch::jit::Stack& stack) {
  WithGil gil;
  TORCH_CHECK(gil.held, "the interpreter is gone");
  Ref all = checked_ref(PyTuple_New(static_cast<Py_ssize_t>(grads.size())));
  for (size_t i = 0; i < grads.size(); ++i) {
    const at::Tensor grad = grads[i].defined() ? grads[i] : zeros(i);
    PyTuple_SET_ITEM(all.get(), static_cast<Py_ssize_t>(i),
                     checked_ref(THPVariable_Wrap(grad)).release());
  }
  Ref kept = checked_ref(PyTuple_New(static_cast<Py_ssize_t>(values.size())));
  for (size_t i = 0; i < values.size(); ++i) {
    PyTuple_SET_ITEM(kept.get(), static_cast<Py_ssize_t>(i),
                     from_ivalue(stack[formula->outputs.size() + i]).release());
  }
  Ref needs = checked_ref(PyTuple_New(static_cast<Py_ssize_t>(lengths.size())));
  size_t edge = 0;
  for (size_t i = 0; i < lengths.size(); ++i) {
    bool needed = false;
    if (record->params[i].kind == Kind::Tensor) {
      for (int64_t k = 0; k < (lengths[i] >= 0 ? lengths[i] : 1); ++k) {
        needed = is_wanted(edge++) || needed;
      }
    }
    PyTuple_SET_ITEM(needs.get(), static_cast<Py_ssize_t>(i), PyBool_FromLong(needed));
  }
  PyObject* given[] = {formula->object.get(), all.get(), kept.get(), needs.get()};
  return from_python(call_outside(record->again.get(), given));
}

// Has Python raise for another number of gradients than a list of tensors has elements.
void Node::refuse_count(size_t argument, const c10::IValue& found) const {
  WithGil gil;
  TORCH_CHECK(gil.held, "the interpreter is gone");
  Ref all = checked_ref(PyList_New(static_cast<Py_ssize_t>(lengths.size())));
  for (size_t i = 0; i < lengths.size(); ++i) {
    Ref one = i == argument ? from_ivalue(found) : Ref::borrow(Py_None);
    PyList_SET_ITEM(all.get(), static_cast<Py_ssize_t>(i), one.release());
  }
  const Ref counts = python_lengths();
  PyObject* given[] = {all.get(), counts.get()};
  checked_ref(PyObject_Vectorcall(record->flatten.get(), given, 2, nullptr));
}

// Calls a function, which compiled autograd traces, but whose own derivatives are not its business.
Ref Node::call_outside(PyObject* function, c10::ArrayRef<PyObject*> given) {
  if (!captured_) {
    return checked_ref(PyObject_Vectorcall(function, given.data(), given.size(), nullptr));
  }
  c10::SmallVector<PyObject*, 8> all{function};
  all.append(given.begin(), given.end());
  return checked_ref(PyObject_Vectorcall(record->alone.get(), all.data(), all.size(), nullptr));
}

void Node::append(std::string& key, const c10::IValue& value) {
  const auto raw = [&](char tag, const auto& bits) {
    key += tag;
    key.append(reinterpret_cast<const char*>(&bits), sizeof(bits));
  };
  if (value.isDouble()) {
    raw('f', value.toDouble());
  } else if (value.isInt()) {
    raw('i', value.toInt());
  } else if (value.isBool()) {
    raw('b', value.toBool());
  } else if (value.isString()) {
    raw('s', value.toStringRef().size());
    key += value.toStringRef();
  } else if (value.isList()) {
    raw('l', value.toListRef().size());
    for (const c10::IValue& one : value.toListRef()) { append(key, one); }
  } else {
    key += 'n';
  }
}

Ref Node::call_python(PyObject* seen, const variable_list& grads) {
  const auto* context = reinterpret_cast<Context*>(this->context.get());
  c10::SmallVector<PyObject*, 8> given{seen};
  std::vector<Ref> owned;
  size_t at = 0;
  const auto wrapped = [&](size_t output) {
    const at::Tensor& grad = grads[output];
    if (!grad.defined() && !context->materialize) { return Ref::borrow(Py_None); }
    return checked_ref(THPVariable_Wrap(grad.defined() ? grad : zeros(output)));
  };
  for (const int64_t length : output_lengths) {
    if (length == -2) {  // None, or a number
      owned.push_back(Ref::borrow(Py_None));
      ++at;
    } else if (length == -1) {
      owned.push_back(wrapped(at++));
    } else {
      Ref list = checked_ref(PyList_New(length));
      for (int64_t i = 0; i < length; ++i) {
        PyList_SET_ITEM(list.get(), i, wrapped(at++).release());
      }
      owned.push_back(std::move(list));
    }
    given.push_back(owned.back().get());
  }
  if (formula->form == Formula::Function) {
    Ref found = call_outside(formula->backward.get(), given);
    if (PyTuple_CheckExact(found.get()) &&
        static_cast<size_t>(PyTuple_GET_SIZE(found.get())) == record->params.size()) {
      return found;
    }
    return checked_ref(PyObject_CallOneArg(formula->counted.get(), found.get()));
  }
  Ref all = checked_ref(PyTuple_New(static_cast<Py_ssize_t>(owned.size())));
  for (size_t i = 0; i < owned.size(); ++i) {
    PyTuple_SET_ITEM(all.get(), static_cast<Py_ssize_t>(i), owned[i].release());
  }
  PyObject* two[] = {seen, all.get()};
  return call_outside(formula->gradients.get(), two);
}

variable_list Node::apply_python(variable_list& grads) {
  WithGil gil;
  TORCH_CHECK(gil.held, "the interpreter is gone");
  auto* context = reinterpret_cast<Context*>(this->context.get());
  const NodePtr alive = getptr();
  struct Running {
    Context* context;
    Running(Context* context, Node* node) : context(context) {
      context->node = node;
      ++context->depth;
    }
    ~Running() {
      if (--context->depth == 0) { context->node = nullptr; }
    }
  } running(context, this);

  Ref seen = Ref::borrow(this->context.get());
  if (lost && c10::GradMode::is_enabled()) {
    PyObject* given[] = {seen.get(), lost.get()};
    seen = checked_ref(PyObject_Vectorcall(record->tracked.get(), given, 2, nullptr));
  }
  return from_python(call_python(seen.get(), grads));
}

// Reads one gradient for each argument.
variable_list Node::from_python(Ref found) {
  found = checked_ref(PySequence_Tuple(found.get()));
  bool special = false;  // a list, or what cannot be a gradient
  for (size_t i = 0; i < lengths.size(); ++i) {
    PyObject* one = PyTuple_GET_ITEM(found.get(), static_cast<Py_ssize_t>(i));
    special =
        special || lengths[i] >= 0 ||
        (one != Py_None && (record->params[i].kind != Kind::Tensor || !THPVariable_Check(one)));
  }
  if (special) {
    const Ref all = python_lengths();
    PyObject* given[] = {found.get(), all.get()};
    found = checked_ref(PyObject_Vectorcall(record->flatten.get(), given, 2, nullptr));
    found = checked_ref(PySequence_Tuple(found.get()));
  }
  variable_list result;
  result.reserve(next_edges().size());
  size_t flat = 0;
  for (size_t i = 0; i < lengths.size(); ++i) {
    if (record->params[i].kind != Kind::Tensor) {
      ++flat;
      continue;
    }
    for (int64_t k = 0; k < (lengths[i] >= 0 ? lengths[i] : 1); ++k, ++flat) {
      PyObject* one = PyTuple_GET_ITEM(found.get(), static_cast<Py_ssize_t>(flat));
      at::Tensor grad = one == Py_None ? at::Tensor() : THPVariable_Unpack(one);
      result.push_back(checked(result.size(), flat, grad));
    }
  }
  return result;
}

namespace {

// Puts down what a formula in Python saves; returns which outputs it says have no gradient.
void set_up(Node& node, const Record& record, const Formula& formula, const Arguments& arguments,
            const Returned& returned) {
  c10::SmallVector<Ref, 8> owned;
  Ref needs = checked_ref(PyTuple_New(static_cast<Py_ssize_t>(arguments.values.size())));
  for (size_t i = 0; i < arguments.values.size(); ++i) {
    PyObject* one = nullptr;
    if (node.lengths[i] >= 0) {
      one = checked_ref(PyList_New(node.lengths[i])).release();
      for (int64_t k = 0; k < node.lengths[i]; ++k) {
        PyObject* tensor = PyList_GET_ITEM(arguments.values[i], k);
        PyList_SET_ITEM(one, k, PyBool_FromLong(THPVariable_Unpack(tensor).requires_grad()));
      }
    } else {
      one =
          PyBool_FromLong(arguments.tensors[i] != nullptr && arguments.tensors[i]->requires_grad());
    }
    PyTuple_SET_ITEM(needs.get(), static_cast<Py_ssize_t>(i), one);
  }
  node.context = Kept(Ref::steal(reinterpret_cast<PyObject*>(new_context(needs.get()))));
  if (formula.form == Formula::Function) {
    if (formula.setup.given()) {
      const Ref inputs = arguments.tuple();
      PyObject* given[] = {node.context.get(), inputs.get(), returned.whole.get()};
      checked_ref(PyObject_Vectorcall(formula.setup.get(), given, 3, nullptr));
    }
    return;
  }
  const auto flat = flat_results(record, returned.raw.get());
  const Ref inputs = arguments.tuple();
  Ref outputs = checked_ref(PyTuple_New(static_cast<Py_ssize_t>(flat.size())));
  for (size_t i = 0; i < flat.size(); ++i) {
    Py_INCREF(flat[i]);
    PyTuple_SET_ITEM(outputs.get(), static_cast<Py_ssize_t>(i), flat[i]);
  }
  PyObject* given[] = {node.context.get(), inputs.get(), outputs.get()};
  checked_ref(PyObject_Vectorcall(formula.save.get(), given, 3, nullptr));
}

bool is_among(PyObject* one, PyObject* objects) {
  for (Py_ssize_t i = 0; objects != nullptr && i < PyTuple_GET_SIZE(objects); ++i) {
    if (PyTuple_GET_ITEM(objects, i) == one) { return true; }
  }
  return false;
}

// Finds out which saved tensors have no history; nearly always, all of them are arguments or outputs that have one.
void find_lost(Node& node, const Record& record, const Arguments& arguments,
               const Returned& returned, const std::vector<PyObject*>& constant) {
  const auto* context = reinterpret_cast<Context*>(node.context.get());
  const auto flat = flat_results(record, returned.raw.get());
  bool known = context->is_bare();
  for (Py_ssize_t i = 0; known && context->saved != nullptr && i < PyTuple_GET_SIZE(context->saved);
       ++i) {
    PyObject* one = PyTuple_GET_ITEM(context->saved, i);
    const auto among = [one](const auto& objects) {
      return std::find(objects.begin(), objects.end(), one) != objects.end();
    };
    known = among(arguments.values) || (among(flat) && !among(constant));
  }
  if (known) { return; }
  const Ref values = arguments.tuple();
  Ref outputs = checked_ref(PyTuple_New(static_cast<Py_ssize_t>(flat.size())));
  for (size_t i = 0; i < flat.size(); ++i) {
    Py_INCREF(flat[i]);
    PyTuple_SET_ITEM(outputs.get(), static_cast<Py_ssize_t>(i), flat[i]);
  }
  Ref without = checked_ref(PyTuple_New(static_cast<Py_ssize_t>(constant.size())));
  for (size_t i = 0; i < constant.size(); ++i) {
    Py_INCREF(constant[i]);
    PyTuple_SET_ITEM(without.get(), static_cast<Py_ssize_t>(i), constant[i]);
  }
  PyObject* given[] = {node.context.get(), values.get(), outputs.get(), without.get()};
  Ref found = checked_ref(PyObject_Vectorcall(record.lost.get(), given, 4, nullptr));
  if (found.given()) { node.lost = Kept(std::move(found)); }
}

// Whether what an op saves leads to every argument that may need a second derivative.
bool leads_to_all(const Record& record, const Formula& formula, const Arguments& arguments) {
  for (const auto& [is_output, place] : formula.saves) {
    if (is_output &&
        std::find(formula.lost.begin(), formula.lost.end(), place) == formula.lost.end()) {
      return true;
    }
  }
  for (size_t i = 0; i < record.params.size(); ++i) {
    const bool needs = record.params[i].kind == Kind::Tensor &&
                       (arguments.tensors[i] == nullptr ? record.params[i].list
                                                        : arguments.tensors[i]->requires_grad());
    if (needs && std::find(formula.saves.begin(), formula.saves.end(), std::pair{false, i}) ==
                     formula.saves.end()) {
      return false;
    }
  }
  return true;
}

}  // namespace

Returned differentiate(std::shared_ptr<Record> record, const Kernel& kernel, Arguments& arguments) {
  std::shared_ptr<const Formula> formula = record->formula();
  if (!formula->lost.empty() && !leads_to_all(*record, *formula, arguments)) {
    formula = formula->rule;
  }
  auto node = make_node<Node>();
  node->record = record;
  node->formula = formula;
  torch::autograd::edge_list edges;
  edges.reserve(arguments.values.size());
  const auto edge_of = [](const at::Tensor& tensor) {
    return tensor.requires_grad() ? torch::autograd::impl::gradient_edge(tensor) : Edge();
  };
  for (size_t i = 0; i < record->params.size(); ++i) {
    const Param& param = record->params[i];
    const bool list = param.list && param.kind == Kind::Tensor && arguments.values[i] != Py_None;
    node->lengths.push_back(list ? PyList_GET_SIZE(arguments.values[i]) : -1);
    for (int64_t k = 0; k < node->lengths.back(); ++k) {
      edges.push_back(edge_of(THPVariable_Unpack(PyList_GET_ITEM(arguments.values[i], k))));
    }
    if (!list && param.kind == Kind::Tensor) {
      edges.push_back(arguments.tensors[i] != nullptr ? edge_of(*arguments.tensors[i]) : Edge());
    }
  }
  node->set_next_edges(std::move(edges));

  Returned returned;
  {
    c10::AutoGradMode without(false);
    const auto given = arguments.values;
    c10::SmallVector<Ref, 4> own;
    for (size_t i = 0; !arguments.owned.empty() && i < given.size(); ++i) {
      if (PyList_CheckExact(given[i])) {
        own.push_back(checked_ref(PyList_GetSlice(given[i], 0, PY_SSIZE_T_MAX)));
        arguments.values[i] = own.back().get();
      }
    }
    returned = run(*record, kernel, arguments);
    arguments.values = given;
    if (formula->form != Formula::Op) { set_up(*node, *record, *formula, arguments, returned); }
  }

  const auto flat = flat_results(*record, returned.raw.get());
  const auto* context = reinterpret_cast<const Context*>(node->context.get());
  std::vector<PyObject*> constant;
  c10::SmallVector<PyObject*, 8> tensors;
  c10::SmallVector<bool, 8> differentiable;
  for (size_t i = 0; i < flat.size(); ++i) {
    const bool many = PyList_Check(flat[i]) || PyTuple_Check(flat[i]);
    node->output_lengths.push_back(many                         ? PySequence_Fast_GET_SIZE(flat[i])
                                   : THPVariable_Check(flat[i]) ? -1
                                                                : -2);
    const Py_ssize_t count = many ? PySequence_Fast_GET_SIZE(flat[i]) : 1;
    for (Py_ssize_t k = 0; k < count; ++k) {
      PyObject* one = many ? PySequence_Fast_GET_ITEM(flat[i], k) : flat[i];
      const bool tensor = THPVariable_Check(one);
      bool has = tensor && !formula->constant[i] && is_differentiable(THPVariable_Unpack(one));
      has = has && !(context != nullptr && is_among(one, context->constant));
      if (tensor && !has) { constant.push_back(one); }
      tensors.push_back(tensor ? one : nullptr);
      differentiable.push_back(has);
    }
  }
  if (formula->form != Formula::Op) { find_lost(*node, *record, arguments, returned, constant); }
  node->constant_options.resize(tensors.size());
  node->constant_sizes.resize(tensors.size());
  for (size_t i = 0; i < tensors.size(); ++i) {
    if (differentiable[i]) {
      torch::autograd::set_history(THPVariable_Unpack(tensors[i]), node);
      continue;
    }
    node->add_input_metadata(torch::autograd::Node::undefined_input());
    if (tensors[i] != nullptr) {
      const at::Tensor& tensor = THPVariable_Unpack(tensors[i]);
      node->constant_options[i] = tensor.options();
      node->constant_sizes[i] = tensor.sizes().vec();
    }
  }

  if (formula->form == Formula::Op) {
    for (const auto& [is_output, place] : formula->saves) {
      PyObject* value = is_output ? flat[place] : arguments.values[place];
      if (PyList_Check(value) && (is_output || record->params[place].kind == Kind::Tensor)) {
        for (Py_ssize_t k = 0; k < PyList_GET_SIZE(value); ++k) {
          node->save(THPVariable_Unpack(PyList_GET_ITEM(value, k)), is_output);
        }
        node->saved_counts.push_back(PyList_GET_SIZE(value));
        node->values.emplace_back();
      } else if (THPVariable_Check(value)) {
        node->save(THPVariable_Unpack(value), is_output);
        node->saved_counts.push_back(-1);
        node->values.emplace_back();
      } else {
        node->saved_counts.push_back(-2);
        node->values.push_back(is_output ? c10::IValue() : to_ivalue(record->params[place], value));
      }
    }
  } else if (context->saved != nullptr) {
    for (Py_ssize_t i = 0; i < PyTuple_GET_SIZE(context->saved); ++i) {
      PyObject* one = PyTuple_GET_ITEM(context->saved, i);
      const bool is_output = std::find(tensors.begin(), tensors.end(), one) != tensors.end();
      node->save(one == Py_None ? at::Tensor() : THPVariable_Unpack(one), is_output);
    }
    // The context would keep them from being freed, and outputs would know themselves.
    Py_CLEAR(reinterpret_cast<Context*>(node->context.get())->saved);
  }
  return returned;
}

}  // namespace opkit_core

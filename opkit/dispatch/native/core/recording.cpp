// Records how a call is differentiated: makes the node, and gives the outputs their history.

#include "node.h"

#include <c10/core/GradMode.h>
#include <torch/csrc/autograd/functions/utils.h>

namespace opkit_core {
namespace {

// What a call gave.
struct Outputs {
  c10::SmallVector<PyObject*, 4> results;  // one for each that is declared
  c10::SmallVector<PyObject*, 8> flat;     // those of lists one by one; null for what is no tensor
  c10::SmallVector<bool, 8> differentiable;
  c10::SmallVector<PyObject*, 4> constant;  // tensors without a gradient
};

template <typename Item, typename Items>
bool is_among(const Item& one, const Items& items) {
  return std::find(items.begin(), items.end(), one) != items.end();
}

// The items of what may be a tuple, or null.
c10::ArrayRef<PyObject*> items(PyObject* tuple) {
  if (tuple == nullptr) { return {}; }
  return {reinterpret_cast<PyTupleObject*>(tuple)->ob_item,
          static_cast<size_t>(PyTuple_GET_SIZE(tuple))};
}

Context* context_of(const Node& node) { return reinterpret_cast<Context*>(node.context.get()); }

// Whether what an op saves leads to every argument that may need a second derivative.
bool leads_to_all(const Record& record, const Formula& formula, const Arguments& arguments) {
  for (const auto& [is_output, place] : formula.saves) {
    if (is_output && !is_among(place, formula.lost)) { return true; }
  }
  for (size_t i = 0; i < record.params.size(); ++i) {
    const bool needs = record.params[i].kind == Kind::Tensor &&
                       (arguments.tensors[i] == nullptr ? record.params[i].list
                                                        : arguments.tensors[i]->requires_grad());
    if (needs && !is_among(std::pair{false, i}, formula.saves)) { return false; }
  }
  return true;
}

std::shared_ptr<const Formula> formula_for(const Record& record, const Arguments& arguments) {
  std::shared_ptr<const Formula> formula = record.formula();
  const bool fits = formula->lost.empty() || leads_to_all(record, *formula, arguments);
  return fits ? formula : formula->rule;
}

// Leads edges to the arguments.
void connect(Node& node, const Arguments& arguments) {
  const Record& record = *node.record;
  torch::autograd::edge_list edges;
  edges.reserve(arguments.values.size());
  node.lengths.reserve(record.params.size());
  const auto lead_to = [&](const at::Tensor* tensor) {
    const bool needed = tensor != nullptr && tensor->requires_grad();
    edges.push_back(needed ? torch::autograd::impl::gradient_edge(*tensor)
                           : torch::autograd::Edge());
  };
  for (size_t i = 0; i < record.params.size(); ++i) {
    const Param& param = record.params[i];
    PyObject* value = arguments.values[i];
    const bool list = param.list && param.kind == Kind::Tensor && value != Py_None;
    node.lengths.push_back(list ? PyList_GET_SIZE(value) : Node::kLone);
    for (int64_t k = 0; list && k < PyList_GET_SIZE(value); ++k) {
      lead_to(&THPVariable_Unpack(PyList_GET_ITEM(value, k)));
    }
    if (!list && param.kind == Kind::Tensor) { lead_to(arguments.tensors[i]); }
  }
  node.set_next_edges(std::move(edges));
}

// Runs a kernel, which may change the lists that it gets, where the formula wants them as they were.
Returned run_on_own_lists(Record& record, const Kernel& kernel, Arguments& arguments) {
  if (arguments.owned.empty()) { return run(record, kernel, arguments); }
  const auto given = arguments.values;
  c10::SmallVector<Ref, 4> own;
  for (PyObject*& value : arguments.values) {
    if (!PyList_CheckExact(value)) { continue; }
    own.push_back(checked_ref(PyList_GetSlice(value, 0, PY_SSIZE_T_MAX)));
    value = own.back().get();
  }
  Returned returned = run(record, kernel, arguments);
  arguments.values = given;
  return returned;
}

// Whether each argument needs a gradient, for a list whether each of its tensors does.
Ref needs_of(const Node& node, const Arguments& arguments) {
  const auto truth = [](bool value) { return Ref::steal(PyBool_FromLong(value)); };
  return tuple_of(arguments.values.size(), [&](size_t i) {
    if (node.lengths[i] == Node::kLone) {
      return truth(arguments.tensors[i] != nullptr && arguments.tensors[i]->requires_grad());
    }
    return list_of(static_cast<size_t>(node.lengths[i]), [&](size_t k) {
      PyObject* one = PyList_GET_ITEM(arguments.values[i], static_cast<Py_ssize_t>(k));
      return truth(THPVariable_Unpack(one).requires_grad());
    });
  });
}

// Has a formula in Python put on a context what it wants to find there.
void set_up(Node& node, const Arguments& arguments, const Returned& returned,
            c10::ArrayRef<PyObject*> results) {
  const Formula& formula = *node.formula;
  const Ref needs = needs_of(node, arguments);
  node.context = new_context(needs.get());
  if (formula.form == Formula::Rule) {
    const Ref inputs = arguments.tuple();
    const Ref outputs = tuple_of(results);
    called(formula.save.get(), {node.context.get(), inputs.get(), outputs.get()});
  } else if (formula.setup.given()) {
    const Ref inputs = arguments.tuple();
    called(formula.setup.get(), {node.context.get(), inputs.get(), returned.whole.get()});
  }
}

// Finds the tensors among the results, and which of them have a gradient.
Outputs outputs_of(Node& node, c10::SmallVector<PyObject*, 4> results) {
  Outputs outputs{std::move(results)};
  const auto marked = node.context ? items(context_of(node)->constant) : c10::ArrayRef<PyObject*>();
  const auto add = [&](PyObject* one, bool constant) {
    if (!THPVariable_Check(one)) {
      outputs.flat.push_back(nullptr);
      outputs.differentiable.push_back(false);
      return;
    }
    const at::Tensor& tensor = THPVariable_Unpack(one);
    const bool has =
        !constant && (tensor.is_floating_point() || tensor.is_complex()) && !is_among(one, marked);
    if (!has) { outputs.constant.push_back(one); }
    outputs.flat.push_back(one);
    outputs.differentiable.push_back(has);
  };
  for (size_t i = 0; i < outputs.results.size(); ++i) {
    PyObject* one = outputs.results[i];
    const bool constant = node.formula->constant[i];
    if (PyList_Check(one) || PyTuple_Check(one)) {
      const Py_ssize_t count = PySequence_Fast_GET_SIZE(one);
      node.output_lengths.push_back(count);
      for (Py_ssize_t k = 0; k < count; ++k) { add(PySequence_Fast_GET_ITEM(one, k), constant); }
    } else {
      node.output_lengths.push_back(THPVariable_Check(one) ? Node::kLone : Node::kNoTensor);
      add(one, constant);
    }
  }
  return outputs;
}

// Finds out which saved tensors have no history; nearly always, all of them are arguments or outputs that have one.
void find_lost(Node& node, const Arguments& arguments, const Outputs& outputs) {
  const auto has_history = [&](PyObject* one) {
    return is_among(one, arguments.values) ||
           (is_among(one, outputs.results) && !is_among(one, outputs.constant));
  };
  const auto saved = items(context_of(node)->saved);
  if (context_of(node)->is_bare() && std::all_of(saved.begin(), saved.end(), has_history)) {
    return;
  }
  const Ref values = arguments.tuple();
  const Ref results = tuple_of(outputs.results);
  const Ref constant = tuple_of(outputs.constant);
  Ref found = called(node.record->lost.get(),
                     {node.context.get(), values.get(), results.get(), constant.get()});
  if (found.given()) { node.lost = std::move(found); }
}

// Makes the node the one that the outputs come from, as far as they have a gradient.
void set_history(const NodeRef& node, const Outputs& outputs) {
  node->zeros.resize(outputs.flat.size());
  for (size_t i = 0; i < outputs.flat.size(); ++i) {
    if (outputs.differentiable[i]) {
      torch::autograd::set_history(THPVariable_Unpack(outputs.flat[i]), node);
      continue;
    }
    node->add_input_metadata(torch::autograd::Node::undefined_input());
    if (outputs.flat[i] != nullptr) {
      const at::Tensor& tensor = THPVariable_Unpack(outputs.flat[i]);
      node->zeros[i] = Zeros{tensor.sizes().vec(), tensor.options()};
    }
  }
}

// Saves what an Op is called with after the gradients.
void save_values(Node& node, const Arguments& arguments, const Outputs& outputs) {
  for (const auto& [is_output, place] : node.formula->saves) {
    PyObject* value = is_output ? outputs.results[place] : arguments.values[place];
    const Param* param = is_output ? nullptr : &node.record->params[place];
    if (THPVariable_Check(value)) {
      node.save(THPVariable_Unpack(value), is_output);
      node.saved_counts.push_back(Node::kLone);
      node.values.emplace_back();
    } else if (PyList_Check(value) && (is_output || param->kind == Kind::Tensor)) {
      for (Py_ssize_t k = 0; k < PyList_GET_SIZE(value); ++k) {
        node.save(THPVariable_Unpack(PyList_GET_ITEM(value, k)), is_output);
      }
      node.saved_counts.push_back(PyList_GET_SIZE(value));
      node.values.emplace_back();
    } else {
      node.saved_counts.push_back(Node::kNoTensor);
      node.values.push_back(is_output ? c10::IValue() : to_ivalue(*param, value));
    }
  }
}

// Saves what a formula in Python has given its context, which would keep that from being freed.
void save_context(Node& node, const Outputs& outputs) {
  Context* context = context_of(node);
  for (PyObject* one : items(context->saved)) {
    const bool is_output = is_among(one, outputs.flat);
    node.save(one == Py_None ? at::Tensor() : THPVariable_Unpack(one), is_output);
  }
  close_context(context);
}

}  // namespace

Returned differentiate(std::shared_ptr<Record> record, const Kernel& kernel, Arguments& arguments) {
  const NodeRef node = make_node();
  node->record = std::move(record);
  node->formula = formula_for(*node->record, arguments);
  const bool is_op = node->formula->form == Formula::Op;
  connect(*node, arguments);

  Returned returned;
  c10::SmallVector<PyObject*, 4> results;
  {
    c10::AutoGradMode without(false);
    returned = run_on_own_lists(*node->record, kernel, arguments);
    results = flat_results(*node->record, returned.raw.get());
    if (!is_op) { set_up(*node, arguments, returned, results); }
  }

  const Outputs outputs = outputs_of(*node, std::move(results));
  if (!is_op) { find_lost(*node, arguments, outputs); }
  set_history(node, outputs);
  if (is_op) {
    save_values(*node, arguments, outputs);
  } else {
    save_context(*node, outputs);
  }
  return returned;
}

}  // namespace opkit_core

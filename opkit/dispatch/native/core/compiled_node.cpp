// The node in compiled autograd: what its graph is specialized on, and the call that stands for it there.

#include "node.h"

#include <torch/csrc/dynamo/compiled_autograd.h>

namespace opkit_core {
namespace {

using torch::dynamo::autograd::SwapSavedVariables;

// Appends a number or a text, so that no two values give the same.
void append(std::string& key, const c10::IValue& value) {
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

void append(std::string& key, const std::vector<int64_t>& numbers) {
  for (const int64_t number : numbers) { key += std::to_string(number) + ','; }
  key += ';';
}

// Has saved tensors be those of the graph.
class Swapped {
 public:
  Swapped(std::vector<torch::autograd::SavedVariable>& saved, SwapSavedVariables& swap)
      : saved_(saved), swap_(swap) {
    for (auto& one : saved_) {
      swap_.before(one);
      ++count_;
    }
  }
  ~Swapped() {
    for (size_t i = 0; i < count_; ++i) { swap_.after(saved_[i]); }
  }
  Swapped(const Swapped&) = delete;
  Swapped& operator=(const Swapped&) = delete;

 private:
  std::vector<torch::autograd::SavedVariable>& saved_;
  SwapSavedVariables& swap_;
  size_t count_ = 0;
};

}  // namespace

void Node::compiled_args(torch::dynamo::autograd::CompiledNodeArgs& args) const {
  args.collect(record->id);
  args.collect(formula->id);
  std::string key;
  append(key, lengths);
  append(key, output_lengths);
  append(key, saved_counts);
  for (size_t i = 0; num_inputs() > 1 && i < num_inputs(); ++i) {  // others may get zeros
    append(key, output_sizes(i));
    if (args.cond(zeros[i].has_value())) { args.collect(zeros[i]->options); }
  }
  if (context) { key += reinterpret_cast<Context*>(context.get())->materialize ? 'm' : 'n'; }
  for (const c10::IValue& value : values) { append(key, value); }
  args.collect(key);
  for (size_t i = 0; i < saved_.size(); ++i) { args.collect(saved_[i], is_output_[i]); }
  for (const auto& edge : next_edges()) { args.collect(edge.is_valid()); }
  // A formula in Python reads whatever it has put on its context, which is part of what is compiled then.
  const bool bare = !context || (!lost && reinterpret_cast<Context*>(context.get())->is_bare());
  static std::atomic<int64_t> calls{1};
  args.collect(bare ? int64_t{0} : calls.fetch_add(1));
}

// Puts the call of the formula into the graph, as torch does with C++ autograd functions: it runs where sizes are
// known, on a node that has the saved tensors as they are there.
variable_list Node::apply_with_saved(const variable_list& grads, SwapSavedVariables& swapped) {
  const Swapped within(saved_, swapped);
  std::vector<c10::IValue> packed;
  std::vector<at::TypePtr> schema;
  std::vector<bool> present;
  for (size_t i = 0; i < saved_.size(); ++i) {
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
    return like->replay(std::move(tensors), given);
  };
  using torch::dynamo::autograd::IValuePacker;
  const auto metadata =
      IValuePacker<std::vector<std::optional<torch::autograd::InputMetadata>>>::pack(
          torch::dynamo::autograd::get_input_metadata(next_edges()));
  const auto& compiler = torch::dynamo::autograd::getPyCompilerInterface();
  const auto function =
      compiler->bind_function(swapped.get_py_compiler(), name(), run, schema, true, true);
  return compiler->call_function(swapped.get_py_compiler(), "apply_functional", function, grads,
                                 packed, metadata);
}

std::vector<int64_t> Node::output_sizes(size_t output) const {
  if (zeros[output]) { return zeros[output]->sizes; }
  std::vector<int64_t> sizes;
  for (const c10::SymInt& size : input_metadata(output).shape_as_dim_vector()) {
    sizes.push_back(size.guard_int(__FILE__, __LINE__));
  }
  return sizes;
}

// A node with all that is the same each time that a graph runs; it has no metadata and no edges of its own.
std::shared_ptr<Node> Node::captured() const {
  auto made = std::make_shared<Node>();
  copy_to(*made);
  for (size_t i = 0; i < num_inputs(); ++i) {
    if (!zeros[i]) { made->zeros[i] = Zeros{output_sizes(i), input_metadata(i).options()}; }
  }
  std::vector<bool> wanted;
  for (const auto& edge : next_edges()) { wanted.push_back(edge.is_valid()); }
  made->captured_ = Captured{{}, std::move(wanted)};
  return made;
}

// Applies the formula to saved tensors and gradients of a graph.
variable_list Node::replay(std::vector<at::Tensor> tensors, const variable_list& grads) const {
  const NodeRef made = make_node();
  copy_to(*made);
  made->captured_ = Captured{std::move(tensors), captured_->wanted};
  return made->apply(variable_list(grads));
}

// Copies all that a formula needs, beside the saved tensors.
void Node::copy_to(Node& other) const {
  other.record = record;
  other.formula = formula;
  other.lengths = lengths;
  other.output_lengths = output_lengths;
  other.zeros = zeros;
  other.values = values;
  other.saved_counts = saved_counts;
  if (!context) { return; }
  const InPython entered;
  other.context = copy_of(reinterpret_cast<Context*>(context.get()));
  other.lost = Ref::borrow(lost.get());
}

}  // namespace opkit_core

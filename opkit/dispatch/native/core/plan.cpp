#include "plan.h"

#include <limits>

namespace opkit_core {
namespace {

constexpr int64_t kUnbound = std::numeric_limits<int64_t>::min();

// Names and stars as far as they are bound.
struct Bound {
  c10::SmallVector<int64_t, 8> names;
  c10::SmallVector<std::pair<bool, c10::IntArrayRef>, 2> stars;
};

// Python's // and %, which round towards minus infinity.
bool divide(int64_t a, int64_t b, bool remainder, int64_t& out) {
  if (b == 0 || (a == std::numeric_limits<int64_t>::min() && b == -1)) { return false; }
  int64_t quotient = a / b, rest = a % b;
  if (rest != 0 && (rest < 0) != (b < 0)) {
    --quotient;
    rest += b;
  }
  out = remainder ? rest : quotient;
  return true;
}

// Evaluates an expression; false where it has no value, or uses a name that no argument has bound.
bool evaluate(const Dim& dim, const Bound& bound, int64_t& out, bool& unbound) {
  c10::SmallVector<int64_t, 8> stack;
  for (size_t i = 0; i < dim.code.size(); ++i) {
    const auto step = static_cast<Dim::Step>(dim.code[i]);
    if (step == Dim::Push) {
      stack.push_back(dim.code[++i]);
      continue;
    }
    if (step == Dim::Load) {
      const int64_t value = bound.names[dim.code[++i]];
      if (value == kUnbound) {
        unbound = true;
        return false;
      }
      stack.push_back(value);
      continue;
    }
    const int64_t right = stack.pop_back_val();
    if (step == Dim::Negate) {
      if (right == std::numeric_limits<int64_t>::min()) { return false; }
      stack.push_back(-right);
      continue;
    }
    const int64_t left = stack.pop_back_val();
    int64_t value = 0;
    bool holds = true;
    switch (step) {
      case Dim::Add: holds = !__builtin_add_overflow(left, right, &value); break;
      case Dim::Sub: holds = !__builtin_sub_overflow(left, right, &value); break;
      case Dim::Mul: holds = !__builtin_mul_overflow(left, right, &value); break;
      default: holds = divide(left, right, step == Dim::Mod, value);
    }
    if (!holds) { return false; }
    stack.push_back(value);
  }
  out = stack.back();
  return true;
}

bool bind(const Entry& entry, c10::IntArrayRef shape, Bound& bound) {
  const size_t count = entry.dims.size() - (entry.star >= 0);
  if (entry.star >= 0 ? shape.size() < count : shape.size() != count) { return false; }
  const size_t starred = shape.size() - count;
  size_t at = 0;
  for (const Dim& dim : entry.dims) {
    if (dim.kind == Dim::Star) {
      const auto sizes = shape.slice(at, starred);
      at += starred;
      if (dim.value >= 0) {
        auto& known = bound.stars[dim.value];
        if (!known.first) {
          known = {true, sizes};
        } else if (known.second != sizes) {
          return false;
        }
      }
      continue;
    }
    const int64_t size = shape[at++];
    if (dim.kind == Dim::Number && size != dim.value) { return false; }
    if (dim.kind == Dim::Name) {
      int64_t& known = bound.names[dim.value];
      if (known == kUnbound) {
        known = size;
      } else if (known != size) {
        return false;
      }
    }
  }
  return true;
}

// Expressions are checked when every name is bound; one over a name that is not says nothing.
bool expressions_hold(const Entry& entry, c10::IntArrayRef shape, const Bound& bound) {
  const size_t starred = shape.size() - (entry.dims.size() - (entry.star >= 0));
  size_t at = 0;
  for (const Dim& dim : entry.dims) {
    if (dim.kind == Dim::Expression) {
      int64_t wanted = 0;
      bool unbound = false;
      if (evaluate(dim, bound, wanted, unbound) ? wanted != shape[at] : !unbound) { return false; }
    }
    at += dim.kind == Dim::Star ? starred : 1;
  }
  return true;
}

bool are_equal(c10::IntArrayRef one, c10::IntArrayRef other) {
  if (one.size() != other.size()) { return false; }
  for (size_t i = 0; i < one.size(); ++i) {  // few: a call of memcmp takes longer
    if (one[i] != other[i]) { return false; }
  }
  return true;
}

// Whether those tensors that are there have certain sizes. A function of its own has all registers for the loop.
[[gnu::noinline]] bool have_sizes(c10::ArrayRef<const at::Tensor*> tensors,
                                  c10::IntArrayRef sizes) {
  for (const at::Tensor* tensor : tensors) {
    if (tensor != nullptr && !are_equal(tensor->sizes(), sizes)) { return false; }
  }
  return true;
}

// There is one CPU.
bool are_on_one_device(c10::ArrayRef<const at::Tensor*> tensors, c10::DispatchKeySet keys) {
  constexpr c10::DispatchKeySet backends(c10::DispatchKeySet::RAW, c10::full_backend_mask);
  if ((keys & backends) == c10::DispatchKeySet(c10::BackendComponent::CPUBit)) { return true; }
  const at::Tensor* first = nullptr;
  for (const at::Tensor* tensor : tensors) {
    if (tensor == nullptr) { continue; }
    if (first == nullptr) { first = tensor; }
    if (tensor->device() != first->device()) { return false; }
  }
  return true;
}

bool among(c10::ScalarType dtype, const std::vector<c10::ScalarType>& allowed) {
  for (const auto one : allowed) {
    if (one == dtype) { return true; }
  }
  return allowed.empty();
}

bool is_named(const DtypeRule& rule, c10::ArrayRef<const at::Tensor*> tensors,
              const at::Tensor* first, c10::ScalarType& out) {
  const at::Tensor* like = first;
  if (rule.kind == DtypeRule::Fixed) {
    out = static_cast<c10::ScalarType>(rule.value);
    return true;
  }
  if (rule.kind == DtypeRule::OfTensor && tensors[rule.value] != nullptr) {
    like = tensors[rule.value];
  }
  if (like == nullptr) { return false; }
  out = like->scalar_type();
  return true;
}

}  // namespace

bool Plan::fits(c10::ArrayRef<const at::Tensor*> tensors, c10::DispatchKeySet keys,
                c10::ArrayRef<int64_t> values, c10::SmallVectorImpl<OutputMeta>& metas) const {
  Bound bound;
  bound.names.resize(names, kUnbound);
  bound.stars.resize(stars);
  for (const auto& [place, slot] : ints) {
    if (values[place] == kUnbound) { return false; }
    bound.names[slot] = values[place];
  }
  const at::Tensor* first = nullptr;
  for (const Entry& entry : inputs) {
    first = tensors[entry.place];
    if (first != nullptr) { break; }
  }
  if (first == nullptr) { return false; }
  if (!are_on_one_device(tensors, keys)) { return false; }
  for (const size_t i : binding) {
    const Entry& entry = inputs[i];
    const at::Tensor* tensor = tensors[entry.place];
    if (tensor != nullptr &&
        (!bind(entry, tensor->sizes(), bound) || !among(tensor->scalar_type(), entry.allowed))) {
      return false;
    }
  }
  for (const Alike& group : alike) {
    const at::Tensor* earlier = tensors[group.earlier];
    const auto others = tensors.slice(group.first, group.count);
    if (earlier != nullptr) {
      if (!have_sizes(others, earlier->sizes())) { return false; }
      continue;
    }
    for (size_t k = 0; k < group.count; ++k) {
      if (others[k] != nullptr && !bind(inputs[group.input + k], others[k]->sizes(), bound)) {
        return false;
      }
    }
  }
  for (const Entry& entry : late ? c10::ArrayRef<Entry>(inputs) : c10::ArrayRef<Entry>()) {
    const at::Tensor* tensor = tensors[entry.place];
    if (tensor == nullptr) { continue; }
    c10::ScalarType wanted;
    if (entry.dtype.kind != DtypeRule::None &&
        (!is_named(entry.dtype, tensors, first, wanted) || tensor->scalar_type() != wanted)) {
      return false;
    }
    if (!expressions_hold(entry, tensor->sizes(), bound)) { return false; }
  }
  for (const Entry& entry : outputs) {
    OutputMeta& meta = metas.emplace_back();
    for (const Dim& dim : entry.dims) {
      if (dim.kind == Dim::Star) {
        const auto& known = bound.stars[dim.value];
        if (!known.first) { return false; }
        meta.shape.append(known.second.begin(), known.second.end());
        continue;
      }
      int64_t size = dim.value;
      bool unbound = false;
      if (dim.kind == Dim::Name) {
        size = bound.names[dim.value];
      } else if (dim.kind == Dim::Expression && !evaluate(dim, bound, size, unbound)) {
        return false;
      }
      if (size < 0) {  // kUnbound too
        return false;
      }
      meta.shape.push_back(size);
    }
    if (!is_named(entry.dtype, tensors, first, meta.dtype) || !among(meta.dtype, entry.allowed)) {
      return false;
    }
  }
  return true;
}

}  // namespace opkit_core

// A shape line as data: checks of the arguments, and what the outputs must be.
//
// The twin of the Python that opkit/spec/_infer.py generates, for lines without lists and data-dependent sizes.
// It only says whether a call fits; where one does not, Python says why.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/util/SmallVector.h>

#include <cstdint>
#include <optional>
#include <vector>

namespace opkit_core {

using Sizes = c10::SmallVector<int64_t, 6>;

// One dimension of an entry, or with Star any number of them.
struct Dim {
  enum Kind : uint8_t { Name, Number, Star, Any, Expression };
  enum Step : int64_t { Push = 0, Load, Add, Sub, Mul, FloorDiv, Mod, Negate };

  Kind kind;
  int64_t value =
      0;  // the number, or the slot of a name; -1 for a star that stands for any dimensions
  std::vector<int64_t> code =
      {};  // of an expression, in postfix order: Push number, Load slot, or an operator
};

struct DtypeRule {
  enum Kind : uint8_t { None, Fixed, OfTensor, First };

  Kind kind = None;
  int64_t value = 0;  // the dtype, or the place of the tensor argument
};

// What the line says of one argument or result.
struct Entry {
  size_t place;
  std::vector<Dim> dims;
  int64_t star = -1;
  DtypeRule dtype = {};
  std::vector<c10::ScalarType> allowed = {};
};

struct OutputMeta {
  Sizes shape;
  c10::ScalarType dtype;
  std::optional<std::vector<int64_t>> strides = {};  // none where it is contiguous
};

// Neighbours whose sizes are those of an earlier input, and so bind nothing new.
struct Alike {
  size_t earlier;  // the place of that
  size_t first;    // the place of the first of them
  size_t input;    // its entry
  size_t count;
};

struct Plan {
  std::vector<Entry> inputs;
  std::vector<size_t> binding;  // the inputs that bind names, or have dtypes of their own
  std::vector<Alike> alike;     // the others, together
  std::vector<Entry> outputs;
  std::vector<std::pair<size_t, size_t>>
      ints;  // places of int arguments, and the slots of their names
  size_t names = 0;
  size_t stars = 0;
  bool late = false;  // whether something can only be checked once every name is bound

  // Whether the arguments fit the line; `metas` then has what the outputs are. `tensors` has a value for each
  // argument: null for what is no tensor, or is None; `keys` are those of all. `values` has one for each argument too,
  // if the line reads ints.
  bool fits(c10::ArrayRef<const at::Tensor*> tensors, c10::DispatchKeySet keys,
            c10::ArrayRef<int64_t> values, c10::SmallVectorImpl<OutputMeta>& metas) const;
};

}  // namespace opkit_core

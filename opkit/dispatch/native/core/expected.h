// What Python says of the results of a call that the core cannot check by a shape line: the declaration has a meta
// function, or a line over lists.
#pragma once

#include "arguments.h"

#include <unordered_map>

namespace opkit_core {

// Remembers answers by all that a meta function can see of the arguments. The GIL guards it.
class Expected {
 public:
  // One for each result; null where they cannot be compared here.
  using Metas = std::shared_ptr<const std::vector<OutputMeta>>;

  // Asks Python at the first call of a kind, which raises there if the arguments do not fit.
  Metas of(const Record& record, const Arguments& arguments);

 private:
  using Key = std::vector<int64_t>;
  struct Hash { size_t operator()(const Key& key) const; };
  using Known = std::unordered_map<Key, Metas, Hash>;

  static constexpr size_t kMost = 4096;

  Known known_;
  const Known::value_type* last_ = nullptr;
  Key key_;  // of the call being looked up; kept for its memory
};

}  // namespace opkit_core

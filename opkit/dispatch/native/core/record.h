// What the core knows of one op: its signature, its shape line, how it is differentiated, and the choices made
// among its kernels.
#pragma once

#include "object.h"
#include "plan.h"

#include <ATen/core/dispatch/Dispatcher.h>

#include <atomic>
#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <vector>

namespace opkit_core {

enum class Kind : uint8_t { Tensor, Int, Float, Bool, Str };

struct Param {
  Kept name;
  Kept fallback;  // the default as torch carries it; null where the argument is required
  Kind kind;
  bool list;
  bool optional;
  bool mutated;
};

struct Result {
  Kind kind;
  bool list;
  bool optional;
};

// A kernel as calls need it.
struct Kernel {
  enum How : uint8_t {
    Python,  // a function of the op's arguments, whose results are checked here
    Native,  // a private op of torch, which checks its arguments and allocates its results
    Run,     // Python runs the call: `Record::run`
  };

  How how;
  Kept owner;  // opkit's Kernel
  Kept function;
  std::optional<c10::OperatorHandle> handle;
  Kept keeps;  // what has to stay for `handle` to be valid
};

struct Choice {
  c10::DeviceType device;
  c10::ScalarType dtype;
  std::shared_ptr<const Kernel> kernel;
};

// Tells records and formulas apart, also those that had the same place in memory.
inline int64_t next_id() {
  static std::atomic<int64_t> last{0};
  return ++last;
}

// How an op is differentiated. Immutable; a new registration makes a new one.
struct Formula {
  enum Form : uint8_t {
    Op,        // another op: its results are the gradients
    Function,  // backward(ctx, *grads), setup_context(ctx, inputs, output)
    Rule,      // an object of opkit's with save(ctx, values, outputs) and gradients(ctx, grads)
  };

  const int64_t id = next_id();
  Form form;
  std::vector<bool> constant;  // for each result, whether it has no gradient by declaration
  // of an Op
  c10::OperatorName op{"", ""};                // looked up for each call, as it may be defined anew
  std::vector<std::pair<bool, size_t>> saves;  // (is an output, place)
  std::vector<size_t> outputs;                 // whose gradients it takes
  std::vector<size_t> arguments;               // whose gradients it returns
  std::vector<c10::IValue> rest;               // defaults of its further arguments
  std::vector<size_t>
      lost;  // outputs that it saves although they have no gradient, and so no history
  std::shared_ptr<const Formula> rule;  // the same as a Rule
  Kept object;                          // opkit's formula
  // of a Function
  Kept setup;
  Kept backward;
  Kept counted;  // raises for a wrong number of gradients
  // of a Rule
  Kept save;
  Kept gradients;
};

struct Record {
  const int64_t id = next_id();
  std::string name;
  std::string node_name;
  c10::OperatorHandle op;
  std::vector<Param> params;
  size_t positional;
  std::vector<Result> results;
  std::optional<Plan> plan;
  bool plain_results;  // a Tensor each, in no list, and never None
  bool tensor_lists;   // among arguments or results
  bool mutates;
  std::atomic<bool> autocast{false};  // whether the op has a rule for it
  Kept keywords;                      // names of the keyword-only arguments, a tuple
  Kept container;  // the type that results come in, tuple, or None for a bare value
  bool is_tuple;   // whether that is a tuple or a NamedTuple

  // Python's part of a call; see opkit/dispatch/native/path.py.
  Kept choose, run, conform, explain, pack;
  // Python's part of differentiation; see opkit/transforms/gradient.py.
  Kept twin, lost, tracked, again, alone, check, flatten;

  // The formula as it is now.
  std::shared_ptr<const Formula> formula() const;
  void set_formula(std::shared_ptr<const Formula> formula);

  // The choice made before for such a call, or null. With the GIL held nobody else changes them, and no lock is taken.
  std::shared_ptr<const Kernel> known(c10::DeviceType device, c10::ScalarType dtype,
                                      bool with_gil) const;
  void remember(Choice choice, uint64_t epoch);

  explicit Record(c10::OperatorHandle op) : op(op) {}

 private:
  mutable std::mutex mutex_;
  std::vector<Choice> choices_;
  uint64_t epoch_ = 0;
  std::shared_ptr<const Formula> formula_;
};

// Changes whenever a choice made before may be another one now.
extern std::atomic<uint64_t> epoch;
// Whether some thread has ever said which kernels it prefers.
extern std::atomic<bool> preferences;

}  // namespace opkit_core

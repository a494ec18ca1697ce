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

enum class Kind : uint8_t { Tensor, Int, Float, Bool, Str, Dtype, Device };

struct Param {
  Kept name;
  Kept fallback;  // the default as torch carries it; null where the argument is required
  Kind kind;
  bool list;
  bool optional;
  bool mutated;
  int64_t
      length;  // of the tuple that Python code sees where a list of just so many is declared; or 0

  bool is_tensor() const { return kind == Kind::Tensor && !list; }
};

struct Result {
  Kind kind;
  bool list;
  bool optional;
};

class Expected;

// A kernel as calls need it.
struct Kernel {
  enum How : uint8_t {
    Python,  // a function of the op's arguments, whose results are checked here
    Native,  // a private op of torch, which checks its arguments and allocates its results
    Run,     // Python runs the call: `Record::run`
    Asked,   // as Python, but Python says what the results must be
    Filled,  // as Native, but its results are made here, as Python says what they must be
  };

  How how;
  Kept owner;         // opkit's Kernel
  std::string label;  // op@backend, for profiles; of a kernel of one call, only where one is taken
  Kept function;
  std::optional<c10::OperatorHandle> handle;
  Kept keeps;                          // what has to stay for `handle` to be valid
  std::shared_ptr<Expected> expected;  // where it is Asked or Filled
};

// What a choice among kernels depends on, where no kernel is asked.
struct Case {
  c10::DeviceType device;
  c10::ScalarType dtype;
  bool deterministic = false;  // torch's setting
  uint8_t bucket = 0;          // of the size, from 1 on; 0 where choices do not depend on it
  PyObject* wanted = nullptr;  // opkit's preference in force, if there is one; borrowed
};

struct Choice {
  Case when;
  Kept wanted;  // keeps `when.wanted`
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
  bool settled;                // whether all that the op writes into is said to have none
  // of an Op
  c10::OperatorName op{"", ""};                // looked up for each call, as it may be defined anew
  std::vector<std::pair<bool, size_t>> saves;  // (is an output, place)
  std::vector<size_t> outputs;                 // whose gradients it takes
  std::vector<size_t> arguments;               // whose gradients it returns
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
  bool contiguous;  // its kernels get contiguous tensors; Python copies those that are not
  std::atomic<bool> autocast{false};  // whether the op has a rule for it
  std::atomic<bool> measured{false};  // whether choices may depend on the size of calls
  Kept keywords;                      // names of the keyword-only arguments, a tuple
  Kept container;  // the type that results come in, tuple, or None for a bare value
  bool is_tuple;   // whether that is a tuple or a NamedTuple

  // Python's part of a call; see opkit/dispatch/native/path.py.
  Kept choose, run, expect, conform, explain, pack;
  // Python's part of differentiation; see opkit/transforms/gradient.py.
  Kept twin, lost, tracked, again, alone, check, flatten;

  // The formula as it is now.
  std::shared_ptr<const Formula> formula() const;
  void set_formula(std::shared_ptr<const Formula> formula);

  // The kernel chosen before for such a call, or null. The GIL is held, and a `Calling` keeps what is returned.
  const Kernel* known(const Case& when) const;
  // The same for code without the GIL, where nothing is preferred.
  std::shared_ptr<const Kernel> known_by_all(c10::DeviceType device, c10::ScalarType dtype,
                                             uint8_t bucket) const;
  void remember(const Case& when, std::shared_ptr<const Kernel> kernel, uint64_t epoch);

  explicit Record(c10::OperatorHandle op) : op(op) {}

 private:
  friend class Calling;

  mutable std::mutex mutex_;     // of what follows, for code without the GIL
  std::vector<Choice> choices_;  // of the epoch
  uint64_t epoch_ = 0;
  std::shared_ptr<const Formula> formula_;
  std::vector<Choice> dropped_;  // of epochs before, until no call is running that may use them
  int64_t calls_ = 0;            // running, under the GIL
};

// A call that runs: the kernels that it may have chosen stay. Reference counts of their own would cost more than the
// rest of the choice.
class Calling {
 public:
  explicit Calling(Record& record) : record_(record) { ++record_.calls_; }
  ~Calling();
  Calling(const Calling&) = delete;
  Calling& operator=(const Calling&) = delete;

 private:
  Record& record_;
};

// Changes whenever a choice made before may be another one now.
extern std::atomic<uint64_t> epoch;
// Whether some thread has ever said which kernels it prefers.
extern std::atomic<bool> preferences;

}  // namespace opkit_core

// What is special around a call, or about its op.
#pragma once

#include "record.h"

#include <ATen/record_function.h>

namespace opkit_core {

struct State {
  bool ordinary;  // whether only autograd, autocast and a device can have to do with the call
  bool below_autograd;
  bool autocast;

  static State now();
};

// Whether something is to see the call itself: a profiler, a mode over torch's functions.
bool is_observed();

// Whether a profile is taken of this thread.
bool is_profiled();

// The run of a kernel, as a profile shows it inside of its op.
class Range {
 public:
  Range(const Kernel& kernel, bool observed) {
    if (observed) { begin(kernel); }
  }

 private:
  void begin(const Kernel& kernel);

  std::optional<at::RecordFunction> recorded_;
};

// Whether this thread prefers, or requires, certain kernels.
bool has_preference();

// What this thread prefers or requires, borrowed, or null.
PyObject* preference();

// Whether somebody else has a kernel of the op on the call's device.
bool is_overridden(const Record& record, const at::Tensor& first);

}  // namespace opkit_core

// What is special around a call, or about its op.
#pragma once

#include "record.h"

namespace opkit_core {

struct State {
  bool ordinary;  // whether only autograd, autocast and a device can have to do with the call
  bool below_autograd;
  bool autocast;

  static State now();
};

// Whether something is to see the call itself: a profiler, a mode over torch's functions.
bool is_observed();

// Whether this thread prefers, or requires, certain kernels.
bool has_preference();

// What this thread prefers or requires, borrowed, or null.
PyObject* preference();

// Whether somebody else has a kernel of the op on the call's device.
bool is_overridden(const Record& record, const at::Tensor& first);

}  // namespace opkit_core

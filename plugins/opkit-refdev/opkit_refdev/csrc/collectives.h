#pragma once
#include <torch/csrc/distributed/c10d/Backend.hpp>

namespace refdev {

// A backend for the device's tensors, over one for the CPU's.
c10::intrusive_ptr<c10d::Backend> collectives_over(c10::intrusive_ptr<c10d::Backend> host);

}  // namespace refdev

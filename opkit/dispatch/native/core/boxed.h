// The kernels of an op that torch's dispatcher calls: on its devices, for autograd, and for version counters.
#pragma once

#include "record.h"

namespace opkit_core {

// Registers them until the handles go.
std::vector<c10::RegistrationHandleRAII> register_kernels(const std::shared_ptr<Record>& record);

}  // namespace opkit_core

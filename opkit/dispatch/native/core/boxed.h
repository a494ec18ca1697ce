// The kernels of an op that torch's dispatcher calls: on its devices, for autograd, and for version counters.
#pragma once

#include "record.h"

namespace opkit_core {

// Registers them until the handles go. `describe` is called at the first call, and gives a Native.
std::vector<c10::RegistrationHandleRAII> register_kernels(const c10::OperatorName& name,
                                                          bool mutates, Ref describe);

// The record in a Native; in module.cpp.
std::shared_ptr<Record> record_of(PyObject* native);

}  // namespace opkit_core

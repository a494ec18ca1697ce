// Reads what Python describes an op with; see opkit/dispatch/native/description.py.
#pragma once

#include "record.h"

namespace opkit_core {

std::shared_ptr<Record> read_record(PyObject* description);
std::shared_ptr<const Formula> read_formula(PyObject* description);

}  // namespace opkit_core

// What is compiled as one, so that torch's headers are read once: how calls go.
#include "arguments.cpp"
#include "boxed.cpp"
#include "call.cpp"
#include "description.cpp"
#include "module.cpp"
#include "plan.cpp"
#include "record.cpp"
#include "state.cpp"

// What is compiled as one, so that torch's headers are read once: how calls go.
#include "boxed.cpp"
#include "call.cpp"
#include "module.cpp"
#include "plan.cpp"

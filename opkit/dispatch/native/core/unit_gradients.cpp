// What is compiled as one, so that torch's headers are read once: how calls are differentiated.
#include "autograd.cpp"
#include "context.cpp"

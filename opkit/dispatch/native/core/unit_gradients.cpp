// What is compiled as one, so that torch's headers are read once: how calls are differentiated.
#include "compiled_node.cpp"
#include "context.cpp"
#include "node.cpp"
#include "recording.cpp"

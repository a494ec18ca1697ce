// The `ctx` of a formula in Python: what it saves, and what it may ask.
#pragma once

#include "object.h"

#include <torch/csrc/autograd/python_variable.h>

namespace opkit_core {

struct Node;

struct Context {
  PyObject_HEAD PyObject* attributes;  // its __dict__
  PyObject* weak;                      // references to it
  PyObject* saved;                     // a tuple, what save_for_backward was given
  PyObject* forward;                   // a tuple, what save_for_forward was given
  PyObject* needs;                     // needs_input_grad
  PyObject* constant;                  // a tuple, what mark_non_differentiable was given
  bool materialize;
  bool is_closed;  // the node has what it was given to save
  Node* node;      // while that runs: who has the saved tensors
  int depth;       // how many threads it runs on

  bool is_bare() const { return attributes == nullptr || PyDict_GET_SIZE(attributes) == 0; }
};

extern PyTypeObject ContextType;

// Returns a new context, a copy of one that is closed; they throw where there is no memory.
Ref new_context(PyObject* needs);
Ref copy_of(const Context* context);

// Drops what was given to be saved, which is the node's from now on: a context that kept outputs would know itself.
void close_context(Context* context);

// Returns the tensors that a node has saved, as a tuple; in node.cpp.
PyObject* unpack_saved(Node* node);

}  // namespace opkit_core

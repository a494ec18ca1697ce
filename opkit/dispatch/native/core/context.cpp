#include "context.h"

#include <structmember.h>

#include <cstddef>

namespace opkit_core {
namespace {

Context* cast(PyObject* self) { return reinterpret_cast<Context*>(self); }

PyObject* keep(PyObject*& field, PyObject* args) {
  Py_INCREF(args);
  PyObject* before = std::exchange(field, args);
  Py_XDECREF(before);
  Py_RETURN_NONE;
}

PyObject* save_for_backward(PyObject* self, PyObject* args) {
  for (Py_ssize_t i = 0; i < PyTuple_GET_SIZE(args); ++i) {
    PyObject* one = PyTuple_GET_ITEM(args, i);
    if (one != Py_None && !THPVariable_CheckExact(one) && !THPVariable_Check(one)) {
      PyErr_Format(PyExc_TypeError,
                   "save_for_backward can only save variables, but argument %zd is of type %s", i,
                   Py_TYPE(one)->tp_name);
      return nullptr;
    }
  }
  return keep(cast(self)->saved, args);
}

PyObject* save_for_forward(PyObject* self, PyObject* args) {
  return keep(cast(self)->forward, args);
}

PyObject* mark_non_differentiable(PyObject* self, PyObject* args) {
  for (Py_ssize_t i = 0; i < PyTuple_GET_SIZE(args); ++i) {
    PyObject* one = PyTuple_GET_ITEM(args, i);
    if (!THPVariable_Check(one)) {
      PyErr_Format(PyExc_RuntimeError,
                   "mark_non_differentiable only accepts variable arguments, but got %s",
                   Py_TYPE(one)->tp_name);
      return nullptr;
    }
  }
  return keep(cast(self)->constant, args);
}

PyObject* mark_dirty(PyObject*, PyObject*) {
  PyErr_SetString(PyExc_RuntimeError,
                  "saving for backward: found ctx.mark_dirty; expected an op that says what it "
                  "writes into. Declare it with "
                  "mutates_args=, and leave the call out.");
  return nullptr;
}

PyObject* set_materialize_grads(PyObject* self, PyObject* value) {
  const int truth = PyObject_IsTrue(value);
  if (truth < 0) { return nullptr; }
  cast(self)->materialize = truth != 0;
  Py_RETURN_NONE;
}

PyObject* field(PyObject* value) {
  PyObject* found = value == nullptr ? Py_None : value;
  Py_INCREF(found);
  return found;
}

PyObject* saved_tensors(PyObject* self, void*) {
  Context* context = cast(self);
  if (!context->is_closed) {  // as torch has it: nothing is saved yet, but for forward mode
    return context->forward != nullptr ? field(context->forward) : PyTuple_New(0);
  }
  if (context->node == nullptr) {
    PyErr_SetString(PyExc_RuntimeError,
                    "reading ctx.saved_tensors: no backward is running for this ctx; expected it "
                    "inside of the formula. Keep "
                    "the tensors, not the ctx.");
    return nullptr;
  }
  return unpack_saved(context->node);
}

PyObject* to_save(PyObject* self, void*) { return field(cast(self)->saved); }

PyObject* needs_input_grad(PyObject* self, void*) { return field(cast(self)->needs); }

int set_needs_input_grad(PyObject* self, PyObject* value, void*) {
  if (value == nullptr) {
    PyErr_SetString(PyExc_AttributeError, "needs_input_grad cannot be deleted");
    return -1;
  }
  Py_INCREF(value);
  Py_XDECREF(std::exchange(cast(self)->needs, value));
  return 0;
}

PyObject* non_differentiable(PyObject* self, void*) { return field(cast(self)->constant); }

PyMethodDef methods[] = {
    {"save_for_backward", save_for_backward, METH_VARARGS, nullptr},
    {"save_for_forward", save_for_forward, METH_VARARGS, nullptr},
    {"mark_non_differentiable", mark_non_differentiable, METH_VARARGS, nullptr},
    {"mark_dirty", mark_dirty, METH_VARARGS, nullptr},
    {"set_materialize_grads", set_materialize_grads, METH_O, nullptr},
    {nullptr, nullptr, 0, nullptr}};

PyGetSetDef properties[] = {
    {"saved_tensors", saved_tensors, nullptr, nullptr, nullptr},
    {"to_save", to_save, nullptr, nullptr, nullptr},
    {"needs_input_grad", needs_input_grad, set_needs_input_grad, nullptr, nullptr},
    {"non_differentiable", non_differentiable, nullptr, nullptr, nullptr},
    {"__dict__", PyObject_GenericGetDict, PyObject_GenericSetDict, nullptr, nullptr},
    {nullptr, nullptr, nullptr, nullptr, nullptr}};

int traverse(PyObject* self, visitproc visit, void* arg) {
  Py_VISIT(cast(self)->attributes);
  Py_VISIT(cast(self)->saved);
  Py_VISIT(cast(self)->forward);
  Py_VISIT(cast(self)->needs);
  Py_VISIT(cast(self)->constant);
  return 0;
}

int clear(PyObject* self) {
  Py_CLEAR(cast(self)->attributes);
  Py_CLEAR(cast(self)->saved);
  Py_CLEAR(cast(self)->forward);
  Py_CLEAR(cast(self)->needs);
  Py_CLEAR(cast(self)->constant);
  return 0;
}

void dealloc(PyObject* self) {
  PyObject_GC_UnTrack(self);
  if (cast(self)->weak != nullptr) { PyObject_ClearWeakRefs(self); }
  clear(self);
  Py_TYPE(self)->tp_free(self);
}

PyTypeObject make_type() {
  PyTypeObject type = {PyVarObject_HEAD_INIT(nullptr, 0)};
  type.tp_name = "opkit_core.Context";
  type.tp_basicsize = sizeof(Context);
  type.tp_flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_HAVE_GC;
  type.tp_doc = "What a formula saves in forward and finds in backward.";
  type.tp_methods = methods;
  type.tp_getset = properties;
  type.tp_dictoffset = offsetof(Context, attributes);
  type.tp_weaklistoffset = offsetof(Context, weak);
  type.tp_traverse = traverse;
  type.tp_clear = clear;
  type.tp_dealloc = dealloc;
  return type;
}

}  // namespace

PyTypeObject ContextType = make_type();

Ref new_context(PyObject* needs) {
  Ref made = checked_ref(ContextType.tp_alloc(&ContextType, 0));
  Py_INCREF(needs);
  cast(made.get())->needs = needs;
  cast(made.get())->materialize = true;
  return made;
}

Ref copy_of(const Context* context) {
  Ref made = new_context(context->needs);
  Py_XINCREF(context->attributes);
  cast(made.get())->attributes = context->attributes;
  cast(made.get())->materialize = context->materialize;
  cast(made.get())->is_closed = true;
  return made;
}

void close_context(Context* context) {
  context->is_closed = true;
  Py_CLEAR(context->saved);
  Py_CLEAR(context->forward);
}

}  // namespace opkit_core

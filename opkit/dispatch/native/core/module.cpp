// The module `opkit_core`: how Python describes ops to the core, and how calls enter it.

#include "boxed.h"
#include "call.h"
#include "context.h"
#include "description.h"

#include <ATen/core/LegacyTypeDispatch.h>
#include <c10/core/GradMode.h>
#include <torch/csrc/Exceptions.h>
#include <torch/version.h>

#include <cstddef>

namespace opkit_core {
namespace {

// An op's record as Python holds it.
struct Native { PyObject_HEAD std::shared_ptr<Record> record; };

// An op, as far as the core looks into it: the raw part that opkit/dispatch/native/door.py gives every Op.
struct Door {
  PyObject_HEAD vectorcallfunc entry;
  Native* native;
};

PyObject* slow_call = nullptr;       // Op.__call__
PyObject* frame_callback = nullptr;  // gives what Dynamo does with frames

PyObject* step_aside(PyObject* self, PyObject* const* args, size_t flags, PyObject* keywords) {
  const auto count = PyVectorcall_NARGS(flags);
  const auto named = keywords == nullptr ? 0 : PyTuple_GET_SIZE(keywords);
  c10::SmallVector<PyObject*, 20> given{nullptr, self};
  given.append(args, args + count + named);
  return PyObject_Vectorcall(slow_call, given.data() + 1,
                             static_cast<size_t>(count + 1) | PY_VECTORCALL_ARGUMENTS_OFFSET,
                             keywords);
}

// Whether Dynamo looks at frames of this process: then it must see the call, to compile it.
bool is_watched() {
  if (_PyInterpreterState_GetEvalFrameFunc(PyInterpreterState_Get()) == _PyEval_EvalFrameDefault) {
    return false;
  }
  // torch leaves its function there after an error under fullgraph=True; without a callback it does nothing.
  const Ref now = Ref::steal(PyObject_CallNoArgs(frame_callback));
  PyErr_Clear();
  return now.get() != Py_None;
}

// Whether autograd loses nothing by what a call writes: the twin refuses it otherwise.
bool is_settled(const Record& record, const Arguments& arguments) {
  return record.formula()->settled &&
         arguments.all(record, [&](size_t i, const at::Tensor& tensor) {
           return !record.params[i].mutated || !tensor.requires_grad();
         });
}

// Runs a call, unless something special is about it.
bool serve(const std::shared_ptr<Record>& record, const State& state, PyObject* const* args,
           size_t flags, PyObject* keywords, Returned& returned) {
  Arguments arguments;
  if (!arguments.bind(*record, args, static_cast<size_t>(PyVectorcall_NARGS(flags)), keywords) ||
      arguments.first == nullptr || is_overridden(*record, *arguments.first) ||
      (state.autocast && record->autocast) ||
      (record->mutates && arguments.requires_grad && c10::GradMode::is_enabled() &&
       (state.below_autograd || !is_settled(*record, arguments)))) {
    return false;
  }
  const bool derive = arguments.requires_grad && !state.below_autograd &&
                      c10::GradMode::is_enabled() && !record->results.empty();
  const Calling calling(*record);
  const Chosen kernel = select(*record, arguments);
  if (record->mutates) {
    arguments.all(*record, [&](size_t i, const at::Tensor& tensor) {
      if (record->params[i].mutated) { bump(tensor); }
      return true;
    });
  }
  returned = derive ? differentiate(record, *kernel, arguments) : run(*record, *kernel, arguments);
  return true;
}

// Calls an op.
PyObject* enter(PyObject* self, PyObject* const* args, size_t flags, PyObject* keywords) {
  const State state = State::now();
  if (!state.ordinary || is_observed() || is_watched()) {
    return step_aside(self, args, flags, keywords);
  }
  try {
    Native* native = reinterpret_cast<Door*>(self)->native;
    const Ref alive =
        Ref::borrow(reinterpret_cast<PyObject*>(native));  // the op may go in its own call
    Returned returned;
    if (serve(native->record, state, args, flags, keywords, returned)) {
      return returned.whole.release();
    }
  } catch (const std::exception&) {
    torch::translate_exception_to_python(std::current_exception());
    return nullptr;
  }
  return step_aside(self, args, flags, keywords);
}

// ------------------------------------------------------------------ the type of what an overload calls

// Stands in torch's overload for the function of torch's that it calls, and does the same.
struct OverloadCall {
  PyObject_HEAD vectorcallfunc call;
  Native* native;
  PyObject* function;
};

PyObject* enter_overload(PyObject* self, PyObject* const* args, size_t flags, PyObject* keywords) {
  auto* entry = reinterpret_cast<OverloadCall*>(self);
  const State state = State::now();
  if (state.ordinary && !is_observed()) {
    try {
      const Ref alive = Ref::borrow(self);
      Returned returned;
      if (serve(entry->native->record, state, args, flags, keywords, returned)) {
        const bool named =
            PyTuple_Check(returned.raw.get()) && !PyTuple_CheckExact(returned.raw.get());
        return named ? PySequence_Tuple(returned.raw.get()) : returned.raw.release();
      }
    } catch (const std::exception&) {
      torch::translate_exception_to_python(std::current_exception());
      return nullptr;
    }
  }
  return PyObject_Vectorcall(entry->function, args, flags, keywords);
}

PyObject* make_overload_call(PyTypeObject* type, PyObject* args, PyObject*) {
  PyObject *native, *function;
  if (!PyArg_ParseTuple(args, "OO", &native, &function)) { return nullptr; }
  auto* self = reinterpret_cast<OverloadCall*>(type->tp_alloc(type, 0));
  if (self == nullptr) { return nullptr; }
  Py_INCREF(native);
  Py_INCREF(function);
  self->call = enter_overload;
  self->native = reinterpret_cast<Native*>(native);
  self->function = function;
  return reinterpret_cast<PyObject*>(self);
}

void free_overload_call(PyObject* self) {
  auto* entry = reinterpret_cast<OverloadCall*>(self);
  Py_DECREF(entry->native);
  Py_DECREF(entry->function);
  Py_TYPE(self)->tp_free(self);
}

// An overload's hash is that of what it calls.
Py_hash_t hash_overload_call(PyObject* self) {
  return PyObject_Hash(reinterpret_cast<OverloadCall*>(self)->function);
}

PyTypeObject OverloadCallType = {PyVarObject_HEAD_INIT(nullptr, 0)};

// ------------------------------------------------------------------ the type of records

Native* cast(PyObject* self) { return reinterpret_cast<Native*>(self); }

PyObject* make(PyTypeObject* type, PyObject* args, PyObject* kwargs) {
  PyObject* description = nullptr;
  static const char* names[] = {"description", nullptr};
  if (!PyArg_ParseTupleAndKeywords(args, kwargs, "O", const_cast<char**>(names), &description)) {
    return nullptr;
  }
  HANDLE_TH_ERRORS
  auto record = read_record(description);
  PyObject* self = type->tp_alloc(type, 0);
  if (self == nullptr) { throw_python_error(); }
  new (&cast(self)->record) std::shared_ptr<Record>(std::move(record));
  return self;
  END_HANDLE_TH_ERRORS
}

void dealloc(PyObject* self) {
  cast(self)->record.~shared_ptr();
  Py_TYPE(self)->tp_free(self);
}

PyObject* set_formula(PyObject* self, PyObject* description) {
  HANDLE_TH_ERRORS
  cast(self)->record->set_formula(read_formula(description));
  Py_RETURN_NONE;
  END_HANDLE_TH_ERRORS
}

// Has calls of an op enter here.
PyObject* open(PyObject* self, PyObject* op) {
  auto* door = reinterpret_cast<Door*>(op);
  door->native = cast(self);
  door->entry = enter;
  Py_RETURN_NONE;
}

// Says that the op has a rule for autocast, which is torch's dispatcher's business.
PyObject* set_autocast(PyObject* self, PyObject*) {
  cast(self)->record->autocast = true;
  Py_RETURN_NONE;
}

PyMethodDef native_methods[] = {
    {"set_autocast", set_autocast, METH_NOARGS, "Say that the op has a rule for autocast."},
    {"set_formula", set_formula, METH_O, "Say how the op is differentiated from now on."},
    {"open", open, METH_O, "Have calls of an Op, which must hold this, enter the core."},
    {nullptr, nullptr, 0, nullptr}};

PyTypeObject NativeType = {PyVarObject_HEAD_INIT(nullptr, 0)};

// ------------------------------------------------------------------ the module

// Has an op be called by Python alone again.
PyObject* close(PyObject*, PyObject* op) {
  auto* door = reinterpret_cast<Door*>(op);
  door->entry = nullptr;
  door->native = nullptr;
  Py_RETURN_NONE;
}

// Makes calls of a class's instances look for their entry before its __call__, which Dynamo keeps on seeing.
PyObject* seal(PyObject*, PyObject* args) {
  PyObject *op_class, *callback;
  if (!PyArg_ParseTuple(args, "OO", &op_class, &callback)) { return nullptr; }
  auto* type = reinterpret_cast<PyTypeObject*>(op_class);
  PyObject* function = PyObject_GetAttrString(op_class, "__call__");
  if (function == nullptr) { return nullptr; }
  Py_XDECREF(std::exchange(slow_call, function));
  Py_INCREF(callback);
  Py_XDECREF(std::exchange(frame_callback, callback));
  if ((type->tp_flags & Py_TPFLAGS_HAVE_VECTORCALL) != 0) { Py_RETURN_NONE; }
  type->tp_call = [](PyObject* self, PyObject* args, PyObject* kwargs) -> PyObject* {
    if (reinterpret_cast<Door*>(self)->entry != nullptr) {
      return PyVectorcall_Call(self, args, kwargs);
    }
    const Ref given = Ref::steal(PyTuple_New(PyTuple_GET_SIZE(args) + 1));
    if (!given) { return nullptr; }
    Py_INCREF(self);
    PyTuple_SET_ITEM(given.get(), 0, self);
    for (Py_ssize_t i = 0; i < PyTuple_GET_SIZE(args); ++i) {
      Py_INCREF(PyTuple_GET_ITEM(args, i));
      PyTuple_SET_ITEM(given.get(), i + 1, PyTuple_GET_ITEM(args, i));
    }
    return PyObject_Call(slow_call, given.get(), kwargs);
  };
  type->tp_vectorcall_offset = offsetof(Door, entry);
  type->tp_flags |= Py_TPFLAGS_HAVE_VECTORCALL;
  PyType_Modified(type);
  Py_RETURN_NONE;
}

// Registers the kernels of an op in torch, for as long as what is returned is there.
PyObject* register_op(PyObject*, PyObject* args) {
  using Handles = std::vector<c10::RegistrationHandleRAII>;
  const char* name = nullptr;
  int mutates = 0;
  PyObject* describe = nullptr;
  if (!PyArg_ParseTuple(args, "spO", &name, &mutates, &describe)) { return nullptr; }
  HANDLE_TH_ERRORS
  auto handles =
      std::make_unique<Handles>(register_kernels({name, ""}, mutates != 0, Ref::borrow(describe)));
  PyObject* made = PyCapsule_New(handles.get(), nullptr, [](PyObject* capsule) {
    delete static_cast<Handles*>(PyCapsule_GetPointer(capsule, nullptr));
  });
  if (made != nullptr) { handles.release(); }
  return made;
  END_HANDLE_TH_ERRORS
}

PyObject* choose_anew(PyObject*, PyObject*) {
  epoch.fetch_add(1);
  Py_RETURN_NONE;
}

PyObject* expect_preferences(PyObject*, PyObject*) {
  preferences.store(true);
  Py_RETURN_NONE;
}

PyMethodDef functions[] = {
    {"seal", seal, METH_VARARGS,
     "Make a class callable from C; the other argument gives Dynamo's callback."},
    {"register_op", register_op, METH_VARARGS,
     "Register the kernels of an op that is defined; the last argument gives its Native."},
    {"close", close, METH_O, "Have an Op be called by Python alone."},
    {"choose_anew", choose_anew, METH_NOARGS, "Forget which kernels were chosen."},
    {"expect_preferences", expect_preferences, METH_NOARGS,
     "Look for what a thread prefers, from now on."},
    {nullptr, nullptr, 0, nullptr}};

PyModuleDef definition = {PyModuleDef_HEAD_INIT, "opkit_core", nullptr, -1, functions};

}  // namespace

std::shared_ptr<Record> record_of(PyObject* native) { return cast(native)->record; }

}  // namespace opkit_core

PyMODINIT_FUNC PyInit_opkit_core() {
  using namespace opkit_core;
  NativeType.tp_name = "opkit_core.Native";
  NativeType.tp_basicsize = sizeof(Native);
  NativeType.tp_flags = Py_TPFLAGS_DEFAULT;
  NativeType.tp_doc = "An op as the core knows it.";
  NativeType.tp_new = make;
  NativeType.tp_dealloc = dealloc;
  NativeType.tp_methods = native_methods;
  OverloadCallType.tp_name = "opkit_core.OverloadCall";
  OverloadCallType.tp_basicsize = sizeof(OverloadCall);
  OverloadCallType.tp_flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_HAVE_VECTORCALL;
  OverloadCallType.tp_doc = "What an overload of torch's calls.";
  OverloadCallType.tp_new = make_overload_call;
  OverloadCallType.tp_dealloc = free_overload_call;
  OverloadCallType.tp_hash = hash_overload_call;
  OverloadCallType.tp_call = PyVectorcall_Call;
  OverloadCallType.tp_vectorcall_offset = offsetof(OverloadCall, call);
  if (PyType_Ready(&NativeType) < 0 || PyType_Ready(&OverloadCallType) < 0 ||
      PyType_Ready(&ContextType) < 0) {
    return nullptr;
  }
  PyObject* module = PyModule_Create(&definition);
  if (module == nullptr ||
      PyModule_AddObjectRef(module, "Native", reinterpret_cast<PyObject*>(&NativeType)) < 0 ||
      PyModule_AddObjectRef(module, "OverloadCall",
                            reinterpret_cast<PyObject*>(&OverloadCallType)) < 0 ||
      PyModule_AddStringConstant(module, "torch_version", TORCH_VERSION) < 0) {
    Py_XDECREF(module);
    return nullptr;
  }
  return module;
}

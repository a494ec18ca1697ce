// The module `opkit_core`: how Python describes ops to the core, and how calls enter it.

#include "boxed.h"
#include "call.h"
#include "context.h"

#include <ATen/core/LegacyTypeDispatch.h>
#include <c10/core/GradMode.h>
#include <torch/csrc/Dtype.h>
#include <torch/csrc/Exceptions.h>
#include <torch/version.h>

#include <cstddef>

namespace opkit_core {
namespace {

// An op's record as Python holds it; the kernels are registered for as long as it is there.
struct Native {
  PyObject_HEAD std::shared_ptr<Record> record;
  std::vector<c10::RegistrationHandleRAII> handles;
};

// An op, as far as the core looks into it: the raw part that opkit/dispatch/native/door.py gives every Op.
struct Door {
  PyObject_HEAD vectorcallfunc entry;
  Native* native;
};

PyObject* slow_call = nullptr;  // Op.__call__

PyObject* step_aside(PyObject* self, PyObject* const* args, size_t flags, PyObject* keywords) {
  const auto count = PyVectorcall_NARGS(flags);
  const auto named = keywords == nullptr ? 0 : PyTuple_GET_SIZE(keywords);
  c10::SmallVector<PyObject*, 20> given{nullptr, self};
  given.append(args, args + count + named);
  return PyObject_Vectorcall(slow_call, given.data() + 1,
                             static_cast<size_t>(count + 1) | PY_VECTORCALL_ARGUMENTS_OFFSET,
                             keywords);
}

// Raises the version counters of what the op writes into.
void bump(const Record& record, const Arguments& arguments) {
  for (size_t i = 0; i < record.params.size(); ++i) {
    if (!record.params[i].mutated) { continue; }
    if (arguments.tensors[i] != nullptr && !arguments.tensors[i]->is_inference()) {
      arguments.tensors[i]->unsafeGetTensorImpl()->bump_version();
    }
  }
}

// Whether Dynamo looks at frames of this process: then it must see the call, to compile it.
bool is_watched() {
  if (_PyInterpreterState_GetEvalFrameFunc(PyInterpreterState_Get()) == _PyEval_EvalFrameDefault) {
    return false;
  }
  // torch leaves its function there after an error under fullgraph=True; without a callback it does nothing.
  static PyObject* const callback = [] {
    const Ref dynamo = Ref::steal(PyImport_ImportModule("torch._C._dynamo.eval_frame"));
    PyObject* found =
        dynamo ? PyObject_GetAttrString(dynamo.get(), "get_eval_frame_callback") : nullptr;
    PyErr_Clear();
    return found;
  }();
  const Ref now = callback != nullptr ? Ref::steal(PyObject_CallNoArgs(callback)) : Ref();
  PyErr_Clear();
  return now.get() != Py_None;
}

PyObject* enter(PyObject* self, PyObject* const* args, size_t flags, PyObject* keywords) {
  const State state = State::now();
  if (!state.ordinary || is_observed() || is_watched()) {
    return step_aside(self, args, flags, keywords);
  }
  try {
    Native* native = reinterpret_cast<Door*>(self)->native;
    const Ref alive =
        Ref::borrow(reinterpret_cast<PyObject*>(native));  // the op may go in its own call
    const std::shared_ptr<Record>& record = native->record;
    Arguments arguments;
    if (!arguments.bind(*record, args, static_cast<size_t>(PyVectorcall_NARGS(flags)), keywords) ||
        arguments.first == nullptr || is_overridden(*record, *arguments.first) ||
        (state.autocast && record->autocast)) {
      return step_aside(self, args, flags, keywords);
    }
    const bool derive = arguments.requires_grad && !state.below_autograd &&
                        c10::GradMode::is_enabled() && !record->results.empty();
    if (record->mutates && (arguments.requires_grad || record->tensor_lists)) {
      return step_aside(self, args, flags, keywords);
    }
    const auto kernel = select(*record, arguments);
    if (derive) { return differentiate(record, *kernel, arguments).whole.release(); }
    if (record->mutates) { bump(*record, arguments); }
    return run(*record, *kernel, arguments).whole.release();
  } catch (const std::exception&) {
    torch::translate_exception_to_python(std::current_exception());
    return nullptr;
  }
}

// ------------------------------------------------------------------ describing

// Reads attributes of what Python describes an op with; throws with Python's error set.
class Reader {
 public:
  explicit Reader(PyObject* object) : object_(object) {}

  Ref get(const char* name) const {
    Ref found = Ref::steal(PyObject_GetAttrString(object_, name));
    if (!found) { throw_python_error(); }
    return found;
  }
  std::string text(const char* name) const {
    const Ref found = get(name);
    const char* characters = PyUnicode_AsUTF8(found.get());
    if (characters == nullptr) { throw_python_error(); }
    return characters;
  }
  int64_t number(const char* name) const { return number(get(name).get()); }
  bool truth(const char* name) const { return PyObject_IsTrue(get(name).get()) == 1; }
  template <typename F>
  void each(const char* name, F visit) const {
    const Ref items = get(name);
    each(items.get(), visit);
  }
  template <typename F>
  static void each(PyObject* items, F visit) {
    const Ref list = Ref::steal(PySequence_Fast(items, "expected a sequence"));
    if (!list) { throw_python_error(); }
    for (Py_ssize_t i = 0; i < PySequence_Fast_GET_SIZE(list.get()); ++i) {
      visit(PySequence_Fast_GET_ITEM(list.get(), i));
    }
  }
  static int64_t number(PyObject* object) {
    const int64_t value = PyLong_AsLongLong(object);
    if (value == -1 && PyErr_Occurred() != nullptr) { throw_python_error(); }
    return value;
  }

 private:
  PyObject* object_;
};

c10::ScalarType dtype_of(PyObject* object) {
  TORCH_CHECK_TYPE(THPDtype_Check(object), "expected a dtype");
  return reinterpret_cast<THPDtype*>(object)->scalar_type;
}

Dim read_dim(PyObject* object) {
  const Reader reader(object);
  Dim dim{static_cast<Dim::Kind>(reader.number("kind")), reader.number("value")};
  reader.each("code", [&](PyObject* one) { dim.code.push_back(Reader::number(one)); });
  return dim;
}

Entry read_entry(PyObject* object) {
  const Reader reader(object);
  Entry entry{static_cast<size_t>(reader.number("place"))};
  reader.each("dims", [&](PyObject* one) {
    entry.dims.push_back(read_dim(one));
    if (entry.dims.back().kind == Dim::Star) {
      entry.star = static_cast<int64_t>(entry.dims.size()) - 1;
    }
  });
  entry.dtype.kind = static_cast<DtypeRule::Kind>(reader.number("dtype_kind"));
  const Ref value = reader.get("dtype_value");
  entry.dtype.value = entry.dtype.kind == DtypeRule::Fixed
                          ? static_cast<int64_t>(dtype_of(value.get()))
                          : Reader::number(value.get());
  reader.each("allowed", [&](PyObject* one) { entry.allowed.push_back(dtype_of(one)); });
  return entry;
}

// Whether two entries bind the same names to the same sizes.
bool is_same(const Entry& one, const Entry& other) {
  return std::equal(one.dims.begin(), one.dims.end(), other.dims.begin(), other.dims.end(),
                    [](const Dim& a, const Dim& b) {
                      const bool fixed = a.kind == Dim::Name || a.kind == Dim::Number ||
                                         (a.kind == Dim::Star && a.value >= 0);
                      return fixed && a.kind == b.kind && a.value == b.value;
                    });
}

Plan read_plan(PyObject* object) {
  const Reader reader(object);
  Plan plan;
  reader.each("inputs", [&](PyObject* one) { plan.inputs.push_back(read_entry(one)); });
  for (size_t i = 0; i < plan.inputs.size(); ++i) {
    for (size_t k = 0; k < i && plan.inputs[i].like < 0; ++k) {
      if (is_same(plan.inputs[k], plan.inputs[i])) {
        plan.inputs[i].like = static_cast<int64_t>(plan.inputs[k].place);
      }
    }
  }
  for (const Entry& entry : plan.inputs) {
    plan.late = plan.late || entry.dtype.kind != DtypeRule::None;
    for (const Dim& dim : entry.dims) { plan.late = plan.late || dim.kind == Dim::Expression; }
  }
  reader.each("outputs", [&](PyObject* one) { plan.outputs.push_back(read_entry(one)); });
  reader.each("ints", [&](PyObject* one) {
    plan.ints.emplace_back(Reader::number(PyTuple_GET_ITEM(one, 0)),
                           Reader::number(PyTuple_GET_ITEM(one, 1)));
  });
  plan.names = static_cast<size_t>(reader.number("names"));
  plan.stars = static_cast<size_t>(reader.number("stars"));
  return plan;
}

std::shared_ptr<Record> read_record(PyObject* object) {
  const Reader reader(object);
  auto record = std::make_shared<Record>(
      c10::Dispatcher::singleton().findSchemaOrThrow(reader.text("torch_name").c_str(), ""));
  record->name = reader.text("name");
  record->node_name = reader.text("node_name");
  record->positional = static_cast<size_t>(reader.number("positional"));
  record->mutates = false;
  record->tensor_lists = false;
  record->plain_results = true;
  reader.each("params", [&](PyObject* one) {
    const Reader param(one);
    Ref fallback = param.truth("required") ? Ref() : param.get("default");
    PyObject* name = param.get("name").release();
    PyUnicode_InternInPlace(&name);  // as the names in calls are
    record->params.push_back({Ref::steal(name), std::move(fallback),
                              static_cast<Kind>(param.number("kind")), param.truth("list"),
                              param.truth("optional"), param.truth("mutated")});
    const Param& last = record->params.back();
    record->mutates = record->mutates || last.mutated;
    record->tensor_lists = record->tensor_lists || (last.list && last.kind == Kind::Tensor);
  });
  reader.each("results", [&](PyObject* one) {
    const Reader result(one);
    record->results.push_back(
        {static_cast<Kind>(result.number("kind")), result.truth("list"), result.truth("optional")});
    const Result& last = record->results.back();
    record->tensor_lists = record->tensor_lists || last.list;
    record->plain_results =
        record->plain_results && last.kind == Kind::Tensor && !last.list && !last.optional;
  });
  const Ref plan = reader.get("plan");
  if (plan.given()) { record->plan = read_plan(plan.get()); }
  record->keywords = reader.get("keywords");
  record->container = reader.get("container");
  record->is_tuple = reader.truth("is_tuple");
  record->choose = reader.get("choose");
  record->run = reader.get("run");
  record->conform = reader.get("conform");
  record->explain = reader.get("explain");
  record->pack = reader.get("pack");
  record->twin = reader.get("twin");
  record->lost = reader.get("lost");
  record->tracked = reader.get("tracked");
  record->again = reader.get("again");
  record->alone = reader.get("alone");
  record->check = reader.get("check");
  record->flatten = reader.get("flatten");
  return record;
}

std::shared_ptr<Formula> read_formula(PyObject* object) {
  const Reader reader(object);
  auto formula = std::make_shared<Formula>();
  formula->form = static_cast<Formula::Form>(reader.number("form"));
  reader.each("constant",
              [&](PyObject* one) { formula->constant.push_back(PyObject_IsTrue(one) == 1); });
  if (formula->form == Formula::Function) {
    formula->setup = reader.get("setup");
    formula->backward = reader.get("backward");
    formula->counted = reader.get("counted");
  } else if (formula->form == Formula::Rule) {
    formula->save = reader.get("save");
    formula->gradients = reader.get("gradients");
  } else {
    formula->op = {reader.text("op"), ""};
    const auto handle =
        c10::Dispatcher::singleton().findSchemaOrThrow(formula->op.name.c_str(), "");
    reader.each("saves", [&](PyObject* one) {
      formula->saves.emplace_back(PyObject_IsTrue(PyTuple_GET_ITEM(one, 0)) == 1,
                                  Reader::number(PyTuple_GET_ITEM(one, 1)));
    });
    reader.each("outputs", [&](PyObject* one) { formula->outputs.push_back(Reader::number(one)); });
    reader.each("arguments",
                [&](PyObject* one) { formula->arguments.push_back(Reader::number(one)); });
    reader.each("lost", [&](PyObject* one) { formula->lost.push_back(Reader::number(one)); });
    formula->rule = read_formula(reader.get("rule").get());
    formula->object = reader.get("object");
    const auto& arguments = handle.schema().arguments();
    for (size_t i = formula->outputs.size() + formula->saves.size(); i < arguments.size(); ++i) {
      TORCH_CHECK(arguments[i].default_value().has_value(), "the formula lacks an argument");
      formula->rest.push_back(*arguments[i].default_value());
    }
  }
  return formula;
}

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
  record->set_formula(read_formula(Reader(description).get("formula").get()));
  auto handles = register_kernels(record);
  PyObject* self = type->tp_alloc(type, 0);
  if (self == nullptr) { throw_python_error(); }
  new (&cast(self)->record) std::shared_ptr<Record>(std::move(record));
  new (&cast(self)->handles) std::vector<c10::RegistrationHandleRAII>(std::move(handles));
  return self;
  END_HANDLE_TH_ERRORS
}

void dealloc(PyObject* self) {
  cast(self)->handles.~vector();
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
PyObject* seal(PyObject*, PyObject* op_class) {
  auto* type = reinterpret_cast<PyTypeObject*>(op_class);
  PyObject* function = PyObject_GetAttrString(op_class, "__call__");
  if (function == nullptr) { return nullptr; }
  Py_XDECREF(std::exchange(slow_call, function));
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

PyObject* choose_anew(PyObject*, PyObject*) {
  epoch.fetch_add(1);
  Py_RETURN_NONE;
}

PyObject* expect_preferences(PyObject*, PyObject*) {
  preferences.store(true);
  Py_RETURN_NONE;
}

PyMethodDef functions[] = {
    {"seal", seal, METH_O, "Make a class callable from C."},
    {"close", close, METH_O, "Have an Op be called by Python alone."},
    {"choose_anew", choose_anew, METH_NOARGS, "Forget which kernels were chosen."},
    {"expect_preferences", expect_preferences, METH_NOARGS,
     "Look for what a thread prefers, from now on."},
    {nullptr, nullptr, 0, nullptr}};

PyModuleDef definition = {PyModuleDef_HEAD_INIT, "opkit_core", nullptr, -1, functions};

}  // namespace
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
  if (PyType_Ready(&NativeType) < 0 || PyType_Ready(&ContextType) < 0) { return nullptr; }
  PyObject* module = PyModule_Create(&definition);
  if (module == nullptr ||
      PyModule_AddObjectRef(module, "Native", reinterpret_cast<PyObject*>(&NativeType)) < 0 ||
      PyModule_AddStringConstant(module, "torch_version", TORCH_VERSION) < 0) {
    Py_XDECREF(module);
    return nullptr;
  }
  return module;
}

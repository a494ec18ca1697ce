// Functions with at::Tensor and plain values in Python, without pybind11, whose code takes longest to compile.
//
// A type without a Caster does not compile here; `load_inline` then binds with pybind11. What a Caster takes and
// gives is what pybind11 takes and gives, so that nobody can tell which of the two it was.
#ifndef OPKIT_PYTHON_H
#define OPKIT_PYTHON_H

#include <Python.h>
#include <torch/csrc/Device.h>
#include <torch/csrc/Dtype.h>
#include <torch/csrc/DynamicTypes.h>
#include <torch/csrc/Layout.h>
#include <torch/types.h>
#include <torch/utils.h>

#include <exception>
#include <limits>
#include <optional>
#include <string>
#include <string_view>
#include <tuple>
#include <type_traits>
#include <utility>
#include <vector>

namespace opkit::python {

// What libtorch_python exports and its headers declare behind pybind11. The build looks that every one is there.
PyObject* wrap(const at::TensorBase& tensor) __asm__("_Z16THPVariable_WrapRKN2at10TensorBaseE");
void translate(const std::exception_ptr& error) __asm__(
    "_ZN5torch29translate_exception_to_pythonERKNSt15__exception_ptr13exception_ptrE");
// pybind11::detail::type_caster<T>::load, where a pybind11::handle is passed as the pointer that it holds.
bool load_tensor(void* caster, PyObject* from,
                 bool) __asm__("_ZN8pybind116detail11type_casterIN2at6TensorEvE4loadENS_6handleEb");
bool load_sizes(void* caster, PyObject* from, bool) __asm__(
    "_ZN8pybind116detail11type_casterIN3c108ArrayRefIlEEvE4loadENS_6handleEb");
// torch::PyWarningHandler, which makes Python's warnings of TORCH_WARN's.
void begin_warnings(void* handler) __asm__("_ZN5torch16PyWarningHandlerC1Ev");
void end_warnings(void* handler) __asm__("_ZN5torch16PyWarningHandlerD1Ev");

class Warnings {
 public:
  Warnings() { begin_warnings(handler_); }
  ~Warnings() noexcept(false) { end_warnings(handler_); }
  Warnings(const Warnings&) = delete;
  Warnings& operator=(const Warnings&) = delete;

 private:
  alignas(16) char handler_[256];  // five times its size
};

// Take a Python object into `to`, or return false, with a Python error set only where that is to be raised.
inline bool load_integer(PyObject* from, long& to) {
  if (PyFloat_Check(from)) return false;
  to = PyLong_AsLong(from);
  if (to != -1 || !PyErr_Occurred()) return true;
  PyErr_Clear();
  PyObject* number = PyNumber_Check(from) && !PyLong_Check(from) ? PyNumber_Long(from) : nullptr;
  PyErr_Clear();
  if (!number) return false;
  to = PyLong_AsLong(number);
  Py_DECREF(number);
  const bool good = to != -1 || !PyErr_Occurred();
  PyErr_Clear();
  return good;
}

inline bool load_integer(PyObject* from, unsigned long& to) {
  if (PyFloat_Check(from)) return false;
  PyObject* number = PyLong_Check(from) ? Py_NewRef(from) : PyNumber_Index(from);
  if (!number) {
    PyErr_Clear();
    number = PyNumber_Check(from) ? PyNumber_Long(from) : nullptr;
    PyErr_Clear();
    if (!number) return false;
  }
  to = PyLong_AsUnsignedLong(number);
  Py_DECREF(number);
  const bool good = to != static_cast<unsigned long>(-1) || !PyErr_Occurred();
  PyErr_Clear();
  return good;
}

inline bool load_float(PyObject* from, double& to) {
  to = PyFloat_AsDouble(from);
  if (to != -1 || !PyErr_Occurred()) return true;
  PyErr_Clear();
  PyObject* number = PyNumber_Check(from) ? PyNumber_Float(from) : nullptr;
  PyErr_Clear();
  if (!number) return false;
  to = PyFloat_AsDouble(number);
  Py_DECREF(number);
  return true;
}

inline bool load_bool(PyObject* from, bool& to) {
  int truth = from == Py_True ? 1 : from == Py_False || from == Py_None ? 0 : -1;
  const PyNumberMethods* methods = Py_TYPE(from)->tp_as_number;
  if (truth < 0 && methods && methods->nb_bool) truth = methods->nb_bool(from);
  if (truth < 0) PyErr_Clear();
  to = truth > 0;
  return truth >= 0;
}

inline bool load_text(PyObject* from, std::string_view& to) {
  Py_ssize_t size = 0;
  if (PyUnicode_Check(from)) {
    const char* text = PyUnicode_AsUTF8AndSize(from, &size);
    if (!text) PyErr_Clear();
    to = {text ? text : "", static_cast<size_t>(size)};
    return text;
  }
  if (PyBytes_Check(from)) {
    to = {PyBytes_AS_STRING(from), static_cast<size_t>(PyBytes_GET_SIZE(from))};
    return true;
  }
  if (!PyByteArray_Check(from)) return false;
  to = {PyByteArray_AS_STRING(from), static_cast<size_t>(PyByteArray_GET_SIZE(from))};
  return true;
}

// Return the items of `from` as a tuple or a list, which the caller owns.
inline PyObject* items_of(PyObject* from) {
  bool fits = PySequence_Check(from) ? !PyUnicode_Check(from) && !PyBytes_Check(from)
                                     : PyGen_Check(from) || PyAnySet_Check(from);
  if (!fits && !PySequence_Check(from) && !PyType_Check(from))
    for (const char* name : {"dict_keys", "dict_values", "dict_items", "map", "zip"})
      fits = fits || std::string_view(Py_TYPE(from)->tp_name) == name;
  return fits ? PySequence_Fast(from, "expected items") : nullptr;
}

// std::remove_cvref_t, which C++17 lacks: torch 2.11 builds extensions with that.
template <typename T>
using Bare = std::remove_cv_t<std::remove_reference_t<T>>;

template <typename T>
struct Caster;  // for a type without one, load_inline binds with pybind11

template <typename T>
struct Numbers {
  T value{};
  bool load(PyObject* from) {
    if constexpr (std::is_floating_point_v<T>) {
      double number = 0;
      if (!load_float(from, number)) return false;
      value = static_cast<T>(number);
      return true;
    } else {
      std::conditional_t<std::is_signed_v<T>, long, unsigned long> number = 0;
      if (!load_integer(from, number)) return false;
      value = static_cast<T>(number);
      return static_cast<decltype(number)>(value) == number;
    }
  }
  static PyObject* cast(T from) {
    if constexpr (std::is_floating_point_v<T>)
      return PyFloat_FromDouble(static_cast<double>(from));
    else if constexpr (std::is_signed_v<T>)
      return PyLong_FromLong(static_cast<long>(from));
    else
      return PyLong_FromUnsignedLong(static_cast<unsigned long>(from));
  }
  static std::string name() { return std::is_floating_point_v<T> ? "float" : "int"; }
  static std::string range() {
    if constexpr (std::is_floating_point_v<T>) return "";
    return " from " + std::to_string(std::numeric_limits<T>::min()) + " to " +
           std::to_string(std::numeric_limits<T>::max());
  }
};

// Where a wide integer is as wide as a long one, as everywhere on Linux.
template <> struct Caster<signed char> : Numbers<signed char> {};
template <> struct Caster<unsigned char> : Numbers<unsigned char> {};
template <> struct Caster<short> : Numbers<short> {};
template <> struct Caster<unsigned short> : Numbers<unsigned short> {};
template <> struct Caster<int> : Numbers<int> {};
template <> struct Caster<unsigned> : Numbers<unsigned> {};
template <> struct Caster<long> : Numbers<long> {};
template <> struct Caster<unsigned long> : Numbers<unsigned long> {};
template <> struct Caster<long long> : Numbers<long long> {};
template <> struct Caster<unsigned long long> : Numbers<unsigned long long> {};
template <> struct Caster<float> : Numbers<float> {};
template <> struct Caster<double> : Numbers<double> {};

template <>
struct Caster<bool> {
  bool value = false;
  bool load(PyObject* from) { return load_bool(from, value); }
  static PyObject* cast(bool from) { return PyBool_FromLong(from); }
  static std::string name() { return "bool"; }
};

template <>
struct Caster<std::string_view> {
  std::string_view value;
  bool load(PyObject* from) { return load_text(from, value); }
  static PyObject* cast(std::string_view from) {
    return PyUnicode_DecodeUTF8(from.data(), static_cast<Py_ssize_t>(from.size()), nullptr);
  }
  static std::string name() { return "str"; }
};

template <>
struct Caster<std::string> {
  std::string value;
  bool load(PyObject* from) {
    std::string_view text;
    if (!load_text(from, text)) return false;
    value = text;
    return true;
  }
  static PyObject* cast(std::string_view from) { return Caster<std::string_view>::cast(from); }
  static std::string name() { return "str"; }
};

template <>
struct Caster<at::Tensor> {
  at::Tensor value;
  bool load(PyObject* from) { return load_tensor(this, from, true); }
  static PyObject* cast(const at::Tensor& from) { return wrap(from); }
  static std::string name() { return "torch.Tensor"; }
};

template <>
struct Caster<at::IntArrayRef> {
  at::IntArrayRef value;
  std::vector<int64_t> items;  // the second member of torch's as well
  bool load(PyObject* from) { return load_sizes(this, from, true); }
  static std::string name() { return "tuple[int, ...]"; }
};

template <>
struct Caster<at::ScalarType> {
  at::ScalarType value = at::kFloat;
  bool load(PyObject* from) {
    if (!THPDtype_Check(from)) return false;
    value = reinterpret_cast<THPDtype*>(from)->scalar_type;
    return true;
  }
  static PyObject* cast(at::ScalarType from) {
    return Py_NewRef(reinterpret_cast<PyObject*>(torch::getTHPDtype(from)));
  }
  static std::string name() { return "torch.dtype"; }
};

template <>
struct Caster<at::Device> {
  at::Device value = at::kCPU;
  bool load(PyObject* from) {
    if (!THPDevice_Check(from)) return false;
    value = reinterpret_cast<THPDevice*>(from)->device;
    return true;
  }
  static PyObject* cast(at::Device from) { return THPDevice_New(from); }
  static std::string name() { return "torch.device"; }
};

template <>
struct Caster<at::Layout> {
  at::Layout value = at::kStrided;
  bool load(PyObject* from) {
    if (!THPLayout_Check(from)) return false;
    value = reinterpret_cast<THPLayout*>(from)->layout;
    return true;
  }
  static PyObject* cast(at::Layout from) {
    return Py_NewRef(reinterpret_cast<PyObject*>(torch::getTHPLayout(from)));
  }
  static std::string name() { return "torch.layout"; }
};

template <typename T>
struct Caster<std::optional<T>> {
  std::optional<T> value;
  bool load(PyObject* from) {
    if (from == Py_None) return true;
    Caster<T> inner;
    if (!inner.load(from)) return false;
    value.emplace(std::move(inner.value));
    return true;
  }
  static PyObject* cast(const std::optional<T>& from) {
    return from ? Caster<T>::cast(*from) : Py_NewRef(Py_None);
  }
  static std::string name() { return Caster<T>::name() + " | None"; }
};

template <typename T>
struct Caster<std::vector<T>> {
  std::vector<T> value;
  bool load(PyObject* from) {
    PyObject* items = items_of(from);
    if (!items) return false;
    const Py_ssize_t count = PySequence_Fast_GET_SIZE(items);
    value.reserve(static_cast<size_t>(count));
    bool good = true;
    for (Py_ssize_t i = 0; good && i < PySequence_Fast_GET_SIZE(items); ++i) {
      Caster<T> item;
      PyObject* object = Py_NewRef(
          PySequence_Fast_GET_ITEM(items, i));  // loading it may run Python that changes the list
      good = item.load(object);
      if (good) value.push_back(std::move(item.value));
      Py_DECREF(object);
    }
    Py_DECREF(items);
    return good;
  }
  static PyObject* cast(const std::vector<T>& from) {
    PyObject* list = PyList_New(static_cast<Py_ssize_t>(from.size()));
    for (size_t i = 0; list && i < from.size(); ++i) {
      PyObject* item = Caster<T>::cast(from[i]);
      if (item)
        PyList_SET_ITEM(list, static_cast<Py_ssize_t>(i), item);
      else
        Py_CLEAR(list);
    }
    return list;
  }
  static std::string name() { return "list[" + Caster<T>::name() + "]"; }
};

// Steal `count` objects into a tuple, or return null where one of them is null.
inline PyObject* tuple_of(PyObject** objects, Py_ssize_t count) {
  PyObject* tuple = PyTuple_New(count);
  for (Py_ssize_t i = 0; i < count; ++i) {
    if (tuple && objects[i]) {
      PyTuple_SET_ITEM(tuple, i, objects[i]);
    } else {
      Py_XDECREF(objects[i]);
      Py_CLEAR(tuple);
    }
  }
  return tuple;
}

template <typename... T>
struct Items {  // a result alone: load_inline leaves parameters of this kind to pybind11
  template <typename Tuple>
  static PyObject* cast(const Tuple& from) {
    return std::apply(
        [](const auto&... item) {
          PyObject* objects[] = {Caster<T>::cast(item)..., nullptr};
          return tuple_of(objects, sizeof...(T));
        },
        from);
  }
  static std::string name() {
    std::string names;
    ((names += (names.empty() ? "" : ", ") + Caster<T>::name()), ...);
    return "tuple[" + names + "]";
  }
};
template <typename... T> struct Caster<std::tuple<T...>> : Items<Bare<T>...> {};
template <typename A, typename B> struct Caster<std::pair<A, B>> : Items<Bare<A>, Bare<B>> {};

template <> struct Caster<void> {
  static std::string name() { return "None"; }
};

template <size_t, typename T>
struct Argument : Caster<Bare<T>> {};
template <typename... A>
struct Arguments : A... {};

inline void raise(const std::exception_ptr& error) {
  try {
    translate(error);
  } catch (...) { PyErr_SetString(PyExc_RuntimeError, "an exception that is no std::exception"); }
}

// Call `run`, with C++'s exceptions and warnings turned into Python's as torch::wrap_pybind_function turns them.
inline PyObject* guarded(PyObject* (*run)(void*), void* state) {
  PyObject *result = nullptr, *type = nullptr, *value = nullptr, *traceback = nullptr;
  std::exception_ptr error;
  try {
    Warnings warnings;
    try {
      result = run(state);
    } catch (...) { error = std::current_exception(); }
    PyErr_Fetch(&type, &value, &traceback);  // warnings are only given where no error is set
  } catch (...) {                            // a filter made an error of a warning
    Py_CLEAR(result);
    if (error || type)
      PyErr_Clear();  // what went wrong first is raised
    else
      error = std::current_exception();
  }
  if (type) {
    PyErr_Restore(type, value, traceback);
  } else if (error) {
    raise(error);
  }
  return result;
}

struct Described {
  const char* name;
  std::string signature;
};

inline PyObject* refuse_count(const Described& function, Py_ssize_t found, size_t expected) {
  return PyErr_Format(PyExc_TypeError, "calling %s: it was given %zd argument%s; expected %zu: %s.",
                      function.name, found, found == 1 ? "" : "s", expected,
                      function.signature.c_str());
}

inline PyObject* refuse(const Described& function, size_t index, PyObject* found,
                        const std::string& expected, const std::string& range) {
  if (PyErr_Occurred()) return nullptr;  // of the argument itself, such as a generator's
  const char* type = Py_TYPE(found)->tp_name;
  if (PyLong_Check(found) || PyFloat_Check(found))
    return PyErr_Format(PyExc_TypeError,
                        "calling %s: argument %zu is %R, of type %s; expected %s%s: %s.",
                        function.name, index + 1, found, type, expected.c_str(),
                        PyLong_Check(found) ? range.c_str() : "", function.signature.c_str());
  return PyErr_Format(PyExc_TypeError, "calling %s: argument %zu is of type %s; expected %s: %s.",
                      function.name, index + 1, type, expected.c_str(), function.signature.c_str());
}

template <typename C>
auto range_of(int) -> decltype(C::range()) {
  return C::range();
}

template <typename C>
std::string range_of(long) {
  return "";
}

template <auto F, typename Indices, typename R, typename... A>
struct Bound;

template <auto F, size_t... I, typename R, typename... A>
struct Bound<F, std::index_sequence<I...>, R, A...> {
  using Held = Arguments<Argument<I, A>...>;
  static inline Described described;

  static PyObject* run(void* state) {
    [[maybe_unused]] Held& held = *static_cast<Held*>(state);
    if constexpr (std::is_void_v<R>) {
      F(static_cast<A&&>(static_cast<Argument<I, A>&>(held).value)...);
      return Py_NewRef(Py_None);
    } else {
      return Caster<Bare<R>>::cast(
          F(static_cast<A&&>(static_cast<Argument<I, A>&>(held).value)...));
    }
  }

  static PyObject* call(PyObject*, PyObject* const* given, Py_ssize_t count) {
    if (count != static_cast<Py_ssize_t>(sizeof...(A)))
      return refuse_count(described, count, sizeof...(A));
    Held held;
    size_t wrong = sizeof...(A);
    try {  // torch's own casters may throw
      if (((static_cast<Argument<I, A>&>(held).load(given[I]) || (wrong = I, false)) && ...))
        return guarded(&run, &held);
    } catch (...) {
      raise(std::current_exception());
      return nullptr;
    }
    const std::string names[] = {Caster<Bare<A>>::name()..., ""};
    const std::string ranges[] = {range_of<Caster<Bare<A>>>(0)..., ""};
    return refuse(described, wrong, given[wrong], names[wrong], ranges[wrong]);
  }

  static PyMethodDef method(const char* name, const char* text) {
    static std::string doc;
    const std::string names[] = {Caster<Bare<A>>::name()..., ""};
    std::string& signature = described.signature;
    signature = std::string(name) + "(";
    for (size_t i = 0; i < sizeof...(A); ++i)
      signature += (i ? ", arg" : "arg") + std::to_string(i) + ": " + names[i];
    signature += ") -> " + Caster<Bare<R>>::name();
    described.name = name;
    doc = signature + "\n\n" + text + "\n";
    return {name, reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(&call)), METH_FASTCALL,
            doc.c_str()};
  }
};

template <auto F>
struct Function;
template <typename R, typename... A, R (*F)(A...)>
struct Function<F> : Bound<F, std::index_sequence_for<A...>, R, A...> {};

}  // namespace opkit::python

// In two steps, so that the loader has named the module when the functions are added, which take its name.
#define OPKIT_PYTHON_MODULE(name, add) OPKIT_PYTHON_MODULE_OF(name, add)
#define OPKIT_PYTHON_MODULE_OF(name, add)                                                      \
  static PyModuleDef_Slot opkit_python_slots[] = {{Py_mod_exec, reinterpret_cast<void*>(add)}, \
                                                  {0, nullptr}};                               \
  static PyModuleDef opkit_python_module = {                                                   \
      PyModuleDef_HEAD_INIT, #name,   nullptr, 0,      nullptr,                                \
      opkit_python_slots,    nullptr, nullptr, nullptr};                                       \
  PyMODINIT_FUNC PyInit_##name() { return PyModuleDef_Init(&opkit_python_module); }

#endif

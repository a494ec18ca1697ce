// Python objects: references to them, which may be given back on any thread, and what is made of them.
#pragma once

#include <torch/csrc/python_headers.h>

#include <c10/util/ArrayRef.h>
#include <c10/util/Exception.h>

#include <utility>

namespace opkit_core {

// Whether the interpreter can still be entered.
inline bool interpreter_lives() {
#if PY_VERSION_HEX >= 0x030D0000
  return Py_IsInitialized() && !Py_IsFinalizing();
#else
  return Py_IsInitialized() && !_Py_IsFinalizing();
#endif
}

// Holds the GIL. Without an interpreter to enter, `held` is false and nothing is done.
class WithGil {
 public:
  WithGil() : held(interpreter_lives()) {
    if (held) { state_ = PyGILState_Ensure(); }
  }
  ~WithGil() {
    if (held) { PyGILState_Release(state_); }
  }
  WithGil(const WithGil&) = delete;
  WithGil& operator=(const WithGil&) = delete;

  const bool held;

 private:
  PyGILState_STATE state_ = PyGILState_UNLOCKED;
};

// Holds the GIL, or throws where there is no interpreter to enter.
struct InPython {
  WithGil gil;
  InPython() { TORCH_CHECK(gil.held, "the interpreter is gone"); }
};

// Gives the GIL away, for work that does not touch Python.
class WithoutGil {
 public:
  WithoutGil() : state_(PyEval_SaveThread()) {}
  ~WithoutGil() { PyEval_RestoreThread(state_); }
  WithoutGil(const WithoutGil&) = delete;
  WithoutGil& operator=(const WithoutGil&) = delete;

 private:
  PyThreadState* state_;
};

// A strong reference of code that holds the GIL.
class Ref {
 public:
  Ref() = default;
  static Ref steal(PyObject* object) { return Ref(object); }
  static Ref borrow(PyObject* object) {
    Py_XINCREF(object);
    return Ref(object);
  }
  Ref(const Ref& other) : object_(other.object_) { Py_XINCREF(object_); }
  Ref(Ref&& other) noexcept : object_(std::exchange(other.object_, nullptr)) {}
  Ref& operator=(Ref other) noexcept {
    std::swap(object_, other.object_);
    return *this;
  }
  ~Ref() { Py_XDECREF(object_); }

  PyObject* get() const { return object_; }
  PyObject* release() { return std::exchange(object_, nullptr); }
  explicit operator bool() const { return object_ != nullptr; }
  bool given() const { return object_ != nullptr && object_ != Py_None; }

 private:
  explicit Ref(PyObject* object) : object_(object) {}
  PyObject* object_ = nullptr;
};

// A strong reference in something that any thread may drop, after the interpreter too: then it is leaked.
class Kept {
 public:
  Kept() = default;
  Kept(Ref ref) : object_(ref.release()) {}
  Kept(Kept&& other) noexcept : object_(std::exchange(other.object_, nullptr)) {}
  Kept& operator=(Kept&& other) noexcept {
    std::swap(object_, other.object_);
    return *this;
  }
  ~Kept() {
    if (object_ == nullptr || !interpreter_lives()) { return; }
    if (PyGILState_Check()) {
      Py_DECREF(object_);
    } else {
      WithGil gil;
      if (gil.held) { Py_DECREF(object_); }
    }
  }

  PyObject* get() const { return object_; }
  explicit operator bool() const { return object_ != nullptr; }
  bool given() const { return object_ != nullptr && object_ != Py_None; }

 private:
  PyObject* object_ = nullptr;
};

// Throws with Python's error set.
[[noreturn]] void throw_python_error();

// What was made just now; throws where that failed.
inline Ref checked_ref(PyObject* made) {
  if (made == nullptr) { throw_python_error(); }
  return Ref::steal(made);
}

// A tuple of what `make` returns, a Ref, for each place.
template <typename Make>
Ref tuple_of(size_t count, Make make) {
  Ref made = checked_ref(PyTuple_New(static_cast<Py_ssize_t>(count)));
  for (size_t i = 0; i < count; ++i) {
    PyTuple_SET_ITEM(made.get(), static_cast<Py_ssize_t>(i), make(i).release());
  }
  return made;
}

inline Ref tuple_of(c10::ArrayRef<PyObject*> objects) {
  return tuple_of(objects.size(), [&](size_t i) { return Ref::borrow(objects[i]); });
}

// The same as a list.
template <typename Make>
Ref list_of(size_t count, Make make) {
  Ref made = checked_ref(PyList_New(static_cast<Py_ssize_t>(count)));
  for (size_t i = 0; i < count; ++i) {
    PyList_SET_ITEM(made.get(), static_cast<Py_ssize_t>(i), make(i).release());
  }
  return made;
}

// Calls a function with arguments by position; throws what it raises.
inline Ref called(PyObject* function, c10::ArrayRef<PyObject*> given) {
  return checked_ref(PyObject_Vectorcall(function, given.data(), given.size(), nullptr));
}

}  // namespace opkit_core

#include "arguments.h"

#include <torch/csrc/Device.h>
#include <torch/csrc/Dtype.h>
#include <torch/csrc/DynamicTypes.h>
#include <torch/csrc/Exceptions.h>

namespace torch::jit {
// Of torch/csrc/jit/python/pybind_utils.h, which takes seconds to compile.
TORCH_PYTHON_API c10::IValue toIValue(py::handle object, const c10::TypePtr& type,
                                      std::optional<int32_t> count);
TORCH_PYTHON_API py::object toPyObject(c10::IValue value);
}  // namespace torch::jit

namespace opkit_core {
namespace {

using c10::BackendComponent;
using c10::DispatchKey;
using c10::DispatchKeySet;

// What a tensor's keys may be where only autograd and its device have to do with it.
const DispatchKeySet kPlain = [] {
  DispatchKeySet found(DispatchKey::ADInplaceOrView);
  for (const auto& [key, backend] :
       {std::pair{DispatchKey::CPU, BackendComponent::CPUBit},
        std::pair{DispatchKey::CUDA, BackendComponent::CUDABit},
        std::pair{DispatchKey::XPU, BackendComponent::XPUBit},
        std::pair{DispatchKey::PrivateUse1, BackendComponent::PrivateUse1Bit}}) {
    found = found | DispatchKeySet(key) | c10::getAutogradRelatedKeySetFromBackend(backend) |
            c10::getAutocastRelatedKeySetFromBackend(backend);
  }
  return found;
}();

// What TensorImpl::autograd_meta() returns, without a call into another library for each tensor: with 14 of them that
// is a tenth of what a call takes here. The language lets an explicit instantiation name a private member.
using MetadataPlace = std::unique_ptr<c10::AutogradMetaInterface> c10::TensorImpl::*;
constexpr MetadataPlace metadata_place();
template <MetadataPlace place>
struct Metadata {
  friend constexpr MetadataPlace metadata_place() { return place; }
};
template struct Metadata<&c10::TensorImpl::autograd_meta_>;  // c10/core/TensorImpl.h

// Without it a tensor has neither a tangent nor a gradient.
bool has_autograd_meta(const at::Tensor& tensor) {
  return tensor.unsafeGetTensorImpl()->*metadata_place() != nullptr;
}

bool has_tangent(const at::Tensor& tensor) {
  return has_autograd_meta(tensor) && tensor._fw_grad(0).defined();
}

bool is_int64(PyObject* value) {
  int overflow = 0;
  PyLong_AsLongLongAndOverflow(value, &overflow);
  return overflow == 0;
}

// Whether torch, too, could carry a text; Python keeps what is found here, and most texts are ASCII.
bool is_encodable(PyObject* text) {
  if (PyUnicode_AsUTF8(text) != nullptr) { return true; }
  PyErr_Clear();
  return false;
}

bool is_kind(Kind kind, PyObject* value) {
  switch (kind) {
    case Kind::Int: return PyLong_CheckExact(value) && is_int64(value);
    case Kind::Float: return PyFloat_CheckExact(value);
    case Kind::Bool: return PyBool_Check(value);
    case Kind::Str: return PyUnicode_CheckExact(value) && is_encodable(value);
    case Kind::Dtype: return THPDtype_Check(value);
    case Kind::Device: return THPDevice_Check(value);
    default: return false;
  }
}

c10::IValue scalar(Kind kind, PyObject* value) {
  switch (kind) {
    case Kind::Int: return static_cast<int64_t>(PyLong_AsLongLong(value));
    case Kind::Float: return PyFloat_AS_DOUBLE(value);
    case Kind::Bool: return value == Py_True;
    case Kind::Dtype: return static_cast<int64_t>(dtype_of(value));
    case Kind::Device: return reinterpret_cast<THPDevice*>(value)->device;
    default: {
      Py_ssize_t size = 0;
      const char* text = PyUnicode_AsUTF8AndSize(value, &size);
      if (text == nullptr) { throw_python_error(); }
      return std::string(text, static_cast<size_t>(size));
    }
  }
}

}  // namespace

bool is_plain(const at::Tensor& tensor) {
  return kPlain.isSupersetOf(tensor.key_set()) && !has_tangent(tensor);
}

void bump(const at::Tensor& tensor) {
  if (!tensor.is_inference()) { tensor.unsafeGetTensorImpl()->bump_version(); }
}

void throw_python_error() {
  python_error error;
  error.persist();
  throw error;
}

void Arguments::expect_ints(const Record& record) {
  if (record.plan && !record.plan->ints.empty()) { ints.resize(record.params.size(), 0); }
}

// Whether a tensor is plain is asked of all of them together.
inline void Arguments::note(const at::Tensor& tensor) {
  keys = keys | tensor.key_set();
  metadata_ = metadata_ || has_autograd_meta(tensor);
}

bool Arguments::are_plain(const Record& record) {
  if (!kPlain.isSupersetOf(keys)) { return false; }
  all(record, [&](size_t, const at::Tensor& tensor) {
    first = &tensor;
    return false;
  });
  return !metadata_ || all(record, [&](size_t, const at::Tensor& tensor) {
    requires_grad = requires_grad || tensor.requires_grad();
    return !has_tangent(tensor);
  });
}

bool Arguments::are_contiguous(const Record& record) const {
  return all(record, [](size_t, const at::Tensor& tensor) { return tensor.is_contiguous(); });
}

uint64_t Arguments::numel(const Record& record) const {
  uint64_t sum = 0;
  all(record, [&](size_t, const at::Tensor& tensor) {
    sum += static_cast<uint64_t>(tensor.numel());
    return true;
  });
  return sum;
}

bool Arguments::take(const Param& param, size_t place, PyObject* value) {
  values[place] = value;
  if (param.is_tensor() && THPVariable_CheckExact(value)) {
    tensors[place] = &THPVariable_Unpack(value);
    note(*tensors[place]);
    return true;
  }
  if (value == Py_None) { return param.optional; }
  if (param.list) { return take_list(param, place, value); }
  if (param.kind != Kind::Int) { return is_kind(param.kind, value); }
  if (!PyLong_CheckExact(value)) { return false; }
  int overflow = 0;
  const int64_t found = PyLong_AsLongLongAndOverflow(value, &overflow);
  if (!ints.empty()) { ints[place] = found; }
  return overflow == 0;
}

// As the dispatcher would, gives the kernel a list of its own; or a tuple, where it expects one.
bool Arguments::take_list(const Param& param, size_t place, PyObject* value) {
  if (!PyList_CheckExact(value) && !PyTuple_CheckExact(value)) { return false; }
  if (param.length != 0 && PySequence_Fast_GET_SIZE(value) != param.length) { return false; }
  Ref own = checked_ref(param.length != 0 ? PySequence_Tuple(value) : PySequence_List(value));
  for (Py_ssize_t i = 0; i < PySequence_Fast_GET_SIZE(own.get()); ++i) {
    PyObject* one = PySequence_Fast_GET_ITEM(own.get(), i);
    if (param.kind == Kind::Tensor ? !THPVariable_CheckExact(one) : !is_kind(param.kind, one)) {
      return false;
    }
    if (param.kind == Kind::Tensor) { note(THPVariable_Unpack(one)); }
  }
  values[place] = own.get();
  owned.push_back(std::move(own));
  return true;
}

bool Arguments::bind(const Record& record, PyObject* const* args, size_t count,
                     PyObject* keywords) {
  const size_t total = record.params.size();
  if (count > record.positional) { return false; }
  values.append(args, args + count);
  values.resize(total, nullptr);
  tensors.resize_for_overwrite(total);
  size_t i = 0;
  DispatchKeySet leading;
  bool metadata = false;
  for (; i < count && record.params[i].is_tensor() && THPVariable_CheckExact(args[i]); ++i) {
    const at::Tensor& tensor = THPVariable_Unpack(args[i]);
    tensors[i] = &tensor;
    leading = leading | tensor.key_set();
    metadata |= has_autograd_meta(tensor);
  }
  keys = leading;
  metadata_ = metadata;
  std::fill(tensors.begin() + i, tensors.end(), nullptr);
  expect_ints(record);
  for (; i < count; ++i) {
    if (!take(record.params[i], i, args[i])) { return false; }
  }
  return (count == total || bind_named(record, args, count, keywords)) && are_plain(record);
}

// Takes what is given by name, and defaults.
bool Arguments::bind_named(const Record& record, PyObject* const* args, size_t count,
                           PyObject* keywords) {
  const size_t total = record.params.size();
  const size_t named = keywords == nullptr ? 0 : static_cast<size_t>(PyTuple_GET_SIZE(keywords));
  size_t at = count;  // nearly always they come in order
  for (size_t k = 0; k < named; ++k) {
    PyObject* name = PyTuple_GET_ITEM(keywords, k);
    size_t tried = 0;
    while (tried < total && (at >= total || record.params[at].name.get() != name)) {
      at = at < total ? at + 1 : 0;
      tried += at < total;
    }
    if (tried == total || values[at] != nullptr || !take(record.params[at], at, args[count + k])) {
      return false;
    }
    ++at;
  }
  for (size_t i = count; count + named < total && i < total; ++i) {
    if (values[i] == nullptr) {
      PyObject* value = record.params[i].fallback.get();
      if (value == nullptr || !take(record.params[i], i, value)) { return false; }
    }
  }
  return true;
}

bool Arguments::bind(const Record& record, c10::ArrayRef<c10::IValue> stack) {
  tensors.resize(record.params.size(), nullptr);
  expect_ints(record);
  for (size_t i = 0; i < stack.size(); ++i) {
    const c10::IValue& value = stack[i];
    if (value.isTensor()) {
      const at::Tensor& tensor = value.toTensor();
      if (tensor.defined()) {
        tensors[i] = &tensor;
        note(tensor);
      }
    } else if (value.isInt()) {
      if (!ints.empty()) { ints[i] = value.toInt(); }
    } else if (value.isSymInt()) {
      return false;
    } else if (value.isTensorList()) {
      if (lists.empty()) { lists.reserve(record.params.size()); }  // `first` may point into them
      auto& list = lists.emplace_back();
      for (const at::Tensor& tensor : value.toTensorList()) { list.push_back(tensor); }
      for (const at::Tensor& tensor : list) { note(tensor); }
    }
  }
  return are_plain(record);
}

void Arguments::wrap(const Record& record, c10::ArrayRef<c10::IValue> stack) {
  for (size_t i = 0; i < record.params.size(); ++i) {
    Ref value = from_ivalue(record.params[i], stack[i]);
    values.push_back(value.get());
    owned.push_back(std::move(value));
  }
}

c10::IValue to_ivalue(const Param& param, PyObject* value) {
  if (value == Py_None) { return {}; }
  if (!param.list) {
    return param.kind == Kind::Tensor ? c10::IValue(THPVariable_Unpack(value))
                                      : scalar(param.kind, value);
  }
  const auto size = static_cast<size_t>(PySequence_Fast_GET_SIZE(value));
  const auto fill = [&](auto list, auto convert) {
    list.reserve(size);
    for (size_t i = 0; i < size; ++i) {
      list.push_back(convert(PySequence_Fast_GET_ITEM(value, static_cast<Py_ssize_t>(i))));
    }
    return c10::IValue(std::move(list));
  };
  switch (param.kind) {
    case Kind::Tensor:
      return fill(c10::List<at::Tensor>(), [](PyObject* o) { return THPVariable_Unpack(o); });
    case Kind::Int:
      return fill(c10::List<int64_t>(), [](PyObject* o) { return int64_t(PyLong_AsLongLong(o)); });
    case Kind::Float:
      return fill(c10::List<double>(), [](PyObject* o) { return PyFloat_AS_DOUBLE(o); });
    case Kind::Bool: return fill(c10::List<bool>(), [](PyObject* o) { return o == Py_True; });
    default:
      return fill(c10::List<std::string>(),
                  [](PyObject* o) { return scalar(Kind::Str, o).toStringRef(); });
  }
}

Ref from_ivalue(const c10::IValue& value) {
  if (value.isTensor()) {
    const at::Tensor& tensor = value.toTensor();
    return tensor.defined() ? Ref::steal(THPVariable_Wrap(tensor)) : Ref::borrow(Py_None);
  }
  return Ref::steal(torch::jit::toPyObject(value).release().ptr());
}

Ref from_ivalue(const Param& param, const c10::IValue& value) {
  if (param.length != 0 && value.isList()) {
    const Ref list = from_ivalue(value);
    return checked_ref(PySequence_Tuple(list.get()));
  }
  if (param.kind != Kind::Dtype || !value.isInt()) { return from_ivalue(value); }
  const auto dtype = static_cast<c10::ScalarType>(value.toInt());
  return Ref::borrow(reinterpret_cast<PyObject*>(torch::getTHPDtype(dtype)));
}

c10::ScalarType dtype_of(PyObject* object) {
  TORCH_CHECK_TYPE(THPDtype_Check(object), "expected a dtype");
  return reinterpret_cast<THPDtype*>(object)->scalar_type;
}

c10::IValue int_result(PyObject* value) {
  if (!PyLong_Check(value)) {
    return torch::jit::toIValue(value, c10::SymIntType::get(), std::nullopt);
  }
  const int64_t found = PyLong_AsLongLong(value);
  if (found == -1 && PyErr_Occurred() != nullptr) { throw_python_error(); }
  return found;
}

}  // namespace opkit_core

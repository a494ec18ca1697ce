#include "call.h"

#include <ATen/Context.h>
#include <ATen/PythonTorchFunctionTLS.h>
#include <ATen/ThreadLocalPythonObjects.h>
#include <ATen/autocast_mode.h>
#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/record_function.h>
#include <c10/core/GradMode.h>
#include <c10/core/impl/LocalDispatchKeySet.h>
#include <torch/csrc/Exceptions.h>
#include <torch/csrc/PyInterpreter.h>

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

// A tensor without autograd's metadata has neither a tangent nor a gradient.
bool has_tangent(const at::Tensor& tensor) {
  return tensor.unsafeGetTensorImpl()->autograd_meta() != nullptr && tensor._fw_grad(0).defined();
}

bool wants_gradient(const at::Tensor& tensor) {
  return tensor.unsafeGetTensorImpl()->autograd_meta() != nullptr && tensor.requires_grad();
}

bool is_plain(const at::Tensor& tensor) {
  return kPlain.isSupersetOf(tensor.key_set()) && !has_tangent(tensor);
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
    default: return false;
  }
}

c10::IValue number(Kind kind, PyObject* value) {
  switch (kind) {
    case Kind::Int: return static_cast<int64_t>(PyLong_AsLongLong(value));
    case Kind::Float: return PyFloat_AS_DOUBLE(value);
    case Kind::Bool: return value == Py_True;
    default: {
      Py_ssize_t size = 0;
      const char* text = PyUnicode_AsUTF8AndSize(value, &size);
      if (text == nullptr) { throw_python_error(); }
      return std::string(text, static_cast<size_t>(size));
    }
  }
}

}  // namespace

DispatchKey device_key(const at::Tensor& tensor) {
  return c10::toRuntimePerBackendFunctionalityKey(DispatchKey::Dense,
                                                  tensor.key_set().highestBackendKey());
}

void throw_python_error() {
  python_error error;
  error.persist();
  throw error;
}

// ------------------------------------------------------------------ arguments

void Arguments::resize(size_t count) {
  tensors.resize(count, nullptr);
  ints.resize(count, 0);
}

bool Arguments::take(const at::Tensor& tensor) {
  if (!is_plain(tensor)) { return false; }
  requires_grad = requires_grad || wants_gradient(tensor);
  if (first == nullptr) { first = &tensor; }
  return true;
}

bool Arguments::take(const Param& param, size_t place, PyObject* value) {
  values[place] = value;
  if (param.kind == Kind::Tensor && !param.list &&
      THPVariable_CheckExact(value)) {  // nearly always
    tensors[place] = &THPVariable_Unpack(value);
    return take(*tensors[place]);
  }
  if (value == Py_None) { return param.optional; }
  if (!param.list) {
    if (param.kind == Kind::Int && PyLong_CheckExact(value)) {
      int overflow = 0;
      ints[place] = PyLong_AsLongLongAndOverflow(value, &overflow);
      return overflow == 0;
    }
    return is_kind(param.kind, value);
  }
  // As the dispatcher would, a kernel gets a list of its own.
  if (!PyList_CheckExact(value) && !PyTuple_CheckExact(value)) { return false; }
  Ref own = Ref::steal(PySequence_List(value));
  if (!own) { throw_python_error(); }
  for (Py_ssize_t i = 0; i < PyList_GET_SIZE(own.get()); ++i) {
    PyObject* one = PyList_GET_ITEM(own.get(), i);
    if (param.kind == Kind::Tensor ? !THPVariable_CheckExact(one) || !take(THPVariable_Unpack(one))
                                   : !is_kind(param.kind, one)) {
      return false;
    }
  }
  values[place] = own.get();
  owned.push_back(std::move(own));
  return true;
}

bool Arguments::bind(const Record& record, PyObject* const* args, size_t count,
                     PyObject* keywords) {
  const size_t total = record.params.size();
  if (count > record.positional) { return false; }
  resize(total);
  values.resize(total, nullptr);
  for (size_t i = 0; i < count; ++i) {
    if (!take(record.params[i], i, args[i])) { return false; }
  }
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
  if (count + named == total) { return in_order(record); }
  for (size_t i = count; i < total; ++i) {
    if (values[i] == nullptr) {
      PyObject* value = record.params[i].fallback.get();
      if (value == nullptr || !take(record.params[i], i, value)) { return false; }
    }
  }
  return in_order(record);
}

// The first tensor is the first in the op's order, whatever the order of the call.
bool Arguments::in_order(const Record& record) {
  for (size_t i = 0; i < record.params.size(); ++i) {
    if (tensors[i] != nullptr) {
      first = tensors[i];
      break;
    }
    if (record.params[i].list && record.params[i].kind == Kind::Tensor && values[i] != Py_None &&
        PyList_GET_SIZE(values[i]) != 0) {
      first = &THPVariable_Unpack(PyList_GET_ITEM(values[i], 0));
      break;
    }
  }
  return true;
}

bool Arguments::bind(const Record& record, c10::ArrayRef<c10::IValue> stack) {
  resize(record.params.size());
  for (size_t i = 0; i < stack.size(); ++i) {
    const c10::IValue& value = stack[i];
    if (value.isTensor()) {
      const at::Tensor& tensor = value.toTensor();
      if (tensor.defined()) {
        tensors[i] = &tensor;
        if (!take(tensor)) { return false; }
      }
    } else if (value.isInt()) {
      ints[i] = value.toInt();
    } else if (value.isSymInt()) {
      return false;
    } else if (value.isTensorList()) {
      if (lists.empty()) { lists.reserve(record.params.size()); }  // `first` may point into them
      auto& list = lists.emplace_back();
      for (const at::Tensor& tensor : value.toTensorList()) { list.push_back(tensor); }
      for (const at::Tensor& tensor : list) {
        if (!take(tensor)) { return false; }
      }
    }
  }
  return true;
}

void Arguments::wrap(const Record& record, c10::ArrayRef<c10::IValue> stack) {
  for (size_t i = 0; i < record.params.size(); ++i) {
    Ref value = from_ivalue(stack[i]);
    values.push_back(value.get());
    owned.push_back(std::move(value));
  }
}

Ref Arguments::tuple() const {
  PyObject* made = PyTuple_New(static_cast<Py_ssize_t>(values.size()));
  if (made == nullptr) { throw_python_error(); }
  for (size_t i = 0; i < values.size(); ++i) {
    Py_INCREF(values[i]);
    PyTuple_SET_ITEM(made, static_cast<Py_ssize_t>(i), values[i]);
  }
  return Ref::steal(made);
}

c10::IValue to_ivalue(const Param& param, PyObject* value) {
  if (value == Py_None) { return {}; }
  if (!param.list) {
    return param.kind == Kind::Tensor ? c10::IValue(THPVariable_Unpack(value))
                                      : number(param.kind, value);
  }
  const auto size = static_cast<size_t>(PyList_GET_SIZE(value));
  const auto fill = [&](auto list, auto convert) {
    list.reserve(size);
    for (size_t i = 0; i < size; ++i) {
      list.push_back(convert(PyList_GET_ITEM(value, static_cast<Py_ssize_t>(i))));
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
                  [](PyObject* o) { return number(Kind::Str, o).toStringRef(); });
  }
}

Ref from_ivalue(const c10::IValue& value) {
  if (value.isTensor()) {
    const at::Tensor& tensor = value.toTensor();
    return tensor.defined() ? Ref::steal(THPVariable_Wrap(tensor)) : Ref::borrow(Py_None);
  }
  return Ref::steal(torch::jit::toPyObject(value).release().ptr());
}

c10::IValue int_result(PyObject* value) {
  if (!PyLong_Check(value)) {
    return torch::jit::toIValue(value, c10::SymIntType::get(), std::nullopt);
  }
  const int64_t found = PyLong_AsLongLong(value);
  if (found == -1 && PyErr_Occurred() != nullptr) { throw_python_error(); }
  return found;
}

// ------------------------------------------------------------------ what is in force

namespace {

// The key of tensors with named dimensions, which only torch 2.11 has; its engine excludes it in backward.
template <typename Key, typename = void>
constexpr DispatchKeySet kNamed{};
template <typename Key>
constexpr DispatchKeySet kNamed<Key, std::void_t<decltype(Key::Named)>> =
    DispatchKeySet(Key::Named);

}  // namespace

State State::now() {
  const auto local = c10::impl::tls_local_dispatch_key_set();
  constexpr DispatchKeySet autograd =
      c10::autograd_dispatch_keyset | DispatchKeySet(DispatchKey::ADInplaceOrView);
  constexpr DispatchKeySet handled = autograd | c10::autocast_dispatch_keyset | kNamed<DispatchKey>;
  State state;
  state.below_autograd = local.excluded_.has_any(c10::autograd_dispatch_keyset);
  state.autocast = !local.excluded_.isSupersetOf(c10::autocast_dispatch_keyset);
  state.ordinary = c10::default_included_set.isSupersetOf(local.included_) &&
                   (local.excluded_ | handled) == (c10::default_excluded_set | handled);
  return state;
}

bool is_observed() {
  // at::hasCallbacks() takes a lock and copies what it counts.
  return at::impl::torch_function_mode_enabled() ||
         at::getStepCallbacksUnlessEmpty(at::RecordScope::FUNCTION).has_value();
}

bool has_preference() {
  if (at::globalContext().deterministicAlgorithms()) { return true; }
  static const std::string key = "opkit";
  if (!preferences.load(std::memory_order_relaxed) ||
      !at::impl::ThreadLocalPythonObjects::contains(key)) {
    return false;
  }
  const auto& stashed = at::impl::ThreadLocalPythonObjects::get(key);
  return stashed != nullptr && stashed->ptr(getPyInterpreter()) != Py_None;
}

bool is_overridden(const Record& record, const at::Tensor& first) {
  const auto backend = first.key_set().highestBackendKey();
  return record.op.hasKernelForDispatchKey(
             c10::toRuntimePerBackendFunctionalityKey(DispatchKey::Dense, backend)) ||
         record.op.hasKernelForDispatchKey(
             c10::toRuntimePerBackendFunctionalityKey(DispatchKey::AutogradFunctionality, backend));
}

// ------------------------------------------------------------------ choice

std::shared_ptr<const Kernel> select(Record& record, const Arguments& arguments) {
  const bool special = has_preference();
  if (!special) {
    if (auto kernel =
            record.known(arguments.first->device().type(), arguments.first->scalar_type(), true)) {
      return kernel;
    }
  }
  const uint64_t before = epoch.load();
  const Ref values = arguments.tuple();
  const Ref answer = Ref::steal(PyObject_CallOneArg(record.choose.get(), values.get()));
  if (!answer) { throw_python_error(); }
  PyObject *owner, *function, *keeps;
  int how = 0, lasting = 0;
  if (!PyArg_ParseTuple(answer.get(), "OiOOp", &owner, &how, &function, &keeps, &lasting)) {
    throw_python_error();
  }
  auto kernel = std::make_shared<Kernel>();
  kernel->how = static_cast<Kernel::How>(how);
  kernel->owner = Ref::borrow(owner);
  kernel->keeps = Ref::borrow(keeps);
  if (kernel->how == Kernel::Native) {
    const char* name = PyUnicode_AsUTF8(function);
    if (name == nullptr) { throw_python_error(); }
    kernel->handle = c10::Dispatcher::singleton().findSchemaOrThrow(name, "");
  } else {
    kernel->function = Ref::borrow(function);
  }
  if (lasting && !special) {
    record.remember({arguments.first->device().type(), arguments.first->scalar_type(), kernel},
                    before);
  }
  return kernel;
}

// ------------------------------------------------------------------ results

namespace {

struct Found {
  c10::SmallVector<PyObject*, 4> values;
  bool whole = false;  // they are in the form that the caller gets already
};

// Whether one of the results is the tensor that is declared, in storage of its own.
bool fits(const Arguments& arguments, const OutputMeta* meta, const at::Tensor& tensor,
          c10::ArrayRef<const at::Tensor*> before) {
  if (!is_plain(tensor) || tensor.requires_grad() || !tensor.has_storage()) { return false; }
  if (meta != nullptr &&
      (tensor.sizes() != c10::IntArrayRef(meta->shape) || tensor.scalar_type() != meta->dtype ||
       tensor.device() != arguments.first->device() || !tensor.is_contiguous())) {
    return false;
  }
  if (tensor.storage().use_count() == 1) { return true; }  // nearly always: it is nobody else's
  const auto* storage = tensor.storage().unsafeGetStorageImpl();
  const auto shares = [&](const at::Tensor* other) {
    return other != nullptr && other->has_storage() &&
           other->storage().unsafeGetStorageImpl() == storage;
  };
  return std::none_of(arguments.tensors.begin(), arguments.tensors.end(), shares) &&
         std::none_of(before.begin(), before.end(), shares);
}

// Whether what a kernel returned is what is declared, as far as that can be seen here.
bool conforms(const Record& record, const Arguments& arguments, c10::ArrayRef<OutputMeta> metas,
              PyObject* returned, Found& found) {
  const size_t count = record.results.size();
  if (count == 0) {
    found.whole = true;
    return returned == Py_None;
  }
  if (!record.plain_results || (record.tensor_lists && !arguments.owned.empty())) { return false; }
  if (!record.container.given()) {
    found.values.push_back(returned);
    found.whole = true;
  } else if (record.is_tuple && PyTuple_Check(returned) &&
             static_cast<size_t>(PyTuple_GET_SIZE(returned)) == count) {
    for (size_t i = 0; i < count; ++i) {
      found.values.push_back(PyTuple_GET_ITEM(returned, static_cast<Py_ssize_t>(i)));
    }
    found.whole = reinterpret_cast<PyObject*>(Py_TYPE(returned)) == record.container.get();
  } else {
    return false;
  }
  c10::SmallVector<const at::Tensor*, 4> before;
  for (size_t i = 0; i < count; ++i) {
    PyObject* one = found.values[i];
    if (!THPVariable_CheckExact(one) ||
        std::count(arguments.values.begin(), arguments.values.end(), one) != 0 ||
        std::count(found.values.begin(), found.values.end(), one) != 1) {
      return false;
    }
    const at::Tensor& tensor = THPVariable_Unpack(found.values[i]);
    if (!fits(arguments, metas.empty() ? nullptr : &metas[i], tensor, before)) { return false; }
    before.push_back(&tensor);
  }
  return true;
}

// Puts results into the container that is declared.
Ref packed(const Record& record, c10::ArrayRef<PyObject*> values) {
  auto* type = reinterpret_cast<PyTypeObject*>(record.container.get());
  PyObject* made = type == &PyTuple_Type
                       ? PyTuple_New(static_cast<Py_ssize_t>(values.size()))
                       : type->tp_alloc(type, static_cast<Py_ssize_t>(values.size()));
  if (made == nullptr) { throw_python_error(); }
  for (size_t i = 0; i < values.size(); ++i) {
    Py_INCREF(values[i]);
    PyTuple_SET_ITEM(made, static_cast<Py_ssize_t>(i), values[i]);
  }
#if PY_VERSION_HEX >= 0x030E0000
  reinterpret_cast<PyTupleObject*>(made)->ob_hash = -1;  // not computed yet, as PyTuple_New has it
#endif
  return Ref::steal(made);
}

Returned finished(const Record& record, Ref raw) {
  if (!record.container.given() || record.results.empty()) { return {raw, raw}; }
  if (record.is_tuple && record.results.size() > 1) {
    Ref whole = reinterpret_cast<PyObject*>(Py_TYPE(raw.get())) == record.container.get()
                    ? raw
                    : packed(record, flat_results(record, raw.get()));
    return {std::move(raw), std::move(whole)};
  }
  Ref whole = Ref::steal(PyObject_CallOneArg(record.pack.get(), raw.get()));
  if (!whole) { throw_python_error(); }
  return {std::move(raw), std::move(whole)};
}

Ref call_function(const Record& record, PyObject* function, const Arguments& arguments) {
  PyObject* names = record.keywords.given() ? record.keywords.get() : nullptr;
  Ref returned =
      Ref::steal(PyObject_Vectorcall(function, arguments.values.data(), record.positional, names));
  if (!returned) { throw_python_error(); }
  return returned;
}

Returned run_in_python(Record& record, const Arguments& arguments) {
  Ref raw = Ref::steal(PyObject_Vectorcall(record.run.get(), arguments.values.data(),
                                           arguments.values.size(), nullptr));
  if (!raw) { throw_python_error(); }
  return finished(record, std::move(raw));
}

// Whether an argument that the op writes into shares its storage with another one.
bool may_overlap(const Record& record, const Arguments& arguments) {
  if (record.tensor_lists) { return true; }
  for (size_t i = 0; i < record.params.size(); ++i) {
    const at::Tensor* written = arguments.tensors[i];
    if (!record.params[i].mutated || written == nullptr) { continue; }
    for (size_t j = 0; j < record.params.size(); ++j) {
      const at::Tensor* other = arguments.tensors[j];
      if (j != i && other != nullptr &&
          other->storage().unsafeGetStorageImpl() == written->storage().unsafeGetStorageImpl()) {
        return true;
      }
    }
  }
  return false;
}

Returned run_function(Record& record, const Kernel& kernel, Arguments& arguments) {
  c10::SmallVector<OutputMeta, 4> metas;
  if (record.mutates && may_overlap(record, arguments)) {
    return run_in_python(record, arguments);  // which takes them apart
  }
  if (record.plan && !record.plan->fits(arguments.tensors, arguments.ints, metas)) {
    return run_in_python(record, arguments);  // which says what does not fit
  }
  Ref returned = call_function(record, kernel.function.get(), arguments);
  Found found;
  if (conforms(record, arguments, metas, returned.get(), found)) {
    if (found.whole) { return {returned, returned}; }
    Ref whole = packed(record, found.values);
    return {returned, std::move(whole)};
  }
  PyErr_Clear();
  const Ref values = arguments.tuple();
  PyObject* given[] = {kernel.owner.get(), values.get(), returned.get()};
  Ref raw = Ref::steal(PyObject_Vectorcall(record.conform.get(), given, 3, nullptr));
  if (!raw) { throw_python_error(); }
  return finished(record, std::move(raw));
}

Returned run_library(Record& record, const Kernel& kernel, Arguments& arguments) {
  if (record.mutates && may_overlap(record, arguments)) { return run_in_python(record, arguments); }
  torch::jit::Stack stack;
  stack.reserve(record.params.size() + record.results.size());
  for (size_t i = 0; i < record.params.size(); ++i) {
    stack.push_back(to_ivalue(record.params[i], arguments.values[i]));
  }
  try {
    torch::PyWarningHandler warnings;
    try {
      WithoutGil released;
      run_native(kernel, device_key(*arguments.first), stack);
    } catch (...) {
      warnings.set_in_exception();
      throw;
    }
  } catch (const std::exception&) {
    torch::translate_exception_to_python(std::current_exception());
    const Ref values = arguments.tuple();
    PyObject *type, *value, *trace;
    PyErr_Fetch(&type, &value, &trace);
    PyObject* given[] = {kernel.owner.get(), values.get()};
    const Ref silent = Ref::steal(PyObject_Vectorcall(record.explain.get(), given, 2, nullptr));
    if (silent) {
      PyErr_Restore(type, value, trace);
    } else {
      Py_XDECREF(type);
      Py_XDECREF(value);
      Py_XDECREF(trace);
    }
    throw_python_error();
  }
  if (stack.empty()) { return {Ref::borrow(Py_None), Ref::borrow(Py_None)}; }
  if (stack.size() == 1) { return finished(record, from_ivalue(stack[0])); }
  c10::SmallVector<Ref, 4> owned;
  c10::SmallVector<PyObject*, 4> values;
  for (const c10::IValue& value : stack) {
    owned.push_back(from_ivalue(value));
    values.push_back(owned.back().get());
  }
  if (record.is_tuple) {
    Ref whole = packed(record, values);
    return {whole, whole};
  }
  Ref raw = Ref::steal(PyTuple_New(static_cast<Py_ssize_t>(values.size())));
  for (size_t i = 0; i < values.size(); ++i) {
    PyTuple_SET_ITEM(raw.get(), static_cast<Py_ssize_t>(i), owned[i].release());
  }
  return finished(record, std::move(raw));
}

}  // namespace

c10::SmallVector<PyObject*, 4> flat_results(const Record& record, PyObject* raw) {
  c10::SmallVector<PyObject*, 4> values;
  if (record.results.size() == 1) {
    values.push_back(raw);
  } else if (!record.results.empty()) {
    TORCH_CHECK(
        PyTuple_Check(raw) && static_cast<size_t>(PyTuple_GET_SIZE(raw)) == record.results.size(),
        record.name, ": its kernel returned another number of results than declared");
    for (size_t i = 0; i < record.results.size(); ++i) {
      values.push_back(PyTuple_GET_ITEM(raw, static_cast<Py_ssize_t>(i)));
    }
  }
  return values;
}

void run_native(const Kernel& kernel, DispatchKey key, torch::jit::Stack& stack) {
  kernel.handle->redispatchBoxed(DispatchKeySet(key), &stack);
}

namespace {

// Turns autocast off on a device: kernels compute in the dtypes that are declared.
class WithoutAutocast {
 public:
  explicit WithoutAutocast(c10::DeviceType device)
      : device_(device), before_(at::autocast::is_autocast_enabled(device)) {
    if (before_) { at::autocast::set_autocast_enabled(device_, false); }
  }
  ~WithoutAutocast() {
    if (before_) { at::autocast::set_autocast_enabled(device_, true); }
  }
  WithoutAutocast(const WithoutAutocast&) = delete;
  WithoutAutocast& operator=(const WithoutAutocast&) = delete;

 private:
  c10::DeviceType device_;
  bool before_;
};

}  // namespace

Returned run(Record& record, const Kernel& kernel, Arguments& arguments) {
  at::AutoDispatchBelowAutograd below;
  const WithoutAutocast off(arguments.first->device().type());
  switch (kernel.how) {
    case Kernel::Python: return run_function(record, kernel, arguments);
    case Kernel::Native: return run_library(record, kernel, arguments);
    default: return run_in_python(record, arguments);
  }
}

// ------------------------------------------------------------------ records

std::atomic<uint64_t> epoch{1};
std::atomic<bool> preferences{false};

std::shared_ptr<const Formula> Record::formula() const {
  const std::lock_guard<std::mutex> lock(mutex_);
  return formula_;
}

void Record::set_formula(std::shared_ptr<const Formula> formula) {
  const std::lock_guard<std::mutex> lock(mutex_);
  formula_.swap(formula);
}

std::shared_ptr<const Kernel> Record::known(c10::DeviceType device, c10::ScalarType dtype,
                                            bool with_gil) const {
  std::unique_lock<std::mutex> lock(mutex_, std::defer_lock);
  if (!with_gil) { lock.lock(); }
  if (epoch_ == epoch.load(std::memory_order_acquire)) {
    for (const Choice& choice : choices_) {
      if (choice.device == device && choice.dtype == dtype) { return choice.kernel; }
    }
  }
  return nullptr;
}

void Record::remember(Choice choice, uint64_t epoch) {
  std::vector<Choice> dropped;  // outside of the lock, as Python objects go with them
  const std::lock_guard<std::mutex> lock(mutex_);
  if (epoch_ != epoch) {
    dropped.swap(choices_);
    epoch_ = epoch;
  }
  choices_.push_back(std::move(choice));
}

}  // namespace opkit_core

#include "call.h"

#include "expected.h"

#include <ATen/Context.h>
#include <ATen/autocast_mode.h>
#include <ATen/core/LegacyTypeDispatch.h>
#include <torch/csrc/Exceptions.h>

namespace opkit_core {

uint8_t bucket_of(const Record& record, const Arguments& arguments) {
  uint8_t bucket = 1;
  for (uint64_t rest = arguments.numel(record); rest != 0; rest >>= 1) { ++bucket; }
  return bucket;
}

Chosen select(Record& record, const Arguments& arguments) {
  Case when{arguments.first->device().type(), arguments.first->scalar_type(),
            at::globalContext().deterministicAlgorithms(), 0, preference()};
  if (const Kernel* kernel = record.known(when)) { return Chosen(kernel); }
  if (record.measured) {
    when.bucket = bucket_of(record, arguments);
    if (const Kernel* kernel = record.known(when)) { return Chosen(kernel); }
  }
  const uint64_t before = epoch.load();
  const Ref values = arguments.tuple();
  const Ref answer = called(record.choose.get(), {values.get()});
  PyObject *owner, *function, *keeps;
  int how = 0, lasting = 0, measured = 0;
  if (!PyArg_ParseTuple(answer.get(), "OiOOpp", &owner, &how, &function, &keeps, &lasting,
                        &measured)) {
    throw_python_error();
  }
  record.measured = measured != 0;
  when.bucket = measured != 0 ? bucket_of(record, arguments) : 0;
  auto kernel = std::make_shared<Kernel>();
  kernel->how = static_cast<Kernel::How>(how);
  kernel->owner = Ref::borrow(owner);
  kernel->keeps = Ref::borrow(keeps);
  const bool library = kernel->how == Kernel::Native || kernel->how == Kernel::Filled;
  if (kernel->how == Kernel::Asked || kernel->how == Kernel::Filled) {
    kernel->expected = std::make_shared<Expected>();
  }
  if (library) {
    const char* name = PyUnicode_AsUTF8(function);
    if (name == nullptr) { throw_python_error(); }
    kernel->handle = c10::Dispatcher::singleton().findSchemaOrThrow(name, "");
  } else {
    kernel->function = Ref::borrow(function);
  }
  if (lasting || arguments.observed) {
    const Ref backend = Ref::steal(PyObject_GetAttrString(owner, "backend"));
    const char* name = backend ? PyUnicode_AsUTF8(backend.get()) : nullptr;
    if (name == nullptr) { throw_python_error(); }
    kernel->label = record.name + "@" + name;
  }
  if (lasting) { record.remember(when, kernel, before); }
  return Chosen(std::move(kernel));
}

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
       tensor.device() != arguments.first->device() ||
       !(meta->strides ? tensor.strides() == c10::IntArrayRef(*meta->strides)
                       : tensor.is_contiguous()))) {
    return false;
  }
  if (tensor.storage().use_count() == 1) { return true; }  // nearly always: it is nobody else's
  if (!arguments.owned.empty()) { return false; }          // Python looks into lists
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
  if (!record.plain_results) { return false; }
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
  const auto is_known = [&](PyObject* one) {  // an argument, perhaps in a list, or another result
    return !arguments.owned.empty() ||
           std::count(arguments.values.begin(), arguments.values.end(), one) != 0 ||
           std::count(found.values.begin(), found.values.end(), one) != 1;
  };
  c10::SmallVector<const at::Tensor*, 4> before;
  for (size_t i = 0; i < count; ++i) {
    PyObject* one = found.values[i];
    if (!THPVariable_CheckExact(one) || (Py_REFCNT(one) != 1 && is_known(one))) { return false; }
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
  Ref whole = called(record.pack.get(), {raw.get()});
  return {std::move(raw), std::move(whole)};
}

Ref call_function(const Record& record, PyObject* function, const Arguments& arguments) {
  PyObject* names = record.keywords.given() ? record.keywords.get() : nullptr;
  return checked_ref(
      PyObject_Vectorcall(function, arguments.values.data(), record.positional, names));
}

Returned run_in_python(Record& record, const Arguments& arguments) {
  return finished(record, called(record.run.get(), arguments.values));
}

// The same for an op without lists, of which most have few arguments.
bool one_may_overlap(const Record& record, const Arguments& arguments) {
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

// Whether an argument that the op writes into shares its storage with another one.
bool may_overlap(const Record& record, const Arguments& arguments) {
  if (!record.tensor_lists) { return one_may_overlap(record, arguments); }
  using Place = std::pair<const c10::StorageImpl*, bool>;  // and whether it is written into
  c10::SmallVector<Place, 64> places;
  arguments.all(record, [&](size_t i, const at::Tensor& tensor) {
    places.emplace_back(tensor.storage().unsafeGetStorageImpl(), record.params[i].mutated);
    return true;
  });
  std::sort(places.begin(), places.end());
  return std::adjacent_find(places.begin(), places.end(), [](const Place& one, const Place& other) {
           return one.first == other.first && (one.second || other.second);
         }) != places.end();
}

Returned run_function(Record& record, const Kernel& kernel, Arguments& arguments) {
  c10::SmallVector<OutputMeta, 4> derived;
  if (record.mutates && may_overlap(record, arguments)) {
    return run_in_python(record, arguments);  // which takes them apart
  }
  Expected::Metas said;
  if (kernel.expected) {
    said = kernel.expected->of(record, arguments);
  } else if (record.plan &&
             !record.plan->fits(arguments.tensors, arguments.keys, arguments.ints, derived)) {
    return run_in_python(record, arguments);  // which says what does not fit
  }
  const auto called_now = [&] {
    const Range range(kernel, arguments.observed);
    return call_function(record, kernel.function.get(), arguments);
  };
  Ref returned = called_now();
  Found found;
  const bool open = kernel.expected && !said;  // only Python can compare them
  const c10::ArrayRef<OutputMeta> metas = said ? *said : c10::ArrayRef<OutputMeta>(derived);
  if (!open && conforms(record, arguments, metas, returned.get(), found)) {
    Ref whole = found.whole ? returned : packed(record, found.values);
    Ref raw = found.values.size() == 1 ? Ref::borrow(found.values[0]) : returned;
    return {std::move(raw), std::move(whole)};
  }
  PyErr_Clear();
  const Ref values = arguments.tuple();
  return finished(record,
                  called(record.conform.get(), {kernel.owner.get(), values.get(), returned.get()}));
}

at::Tensor new_result(const OutputMeta& meta, const at::Tensor& like) {
  const auto options = at::TensorOptions().dtype(meta.dtype).device(like.device());
  return meta.strides ? at::empty_strided(meta.shape, *meta.strides, options)
                      : at::empty(meta.shape, options);
}

Returned run_library(Record& record, const Kernel& kernel, Arguments& arguments) {
  if (record.mutates && may_overlap(record, arguments)) { return run_in_python(record, arguments); }
  Expected::Metas said;
  if (kernel.expected) {
    said = kernel.expected->of(record, arguments);
    if (!said) { return run_in_python(record, arguments); }  // only Python can make them
  }
  torch::jit::Stack stack, made;
  stack.reserve(record.params.size() + record.results.size());
  for (size_t i = 0; i < record.params.size(); ++i) {
    stack.push_back(to_ivalue(record.params[i], arguments.values[i]));
  }
  if (said) {
    for (const OutputMeta& meta : *said) { made.emplace_back(new_result(meta, *arguments.first)); }
    stack.insert(stack.end(), made.begin(), made.end());
  }
  try {
    torch::PyWarningHandler warnings;
    try {
      const Range range(kernel, arguments.observed);
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
  if (said) { stack = std::move(made); }
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
  return finished(record, tuple_of(values));
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

c10::DispatchKey device_key(const at::Tensor& tensor) {
  return c10::toRuntimePerBackendFunctionalityKey(c10::DispatchKey::Dense,
                                                  tensor.key_set().highestBackendKey());
}

void run_native(const Kernel& kernel, c10::DispatchKey key, torch::jit::Stack& stack) {
  kernel.handle->redispatchBoxed(c10::DispatchKeySet(key), &stack);
}

namespace {

// Turns autocast off on a device: kernels compute in the dtypes that are declared.
class WithoutAutocast {
 public:
  explicit WithoutAutocast(c10::DeviceType device)
      : device_(device), before_(may_be_on() && at::autocast::is_autocast_enabled(device)) {
    if (before_) { at::autocast::set_autocast_enabled(device_, false); }
  }
  ~WithoutAutocast() {
    if (before_) { at::autocast::set_autocast_enabled(device_, true); }
  }
  WithoutAutocast(const WithoutAutocast&) = delete;
  WithoutAutocast& operator=(const WithoutAutocast&) = delete;

 private:
  // Nearly always it is off on all devices.
  static bool may_be_on() {
    const auto local = c10::impl::tls_local_dispatch_key_set();
    return !local.excluded_.isSupersetOf(c10::autocast_dispatch_keyset);
  }

  c10::DeviceType device_;
  bool before_;
};

}  // namespace

Returned run(Record& record, const Kernel& kernel, Arguments& arguments) {
  at::AutoDispatchBelowAutograd below;
  const WithoutAutocast off(arguments.first->device().type());
  if (record.contiguous && !arguments.are_contiguous(record)) {
    return run_in_python(record, arguments);
  }
  switch (kernel.how) {
    case Kernel::Python:
    case Kernel::Asked: return run_function(record, kernel, arguments);
    case Kernel::Native:
    case Kernel::Filled: return run_library(record, kernel, arguments);
    default: return run_in_python(record, arguments);
  }
}

}  // namespace opkit_core

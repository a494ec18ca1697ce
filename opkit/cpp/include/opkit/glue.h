// Between torch's C shim and a light kernel. Only generated code includes it, after the kernel.
//
// The prototypes are those of torch/csrc/inductor/aoti_torch/c/shim.h and torch/csrc/stable/c/shim.h,
// and the layout of a stack value is that of torch/csrc/stable/stableivalue_conversions.h, both of the
// stable ABI of torch 2.10. tests/cpp/test_light.py compiles them beside torch's own headers.
#pragma once

#include <opkit/kernel.h>

extern "C" {
typedef struct AtenTensorOpaque* AtenTensorHandle;
struct StableListOpaque;
typedef struct StableListOpaque* StableListHandle;
struct StringOpaque;
typedef struct StringOpaque* StringHandle;

int32_t aoti_torch_delete_tensor_object(AtenTensorHandle tensor);
int32_t aoti_torch_get_dim(AtenTensorHandle tensor, int64_t* dim);
int32_t aoti_torch_get_sizes(AtenTensorHandle tensor, int64_t** sizes);
int32_t aoti_torch_get_strides(AtenTensorHandle tensor, int64_t** strides);
int32_t aoti_torch_get_dtype(AtenTensorHandle tensor, int32_t* dtype);
int32_t aoti_torch_get_device_type(AtenTensorHandle tensor, int32_t* device_type);
int32_t aoti_torch_get_device_index(AtenTensorHandle tensor, int32_t* device_index);
int32_t aoti_torch_get_storage_size(AtenTensorHandle tensor, int64_t* bytes);
int32_t torch_get_const_data_ptr(AtenTensorHandle tensor, const void** data);
int32_t torch_get_mutable_data_ptr(AtenTensorHandle tensor, void** data);
int32_t aoti_torch_empty_strided(int64_t dim, const int64_t* sizes, const int64_t* strides,
                                 int32_t dtype, int32_t device_type, int32_t device_index,
                                 AtenTensorHandle* tensor);
int32_t aoti_torch__reinterpret_tensor(AtenTensorHandle tensor, int64_t dim, const int64_t* sizes,
                                       const int64_t* strides, int64_t offset,
                                       AtenTensorHandle* view);
int32_t aoti_torch_copy_(AtenTensorHandle tensor, AtenTensorHandle source, int32_t non_blocking);
int32_t torch_new_list_reserve_size(size_t size, StableListHandle* list);
int32_t torch_list_push_back(StableListHandle list, uint64_t element);
int32_t torch_list_size(StableListHandle list, size_t* size);
int32_t torch_list_get_item(StableListHandle list, size_t index, uint64_t* item);
int32_t torch_delete_list(StableListHandle list);
int32_t torch_string_length(StringHandle string, size_t* length);
int32_t torch_string_c_str(StringHandle string, const char** data);
int32_t torch_delete_string(StringHandle string);
#if defined(__linux__)
int madvise(void* address, size_t length, int advice) noexcept;  // sys/mman.h
#endif
#if defined(__CUDACC__)
struct CUDAGuardOpaque;
typedef struct CUDAGuardOpaque* CUDAGuardHandle;
int32_t aoti_torch_create_cuda_guard(int32_t device_index, CUDAGuardHandle* guard);
int32_t aoti_torch_delete_cuda_guard(CUDAGuardHandle guard);
#endif
}

namespace opkit {
namespace glue {

[[noreturn]] OPKIT_COLD void refused(const char* what, const char* name);
inline void ok(int32_t status, const char* what, const char* name) {
  if (status) refused(what, name);
}

template <class T>
T decode(uint64_t value) {  // scalars lie in the low bytes of a stack value
  T result;
  __builtin_memcpy(&result, &value, sizeof(T));
  return result;
}
template <>
inline Device decode<Device>(uint64_t value) {
  return {static_cast<int32_t>(value >> 32), static_cast<int32_t>(value & 0xffffffffu)};
}

// An optional on the stack is null or a heap cell that the callee frees.
bool take_optional(uint64_t& value);

// A tensor argument: owns the handle, so that every way out of the call gives it back.
class TensorArg {
 public:
  TensorArg() = default;
  TensorArg(uint64_t value, const char* name, bool optional, bool is_mutable)
      : name_(name), mutable_(is_mutable) {
    if (!optional || take_optional(value)) handle_ = decode<AtenTensorHandle>(value);
  }
  TensorArg(const TensorArg&) = delete;
  TensorArg& operator=(const TensorArg&) = delete;
  ~TensorArg() {
    if (handle_) aoti_torch_delete_tensor_object(handle_);
  }
  AtenTensorHandle* slot() { return &handle_; }
  void set_name(const char* name, bool is_mutable) {
    name_ = name;
    mutable_ = is_mutable;
  }
  void swap(TensorArg& other) {
    const AtenTensorHandle handle = handle_;
    handle_ = other.handle_;
    other.handle_ = handle;
  }
  uint64_t release() {
    uint64_t value = 0;
    __builtin_memcpy(&value, &handle_, sizeof(handle_));
    handle_ = nullptr;
    return value;
  }
  // `found` is where the kernel leaves the sizes of data-dependent dimensions.
  Tensor open(int64_t* found = nullptr) const;

 private:
  AtenTensorHandle handle_ = nullptr;
  const char* name_ = "?";
  bool mutable_ = false;
};

// A list argument; `T` is the type on the stack. Owns the list and, for tensors, its elements.
class ListArg {
 public:
  ListArg(uint64_t value, const char* name, bool optional) : name_(name) {
    if (!optional || take_optional(value)) list_ = decode<StableListHandle>(value);
  }
  ListArg(const ListArg&) = delete;
  ListArg& operator=(const ListArg&) = delete;
  ~ListArg() {
    if (list_) torch_delete_list(list_);
  }
  bool has() const { return list_ != nullptr; }
  int64_t size() const {
    size_t n = 0;
    if (list_) ok(torch_list_size(list_, &n), "length", name_);
    return static_cast<int64_t>(n);
  }
  uint64_t item(int64_t i) const {
    uint64_t value = 0;
    ok(torch_list_get_item(list_, static_cast<size_t>(i), &value), "elements", name_);
    return value;
  }
  const char* name() const { return name_; }

 private:
  StableListHandle list_ = nullptr;
  const char* name_;
};

template <class T>
class Array {
 public:
  explicit Array(int64_t size) : data_(new T[static_cast<size_t>(size)]()), size_(size) {}
  Array(const Array&) = delete;
  Array& operator=(const Array&) = delete;
  ~Array() { delete[] data_; }
  T& operator[](int64_t i) { return data_[i]; }
  Span<T> span() const { return Span<T>(data_, size_); }

 private:
  T* data_;
  int64_t size_;
};

template <class T>
class ScalarList {
 public:
  explicit ScalarList(const ListArg& list) : values_(list.size()), has_(list.has()) {
    for (int64_t i = 0; i < list.size(); ++i) values_[i] = decode<T>(list.item(i));
  }
  operator Span<T>() const { return values_.span(); }
  operator Optional<Span<T>>() const {
    return has_ ? Optional<Span<T>>(values_.span()) : Optional<Span<T>>();
  }

 private:
  Array<T> values_;
  bool has_;
};

class TensorList {
 public:
  TensorList(const ListArg& list, bool optional_elements, bool is_mutable)
      : handles_(list.size()), views_(list.size()), has_(list.has()) {
    for (int64_t i = 0; i < list.size(); ++i) {  // own all elements before one of them can fail
      uint64_t value = list.item(i);
      handles_[i].set_name(list.name(), is_mutable);
      if (!optional_elements || take_optional(value))
        *handles_[i].slot() = decode<AtenTensorHandle>(value);
    }
    for (int64_t i = 0; i < list.size(); ++i) views_[i] = handles_[i].open();
  }
  Span<Tensor> span() const { return views_.span(); }
  operator Span<Tensor>() const { return views_.span(); }
  operator Optional<Span<Tensor>>() const {
    return has_ ? Optional<Span<Tensor>>(views_.span()) : Optional<Span<Tensor>>();
  }

 private:
  Array<TensorArg> handles_;
  Array<Tensor> views_;
  bool has_;
};

// The tensors of an output that is a list.
class ListOut {
 public:
  ListOut(int64_t size, const char* name) : handles_(size), views_(size), name_(name) {}
  TensorArg& slot(int64_t i) { return handles_[i]; }
  void open();
  Span<Tensor> span() const { return views_.span(); }
  uint64_t release();

 private:
  Array<TensorArg> handles_;
  Array<Tensor> views_;
  const char* name_;
};

class StringArg {
 public:
  StringArg(uint64_t value, const char* name, bool optional) : name_(name) {
    if (!optional || take_optional(value)) handle_ = decode<StringHandle>(value);
  }
  StringArg(const StringArg&) = delete;
  StringArg& operator=(const StringArg&) = delete;
  ~StringArg() {
    if (handle_) torch_delete_string(handle_);
  }
  operator StringView() const {
    size_t length = 0;
    const char* data = "";
    if (handle_) {
      ok(torch_string_length(handle_, &length), "length", name_);
      ok(torch_string_c_str(handle_, &data), "text", name_);
    }
    return StringView(data, static_cast<int64_t>(length));
  }
  operator Optional<StringView>() const {
    return handle_ ? Optional<StringView>(StringView(*this)) : Optional<StringView>();
  }

 private:
  StringHandle handle_ = nullptr;
  const char* name_;
};

template <class T>
Optional<T> optional_scalar(uint64_t value) {
  return take_optional(value) ? Optional<T>(decode<T>(value)) : Optional<T>();
}

// Sizes of an output while they are put together, and the dimensions that `*b` stands for.
class Sizes {
 public:
  static constexpr int64_t kMax = 64;  // torch's own limit
  Sizes() = default;
  Sizes(const Tensor& tensor, int64_t from, int64_t until);
  void push(int64_t size);
  void push(const Sizes& other);
  bool operator==(const Sizes& other) const;
  int64_t count() const { return count_; }
  const int64_t* data() const { return values_; }

 private:
  int64_t values_[kMax];
  int64_t count_ = 0;
};

// The strides of a contiguous tensor.
class Strides {
 public:
  Strides(int64_t dim, const int64_t* sizes);
  const int64_t* data() const { return values_; }

 private:
  int64_t values_[Sizes::kMax];
};

// Allocate a contiguous output.
void allocate(TensorArg& out, const char* name, const Sizes& sizes, DType dtype, Device device);

// The data-dependent dimensions of one output, in the order of its entry: it is allocated with their bounds, the kernel
// sets the sizes, and what is returned has those.
class Open {
 public:
  Open() {
    for (int64_t& size : found_) size = Tensor::kDeclared;
  }
  void add(int64_t axis) {
    axis_[count_++] = axis;
    found_[axis] = Tensor::kUnset;
  }
  int64_t* found() { return found_; }
  int64_t size(int64_t i) const { return found_[axis_[i]]; }
  // Every size was set.
  void check(const char* name) const;
  // Give `out` the sizes that the kernel set. What is left stays where it lies if that is contiguous and no less than
  // half of the memory, else it moves to memory of its own.
  void close(TensorArg& out, const char* name) const;

 private:
  int64_t found_[Sizes::kMax];
  int64_t axis_[Sizes::kMax];
  int64_t count_ = 0;
};

// One name of the shape line is one size.
void same_size(const char* name, int64_t first, const char* first_output, int64_t other,
               const char* other_output);

[[noreturn]] OPKIT_COLD void misfit(const Tensor& tensor, const char* entry);

void same_device(const Tensor& first, const Tensor& other);

// Sizes of Python's whole numbers, which do not wrap.
[[noreturn]] OPKIT_COLD void too_large();
int64_t plus(int64_t a, int64_t b);
int64_t minus(int64_t a, int64_t b);
int64_t times(int64_t a, int64_t b);

// Python's // and %, which round down.
int64_t floor_div(int64_t a, int64_t b);
inline int64_t floor_mod(int64_t a, int64_t b) { return b == -1 ? 0 : a - floor_div(a, b) * b; }

// The device of a call: that of the first tensor which is not None, in arguments and lists alike.
class CallDevice {
 public:
  void take(const Tensor& tensor);
  void take_all(Span<Tensor> list);
  const Tensor& tensor() const { return first_ ? *first_ : none_; }

 private:
  const Tensor* first_ = nullptr;
  Tensor none_;
};

#if defined(__CUDACC__)
class DeviceGuard {
 public:
  explicit DeviceGuard(const Tensor& tensor) {
    if (tensor && aoti_torch_create_cuda_guard(tensor.device().index, &guard_))
      fail("torch could not switch to the device of argument ", tensor.name());
  }
  DeviceGuard(const DeviceGuard&) = delete;
  DeviceGuard& operator=(const DeviceGuard&) = delete;
  ~DeviceGuard() {
    if (guard_) aoti_torch_delete_cuda_guard(guard_);
  }

 private:
  CUDAGuardHandle guard_ = nullptr;
};
#endif

// ---------------------------------------------------------------- bodies, see error.h

#ifndef OPKIT_LINKED
OPKIT_BODY void refused(const char* what, const char* name) {
  fail("torch could not give the ", what, " of argument ", name);
}

OPKIT_BODY bool take_optional(uint64_t& value) {
  uint64_t* cell = decode<uint64_t*>(value);
  if (!cell) return false;
  value = *cell;
  delete cell;
  return true;
}

OPKIT_BODY Tensor TensorArg::open(int64_t* found) const {
  if (!handle_) return Tensor(name_);
  int64_t dim = 0, *sizes = nullptr, *strides = nullptr;
  int32_t dtype = 0;
  Device device{0, 0};
  void* data = nullptr;
  // One test for all of them: each would be another way out, which takes a millisecond to compile.
  int32_t status = aoti_torch_get_dim(handle_, &dim);
  status |= aoti_torch_get_sizes(handle_, &sizes);
  status |= aoti_torch_get_strides(handle_, &strides);
  status |= aoti_torch_get_dtype(handle_, &dtype);
  status |= aoti_torch_get_device_type(handle_, &device.type);
  status |= aoti_torch_get_device_index(handle_, &device.index);
  status |= mutable_ ? torch_get_mutable_data_ptr(handle_, &data)
                     : torch_get_const_data_ptr(handle_, const_cast<const void**>(&data));
  ok(status, "sizes, dtype, device or data", name_);
  return Tensor(name_, data, sizes, strides, dim, static_cast<DType>(dtype), device, found);
}

OPKIT_BODY void ListOut::open() {
  for (int64_t i = 0; i < views_.span().size(); ++i) views_[i] = handles_[i].open();
}

OPKIT_BODY uint64_t ListOut::release() {
  StableListHandle list = nullptr;
  int32_t status = torch_new_list_reserve_size(static_cast<size_t>(views_.span().size()), &list);
  for (int64_t i = 0; !status && i < views_.span().size(); ++i)
    status = torch_list_push_back(list, handles_[i].release());
  if (status) fail("torch could not take the list ", name_);
  uint64_t value = 0;
  __builtin_memcpy(&value, &list, sizeof(list));
  return value;
}

OPKIT_BODY Sizes::Sizes(const Tensor& tensor, int64_t from, int64_t until) {
  for (int64_t i = from; i < tensor.dim() + until; ++i) push(tensor.sizes()[i]);
}

OPKIT_BODY void Sizes::push(int64_t size) {
  if (count_ == kMax) fail("an output has more than ", kMax, " dimensions");
  values_[count_++] = size;
}

OPKIT_BODY void Sizes::push(const Sizes& other) {
  for (int64_t i = 0; i < other.count_; ++i) push(other.values_[i]);
}

OPKIT_BODY bool Sizes::operator==(const Sizes& other) const {
  if (count_ != other.count_) return false;
  for (int64_t i = 0; i < count_; ++i) {
    OPKIT_SCALAR_LOOP;
    if (values_[i] != other.values_[i]) return false;
  }
  return true;
}

OPKIT_BODY Strides::Strides(int64_t dim, const int64_t* sizes) {
  int64_t step = 1;
  for (int64_t i = dim - 1; i >= 0; --i) {
    OPKIT_SCALAR_LOOP;
    values_[i] = step;
    step *= sizes[i] > 1 ? sizes[i] : 1;
  }
}

// Asks the system for pages of 2 MiB behind a large output, where first writing to it takes half of the time with those
// of 4 KiB. Smaller outputs lie in memory that malloc has had before: from 32 MiB on it asks for new memory each time.
OPKIT_BODY void use_large_pages(AtenTensorHandle tensor) {
#if defined(__linux__)
  constexpr uintptr_t kPage = uintptr_t(2) << 20;
  constexpr int kHugePage = 14;  // MADV_HUGEPAGE
  int64_t bytes = 0;
  void* data = nullptr;
  if (aoti_torch_get_storage_size(tensor, &bytes) || bytes < int64_t(32) << 20 ||
      torch_get_mutable_data_ptr(tensor, &data))
    return;
  const uintptr_t begin = reinterpret_cast<uintptr_t>(data),
                  first = (begin + kPage - 1) & ~(kPage - 1);
  const uintptr_t last = (begin + uintptr_t(bytes)) & ~(kPage - 1);
  if (last > first) madvise(reinterpret_cast<void*>(first), last - first, kHugePage);
#endif
}

OPKIT_BODY void allocate(TensorArg& out, const char* name, const Sizes& sizes, DType dtype,
                         Device device) {
  for (int64_t i = 0; i < sizes.count(); ++i)
    if (sizes.data()[i] < 0) fail("output ", name, " would have the size ", sizes.data()[i]);
  out.set_name(name, true);
  if (aoti_torch_empty_strided(sizes.count(), sizes.data(),
                               Strides(sizes.count(), sizes.data()).data(),
                               static_cast<int32_t>(dtype), device.type, device.index, out.slot()))
    fail("torch could not allocate output ", name);
  if (device.type == 0) use_large_pages(*out.slot());
}

OPKIT_BODY void Open::check(const char* name) const {
  for (int64_t i = 0; i < count_; ++i)
    if (size(i) == Tensor::kUnset)
      fail("the kernel did not set the size of dimension ", axis_[i], " of output ", name,
           "; expected ", name, ".set_size(", axis_[i], ", count)");
}

OPKIT_BODY void Open::close(TensorArg& out, const char* name) const {
  const Tensor whole = out.open();
  Sizes sizes;
  int64_t used = 1;
  bool same = true;
  for (int64_t i = 0; i < whole.dim(); ++i) {
    const int64_t size = found_[i] == Tensor::kDeclared ? whole.sizes()[i] : found_[i];
    same = same && size == whole.sizes()[i];
    used *= size;
    sizes.push(size);
  }
  if (same) return;
  const Strides strides(sizes.count(), sizes.data());
  bool fits = 2 * used >= whole.numel();
  for (int64_t i = 0; i < sizes.count(); ++i)
    if (sizes.data()[i] > 1 && strides.data()[i] != whole.strides()[i]) fits = false;
  TensorArg rest, packed;
  int32_t status =
      aoti_torch__reinterpret_tensor(*out.slot(), sizes.count(), sizes.data(),
                                     fits ? strides.data() : whole.strides(), 0, rest.slot());
  if (!status && !fits) {
    allocate(packed, name, sizes, whole.dtype(), whole.device());
    if (used > 0) status = aoti_torch_copy_(*packed.slot(), *rest.slot(), 0);
  }
  if (status) fail("torch could not give output ", name, " the sizes that the kernel set");
  out.swap(fits ? rest : packed);
}

OPKIT_BODY void same_size(const char* name, int64_t first, const char* first_output, int64_t other,
                          const char* other_output) {
  if (first != other)
    fail("the kernel set ", name, " to ", first, " in output ", first_output, " and to ", other,
         " in output ", other_output, "; expected one size");
}

OPKIT_BODY void misfit(const Tensor& tensor, const char* entry) {
  fail("argument ", tensor.name(), " does not fit its shape '", entry, "'");
}

OPKIT_BODY void same_device(const Tensor& first, const Tensor& other) {
  if (first && other &&
      (first.device().type != other.device().type || first.device().index != other.device().index))
    fail("arguments ", first.name(), " and ", other.name(),
         " are on different devices; move one of them");
}

OPKIT_BODY void too_large() {
  fail("a size in the shape line is beyond 64 bits; pass smaller numbers");
}

OPKIT_BODY int64_t plus(int64_t a, int64_t b) {
  if (__builtin_add_overflow(a, b, &a)) too_large();
  return a;
}

OPKIT_BODY int64_t minus(int64_t a, int64_t b) {
  if (__builtin_sub_overflow(a, b, &a)) too_large();
  return a;
}

OPKIT_BODY int64_t times(int64_t a, int64_t b) {
  if (__builtin_mul_overflow(a, b, &a)) too_large();
  return a;
}

OPKIT_BODY int64_t floor_div(int64_t a, int64_t b) {
  if (b == 0) fail("a size in the shape line divides by zero");
  if (b == -1) return minus(0, a);  // the processor would stop the process where that does not fit
  return a / b - (a % b != 0 && (a < 0) != (b < 0));
}

OPKIT_BODY void CallDevice::take(const Tensor& tensor) {
  if (!tensor) return;
  if (first_)
    same_device(*first_, tensor);
  else
    first_ = &tensor;
}

OPKIT_BODY void CallDevice::take_all(Span<Tensor> list) {
  for (int64_t i = 0; i < list.size(); ++i) take(list[i]);
}
#endif

}  // namespace glue
}  // namespace opkit

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
int32_t torch_get_const_data_ptr(AtenTensorHandle tensor, const void** data);
int32_t torch_get_mutable_data_ptr(AtenTensorHandle tensor, void** data);
int32_t aoti_torch_empty_strided(int64_t dim, const int64_t* sizes, const int64_t* strides,
                                 int32_t dtype, int32_t device_type, int32_t device_index,
                                 AtenTensorHandle* tensor);
int32_t torch_list_size(StableListHandle list, size_t* size);
int32_t torch_list_get_item(StableListHandle list, size_t index, uint64_t* item);
int32_t torch_delete_list(StableListHandle list);
int32_t torch_string_length(StringHandle string, size_t* length);
int32_t torch_string_c_str(StringHandle string, const char** data);
int32_t torch_delete_string(StringHandle string);
#if defined(__CUDACC__)
struct CUDAGuardOpaque;
typedef struct CUDAGuardOpaque* CUDAGuardHandle;
int32_t aoti_torch_create_cuda_guard(int32_t device_index, CUDAGuardHandle* guard);
int32_t aoti_torch_delete_cuda_guard(CUDAGuardHandle guard);
#endif
}

namespace opkit {
namespace glue {

inline void ok(int32_t status, const char* what, const char* name) {
  if (status) fail("torch could not give the ", what, " of argument ", name);
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
inline bool take_optional(uint64_t& value) {
  uint64_t* cell = decode<uint64_t*>(value);
  if (!cell) return false;
  value = *cell;
  delete cell;
  return true;
}

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
  uint64_t release() {
    uint64_t value = 0;
    __builtin_memcpy(&value, &handle_, sizeof(handle_));
    handle_ = nullptr;
    return value;
  }
  Tensor open() const {
    if (!handle_) return Tensor(name_);
    int64_t dim = 0, *sizes = nullptr, *strides = nullptr;
    int32_t dtype = 0;
    Device device{0, 0};
    void* data = nullptr;
    ok(aoti_torch_get_dim(handle_, &dim), "rank", name_);
    ok(aoti_torch_get_sizes(handle_, &sizes), "sizes", name_);
    ok(aoti_torch_get_strides(handle_, &strides), "strides", name_);
    ok(aoti_torch_get_dtype(handle_, &dtype), "dtype", name_);
    ok(aoti_torch_get_device_type(handle_, &device.type), "device", name_);
    ok(aoti_torch_get_device_index(handle_, &device.index), "device", name_);
    if (mutable_) {
      ok(torch_get_mutable_data_ptr(handle_, &data), "data", name_);
    } else {
      const void* readable = nullptr;
      ok(torch_get_const_data_ptr(handle_, &readable), "data", name_);
      data = const_cast<void*>(readable);
    }
    return Tensor(name_, data, sizes, strides, dim, static_cast<DType>(dtype), device);
  }

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
  operator Span<Tensor>() const { return views_.span(); }
  operator Optional<Span<Tensor>>() const {
    return has_ ? Optional<Span<Tensor>>(views_.span()) : Optional<Span<Tensor>>();
  }

 private:
  Array<TensorArg> handles_;
  Array<Tensor> views_;
  bool has_;
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
  Sizes(const Tensor& tensor, int64_t from, int64_t until) {
    for (int64_t i = from; i < tensor.dim() + until; ++i) push(tensor.sizes()[i]);
  }
  void push(int64_t size) {
    if (count_ == kMax) fail("an output has more than ", kMax, " dimensions");
    values_[count_++] = size;
  }
  void push(const Sizes& other) {
    for (int64_t i = 0; i < other.count_; ++i) push(other.values_[i]);
  }
  bool operator==(const Sizes& other) const {
    if (count_ != other.count_) return false;
    for (int64_t i = 0; i < count_; ++i)
      if (values_[i] != other.values_[i]) return false;
    return true;
  }
  int64_t count() const { return count_; }
  const int64_t* data() const { return values_; }

 private:
  int64_t values_[kMax];
  int64_t count_ = 0;
};

// Allocate a contiguous output.
inline void allocate(TensorArg& out, const char* name, const Sizes& sizes, DType dtype,
                     Device device) {
  int64_t strides[Sizes::kMax];
  int64_t step = 1;
  for (int64_t i = sizes.count() - 1; i >= 0; --i) {
    if (sizes.data()[i] < 0) fail("output ", name, " would have the size ", sizes.data()[i]);
    strides[i] = step;
    step *= sizes.data()[i] > 1 ? sizes.data()[i] : 1;
  }
  out.set_name(name, true);
  if (aoti_torch_empty_strided(sizes.count(), sizes.data(), strides, static_cast<int32_t>(dtype),
                               device.type, device.index, out.slot()))
    fail("torch could not allocate output ", name);
}

[[noreturn]] inline void misfit(const Tensor& tensor, const char* entry) {
  fail("argument ", tensor.name(), " does not fit its shape '", entry, "'");
}

inline void same_device(const Tensor& first, const Tensor& other) {
  if (first && other &&
      (first.device().type != other.device().type || first.device().index != other.device().index))
    fail("arguments ", first.name(), " and ", other.name(),
         " are on different devices; move one of them");
}

// Python's // and %, which round down.
inline int64_t floor_div(int64_t a, int64_t b) {
  if (b == 0) fail("a size in the shape line divides by zero");
  return a / b - (a % b != 0 && (a < 0) != (b < 0));
}
inline int64_t floor_mod(int64_t a, int64_t b) { return a - floor_div(a, b) * b; }

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

// Run the generated body; what it throws names the op.
template <class Body>
void guarded(const Body& body) {
  try {
    body();
  } catch (const Error&) { throw; } catch (const std::exception& error) {
    fail(error.what());
  }
}

}  // namespace glue
}  // namespace opkit

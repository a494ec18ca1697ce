// What a light kernel sees: plain views over torch's tensors, without torch's headers.
//
//     #include <opkit/kernel.h>
//     void scale(opkit::Tensor x, double factor, opkit::Tensor y) {
//       const float* in = x.data<float>();
//       float* out = y.data<float>();
//       opkit::parallel_for(0, x.numel(), 4096, [&](int64_t begin, int64_t end) {
//         for (int64_t i = begin; i < end; ++i) out[i] = in[i] * float(factor);
//       });
//     }
//
// A kernel is a function named after its op: inputs in schema order, then outputs, which are
// already allocated. Views are valid for the duration of the call. Everything here is plain C++17
// over a few symbols of torch's C shim; nothing of it depends on the version of torch.
//
//     error.h   OPKIT_CHECK and what else may go wrong
//     number.h  BFloat16, Half, the float8 and packed float4 types, Complex
//     view.h    typed views: Elements in order, View by index
//     vec.h     several elements as one value
#pragma once

#include <stddef.h>
#include <stdint.h>

#include <opkit/error.h>
#include <opkit/number.h>
#include <opkit/vec.h>

#if defined(__CUDACC__)
#include <cuda_runtime_api.h>
#endif

extern "C" {
int32_t torch_parallel_for(int64_t begin, int64_t end, int64_t grain,
                           void (*body)(int64_t, int64_t, void*), void* context);
#if defined(__CUDACC__)
int32_t aoti_torch_get_current_cuda_stream(int32_t device_index, void** stream);
#endif
}

namespace opkit {

// torch's numbers for dtypes; opkit verifies them against the running torch before the first kernel.
enum class DType : int32_t {
  uint8 = 0,
  int8 = 1,
  int16 = 2,
  int32 = 3,
  int64 = 4,
  float16 = 5,
  float32 = 6,
  float64 = 7,
  complex64 = 9,
  complex128 = 10,
  boolean = 11,
  bfloat16 = 15,
  float8_e5m2 = 23,
  float8_e4m3fn = 24,
  float8_e5m2fnuz = 25,
  float8_e4m3fnuz = 26,
  uint16 = 27,
  uint32 = 28,
  uint64 = 29,
  float8_e8m0fnu = 44,
  float4_e2m1fn_x2 = 45
};

OPKIT_COLD const char* name(DType dtype);

template <class T> struct DTypeOf;
template <class T> struct DTypeOf<const T> : DTypeOf<T> {};
template <DType D> struct IsDType { static constexpr DType value = D; };
template <> struct DTypeOf<uint8_t> : IsDType<DType::uint8> {};
template <> struct DTypeOf<int8_t> : IsDType<DType::int8> {};
template <> struct DTypeOf<int16_t> : IsDType<DType::int16> {};
template <> struct DTypeOf<int32_t> : IsDType<DType::int32> {};
template <> struct DTypeOf<int64_t> : IsDType<DType::int64> {};
template <> struct DTypeOf<uint16_t> : IsDType<DType::uint16> {};
template <> struct DTypeOf<uint32_t> : IsDType<DType::uint32> {};
template <> struct DTypeOf<uint64_t> : IsDType<DType::uint64> {};
template <> struct DTypeOf<bool> : IsDType<DType::boolean> {};
template <> struct DTypeOf<float> : IsDType<DType::float32> {};
template <> struct DTypeOf<double> : IsDType<DType::float64> {};
template <> struct DTypeOf<Half> : IsDType<DType::float16> {};
template <> struct DTypeOf<BFloat16> : IsDType<DType::bfloat16> {};
template <> struct DTypeOf<Float8_e5m2> : IsDType<DType::float8_e5m2> {};
template <> struct DTypeOf<Float8_e4m3fn> : IsDType<DType::float8_e4m3fn> {};
template <> struct DTypeOf<Float8_e5m2fnuz> : IsDType<DType::float8_e5m2fnuz> {};
template <> struct DTypeOf<Float8_e4m3fnuz> : IsDType<DType::float8_e4m3fnuz> {};
template <> struct DTypeOf<Float8_e8m0fnu> : IsDType<DType::float8_e8m0fnu> {};
template <> struct DTypeOf<Float4_e2m1fn_x2> : IsDType<DType::float4_e2m1fn_x2> {};
template <> struct DTypeOf<Complex<float>> : IsDType<DType::complex64> {};
template <> struct DTypeOf<Complex<double>> : IsDType<DType::complex128> {};

struct Device {
  int32_t type;  // torch's number: 0 is the CPU, 1 is CUDA
  int32_t index;
};

[[noreturn]] OPKIT_COLD void no_code(DType dtype, const DType* known, size_t count);

// Call `body(T{})` with the C++ type of `dtype`, which must be one of Ts.
//     opkit::dispatch<float, opkit::BFloat16>(x.dtype(), [&](auto zero) {
//       using T = decltype(zero); run<T>(x.data<T>());
//     });
template <class... Ts, class Body>
void dispatch(DType dtype, Body&& body) {
  const bool found = ((dtype == DTypeOf<Ts>::value ? (body(Ts{}), true) : false) || ...);
  if (!found) {
    const DType known[] = {DTypeOf<Ts>::value...};
    no_code(dtype, known, sizeof...(Ts));
  }
}

// ---------------------------------------------------------------- views

template <class T, int N>
class View;

// A tensor of the caller; None is a Tensor that tests false. Sizes and strides count elements.
class Tensor {
 public:
  Tensor() = default;
  explicit Tensor(const char* name) : name_(name) {}  // None
  Tensor(const char* name, void* data, const int64_t* sizes, const int64_t* strides, int64_t dim,
         DType dtype, Device device, int64_t* found = nullptr);

  explicit operator bool() const { return defined_; }
  const char* name() const { return name_; }
  int64_t dim() const { return dim_; }
  DType dtype() const { return dtype_; }
  Device device() const { return device_; }
  const int64_t* sizes() const { return sizes_; }
  const int64_t* strides() const { return strides_; }
  int64_t size(int64_t i) const { return sizes_[axis(i)]; }
  int64_t stride(int64_t i) const { return strides_[axis(i)]; }
  int64_t numel() const { return numel_; }
  bool is_contiguous() const;
  // The first element; the dtype must be T.
  template <class T>
  T* data() const {
    require();
    if (dtype_ != DTypeOf<T>::value) wrong_dtype(DTypeOf<T>::value);
    return static_cast<T*>(data_);
  }
  void* data_ptr() const { return data_; }
  // The elements by index, x.view<float, 2>()(i, j); the dtype must be T and the number of dimensions N.
  template <class T, int N>
  View<T, N> view() const;

  // Say how large a data-dependent dimension of this output is: with the shape line 'n -> ?m<=n', an output comes with
  // n elements, and y.set_size(0, count) has it returned with the first `count` of them. Every such dimension must be
  // set.
  void set_size(int64_t i, int64_t size) const {
    const int64_t d = axis(i);
    if (!found_ || found_[d] == kDeclared) not_open(d);
    if (size < 0 || size > sizes_[d]) beyond(d, size);
    found_[d] = size;
  }
  static constexpr int64_t kDeclared = -2, kUnset = -1;  // what set_size finds of a dimension

 private:
  void require() const {
    if (!defined_) none();
  }
  int64_t axis(int64_t i) const {
    require();
    const int64_t wrapped = i < 0 ? i + dim_ : i;
    if (wrapped < 0 || wrapped >= dim_) no_axis(i);
    return wrapped;
  }
  [[noreturn]] OPKIT_COLD void none() const;
  [[noreturn]] OPKIT_COLD void no_axis(int64_t i) const;
  [[noreturn]] OPKIT_COLD void wrong_dtype(DType wanted) const;
  [[noreturn]] OPKIT_COLD void wrong_dim(int64_t wanted) const;
  [[noreturn]] OPKIT_COLD void not_open(int64_t d) const;
  [[noreturn]] OPKIT_COLD void beyond(int64_t d, int64_t size) const;
  const char* name_ = "?";
  void* data_ = nullptr;
  const int64_t* sizes_ = nullptr;
  const int64_t* strides_ = nullptr;
  int64_t* found_ = nullptr;  // of an output with data-dependent dimensions
  int64_t dim_ = 0;
  int64_t numel_ = 0;
  DType dtype_ = DType::float32;
  Device device_ = {0, 0};
  bool defined_ = false;
};

// A list argument; valid for the duration of the call.
template <class T>
class Span {
 public:
  Span() = default;
  Span(const T* data, int64_t size) : data_(data), size_(size) {}
  int64_t size() const { return size_; }
  const T& operator[](int64_t i) const { return data_[i]; }
  const T* begin() const { return data_; }
  const T* end() const { return data_ + size_; }

 private:
  const T* data_ = nullptr;
  int64_t size_ = 0;
};

// A str argument; not necessarily terminated by zero.
class StringView : public Span<char> {
 public:
  using Span<char>::Span;
  bool operator==(const char* other) const {
    int64_t i = 0;
    for (; i < size(); ++i)
      if (other[i] == 0 || other[i] != (*this)[i]) return false;
    return other[i] == 0;
  }
};

// An optional scalar or list argument; tests false for None.
template <class T>
class Optional {
 public:
  Optional() = default;
  explicit Optional(const T& value) : value_(value), has_(true) {}
  explicit operator bool() const { return has_; }
  const T& operator*() const { return value_; }
  T value_or(T other) const { return has_ ? value_ : other; }

 private:
  T value_{};
  bool has_ = false;
};

// ---------------------------------------------------------------- running

// Split [begin, end) over torch's own threads, at least `grain` indices each, and call
// body(from, to) for every part. An exception in a part arrives here as an opkit::Error with its text.
template <class Body>
void parallel_for(int64_t begin, int64_t end, int64_t grain, const Body& body) {
  if (begin >= end) return;
  if (end - begin <= grain) return body(begin, end);
  struct Context {
    const Body* body;
    Text error;
    int failed;
  } context{&body, Text(), 0};
  const int32_t status = torch_parallel_for(
      begin, end, grain,
      [](int64_t from, int64_t to, void* raw) {
        Context& c = *static_cast<Context*>(raw);
        try {
          (*c.body)(from, to);
        } catch (...) {  // torch's C shim would keep only an error code
          if (!__atomic_exchange_n(&c.failed, 1, __ATOMIC_ACQ_REL)) c.error = handled();
        }
      },
      &context);
  if (context.failed) raise(context.error);
  if (status) fail("torch could not run the parts of a parallel_for");
}

// Memory for the duration of a call, from torch's allocator: on CUDA it is used again in the order of
// torch's current stream, so it may go out of scope right after the launch that works in it.
//     const opkit::Scratch<float> partial(blocks * n, x.device());
// (Names of our own for the C shim's functions: glue and torch's headers may declare those too.)
int32_t scratch_new(int64_t dim, const int64_t* sizes, const int64_t* strides, int32_t dtype,
                    int32_t device_type, int32_t device_index,
                    void** tensor) __asm__("aoti_torch_empty_strided");
int32_t scratch_data(void* tensor, void** data) __asm__("aoti_torch_get_data_ptr");
int32_t scratch_delete(void* tensor) __asm__("aoti_torch_delete_tensor_object");

template <class T>
class Scratch {
 public:
  Scratch(int64_t count, Device device) {
    const int64_t stride = 1;
    if (scratch_new(1, &count, &stride, static_cast<int32_t>(DTypeOf<T>::value), device.type,
                    device.index, &handle_))
      fail("torch gave no memory for ", count, " elements of ", name(DTypeOf<T>::value));
    if (scratch_data(handle_, &data_)) {
      scratch_delete(handle_);
      fail("torch gave no address for ", count, " elements of ", name(DTypeOf<T>::value));
    }
  }
  ~Scratch() { scratch_delete(handle_); }
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;
  T* data() const { return static_cast<T*>(data_); }

 private:
  void* handle_ = nullptr;
  void* data_ = nullptr;
};

#if defined(__CUDACC__)
// torch's current stream on the device of this call's tensors.
inline cudaStream_t stream() {
  void* current = nullptr;
  if (aoti_torch_get_current_cuda_stream(-1, &current)) fail("torch gave no current CUDA stream");
  return static_cast<cudaStream_t>(current);
}

// Fail with CUDA's own text: OPKIT_CUDA_CHECK(cudaGetLastError()) after a launch.
#define OPKIT_CUDA_CHECK(call)                                                                     \
  do {                                                                                             \
    const cudaError_t opkit_status = (call);                                                       \
    if (opkit_status != cudaSuccess) ::opkit::fail(#call, ": ", cudaGetErrorString(opkit_status)); \
  } while (0)
#endif

// ---------------------------------------------------------------- bodies, see error.h

#ifndef OPKIT_LINKED
OPKIT_BODY const char* name(DType dtype) {
  switch (dtype) {
    case DType::uint8: return "uint8";
    case DType::int8: return "int8";
    case DType::int16: return "int16";
    case DType::int32: return "int32";
    case DType::int64: return "int64";
    case DType::float16: return "float16";
    case DType::float32: return "float32";
    case DType::float64: return "float64";
    case DType::complex64: return "complex64";
    case DType::complex128: return "complex128";
    case DType::boolean: return "bool";
    case DType::bfloat16: return "bfloat16";
    case DType::float8_e5m2: return "float8_e5m2";
    case DType::float8_e4m3fn: return "float8_e4m3fn";
    case DType::float8_e5m2fnuz: return "float8_e5m2fnuz";
    case DType::float8_e4m3fnuz: return "float8_e4m3fnuz";
    case DType::float8_e8m0fnu: return "float8_e8m0fnu";
    case DType::float4_e2m1fn_x2: return "float4_e2m1fn_x2";
    case DType::uint16: return "uint16";
    case DType::uint32: return "uint32";
    case DType::uint64: return "uint64";
  }
  return "a dtype that opkit/kernel.h does not know";
}

OPKIT_BODY void no_code(DType dtype, const DType* known, size_t count) {
  Text text;
  for (size_t i = 0; i < count; ++i) text << " " << name(known[i]);
  fail("this kernel has no code for ", name(dtype), "; it takes:", text.c_str());
}

OPKIT_BODY Tensor::Tensor(const char* name, void* data, const int64_t* sizes,
                          const int64_t* strides, int64_t dim, DType dtype, Device device,
                          int64_t* found)
    : name_(name), data_(data), sizes_(sizes), strides_(strides), found_(found), dim_(dim),
      numel_(1), dtype_(dtype), device_(device), defined_(true) {
  for (int64_t i = 0; i < dim; ++i) {
    OPKIT_SCALAR_LOOP;
    numel_ *= sizes[i];
  }
}

OPKIT_BODY bool Tensor::is_contiguous() const {
  int64_t expected = 1;
  for (int64_t i = dim_ - 1; i >= 0; --i) {
    if (sizes_[i] == 0) return true;
    if (sizes_[i] != 1 && strides_[i] != expected) return numel() == 0;
    expected *= sizes_[i];
  }
  return true;
}

OPKIT_BODY void Tensor::none() const { fail("argument ", name_, " is None, the kernel reads it"); }
OPKIT_BODY void Tensor::no_axis(int64_t i) const {
  fail("argument ", name_, " has ", dim_, " dimensions, the kernel asks for dimension ", i);
}
OPKIT_BODY void Tensor::wrong_dtype(DType wanted) const {
  fail("argument ", name_, " is ", opkit::name(dtype_), ", the kernel reads it as ",
       opkit::name(wanted));
}
OPKIT_BODY void Tensor::wrong_dim(int64_t wanted) const {
  fail("argument ", name_, " has ", dim_, " dimensions, the kernel views it with ", wanted);
}
OPKIT_BODY void Tensor::not_open(int64_t d) const {
  fail("the kernel sets the size of dimension ", d, " of ", name_,
       ", which the shape line does not leave open; expected a dimension of an output such as "
       "?m<=n");
}
OPKIT_BODY void Tensor::beyond(int64_t d, int64_t size) const {
  fail("the kernel sets the size of dimension ", d, " of output ", name_, " to ", size,
       "; expected 0 to ", sizes_[d], ", its bound in the shape line");
}
#endif

}  // namespace opkit

#include <opkit/view.h>

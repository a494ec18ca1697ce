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
#pragma once

#include <stddef.h>
#include <stdint.h>

#include <exception>

#if defined(__CUDACC__)
#include <cuda_fp16.h>
#include <cuda_runtime_api.h>
#define OPKIT_HOST_DEVICE __host__ __device__
#else
#define OPKIT_HOST_DEVICE
#endif

#ifndef OPKIT_OP  // the generated glue names the op, so that every error does
#define OPKIT_OP "kernel"
#endif

extern "C" {
int32_t torch_parallel_for(int64_t begin, int64_t end, int64_t grain,
                           void (*body)(int64_t, int64_t, void*), void* context);
#if defined(__CUDACC__)
int32_t aoti_torch_get_current_cuda_stream(int32_t device_index, void** stream);
#endif
}

namespace opkit {

// ---------------------------------------------------------------- errors

// Text of bounded length, built without allocating.
class Text {
 public:
  Text& operator<<(const char* s) {
    while (*s && length_ < sizeof(buffer_) - 1) buffer_[length_++] = *s++;
    buffer_[length_] = 0;
    return *this;
  }
  Text& operator<<(bool value) { return *this << (value ? "true" : "false"); }
  Text& operator<<(int value) { return *this << static_cast<long long>(value); }
  Text& operator<<(long value) { return *this << static_cast<long long>(value); }
  Text& operator<<(long long value) {
    if (value < 0) *this << "-";
    return digits(value < 0 ? 0ULL - static_cast<unsigned long long>(value)
                            : static_cast<unsigned long long>(value));
  }
  Text& operator<<(unsigned value) { return digits(value); }
  Text& operator<<(unsigned long value) { return digits(value); }
  Text& operator<<(unsigned long long value) { return digits(value); }
  Text& operator<<(double value) {
    char number[40];
    __builtin_snprintf(number, sizeof(number), "%g", value);
    return *this << number;
  }
  const char* c_str() const { return buffer_; }

 private:
  Text& digits(unsigned long long value) {
    char number[24];
    char* p = number + sizeof(number) - 1;
    *p = 0;
    do *--p = static_cast<char>('0' + value % 10);
    while (value /= 10);
    return *this << p;
  }
  char buffer_[1000] = {0};
  size_t length_ = 0;
};

// What OPKIT_CHECK throws; it arrives in Python as a RuntimeError with this text.
class Error : public std::exception {
 public:
  explicit Error(const Text& text) : text_(text) {}
  const char* what() const noexcept override { return text_.c_str(); }

 private:
  Text text_;
};

template <class... Parts>
[[noreturn]] void fail(const Parts&... parts) {
  Text text;
  text << OPKIT_OP << ": ";
  (text << ... << parts);
  throw Error(text);
}

// OPKIT_CHECK(n % 8 == 0, "n is ", n, ", expected a multiple of 8");
#define OPKIT_CHECK(condition, ...)               \
  do {                                            \
    if (!(condition)) ::opkit::fail(__VA_ARGS__); \
  } while (0)

// ---------------------------------------------------------------- number types

struct alignas(2) BFloat16 {
  uint16_t bits;
  BFloat16() = default;
  OPKIT_HOST_DEVICE BFloat16(float value) {
    union {
      float f;
      uint32_t u;
    } v{value};
    const uint32_t rounded = (v.u + 0x7fffu + ((v.u >> 16) & 1u)) >> 16;
    bits = static_cast<uint16_t>(value != value ? 0x7fc0u : rounded);
  }
  OPKIT_HOST_DEVICE operator float() const {
    union {
      uint32_t u;
      float f;
    } v{static_cast<uint32_t>(bits) << 16};
    return v.f;
  }
};

struct alignas(2) Half {
  uint16_t bits;
  Half() = default;
#if defined(__CUDACC__)
  OPKIT_HOST_DEVICE Half(float value) { bits = __half_as_ushort(__float2half_rn(value)); }
  OPKIT_HOST_DEVICE operator float() const { return __half2float(__ushort_as_half(bits)); }
#else
  // Integers and selects instead of _Float16, which gcc does not vectorise before AVX512-FP16. Nothing here is a
  // subnormal float, which a thread may be told to flush.
  Half(float value) {
    union {
      float f;
      uint32_t u;
    } v{value}, small;
    const uint32_t sign = v.u >> 16 & 0x8000u;
    v.u &= 0x7fffffffu;
    small.f =
        v.f + 0.5f;  // leaves a subnormal half in the low bits, rounded to even by the addition
    const uint32_t subnormal = small.u - 0x3f000000u;
    const uint32_t normal = (v.u - 0x38000000u + 0xfffu + (v.u >> 13 & 1u)) >> 13;
    const uint32_t huge = v.u > 0x7f800000u ? 0x7e00u : 0x7c00u;
    const uint32_t finite = v.u < 0x38800000u ? subnormal : normal;
    bits = static_cast<uint16_t>(sign | (v.u >= 0x477ff000u ? huge : finite));
  }
  operator float() const {
    const uint32_t magnitude = (bits & 0x7fffu) << 13, sign = (bits & 0x8000u) << 16;
    union {
      uint32_t u;
      float f;
    } small{magnitude + 0x38800000u}, v;
    small.f -= 6.103515625e-05f;  // 2^-14
    const uint32_t normal = magnitude + (magnitude >= 0x0f800000u ? 0x70000000u : 0x38000000u);
    v.u = sign | (magnitude < 0x00800000u ? small.u : normal);
    return v.f;
  }
#endif
};

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
  uint16 = 27,
  uint32 = 28,
  uint64 = 29
};

inline const char* name(DType dtype) {
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
    case DType::uint16: return "uint16";
    case DType::uint32: return "uint32";
    case DType::uint64: return "uint64";
  }
  return "a dtype that opkit/kernel.h does not know";
}

template <class T> struct DTypeOf;
template <> struct DTypeOf<uint8_t> { static constexpr DType value = DType::uint8; };
template <> struct DTypeOf<int8_t> { static constexpr DType value = DType::int8; };
template <> struct DTypeOf<int16_t> { static constexpr DType value = DType::int16; };
template <> struct DTypeOf<int32_t> { static constexpr DType value = DType::int32; };
template <> struct DTypeOf<int64_t> { static constexpr DType value = DType::int64; };
template <> struct DTypeOf<uint16_t> { static constexpr DType value = DType::uint16; };
template <> struct DTypeOf<uint32_t> { static constexpr DType value = DType::uint32; };
template <> struct DTypeOf<uint64_t> { static constexpr DType value = DType::uint64; };
template <> struct DTypeOf<bool> { static constexpr DType value = DType::boolean; };
template <> struct DTypeOf<float> { static constexpr DType value = DType::float32; };
template <> struct DTypeOf<double> { static constexpr DType value = DType::float64; };
template <> struct DTypeOf<Half> { static constexpr DType value = DType::float16; };
template <> struct DTypeOf<BFloat16> { static constexpr DType value = DType::bfloat16; };

struct Device {
  int32_t type;  // torch's number: 0 is the CPU, 1 is CUDA
  int32_t index;
};

// Call `body(T{})` with the C++ type of `dtype`, which must be one of Ts.
//     opkit::dispatch<float, opkit::BFloat16>(x.dtype(), [&](auto zero) {
//       using T = decltype(zero); run<T>(x.data<T>());
//     });
template <class... Ts, class Body>
void dispatch(DType dtype, Body&& body) {
  const bool found = ((dtype == DTypeOf<Ts>::value ? (body(Ts{}), true) : false) || ...);
  if (!found) {
    Text text;
    ((text << " " << name(DTypeOf<Ts>::value)), ...);
    fail("this kernel has no code for ", name(dtype), "; it takes:", text.c_str());
  }
}

// ---------------------------------------------------------------- views

// A tensor of the caller; None is a Tensor that tests false. Sizes and strides count elements.
class Tensor {
 public:
  Tensor() = default;
  explicit Tensor(const char* name) : name_(name) {}  // None
  Tensor(const char* name, void* data, const int64_t* sizes, const int64_t* strides, int64_t dim,
         DType dtype, Device device)
      : name_(name), data_(data), sizes_(sizes), strides_(strides), dim_(dim), dtype_(dtype),
        device_(device), defined_(true) {}

  explicit operator bool() const { return defined_; }
  const char* name() const { return name_; }
  int64_t dim() const { return dim_; }
  DType dtype() const { return dtype_; }
  Device device() const { return device_; }
  const int64_t* sizes() const { return sizes_; }
  const int64_t* strides() const { return strides_; }
  int64_t size(int64_t i) const { return sizes_[axis(i)]; }
  int64_t stride(int64_t i) const { return strides_[axis(i)]; }
  int64_t numel() const {
    int64_t n = 1;
    for (int64_t i = 0; i < dim_; ++i) n *= sizes_[i];
    return n;
  }
  bool is_contiguous() const {
    int64_t expected = 1;
    for (int64_t i = dim_ - 1; i >= 0; --i) {
      if (sizes_[i] == 0) return true;
      if (sizes_[i] != 1 && strides_[i] != expected) return numel() == 0;
      expected *= sizes_[i];
    }
    return true;
  }
  // The first element; the dtype must be T.
  template <class T>
  T* data() const {
    require();
    if (dtype_ != DTypeOf<T>::value)
      fail("argument ", name_, " is ", opkit::name(dtype_), ", the kernel reads it as ",
           opkit::name(DTypeOf<T>::value));
    return static_cast<T*>(data_);
  }
  void* data_ptr() const { return data_; }

 private:
  void require() const {
    if (!defined_) fail("argument ", name_, " is None, the kernel reads it");
  }
  int64_t axis(int64_t i) const {
    require();
    const int64_t wrapped = i < 0 ? i + dim_ : i;
    if (wrapped < 0 || wrapped >= dim_)
      fail("argument ", name_, " has ", dim_, " dimensions, the kernel asks for dimension ", i);
    return wrapped;
  }
  const char* name_ = "?";
  void* data_ = nullptr;
  const int64_t* sizes_ = nullptr;
  const int64_t* strides_ = nullptr;
  int64_t dim_ = 0;
  DType dtype_ = DType::float32;
  Device device_ = {0, 0};
  bool defined_ = false;
};

// The elements of a tensor in row-major order, whatever its strides. Dimensions that lie like one
// are merged, so a contiguous tensor costs no more than its pointer. Copies into CUDA kernels.
//     const opkit::Elements<float> in(x);
//     for (int64_t i = begin; i < end; ++i) out[i] = in[i];
template <class T>
class Elements {
 public:
  explicit Elements(const Tensor& x) : data_(x.data<T>()) {
    for (int64_t i = x.dim() - 1; i >= 0; --i) {
      if (x.size(i) == 1) continue;
      if (dim_ > 0 && x.stride(i) == stride_[dim_ - 1] * size_[dim_ - 1]) {
        size_[dim_ - 1] *= x.size(i);
        continue;
      }
      if (dim_ == kMaxDim)
        fail("argument ", x.name(), " has more than ", kMaxDim,
             " dimensions that lie apart; pass it contiguous");
      size_[dim_] = x.size(i);
      stride_[dim_++] = x.stride(i);
    }
    contiguous_ = dim_ == 0 || (dim_ == 1 && stride_[0] == 1) || x.numel() == 0;
  }
  OPKIT_HOST_DEVICE bool is_contiguous() const { return contiguous_; }
  OPKIT_HOST_DEVICE const T& operator[](int64_t i) const {
    return data_[contiguous_ ? i : offset(i)];
  }

  // `count` elements from the i-th on, side by side: where they are, or else copied to `buffer`.
  const T* read(int64_t i, int64_t count, T* buffer) const {
    if (contiguous_) return data_ + i;
    if (stride_[0] == 1 && i % size_[0] + count <= size_[0]) return data_ + offset(i);
    for (int64_t done = 0; done < count;) {
      const T* from = data_ + offset(i + done);
      const int64_t run = size_[0] - (i + done) % size_[0];
      const int64_t length = run < count - done ? run : count - done;
      for (int64_t k = 0; k < length; ++k) buffer[done + k] = from[k * stride_[0]];
      done += length;
    }
    return buffer;
  }

 private:
#if !defined(__CUDACC__)
  __attribute__((noinline))  // or gcc would not take the test for contiguity out of a loop
#endif
  OPKIT_HOST_DEVICE int64_t offset(int64_t i) const {
    int64_t at = 0;
    for (int d = 0; d < dim_ - 1; ++d) {
      at += i % size_[d] * stride_[d];
      i /= size_[d];
    }
    return at + i * stride_[dim_ - 1];
  }
  static constexpr int kMaxDim = 12;
  T* data_;
  bool contiguous_;
  int dim_ = 0;
  int64_t size_[kMaxDim];  // the innermost dimension first
  int64_t stride_[kMaxDim];
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
// body(from, to) for every part. An exception in a part is thrown again here.
template <class Body>
void parallel_for(int64_t begin, int64_t end, int64_t grain, const Body& body) {
  if (begin >= end) return;
  if (end - begin <= grain) return body(begin, end);
  struct Context {
    const Body* body;
    std::exception_ptr error;
    int claimed;
  } context{&body, nullptr, 0};
  torch_parallel_for(
      begin, end, grain,
      [](int64_t from, int64_t to, void* raw) {
        Context& c = *static_cast<Context*>(raw);
        try {
          (*c.body)(from, to);
        } catch (...) {  // torch's C shim would keep only an error code
          if (!__atomic_exchange_n(&c.claimed, 1, __ATOMIC_ACQ_REL))
            c.error = std::current_exception();
        }
      },
      &context);
  if (context.error) std::rethrow_exception(context.error);
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

}  // namespace opkit

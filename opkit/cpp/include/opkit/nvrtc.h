// What CUDA source sees first where NVRTC compiles it: on the host, kernels that are launched through the driver; on
// the device, what the system's headers would define. The words that say where functions run stay in the text: the
// split into two programs reads them.
#pragma once

#include <crt/host_defines.h>
#include <math.h>  // as nvcc does; on the device its macros count, and NVRTC has the functions

#if defined(__CUDACC_RTC__)

typedef signed char int8_t;
typedef short int16_t;
typedef int int32_t;
typedef long int64_t;
typedef unsigned char uint8_t;
typedef unsigned short uint16_t;
typedef unsigned int uint32_t;
typedef unsigned long uint64_t;
typedef long intptr_t;
typedef unsigned long uintptr_t;
typedef long ptrdiff_t;

// What those macros stand for.
constexpr float __builtin_inff() { return __builtin_bit_cast(float, 0x7f800000u); }
constexpr float __builtin_huge_valf() { return __builtin_inff(); }
constexpr float __builtin_nanf(const char*) { return __builtin_bit_cast(float, 0x7fc00000u); }
constexpr double __builtin_inf() { return __builtin_bit_cast(double, 0x7ff0000000000000ul); }
constexpr double __builtin_huge_val() { return __builtin_inf(); }
constexpr double __builtin_nan(const char*) {
  return __builtin_bit_cast(double, 0x7ff8000000000000ul);
}

namespace std {
using ::int8_t, ::int16_t, ::int32_t, ::int64_t, ::uint8_t, ::uint16_t, ::uint32_t, ::uint64_t;
using ::size_t, ::ptrdiff_t, ::intptr_t, ::uintptr_t;

using ::abs, ::fabs, ::sqrt, ::cbrt, ::hypot, ::pow, ::exp, ::exp2, ::expm1, ::log, ::log2, ::log10,
    ::log1p;
using ::erf, ::erfc, ::tgamma, ::lgamma, ::floor, ::ceil, ::trunc, ::round, ::rint, ::nearbyint,
    ::fmod, ::remainder;
using ::fma, ::fmax, ::fmin, ::fdim, ::copysign, ::nextafter, ::ldexp, ::isnan, ::isinf, ::isfinite,
    ::signbit;
using ::sin, ::cos, ::tan, ::asin, ::acos, ::atan, ::atan2, ::sinh, ::cosh, ::tanh, ::asinh,
    ::acosh, ::atanh;

class exception {
 public:
  virtual ~exception();
  virtual const char* what() const noexcept;
};
class exception_ptr {};

template <class T, T V> struct integral_constant { static constexpr T value = V; };
using true_type = integral_constant<bool, true>;
using false_type = integral_constant<bool, false>;
template <class A, class B> struct is_same : false_type {};
template <class A> struct is_same<A, A> : true_type {};
template <class A, class B> constexpr bool is_same_v = is_same<A, B>::value;
template <bool, class A, class B> struct conditional { using type = A; };
template <class A, class B> struct conditional<false, A, B> { using type = B; };
template <bool C, class A, class B> using conditional_t = typename conditional<C, A, B>::type;
template <bool, class T = void> struct enable_if {};
template <class T> struct enable_if<true, T> { using type = T; };
template <bool C, class T = void> using enable_if_t = typename enable_if<C, T>::type;

template <class T>
constexpr const T& min(const T& a, const T& b) {
  return b < a ? b : a;
}
template <class T>
constexpr const T& max(const T& a, const T& b) {
  return a < b ? b : a;
}

template <class T> struct numeric_limits;
#define OPKIT_LIMITS(T, least, greatest, ...)     \
  template <> struct numeric_limits<T> {          \
    static constexpr bool is_specialized = true;  \
    static constexpr T lowest() { return least; } \
    static constexpr T max() { return greatest; } \
    __VA_ARGS__                                   \
  };
#define OPKIT_INTEGER_LIMITS(T, least, greatest) \
  OPKIT_LIMITS(T, least, greatest, static constexpr T min() { return least; })
#define OPKIT_FLOAT_LIMITS(T, least, greatest, smallest, step, f)                  \
  OPKIT_LIMITS(                                                                    \
      T, least, greatest,                                                          \
      static constexpr T min() { return smallest; } static constexpr T epsilon() { \
        return step;                                                               \
      } static constexpr T infinity() {                                            \
        return __builtin_inf##f();                                                 \
      } static constexpr T quiet_NaN() { return __builtin_nan##f(""); })
OPKIT_INTEGER_LIMITS(signed char, -__SCHAR_MAX__ - 1, __SCHAR_MAX__)
OPKIT_INTEGER_LIMITS(short, -__SHRT_MAX__ - 1, __SHRT_MAX__)
OPKIT_INTEGER_LIMITS(int, -__INT_MAX__ - 1, __INT_MAX__)
OPKIT_INTEGER_LIMITS(long, -__LONG_MAX__ - 1, __LONG_MAX__)
OPKIT_INTEGER_LIMITS(long long, -__LONG_LONG_MAX__ - 1, __LONG_LONG_MAX__)
OPKIT_INTEGER_LIMITS(unsigned char, 0, 2 * __SCHAR_MAX__ + 1)
OPKIT_INTEGER_LIMITS(unsigned short, 0, 2 * __SHRT_MAX__ + 1)
OPKIT_INTEGER_LIMITS(unsigned, 0, 2u * __INT_MAX__ + 1)
OPKIT_INTEGER_LIMITS(unsigned long, 0, 2ul * __LONG_MAX__ + 1)
OPKIT_INTEGER_LIMITS(unsigned long long, 0, 2ull * __LONG_LONG_MAX__ + 1)
OPKIT_FLOAT_LIMITS(float, -__FLT_MAX__, __FLT_MAX__, __FLT_MIN__, __FLT_EPSILON__, f)
OPKIT_FLOAT_LIMITS(double, -__DBL_MAX__, __DBL_MAX__, __DBL_MIN__, __DBL_EPSILON__, )
#undef OPKIT_LIMITS
#undef OPKIT_INTEGER_LIMITS
#undef OPKIT_FLOAT_LIMITS

// For the members of the host's classes, of which no device has an object.
template <class...> class vector {};
template <class, size_t> class array {};
template <class...> class map {};
template <class...> class unordered_map {};
template <class...> class optional {};
template <class...> class pair {};
template <class...> class tuple {};
template <class...> class function {};
template <class...> class unique_ptr {};
template <class...> class shared_ptr {};
template <class...> class atomic {};
class string {};
class string_view {};
class mutex {};
}  // namespace std

#else

#include <cuda_runtime_api.h>
#include <vector_functions.h>

namespace opkit {
namespace rtc __attribute__((visibility("hidden"))) {

  // What stands between <<< and >>>.
  struct Config {
    dim3 grid, block;
    size_t shared;
    cudaStream_t stream;
    Config(dim3 grid, dim3 block, size_t shared = 0, cudaStream_t stream = nullptr)
        : grid(grid), block(block), shared(shared), stream(stream) {}
  };

  // One instantiation of a kernel; a static variable, which nothing has to initialise.
  struct Kernel {
    static constexpr int kImages = 64;
    void* loaded[kImages];  // the driver's kernel, of every image that it was launched from
  };

  void launch(Kernel & kernel, const Config& config, void** arguments);
  Kernel& find(const void* function);
  cudaError_t set_attribute(Kernel & kernel, cudaFuncAttribute attribute, int value);
  cudaError_t count_blocks(int* blocks, Kernel& kernel, int threads, size_t shared);

}  // namespace rtc
}  // namespace opkit

template <class... P>
cudaError_t cudaFuncSetAttribute(void (*kernel)(::opkit::rtc::Config, P...),
                                 cudaFuncAttribute attribute, int value) {
  return ::opkit::rtc::set_attribute(::opkit::rtc::find(reinterpret_cast<const void*>(kernel)),
                                     attribute, value);
}
template <class... P>
cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessor(
    int* blocks, void (*kernel)(::opkit::rtc::Config, P...), int threads, size_t shared) {
  return ::opkit::rtc::count_blocks(
      blocks, ::opkit::rtc::find(reinterpret_cast<const void*>(kernel)), threads, shared);
}

#define __CUDACC__ 1  // from here on: CUDA's own headers would take it for nvcc
#endif

// Conversions of many halves at once, with the processor's instructions. gcc makes none of these in a loop, and what
// opkit::Half does with integers costs ten times as much.
#pragma once

#include <opkit/kernel.h>

namespace opkit_kernels {

#if defined(__AVX512F__)
constexpr int64_t kHalves = 16;  // that an instruction converts
#elif defined(__F16C__)
constexpr int64_t kHalves = 8;
#endif

#if defined(__AVX512F__) || defined(__F16C__)
typedef float FloatVector __attribute__((vector_size(kHalves * 4), aligned(4), may_alias));
typedef uint16_t HalfVector __attribute__((vector_size(kHalves * 2), aligned(2), may_alias));

// in[0, n) as floats, and back, rounded to nearest even
inline void widen(const opkit::Half* in, float* out, int64_t n) {
  int64_t i = 0;
  for (; i + kHalves <= n; i += kHalves) {
    FloatVector wide;
    asm("vcvtph2ps %1, %0" : "=v"(wide) : "m"(*reinterpret_cast<const HalfVector*>(in + i)));
    *reinterpret_cast<FloatVector*>(out + i) = wide;
  }
  for (; i < n; ++i) out[i] = float(in[i]);
}
inline void narrow(const float* in, opkit::Half* out, int64_t n) {
  int64_t i = 0;
  for (; i + kHalves <= n; i += kHalves) {
    const FloatVector wide = *reinterpret_cast<const FloatVector*>(in + i);
    asm("vcvtps2ph $0, %1, %0" : "=m"(*reinterpret_cast<HalfVector*>(out + i)) : "v"(wide));
  }
  for (; i < n; ++i) out[i] = opkit::Half(in[i]);
}
#else
inline void widen(const opkit::Half* in, float* out, int64_t n) {
  for (int64_t i = 0; i < n; ++i) out[i] = float(in[i]);
}
inline void narrow(const float* in, opkit::Half* out, int64_t n) {
  for (int64_t i = 0; i < n; ++i) out[i] = opkit::Half(in[i]);
}
#endif

}  // namespace opkit_kernels

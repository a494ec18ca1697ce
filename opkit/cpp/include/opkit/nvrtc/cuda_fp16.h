// CUDA's own, where the headers that it needs are installed too (nvidia-cuda-cccl); else what opkit/number.h needs.
#pragma once
#if __has_include(<nv/target>)

#pragma push_macro("__CUDACC__")
#if !defined(__CUDACC_RTC__)
#undef __CUDACC__
#endif
#include_next <cuda_fp16.h>
#pragma pop_macro("__CUDACC__")

#else

struct __half { unsigned short bits; };
__host__ __device__ inline unsigned short __half_as_ushort(__half value) { return value.bits; }
__host__ __device__ inline __half __ushort_as_half(unsigned short bits) { return {bits}; }

#if defined(__CUDACC_RTC__)
__device__ inline __half __float2half_rn(float value) {
  __half result;
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(result.bits) : "f"(value));
  return result;
}
__device__ inline float __half2float(__half value) {
  float result;
  asm("cvt.f32.f16 %0, %1;" : "=f"(result) : "h"(value.bits));
  return result;
}
#else
// Rounding by the multiplication in float, as the type has fewer bits everywhere.
inline __half __float2half_rn(float value) {
  unsigned u;
  __builtin_memcpy(&u, &value, 4);
  const unsigned sign = u >> 16 & 0x8000u;
  u &= 0x7fffffffu;
  if (u > 0x7f800000u) return {static_cast<unsigned short>(sign | 0x7e00u)};
  if (u >= 0x477ff000u) return {static_cast<unsigned short>(sign | 0x7c00u)};
  if (u >= 0x38800000u) {
    const unsigned normal = (u - 0x38000000u + 0xfffu + (u >> 13 & 1u)) >> 13;
    return {static_cast<unsigned short>(sign | normal)};
  }
  float magnitude;
  __builtin_memcpy(&magnitude, &u, 4);
  magnitude += 0.5f;  // leaves a subnormal half in the low bits, rounded to even by the addition
  __builtin_memcpy(&u, &magnitude, 4);
  return {static_cast<unsigned short>(sign | (u - 0x3f000000u))};
}
inline float __half2float(__half value) {
  const unsigned magnitude = value.bits & 0x7fffu;
  unsigned u = magnitude << 13;
  float result;
  if (magnitude >= 0x7c00u) {
    u += 0x70000000u;
  } else if (magnitude >= 0x0400u) {
    u += 0x38000000u;
  } else {
    result = static_cast<float>(magnitude) * 5.9604644775390625e-8f;  // 2^-24
    __builtin_memcpy(&u, &result, 4);
  }
  u |= (value.bits & 0x8000u) << 16;
  __builtin_memcpy(&result, &u, 4);
  return result;
}
#endif
#endif

// C++ types for torch's dtypes that C++ has none for. They convert from float, rounding to nearest even, and to float;
// compute in float. Everything is integers and selects, so that a loop over it becomes vector code; nothing depends on
// how a thread treats subnormal floats.
#pragma once

#include <stdint.h>

#if defined(__CUDACC__)
#include <cuda_fp16.h>
#define OPKIT_HOST_DEVICE __host__ __device__
#else
#define OPKIT_HOST_DEVICE
#endif

namespace opkit {

namespace number {

OPKIT_HOST_DEVICE inline uint32_t bits_of(float value) {
  union {
    float f;
    uint32_t u;
  } v{value};
  return v.u;
}
OPKIT_HOST_DEVICE inline float float_of(uint32_t bits) {
  union {
    uint32_t u;
    float f;
  } v{bits};
  return v.f;
}

// A number of `M` bits of mantissa and exponents with the given bias: a float's magnitude rounded to it, without an
// upper end, and back.
template <int M, int Bias>
OPKIT_HOST_DEVICE uint32_t round_to(uint32_t magnitude) {
  // The sum leaves a subnormal in the low bits, rounded to even by the addition.
  constexpr uint32_t shift = 23 - M, magic = static_cast<uint32_t>(128 - Bias + 23 - M) << 23;
  const uint32_t subnormal = bits_of(float_of(magnitude) + float_of(magic)) - magic;
  const uint32_t normal = (magnitude - (static_cast<uint32_t>(127 - Bias) << 23) +
                           ((1u << (shift - 1)) - 1u) + (magnitude >> shift & 1u)) >>
                          shift;
  return magnitude < (static_cast<uint32_t>(128 - Bias) << 23) ? subnormal : normal;
}
template <int M, int Bias>
OPKIT_HOST_DEVICE uint32_t widen(uint32_t bits) {
  constexpr uint32_t least = static_cast<uint32_t>(128 - Bias) << 23;  // the smallest normal number
  const uint32_t shifted = bits << (23 - M);
  const uint32_t subnormal = bits_of(float_of(shifted + least) - float_of(least));
  return bits < (1u << M) ? subnormal : shifted + least - (1u << 23);
}

}  // namespace number

struct alignas(2) BFloat16 {
  uint16_t bits;
  BFloat16() = default;
  OPKIT_HOST_DEVICE BFloat16(float value) {
    const uint32_t u = number::bits_of(value);
    const uint32_t rounded = (u + 0x7fffu + ((u >> 16) & 1u)) >> 16;
    bits = static_cast<uint16_t>(value != value ? 0x7fc0u : rounded);
  }
  OPKIT_HOST_DEVICE operator float() const {
    return number::float_of(static_cast<uint32_t>(bits) << 16);
  }
};

struct alignas(2) Half {
  uint16_t bits;
  Half() = default;
#if defined(__CUDACC__)
  OPKIT_HOST_DEVICE Half(float value) { bits = __half_as_ushort(__float2half_rn(value)); }
  OPKIT_HOST_DEVICE operator float() const { return __half2float(__ushort_as_half(bits)); }
#else
  // Not _Float16, which gcc does not vectorise before AVX512-FP16.
  Half(float value) {
    const uint32_t u = number::bits_of(value), magnitude = u & 0x7fffffffu;
    const uint32_t huge = magnitude > 0x7f800000u ? 0x7e00u : 0x7c00u;
    const uint32_t finite = number::round_to<10, 15>(magnitude);
    bits = static_cast<uint16_t>((u >> 16 & 0x8000u) | (magnitude >= 0x477ff000u ? huge : finite));
  }
  operator float() const {
    const uint32_t magnitude = bits & 0x7fffu, sign = (bits & 0x8000u) << 16;
    const uint32_t special = magnitude >= 0x7c00u ? 112u << 23 : 0u;  // infinities, not a number
    return number::float_of(sign | (number::widen<10, 15>(magnitude) + special));
  }
#endif
};

// The 8-bit floats with a sign. What is too large becomes `Largest`, which is infinity where there is one (as in torch
// 2.13; older ones make it not a number in Float8_e4m3fn). In the forms called fnuz, which have neither -0 nor
// infinities, it becomes not a number.
template <int M, int Bias, unsigned Largest, bool Fnuz>
struct Float8 {
  uint8_t bits;
  Float8() = default;
  OPKIT_HOST_DEVICE Float8(float value) {
    const uint32_t u = number::bits_of(value), magnitude = u & 0x7fffffffu, sign = u >> 24 & 0x80u;
    const uint32_t finite = number::round_to<M, Bias>(magnitude);
    uint32_t result = sign | (finite > Largest ? Largest : finite);
    if (Fnuz) {
      result = finite == 0 ? 0u : result;
      result = finite > Largest || magnitude > 0x7f800000u ? 0x80u : result;
    } else {
      result = magnitude > 0x7f800000u ? sign | 0x7fu : result;
    }
    bits = static_cast<uint8_t>(result);
  }
  OPKIT_HOST_DEVICE operator float() const {
    const uint32_t magnitude = bits & 0x7fu;
    uint32_t result = number::widen<M, Bias>(magnitude);
    if (Fnuz) {
      result = bits == 0x80u ? 0x7fc00000u : result;
    } else {
      result = magnitude > Largest ? 0x7fc00000u : result;
      result = M == 2 && magnitude == Largest ? 0x7f800000u : result;
    }
    return number::float_of((bits & 0x80u) << 24 | result);
  }
};
using Float8_e4m3fn = Float8<3, 7, 0x7e, false>;
using Float8_e5m2 = Float8<2, 15, 0x7c, false>;
using Float8_e4m3fnuz = Float8<3, 8, 0x7f, true>;
using Float8_e5m2fnuz = Float8<2, 16, 0x7f, true>;

// A power of two, 2^-127 to 2^127, such as the scale of a block; the sign is dropped.
struct Float8_e8m0fnu {
  uint8_t bits;
  Float8_e8m0fnu() = default;
  OPKIT_HOST_DEVICE Float8_e8m0fnu(float value) {
    const uint32_t magnitude = number::bits_of(value) & 0x7fffffffu;
    const uint32_t exponent = magnitude >> 23, rest = magnitude & 0x7fffffu;
    // Halfway between 2^-127 and 2^-126 goes down: only there the lower one is even.
    const uint32_t rounded = exponent + (rest + (exponent > 0 ? 1u : 0u) > 0x400000u ? 1u : 0u);
    bits = static_cast<uint8_t>(exponent == 255u ? 255u : rounded);
  }
  OPKIT_HOST_DEVICE operator float() const {
    const uint32_t power = bits == 0 ? 0x00400000u : static_cast<uint32_t>(bits) << 23;
    return number::float_of(bits == 255u ? 0x7fc00000u : power);
  }
};

// Two 4-bit floats (0, 0.5, 1, 1.5, 2, 3, 4, 6 and their negatives) in one byte, which is one element of the tensor.
// torch converts nothing to it; here what is too large becomes 6, and so does what is not a number.
//     y[i] = opkit::Float4_e2m1fn_x2(x[2 * i] / scale, x[2 * i + 1] / scale);
struct Float4_e2m1fn_x2 {
  uint8_t bits;
  Float4_e2m1fn_x2() = default;
  OPKIT_HOST_DEVICE Float4_e2m1fn_x2(float low, float high)
      : bits(static_cast<uint8_t>(pack(low) | pack(high) << 4)) {}
  OPKIT_HOST_DEVICE float low() const { return unpack(bits & 15u); }
  OPKIT_HOST_DEVICE float high() const { return unpack(bits >> 4); }

 private:
  OPKIT_HOST_DEVICE static uint32_t pack(float value) {
    const uint32_t u = number::bits_of(value);
    const uint32_t finite = number::round_to<1, 1>(u & 0x7fffffffu);
    return (u >> 28 & 8u) | (finite > 7u ? 7u : finite);
  }
  OPKIT_HOST_DEVICE static float unpack(uint32_t nibble) {
    return number::float_of((nibble & 8u) << 28 | number::widen<1, 1>(nibble & 7u));
  }
};

// torch's complex64 and complex128, `Complex<float>` and `Complex<double>`.
template <class T>
struct alignas(2 * sizeof(T)) Complex {
  T real, imag;
  Complex() = default;
  OPKIT_HOST_DEVICE Complex(T re, T im = T(0)) : real(re), imag(im) {}
  OPKIT_HOST_DEVICE friend Complex operator+(Complex a, Complex b) {
    return {a.real + b.real, a.imag + b.imag};
  }
  OPKIT_HOST_DEVICE friend Complex operator-(Complex a, Complex b) {
    return {a.real - b.real, a.imag - b.imag};
  }
  OPKIT_HOST_DEVICE friend Complex operator-(Complex a) { return {-a.real, -a.imag}; }
  OPKIT_HOST_DEVICE friend Complex operator*(Complex a, Complex b) {
    return {a.real * b.real - a.imag * b.imag, a.real * b.imag + a.imag * b.real};
  }
  OPKIT_HOST_DEVICE friend Complex operator/(Complex a, Complex b) {  // without overflow of |b|^2
    const T re = b.real < 0 ? -b.real : b.real, im = b.imag < 0 ? -b.imag : b.imag;
    const T scale = re < im ? im : re, c = b.real / scale, d = b.imag / scale;
    const T norm = c * b.real + d * b.imag;
    return {(a.real * c + a.imag * d) / norm, (a.imag * c - a.real * d) / norm};
  }
  OPKIT_HOST_DEVICE friend bool operator==(Complex a, Complex b) {
    return a.real == b.real && a.imag == b.imag;
  }
  OPKIT_HOST_DEVICE friend bool operator!=(Complex a, Complex b) { return !(a == b); }
  OPKIT_HOST_DEVICE friend Complex conj(Complex a) { return {a.real, -a.imag}; }
};

}  // namespace opkit

// What opkit's CPU kernels share: row buffers, and an exponential that the compiler can vectorise.
#pragma once

#include <opkit_kernels/wide.h>

namespace opkit_kernels {

// Memory of one thread, without initialising it.
template <class T>
class Buffer {
 public:
  explicit Buffer(int64_t count) : data_(count > 0 ? new T[count] : nullptr) {}
  ~Buffer() { delete[] data_; }
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;
  T* data() const { return data_; }

 private:
  T* data_;
};

// A small argument that every row needs, such as a weight, as one contiguous array of A. None stands for `count` times
// `value`.
template <class A>
class Widened {
 public:
  explicit Widened(const opkit::Tensor& x, int64_t count = 0, A value = A(0))
      : buffer_(!x                    ? count
                : is_such_an_array(x) ? 0
                                      : x.numel()),
        data_(buffer_.data()) {
    A* out = buffer_.data();
    if (!x) {
      for (int64_t i = 0; i < count; ++i) out[i] = value;
    } else if (!out) {
      data_ = x.numel() ? x.data<A>() : nullptr;
    } else {
      dispatch_floating(x, [&](auto zero) {
        const opkit::Elements<decltype(zero)> in(x);
        for (int64_t i = 0, n = x.numel(); i < n; ++i) out[i] = A(in[i]);
      });
    }
  }
  const A* data() const { return data_; }

 private:
  static bool is_such_an_array(const opkit::Tensor& x) {
    return x.dtype() == opkit::DTypeOf<A>::value && x.is_contiguous();
  }
  Buffer<A> buffer_;
  const A* data_;
};

// How many rows of n elements are worth a thread of their own.
inline int64_t row_grain(int64_t n) { return n < 16384 ? 16384 / (n > 0 ? n : 1) : 1; }

// e^x within 1 ulp, also where the result is subnormal, overflows, or x is not a number: no branch and no table, so
// that a loop over it becomes vector code. x = k ln 2 + r, e^x = 2^k e^r, with e^r as a polynomial of |r| <= ln 2
// / 2. Adding 1.5 * 2^23 rounds to the integer k and leaves it in the low bits; 2^k is applied in two halves because
// it alone may overflow or be subnormal.
inline float fast_exp(float x) {
  x = x > 100.0f ? 100.0f : x;  // not a number stays what it is: the comparison is false
  x = x < -110.0f ? -110.0f : x;
  const float magic = 12582912.0f;
  union {
    float f;
    uint32_t u;
  } shifted{x * 1.44269504089f + magic};
  const float k = shifted.f - magic;
  const int32_t power =
      static_cast<int32_t>(shifted.u - 0x4b400000u);  // garbage where x is not a number
  float r = x - k * 0.693359375f;                     // exact: the constant has 9 bits
  r = r - k * -2.12194440e-4f;
  float p = 1.9875691500e-4f;  // Cephes expf, Moshier 1984
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * (r * r) + r + 1.0f;
  const uint32_t half = static_cast<uint32_t>(power >> 1),
                 rest = static_cast<uint32_t>(power) - half;
  union {
    uint32_t u;
    float f;
  } first{(half + 127u) << 23}, second{(rest + 127u) << 23};
  return p * first.f * second.f;
}

// The same in double, with the Taylor polynomial of degree 13, which is off by less than 2^-58 there.
inline double fast_exp(double x) {
  x = x > 720.0 ? 720.0 : x;
  x = x < -760.0 ? -760.0 : x;
  const double magic = 6755399441055744.0;
  union {
    double f;
    uint64_t u;
  } shifted{x * 1.4426950408889634 + magic};
  const double k = shifted.f - magic;
  const int64_t power = static_cast<int64_t>(shifted.u - 0x4338000000000000u);
  double r = x - k * 6.93145751953125e-1;
  r = r - k * 1.42860682030941723212e-6;
  double p = 1.0 / 6227020800.0;
  p = p * r + 1.0 / 479001600.0;
  p = p * r + 1.0 / 39916800.0;
  p = p * r + 1.0 / 3628800.0;
  p = p * r + 1.0 / 362880.0;
  p = p * r + 1.0 / 40320.0;
  p = p * r + 1.0 / 5040.0;
  p = p * r + 1.0 / 720.0;
  p = p * r + 1.0 / 120.0;
  p = p * r + 1.0 / 24.0;
  p = p * r + 1.0 / 6.0;
  p = p * r + 0.5;
  p = p * (r * r) + r + 1.0;
  const uint64_t half = static_cast<uint64_t>(power >> 1),
                 rest = static_cast<uint64_t>(power) - half;
  union {
    uint64_t u;
    double f;
  } first{(half + 1023u) << 52}, second{(rest + 1023u) << 52};
  return p * first.f * second.f;
}

}  // namespace opkit_kernels

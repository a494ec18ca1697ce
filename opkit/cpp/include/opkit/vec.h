// Several neighbouring elements as one value.
#pragma once

#include <opkit/number.h>

namespace opkit {

// N elements that move by one load or store where the address is a multiple of their size (up to 16 bytes on CUDA), and
// that compute element by element: vector code on the CPU.
//     using V = opkit::Vec<opkit::BFloat16, 8>;
//     for (int64_t i = 0; i + V::size <= n; i += V::size) {
//       const auto wide = V::load_unaligned(in + i).to<float>();
//       (wide * wide + 1.0f).to<opkit::BFloat16>().store_unaligned(out + i);
//     }
template <class T, int N>
struct alignas(N * sizeof(T)) Vec {
  static_assert(N > 0 && (N & (N - 1)) == 0, "the number of elements must be a power of two");
  static constexpr int size = N;
  T at[N];

  Vec() = default;
  OPKIT_HOST_DEVICE Vec(T value) {
    for (int k = 0; k < N; ++k) at[k] = value;
  }
  OPKIT_HOST_DEVICE T& operator[](int k) { return at[k]; }
  OPKIT_HOST_DEVICE const T& operator[](int k) const { return at[k]; }

  // Whether `load` and `store` may be used there.
  OPKIT_HOST_DEVICE static bool is_aligned(const void* data) {
    return reinterpret_cast<uintptr_t>(data) % alignof(Vec) == 0;
  }
  OPKIT_HOST_DEVICE static Vec load(const T* data) { return *reinterpret_cast<const Vec*>(data); }
  OPKIT_HOST_DEVICE void store(T* data) const { *reinterpret_cast<Vec*>(data) = *this; }
  OPKIT_HOST_DEVICE static Vec load_unaligned(const T* data) {
    Vec v;
#if defined(__CUDA_ARCH__)
    for (int k = 0; k < N; ++k) v.at[k] = data[k];
#else
    __builtin_memcpy(v.at, data, sizeof(v.at));
#endif
    return v;
  }
  OPKIT_HOST_DEVICE void store_unaligned(T* data) const {
#if defined(__CUDA_ARCH__)
    for (int k = 0; k < N; ++k) data[k] = at[k];
#else
    __builtin_memcpy(data, at, sizeof(at));
#endif
  }

  // Each element converted, as `.to<float>()` to compute in and `.to<opkit::Half>()` to store.
  template <class U>
  OPKIT_HOST_DEVICE Vec<U, N> to() const {
    Vec<U, N> v;
    for (int k = 0; k < N; ++k) v.at[k] = static_cast<U>(at[k]);
    return v;
  }
  // Each element through a function: v.map([](float x) { return x > 0 ? x : 0; }).
  template <class Function>
  OPKIT_HOST_DEVICE Vec map(const Function& function) const {
    Vec v;
    for (int k = 0; k < N; ++k) v.at[k] = function(at[k]);
    return v;
  }
  OPKIT_HOST_DEVICE T sum() const {
    T total = at[0];
    for (int k = 1; k < N; ++k) total = total + at[k];
    return total;
  }

  OPKIT_HOST_DEVICE friend Vec operator+(const Vec& a, const Vec& b) {
    Vec v;
    for (int k = 0; k < N; ++k) v.at[k] = a.at[k] + b.at[k];
    return v;
  }
  OPKIT_HOST_DEVICE friend Vec operator-(const Vec& a, const Vec& b) {
    Vec v;
    for (int k = 0; k < N; ++k) v.at[k] = a.at[k] - b.at[k];
    return v;
  }
  OPKIT_HOST_DEVICE friend Vec operator*(const Vec& a, const Vec& b) {
    Vec v;
    for (int k = 0; k < N; ++k) v.at[k] = a.at[k] * b.at[k];
    return v;
  }
  OPKIT_HOST_DEVICE friend Vec operator/(const Vec& a, const Vec& b) {
    Vec v;
    for (int k = 0; k < N; ++k) v.at[k] = a.at[k] / b.at[k];
    return v;
  }
};

}  // namespace opkit

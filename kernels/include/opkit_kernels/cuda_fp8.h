// What opkit's CUDA kernels that quantise share.
#pragma once

#include <opkit_kernels/cuda_rows.h>
#include <opkit_kernels/fp8.h>

namespace opkit_kernels {

template <class T>
__device__ uint32_t largest_of(const Pack<T>& x) {
  uint32_t largest = 0;
#pragma unroll
  for (int k = 0; k < Pack<T>::kSize; ++k) largest = max(largest, magnitude(float(x.at[k])));
  return largest;
}

__device__ inline uint32_t warp_max(uint32_t value) {
  for (int offset = 16; offset > 0; offset /= 2)
    value = max(value, __shfl_xor_sync(0xffffffffu, value, offset));
  return value;
}

__device__ inline uint32_t block_max(uint32_t value) {
  return block_reduce(value, 0u, [](uint32_t a, uint32_t b) { return max(a, b); });
}

// Elements i and following of n, in row-major order; zero past the end.
template <class T>
__device__ Pack<T> load_pack(const opkit::Elements<T>& in, int64_t i, int64_t n) {
  constexpr int kSize = Pack<T>::kSize;
  if (in.is_contiguous() && i + kSize <= n && is_aligned(&in[i]))
    return *reinterpret_cast<const Pack<T>*>(&in[i]);
  Pack<T> pack;
  in_turn(pack.at, [&](int k, T& x) { x = i + k < n ? in[i + k] : T(0); });
  return pack;
}

// q[i] and following of n, from x times the inverse of the scale.
template <class X, int N>
__device__ void store_fp8_values(const X (&x)[N], float inverse, opkit::Float8_e4m3fn* q, int64_t i,
                                 int64_t n) {
  using V = opkit::Vec<opkit::Float8_e4m3fn, N>;
  V v;
#pragma unroll
  for (int k = 0; k < N; ++k) v.at[k] = opkit::Float8_e4m3fn(float(x[k]) * inverse);
  if (i + N <= n && V::is_aligned(q + i)) return v.store(q + i);
  in_turn(v.at, [&](int k, opkit::Float8_e4m3fn& value) {
    if (i + k < n) q[i + k] = value;
  });
}
template <class T>
__device__ void store_fp8(const Pack<T>& x, float inverse, opkit::Float8_e4m3fn* q, int64_t i,
                          int64_t n) {
  store_fp8_values(x.at, inverse, q, i, n);
}

}  // namespace opkit_kernels

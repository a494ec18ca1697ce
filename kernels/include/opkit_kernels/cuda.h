// What opkit's CUDA kernels share: 16-byte loads and stores of rows, and reductions over a block.
#pragma once

#include <opkit_kernels/wide.h>

namespace opkit_kernels {

// Several neighbouring elements, moved by one instruction where they lie right.
template <class T>
struct alignas(16) Pack {
  static constexpr int kSize = 16 / sizeof(T);
  T at[kSize];
};

// Call body(k, element) for k below N, one after the other, where `element` refers to x[k]. As x is in registers, which
// have no index, each turn selects among them all: slow, and in few registers, for what is rare beside a fast path.
template <int N, class T, class Body>
__device__ void in_turn(T (&x)[N], const Body& body) {
#pragma unroll 1
  for (int k = 0; k < N; ++k) {
    T own = x[0];
#pragma unroll
    for (int j = 1; j < N; ++j) own = j == k ? x[j] : own;
    body(k, own);
#pragma unroll
    for (int j = 0; j < N; ++j) x[j] = j == k ? own : x[j];
  }
}

template <class T>
__device__ bool is_aligned(const T* data) {
  return reinterpret_cast<uintptr_t>(data) % alignof(Pack<T>) == 0;
}

// A row of n elements to read, `step` apart. All threads of a block see the same row.
template <class T>
struct Row {
  const T* data;
  int64_t step, n;
  bool packed;

  __device__ Row(const T* data, int64_t step, int64_t n)
      : data(data), step(step), n(n), packed(step == 1 && is_aligned(data)) {}
  // Elements i and following; i is a multiple of the size of a pack. What lies past the end is `past`.
  __device__ Pack<T> load(int64_t i, T past = T(0)) const {
    if (packed && i + Pack<T>::kSize <= n) return *reinterpret_cast<const Pack<T>*>(data + i);
    Pack<T> pack;
    in_turn(pack.at, [&](int k, T& x) { x = i + k < n ? data[(i + k) * step] : past; });
    return pack;
  }
};

// The same for a contiguous row to write.
template <class T>
struct OutRow {
  T* data;
  int64_t n;
  bool packed;

  __device__ OutRow(T* data, int64_t n) : data(data), n(n), packed(is_aligned(data)) {}
  __device__ void store(int64_t i, Pack<T> pack) const {
    if (packed && i + Pack<T>::kSize <= n) {
      *reinterpret_cast<Pack<T>*>(data + i) = pack;
      return;
    }
    in_turn(pack.at, [&](int k, T& x) {
      if (i + k < n) data[i + k] = x;
    });
  }
};

// Threads for rows of n elements: one per pack, whole warps. Kernels launched with them are bounded by kRowThreads,
// or the compiler could give a thread more registers than a full block has.
constexpr int kRowThreads = 512;

template <class T>
unsigned row_threads(int64_t n) {
  const int64_t packs = (n + Pack<T>::kSize - 1) / Pack<T>::kSize;
  return packs >= kRowThreads ? kRowThreads : static_cast<unsigned>((packs + 31) / 32 * 32);
}

// Combine one value per thread of the block, in an order that never changes; every thread gets the result.
template <class A, class Combine>
__device__ A block_reduce(A value, A neutral, Combine combine) {
  __shared__ A warps[32];
  for (int offset = 16; offset > 0; offset /= 2)
    value = combine(value, __shfl_xor_sync(0xffffffffu, value, offset));
  const unsigned lane = threadIdx.x % 32;
  __syncthreads();  // the last reduction's results have been read
  if (lane == 0) warps[threadIdx.x / 32] = value;
  __syncthreads();
  value = lane < blockDim.x / 32 ? warps[lane] : neutral;
  for (int offset = 16; offset > 0; offset /= 2)
    value = combine(value, __shfl_xor_sync(0xffffffffu, value, offset));
  return value;
}

template <class A>
__device__ A block_sum(A value) {
  return block_reduce(value, A(0), [](A a, A b) { return a + b; });
}

}  // namespace opkit_kernels

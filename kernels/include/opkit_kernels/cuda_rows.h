// What opkit's CUDA kernels over rows share: rows that stay in registers, values per column, sums over rows.
#pragma once

#include <opkit_kernels/cuda.h>

#include <optional>

namespace opkit_kernels {

// A thread's packs of a row, every blockDim.x-th: in registers, so that the row is read once, or with kPacks = 0, for
// rows of any length, read again each time.
template <class T, int kPacks>
class Held {
 public:
  static constexpr int kSize = Pack<T>::kSize;

  __device__ explicit Held(const Row<T>& row) : row_(row) {
#pragma unroll
    for (int p = 0; p < kPacks; ++p) packs_[p] = row.load(start(p));
  }
  // The p-th pack, which begins at element i.
  __device__ Pack<T> at(int p, int64_t i) const {
    if constexpr (kPacks > 0)
      return packs_[p];
    else
      return row_.load(i);
  }
  // Call body(p, i, pack) for every pack of the thread, from element i on.
  template <class Body>
  __device__ void each(const Body& body) const {
    if constexpr (kPacks > 0) {
#pragma unroll
      for (int p = 0; p < kPacks; ++p)
        if (start(p) < row_.n) body(p, start(p), packs_[p]);
    } else {
      for (int64_t i = start(0); i < row_.n; i += int64_t(blockDim.x) * kSize)
        body(0, i, row_.load(i));
    }
  }

 private:
  __device__ static int64_t start(int p) { return (threadIdx.x + int64_t(p) * blockDim.x) * kSize; }
  Row<T> row_;
  Pack<T> packs_[kPacks > 0 ? kPacks : 1];
};

// Call body(packs, threads) with how many packs of rows of n elements a thread holds, as a type's `value`.
template <int N>
struct Count {
  static constexpr int value = N;
};
template <class T, class Body>
void with_held(int64_t n, const Body& body) {
  const int64_t packs = (n + Pack<T>::kSize - 1) / Pack<T>::kSize;
  const auto warps = [](int64_t threads) {
    return threads > 0 ? static_cast<unsigned>((threads + 31) / 32 * 32) : 32u;
  };
  if (packs <= 2 * kRowThreads) return body(Count<2>(), warps((packs + 1) / 2));
  body(Count<0>(), unsigned(kRowThreads));
}

// Add up N values per thread over the block, in an order that never changes; every thread gets the results.
template <int N, class A>
__device__ void block_sums(A (&values)[N]) {
  __shared__ A warps[N][32];
#pragma unroll
  for (int j = 0; j < N; ++j)
    for (int offset = 16; offset > 0; offset /= 2)
      values[j] += __shfl_xor_sync(0xffffffffu, values[j], offset);
  const unsigned lane = threadIdx.x % 32;
  __syncthreads();  // the last sums have been read
#pragma unroll
  for (int j = 0; j < N; ++j)
    if (lane == 0) warps[j][threadIdx.x / 32] = values[j];
  __syncthreads();
#pragma unroll
  for (int j = 0; j < N; ++j) {
    values[j] = lane < blockDim.x / 32 ? warps[j][lane] : A(0);
    for (int offset = 16; offset > 0; offset /= 2)
      values[j] += __shfl_xor_sync(0xffffffffu, values[j], offset);
  }
}

// One value per column, of type W; none, where there is no data.
template <class W>
struct Columns {
  const W* data;
  int64_t step;

  // Elements i and following of n, as A; `absent` where there is no data.
  template <int N, class A>
  __device__ void load(int64_t i, int64_t n, A absent, A (&out)[N]) const {
    constexpr int kEach = 16 / sizeof(W) < N ? 16 / sizeof(W) : N;
    using V = opkit::Vec<W, kEach>;
    if (!data) {
#pragma unroll
      for (int k = 0; k < N; ++k) out[k] = absent;
    } else if (step == 1 && i + N <= n && V::is_aligned(data)) {
#pragma unroll
      for (int k = 0; k < N; k += kEach) {
        const V some = V::load(data + i + k);
#pragma unroll
        for (int j = 0; j < kEach; ++j) out[k + j] = A(some[j]);
      }
    } else {
      in_turn(out, [&](int k, A& x) { x = i + k < n ? A(data[(i + k) * step]) : absent; });
    }
  }
  template <class A>
  __device__ A at(int64_t i, A absent) const {
    return data ? A(data[i * step]) : absent;
  }
};

template <class T, class W>
__global__ void convert(opkit::Elements<T> in, W* out, int64_t n) {
  const int64_t i = int64_t(blockIdx.x) * blockDim.x + threadIdx.x;
  if (i < n) out[i] = W(in[i]);
}

// An argument with a value per column, which may be None, in type W: as it is, or converted.
template <class W>
class ColumnsOf {
 public:
  explicit ColumnsOf(const opkit::Tensor& x) {
    if (!x || x.numel() == 0) return;
    if (x.dtype() == opkit::DTypeOf<W>::value) {
      columns_ = {x.data<W>(), x.stride(0)};
      return;
    }
    const int64_t n = x.numel();
    converted_.emplace(n, x.device());
    dispatch_floating(x, [&](auto zero) {
      using From = decltype(zero);
      convert<<<static_cast<unsigned>((n + 255) / 256), 256, 0, opkit::stream()>>>(
          opkit::Elements<From>(x), converted_->data(), n);
      OPKIT_CUDA_CHECK(cudaGetLastError());
    });
    columns_ = {converted_->data(), 1};
  }
  Columns<W> get() const { return columns_; }

 private:
  Columns<W> columns_{nullptr, 1};
  std::optional<opkit::Scratch<W>> converted_;
};

// Call body(W{}) with the type to read weights in beside an x of T: T where all that are there have it, else Wide<T>.
template <class T, class Body>
void with_column_type(const opkit::Tensor& weight, const opkit::Tensor& bias, const Body& body) {
  const auto is_t = [](const opkit::Tensor& x) {
    return !x || x.dtype() == opkit::DTypeOf<T>::value;
  };
  if (is_t(weight) && is_t(bias)) return body(T{});
  body(Wide<T>{});
}

// Rows in blocks that add into sums of their own; the shape alone decides, so that a result is the same on every
// device. Of long rows a block has work enough, and its sums are long.
struct SumBlocks {
  int64_t rows, each, count;
  SumBlocks(int64_t rows, int64_t n)
      : rows(rows), each((rows + most(n) - 1) / most(n)),
        count(rows ? (rows + each - 1) / each : 0) {}
  static int64_t most(int64_t n) { return n > 2048 ? 264 : 528; }
};

// A block's sums per column: of the thread's own packs in registers, or with kPacks = 0 in memory. No two threads meet
// in a column.
template <class A, int kSize, int kPacks>
class ColumnSums {
 public:
  __device__ ColumnSums(A* memory, int64_t n) : memory_(memory), n_(n) {
    if constexpr (kPacks > 0) {
#pragma unroll
      for (int p = 0; p < kPacks; ++p)
#pragma unroll
        for (int k = 0; k < kSize; ++k) held_[p][k] = 0;
    } else {
      for (int64_t i = threadIdx.x * kSize; i < n; i += int64_t(blockDim.x) * kSize)
        for (int k = 0; k < kSize && i + k < n; ++k) memory[i + k] = 0;
    }
  }
  // Add to column i + k, which is in the p-th pack.
  __device__ void add(int p, int64_t i, int k, A value) {
    if constexpr (kPacks > 0)
      held_[p][k] += value;
    else if (i + k < n_)
      memory_[i + k] += value;
  }
  __device__ void store() const {
    if constexpr (kPacks > 0) {
#pragma unroll
      for (int p = 0; p < kPacks; ++p) {
        const int64_t i = (threadIdx.x + int64_t(p) * blockDim.x) * kSize;
#pragma unroll
        for (int k = 0; k < kSize; ++k)
          if (i + k < n_) memory_[i + k] = held_[p][k];
      }
    }
  }

 private:
  A held_[kPacks > 0 ? kPacks : 1][kSize];
  A* memory_;
  int64_t n_;
};

// out[i] = sum over the blocks of partial[block, i]: a warp's width of columns per block, every thread a share of the
// blocks, and the shares in their order.
template <class A, class T>
__global__ void __launch_bounds__(512)
    add_partial(const A* partial, int64_t blocks, int64_t n, T* out) {
  __shared__ A shares[16][33];
  const int64_t i = blockIdx.x * int64_t(32) + threadIdx.x;
  A sum = 0;
  if (i < n)
    for (int64_t b = threadIdx.y; b < blocks; b += 16) sum += partial[b * n + i];
  shares[threadIdx.y][threadIdx.x] = sum;
  __syncthreads();
  if (threadIdx.y > 0 || i >= n) return;
  for (int share = 1; share < 16; ++share) sum += shares[share][threadIdx.x];
  out[i] = T(Wide<T>(sum));
}

template <class A>
void add_blocks(const A* partial, int64_t blocks, int64_t n, const opkit::Tensor& out) {
  if (n == 0) return;
  dispatch_floating(out, [&](auto zero) {
    using T = decltype(zero);
    add_partial<<<static_cast<unsigned>((n + 31) / 32), dim3(32, 16), 0, opkit::stream()>>>(
        partial, blocks, n, out.data<T>());
    OPKIT_CUDA_CHECK(cudaGetLastError());
  });
}

inline unsigned blocks_of_rows(int64_t rows) {
  OPKIT_CHECK(rows <= INT32_MAX, rows, " rows are more than a grid has blocks; expected at most ",
              INT32_MAX);
  return static_cast<unsigned>(rows);
}

template <class T>
__global__ void fill(T* out, int64_t n, T value) {
  const int64_t i = int64_t(blockIdx.x) * blockDim.x + threadIdx.x;
  if (i < n) out[i] = value;
}

// What statistics of rows without elements are.
inline void fill_nan(const opkit::Tensor& out) {
  if (out.numel() == 0) return;
  fill<<<static_cast<unsigned>((out.numel() + 255) / 256), 256, 0, opkit::stream()>>>(
      out.data<float>(), out.numel(), __builtin_nanf(""));
  OPKIT_CUDA_CHECK(cudaGetLastError());
}

}  // namespace opkit_kernels

// Normalising planes on CUDA: x is [samples, channels, ...], and a plane is one channel of one sample. First every
// plane's statistics, then those of what is normalised together are joined, then every element.
#pragma once

#include <opkit_kernels/cuda_rows.h>

namespace opkit_kernels {

struct Planes {
  int64_t samples, channels, inner = 1;

  explicit Planes(const opkit::Tensor& x) : samples(x.size(0)), channels(x.size(1)) {
    for (int64_t d = 2; d < x.dim(); ++d) inner *= x.size(d);
  }
  OPKIT_HOST_DEVICE int64_t count() const { return samples * channels; }
  OPKIT_HOST_DEVICE int64_t numel() const { return count() * inner; }
};

// Count, mean and squared deviations of x, and sums of g and of g (x - mean), for some elements; two of them make one
// for all of both (Chan, Golub and LeVeque, "Algorithms for computing the sample variance", 1983).
template <class A>
struct Stats {
  A count, mean, squares, grad, dot;

  __device__ static Stats none() { return {0, 0, 0, 0, 0}; }

  __device__ void join(const Stats& other) {
    const A all = count + other.count;
    if (!(all > 0)) return;
    const A apart = other.mean - mean, share = other.count / all;
    // g (x - mean) with the new mean, which lies apart * share from the one mean, and the rest from the other.
    dot += other.dot - grad * (apart * share) + other.grad * (apart * (1 - share));
    squares += other.squares + apart * apart * (count * share);
    mean += apart * share;
    grad += other.grad;
    count = all;
  }
  __device__ Stats shuffled(int offset) const {
    Stats s;
    s.count = __shfl_xor_sync(0xffffffffu, count, offset);
    s.mean = __shfl_xor_sync(0xffffffffu, mean, offset);
    s.squares = __shfl_xor_sync(0xffffffffu, squares, offset);
    s.grad = __shfl_xor_sync(0xffffffffu, grad, offset);
    s.dot = __shfl_xor_sync(0xffffffffu, dot, offset);
    return s;
  }
  __device__ A rstd(A eps) const { return 1 / sqrt(squares / count + eps); }
};

// The statistics of `n` elements beside each other.
template <class A, int N>
__device__ Stats<A> stats_of(const A (&x)[N], const A (&g)[N], int64_t n) {
  Stats<A> s = Stats<A>::none();
  s.count = n < N ? A(n) : A(N);
#pragma unroll
  for (int k = 0; k < N; ++k) s.mean += k < n ? x[k] : A(0);
  s.mean /= s.count;
#pragma unroll
  for (int k = 0; k < N; ++k) {
    const A d = k < n ? x[k] - s.mean : A(0), grad = k < n ? g[k] : A(0);
    s.squares += d * d;
    s.grad += grad;
    s.dot += grad * d;
  }
  return s;
}

// Pack i of a tensor's elements in row-major order, widened; zero past the end.
template <class T>
__device__ void load_wide(const opkit::Elements<T>& in, int64_t i, int64_t n,
                          Wide<T> (&out)[Pack<T>::kSize]) {
  constexpr int kSize = Pack<T>::kSize;
  if (in.is_contiguous() && i + kSize <= n && is_aligned(&in[i])) {
    const Pack<T> pack = *reinterpret_cast<const Pack<T>*>(&in[i]);
#pragma unroll
    for (int k = 0; k < kSize; ++k) out[k] = Wide<T>(pack.at[k]);
    return;
  }
  in_turn(out, [&](int k, Wide<T>& x) { x = i + k < n ? Wide<T>(in[i + k]) : Wide<T>(0); });
}

constexpr int kPlaneThreads = 256;

// A warp (kWarps of them in a block) or, with kWarps = 1, a whole block for each plane. Without gradients, g counts as
// zero.
template <class T, bool kGradients, int kWarps>
__global__ void __launch_bounds__(kPlaneThreads)
    plane_stats(opkit::Elements<T> xs, opkit::Elements<T> grads, Planes of, Stats<Wide<T>>* out) {
  using A = Wide<T>;
  constexpr int kSize = Pack<T>::kSize, kThreads = kPlaneThreads / kWarps;
  const int64_t plane = blockIdx.x * int64_t(kWarps) + threadIdx.x / kThreads;
  const int lane = threadIdx.x % kThreads;
  const int64_t begin = plane * of.inner, end = begin + of.inner;
  Stats<A> own = Stats<A>::none();
  if (plane < of.count())
    for (int64_t i = begin + int64_t(lane) * kSize; i < end; i += int64_t(kThreads) * kSize) {
      A x[kSize], g[kSize] = {};
      load_wide(xs, i, end, x);
      if constexpr (kGradients) load_wide(grads, i, end, g);
      own.join(stats_of(x, g, end - i));
    }
  for (int offset = 1; offset < 32; offset *= 2) own.join(own.shuffled(offset));
  if constexpr (kWarps > 1) {
    if (lane == 0 && plane < of.count()) out[plane] = own;
  } else {
    __shared__ Stats<A> warps[kPlaneThreads / 32];
    if (threadIdx.x % 32 == 0) warps[threadIdx.x / 32] = own;
    __syncthreads();
    if (threadIdx.x > 0) return;
    for (int w = 1; w < kPlaneThreads / 32; ++w) own.join(warps[w]);
    out[plane] = own;
  }
}

// Where a plane is one element: a block's rows, column by column, as the statistics of planes of that many elements.
template <class T, bool kGradients>
__global__ void __launch_bounds__(512)
    column_stats(opkit::Elements<T> xs, opkit::Elements<T> grads, SumBlocks blocks, int64_t n,
                 Stats<Wide<T>>* out) {
  using A = Wide<T>;
  __shared__ Stats<A> shares[16][33];
  const int64_t i = blockIdx.x * int64_t(32) + threadIdx.x, begin = blockIdx.y * blocks.each,
                end = begin + blocks.each < blocks.rows ? begin + blocks.each : blocks.rows;
  Stats<A> own = Stats<A>::none();
  if (i < n)
    for (int64_t r = begin + threadIdx.y; r < end; r += 16) {
      const A x[1] = {A(xs[r * n + i])};
      A g[1] = {0};
      if constexpr (kGradients) g[0] = A(grads[r * n + i]);
      own.join(stats_of(x, g, 1));
    }
  shares[threadIdx.y][threadIdx.x] = own;
  __syncthreads();
  if (threadIdx.y > 0 || i >= n) return;
  for (int share = 1; share < 16; ++share) own.join(shares[share][threadIdx.x]);
  out[blockIdx.y * n + i] = own;
}

// The statistics of all planes, `samples` times the channels of them.
template <class T>
class PlaneStats {
 public:
  using A = Wide<T>;
  // `grad` may be None.
  PlaneStats(const Planes& of, const opkit::Tensor& x, const opkit::Tensor& grad, bool rows)
      : blocks_(of.samples, of.channels), samples(rows ? blocks_.count : of.samples),
        memory_(samples * of.channels * (sizeof(Stats<A>) / sizeof(A)), x.device()) {
    if (of.numel() == 0) return;
    const opkit::Elements<T> xs(x), grads(grad ? grad : x);
    if (rows) {
      const dim3 grid(static_cast<unsigned>((of.channels + 31) / 32),
                      static_cast<unsigned>(samples));
      const auto kernel = grad ? column_stats<T, true> : column_stats<T, false>;
      kernel<<<grid, dim3(32, 16), 0, opkit::stream()>>>(xs, grads, blocks_, of.channels, data());
    } else if (of.inner >= 1024) {
      const auto kernel = grad ? plane_stats<T, true, 1> : plane_stats<T, false, 1>;
      kernel<<<blocks_of_rows(of.count()), kPlaneThreads, 0, opkit::stream()>>>(xs, grads, of,
                                                                                data());
    } else {
      const auto kernel = grad ? plane_stats<T, true, 8> : plane_stats<T, false, 8>;
      kernel<<<blocks_of_rows((of.count() + 7) / 8), kPlaneThreads, 0, opkit::stream()>>>(
          xs, grads, of, data());
    }
    OPKIT_CUDA_CHECK(cudaGetLastError());
  }
  Stats<A>* data() const { return reinterpret_cast<Stats<A>*>(memory_.data()); }

 private:
  SumBlocks blocks_;

 public:
  const int64_t samples;

 private:
  opkit::Scratch<A> memory_;
};

// With a set of these for each plane, or for each channel: y = (x - centre) scale + level, and
// grad_x = (g weight - level - (x - centre) slope) scale.
template <class A>
struct Line {
  A centre, scale, level, slope, weight;
};

template <class T, bool kGradients>
__global__ void __launch_bounds__(256)
    apply(opkit::Elements<T> xs, opkit::Elements<T> grads, const Line<Wide<T>>* lines,
          int64_t period, int64_t inner, int64_t n, T* y) {
  using A = Wide<T>;
  constexpr int kSize = Pack<T>::kSize;
  const int64_t i = (blockIdx.x * int64_t(256) + threadIdx.x) * kSize;
  if (i >= n) return;
  A x[kSize], g[kSize];
  load_wide(xs, i, n, x);
  if constexpr (kGradients) load_wide(grads, i, n, g);
  // A division of 64 bits takes as long as a few loads.
  int64_t plane = n <= UINT32_MAX ? uint32_t(i) / uint32_t(inner) : i / inner;
  int64_t left = inner - (i - plane * inner);
  plane = plane <= UINT32_MAX ? uint32_t(plane) % uint32_t(period) : plane % period;
  Line<A> line = lines[plane];
  Pack<T> result;
#pragma unroll
  for (int k = 0; k < kSize; ++k) {
    if (left == 0) {
      left = inner;
      plane = plane + 1 == period ? 0 : plane + 1;
      line = lines[plane];
    }
    --left;
    const A d = x[k] - line.centre;
    if constexpr (kGradients)
      result.at[k] = T((g[k] * line.weight - line.level - d * line.slope) * line.scale);
    else
      result.at[k] = T(d * line.scale + line.level);
  }
  OutRow<T>(y, n).store(i, result);
}

// `grad` may be None.
template <class T>
void apply_lines(const opkit::Tensor& x, const opkit::Tensor& grad, const Line<Wide<T>>* lines,
                 int64_t period, int64_t inner, const opkit::Tensor& y) {
  const int64_t n = y.numel(), each = int64_t(256) * Pack<T>::kSize;
  if (n == 0) return;
  const auto kernel = grad ? apply<T, true> : apply<T, false>;
  kernel<<<blocks_of_rows((n + each - 1) / each), 256, 0, opkit::stream()>>>(
      opkit::Elements<T>(x), opkit::Elements<T>(grad ? grad : x), lines, period, inner, n,
      y.data<T>());
  OPKIT_CUDA_CHECK(cudaGetLastError());
}

}  // namespace opkit_kernels

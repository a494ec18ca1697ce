#include <opkit/kernel.h>
#include <opkit_kernels/cuda.h>
#include "parameter.h"

using namespace opkit_kernels;

constexpr int kThreads = 256;
constexpr int kMost = 64;          // parameters of a launch, whose argument has at most 4 KiB
constexpr int64_t kChunk = 16384;  // elements of a block

// Parameters that lie flat in memory, as many as fit, and the blocks for each: those up to its end.
template <class P, class M>
struct Batch {
  P* params[kMost];
  const P* grads[kMost];
  M *exp_avgs[kMost], *exp_avg_sqs[kMost];
  int64_t numels[kMost];
  unsigned ends[kMost];
  int count = 0;

  unsigned blocks() const { return count ? ends[count - 1] : 0; }
  void add(const Parameter& one) {
    params[count] = one.param.data<P>();
    grads[count] = one.grad.data<P>();
    exp_avgs[count] = one.exp_avg.data<M>();
    exp_avg_sqs[count] = one.exp_avg_sq.data<M>();
    numels[count] = one.param.numel();
    ends[count] = blocks() + static_cast<unsigned>((numels[count] + kChunk - 1) / kChunk);
    ++count;
  }
};

// `N` neighbouring elements, converted.
template <int N, class A, class T>
__device__ void read(const T* from, A (&to)[N], bool packed, int64_t count) {
  if (packed) {
#pragma unroll
    for (int i = 0; i < N; i += Pack<T>::kSize) {
      const Pack<T> pack = *reinterpret_cast<const Pack<T>*>(from + i);
#pragma unroll
      for (int k = 0; k < Pack<T>::kSize; ++k) to[i + k] = A(pack.at[k]);
    }
  } else {
#pragma unroll
    for (int i = 0; i < N; ++i) to[i] = i < count ? A(from[i]) : A(0);
  }
}

template <int N, class A, class T>
__device__ void write(T* to, const A (&from)[N], bool packed, int64_t count) {
  if (packed) {
#pragma unroll
    for (int i = 0; i < N; i += Pack<T>::kSize) {
      Pack<T> pack;
#pragma unroll
      for (int k = 0; k < Pack<T>::kSize; ++k) pack.at[k] = T(from[i + k]);
      *reinterpret_cast<Pack<T>*>(to + i) = pack;
    }
  } else {
#pragma unroll
    for (int i = 0; i < N; ++i)
      if (i < count) to[i] = T(from[i]);
  }
}

template <class P, class M>
__global__ void __launch_bounds__(kThreads)
    step_batch(const __grid_constant__ Batch<P, M> batch, Step<Wide<P>> numbers) {
  using A = Wide<P>;
  constexpr int N = Pack<P>::kSize > Pack<M>::kSize ? Pack<P>::kSize : Pack<M>::kSize;
  int t = 0;
  for (int past = batch.count - 1; t < past;) {  // the first parameter that ends after this block
    const int middle = (t + past) / 2;
    if (batch.ends[middle] > blockIdx.x)
      past = middle;
    else
      t = middle + 1;
  }
  const int64_t begin = int64_t(blockIdx.x - (t ? batch.ends[t - 1] : 0)) * kChunk;
  const int64_t n = batch.numels[t], end = begin + kChunk < n ? begin + kChunk : n;
  P* const params = batch.params[t];
  const P* const grads = batch.grads[t];
  M *const exp_avgs = batch.exp_avgs[t], *const exp_avg_sqs = batch.exp_avg_sqs[t];
  const bool aligned =
      is_aligned(params) && is_aligned(grads) && is_aligned(exp_avgs) && is_aligned(exp_avg_sqs);
  for (int64_t i = begin + threadIdx.x * N; i < end; i += kThreads * N) {
    const bool packed = aligned && i + N <= n;
    A p[N], g[N], m[N], v[N];
    read(params + i, p, packed, n - i);
    read(grads + i, g, packed, n - i);
    read(exp_avgs + i, m, packed, n - i);
    read(exp_avg_sqs + i, v, packed, n - i);
#pragma unroll
    for (int k = 0; k < N; ++k) numbers.apply(p[k], g[k], m[k], v[k]);
    write(params + i, p, packed, n - i);
    write(exp_avgs + i, m, packed, n - i);
    write(exp_avg_sqs + i, v, packed, n - i);
  }
}

// A parameter whose tensors lie differently, an element for each thread.
template <class P, class M>
__global__ void __launch_bounds__(kThreads)
    step_strided(opkit::Elements<P> params, opkit::Elements<P> grads, opkit::Elements<M> exp_avgs,
                 opkit::Elements<M> exp_avg_sqs, int64_t n, Step<Wide<P>> numbers) {
  using A = Wide<P>;
  const int64_t i = int64_t(blockIdx.x) * kThreads + threadIdx.x;
  if (i >= n) return;
  A p = A(params[i]), m = A(exp_avgs[i]), v = A(exp_avg_sqs[i]);
  numbers.apply(p, A(grads[i]), m, v);
  const_cast<P&>(params[i]) = P(p);
  const_cast<M&>(exp_avgs[i]) = M(m);
  const_cast<M&>(exp_avg_sqs[i]) = M(v);
}

template <class P, class M>
void launch_strided(const Parameter& one, const Step<Wide<P>>& numbers) {
  const int64_t n = one.param.numel(), blocks = (n + kThreads - 1) / kThreads;
  OPKIT_CHECK(blocks <= INT32_MAX, "a parameter of ", n,
              " elements whose tensors lie differently; expected the same strides in all four");
  step_strided<<<static_cast<unsigned>(blocks), kThreads, 0, opkit::stream()>>>(
      opkit::Elements<P>(one.param), opkit::Elements<P>(one.grad), opkit::Elements<M>(one.exp_avg),
      opkit::Elements<M>(one.exp_avg_sq), n, numbers);
  OPKIT_CUDA_CHECK(cudaGetLastError());
}

// Those of all parameters that have these types.
template <class P, class M>
void launch(const Parameters& all, const Step<Wide<P>>& numbers) {
  Batch<P, M> batch;
  const auto flush = [&] {
    if (batch.count == 0) return;
    step_batch<<<batch.blocks(), kThreads, 0, opkit::stream()>>>(batch, numbers);
    OPKIT_CUDA_CHECK(cudaGetLastError());
    batch.count = 0;
  };
  for (int64_t t = 0; t < all.size(); ++t) {
    const Parameter one = all[t];
    if (one.param.numel() == 0 || one.param.dtype() != opkit::DTypeOf<P>::value ||
        one.exp_avg.dtype() != opkit::DTypeOf<M>::value)
      continue;
    if (!one.is_flat()) {
      launch_strided<P, M>(one, numbers);
      continue;
    }
    batch.add(one);
    if (batch.count == kMost) flush();
  }
  flush();
}

void adamw_step(opkit::Span<opkit::Tensor> params, opkit::Span<opkit::Tensor> grads,
                opkit::Span<opkit::Tensor> exp_avgs, opkit::Span<opkit::Tensor> exp_avg_sqs,
                double lr, opkit::Span<double> betas, double eps, double weight_decay,
                int64_t step) {
  const Parameters all(params, grads, exp_avgs, exp_avg_sqs, step);
  const Step<float> numbers(lr, betas, eps, weight_decay, step);
  launch<float, float>(all, numbers);
  launch<double, double>(all, Step<double>(lr, betas, eps, weight_decay, step));
  launch<opkit::Half, opkit::Half>(all, numbers);
  launch<opkit::Half, float>(all, numbers);
  launch<opkit::BFloat16, opkit::BFloat16>(all, numbers);
  launch<opkit::BFloat16, float>(all, numbers);
}

// The kernel of 04_cuda_kernel.py: one block of threads computes one row.
#include <opkit/kernel.h>

constexpr int kThreads = 256, kWarps = kThreads / 32;

// The sum of every thread's value, in every thread of the block.
__device__ float sum_of_block(float value) {
  __shared__ float warps[kWarps];
  __syncthreads();  // all have read the sum of the call before
  for (int step = 16; step > 0; step /= 2) value += __shfl_xor_sync(0xffffffff, value, step);
  if (threadIdx.x % 32 == 0) warps[threadIdx.x / 32] = value;
  __syncthreads();
  float sum = 0;
  for (int i = 0; i < kWarps; ++i) sum += warps[i];
  return sum;
}

template <class T>
__global__ void normalize(opkit::Elements<T> x, T* y, float* norm, int64_t n, float eps) {
  const int64_t row = blockIdx.x;
  float squares = 0;
  for (int64_t i = threadIdx.x; i < n; i += kThreads) {
    const float value = x[row * n + i];
    squares += value * value;
  }
  const float length = sqrtf(sum_of_block(squares));
  const float scale = 1 / fmaxf(length, eps);
  for (int64_t i = threadIdx.x; i < n; i += kThreads)
    y[row * n + i] = T(float(x[row * n + i]) * scale);
  if (threadIdx.x == 0) norm[row] = length;
}

// Plain C++ again: inputs, then outputs, which are allocated. The device of x is the current one already.
void l2_normalize(opkit::Tensor x, double eps, opkit::Tensor y, opkit::Tensor norm) {
  const int64_t rows = norm.numel();
  if (rows == 0) return;  // CUDA refuses an empty grid
  opkit::dispatch<float, opkit::Half, opkit::BFloat16>(x.dtype(), [&](auto zero) {
    using T = decltype(zero);
    normalize<T><<<rows, kThreads, 0, opkit::stream()>>>(
        opkit::Elements<T>(x), y.data<T>(), norm.data<float>(), x.size(-1), float(eps));
    OPKIT_CUDA_CHECK(cudaGetLastError());
  });
}

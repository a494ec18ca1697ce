#include <opkit/kernel.h>
#include <opkit_kernels/cuda_fp8.h>

using namespace opkit_kernels;

constexpr int kThreads = 256;
constexpr int64_t kReaders = 2112;  // blocks that look for the largest of all

// A group of threads, a warp or the whole block, for each group of elements, which it reads twice: the second time from
// the cache.
template <class T, int kWarps>
__global__ void __launch_bounds__(kThreads)
    grouped(opkit::Elements<T> xs, int64_t step, int64_t count, int64_t n, int64_t each,
            int64_t per_row, opkit::Float8_e4m3fn* q, float* scales) {
  constexpr int kSize = Pack<T>::kSize, kTeam = kThreads / kWarps;
  const int64_t group = blockIdx.x * int64_t(kWarps) + threadIdx.x / kTeam;
  const int lane = threadIdx.x % kTeam;
  const int64_t start = group % per_row * each, first = group / per_row * n + start;
  const int64_t width = group < count ? (n - start < each ? n - start : each) : 0;
  const Row<T> row(width > 0 ? &xs[first] : nullptr, step, width);
  uint32_t largest = 0;
  for (int64_t i = int64_t(lane) * kSize; i < width; i += int64_t(kTeam) * kSize)
    largest = max(largest, largest_of(row.load(i)));
  largest = kWarps > 1 ? warp_max(largest) : block_max(largest);
  if (width == 0 && !(group < count)) return;
  const float scale = scale_of(largest), inverse = 1 / scale;
  if (lane == 0) scales[group] = scale;
  for (int64_t i = int64_t(lane) * kSize; i < width; i += int64_t(kTeam) * kSize)
    store_fp8(row.load(i), inverse, q + first, i, width);
}

template <class T>
__global__ void __launch_bounds__(kThreads)
    largest_of_all(opkit::Elements<T> xs, int64_t n, unsigned* largest) {
  constexpr int kSize = Pack<T>::kSize;
  uint32_t own = 0;
  for (int64_t i = (blockIdx.x * int64_t(kThreads) + threadIdx.x) * kSize; i < n;
       i += int64_t(gridDim.x) * kThreads * kSize)
    own = max(own, largest_of(load_pack(xs, i, n)));
  own = block_max(own);
  if (threadIdx.x == 0) atomicMax(largest, own);  // in whatever order, the result is the same
}

template <class T>
__global__ void __launch_bounds__(kThreads)
    quantise_all(opkit::Elements<T> xs, int64_t n, const unsigned* largest, opkit::Float8_e4m3fn* q,
                 float* scale) {
  constexpr int kSize = Pack<T>::kSize;
  const float own = scale_of(*largest), inverse = 1 / own;
  const int64_t i = (blockIdx.x * int64_t(kThreads) + threadIdx.x) * kSize;
  if (i == 0) *scale = own;
  if (i < n) store_fp8(load_pack(xs, i, n), inverse, q, i, n);
}

template <class T>
void whole(const opkit::Tensor& x, opkit::Float8_e4m3fn* q, float* scale) {
  const opkit::Elements<T> xs(x);
  const opkit::Scratch<int32_t> memory(1, x.device());
  auto* largest = reinterpret_cast<unsigned*>(memory.data());
  OPKIT_CUDA_CHECK(cudaMemsetAsync(largest, 0, sizeof(unsigned), opkit::stream()));
  const int64_t n = x.numel(), each = int64_t(kThreads) * Pack<T>::kSize;
  const int64_t blocks = n > each ? (n + each - 1) / each : 1;
  const unsigned readers = static_cast<unsigned>(blocks < kReaders ? blocks : kReaders);
  largest_of_all<<<readers, kThreads, 0, opkit::stream()>>>(xs, n, largest);
  OPKIT_CUDA_CHECK(cudaGetLastError());
  quantise_all<<<blocks_of_rows(blocks), kThreads, 0, opkit::stream()>>>(xs, n, largest, q, scale);
  OPKIT_CUDA_CHECK(cudaGetLastError());
}

void quant_fp8(opkit::Tensor x, opkit::Optional<int64_t> group, opkit::Tensor q,
               opkit::Tensor scale) {
  auto* to = q.data<opkit::Float8_e4m3fn>();
  float* scales = scale.data<float>();
  dispatch_floating(x, [&](auto zero) {
    using T = decltype(zero);
    if (!group) return whole<T>(x, to, scales);
    const int64_t n = x.size(-1), each = *group < 0 || *group > n ? n : *group;
    const int64_t count = scale.numel();
    if (count == 0) return;
    const opkit::Elements<T> xs(x);
    const bool warps = each <= 1024;
    const auto kernel = warps ? grouped<T, kThreads / 32> : grouped<T, 1>;
    const int64_t per_block = warps ? kThreads / 32 : 1;
    kernel<<<blocks_of_rows((count + per_block - 1) / per_block), kThreads, 0, opkit::stream()>>>(
        xs, x.stride(-1), count, n, each, scale.size(-1), to, scales);
    OPKIT_CUDA_CHECK(cudaGetLastError());
  });
}

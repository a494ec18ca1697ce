#include <opkit/kernel.h>
#include <opkit_kernels/cuda_fp8.h>

using namespace opkit_kernels;

// A block per row.
template <class T, class W, int kPacks>
__global__ void __launch_bounds__(kRowThreads)
    forward(opkit::Elements<T> xs, int64_t step, Columns<W> weight, float eps,
            opkit::Float8_e4m3fn* q, float* scales, float* rstd, int64_t n) {
  constexpr int kSize = Pack<T>::kSize;
  const int64_t r = blockIdx.x;
  const Held<T, kPacks> row(Row<T>(&xs[r * n], step, n));
  float squares[1] = {0};
  row.each([&](int, int64_t, const Pack<T>& x) {
#pragma unroll
    for (int k = 0; k < kSize; ++k) squares[0] += float(x.at[k]) * float(x.at[k]);
  });
  block_sums(squares);
  const float factor = 1 / sqrtf(squares[0] / float(n) + eps);
  const auto normalised = [&](int64_t i, const Pack<T>& x, float (&y)[kSize]) {
    float w[kSize];
    weight.load(i, n, 1.0f, w);
#pragma unroll
    for (int k = 0; k < kSize; ++k) y[k] = i + k < n ? float(x.at[k]) * factor * w[k] : 0.0f;
  };
  uint32_t largest = 0;
  row.each([&](int, int64_t i, const Pack<T>& x) {
    float y[kSize];
    normalised(i, x, y);
#pragma unroll
    for (int k = 0; k < kSize; ++k) largest = max(largest, magnitude(y[k]));
  });
  largest = block_max(largest);
  const float scale = scale_of(largest), inverse = 1 / scale;
  if (threadIdx.x == 0) {
    rstd[r] = factor;
    scales[r] = scale;
  }
  row.each([&](int, int64_t i, const Pack<T>& x) {
    float y[kSize];
    normalised(i, x, y);
    store_fp8_values(y, inverse, q + r * n, i, n);
  });
}

void rms_norm_quant(opkit::Tensor x, opkit::Tensor weight, double eps, opkit::Tensor q,
                    opkit::Tensor scale, opkit::Tensor rstd) {
  const int64_t n = x.size(-1), rows = rstd.numel();
  if (rows == 0) return;
  dispatch_floating(x, [&](auto zero) {
    using T = decltype(zero);
    const auto run = [&](auto column) {
      using W = decltype(column);
      const ColumnsOf<W> weights(weight);
      with_held<T>(n, [&](auto packs, unsigned threads) {
        const int64_t step = n == 0 ? 1 : x.stride(-1);
        forward<T, W, decltype(packs)::value>
            <<<blocks_of_rows(rows), threads, 0, opkit::stream()>>>(
                opkit::Elements<T>(x), step, weights.get(), float(eps),
                q.data<opkit::Float8_e4m3fn>(), scale.data<float>(), rstd.data<float>(), n);
        OPKIT_CUDA_CHECK(cudaGetLastError());
      });
    };
    weight.dtype() == opkit::DTypeOf<T>::value ? run(T{}) : run(float{});
  });
}

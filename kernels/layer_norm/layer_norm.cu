#include <opkit/kernel.h>
#include <opkit_kernels/cuda_rows.h>

using namespace opkit_kernels;

// A block per row.
template <class T, class W, int kPacks>
__global__ void __launch_bounds__(kRowThreads)
    forward(opkit::Elements<T> xs, int64_t step, Columns<W> weight, Columns<W> bias, Wide<T> eps,
            T* y, float* mean, float* rstd, int64_t n) {
  using A = Wide<T>;
  constexpr int kSize = Pack<T>::kSize;
  const int64_t r = blockIdx.x;
  const Held<T, kPacks> row(Row<T>(&xs[r * n], step, n));
  A sum[1] = {0};
  row.each([&](int, int64_t, const Pack<T>& x) {
#pragma unroll
    for (int k = 0; k < kSize; ++k) sum[0] += A(x.at[k]);  // what lies past the end is zero
  });
  block_sums(sum);
  const A centre = sum[0] / A(n);
  A squares[1] = {0};
  row.each([&](int, int64_t i, const Pack<T>& x) {
#pragma unroll
    for (int k = 0; k < kSize; ++k) {
      const A d = i + k < n ? A(x.at[k]) - centre : A(0);
      squares[0] += d * d;
    }
  });
  block_sums(squares);
  const A scale = 1 / sqrt(squares[0] / A(n) + eps);
  if (threadIdx.x == 0) {
    mean[r] = float(centre);
    rstd[r] = float(scale);
  }
  const OutRow<T> out(y + r * n, n);
  row.each([&](int, int64_t i, const Pack<T>& x) {
    A w[kSize], b[kSize];
    weight.load(i, n, A(1), w);
    bias.load(i, n, A(0), b);
    Pack<T> result;
#pragma unroll
    for (int k = 0; k < kSize; ++k) result.at[k] = T((A(x.at[k]) - centre) * scale * w[k] + b[k]);
    out.store(i, result);
  });
}

void layer_norm(opkit::Tensor x, opkit::Tensor weight, opkit::Tensor bias, double eps,
                opkit::Tensor y, opkit::Tensor mean, opkit::Tensor rstd) {
  const int64_t n = x.size(-1), rows = rstd.numel();
  if (n == 0) {
    fill_nan(mean);
    fill_nan(rstd);
  }
  if (n == 0 || rows == 0) return;
  dispatch_floating(x, [&](auto zero) {
    using T = decltype(zero);
    with_column_type<T>(weight, bias, [&](auto column) {
      using W = decltype(column);
      const ColumnsOf<W> weights(weight), biases(bias);
      with_held<T>(n, [&](auto packs, unsigned threads) {
        forward<T, W, decltype(packs)::value>
            <<<blocks_of_rows(rows), threads, 0, opkit::stream()>>>(
                opkit::Elements<T>(x), x.stride(-1), weights.get(), biases.get(), Wide<T>(eps),
                y.data<T>(), mean.data<float>(), rstd.data<float>(), n);
        OPKIT_CUDA_CHECK(cudaGetLastError());
      });
    });
  });
}

// A block for every `each` rows, which adds their share of grad_weight and grad_bias into sums of its own.
template <class T, class W, int kPacks>
__global__ void __launch_bounds__(kRowThreads)
    backward(opkit::Elements<T> grads, int64_t grad_step, opkit::Elements<T> xs, int64_t step,
             Columns<W> weight, Wide<T> eps, T* grad_x, Wide<T>* for_weight, Wide<T>* for_bias,
             SumBlocks blocks, int64_t n) {
  using A = Wide<T>;
  constexpr int kSize = Pack<T>::kSize;
  ColumnSums<A, kSize, kPacks> weight_sums(for_weight + blockIdx.x * n, n),
      bias_sums(for_bias + blockIdx.x * n, n);
  const int64_t begin = blockIdx.x * blocks.each,
                end = begin + blocks.each < blocks.rows ? begin + blocks.each : blocks.rows;
  for (int64_t r = begin; r < end; ++r) {
    const Held<T, kPacks> row(Row<T>(&xs[r * n], step, n));
    const Held<T, kPacks> grad(Row<T>(&grads[r * n], grad_step, n));
    A sums[2] = {0, 0};  // of x and of g w
    row.each([&](int p, int64_t i, const Pack<T>& x) {
      const Pack<T> g = grad.at(p, i);
      A w[kSize];
      weight.load(i, n, A(1), w);
#pragma unroll
      for (int k = 0; k < kSize; ++k) {
        sums[0] += A(x.at[k]);
        sums[1] += A(g.at[k]) * w[k];
      }
    });
    block_sums(sums);
    const A centre = sums[0] / A(n), level = sums[1] / A(n);
    A totals[2] = {0, 0};  // of (x - mean)^2 and of g w (x - mean)
    row.each([&](int p, int64_t i, const Pack<T>& x) {
      const Pack<T> g = grad.at(p, i);
      A w[kSize];
      weight.load(i, n, A(1), w);
#pragma unroll
      for (int k = 0; k < kSize; ++k) {
        const A d = i + k < n ? A(x.at[k]) - centre : A(0);
        totals[0] += d * d;
        totals[1] += A(g.at[k]) * w[k] * d;
      }
    });
    block_sums(totals);
    const A scale = n > 1 ? 1 / sqrt(totals[0] / A(n) + eps) : A(0);  // one element is its bias
    const A slope = totals[1] * scale * scale / A(n);
    const OutRow<T> out(grad_x + r * n, n);
    row.each([&](int p, int64_t i, const Pack<T>& x) {
      const Pack<T> g = grad.at(p, i);
      A w[kSize];
      weight.load(i, n, A(1), w);
      Pack<T> result;
#pragma unroll
      for (int k = 0; k < kSize; ++k) {
        const A d = A(x.at[k]) - centre;
        result.at[k] = T(scale * (A(g.at[k]) * w[k] - level - d * slope));
        weight_sums.add(p, i, k, A(g.at[k]) * (d * scale));
        bias_sums.add(p, i, k, A(g.at[k]));
      }
      out.store(i, result);
    });
  }
  weight_sums.store();
  bias_sums.store();
}

void layer_norm_backward(opkit::Tensor grad_y, opkit::Tensor x, opkit::Tensor weight,
                         opkit::Tensor /*bias*/, double eps, opkit::Tensor grad_x,
                         opkit::Tensor grad_weight, opkit::Tensor grad_bias) {
  const int64_t n = x.size(-1), rows = n ? x.numel() / n : 0;
  if (n == 0) return;
  dispatch_floating(x, [&](auto zero) {
    using T = decltype(zero);
    using A = Wide<T>;
    const SumBlocks blocks(rows, n);
    const opkit::Scratch<A> partial(2 * blocks.count * n, x.device());
    A* const for_bias = partial.data() + blocks.count * n;
    with_column_type<T>(weight, opkit::Tensor(), [&](auto column) {
      using W = decltype(column);
      const ColumnsOf<W> weights(weight);
      with_held<T>(n, [&](auto packs, unsigned threads) {
        if (rows == 0) return;
        backward<T, W, decltype(packs)::value>
            <<<static_cast<unsigned>(blocks.count), threads, 0, opkit::stream()>>>(
                opkit::Elements<T>(grad_y), grad_y.stride(-1), opkit::Elements<T>(x), x.stride(-1),
                weights.get(), A(eps), grad_x.data<T>(), partial.data(), for_bias, blocks, n);
        OPKIT_CUDA_CHECK(cudaGetLastError());
      });
    });
    add_blocks<A>(partial.data(), blocks.count, n, grad_weight);
    add_blocks<A>(for_bias, blocks.count, n, grad_bias);
  });
}

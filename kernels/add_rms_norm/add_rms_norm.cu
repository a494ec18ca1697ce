#include <opkit/kernel.h>
#include <opkit_kernels/cuda_rows.h>

using namespace opkit_kernels;

// A block per row. Of a row too long for the registers, each thread reads again the sums that it has written.
template <class T, class W, int kPacks>
__global__ void __launch_bounds__(kRowThreads)
    forward(opkit::Elements<T> xs, int64_t step, opkit::Elements<T> residuals, int64_t other_step,
            Columns<W> weight, Wide<T> eps, T* y, T* sum, float* rstd, int64_t n) {
  using A = Wide<T>;
  constexpr int kSize = Pack<T>::kSize;
  const int64_t r = blockIdx.x;
  const Held<T, kPacks> row(Row<T>(&xs[r * n], step, n));
  const Held<T, kPacks> other(Row<T>(&residuals[r * n], other_step, n));
  const OutRow<T> total(sum + r * n, n), out(y + r * n, n);
  Pack<T> totals[kPacks > 0 ? kPacks : 1];
  A squares[1] = {0};
  row.each([&](int p, int64_t i, const Pack<T>& x) {
    const Pack<T> residual = other.at(p, i);
    Pack<T> both;
#pragma unroll
    for (int k = 0; k < kSize; ++k) {
      both.at[k] = T(A(x.at[k]) + A(residual.at[k]));
      squares[0] += A(both.at[k]) * A(both.at[k]);
    }
    total.store(i, both);
    totals[p] = both;
  });
  block_sums(squares);
  const A scale = 1 / sqrt(squares[0] / A(n) + eps);
  if (threadIdx.x == 0) rstd[r] = float(scale);
  const Row<T> written(sum + r * n, 1, n);
  row.each([&](int p, int64_t i, const Pack<T>&) {
    const Pack<T> both = kPacks > 0 ? totals[p] : written.load(i);
    A w[kSize];
    weight.load(i, n, A(1), w);
    Pack<T> result;
#pragma unroll
    for (int k = 0; k < kSize; ++k) result.at[k] = T(A(both.at[k]) * scale * w[k]);
    out.store(i, result);
  });
}

void add_rms_norm(opkit::Tensor x, opkit::Tensor residual, opkit::Tensor weight, double eps,
                  opkit::Tensor y, opkit::Tensor sum, opkit::Tensor rstd) {
  const int64_t n = x.size(-1), rows = rstd.numel();
  if (n == 0) fill_nan(rstd);
  if (n == 0 || rows == 0) return;
  dispatch_floating(x, [&](auto zero) {
    using T = decltype(zero);
    with_column_type<T>(weight, opkit::Tensor(), [&](auto column) {
      using W = decltype(column);
      const ColumnsOf<W> weights(weight);
      with_held<T>(n, [&](auto packs, unsigned threads) {
        forward<T, W, decltype(packs)::value>
            <<<blocks_of_rows(rows), threads, 0, opkit::stream()>>>(
                opkit::Elements<T>(x), x.stride(-1), opkit::Elements<T>(residual),
                residual.stride(-1), weights.get(), Wide<T>(eps), y.data<T>(), sum.data<T>(),
                rstd.data<float>(), n);
        OPKIT_CUDA_CHECK(cudaGetLastError());
      });
    });
  });
}

// A block for every `each` rows, which adds their share of grad_weight into sums of its own.
template <class T, class W, int kPacks>
__global__ void __launch_bounds__(kRowThreads)
    backward(opkit::Elements<T> grads, int64_t grad_step, opkit::Elements<T> others,
             int64_t other_step, opkit::Elements<T> xs, int64_t step, Columns<W> weight,
             Wide<T> eps, T* grad_sum, Wide<T>* partial, SumBlocks blocks, int64_t n) {
  using A = Wide<T>;
  constexpr int kSize = Pack<T>::kSize;
  ColumnSums<A, kSize, kPacks> sums(partial + blockIdx.x * n, n);
  const int64_t begin = blockIdx.x * blocks.each,
                end = begin + blocks.each < blocks.rows ? begin + blocks.each : blocks.rows;
  for (int64_t r = begin; r < end; ++r) {
    const Held<T, kPacks> row(Row<T>(&xs[r * n], step, n));
    const Held<T, kPacks> grad(Row<T>(&grads[r * n], grad_step, n));
    const Held<T, kPacks> other(Row<T>(&others[r * n], other_step, n));
    A totals[2] = {0, 0};  // of x^2 and of g w x
    row.each([&](int p, int64_t i, const Pack<T>& x) {
      const Pack<T> g = grad.at(p, i);
      A w[kSize];
      weight.load(i, n, A(1), w);
#pragma unroll
      for (int k = 0; k < kSize; ++k) {
        totals[0] += A(x.at[k]) * A(x.at[k]);
        totals[1] += A(g.at[k]) * w[k] * A(x.at[k]);
      }
    });
    block_sums(totals);
    const A scale = 1 / sqrt(totals[0] / A(n) + eps);
    const A shift = totals[1] * scale * scale / A(n);
    const OutRow<T> out(grad_sum + r * n, n);
    row.each([&](int p, int64_t i, const Pack<T>& x) {
      const Pack<T> g = grad.at(p, i), besides = other.at(p, i);
      A w[kSize];
      weight.load(i, n, A(1), w);
      Pack<T> result;
#pragma unroll
      for (int k = 0; k < kSize; ++k) {
        const A a = A(x.at[k]), d = A(g.at[k]);
        result.at[k] = T(A(besides.at[k]) + scale * (d * w[k] - a * shift));
        sums.add(p, i, k, d * (a * scale));
      }
      out.store(i, result);
    });
  }
  sums.store();
}

void add_rms_norm_backward(opkit::Tensor grad_y, opkit::Tensor grad_sum, opkit::Tensor sum,
                           opkit::Tensor weight, double eps, opkit::Tensor grad,
                           opkit::Tensor grad_weight) {
  const int64_t n = sum.size(-1), rows = n ? sum.numel() / n : 0;
  if (n == 0) return;
  dispatch_floating(sum, [&](auto zero) {
    using T = decltype(zero);
    using A = Wide<T>;
    const SumBlocks blocks(rows, n);
    const opkit::Scratch<A> partial(blocks.count * n, sum.device());
    with_column_type<T>(weight, opkit::Tensor(), [&](auto column) {
      using W = decltype(column);
      const ColumnsOf<W> weights(weight);
      with_held<T>(n, [&](auto packs, unsigned threads) {
        if (rows == 0) return;
        backward<T, W, decltype(packs)::value>
            <<<static_cast<unsigned>(blocks.count), threads, 0, opkit::stream()>>>(
                opkit::Elements<T>(grad_y), grad_y.stride(-1), opkit::Elements<T>(grad_sum),
                grad_sum.stride(-1), opkit::Elements<T>(sum), sum.stride(-1), weights.get(), A(eps),
                grad.data<T>(), partial.data(), blocks, n);
        OPKIT_CUDA_CHECK(cudaGetLastError());
      });
    });
    add_blocks<A>(partial.data(), blocks.count, n, grad_weight);
  });
}

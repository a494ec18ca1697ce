#include <math.h>
#include <opkit/kernel.h>
#include <opkit_kernels/sums.h>

using namespace opkit_kernels;

void layer_norm(opkit::Tensor x, opkit::Tensor weight, opkit::Tensor bias, double eps,
                opkit::Tensor y, opkit::Tensor mean, opkit::Tensor rstd) {
  dispatch_floating(x, [&](auto zero) {
    using T = decltype(zero);
    using A = Wide<T>;
    const int64_t n = x.size(-1);
    const opkit::Elements<T> xs(x);
    const Widened<A> weights(weight, n, 1), biases(bias, n, 0);
    const A *w = weights.data(), *shift = biases.data();
    T* ys = y.data<T>();
    float *means = mean.data<float>(), *rstds = rstd.data<float>();
    opkit::parallel_for(0, rstd.numel(), row_grain(n), [&](int64_t begin, int64_t end) {
      const Buffer<T> gathered(xs.is_contiguous() ? 0 : n);
      for (int64_t r = begin; r < end; ++r) {
        const T* row = xs.read(r * n, n, gathered.data());
        Moments moments;
        moments.add(row, n);
        const A centre = A(moments.mean), scale = A(1 / sqrt(moments.variance() + eps));
        means[r] = float(moments.average());
        rstds[r] = float(scale);
        T* out = ys + r * n;
#pragma GCC ivdep
        for (int64_t i = 0; i < n; ++i) out[i] = T((A(row[i]) - centre) * scale * w[i] + shift[i]);
      }
    });
  });
}

// With d = x - near, where the true mean is near + shift: all sums in one pass, then
// grad_x = rstd (g w - mean(g w) - xhat mean(g w xhat)), xhat = (d - shift) rstd.
void layer_norm_backward(opkit::Tensor grad_y, opkit::Tensor x, opkit::Tensor weight,
                         opkit::Tensor /*bias*/, double eps, opkit::Tensor grad_x,
                         opkit::Tensor grad_weight, opkit::Tensor grad_bias) {
  dispatch_floating(x, [&](auto zero) {
    using T = decltype(zero);
    using A = Wide<T>;
    const int64_t n = x.size(-1), rows = n ? x.numel() / n : 0;
    const opkit::Elements<T> xs(x), grads(grad_y);
    const Widened<A> weights(weight, n, 1);
    const A* w = weights.data();
    T* grad_xs = grad_x.data<T>();

    const RowBlocks blocks(rows);
    const Buffer<A> weight_sums(blocks.count * n), bias_sums(blocks.count * n);
    opkit::parallel_for(
        0, blocks.count, 1 + row_grain(n) / blocks.each, [&](int64_t from, int64_t to) {
          const Buffer<T> x_row(xs.is_contiguous() ? 0 : n),
              grad_row(grads.is_contiguous() ? 0 : n);
          for (int64_t b = from; b < to; ++b) {
            A *for_weight = weight_sums.data() + b * n, *for_bias = bias_sums.data() + b * n;
#pragma GCC ivdep
            for (int64_t i = 0; i < n; ++i) for_weight[i] = for_bias[i] = 0;
            for (int64_t r = blocks.begin(b); r < blocks.end(b); ++r) {
              const T* row = xs.read(r * n, n, x_row.data());
              const T* g = grads.read(r * n, n, grad_row.data());
              const A near = near_mean(row, n);
              GradientSums sums;
              sums.add(row, n, near, [g, w](int64_t i) { return A(g[i]) * w[i]; });
              const double count = double(n);
              const double factor = n > 1 ? sums.rstd(count, eps) : 0;  // one element is its bias
              const A centre = A(double(near) + sums.d / count), scale = A(factor);
              const A level = A(sums.grad / count),
                      slope = A(sums.centred(count) * factor * factor / count);
              T* out = grad_xs + r * n;
#pragma GCC ivdep
              for (int64_t i = 0; i < n; ++i) {
                const A d = A(row[i]) - centre;
                out[i] = T(scale * (A(g[i]) * w[i] - level - d * slope));
                for_weight[i] += A(g[i]) * (d * scale);
                for_bias[i] += A(g[i]);
              }
            }
          }
        });
    add_blocks(weight_sums.data(), blocks.count, n, grad_weight);
    add_blocks(bias_sums.data(), blocks.count, n, grad_bias);
  });
}

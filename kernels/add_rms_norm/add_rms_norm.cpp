#include <math.h>
#include <opkit/kernel.h>
#include <opkit_kernels/sums.h>

using namespace opkit_kernels;

void add_rms_norm(opkit::Tensor x, opkit::Tensor residual, opkit::Tensor weight, double eps,
                  opkit::Tensor y, opkit::Tensor sum, opkit::Tensor rstd) {
  dispatch_floating(x, [&](auto zero) {
    using T = decltype(zero);
    using A = Wide<T>;
    const int64_t n = x.size(-1);
    const opkit::Elements<T> xs(x), residuals(residual);
    const Widened<A> weights(weight);
    const A* w = weights.data();
    T *ys = y.data<T>(), *totals = sum.data<T>();
    float* rstds = rstd.data<float>();
    opkit::parallel_for(0, rstd.numel(), row_grain(n), [&](int64_t begin, int64_t end) {
      const Buffer<T> x_row(xs.is_contiguous() ? 0 : n), r_row(residuals.is_contiguous() ? 0 : n);
      for (int64_t r = begin; r < end; ++r) {
        const T* row = xs.read(r * n, n, x_row.data());
        const T* other = residuals.read(r * n, n, r_row.data());
        T *total = totals + r * n, *out = ys + r * n;
#pragma GCC ivdep
        for (int64_t i = 0; i < n; ++i) total[i] = T(A(row[i]) + A(other[i]));
        A squares = 0;
#pragma omp simd reduction(+ : squares)
        for (int64_t i = 0; i < n; ++i) squares += A(total[i]) * A(total[i]);
        const A scale = A(1 / sqrt(double(squares) / double(n) + eps));
        rstds[r] = float(scale);
#pragma GCC ivdep
        for (int64_t i = 0; i < n; ++i) out[i] = T(A(total[i]) * scale * w[i]);
      }
    });
  });
}

// grad = grad_sum + rstd (g w - xhat mean(g w xhat)) and grad_weight = sum over rows of g xhat, xhat = sum rstd.
void add_rms_norm_backward(opkit::Tensor grad_y, opkit::Tensor grad_sum, opkit::Tensor sum,
                           opkit::Tensor weight, double eps, opkit::Tensor grad,
                           opkit::Tensor grad_weight) {
  dispatch_floating(sum, [&](auto zero) {
    using T = decltype(zero);
    using A = Wide<T>;
    const int64_t n = sum.size(-1), rows = n ? sum.numel() / n : 0;
    const opkit::Elements<T> xs(sum), grads(grad_y), others(grad_sum);
    const Widened<A> weights(weight);
    const A* w = weights.data();
    T* outs = grad.data<T>();

    const RowBlocks blocks(rows);
    const Buffer<A> partial(blocks.count * n);
    opkit::parallel_for(
        0, blocks.count, 1 + row_grain(n) / blocks.each, [&](int64_t from, int64_t to) {
          const Buffer<T> x_row(xs.is_contiguous() ? 0 : n),
              grad_row(grads.is_contiguous() ? 0 : n), other_row(others.is_contiguous() ? 0 : n);
          for (int64_t b = from; b < to; ++b) {
            A* sums = partial.data() + b * n;
#pragma GCC ivdep
            for (int64_t i = 0; i < n; ++i) sums[i] = 0;
            for (int64_t r = blocks.begin(b); r < blocks.end(b); ++r) {
              const T* row = xs.read(r * n, n, x_row.data());
              const T* g = grads.read(r * n, n, grad_row.data());
              const T* other = others.read(r * n, n, other_row.data());
              A squares = 0, dot = 0;
#pragma omp simd reduction(+ : squares, dot)
              for (int64_t i = 0; i < n; ++i) {
                squares += A(row[i]) * A(row[i]);
                dot += A(g[i]) * w[i] * A(row[i]);
              }
              const A scale = A(1 / sqrt(double(squares) / double(n) + eps));
              const A shift = dot * scale * scale / A(n);
              T* out = outs + r * n;
#pragma GCC ivdep
              for (int64_t i = 0; i < n; ++i) {
                out[i] = T(A(other[i]) + scale * (A(g[i]) * w[i] - A(row[i]) * shift));
                sums[i] += A(g[i]) * (A(row[i]) * scale);
              }
            }
          }
        });
    add_blocks(partial.data(), blocks.count, n, grad_weight);
  });
}

#include <math.h>
#include <opkit/kernel.h>
#include <opkit_kernels/sums.h>

using namespace opkit_kernels;

void rms_norm(opkit::Tensor x, opkit::Tensor weight, double eps, opkit::Tensor y,
              opkit::Tensor rstd) {
  dispatch_floating(x, [&](auto zero) {
    using T = decltype(zero);
    using A = Wide<T>;
    const int64_t n = x.size(-1);
    const opkit::Elements<T> xs(x);
    const Widened<A> weights(weight);
    const A* w = weights.data();
    T* ys = y.data<T>();
    float* rstds = rstd.data<float>();
    opkit::parallel_for(0, rstd.numel(), row_grain(n), [&](int64_t begin, int64_t end) {
      const Buffer<T> gathered(xs.is_contiguous() ? 0 : n);
      for (int64_t r = begin; r < end; ++r) {
        const T* row = xs.read(r * n, n, gathered.data());
        A squares = 0;
#pragma omp simd reduction(+ : squares)
        for (int64_t i = 0; i < n; ++i) squares += A(row[i]) * A(row[i]);
        const A scale = A(1 / sqrt(double(squares) / double(n) + eps));
        rstds[r] = float(scale);
        T* out = ys + r * n;
#pragma GCC ivdep
        for (int64_t i = 0; i < n; ++i) out[i] = T(A(row[i]) * scale * w[i]);
      }
    });
  });
}

// grad_x = rstd (g w - xhat mean(g w xhat)) and grad_weight = sum over rows of g xhat, with xhat = x rstd.
void rms_norm_backward(opkit::Tensor grad_y, opkit::Tensor x, opkit::Tensor weight, double eps,
                       opkit::Tensor grad_x, opkit::Tensor grad_weight) {
  dispatch_floating(x, [&](auto zero) {
    using T = decltype(zero);
    using A = Wide<T>;
    const int64_t n = x.size(-1), rows = n ? x.numel() / n : 0;
    const opkit::Elements<T> xs(x), grads(grad_y);
    const Widened<A> weights(weight);
    const A* w = weights.data();
    T* grad_xs = grad_x.data<T>();

    const RowBlocks blocks(rows);
    const Buffer<A> partial(blocks.count * n);
    opkit::parallel_for(0, blocks.count, 1 + row_grain(n) / blocks.each,
                        [&](int64_t from, int64_t to) {
                          const Buffer<T> x_row(xs.is_contiguous() ? 0 : n),
                              grad_row(grads.is_contiguous() ? 0 : n);
                          for (int64_t b = from; b < to; ++b) {
                            A* sums = partial.data() + b * n;
#pragma GCC ivdep
                            for (int64_t i = 0; i < n; ++i) sums[i] = 0;
                            for (int64_t r = blocks.begin(b); r < blocks.end(b); ++r) {
                              const T* row = xs.read(r * n, n, x_row.data());
                              const T* g = grads.read(r * n, n, grad_row.data());
                              A squares = 0, dot = 0;
#pragma omp simd reduction(+ : squares, dot)
                              for (int64_t i = 0; i < n; ++i) {
                                squares += A(row[i]) * A(row[i]);
                                dot += A(g[i]) * w[i] * A(row[i]);
                              }
                              const A scale = A(1 / sqrt(double(squares) / double(n) + eps));
                              const A shift = dot * scale * scale / A(n);
                              T* out = grad_xs + r * n;
#pragma GCC ivdep
                              for (int64_t i = 0; i < n; ++i) {
                                out[i] = T(scale * (A(g[i]) * w[i] - A(row[i]) * shift));
                                sums[i] += A(g[i]) * (A(row[i]) * scale);
                              }
                            }
                          }
                        });
    add_blocks(partial.data(), blocks.count, n, grad_weight);
  });
}

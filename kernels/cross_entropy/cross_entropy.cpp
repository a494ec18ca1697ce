#include <math.h>
#include <opkit/kernel.h>
#include <opkit_kernels/cpu.h>

using namespace opkit_kernels;

static int64_t checked(int64_t target, int64_t row, int64_t n) {
  OPKIT_CHECK(target >= 0 && target < n, "target ", target, " of row ", row,
              " is out of range; expected 0 <= target < ", n, ", the number of logits in a row");
  return target;
}

// lse = log sum exp(logits) and loss = lse - logits[target], row by row.
void cross_entropy(opkit::Tensor logits, opkit::Tensor target, opkit::Tensor loss,
                   opkit::Tensor lse) {
  dispatch_floating(logits, [&](auto zero) {
    using T = decltype(zero);
    using A = Wide<T>;
    const int64_t n = logits.size(-1);
    const opkit::Elements<T> xs(logits);
    const opkit::Elements<int64_t> targets(target);
    T* losses = loss.data<T>();
    double* lses = lse.data<double>();
    opkit::parallel_for(0, loss.numel(), row_grain(n), [&](int64_t begin, int64_t end) {
      const Buffer<T> gathered(xs.is_contiguous() ? 0 : n);
      for (int64_t r = begin; r < end; ++r) {
        const int64_t t = checked(targets[r], r, n);
        const T* row = xs.read(r * n, n, gathered.data());
        A top = -INFINITY;
#pragma omp simd reduction(max : top)
        for (int64_t i = 0; i < n; ++i) top = A(row[i]) > top ? A(row[i]) : top;
        if (isinf(top)) top = 0;  // inf - inf would be no number
        A sum = 0;
#pragma omp simd reduction(+ : sum)
        for (int64_t i = 0; i < n; ++i) sum += fast_exp(A(row[i]) - top);
        lses[r] = double(top) + log(double(sum));
        losses[r] = T(A(lses[r] - double(A(row[t]))));
      }
    });
  });
}

// grad_logits = (grad_loss + grad_lse) exp(logits - lse), minus grad_loss at the target.
void cross_entropy_backward(opkit::Tensor grad_loss, opkit::Tensor grad_lse, opkit::Tensor logits,
                            opkit::Tensor target, opkit::Tensor lse, opkit::Tensor grad_logits) {
  dispatch_floating(logits, [&](auto zero) {
    using T = decltype(zero);
    using A = Wide<T>;
    const int64_t n = logits.size(-1);
    const opkit::Elements<T> xs(logits), grad_losses(grad_loss);
    const opkit::Elements<double> grad_lses(grad_lse), lses(lse);
    const opkit::Elements<int64_t> targets(target);
    T* out = grad_logits.data<T>();
    opkit::parallel_for(0, lse.numel(), row_grain(n), [&](int64_t begin, int64_t end) {
      const Buffer<T> gathered(xs.is_contiguous() ? 0 : n);
      for (int64_t r = begin; r < end; ++r) {
        const int64_t t = checked(targets[r], r, n);
        const T* row = xs.read(r * n, n, gathered.data());
        T* grad = out + r * n;
        const A at_target = A(grad_losses[r]), all = A(double(at_target) + grad_lses[r]);
        const A high = A(lses[r]),
                low = isfinite(high) ? A(lses[r] - double(high)) : 0;  // float alone is too coarse
        for (int64_t i = 0; i < n; ++i) grad[i] = T(all * fast_exp(A(row[i]) - high - low));
        grad[t] = T(all * fast_exp(A(row[t]) - high - low) - at_target);
      }
    });
  });
}

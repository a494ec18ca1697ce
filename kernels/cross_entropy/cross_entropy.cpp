#include <opkit/kernel.h>
#include <opkit_kernels/blocks.h>
#include <opkit_kernels/softmax.h>

using namespace opkit_kernels;

static void check_smoothing(double label_smoothing) {
  OPKIT_CHECK(label_smoothing >= 0 && label_smoothing <= 1, "label_smoothing is ", label_smoothing,
              ", expected 0 to 1");
}

static int64_t checked(int64_t target, int64_t row, int64_t n) {
  OPKIT_CHECK(target >= 0 && target < n, "target ", target, " of row ", row,
              " is out of range; expected 0 <= target < ", n, ", the number of logits in a row");
  return target;
}

// log sum exp(row)
template <class A, class T>
static double log_sum_exp(const T* row, int64_t n) {
  A top = greatest<A>(row, n);
  if (isinf(top)) top = 0;  // inf - inf would be no number
  return double(top) + log(sum_exp(row, n, top));
}

template <class A, class T>
static double mean(const T* row, int64_t n) {
  A sum = 0;
#pragma omp simd reduction(+ : sum)
  for (int64_t i = 0; i < n; ++i) sum += A(row[i]);
  return double(sum) / double(n);
}

// lse = log sum exp(logits) and, with s = label_smoothing,
// loss = (1 - s) (lse - logits[target]) + s (lse - mean(logits)) + z_loss lse^2, row by row.
void cross_entropy(opkit::Tensor logits, opkit::Tensor target, double label_smoothing,
                   int64_t ignore_index, double z_loss, opkit::Tensor loss, opkit::Tensor lse) {
  check_smoothing(label_smoothing);
  dispatch_floating(logits, [&](auto zero) {
    using T = decltype(zero);
    using A = Wide<T>;
    const int64_t n = logits.size(-1);
    const opkit::Elements<T> xs(logits);
    const opkit::Elements<int64_t> targets(target);
    T* losses = loss.data<T>();
    double* lses = lse.data<double>();
    opkit::parallel_for(0, loss.numel(), row_grain(n), [&](int64_t begin, int64_t end) {
      const Reader<T> reader(xs, n);
      for (int64_t r = begin; r < end; ++r) {
        const bool ignored = targets[r] == ignore_index;
        const int64_t t = ignored ? 0 : checked(targets[r], r, n);
        const auto* row = reader.read(r * n, n);
        const double own = lses[r] = log_sum_exp<A>(row, n);
        double result = ignored ? 0 : own - double(A(row[t]));
        if (!ignored && label_smoothing > 0)
          result = (1 - label_smoothing) * result + label_smoothing * (own - mean<A>(row, n));
        if (!ignored && z_loss != 0) result += z_loss * own * own;
        losses[r] = T(A(result));
      }
    });
  });
}

// With g = grad_loss, or 0 where the row is ignored: (g (1 + 2 z_loss lse) + grad_lse) exp(logits - lse), less
// g label_smoothing / n, and less g (1 - label_smoothing) at the target.
void cross_entropy_backward(opkit::Tensor grad_loss, opkit::Tensor grad_lse, opkit::Tensor logits,
                            opkit::Tensor target, opkit::Tensor lse, double label_smoothing,
                            int64_t ignore_index, double z_loss, opkit::Tensor grad_logits) {
  check_smoothing(label_smoothing);
  dispatch_floating(logits, [&](auto zero) {
    using T = decltype(zero);
    using A = Wide<T>;
    using Out = typename Writer<T>::Element;
    const int64_t n = logits.size(-1);
    const opkit::Elements<T> xs(logits), grad_losses(grad_loss);
    const opkit::Elements<double> grad_lses(grad_lse), lses(lse);
    const opkit::Elements<int64_t> targets(target);
    T* out = grad_logits.data<T>();
    opkit::parallel_for(0, lse.numel(), row_grain(n), [&](int64_t begin, int64_t end) {
      const Reader<T> reader(xs, n);
      const Writer<T> writer(out, n);
      for (int64_t r = begin; r < end; ++r) {
        const bool ignored = targets[r] == ignore_index;
        const int64_t t = ignored ? 0 : checked(targets[r], r, n);
        const auto* row = reader.read(r * n, n);
        auto* grad = writer.at(r * n);
        const double g = ignored ? 0 : double(A(grad_losses[r]));
        const double of_lse =
            grad_lses[r] + g + (ignored || z_loss == 0 ? 0 : 2 * z_loss * g * lses[r]);
        const A all = A(of_lse), each = A(g * label_smoothing / double(n));
        const A high = A(lses[r]),
                low = isfinite(high) ? A(lses[r] - double(high)) : 0;  // float alone is too coarse
        for (int64_t i = 0; i < n; ++i)
          grad[i] = Out(all * fast_exp(A(row[i]) - high - low) - each);
        if (!ignored)
          grad[t] =
              Out(all * fast_exp(A(row[t]) - high - low) - each - A(g * (1 - label_smoothing)));
        writer.done(r * n, n);
      }
    });
  });
}

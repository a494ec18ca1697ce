#undef NDEBUG  // the assertion on targets must stay
#include <assert.h>
#include <opkit/kernel.h>
#include <opkit_kernels/cuda.h>

using namespace opkit_kernels;

// A block per row, which reads it once: every thread keeps the greatest logit it has seen, and the sum of
// exp(logit - greatest).
template <class T>
__global__ void __launch_bounds__(kRowThreads)
    forward(opkit::Elements<T> logits, int64_t step, opkit::Elements<int64_t> targets, T* loss,
            double* lse, int64_t n) {
  using A = Wide<T>;
  const int64_t r = blockIdx.x, stride = int64_t(blockDim.x) * Pack<T>::kSize,
                first = threadIdx.x * Pack<T>::kSize;
  const Row<T> row(&logits[r * n], step, n);
  const A lowest = -A(INFINITY);
  A top = lowest, sum = 0;
  for (int64_t i = first; i < n; i += stride) {
    const Pack<T> x = row.load(i, T(-INFINITY));
    A higher = top;
    for (int k = 0; k < Pack<T>::kSize; ++k) higher = A(x.at[k]) > higher ? A(x.at[k]) : higher;
    const A shift = isinf(higher) ? A(0) : higher;  // inf - inf would be no number
    sum *= top == lowest ? A(1) : exp(top - shift);
    top = higher;
    for (int k = 0; k < Pack<T>::kSize; ++k) sum += exp(A(x.at[k]) - shift);
  }
  const A highest = block_reduce(top, lowest, [](A a, A b) { return a > b ? a : b; });
  const A shift = isinf(highest) ? A(0) : highest;
  const A total = block_sum(sum * (isinf(top) ? A(1) : exp(top - shift)));
  if (threadIdx.x == 0) {
    const int64_t t = targets[r];
    assert(t >= 0 && t < n && "opkit::cross_entropy: a target is out of range");
    const double result = double(shift) + log(double(total));
    lse[r] = result;
    loss[r] = T(A(result - double(A(row.data[t * step]))));
  }
}

template <class T>
__global__ void __launch_bounds__(kRowThreads)
    backward(opkit::Elements<T> grad_losses, opkit::Elements<double> grad_lses,
             opkit::Elements<T> logits, int64_t step, opkit::Elements<int64_t> targets,
             opkit::Elements<double> lses, T* grad_logits, int64_t n) {
  using A = Wide<T>;
  const int64_t r = blockIdx.x, stride = int64_t(blockDim.x) * Pack<T>::kSize,
                first = threadIdx.x * Pack<T>::kSize;
  const int64_t t = targets[r];
  assert(t >= 0 && t < n && "opkit::cross_entropy_backward: a target is out of range");
  const Row<T> row(&logits[r * n], step, n);
  const OutRow<T> out(grad_logits + r * n, n);
  const double lse = lses[r];
  const A at_target = A(grad_losses[r]), all = A(double(at_target) + grad_lses[r]);
  const A high = A(lse),
          low = isfinite(high) ? A(lse - double(high)) : A(0);  // float alone is too coarse
  for (int64_t i = first; i < n; i += stride) {
    const Pack<T> x = row.load(i);
    Pack<T> grad;
    for (int k = 0; k < Pack<T>::kSize; ++k)
      grad.at[k] = T(all * exp(A(x.at[k]) - high - low) - (i + k == t ? at_target : A(0)));
    out.store(i, grad);
  }
}

static void check_rows(int64_t rows) {
  OPKIT_CHECK(rows <= INT32_MAX, rows, " rows are more than a grid has blocks; expected at most ",
              INT32_MAX);
}

// lse = log sum exp(logits) and loss = lse - logits[target], row by row.
void cross_entropy(opkit::Tensor logits, opkit::Tensor target, opkit::Tensor loss,
                   opkit::Tensor lse) {
  const int64_t n = logits.size(-1), rows = loss.numel();
  if (rows == 0) return;
  check_rows(rows);
  OPKIT_CHECK(
      n > 0,
      "the rows of logits have no elements, so no target is in range; expected at least one");
  dispatch_floating(logits, [&](auto zero) {
    using T = decltype(zero);
    const opkit::Elements<T> xs(logits);
    const opkit::Elements<int64_t> targets(target);
    forward<T><<<static_cast<unsigned>(rows), row_threads<T>(n), 0, opkit::stream()>>>(
        xs, logits.stride(-1), targets, loss.data<T>(), lse.data<double>(), n);
    OPKIT_CUDA_CHECK(cudaGetLastError());
  });
}

// grad_logits = (grad_loss + grad_lse) exp(logits - lse), minus grad_loss at the target.
void cross_entropy_backward(opkit::Tensor grad_loss, opkit::Tensor grad_lse, opkit::Tensor logits,
                            opkit::Tensor target, opkit::Tensor lse, opkit::Tensor grad_logits) {
  const int64_t n = logits.size(-1), rows = lse.numel();
  if (rows == 0) return;
  check_rows(rows);
  OPKIT_CHECK(
      n > 0,
      "the rows of logits have no elements, so no target is in range; expected at least one");
  dispatch_floating(logits, [&](auto zero) {
    using T = decltype(zero);
    const opkit::Elements<T> grad_losses(grad_loss), xs(logits);
    const opkit::Elements<double> grad_lses(grad_lse), lses(lse);
    const opkit::Elements<int64_t> targets(target);
    backward<T><<<static_cast<unsigned>(rows), row_threads<T>(n), 0, opkit::stream()>>>(
        grad_losses, grad_lses, xs, logits.stride(-1), targets, lses, grad_logits.data<T>(), n);
    OPKIT_CUDA_CHECK(cudaGetLastError());
  });
}

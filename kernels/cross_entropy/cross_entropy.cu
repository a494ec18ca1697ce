#undef NDEBUG  // the assertion on targets must stay
#include <assert.h>
#include <opkit/kernel.h>
#include <opkit_kernels/cuda.h>

using namespace opkit_kernels;

// What a loss is made of beside the logits.
struct Terms {
  double label_smoothing, z_loss;
  int64_t ignore_index;
};

// e^x for the sum, where the error of the fast one, of some units in the last place, vanishes in it.
__device__ inline float sum_exp(float x) { return __expf(x); }
__device__ inline double sum_exp(double x) { return exp(x); }

// The greatest of the numbers seen, and the sum of exp(number - greatest), taken along as it grows.
template <class A>
struct Online {
  A top = -A(INFINITY), sum = 0;

  __device__ static A shift(A top) { return isinf(top) ? A(0) : top; }  // inf - inf is no number
  template <int N>
  __device__ void add(const A (&x)[N]) {
    A higher = top;
#pragma unroll
    for (int k = 0; k < N; ++k) higher = x[k] > higher ? x[k] : higher;
    const A from = shift(higher);
    if (higher > top) {
      sum = top == -A(INFINITY) ? sum : sum * sum_exp(top - from);
      top = higher;
    }
#pragma unroll(sizeof(A) == 8 ? 1 : N)  // more of double's long exp would spill
    for (int k = 0; k < N; ++k) sum += sum_exp(x[k] - from);
  }
};

// A block per row, which reads it once.
template <bool kSmooth, class T>
__global__ void __launch_bounds__(kRowThreads)
    forward(const __grid_constant__ opkit::Elements<T> logits, int64_t step,
            const __grid_constant__ opkit::Elements<int64_t> targets, T* loss, double* lse,
            int64_t n, Terms terms) {
  using A = Wide<T>;
  constexpr int kSize = Pack<T>::kSize, kAhead = sizeof(T) == 8 ? 1 : 2;  // loads under way
  const int64_t r = blockIdx.x, stride = int64_t(blockDim.x) * kSize;
  const Row<T> row(&logits[r * n], step, n);
  Online<A> own;
  A plain = 0;  // sum of the logits
  for (int64_t i = threadIdx.x * kSize; i < n; i += kAhead * stride) {
    Pack<T> packs[kAhead];
#pragma unroll
    for (int p = 0; p < kAhead; ++p)
      if (i + p * stride < n) packs[p] = row.load(i + p * stride, T(-INFINITY));
#pragma unroll
    for (int p = 0; p < kAhead; ++p) {
      if (i + p * stride >= n) break;
      A x[kSize];
#pragma unroll
      for (int k = 0; k < kSize; ++k) {
        x[k] = A(packs[p].at[k]);
        if (kSmooth && i + p * stride + k < n) plain += x[k];
      }
      own.add(x);
    }
  }
  const A top = block_reduce(own.top, -A(INFINITY), [](A a, A b) { return a > b ? a : b; });
  const A shift = Online<A>::shift(top);
  if (kSmooth) plain = block_sum(plain);
  const A total = block_sum(own.sum * (isinf(own.top) ? A(1) : sum_exp(own.top - shift)));
  if (threadIdx.x != 0) return;
  const double result = double(shift) + log(double(total));
  lse[r] = result;
  const int64_t t = targets[r];
  if (t == terms.ignore_index) {
    loss[r] = T(A(0));
    return;
  }
  assert(t >= 0 && t < n && "opkit::cross_entropy: a target is out of range");
  double sum = result - double(A(row.data[t * step]));
  if (kSmooth)
    sum = (1 - terms.label_smoothing) * sum +
          terms.label_smoothing * (result - double(plain) / double(n));
  if (terms.z_loss != 0) sum += terms.z_loss * result * result;
  loss[r] = T(A(sum));
}

template <class T>
__global__ void __launch_bounds__(kRowThreads)
    backward(const __grid_constant__ opkit::Elements<T> grad_losses,
             const __grid_constant__ opkit::Elements<double> grad_lses,
             const __grid_constant__ opkit::Elements<T> logits, int64_t step,
             const __grid_constant__ opkit::Elements<int64_t> targets,
             const __grid_constant__ opkit::Elements<double> lses, T* grad_logits, int64_t n,
             Terms terms) {
  using A = Wide<T>;
  const int64_t r = blockIdx.x, stride = int64_t(blockDim.x) * Pack<T>::kSize,
                first = threadIdx.x * Pack<T>::kSize;
  const int64_t t = targets[r];
  const bool ignored = t == terms.ignore_index;
  assert((ignored || (t >= 0 && t < n)) &&
         "opkit::cross_entropy_backward: a target is out of range");
  const Row<T> row(&logits[r * n], step, n);
  const OutRow<T> out(grad_logits + r * n, n);
  const double lse = lses[r], g = ignored ? 0 : double(A(grad_losses[r]));
  const A all =
      A(grad_lses[r] + g + (ignored || terms.z_loss == 0 ? 0 : 2 * terms.z_loss * g * lse));
  const A each = A(g * terms.label_smoothing / double(n)),
          at_target = A(g * (1 - terms.label_smoothing));
  const A high = A(lse),
          low = isfinite(high) ? A(lse - double(high)) : A(0);  // float alone is too coarse
  const int64_t place = ignored ? -1 : t;
  for (int64_t i = first; i < n; i += stride) {
    const Pack<T> x = row.load(i);
    Pack<T> grad;
#pragma unroll
    for (int k = 0; k < Pack<T>::kSize; ++k)
      grad.at[k] =
          T(all * exp(A(x.at[k]) - high - low) - each - (i + k == place ? at_target : A(0)));
    out.store(i, grad);
  }
}

// Raise where a call is wrong whatever its tensors hold.
static void check(int64_t rows, int64_t n, double label_smoothing) {
  OPKIT_CHECK(label_smoothing >= 0 && label_smoothing <= 1, "label_smoothing is ", label_smoothing,
              ", expected 0 to 1");
  OPKIT_CHECK(rows <= INT32_MAX, rows, " rows are more than a grid has blocks; expected at most ",
              INT32_MAX);
  OPKIT_CHECK(
      rows == 0 || n > 0,
      "the rows of logits have no elements, so no target is in range; expected at least one");
}

// lse = log sum exp(logits) and, with s = label_smoothing,
// loss = (1 - s) (lse - logits[target]) + s (lse - mean(logits)) + z_loss lse^2, row by row.
void cross_entropy(opkit::Tensor logits, opkit::Tensor target, double label_smoothing,
                   int64_t ignore_index, double z_loss, opkit::Tensor loss, opkit::Tensor lse) {
  const int64_t n = logits.size(-1), rows = loss.numel();
  check(rows, n, label_smoothing);
  if (rows == 0) return;
  dispatch_floating(logits, [&](auto zero) {
    using T = decltype(zero);
    const opkit::Elements<T> xs(logits);
    const opkit::Elements<int64_t> targets(target);
    const auto kernel = label_smoothing > 0 ? forward<true, T> : forward<false, T>;
    kernel<<<static_cast<unsigned>(rows), row_threads<T>(n), 0, opkit::stream()>>>(
        xs, logits.stride(-1), targets, loss.data<T>(), lse.data<double>(), n,
        Terms{label_smoothing, z_loss, ignore_index});
    OPKIT_CUDA_CHECK(cudaGetLastError());
  });
}

// With g = grad_loss, or 0 where the row is ignored: (g (1 + 2 z_loss lse) + grad_lse) exp(logits - lse), less
// g label_smoothing / n, and less g (1 - label_smoothing) at the target.
void cross_entropy_backward(opkit::Tensor grad_loss, opkit::Tensor grad_lse, opkit::Tensor logits,
                            opkit::Tensor target, opkit::Tensor lse, double label_smoothing,
                            int64_t ignore_index, double z_loss, opkit::Tensor grad_logits) {
  const int64_t n = logits.size(-1), rows = lse.numel();
  check(rows, n, label_smoothing);
  if (rows == 0) return;
  dispatch_floating(logits, [&](auto zero) {
    using T = decltype(zero);
    const opkit::Elements<T> grad_losses(grad_loss), xs(logits);
    const opkit::Elements<double> grad_lses(grad_lse), lses(lse);
    const opkit::Elements<int64_t> targets(target);
    backward<T><<<static_cast<unsigned>(rows), row_threads<T>(n), 0, opkit::stream()>>>(
        grad_losses, grad_lses, xs, logits.stride(-1), targets, lses, grad_logits.data<T>(), n,
        Terms{label_smoothing, z_loss, ignore_index});
    OPKIT_CUDA_CHECK(cudaGetLastError());
  });
}

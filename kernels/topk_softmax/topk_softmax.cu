#undef NDEBUG  // the assertion on indices must stay
#include <assert.h>
#include <opkit/kernel.h>
#include <opkit_kernels/cuda.h>

using namespace opkit_kernels;

constexpr int kWarps = 4;  // rows of a block: a warp each

// A number and its place; the greater number comes first, nan before all, and of equal ones the lower place.
template <class A>
struct Placed {
  A value;
  int64_t place;  // negative for none

  __device__ bool before(const Placed& other) const {
    if (place < 0 || other.place < 0) return place >= 0;
    if (isnan(value) || isnan(other.value))
      return isnan(value) && (!isnan(other.value) || place < other.place);
    return value > other.value || (value == other.value && place < other.place);
  }
};

template <class A>
__device__ Placed<A> first_of_warp(Placed<A> own) {
  for (int offset = 16; offset > 0; offset /= 2) {
    const Placed<A> other{__shfl_xor_sync(0xffffffffu, own.value, offset),
                          __shfl_xor_sync(0xffffffffu, own.place, offset)};
    if (other.before(own)) own = other;
  }
  return own;
}

template <class A>
__device__ A warp_sum(A value) {
  for (int offset = 16; offset > 0; offset /= 2)
    value += __shfl_xor_sync(0xffffffffu, value, offset);
  return value;
}

// A row of logits in the type that is computed in: kHeld numbers of each lane in registers, or all in memory.
template <class T, int kHeld>
struct Logits {
  using A = Wide<T>;
  const T* data;
  int64_t step, n;
  A held[kHeld > 0 ? kHeld : 1];

  __device__ Logits(const T* data, int64_t step, int64_t n) : data(data), step(step), n(n) {
#pragma unroll
    for (int j = 0; j < kHeld; ++j) {
      const int64_t i = threadIdx.x + 32 * j;
      held[j] = i < n ? A(data[i * step]) : A(0);
    }
  }
  __device__ A at(int64_t i) const { return A(data[i * step]); }
  // Call body(place, number) for those of this lane.
  template <class Body>
  __device__ void each(const Body& body) const {
    if constexpr (kHeld > 0) {
#pragma unroll
      for (int j = 0; j < kHeld; ++j) {
        const int i = static_cast<int>(threadIdx.x) + 32 * j;
        if (i < static_cast<int>(n)) body(i, held[j]);
      }
    } else {
#pragma unroll 2
      for (int64_t i = threadIdx.x; i < n; i += 32) body(i, at(i));
    }
  }
  // sum of exp(row - top)
  __device__ A sum_exp(A top) const {
    A sum = 0;
    each([&](int64_t, A x) { sum += exp(x - top); });
    return warp_sum(sum);
  }
};

// The rows of a tensor.
template <class T>
struct Matrix {
  opkit::Elements<T> elements;
  int64_t step, n;

  explicit Matrix(const opkit::Tensor& x) : elements(x), step(x.stride(-1)), n(x.size(-1)) {}
  __device__ const T* row(int64_t r) const { return n ? &elements[r * n] : nullptr; }
};

template <int kHeld, class T>
__global__ void __launch_bounds__(32 * kWarps)
    forward(const __grid_constant__ Matrix<T> logits, int64_t rows, int64_t k, bool normalise,
            T* weights, int64_t* indices) {
  using A = Wide<T>;
  const int64_t r = int64_t(blockIdx.x) * kWarps + threadIdx.y;
  if (r >= rows) return;
  const Logits<T, kHeld> row(logits.row(r), logits.step, logits.n);
  int64_t* const places = indices + r * k;
  Placed<A> last{};
  A top = 0, total = 0;
  for (int64_t i = 0; i < k; ++i) {
    Placed<A> best{0, -1};
    row.each([&](int64_t place, A x) {
      const Placed<A> one{x, place};
      if ((i == 0 || last.before(one)) && one.before(best)) best = one;
    });
    last = first_of_warp(best);
    if (i == 0) top = last.value;
    total += exp(last.value - top);
    if (threadIdx.x == 0) places[i] = last.place;
  }
  if (!normalise) total = row.sum_exp(top);
  __syncwarp();
  for (int64_t i = threadIdx.x; i < k; i += 32)
    weights[r * k + i] = T(exp(row.at(places[i]) - top) / total);
}

// What was chosen of a row, and the gradients of the weights.
template <class T>
struct Chosen {
  const int64_t* places;
  const T* grads;
  int64_t k, place_step, grad_step;

  __device__ int64_t place(int64_t i) const { return places[i * place_step]; }
  __device__ Wide<T> grad(int64_t i) const { return Wide<T>(grads[i * grad_step]); }
};

// With the weights w of the chosen logits, and the softmax p of all where these are not normalised: w grad at the
// chosen ones, less p sum(grad w).
template <int kHeld, class T>
__global__ void __launch_bounds__(32 * kWarps)
    backward(const __grid_constant__ Matrix<T> grads, const __grid_constant__ Matrix<T> logits,
             const __grid_constant__ Matrix<int64_t> indices, int64_t rows, bool normalise,
             T* grad_logits) {
  using A = Wide<T>;
  const int64_t r = int64_t(blockIdx.x) * kWarps + threadIdx.y, n = logits.n, k = indices.n;
  if (r >= rows) return;
  const Chosen<T> chosen{indices.row(r), grads.row(r), k, indices.step, grads.step};
  for (int64_t i = threadIdx.x; i < k; i += 32)
    assert(chosen.place(i) >= 0 && chosen.place(i) < n &&
           "opkit::topk_softmax_backward: an index is out of range");
  const Logits<T, kHeld> row(logits.row(r), logits.step, n);
  A top = -A(INFINITY), total = 0, dot = 0;
  if (normalise) {
    for (int64_t i = 0; i < k; ++i) top = max(top, row.at(chosen.place(i)));
    for (int64_t i = 0; i < k; ++i) total += exp(row.at(chosen.place(i)) - top);
  } else {
    row.each([&](int64_t, A x) { top = max(top, x); });
    for (int offset = 16; offset > 0; offset /= 2)
      top = max(top, __shfl_xor_sync(0xffffffffu, top, offset));
    total = row.sum_exp(top);
  }
  for (int64_t i = 0; i < k; ++i)
    dot += chosen.grad(i) * (exp(row.at(chosen.place(i)) - top) / total);
  row.each([&](int64_t place, A x) {
    const A p = exp(x - top) / total;
    A grad = normalise ? A(0) : -dot * p;
    for (int64_t i = 0; i < k; ++i)
      if (chosen.place(i) == place) grad += p * (chosen.grad(i) - (normalise ? dot : A(0)));
    grad_logits[r * n + place] = T(grad);
  });
}

// Call body with how many numbers of a row of n a lane holds, or 0 where they are too many.
template <int kHeld>
struct Held {
  static constexpr int value = kHeld;
};
template <class Body>
void with_held(int64_t n, const Body& body) {
  if (n <= 32) return body(Held<1>());
  if (n <= 64) return body(Held<2>());
  if (n <= 128) return body(Held<4>());
  if (n <= 256) return body(Held<8>());
  body(Held<0>());
}

static unsigned blocks_for(int64_t rows) {
  const int64_t blocks = (rows + kWarps - 1) / kWarps;
  OPKIT_CHECK(blocks <= INT32_MAX, rows, " rows are more than a grid has warps; expected at most ",
              int64_t(INT32_MAX) * kWarps);
  return static_cast<unsigned>(blocks);
}

void topk_softmax(opkit::Tensor logits, int64_t k, bool normalise, opkit::Tensor weights,
                  opkit::Tensor indices) {
  const int64_t n = logits.size(-1), rows = n ? logits.numel() / n : 0;
  OPKIT_CHECK(k >= 0 && k <= n, "k is ", k, " and the rows of logits have ", n,
              " elements; expected 0 <= k <= that");
  if (rows == 0 || k == 0) return;
  dispatch_floating(logits, [&](auto zero) {
    using T = decltype(zero);
    with_held(n, [&](auto held) {
      forward<decltype(held)::value><<<blocks_for(rows), dim3(32, kWarps), 0, opkit::stream()>>>(
          Matrix<T>(logits), rows, k, normalise, weights.data<T>(), indices.data<int64_t>());
      OPKIT_CUDA_CHECK(cudaGetLastError());
    });
  });
}

void topk_softmax_backward(opkit::Tensor grad_weights, opkit::Tensor logits, opkit::Tensor indices,
                           bool normalise, opkit::Tensor grad_logits) {
  const int64_t n = logits.size(-1), rows = n ? logits.numel() / n : 0;
  if (rows == 0) return;
  dispatch_floating(logits, [&](auto zero) {
    using T = decltype(zero);
    with_held(n, [&](auto held) {
      backward<decltype(held)::value><<<blocks_for(rows), dim3(32, kWarps), 0, opkit::stream()>>>(
          Matrix<T>(grad_weights), Matrix<T>(logits), Matrix<int64_t>(indices), rows, normalise,
          grad_logits.data<T>());
      OPKIT_CUDA_CHECK(cudaGetLastError());
    });
  });
}

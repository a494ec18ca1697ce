#include <opkit/kernel.h>
#include <opkit_kernels/blocks.h>
#include <opkit_kernels/softmax.h>
#include <string.h>

using namespace opkit_kernels;

// Integers in the order of the numbers, with one for 0 and -0, and the greatest for what is not a number.
static int32_t key_of(float x) {
  x += 0.0f;
  int32_t bits;
  memcpy(&bits, &x, sizeof(bits));
  return x != x ? INT32_MAX : bits ^ (bits >> 31 & INT32_MAX);
}
static int64_t key_of(double x) {
  x += 0.0;
  int64_t bits;
  memcpy(&bits, &x, sizeof(bits));
  return x != x ? INT64_MAX : bits ^ (bits >> 63 & INT64_MAX);
}
template <class A>
using Key = decltype(key_of(A()));

constexpr int64_t kStep = 16;  // keys that are looked at together

// The places of the k greatest of n keys, the greatest first and of equal ones the first. Past the n-th key there are
// keys less than all others, up to a multiple of kStep.
template <class K>
static void choose(const K* keys, int64_t n, int64_t k, K* best, int64_t* places) {
  int64_t found = 0;
  for (int64_t i = 0; i < n && k > 0; i += kStep) {
    K high = keys[i];
    for (int64_t j = 1; j < kStep; ++j) high = keys[i + j] > high ? keys[i + j] : high;
    if (found == k && high <= best[k - 1]) continue;
    for (int64_t j = i; j < i + kStep && j < n; ++j) {
      if (found == k && keys[j] <= best[k - 1]) continue;
      int64_t at = found < k ? found++ : k - 1;
      for (; at > 0 && keys[j] > best[at - 1]; --at) {
        best[at] = best[at - 1];
        places[at] = places[at - 1];
      }
      best[at] = keys[j];
      places[at] = j;
    }
  }
}

// The same of short rows, a round for each of the k: no branch depends on the numbers. A key and its place, counted
// down, are one integer.
constexpr int64_t kShort = 512;
static void choose_short(const int32_t* keys, int64_t n, int64_t k, int64_t* both,
                         int64_t* places) {
  for (int64_t i = 0; i < n; ++i) both[i] = int64_t(keys[i]) * (1 << 16) + (kShort - i);
  for (int64_t round = 0; round < k; ++round) {
    int64_t best = INT64_MIN;
#pragma omp simd reduction(max : best)
    for (int64_t i = 0; i < n; ++i) best = both[i] > best ? both[i] : best;
    places[round] = kShort - (best & 0xffff);
    both[places[round]] = INT64_MIN;
  }
}

void topk_softmax(opkit::Tensor logits, int64_t k, bool normalise, opkit::Tensor weights,
                  opkit::Tensor indices) {
  const int64_t n = logits.size(-1), rows = n ? logits.numel() / n : 0;
  OPKIT_CHECK(k >= 0 && k <= n, "k is ", k, " and the rows of logits have ", n,
              " elements; expected 0 <= k <= that");
  dispatch_floating(logits, [&](auto zero) {
    using T = decltype(zero);
    using A = Wide<T>;
    const opkit::Elements<T> xs(logits);
    T* const out = weights.data<T>();
    int64_t* const places = indices.data<int64_t>();
    opkit::parallel_for(0, rows, row_grain(n), [&](int64_t begin, int64_t end) {
      const int64_t padded = (n + kStep - 1) / kStep * kStep;
      const Reader<T> reader(xs, n);
      const Buffer<Key<A>> keys(padded), best(k);
      const Buffer<int64_t> both(n < kShort ? n : kShort);
      const Buffer<A> chosen(k);
      for (int64_t i = n; i < padded; ++i) keys.data()[i] = key_of(-A(INFINITY)) - 1;
      for (int64_t r = begin; r < end; ++r) {
        const auto* row = reader.read(r * n, n);
        for (int64_t i = 0; i < n; ++i) keys.data()[i] = key_of(A(row[i]));
        int64_t* at = places + r * k;
        if constexpr (sizeof(A) == sizeof(float)) {
          if (n <= kShort && k * n <= 16384)
            choose_short(keys.data(), n, k, both.data(), at);
          else
            choose(keys.data(), n, k, best.data(), at);
        } else {
          choose(keys.data(), n, k, best.data(), at);
        }
        for (int64_t i = 0; i < k; ++i) chosen.data()[i] = A(row[at[i]]);
        const A top = k ? chosen.data()[0] : A(0);
        const A sum = A(normalise ? sum_exp(chosen.data(), k, top) : sum_exp(row, n, top));
        for (int64_t i = 0; i < k; ++i) out[r * k + i] = T(fast_exp(chosen.data()[i] - top) / sum);
      }
    });
  });
}

// The softmax of a row: exp(x - top) / sum.
template <class A>
struct Softmax {
  A top, sum;

  template <class T>
  static Softmax of(const T* row, int64_t n) {
    const A top = greatest<A>(row, n);
    return {top, A(sum_exp(row, n, top))};
  }
  A operator()(A x) const { return fast_exp(x - top) / sum; }
};

// w (grad - sum(grad w)) at the chosen logits, with their weights w, and zero elsewhere. Not normalised, with the
// softmax p of all: p grad there, and -p sum(grad p) everywhere.
template <class T, class A>
static void row_backward(const T* row, int64_t n, const int64_t* places, const T* grad, int64_t k,
                         bool normalise, A* chosen, A* sums, T* out) {
  for (int64_t i = 0; i < k; ++i) chosen[i] = A(row[places[i]]);
  const auto softmax = normalise ? Softmax<A>::of(chosen, k) : Softmax<A>::of(row, n);
  A dot = 0;
  for (int64_t i = 0; i < k; ++i) {
    chosen[i] = softmax(chosen[i]);
    dot += A(grad[i]) * chosen[i];
  }
  if (normalise)
    for (int64_t i = 0; i < n; ++i) sums[i] = 0;
  else
    for (int64_t i = 0; i < n; ++i) sums[i] = -dot * softmax(A(row[i]));
  for (int64_t i = 0; i < k; ++i)
    sums[places[i]] += chosen[i] * (normalise ? A(grad[i]) - dot : A(grad[i]));
  for (int64_t i = 0; i < n; ++i) out[i] = T(sums[i]);
}

void topk_softmax_backward(opkit::Tensor grad_weights, opkit::Tensor logits, opkit::Tensor indices,
                           bool normalise, opkit::Tensor grad_logits) {
  const int64_t n = logits.size(-1), k = indices.size(-1), rows = n ? logits.numel() / n : 0;
  dispatch_floating(logits, [&](auto zero) {
    using T = decltype(zero);
    using A = Wide<T>;
    const opkit::Elements<T> xs(logits), grads(grad_weights);
    const opkit::Elements<int64_t> chosen(indices);
    T* const out = grad_logits.data<T>();
    opkit::parallel_for(0, rows, row_grain(n), [&](int64_t begin, int64_t end) {
      const Reader<T> x_reader(xs, n), grad_reader(grads, k);
      const Writer<T> writer(out, n);
      const Buffer<int64_t> places_row(k);
      const Buffer<A> weights(k), sums(n);
      for (int64_t r = begin; r < end; ++r) {
        const int64_t* places = chosen.read(r * k, k, places_row.data());
        for (int64_t i = 0; i < k; ++i)
          OPKIT_CHECK(places[i] >= 0 && places[i] < n, "index ", places[i], " of row ", r,
                      " is out of range; expected 0 <= index < ", n);
        row_backward(x_reader.read(r * n, n), n, places, grad_reader.read(r * k, k), k, normalise,
                     weights.data(), sums.data(), writer.at(r * n));
        writer.done(r * n, n);
      }
    });
  });
}

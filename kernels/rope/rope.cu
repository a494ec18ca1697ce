#undef NDEBUG  // the assertion on positions must stay
#include <assert.h>
#include <opkit/kernel.h>
#include <opkit_kernels/cuda.h>

using namespace opkit_kernels;

// cos or sin, of any floating dtype
template <class A>
struct Table {
  const void* data;
  opkit::DType dtype;
  int64_t rows, columns, row_step, step;

  explicit Table(const opkit::Tensor& x)
      : data(x.data_ptr()), dtype(x.dtype()), rows(x.size(0)), columns(x.size(1)),
        row_step(x.stride(0)), step(x.stride(1)) {
    dispatch_floating(x, [](auto) {});  // refuses other dtypes
  }
  // Zero past the end of a row.
  __device__ A at(int64_t row, int64_t column) const {
    if (column >= columns) return 0;
    const int64_t i = row * row_step + column * step;
    switch (dtype) {
      case opkit::DType::float64: return A(static_cast<const double*>(data)[i]);
      case opkit::DType::float16: return A(static_cast<const opkit::Half*>(data)[i]);
      case opkit::DType::bfloat16: return A(static_cast<const opkit::BFloat16*>(data)[i]);
      default: return A(static_cast<const float*>(data)[i]);
    }
  }
};

// q or k, and where it goes
template <class T>
struct Heads {
  opkit::Elements<T> in;
  T* out;
  int64_t count, head_step, step;  // of heads, and between them and their elements

  Heads(const opkit::Tensor& x, const opkit::Tensor& y)
      : in(x), out(y.data<T>()), count(x.size(-2)), head_step(x.stride(-2)), step(x.stride(-1)) {}
};

// The row of the tables for each element of the sequences: given, or its place in its sequence.
struct Rows {
  opkit::Elements<int64_t> given;
  int64_t length;  // of a sequence, or 0 where they are given

  __device__ int64_t operator[](int64_t r) const { return length ? r % length : given[r]; }
};

template <class T>
struct Job {
  Heads<T> q, k;
  Table<Wide<T>> cos, sin;
  Rows rows;
  int64_t d;
  Wide<T> sign;
};

// The pairs of one head from the i-th on, of as many as a pack has elements.
template <bool kInterleaved, class T, class A>
__device__ void turn_pairs(const T* from, int64_t step, T* to, int64_t i, int64_t pairs, const A* c,
                           const A* s) {
  constexpr int kSize = Pack<T>::kSize, kLast = kSize - 1;
  // Two packs, of first and second elements, or of pairs. Past their ends nothing is read, nor written.
  const int64_t low = kInterleaved ? 2 * i : i, high = kInterleaved ? low + kSize : pairs + i;
  const int64_t low_count = (kInterleaved ? 2 * pairs : pairs) - low, high_count = 2 * pairs - high;
  const Pack<T> in[2] = {Row<T>(from + low * step, step, low_count).load(0),
                         Row<T>(from + high * step, step, high_count).load(0)};
  Pack<T> out[2];
#pragma unroll
  for (int j = 0; j < kSize; ++j) {
    const int first = kInterleaved ? 2 * j : j, second = kInterleaved ? first + 1 : j + kSize;
    const A a = A(in[first / kSize].at[first & kLast]),
            b = A(in[second / kSize].at[second & kLast]);
    out[first / kSize].at[first & kLast] = T(a * c[j] - b * s[j]);
    out[second / kSize].at[second & kLast] = T(b * c[j] + a * s[j]);
  }
  OutRow<T>(to + low, low_count).store(0, out[0]);
  OutRow<T>(to + high, high_count).store(0, out[1]);
}

// A block for each element of the sequences. A thread has the angles of some pairs, and turns these in several heads.
template <bool kInterleaved, class T>
__global__ void __launch_bounds__(128, 4) turn(const __grid_constant__ Job<T> job) {
  using A = Wide<T>;
  constexpr int kSize = Pack<T>::kSize;
  const int64_t r = blockIdx.x, d = job.d, pairs = job.cos.columns;
  const int64_t row = job.rows[r];
  assert(row >= 0 && row < job.cos.rows && "opkit::rope: a position is out of range");
  const int64_t q_count = job.q.count, k_count = job.k.count;
  const T* q_from = q_count ? &job.q.in[r * q_count * d] : nullptr;
  const T* k_from = k_count ? &job.k.in[r * k_count * d] : nullptr;
  const auto for_heads = [&](const auto& body) {
    for (int64_t h = threadIdx.y; h < q_count; h += blockDim.y)
      body(q_from + h * job.q.head_step, job.q.step, job.q.out + (r * q_count + h) * d);
    // k goes on with the threads after those that had the last heads of q
    for (int64_t h = (threadIdx.y + blockDim.y - q_count % blockDim.y) % blockDim.y; h < k_count;
         h += blockDim.y)
      body(k_from + h * job.k.head_step, job.k.step, job.k.out + (r * k_count + h) * d);
  };
  for (int64_t i = threadIdx.x * kSize; i < pairs; i += blockDim.x * kSize) {
    A c[kSize], s[kSize];
#pragma unroll
    for (int j = 0; j < kSize; ++j) {
      c[j] = job.cos.at(row, i + j);
      s[j] = job.sign * job.sin.at(row, i + j);
    }
    for_heads([&](const T* from, int64_t step, T* to) {
      turn_pairs<kInterleaved>(from, step, to, i, pairs, c, s);
    });
  }
  if (2 * pairs < d) {
    for_heads([&](const T* from, int64_t step, T* to) {
      for (int64_t i = 2 * pairs + threadIdx.x; i < d; i += blockDim.x) to[i] = from[i * step];
    });
  }
}

static void launch(opkit::Tensor q, opkit::Tensor k, opkit::Tensor cos, opkit::Tensor sin,
                   opkit::Tensor positions, bool interleaved, int sign, opkit::Tensor q_out,
                   opkit::Tensor k_out) {
  const int64_t d = q.size(-1), pairs = cos.size(1), length = q.size(-3);
  OPKIT_CHECK(2 * pairs <= d, "cos has ", pairs, " columns, one for each pair, and heads have ", d,
              " elements; expected at most half as many");
  OPKIT_CHECK(positions || length <= cos.size(0), "the sequence has ", length, " elements and cos ",
              cos.size(0), " rows; expected a row for each, or positions");
  int64_t count = 1;  // elements of all sequences
  for (int64_t i = 0; i < q.dim() - 2; ++i) count *= q.size(i);
  const int64_t heads = q.size(-2) + k.size(-2);
  if (count == 0 || heads == 0 || d == 0) return;
  OPKIT_CHECK(count <= INT32_MAX, count,
              " elements are more than a grid has blocks; expected at most ", INT32_MAX);
  dispatch_floating(q, [&](auto zero) {
    using T = decltype(zero);
    const int64_t packs = (pairs + Pack<T>::kSize - 1) / Pack<T>::kSize;
    const unsigned x = packs < 1 ? 1 : packs < 128 ? unsigned(packs) : 128;
    const dim3 threads(x, heads < 128 / x ? unsigned(heads) : 128 / x);
    const opkit::Tensor nothing("positions", nullptr, nullptr, nullptr, 0, opkit::DType::int64,
                                q.device());
    const Rows rows{opkit::Elements<int64_t>(positions ? positions : nothing),
                    positions ? 0 : length};
    const Job<T> job{{q, q_out}, {k, k_out}, Table<Wide<T>>(cos), Table<Wide<T>>(sin),
                     rows,       d,          Wide<T>(sign)};
    const auto kernel = interleaved ? turn<true, T> : turn<false, T>;
    kernel<<<static_cast<unsigned>(count), threads, 0, opkit::stream()>>>(job);
    OPKIT_CUDA_CHECK(cudaGetLastError());
  });
}

// y1 = x1 cos - x2 sin and y2 = x2 cos + x1 sin, for each pair of each head
void rope(opkit::Tensor q, opkit::Tensor k, opkit::Tensor cos, opkit::Tensor sin,
          opkit::Tensor positions, bool interleaved, opkit::Tensor q_out, opkit::Tensor k_out) {
  launch(q, k, cos, sin, positions, interleaved, 1, q_out, k_out);
}

// The same with the angles' negatives.
void rope_backward(opkit::Tensor grad_q, opkit::Tensor grad_k, opkit::Tensor cos, opkit::Tensor sin,
                   opkit::Tensor positions, bool interleaved, opkit::Tensor q_out,
                   opkit::Tensor k_out) {
  launch(grad_q, grad_k, cos, sin, positions, interleaved, -1, q_out, k_out);
}

#include <opkit/kernel.h>
#include <opkit_kernels/cuda.h>

using namespace opkit_kernels;

// The weight in the type that the kernel reads it in: its own, where that is T or Wide<T>, else converted once.
template <class T, class A>
__global__ void widen(opkit::Elements<T> in, A* out, int64_t n) {
  const int64_t i = int64_t(blockIdx.x) * blockDim.x + threadIdx.x;
  if (i < n) out[i] = A(in[i]);
}

template <class T, class Body>
void with_weight(opkit::Tensor weight, const Body& body) {
  using A = Wide<T>;
  const int64_t n = weight.numel(), step = weight.stride(0);
  if (weight.dtype() == opkit::DTypeOf<T>::value) return body(weight.data<T>(), step);
  if (weight.dtype() == opkit::DTypeOf<A>::value) return body(weight.data<A>(), step);
  const opkit::Scratch<A> converted(n, weight.device());
  dispatch_floating(weight, [&](auto zero) {
    const opkit::Elements<decltype(zero)> in(weight);
    widen<<<static_cast<unsigned>((n + 255) / 256), 256, 0, opkit::stream()>>>(in, converted.data(),
                                                                               n);
    OPKIT_CUDA_CHECK(cudaGetLastError());
  });
  body(static_cast<const A*>(converted.data()), int64_t(1));
}

// A block per row.
template <class T, class W>
__global__ void __launch_bounds__(kRowThreads)
    forward(opkit::Elements<T> xs, int64_t step, const W* weight, int64_t weight_step, Wide<T> eps,
            T* y, float* rstd, int64_t n) {
  using A = Wide<T>;
  const int64_t r = blockIdx.x, stride = int64_t(blockDim.x) * Pack<T>::kSize,
                first = threadIdx.x * Pack<T>::kSize;
  const Row<T> row(&xs[r * n], step, n);
  A squares = 0;
  for (int64_t i = first; i < n; i += stride) {
    const Pack<T> x = row.load(i);
    for (int k = 0; k < Pack<T>::kSize; ++k) squares += A(x.at[k]) * A(x.at[k]);
  }
  const A scale = 1 / sqrt(block_sum(squares) / A(n) + eps);
  if (threadIdx.x == 0) rstd[r] = float(scale);
  const OutRow<T> out(y + r * n, n);
  for (int64_t i = first; i < n; i += stride) {
    const Pack<T> x = row.load(i);
    Pack<T> result;
    for (int k = 0; k < Pack<T>::kSize; ++k)
      result.at[k] = T(i + k < n ? A(x.at[k]) * scale * A(weight[(i + k) * weight_step]) : A(0));
    out.store(i, result);
  }
}

// rstd of rows without elements, as the reference has it
__global__ void fill_nan(float* rstd, int64_t rows) {
  const int64_t r = int64_t(blockIdx.x) * blockDim.x + threadIdx.x;
  if (r < rows) rstd[r] = __int_as_float(0x7fc00000);
}

void rms_norm(opkit::Tensor x, opkit::Tensor weight, double eps, opkit::Tensor y,
              opkit::Tensor rstd) {
  const int64_t n = x.size(-1), rows = rstd.numel();
  if (rows == 0) return;
  OPKIT_CHECK(rows <= INT32_MAX, rows, " rows are more than a grid has blocks; expected at most ",
              INT32_MAX);
  if (n == 0) {
    fill_nan<<<static_cast<unsigned>((rows + 255) / 256), 256, 0, opkit::stream()>>>(
        rstd.data<float>(), rows);
    OPKIT_CUDA_CHECK(cudaGetLastError());
    return;
  }
  dispatch_floating(x, [&](auto zero) {
    using T = decltype(zero);
    const opkit::Elements<T> xs(x);
    with_weight<T>(weight, [&](const auto* w, int64_t w_step) {
      forward<<<static_cast<unsigned>(rows), row_threads<T>(n), 0, opkit::stream()>>>(
          xs, x.stride(-1), w, w_step, Wide<T>(eps), y.data<T>(), rstd.data<float>(), n);
      OPKIT_CUDA_CHECK(cudaGetLastError());
    });
  });
}

// A block for every `per_block` rows. It adds its rows' share of grad_weight into sums of its own, in shared memory
// where they fit; a thread owns the columns it adds to, so no two threads meet there.
template <class T, class W>
__global__ void __launch_bounds__(kRowThreads)
    backward(opkit::Elements<T> grads, int64_t grad_step, opkit::Elements<T> xs, int64_t step,
             const W* weight, int64_t weight_step, Wide<T> eps, T* grad_x, Wide<T>* partial,
             int64_t per_block, int64_t rows, int64_t n, bool in_shared) {
  using A = Wide<T>;
  extern __shared__ double shared[];
  A* own = partial + blockIdx.x * n;
  A* sums = in_shared ? reinterpret_cast<A*>(shared) : own;
  const int64_t stride = int64_t(blockDim.x) * Pack<T>::kSize, first = threadIdx.x * Pack<T>::kSize;
  for (int64_t i = first; i < n; i += stride)
    for (int k = 0; k < Pack<T>::kSize && i + k < n; ++k) sums[i + k] = 0;

  const int64_t begin = blockIdx.x * per_block,
                end = begin + per_block < rows ? begin + per_block : rows;
  for (int64_t r = begin; r < end; ++r) {
    const Row<T> row(&xs[r * n], step, n), grad(&grads[r * n], grad_step, n);
    A squares = 0, dot = 0;
    for (int64_t i = first; i < n; i += stride) {
      const Pack<T> x = row.load(i), g = grad.load(i);
      for (int k = 0; k < Pack<T>::kSize && i + k < n; ++k) {
        squares += A(x.at[k]) * A(x.at[k]);
        dot += A(g.at[k]) * A(weight[(i + k) * weight_step]) * A(x.at[k]);
      }
    }
    const A scale = 1 / sqrt(block_sum(squares) / A(n) + eps);
    const A shift = block_sum(dot) * scale * scale / A(n);
    const OutRow<T> out(grad_x + r * n, n);
    for (int64_t i = first; i < n; i += stride) {
      const Pack<T> x = row.load(i), g = grad.load(i);
      Pack<T> result;
      for (int k = 0; k < Pack<T>::kSize && i + k < n; ++k) {
        const A a = A(x.at[k]), d = A(g.at[k]);
        result.at[k] = T(scale * (d * A(weight[(i + k) * weight_step]) - a * shift));
        sums[i + k] += d * (a * scale);
      }
      out.store(i, result);
    }
  }
  if (in_shared)
    for (int64_t i = first; i < n; i += stride)
      for (int k = 0; k < Pack<T>::kSize && i + k < n; ++k) own[i + k] = sums[i + k];
}

// out[i] = sum over the blocks of partial[block, i], in their order
template <class A, class T>
__global__ void add_blocks(const A* partial, int64_t blocks, int64_t n, T* out) {
  const int64_t i = int64_t(blockIdx.x) * blockDim.x + threadIdx.x;
  if (i >= n) return;
  A sum = 0;
  for (int64_t b = 0; b < blocks; ++b) sum += partial[b * n + i];
  out[i] = T(sum);
}

void rms_norm_backward(opkit::Tensor grad_y, opkit::Tensor x, opkit::Tensor weight, double eps,
                       opkit::Tensor grad_x, opkit::Tensor grad_weight) {
  const int64_t n = x.size(-1), rows = n ? x.numel() / n : 0;
  if (n == 0) return;
  dispatch_floating(x, [&](auto zero) {
    using T = decltype(zero);
    using A = Wide<T>;
    // The number of rows alone decides the blocks, so the result is the same on every device.
    const int64_t per_block = rows > 512 ? (rows + 511) / 512 : 1,
                  blocks = (rows + per_block - 1) / per_block;
    const opkit::Scratch<A> partial(blocks * n, x.device());
    if (rows > 0) {
      const opkit::Elements<T> xs(x), grads(grad_y);
      const bool in_shared = n * sizeof(A) <= 47 * 1024;  // of 48 KiB; block_reduce takes a little
      with_weight<T>(weight, [&](const auto* w, int64_t w_step) {
        backward<<<static_cast<unsigned>(blocks), row_threads<T>(n), in_shared ? n * sizeof(A) : 0,
                   opkit::stream()>>>(grads, grad_y.stride(-1), xs, x.stride(-1), w, w_step, A(eps),
                                      grad_x.data<T>(), partial.data(), per_block, rows, n,
                                      in_shared);
        OPKIT_CUDA_CHECK(cudaGetLastError());
      });
    }
    dispatch_floating(grad_weight, [&](auto weight_zero) {
      using W = decltype(weight_zero);
      add_blocks<<<static_cast<unsigned>((n + 127) / 128), 128, 0, opkit::stream()>>>(
          static_cast<const A*>(partial.data()), blocks, n, grad_weight.data<W>());
      OPKIT_CUDA_CHECK(cudaGetLastError());
    });
  });
}

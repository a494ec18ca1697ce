#include <opkit/kernel.h>
#include <opkit_kernels/cuda_planes.h>

using namespace opkit_kernels;

template <class A>
__device__ Stats<A> channel_stats(const Stats<A>* planes, int64_t samples, int64_t channels,
                                  int64_t c) {
  Stats<A> all = Stats<A>::none();
  for (int64_t s = 0; s < samples; ++s) all.join(planes[s * channels + c]);
  return all;
}

// A thread per channel. What the running statistics take up, the mean and the unbiased variance, goes to `news`.
template <class A>
__global__ void forward_lines(const Stats<A>* planes, int64_t samples, int64_t channels,
                              Columns<A> weight, Columns<A> bias, A eps, Line<A>* lines,
                              float* mean, float* rstd, A* news) {
  const int64_t c = int64_t(blockIdx.x) * blockDim.x + threadIdx.x;
  if (c >= channels) return;
  const Stats<A> all = channel_stats(planes, samples, channels, c);
  const A scale = all.rstd(eps);
  mean[c] = float(all.mean);
  rstd[c] = float(scale);
  lines[c] = {all.mean, scale * weight.at(c, A(1)), bias.at(c, A(0)), A(0), A(0)};
  news[c] = all.mean;
  news[channels + c] = all.squares / (all.count - 1);
}

template <class T, class A>
__global__ void take_up(T* running, int64_t step, const A* news, A momentum, int64_t n) {
  const int64_t c = int64_t(blockIdx.x) * blockDim.x + threadIdx.x;
  if (c < n)
    running[c * step] =
        T(Wide<T>(A(Wide<T>(running[c * step])) * (1 - momentum) + momentum * news[c]));
}

template <class A>
void update(const opkit::Tensor& running, const A* news, double momentum) {
  dispatch_floating(running, [&](auto zero) {
    using T = decltype(zero);
    const int64_t n = running.numel();
    take_up<<<static_cast<unsigned>((n + 255) / 256), 256, 0, opkit::stream()>>>(
        running.data<T>(), running.stride(0), news, A(momentum), n);
    OPKIT_CUDA_CHECK(cudaGetLastError());
  });
}

void batch_norm(opkit::Tensor x, opkit::Tensor weight, opkit::Tensor bias,
                opkit::Tensor running_mean, opkit::Tensor running_var, double momentum, double eps,
                opkit::Tensor y, opkit::Tensor mean, opkit::Tensor rstd) {
  const Planes of(x);
  if (of.numel() == 0) {
    fill_nan(mean);
    return fill_nan(rstd);
  }
  dispatch_floating(x, [&](auto zero) {
    using T = decltype(zero);
    using A = Wide<T>;
    const int64_t n = of.channels;
    const PlaneStats<T> planes(of, x, opkit::Tensor(), of.inner == 1);
    const ColumnsOf<A> weights(weight), biases(bias);
    const opkit::Scratch<A> memory(7 * n, x.device());
    auto* lines = reinterpret_cast<Line<A>*>(memory.data());
    A* news = memory.data() + 5 * n;
    forward_lines<A><<<blocks_of_rows((n + 63) / 64), 64, 0, opkit::stream()>>>(
        planes.data(), planes.samples, n, weights.get(), biases.get(), A(eps), lines,
        mean.data<float>(), rstd.data<float>(), news);
    OPKIT_CUDA_CHECK(cudaGetLastError());
    update(running_mean, news, momentum);
    update(running_var, news + n, momentum);
    apply_lines<T>(x, opkit::Tensor(), lines, n, of.inner, y);
  });
}

// grad_x = weight rstd (g - mean(g) - xhat mean(g xhat)), a thread per channel.
template <class A>
__global__ void backward_lines(const Stats<A>* planes, int64_t samples, int64_t channels,
                               Columns<A> weight, A eps, Line<A>* lines, A* for_weight,
                               A* for_bias) {
  const int64_t c = int64_t(blockIdx.x) * blockDim.x + threadIdx.x;
  if (c >= channels) return;
  const Stats<A> all = channel_stats(planes, samples, channels, c);
  const A rstd = all.rstd(eps), scale = rstd * weight.at(c, A(1));
  lines[c] = {all.mean, scale, all.grad / all.count, all.dot * rstd * rstd / all.count, A(1)};
  for_weight[c] = all.dot * rstd;
  for_bias[c] = all.grad;
}

// The statistics are taken anew, with the sums, so what was saved of them is not needed.
void batch_norm_backward(opkit::Tensor grad_y, opkit::Tensor x, opkit::Tensor weight,
                         opkit::Tensor /*bias*/, opkit::Tensor /*mean*/, double eps,
                         opkit::Tensor grad_x, opkit::Tensor grad_weight, opkit::Tensor grad_bias) {
  const Planes of(x);
  dispatch_floating(x, [&](auto zero) {
    using T = decltype(zero);
    using A = Wide<T>;
    const int64_t n = of.channels;
    const opkit::Scratch<A> memory(7 * n, x.device());
    auto* lines = reinterpret_cast<Line<A>*>(memory.data());
    A *for_weight = memory.data() + 5 * n, *for_bias = for_weight + n;
    if (of.numel() > 0) {
      const PlaneStats<T> planes(of, x, grad_y, of.inner == 1);
      const ColumnsOf<A> weights(weight);
      backward_lines<A><<<blocks_of_rows((n + 63) / 64), 64, 0, opkit::stream()>>>(
          planes.data(), planes.samples, n, weights.get(), A(eps), lines, for_weight, for_bias);
      OPKIT_CUDA_CHECK(cudaGetLastError());
      apply_lines<T>(x, grad_y, lines, n, of.inner, grad_x);
    }
    const int64_t blocks = of.numel() > 0 ? 1 : 0;
    add_blocks<A>(for_weight, blocks, n, grad_weight);
    add_blocks<A>(for_bias, blocks, n, grad_bias);
  });
}

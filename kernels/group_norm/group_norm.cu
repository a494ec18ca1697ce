#include <opkit/kernel.h>
#include <opkit_kernels/cuda_planes.h>

using namespace opkit_kernels;

static int64_t channels_each(const Planes& of, int64_t groups) {
  OPKIT_CHECK(groups >= 1 && of.channels % groups == 0, "argument groups is ", groups,
              ", and x has ", of.channels,
              " channels; expected a number of groups that divides the channels");
  return of.channels / groups;
}

template <class A>
__device__ Stats<A> group_stats(const Stats<A>* planes, int64_t each) {
  Stats<A> all = Stats<A>::none();
  for (int64_t c = 0; c < each; ++c) all.join(planes[c]);
  return all;
}

// A thread per group.
template <class A>
__global__ void forward_lines(const Stats<A>* planes, int64_t count, int64_t groups, int64_t each,
                              Columns<A> weight, Columns<A> bias, A eps, Line<A>* lines,
                              float* mean, float* rstd) {
  const int64_t g = int64_t(blockIdx.x) * blockDim.x + threadIdx.x;
  if (g >= count) return;
  const Stats<A> all = group_stats(planes + g * each, each);
  const A scale = all.rstd(eps);
  mean[g] = float(all.mean);
  rstd[g] = float(scale);
  for (int64_t c = 0; c < each; ++c) {
    const int64_t channel = g % groups * each + c;
    lines[g * each + c] = {all.mean, scale * weight.at(channel, A(1)), bias.at(channel, A(0)), A(0),
                           A(0)};
  }
}

void group_norm(opkit::Tensor x, int64_t groups, opkit::Tensor weight, opkit::Tensor bias,
                double eps, opkit::Tensor y, opkit::Tensor mean, opkit::Tensor rstd) {
  const Planes of(x);
  const int64_t each = channels_each(of, groups), count = of.samples * groups;
  if (of.numel() == 0) {
    fill_nan(mean);
    return fill_nan(rstd);
  }
  dispatch_floating(x, [&](auto zero) {
    using T = decltype(zero);
    using A = Wide<T>;
    const PlaneStats<T> planes(of, x, opkit::Tensor(), false);
    const ColumnsOf<A> weights(weight), biases(bias);
    const opkit::Scratch<A> memory(5 * of.count(), x.device());
    auto* lines = reinterpret_cast<Line<A>*>(memory.data());
    forward_lines<A><<<blocks_of_rows((count + 63) / 64), 64, 0, opkit::stream()>>>(
        planes.data(), count, groups, each, weights.get(), biases.get(), A(eps), lines,
        mean.data<float>(), rstd.data<float>());
    OPKIT_CUDA_CHECK(cudaGetLastError());
    apply_lines<T>(x, opkit::Tensor(), lines, of.count(), of.inner, y);
  });
}

// grad_x = rstd (g w - mean(g w) - xhat mean(g w xhat)), a thread per group. What each sample gives to the channels'
// sums goes to for_weight and for_bias.
template <class A>
__global__ void backward_lines(const Stats<A>* planes, int64_t count, int64_t groups, int64_t each,
                               Columns<A> weight, A eps, Line<A>* lines, A* for_weight,
                               A* for_bias) {
  const int64_t g = int64_t(blockIdx.x) * blockDim.x + threadIdx.x;
  if (g >= count) return;
  Stats<A> all = Stats<A>::none();
  for (int64_t c = 0; c < each; ++c) {
    Stats<A> plane = planes[g * each + c];
    const A w = weight.at(g % groups * each + c, A(1));
    plane.grad *= w;
    plane.dot *= w;
    all.join(plane);
  }
  const A scale = all.rstd(eps), level = all.grad / all.count,
          slope = all.dot * scale * scale / all.count;
  for (int64_t c = 0; c < each; ++c) {
    const Stats<A> plane = planes[g * each + c];
    for_weight[g * each + c] = (plane.dot + plane.grad * (plane.mean - all.mean)) * scale;
    for_bias[g * each + c] = plane.grad;
    lines[g * each + c] = {all.mean, scale, level, slope, weight.at(g % groups * each + c, A(1))};
  }
}

void group_norm_backward(opkit::Tensor grad_y, opkit::Tensor x, int64_t groups,
                         opkit::Tensor weight, opkit::Tensor /*bias*/, double eps,
                         opkit::Tensor grad_x, opkit::Tensor grad_weight, opkit::Tensor grad_bias) {
  const Planes of(x);
  const int64_t each = channels_each(of, groups), count = of.samples * groups;
  dispatch_floating(x, [&](auto zero) {
    using T = decltype(zero);
    using A = Wide<T>;
    const int64_t samples = of.inner > 0 ? of.samples : 0;
    const opkit::Scratch<A> sums(2 * of.count(), x.device());
    A *for_weight = sums.data(), *for_bias = for_weight + of.count();
    if (of.numel() > 0) {
      const PlaneStats<T> planes(of, x, grad_y, false);
      const ColumnsOf<A> weights(weight);
      const opkit::Scratch<A> memory(5 * of.count(), x.device());
      auto* lines = reinterpret_cast<Line<A>*>(memory.data());
      backward_lines<A><<<blocks_of_rows((count + 63) / 64), 64, 0, opkit::stream()>>>(
          planes.data(), count, groups, each, weights.get(), A(eps), lines, for_weight, for_bias);
      OPKIT_CUDA_CHECK(cudaGetLastError());
      apply_lines<T>(x, grad_y, lines, of.count(), of.inner, grad_x);
    }
    add_blocks<A>(for_weight, samples, of.channels, grad_weight);
    add_blocks<A>(for_bias, samples, of.channels, grad_bias);
  });
}

#include <math.h>
#include <opkit/kernel.h>
#include <opkit_kernels/sums.h>

using namespace opkit_kernels;

// A group's channels lie one after the other, each with `inner` elements.
struct Groups {
  int64_t samples, channels, inner, groups, channels_each, elements;

  Groups(const opkit::Tensor& x, int64_t groups)
      : samples(x.size(0)), channels(x.size(1)), inner(1), groups(groups) {
    OPKIT_CHECK(groups >= 1 && channels % groups == 0, "argument groups is ", groups,
                ", and x has ", channels,
                " channels; expected a number of groups that divides the channels");
    for (int64_t d = 2; d < x.dim(); ++d) inner *= x.size(d);
    channels_each = channels / groups;
    elements = channels_each * inner;
  }
  int64_t count() const { return samples * groups; }
};

void group_norm(opkit::Tensor x, int64_t groups, opkit::Tensor weight, opkit::Tensor bias,
                double eps, opkit::Tensor y, opkit::Tensor mean, opkit::Tensor rstd) {
  const Groups of(x, groups);
  dispatch_floating(x, [&](auto zero) {
    using T = decltype(zero);
    using A = Wide<T>;
    const opkit::Elements<T> xs(x);
    const Widened<A> weights(weight, of.channels, 1), biases(bias, of.channels, 0);
    T* ys = y.data<T>();
    float *means = mean.data<float>(), *rstds = rstd.data<float>();
    opkit::parallel_for(0, of.count(), row_grain(of.elements), [&](int64_t begin, int64_t end) {
      const Buffer<T> gathered(xs.is_contiguous() ? 0 : kChunk);
      for (int64_t g = begin; g < end; ++g) {
        const int64_t first = g * of.elements;
        Moments moments;
        for (int64_t at = 0; at < of.elements; at += kChunk) {
          const int64_t n = of.elements - at < kChunk ? of.elements - at : kChunk;
          moments.add(xs.read(first + at, n, gathered.data()), n);
        }
        const double factor = 1 / sqrt(moments.variance() + eps);
        means[g] = float(moments.average());
        rstds[g] = float(factor);
        for (int64_t c = 0; c < of.channels_each; ++c) {
          const int64_t channel = g % of.groups * of.channels_each + c;
          const Normaliser<A> by(moments.mean, factor, weights.data()[channel],
                                 biases.data()[channel]);
          const A centre = by.centre, scale = by.scale, shift = by.shift;
          in_chunks((g * of.channels_each + c) * of.inner, of.inner, [&](int64_t at, int64_t n) {
            const T* row = xs.read(at, n, gathered.data());
            T* out = ys + at;
#pragma GCC ivdep
            for (int64_t i = 0; i < n; ++i) out[i] = T((A(row[i]) - centre) * scale + shift);
          });
        }
      }
    });
  });
}

// Over a group, with g weight for g: grad_x = rstd (g - mean(g) - xhat mean(g xhat)), xhat = (x - mean) rstd.
void group_norm_backward(opkit::Tensor grad_y, opkit::Tensor x, int64_t groups,
                         opkit::Tensor weight, opkit::Tensor /*bias*/, double eps,
                         opkit::Tensor grad_x, opkit::Tensor grad_weight, opkit::Tensor grad_bias) {
  const Groups of(x, groups);
  dispatch_floating(x, [&](auto zero) {
    using T = decltype(zero);
    using A = Wide<T>;
    const opkit::Elements<T> xs(x), grads(grad_y);
    const Widened<A> weights(weight, of.channels, 1);
    T* grad_xs = grad_x.data<T>();
    // What each sample gives to the channels' sums.
    const int64_t planes = of.samples * of.channels;
    const Buffer<double> for_weight(planes), for_bias(planes);
    opkit::parallel_for(0, of.count(), row_grain(of.elements), [&](int64_t begin, int64_t end) {
      const Buffer<T> x_row(xs.is_contiguous() ? 0 : kChunk),
          grad_row(grads.is_contiguous() ? 0 : kChunk);
      for (int64_t g = begin; g < end; ++g) {
        const int64_t first = g * of.channels_each;
        const A* w = weights.data() + g % of.groups * of.channels_each;
        const int64_t some = of.elements < kChunk ? of.elements : kChunk;
        const A near = near_mean(xs.read(g * of.elements, some, x_row.data()), some);
        const double count = of.elements > 0 ? double(of.elements) : 1;
        GradientSums group;
        for (int64_t c = 0; c < of.channels_each; ++c) {
          GradientSums channel;
          in_chunks((first + c) * of.inner, of.inner, [&](int64_t at, int64_t n) {
            channel.add(xs.read(at, n, x_row.data()), grads.read(at, n, grad_row.data()), n, near);
          });
          group.d += channel.d, group.squares += channel.squares;
          group.grad += channel.grad * w[c], group.dot += channel.dot * w[c];
          for_weight.data()[first + c] = channel.dot;
          for_bias.data()[first + c] = channel.grad;
        }
        const double shift = group.d / count, factor = of.elements > 1 ? group.rstd(count, eps) : 0;
        // grad_x = g w rstd + (x - mean) slope rstd + level; a group of one element is its bias, with no gradient
        const double slope = -group.centred(count) * factor * factor / count;
        const Normaliser<A> by(double(near) + shift, factor, A(slope),
                               A(-group.grad * factor / count));
        for (int64_t c = 0; c < of.channels_each; ++c) {
          for_weight.data()[first + c] -= shift * for_bias.data()[first + c];
          for_weight.data()[first + c] *= factor;
          in_chunks((first + c) * of.inner, of.inner, [&](int64_t at, int64_t n) {
            const T* row = xs.read(at, n, x_row.data());
            const T* grad = grads.read(at, n, grad_row.data());
            T* out = grad_xs + at;
            const A each = A(factor * double(w[c]));
#pragma GCC ivdep
            for (int64_t i = 0; i < n; ++i)
              out[i] = T(A(grad[i]) * each + ((A(row[i]) - by.centre) * by.scale + by.shift));
          });
        }
      }
    });
    add_blocks(for_weight.data(), of.samples, of.channels, grad_weight);
    add_blocks(for_bias.data(), of.samples, of.channels, grad_bias);
  });
}

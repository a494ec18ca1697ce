#include <math.h>
#include <opkit/kernel.h>
#include <opkit_kernels/sums.h>

using namespace opkit_kernels;

// So many that each is added to the same sums in float, which then go on in double.
constexpr int64_t kRowsAtOnce = 32;

// x as samples of channels, each of `inner` elements side by side.
struct Planes {
  int64_t samples, channels, inner = 1;

  explicit Planes(const opkit::Tensor& x) : samples(x.size(0)), channels(x.size(1)) {
    for (int64_t d = 2; d < x.dim(); ++d) inner *= x.size(d);
  }
  int64_t per_channel() const { return samples * inner; }
  int64_t count() const { return samples * channels; }
};

// Mean and squared deviations of every channel, where a channel has more than an element in a sample.
template <class T>
void planes_moments(const Planes& of, const opkit::Elements<T>& xs, Moments* moments) {
  opkit::parallel_for(0, of.channels, row_grain(of.per_channel()), [&](int64_t begin, int64_t end) {
    const Buffer<T> gathered(xs.is_contiguous() ? 0 : kChunk);
    for (int64_t c = begin; c < end; ++c) {
      // Short rows are added up together: each join costs a few divisions.
      int64_t held = 0;
      Wide<T> near = 0;
      double sums[2] = {0, 0};
      const auto join = [&] {
        if (held) moments[c].join_around(double(held), double(near), sums);
        held = 0, sums[0] = sums[1] = 0;
      };
      for (int64_t s = 0; s < of.samples; ++s)
        in_chunks((s * of.channels + c) * of.inner, of.inner, [&](int64_t at, int64_t n) {
          if (held + n > kChunk) join();
          const T* row = xs.read(at, n, gathered.data());
          if (!held) near = near_mean(row, n);
          add_deviations(row, n, near, sums);
          held += n;
        });
      join();
    }
  });
}

// The same where samples are rows of channels: column by column, over a few rows that stay in the cache, joined in
// double in their order.
template <class T>
void rows_moments(const Planes& of, const opkit::Elements<T>& xs, Moments* moments) {
  using A = Wide<T>;
  const int64_t n = of.channels;
  const RowBlocks blocks(of.samples);
  const Buffer<double> partial(blocks.count * 2 * n);
  const Buffer<A> sums(blocks.count * 3 * n);
  opkit::parallel_for(
      0, blocks.count, 1 + row_grain(n) / blocks.each, [&](int64_t from, int64_t to) {
        const Buffer<T> gathered(xs.is_contiguous() ? 0 : n);
        for (int64_t b = from; b < to; ++b) {
          double *mean = partial.data() + b * 2 * n, *squares = mean + n, count = 0;
          A *centre = sums.data() + b * 3 * n, *own = centre + n, *rest = own + n;
#pragma GCC ivdep
          for (int64_t i = 0; i < n; ++i) mean[i] = squares[i] = 0;
          for (int64_t first = blocks.begin(b); first < blocks.end(b); first += kRowsAtOnce) {
            const int64_t last =
                first + kRowsAtOnce < blocks.end(b) ? first + kRowsAtOnce : blocks.end(b);
            const double held = double(last - first), all = count + held;
#pragma GCC ivdep
            for (int64_t i = 0; i < n; ++i) centre[i] = own[i] = rest[i] = 0;
            for (int64_t r = first; r < last; ++r) {
              const T* row = xs.read(r * n, n, gathered.data());
#pragma GCC ivdep
              for (int64_t i = 0; i < n; ++i) centre[i] += A(row[i]);
            }
#pragma GCC ivdep
            for (int64_t i = 0; i < n; ++i) centre[i] /= A(held);
            for (int64_t r = first; r < last; ++r) {
              const T* row = xs.read(r * n, n, gathered.data());
#pragma GCC ivdep
              for (int64_t i = 0; i < n; ++i) {
                const A deviation = A(row[i]) - centre[i];
                own[i] += deviation * deviation;
                rest[i] += deviation;
              }
            }
#pragma GCC ivdep
            for (int64_t i = 0; i < n; ++i) {  // as Moments::join
              const double shift = double(rest[i]) / held,
                           apart = double(centre[i]) + shift - mean[i];
              mean[i] += apart * (held / all);
              squares[i] +=
                  double(own[i]) - double(rest[i]) * shift + apart * apart * (count * held / all);
            }
            count = all;
          }
        }
      });
  for (int64_t b = 0; b < blocks.count; ++b)
    for (int64_t i = 0; i < n; ++i)
      moments[i].join(double(blocks.end(b) - blocks.begin(b)), partial.data()[b * 2 * n + i],
                      partial.data()[b * 2 * n + n + i]);
}

// running = (1 - momentum) running + momentum value
void update(const opkit::Tensor& running, double momentum, const Moments* moments,
            double (*value)(const Moments&)) {
  dispatch_floating(running, [&](auto zero) {
    using T = decltype(zero);
    T* at = running.data<T>();
    for (int64_t c = 0; c < running.numel(); ++c, at += running.stride(0))
      *at = T(Wide<T>(double(Wide<T>(*at)) * (1 - momentum) + momentum * value(moments[c])));
  });
}

// out = (x - centre) scale + shift, with one of each per channel
template <class T, class A>
void normalise(const Planes& of, const opkit::Elements<T>& xs, const A* centre, const A* scale,
               const A* shift, T* out) {
  const bool rows = of.inner == 1;
  opkit::parallel_for(
      0, rows ? of.samples : of.count(), row_grain(rows ? of.channels : of.inner),
      [&](int64_t begin, int64_t end) {
        const Buffer<T> gathered(xs.is_contiguous() ? 0 : rows ? of.channels : kChunk);
        for (int64_t p = begin; p < end; ++p) {
          if (rows) {
            const T* row = xs.read(p * of.channels, of.channels, gathered.data());
            T* to = out + p * of.channels;
#pragma GCC ivdep
            for (int64_t i = 0; i < of.channels; ++i)
              to[i] = T((A(row[i]) - centre[i]) * scale[i] + shift[i]);
            continue;
          }
          const A middle = centre[p % of.channels], factor = scale[p % of.channels],
                  level = shift[p % of.channels];
          in_chunks(p * of.inner, of.inner, [&](int64_t at, int64_t n) {
            const T* row = xs.read(at, n, gathered.data());
            T* to = out + at;
#pragma GCC ivdep
            for (int64_t i = 0; i < n; ++i) to[i] = T((A(row[i]) - middle) * factor + level);
          });
        }
      });
}

void batch_norm(opkit::Tensor x, opkit::Tensor weight, opkit::Tensor bias,
                opkit::Tensor running_mean, opkit::Tensor running_var, double momentum, double eps,
                opkit::Tensor y, opkit::Tensor mean, opkit::Tensor rstd) {
  const Planes of(x);
  dispatch_floating(x, [&](auto zero) {
    using T = decltype(zero);
    using A = Wide<T>;
    const opkit::Elements<T> xs(x);
    const Buffer<Moments> moments(of.channels);
    if (of.inner == 1)
      rows_moments<T>(of, xs, moments.data());
    else
      planes_moments<T>(of, xs, moments.data());
    const Widened<A> weights(weight, of.channels, 1), biases(bias, of.channels, 0);
    const Buffer<A> centre(of.channels), scale(of.channels), shift(of.channels);
    for (int64_t c = 0; c < of.channels; ++c) {
      const double factor = 1 / sqrt(moments.data()[c].variance() + eps);
      mean.data<float>()[c] = float(moments.data()[c].average());
      rstd.data<float>()[c] = float(factor);
      const Normaliser<A> by(moments.data()[c].mean, factor, weights.data()[c], biases.data()[c]);
      centre.data()[c] = by.centre;
      scale.data()[c] = by.scale;
      shift.data()[c] = by.shift;
    }
    if (of.per_channel() > 0) {
      update(running_mean, momentum, moments.data(), [](const Moments& m) { return m.mean; });
      update(running_var, momentum, moments.data(),
             [](const Moments& m) { return m.squares / (m.count - 1); });
    }
    normalise<T, A>(of, xs, centre.data(), scale.data(), shift.data(), y.data<T>());
  });
}

template <class T>
void planes_sums(const Planes& of, const opkit::Elements<T>& xs, const opkit::Elements<T>& grads,
                 const opkit::Elements<float>& means, GradientSums* sums) {
  opkit::parallel_for(0, of.channels, row_grain(of.per_channel()), [&](int64_t begin, int64_t end) {
    const Buffer<T> x_row(xs.is_contiguous() ? 0 : kChunk),
        grad_row(grads.is_contiguous() ? 0 : kChunk);
    for (int64_t c = begin; c < end; ++c)
      for (int64_t s = 0; s < of.samples; ++s)
        in_chunks((s * of.channels + c) * of.inner, of.inner, [&](int64_t at, int64_t n) {
          sums[c].add(xs.read(at, n, x_row.data()), grads.read(at, n, grad_row.data()), n,
                      Wide<T>(means[c]));
        });
  });
}

template <class T>
void rows_sums(const Planes& of, const opkit::Elements<T>& xs, const opkit::Elements<T>& grads,
               const opkit::Elements<float>& means, GradientSums* sums) {
  using A = Wide<T>;
  const int64_t n = of.channels;
  const RowBlocks blocks(of.samples);
  const Buffer<double> partial(blocks.count * 4 * n);
  const Buffer<A> few(blocks.count * 4 * n), saved(n);
  for (int64_t i = 0; i < n; ++i) saved.data()[i] = A(means[i]);
  opkit::parallel_for(
      0, blocks.count, 1 + row_grain(n) / blocks.each, [&](int64_t from, int64_t to) {
        const Buffer<T> x_row(xs.is_contiguous() ? 0 : n), grad_row(grads.is_contiguous() ? 0 : n);
        for (int64_t b = from; b < to; ++b) {
          double* total = partial.data() + b * 4 * n;
          A *d = few.data() + b * 4 * n, *squares = d + n, *grad = squares + n, *dot = grad + n;
#pragma GCC ivdep
          for (int64_t i = 0; i < 4 * n; ++i) total[i] = 0;
          for (int64_t first = blocks.begin(b); first < blocks.end(b); first += kRowsAtOnce) {
            const int64_t last =
                first + kRowsAtOnce < blocks.end(b) ? first + kRowsAtOnce : blocks.end(b);
#pragma GCC ivdep
            for (int64_t i = 0; i < 4 * n; ++i) d[i] = 0;
            for (int64_t r = first; r < last; ++r) {
              const T* row = xs.read(r * n, n, x_row.data());
              const T* g = grads.read(r * n, n, grad_row.data());
#pragma GCC ivdep
              for (int64_t i = 0; i < n; ++i) {
                const A deviation = A(row[i]) - saved.data()[i];
                d[i] += deviation;
                squares[i] += deviation * deviation;
                grad[i] += A(g[i]);
                dot[i] += A(g[i]) * deviation;
              }
            }
#pragma GCC ivdep
            for (int64_t i = 0; i < 4 * n; ++i) total[i] += double(d[i]);
          }
        }
      });
  for (int64_t b = 0; b < blocks.count; ++b)
    for (int64_t i = 0; i < n; ++i) {
      const double* total = partial.data() + b * 4 * n + i;
      sums[i].d += total[0], sums[i].squares += total[n];
      sums[i].grad += total[2 * n], sums[i].dot += total[3 * n];
    }
}

// grad_x = (grad_y - level - (x - centre) slope) scale, with one of each per channel
template <class T, class A>
void differentiate(const Planes& of, const opkit::Elements<T>& xs, const opkit::Elements<T>& grads,
                   const A* centre, const A* level, const A* slope, const A* scale, T* out) {
  const bool rows = of.inner == 1;
  opkit::parallel_for(
      0, rows ? of.samples : of.count(), row_grain(rows ? of.channels : of.inner),
      [&](int64_t begin, int64_t end) {
        const int64_t longest = rows ? of.channels : kChunk;
        const Buffer<T> x_row(xs.is_contiguous() ? 0 : longest),
            grad_row(grads.is_contiguous() ? 0 : longest);
        for (int64_t p = begin; p < end; ++p) {
          if (rows) {
            const T* row = xs.read(p * of.channels, of.channels, x_row.data());
            const T* g = grads.read(p * of.channels, of.channels, grad_row.data());
            T* to = out + p * of.channels;
#pragma GCC ivdep
            for (int64_t i = 0; i < of.channels; ++i)
              to[i] = T((A(g[i]) - level[i] - (A(row[i]) - centre[i]) * slope[i]) * scale[i]);
            continue;
          }
          const int64_t c = p % of.channels;
          const A middle = centre[c], height = level[c], tilt = slope[c], factor = scale[c];
          in_chunks(p * of.inner, of.inner, [&](int64_t at, int64_t n) {
            const T* row = xs.read(at, n, x_row.data());
            const T* g = grads.read(at, n, grad_row.data());
            T* to = out + at;
#pragma GCC ivdep
            for (int64_t i = 0; i < n; ++i)
              to[i] = T((A(g[i]) - height - (A(row[i]) - middle) * tilt) * factor);
          });
        }
      });
}

// grad_x = weight rstd (g - mean(g) - xhat mean(g xhat)), with xhat = (x - mean) rstd
void batch_norm_backward(opkit::Tensor grad_y, opkit::Tensor x, opkit::Tensor weight,
                         opkit::Tensor /*bias*/, opkit::Tensor mean, double eps,
                         opkit::Tensor grad_x, opkit::Tensor grad_weight, opkit::Tensor grad_bias) {
  const Planes of(x);
  dispatch_floating(x, [&](auto zero) {
    using T = decltype(zero);
    using A = Wide<T>;
    const opkit::Elements<T> xs(x), grads(grad_y);
    const opkit::Elements<float> means(mean);
    const int64_t n = of.channels;
    const Buffer<GradientSums> sums(n);
    if (of.inner == 1)
      rows_sums<T>(of, xs, grads, means, sums.data());
    else
      planes_sums<T>(of, xs, grads, means, sums.data());

    const Widened<A> weights(weight, n, 1);
    const Buffer<A> values(4 * n);
    const Buffer<double> for_weight(n), for_bias(n);
    A *centre = values.data(), *level = centre + n, *slope = level + n, *scale = slope + n;
    const double count = of.per_channel() > 0 ? double(of.per_channel()) : 1;
    for (int64_t c = 0; c < n; ++c) {
      const GradientSums& of_c = sums.data()[c];
      const double rstd = of_c.rstd(count, eps), dot = of_c.centred(count) * rstd;
      for_weight.data()[c] = dot;
      for_bias.data()[c] = of_c.grad;
      centre[c] = A(double(means[c]) + of_c.d / count);
      level[c] = A(of_c.grad / count);
      slope[c] = A(dot * rstd / count);
      scale[c] = A(rstd * double(weights.data()[c]));
    }
    add_blocks(for_weight.data(), 1, n, grad_weight);
    add_blocks(for_bias.data(), 1, n, grad_bias);
    differentiate<T, A>(of, xs, grads, centre, level, slope, scale, grad_x.data<T>());
  });
}

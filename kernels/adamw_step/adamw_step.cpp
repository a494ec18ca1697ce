#include <opkit/kernel.h>
#include <opkit_kernels/cpu.h>
#include <opkit_kernels/half.h>
#include "parameter.h"

using namespace opkit_kernels;

constexpr int64_t kBlock = 1024;  // elements at a time, so that copies fit on the stack

// `count` elements that lie side by side
template <class P, class M>
static void step_run(const Step<Wide<P>>& numbers, P* __restrict params, const P* __restrict grads,
                     M* __restrict exp_avgs, M* __restrict exp_avg_sqs, int64_t count) {
  using A = Wide<P>;
  for (int64_t i = 0; i < count; ++i) {
    A p = A(params[i]), m = A(exp_avgs[i]), v = A(exp_avg_sqs[i]);
    numbers.apply(p, A(grads[i]), m, v);
    params[i] = P(p);
    exp_avgs[i] = M(m);
    exp_avg_sqs[i] = M(v);
  }
}

// Halves are converted a block at a time.
template <class M>
static void step_run(const Step<float>& numbers, opkit::Half* params, const opkit::Half* grads,
                     M* exp_avgs, M* exp_avg_sqs, int64_t count) {
  float p[kBlock], g[kBlock], m[kBlock], v[kBlock];
  for (int64_t i = 0; i < count; i += kBlock) {
    const int64_t part = count - i < kBlock ? count - i : kBlock;
    widen(params + i, p, part);
    widen(grads + i, g, part);
    if constexpr (sizeof(M) == sizeof(float)) {
      step_run(numbers, p, g, exp_avgs + i, exp_avg_sqs + i, part);
    } else {
      widen(exp_avgs + i, m, part);
      widen(exp_avg_sqs + i, v, part);
      step_run(numbers, p, g, m, v, part);
      narrow(m, exp_avgs + i, part);
      narrow(v, exp_avg_sqs + i, part);
    }
    narrow(p, params + i, part);
  }
}

// The same through copies, where tensors lie differently or have gaps.
template <class P, class M>
static void step_strided(const Step<Wide<P>>& numbers, const Parameter& one, int64_t begin,
                         int64_t end) {
  const opkit::Elements<P> params(one.param), grads(one.grad);
  const opkit::Elements<M> exp_avgs(one.exp_avg), exp_avg_sqs(one.exp_avg_sq);
  P p[kBlock], g[kBlock];
  M m[kBlock], v[kBlock];
  for (int64_t from = begin; from < end; from += kBlock) {
    const int64_t count = end - from < kBlock ? end - from : kBlock;
    for (int64_t i = 0; i < count; ++i) {
      p[i] = params[from + i];
      g[i] = grads[from + i];
      m[i] = exp_avgs[from + i];
      v[i] = exp_avg_sqs[from + i];
    }
    step_run(numbers, p, g, m, v, count);
    for (int64_t i = 0; i < count; ++i) {
      const_cast<P&>(params[from + i]) = p[i];
      const_cast<M&>(exp_avgs[from + i]) = m[i];
      const_cast<M&>(exp_avg_sqs[from + i]) = v[i];
    }
  }
}

void adamw_step(opkit::Span<opkit::Tensor> params, opkit::Span<opkit::Tensor> grads,
                opkit::Span<opkit::Tensor> exp_avgs, opkit::Span<opkit::Tensor> exp_avg_sqs,
                double lr, opkit::Span<double> betas, double eps, double weight_decay,
                int64_t step) {
  const Parameters all(params, grads, exp_avgs, exp_avg_sqs, step);
  const Buffer<int64_t> ends(all.size());  // of each parameter, counted through all of them
  int64_t total = 0;
  for (int64_t t = 0; t < all.size(); ++t) ends.data()[t] = total += params[t].numel();
  opkit::parallel_for(0, total, 8192, [&](int64_t begin, int64_t end) {
    int64_t t = 0;
    while (ends.data()[t] <= begin) ++t;
    for (; begin < end; ++t) {
      const Parameter one = all[t];
      const int64_t first = ends.data()[t] - one.param.numel();
      const int64_t from = begin - first,
                    until = (ends.data()[t] < end ? ends.data()[t] : end) - first;
      one.dispatch([&](auto p_zero, auto m_zero) {
        using P = decltype(p_zero);
        using M = decltype(m_zero);
        const Step<Wide<P>> numbers(lr, betas, eps, weight_decay, step);
        if (one.is_flat())
          step_run(numbers, one.param.data<P>() + from, one.grad.data<P>() + from,
                   one.exp_avg.data<M>() + from, one.exp_avg_sq.data<M>() + from, until - from);
        else
          step_strided<P, M>(numbers, one, from, until);
      });
      begin = first + until;
    }
  });
}

// What the kernels of adamw_step share: the tensors of one parameter, and the numbers of a step.
#pragma once

#include <math.h>
#include <opkit_kernels/wide.h>

namespace opkit_kernels {

// The numbers of one step, in the type that it is computed in.
template <class A>
struct Step {
  A decay, size, rest1, beta2, rest2, over_root, eps;

  Step(double lr, opkit::Span<double> betas, double eps, double weight_decay, int64_t step)
      : decay(A(lr * weight_decay)), size(A(lr / (1 - pow(betas[0], double(step))))),
        rest1(A(1 - betas[0])), beta2(A(betas[1])), rest2(A(1 - betas[1])),
        over_root(A(1 / sqrt(1 - pow(betas[1], double(step))))), eps(A(eps)) {}

  // Change the parameter p with gradient g, and the averages m and v, in place.
  OPKIT_HOST_DEVICE void apply(A& p, A g, A& m, A& v) const {
    m = m + rest1 * (g - m);
    v = v * beta2 + rest2 * (g * g);
    p = p - (decay * p + size * m / (sqrt(v) * over_root + eps));
  }
};

struct Parameter {
  opkit::Tensor param, grad, exp_avg, exp_avg_sq;

  // Whether one index counts through the memory of all four, without gaps.
  bool is_flat() const {
    for (int64_t i = 0; i < param.dim(); ++i) {
      const int64_t stride = param.stride(i);
      if (param.size(i) > 1 && (grad.stride(i) != stride || exp_avg.stride(i) != stride ||
                                exp_avg_sq.stride(i) != stride))
        return false;
    }
    int64_t expected = 1;
    for (int64_t covered = 0; covered < param.dim(); ++covered)
      for (int64_t i = 0; i < param.dim(); ++i)
        if (param.size(i) > 1 && param.stride(i) == expected) expected *= param.size(i);
    return expected == param.numel();
  }

  // Call body(P{}, M{}) with the types of the parameter and of its averages.
  template <class Body>
  void dispatch(const Body& body) const {
    dispatch_floating(param, [&](auto zero) {
      using P = decltype(zero);
      if (exp_avg.dtype() == opkit::DTypeOf<P>::value)
        body(P{}, P{});
      else
        body(P{}, Wide<P>{});
    });
  }
};

// The lists of a call, checked before anything is written.
class Parameters {
 public:
  Parameters(opkit::Span<opkit::Tensor> params, opkit::Span<opkit::Tensor> grads,
             opkit::Span<opkit::Tensor> exp_avgs, opkit::Span<opkit::Tensor> exp_avg_sqs,
             int64_t step)
      : params_(params), grads_(grads), exp_avgs_(exp_avgs), exp_avg_sqs_(exp_avg_sqs) {
    OPKIT_CHECK(step >= 1, "step is ", step, ", expected 1 or more; count it before the call");
    for (int64_t t = 0; t < size(); ++t) {
      const opkit::DType own = params[t].dtype(), found = exp_avgs[t].dtype();
      const opkit::DType wide =
          own == opkit::DType::float64 ? opkit::DType::float64 : opkit::DType::float32;
      dispatch_floating(params[t], [](auto) {});  // refuses other dtypes
      OPKIT_CHECK(found == own || found == wide, "exp_avgs[", t, "] is ", opkit::name(found),
                  " and its parameter ", opkit::name(own), "; expected that or ",
                  opkit::name(wide));
    }
  }
  int64_t size() const { return params_.size(); }
  Parameter operator[](int64_t t) const {
    return {params_[t], grads_[t], exp_avgs_[t], exp_avg_sqs_[t]};
  }

 private:
  opkit::Span<opkit::Tensor> params_, grads_, exp_avgs_, exp_avg_sqs_;
};

}  // namespace opkit_kernels

// The kernel of 03_cpp_kernel.py: a plain function, named after the op, over views of torch's tensors.
#include <opkit/kernel.h>

#include <type_traits>

// y[t] = decay y[t - 1] + (1 - decay) x[t], along the last dimension. y is allocated already, contiguous.
void ema(opkit::Tensor x, double decay, opkit::Tensor y) {
  OPKIT_CHECK(decay >= 0 && decay < 1, "decay is ", decay, ", expected 0 <= decay < 1");

  opkit::dispatch<float, double, opkit::Half, opkit::BFloat16>(x.dtype(), [&](auto zero) {
    using T = decltype(zero);  // the sums of a half are kept in float
    using A = std::conditional_t<std::is_same_v<T, double>, double, float>;
    const opkit::Elements<T> in(x);  // row-major order, whatever the strides of x
    T* out = y.data<T>();
    const int64_t steps = x.size(-1), rows = steps ? x.numel() / steps : 0;
    const A keep = A(decay), add = A(1 - decay);

    // torch's own threads; each gets rows that hold some 16384 elements or more.
    opkit::parallel_for(0, rows, 1 + 16384 / (steps + 1), [&](int64_t begin, int64_t end) {
      for (int64_t row = begin; row < end; ++row) {
        A state = 0;
        for (int64_t i = row * steps; i < (row + 1) * steps; ++i) {
          state = keep * state + add * A(in[i]);
          out[i] = T(state);
        }
      }
    });
  });
}

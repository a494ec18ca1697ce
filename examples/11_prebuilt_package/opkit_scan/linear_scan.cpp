#include <opkit/kernel.h>

#include "step.h"

// y[t] = a[t] * y[t - 1] + x[t] in each row. a and x may have any strides; y is contiguous.
void linear_scan(opkit::Tensor a, opkit::Tensor x, opkit::Tensor y) {
  const int64_t length = y.size(-1);
  if (y.numel() == 0) return;
  opkit::dispatch<float, double>(y.dtype(), [&](auto zero) {
    using T = decltype(zero);
    const opkit::Elements<T> factors(a), steps(x);
    T* out = y.data<T>();
    opkit::parallel_for(0, y.numel() / length, 1, [&](int64_t begin, int64_t end) {
      for (int64_t row = begin; row < end; ++row)
        scan_row<T>(factors, steps, out, row * length, length);
    });
  });
}

#include <opkit/kernel.h>

// y = a + b. The tensors may have any strides; y is contiguous.
void vector_add(opkit::Tensor a, opkit::Tensor b, opkit::Tensor y) {
  opkit::dispatch<float, double, opkit::BFloat16>(y.dtype(), [&](auto zero) {
    using T = decltype(zero);
    const opkit::Elements<T> left(a), right(b);
    T* out = y.data<T>();
    opkit::parallel_for(0, y.numel(), 32768, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) out[i] = left[i] + right[i];
    });
  });
}

#include <opkit/kernel.h>

#include "step.h"

template <class T>
__global__ void scan(opkit::Elements<T> a, opkit::Elements<T> x, T* y, int64_t rows,
                     int64_t length) {
  const int64_t row = int64_t(blockIdx.x) * blockDim.x + threadIdx.x;
  if (row < rows) scan_row<T>(a, x, y, row * length, length);
}

// y[t] = a[t] * y[t - 1] + x[t], one thread a row. a and x may have any strides; y is contiguous.
void linear_scan(opkit::Tensor a, opkit::Tensor x, opkit::Tensor y) {
  if (y.numel() == 0) return;  // CUDA refuses an empty grid
  const int64_t length = y.size(-1), rows = y.numel() / length;
  opkit::dispatch<float, double>(y.dtype(), [&](auto zero) {
    using T = decltype(zero);
    const opkit::Elements<T> factors(a), steps(x);
    scan<T>
        <<<(rows + 63) / 64, 64, 0, opkit::stream()>>>(factors, steps, y.data<T>(), rows, length);
    OPKIT_CUDA_CHECK(cudaGetLastError());
  });
}

#pragma once

#include <opkit/kernel.h>

// One row, whose elements begin at `first`.
template <class T>
OPKIT_HOST_DEVICE void scan_row(const opkit::Elements<T>& a, const opkit::Elements<T>& x, T* y,
                                int64_t first, int64_t length) {
  T last = 0;
  for (int64_t i = first; i < first + length; ++i) y[i] = last = a[i] * last + x[i];
}

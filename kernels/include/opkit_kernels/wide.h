// The type that opkit's kernels compute in: float for the 16-bit types and float, double for double.
#pragma once

#include <opkit/kernel.h>

namespace opkit_kernels {

template <class T>
struct WideOf {
  using type = float;
};
template <>
struct WideOf<double> {
  using type = double;
};
template <class T>
using Wide = typename WideOf<T>::type;

// Call `body(T{})` with the C++ type of a floating tensor.
template <class Body>
void dispatch_floating(const opkit::Tensor& x, Body&& body) {
  opkit::dispatch<float, double, opkit::Half, opkit::BFloat16>(x.dtype(), body);
}

}  // namespace opkit_kernels

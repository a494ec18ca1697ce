// What quantising to float8_e4m3fn shares: the scale for a largest magnitude, which is kept as the bits of a float.
#pragma once

#include <opkit/kernel.h>

namespace opkit_kernels {

constexpr float kLargestFp8 = 448.0f;
constexpr float kLeastScale = 1.17549435e-38f;  // the smallest normal float: 1 / scale is finite

// The magnitude as an integer, which orders like it; what is not a number is greater than all.
OPKIT_HOST_DEVICE inline uint32_t magnitude(float x) {
  return opkit::number::bits_of(x) & 0x7fffffffu;
}

OPKIT_HOST_DEVICE inline float scale_of(uint32_t largest) {
  const float scale = opkit::number::float_of(largest) / kLargestFp8;
  return scale < kLeastScale ? kLeastScale : scale;
}

}  // namespace opkit_kernels

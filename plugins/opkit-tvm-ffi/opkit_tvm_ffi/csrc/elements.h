// Contiguous tensors as arrays, and the C++ type of their elements. Everything is computed in double and rounded once.
#pragma once

#include <tvm/ffi/container/tensor.h>
#include <tvm/ffi/error.h>
#include <tvm/ffi/function.h>

#include <cstdint>
#include <cstring>

namespace opkit_tvm_ffi {

using tvm::ffi::TensorView;

// The upper half of a float.
class BFloat16 {
 public:
  BFloat16() = default;
  explicit BFloat16(double wide) {
    const float value = narrowed(wide);
    uint32_t bits;
    std::memcpy(&bits, &value, sizeof bits);
    if (value != value)
      bits_ = 0x7fc0;
    else  // to the nearest, ties to even
      bits_ = uint16_t((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
  }
  explicit operator double() const {
    const uint32_t bits = uint32_t(bits_) << 16;
    float value;
    std::memcpy(&value, &bits, sizeof value);
    return value;
  }

 private:
  // Rounding twice, to float and then to 16 bits, is wrong where the first lands in the middle: there the last bit is
  // made odd instead, so that the second knows on which side it was.
  static float narrowed(double wide) {
    const float value = float(wide);
    uint32_t bits;
    std::memcpy(&bits, &value, sizeof bits);
    if (double(value) == wide || value != value || (bits & 0xffff) != 0x8000) return value;
    const bool away = (double(value) > wide) == (value > 0);
    bits += away ? -1 : 1;
    float odd;
    std::memcpy(&odd, &bits, sizeof odd);
    return odd;
  }

  uint16_t bits_;
};

template <class T>
T* elements(const TensorView& tensor) {
  return reinterpret_cast<T*>(static_cast<char*>(tensor.data_ptr()) + tensor.byte_offset());
}

// Call `body(T{})` with the type of a tensor's elements.
template <class Body>
void dispatch(const TensorView& tensor, Body&& body) {
  const DLDataType dtype = tensor.dtype();
  if (dtype.code == kDLFloat && dtype.bits == 32) return body(float{});
  if (dtype.code == kDLFloat && dtype.bits == 64) return body(double{});
  if (dtype.code == kDLBfloat && dtype.bits == 16) return body(BFloat16{});
  TVM_FFI_THROW(TypeError) << "the dtype is " << tvm::ffi::DLDataTypeToString(dtype)
                           << "; expected float32, float64 or bfloat16";
}

}  // namespace opkit_tvm_ffi

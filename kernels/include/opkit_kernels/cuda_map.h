// Functions of neighbouring elements, one by one, of tensors of one shape: several inputs, several outputs.
#pragma once

#include <opkit_kernels/cuda.h>

#include <utility>

namespace opkit_kernels {

// A contiguous tensor to read, where packs lie right.
template <class T>
class Plain {
 public:
  explicit Plain(const opkit::Tensor& x) : data_(x.data<T>()) {}
  static bool fits(const opkit::Tensor& x) {
    return x.is_contiguous() && reinterpret_cast<uintptr_t>(x.data_ptr()) % alignof(Pack<T>) == 0;
  }
  // Elements i and following of n; i is a multiple of the size of a pack.
  __device__ Pack<T> load(int64_t i, int64_t n) const {
    if (i + Pack<T>::kSize <= n) return *reinterpret_cast<const Pack<T>*>(data_ + i);
    Pack<T> pack;
    for (int k = 0; k < Pack<T>::kSize; ++k) pack.at[k] = i + k < n ? data_[i + k] : T(0);
    return pack;
  }

 private:
  const T* data_;
};

// Any other tensor, in row-major order. Packs are loaded where it has rows that lie apart, as the halves of one have.
template <class T>
class Strided {
 public:
  explicit Strided(const opkit::Tensor& x) : elements_(x), data_(x.data<T>()) {
    const int64_t last = x.dim() - 1;
    bool packed = last >= 0 && x.stride(last) == 1 && x.size(last) % Pack<T>::kSize == 0 &&
                  reinterpret_cast<uintptr_t>(data_) % alignof(Pack<T>) == 0;
    for (int64_t i = 0; i + 1 < last; ++i)
      packed = packed && x.stride(i) == x.stride(i + 1) * x.size(i + 1);
    if (!packed || (last > 0 && x.stride(last - 1) % Pack<T>::kSize != 0)) return;
    length_ = x.size(last);
    step_ = last > 0 ? x.stride(last - 1) : 0;
  }
  __device__ Pack<T> load(int64_t i, int64_t n) const {
    if (length_ > 0)
      return *reinterpret_cast<const Pack<T>*>(data_ + i / length_ * step_ + i % length_);
    Pack<T> pack;
#pragma unroll 1
    for (int k = 0; k < Pack<T>::kSize; ++k) pack.at[k] = i + k < n ? elements_[i + k] : T(0);
    return pack;
  }

 private:
  opkit::Elements<T> elements_;
  const T* data_;
  int64_t length_ = 0, step_ = 0;  // of rows in packs
};

constexpr int kMapThreads = 256;

template <class T, class Input, int kIn, int kOut>
struct Operands {
  Input in[kIn];
  T* out[kOut];
  int64_t n;
};

// Each thread computes kPacks packs, with all loads under way before the first is used.
template <int kPacks, class Function, class T, class Input, int kIn, int kOut>
__global__ void __launch_bounds__(kMapThreads)
    map_packs(const __grid_constant__ Operands<T, Input, kIn, kOut> operands, Function function) {
  using A = Wide<T>;
  constexpr int64_t step = int64_t(kMapThreads) * Pack<T>::kSize;
  const int64_t n = operands.n;
  const int64_t first = blockIdx.x * (kPacks * step) + threadIdx.x * Pack<T>::kSize;
  Pack<T> in[kPacks][kIn];
#pragma unroll
  for (int p = 0; p < kPacks; ++p)
#pragma unroll
    for (int j = 0; j < kIn; ++j)
      if (first + p * step < n) in[p][j] = operands.in[j].load(first + p * step, n);
#pragma unroll
  for (int p = 0; p < kPacks; ++p) {
    if (first + p * step >= n) return;
    Pack<T> out[kOut];
#pragma unroll
    for (int k = 0; k < Pack<T>::kSize; ++k) {
      A x[kIn], y[kOut];
#pragma unroll
      for (int j = 0; j < kIn; ++j) x[j] = A(in[p][j].at[k]);
      function(x, y);
#pragma unroll
      for (int j = 0; j < kOut; ++j) out[j].at[k] = T(y[j]);
    }
#pragma unroll
    for (int j = 0; j < kOut; ++j) OutRow<T>(operands.out[j], n).store(first + p * step, out[j]);
  }
}

template <class Function, class Input, int kPacks, class T, int kIn, int kOut, size_t... J,
          size_t... K>
void launch_map(const opkit::Tensor (&inputs)[kIn], const opkit::Tensor (&outputs)[kOut], T,
                std::index_sequence<J...>, std::index_sequence<K...>) {
  const int64_t n = outputs[0].numel(), each = int64_t(kMapThreads) * kPacks * Pack<T>::kSize;
  const Operands<T, Input, kIn, kOut> operands{
      {Input(inputs[J])...}, {outputs[K].template data<T>()...}, n};
  map_packs<kPacks>
      <<<static_cast<unsigned>((n + each - 1) / each), kMapThreads, 0, opkit::stream()>>>(
          operands, Function());
  OPKIT_CUDA_CHECK(cudaGetLastError());
}

// Call function(x, y) with the elements x[kIn] of the inputs at every place; it sets the y[kOut] of the outputs. Both
// are of the type that is computed in.
template <class Function, int kIn, int kOut>
void map(const opkit::Tensor (&inputs)[kIn], const opkit::Tensor (&outputs)[kOut]) {
  if (outputs[0].numel() == 0) return;  // CUDA refuses an empty grid
  dispatch_floating(outputs[0], [&](auto zero) {
    using T = decltype(zero);
    bool plain = true;
    for (const opkit::Tensor& x : inputs) plain = plain && Plain<T>::fits(x);
    const std::make_index_sequence<kIn> in;
    const std::make_index_sequence<kOut> out;
    if (plain)
      launch_map<Function, Plain<T>, 2>(inputs, outputs, zero, in, out);
    else
      launch_map<Function, Strided<T>, 1>(inputs, outputs, zero, in, out);
  });
}

}  // namespace opkit_kernels

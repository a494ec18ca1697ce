// Typed views over a tensor's elements. They copy into CUDA kernels.
#pragma once

#include <opkit/kernel.h>

namespace opkit {

// The elements of a tensor in row-major order, whatever its strides. Dimensions that lie like one
// are merged, so a contiguous tensor costs no more than its pointer. Copies into CUDA kernels.
//     const opkit::Elements<float> in(x);
//     for (int64_t i = begin; i < end; ++i) out[i] = in[i];
template <class T>
class Elements {
 public:
  explicit Elements(const Tensor& x) : data_(x.data<T>()) {
    for (int64_t i = x.dim() - 1; i >= 0; --i) {
      if (x.size(i) == 1) continue;
      if (dim_ > 0 && x.stride(i) == stride_[dim_ - 1] * size_[dim_ - 1]) {
        size_[dim_ - 1] *= x.size(i);
        continue;
      }
      if (dim_ == kMaxDim)
        fail("argument ", x.name(), " has more than ", kMaxDim,
             " dimensions that lie apart; pass it contiguous");
      size_[dim_] = x.size(i);
      stride_[dim_++] = x.stride(i);
    }
    contiguous_ = dim_ == 0 || (dim_ == 1 && stride_[0] == 1) || x.numel() == 0;
  }
  OPKIT_HOST_DEVICE bool is_contiguous() const { return contiguous_; }
  OPKIT_HOST_DEVICE const T& operator[](int64_t i) const {
    return data_[contiguous_ ? i : offset(i)];
  }

  // `count` elements from the i-th on, side by side: where they are, or else copied to `buffer`.
  const T* read(int64_t i, int64_t count, T* buffer) const {
    if (contiguous_) return data_ + i;
    if (stride_[0] == 1 && i % size_[0] + count <= size_[0]) return data_ + offset(i);
    for (int64_t done = 0; done < count;) {
      const T* from = data_ + offset(i + done);
      const int64_t run = size_[0] - (i + done) % size_[0];
      const int64_t length = run < count - done ? run : count - done;
      for (int64_t k = 0; k < length; ++k) buffer[done + k] = from[k * stride_[0]];
      done += length;
    }
    return buffer;
  }

 private:
#if !defined(__CUDACC__)
  __attribute__((noinline))  // or gcc would not take the test for contiguity out of a loop
#endif
  OPKIT_HOST_DEVICE int64_t offset(int64_t i) const {
    int64_t at = 0;
    for (int d = 0; d < dim_ - 1; ++d) {
      at += i % size_[d] * stride_[d];
      i /= size_[d];
    }
    return at + i * stride_[dim_ - 1];
  }
  static constexpr int kMaxDim = 12;
  T* data_;
  bool contiguous_;
  int dim_ = 0;
  int64_t size_[kMaxDim];  // the innermost dimension first
  int64_t stride_[kMaxDim];
};

// A tensor of N dimensions, whatever its strides, from `Tensor::view`, which checks the dtype and the number of
// dimensions. Indices are not checked.
//     const auto in = x.view<const float, 2>();
//     const auto out = y.view<float, 2>();
//     for (int64_t i = 0; i < in.size(0); ++i)
//       for (int64_t j = 0; j < in.size(1); ++j) out(j, i) = 2 * in(i, j);
// Where the last dimension is contiguous, `row` gives a plain pointer:
//     OPKIT_CHECK(in.has_rows(), "x has gaps in its rows; pass it contiguous");
//     const float* row = in.row(i);
template <class T, int N>
class View {
 public:
  View(T* data, const int64_t* sizes, const int64_t* strides) : data_(data) {
    for (int d = 0; d < N; ++d) {
      size_[d] = sizes[d];
      stride_[d] = strides[d];
    }
  }
  OPKIT_HOST_DEVICE T* data() const { return data_; }
  OPKIT_HOST_DEVICE int64_t size(int d) const { return size_[d]; }
  OPKIT_HOST_DEVICE int64_t stride(int d) const { return stride_[d]; }
  template <class... I>
  OPKIT_HOST_DEVICE T& operator()(I... index) const {
    static_assert(sizeof...(I) == N, "one index per dimension");
    return data_[offset(index...)];
  }
  // The first element of a row: an index for each dimension but the last.
  template <class... I>
  OPKIT_HOST_DEVICE T* row(I... index) const {
    static_assert(sizeof...(I) == N - 1, "one index per dimension but the last");
    return data_ + offset(index...);
  }
  // Whether the elements of a row lie side by side.
  OPKIT_HOST_DEVICE bool has_rows() const { return stride_[N - 1] == 1 || size_[N - 1] <= 1; }

 private:
  template <class... I>
  OPKIT_HOST_DEVICE int64_t offset(I... index) const {
    int d = 0;
    int64_t at = 0;
    ((at += static_cast<int64_t>(index) * stride_[d++]), ...);
    return at;
  }
  T* data_;
  int64_t size_[N > 0 ? N : 1], stride_[N > 0 ? N : 1];
};

template <class T, int N>
View<T, N> Tensor::view() const {
  T* data = this->data<T>();
  if (dim_ != N) wrong_dim(N);
  return View<T, N>(data, sizes_, strides_);
}

}  // namespace opkit

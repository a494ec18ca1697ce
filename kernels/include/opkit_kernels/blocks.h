// Runs of elements that CPU kernels read and write, in a type that loops convert fast: halves are converted apart.
#pragma once

#include <opkit_kernels/cpu.h>
#include <opkit_kernels/half.h>

namespace opkit_kernels {

// Up to `size` elements of a tensor at a time, copied where they do not lie side by side.
template <class T>
class Reader {
 public:
  using Element = T;
  Reader(const opkit::Elements<T>& elements, int64_t size)
      : elements_(elements), gathered_(elements.is_contiguous() ? 0 : size) {}
  const T* read(int64_t i, int64_t count) const {
    return elements_.read(i, count, gathered_.data());
  }

 private:
  const opkit::Elements<T>& elements_;
  const Buffer<T> gathered_;
};

template <>
class Reader<opkit::Half> {
 public:
  using Element = float;
  Reader(const opkit::Elements<opkit::Half>& elements, int64_t size)
      : elements_(elements), gathered_(elements.is_contiguous() ? 0 : size), wide_(size) {}
  const float* read(int64_t i, int64_t count) const {
    widen(elements_.read(i, count, gathered_.data()), wide_.data(), count);
    return wide_.data();
  }

 private:
  const opkit::Elements<opkit::Half>& elements_;
  const Buffer<opkit::Half> gathered_;
  const Buffer<float> wide_;
};

// Where up to `size` elements of a result are written at a time; `done` is called after each run.
template <class T>
class Writer {
 public:
  using Element = T;
  Writer(T* data, int64_t) : data_(data) {}
  T* at(int64_t i) const { return data_ + i; }
  void done(int64_t, int64_t) const {}

 private:
  T* data_;
};

template <>
class Writer<opkit::Half> {
 public:
  using Element = float;
  Writer(opkit::Half* data, int64_t size) : data_(data), wide_(size) {}
  float* at(int64_t) const { return wide_.data(); }
  void done(int64_t i, int64_t count) const { narrow(wide_.data(), data_ + i, count); }

 private:
  opkit::Half* data_;
  const Buffer<float> wide_;
};

}  // namespace opkit_kernels

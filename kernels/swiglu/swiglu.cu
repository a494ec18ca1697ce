#include <opkit/kernel.h>
#include <opkit_kernels/cuda.h>

using namespace opkit_kernels;

// A pack per thread where all inputs are contiguous and aligned, else an element at a time.
template <class T>
struct Input {
  opkit::Elements<T> elements;
  bool packed;

  explicit Input(opkit::Tensor x)
      : elements(x), packed(elements.is_contiguous() &&
                            reinterpret_cast<uintptr_t>(x.data_ptr()) % alignof(Pack<T>) == 0) {}
  __device__ Pack<T> load(int64_t i, int64_t n) const {
    if (packed && i + Pack<T>::kSize <= n) return *reinterpret_cast<const Pack<T>*>(&elements[i]);
    Pack<T> pack;
    for (int k = 0; k < Pack<T>::kSize; ++k) pack.at[k] = i + k < n ? elements[i + k] : T(0);
    return pack;
  }
};

template <class T>
__global__ void forward(Input<T> gates, Input<T> ups, T* y, int64_t n) {
  using A = Wide<T>;
  const int64_t i = (int64_t(blockIdx.x) * blockDim.x + threadIdx.x) * Pack<T>::kSize;
  if (i >= n) return;
  const Pack<T> gate = gates.load(i, n), up = ups.load(i, n);
  Pack<T> out;
  for (int k = 0; k < Pack<T>::kSize; ++k) {
    const A g = A(gate.at[k]);
    out.at[k] = T(g / (1 + exp(-g)) * A(up.at[k]));
  }
  OutRow<T>(y, n).store(i, out);
}

template <class T>
__global__ void backward(Input<T> grads, Input<T> gates, Input<T> ups, T* grad_gate, T* grad_up,
                         int64_t n) {
  using A = Wide<T>;
  const int64_t i = (int64_t(blockIdx.x) * blockDim.x + threadIdx.x) * Pack<T>::kSize;
  if (i >= n) return;
  const Pack<T> grad = grads.load(i, n), gate = gates.load(i, n), up = ups.load(i, n);
  Pack<T> out_gate, out_up;
  for (int k = 0; k < Pack<T>::kSize; ++k) {
    const A d = A(grad.at[k]), g = A(gate.at[k]), s = 1 / (1 + exp(-g));
    out_gate.at[k] = T(d * A(up.at[k]) * s * (1 + g * (1 - s)));
    out_up.at[k] = T(d * g * s);
  }
  OutRow<T>(grad_gate, n).store(i, out_gate);
  OutRow<T>(grad_up, n).store(i, out_up);
}

template <class T>
unsigned blocks_for(int64_t n) {
  const int64_t packs = (n + Pack<T>::kSize - 1) / Pack<T>::kSize;
  return static_cast<unsigned>((packs + 255) / 256);
}

// y = gate sigmoid(gate) up
void swiglu(opkit::Tensor gate, opkit::Tensor up, opkit::Tensor y) {
  const int64_t n = y.numel();
  if (n == 0) return;
  dispatch_floating(gate, [&](auto zero) {
    using T = decltype(zero);
    const Input<T> gates(gate), ups(up);
    forward<T><<<blocks_for<T>(n), 256, 0, opkit::stream()>>>(gates, ups, y.data<T>(), n);
    OPKIT_CUDA_CHECK(cudaGetLastError());
  });
}

// grad_gate = grad up s (1 + gate (1 - s)) and grad_up = grad gate s, with s = sigmoid(gate)
void swiglu_backward(opkit::Tensor grad_y, opkit::Tensor gate, opkit::Tensor up,
                     opkit::Tensor grad_gate, opkit::Tensor grad_up) {
  const int64_t n = gate.numel();
  if (n == 0) return;
  dispatch_floating(gate, [&](auto zero) {
    using T = decltype(zero);
    const Input<T> grads(grad_y), gates(gate), ups(up);
    backward<T><<<blocks_for<T>(n), 256, 0, opkit::stream()>>>(
        grads, gates, ups, grad_gate.data<T>(), grad_up.data<T>(), n);
    OPKIT_CUDA_CHECK(cudaGetLastError());
  });
}

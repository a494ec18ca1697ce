#include <opkit/kernel.h>
#include <opkit_kernels/cpu.h>

using namespace opkit_kernels;

constexpr int64_t kBlock =
    1024;  // elements at a time, so that gathered ones fit on the stack and in the L1 cache

// y = gate sigmoid(gate) up
void swiglu(opkit::Tensor gate, opkit::Tensor up, opkit::Tensor y) {
  dispatch_floating(gate, [&](auto zero) {
    using T = decltype(zero);
    using A = Wide<T>;
    const opkit::Elements<T> gates(gate), ups(up);
    T* ys = y.data<T>();
    opkit::parallel_for(0, y.numel(), 8192, [&](int64_t begin, int64_t end) {
      T gate_buffer[kBlock], up_buffer[kBlock];
      for (int64_t i = begin; i < end; i += kBlock) {
        const int64_t count = end - i < kBlock ? end - i : kBlock;
        const T* g = gates.read(i, count, gate_buffer);
        const T* u = ups.read(i, count, up_buffer);
        T* out = ys + i;
        for (int64_t k = 0; k < count; ++k)
          out[k] = T(A(g[k]) / (1 + fast_exp(-A(g[k]))) * A(u[k]));
      }
    });
  });
}

// grad_gate = grad up s (1 + gate (1 - s)) and grad_up = grad gate s, with s = sigmoid(gate)
void swiglu_backward(opkit::Tensor grad_y, opkit::Tensor gate, opkit::Tensor up,
                     opkit::Tensor grad_gate, opkit::Tensor grad_up) {
  dispatch_floating(gate, [&](auto zero) {
    using T = decltype(zero);
    using A = Wide<T>;
    const opkit::Elements<T> grads(grad_y), gates(gate), ups(up);
    T* grad_gates = grad_gate.data<T>();
    T* grad_ups = grad_up.data<T>();
    opkit::parallel_for(0, gate.numel(), 8192, [&](int64_t begin, int64_t end) {
      T grad_buffer[kBlock], gate_buffer[kBlock], up_buffer[kBlock];
      for (int64_t i = begin; i < end; i += kBlock) {
        const int64_t count = end - i < kBlock ? end - i : kBlock;
        const T* d = grads.read(i, count, grad_buffer);
        const T* g = gates.read(i, count, gate_buffer);
        const T* u = ups.read(i, count, up_buffer);
        T* out_gate = grad_gates + i;
        T* out_up = grad_ups + i;
        for (int64_t k = 0; k < count; ++k) {
          const A s = 1 / (1 + fast_exp(-A(g[k])));
          out_gate[k] = T(A(d[k]) * A(u[k]) * s * (1 + A(g[k]) * (1 - s)));
          out_up[k] = T(A(d[k]) * A(g[k]) * s);
        }
      }
    });
  });
}

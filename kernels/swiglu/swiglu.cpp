#include <opkit/kernel.h>
#include <opkit_kernels/cpu_map.h>

using namespace opkit_kernels;

struct Forward {
  template <class A>
  void operator()(const A (&x)[2], A (&y)[1]) const {
    const A gate = x[0], up = x[1];
    y[0] = gate / (1 + fast_exp(-gate)) * up;
  }
};

struct Backward {
  template <class A>
  void operator()(const A (&x)[3], A (&y)[2]) const {
    const A grad = x[0], gate = x[1], up = x[2], s = 1 / (1 + fast_exp(-gate));
    y[0] = grad * up * s * (1 + gate * (1 - s));
    y[1] = grad * gate * s;
  }
};

// y = gate sigmoid(gate) up
void swiglu(opkit::Tensor gate, opkit::Tensor up, opkit::Tensor y) {
  map<Forward>({gate, up}, {y});
}

// grad_gate = grad up s (1 + gate (1 - s)) and grad_up = grad gate s, with s = sigmoid(gate)
void swiglu_backward(opkit::Tensor grad_y, opkit::Tensor gate, opkit::Tensor up,
                     opkit::Tensor grad_gate, opkit::Tensor grad_up) {
  map<Backward>({grad_y, gate, up}, {grad_gate, grad_up});
}

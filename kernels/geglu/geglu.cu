#include <opkit/kernel.h>
#include <opkit_kernels/cuda_map.h>

using namespace opkit_kernels;

// sigmoid(2 u), with u = sqrt(2 / pi) (x + 0.044715 x^3): half of 1 + tanh(u)
template <class A>
__device__ A gate_of(A x) {
  const A scale = A(1.5957691216057308), cubic = A(0.044715);
  return 1 / (1 + exp(-scale * (x + cubic * x * x * x)));
}

struct Forward {
  template <class A>
  __device__ void operator()(const A (&x)[2], A (&y)[1]) const {
    const A gate = x[0], up = x[1];
    y[0] = gate * gate_of(gate) * up;
  }
};

struct Backward {
  template <class A>
  __device__ void operator()(const A (&x)[3], A (&y)[2]) const {
    const A slope = A(1.5957691216057308), bend = slope * 3 * A(0.044715);
    const A grad = x[0], gate = x[1], up = x[2], s = gate_of(gate);
    y[0] = grad * up * (s + gate * s * (1 - s) * (slope + bend * gate * gate));
    y[1] = grad * gate * s;
  }
};

// y = gate s up, with s = sigmoid(2 u(gate))
void geglu(opkit::Tensor gate, opkit::Tensor up, opkit::Tensor y) { map<Forward>({gate, up}, {y}); }

// grad_gate = grad up (s + gate s (1 - s) 2 u'(gate)) and grad_up = grad gate s
void geglu_backward(opkit::Tensor grad_y, opkit::Tensor gate, opkit::Tensor up,
                    opkit::Tensor grad_gate, opkit::Tensor grad_up) {
  map<Backward>({grad_y, gate, up}, {grad_gate, grad_up});
}

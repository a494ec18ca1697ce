// As tutorials print it.
#include <torch/extension.h>

template <typename scalar_t>
__global__ void vector_add_kernel(const scalar_t* a, const scalar_t* b, scalar_t* c, int64_t n) {
  const int64_t i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i < n) {
    c[i] = a[i] + b[i];
  }
}

torch::Tensor vector_add(torch::Tensor a, torch::Tensor b) {
  TORCH_CHECK(a.is_cuda() && b.is_cuda(), "a and b must be CUDA tensors");
  TORCH_CHECK(a.is_contiguous() && b.is_contiguous(), "a and b must be contiguous");
  TORCH_CHECK(a.sizes() == b.sizes(), "a and b must have one size");
  auto c = torch::empty_like(a);
  const int threads = 256;
  const int blocks = (a.numel() + threads - 1) / threads;
  AT_DISPATCH_FLOATING_TYPES(a.scalar_type(), "vector_add", ([&] {
    vector_add_kernel<scalar_t><<<blocks, threads>>>(
        a.data_ptr<scalar_t>(), b.data_ptr<scalar_t>(), c.data_ptr<scalar_t>(), a.numel());
  }));
  return c;
}

PYBIND11_MODULE(TORCH_EXTENSION_NAME, m) {
  m.def("vector_add", &vector_add, "Vector addition (CUDA)");
}

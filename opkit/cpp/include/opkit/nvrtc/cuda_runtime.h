// Of CUDA's own one only what needs no nvcc.
#include <cuda_runtime_api.h>

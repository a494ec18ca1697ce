// NVRTC knows the device's part of it by itself.
#if !defined(__CUDACC_RTC__)
#include_next <cuda_runtime_api.h>
#endif

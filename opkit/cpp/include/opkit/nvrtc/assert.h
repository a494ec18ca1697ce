// On the device `assert` is NVRTC's own; on the host it is the C library's.
#if defined(__CUDACC_RTC__)
#undef assert
#if defined(NDEBUG)
#define assert(condition) ((void)0)
#endif
#else
#include_next <assert.h>
#endif

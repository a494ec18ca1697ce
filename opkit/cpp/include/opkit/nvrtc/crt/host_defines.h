// The words of CUDA's headers, for compilers that do not know them. Those that say where functions run stay as they are.
#if !defined(__HOST_DEFINES_H__)
#define __HOST_DEFINES_H__

#define CUDARTAPI
#define CUDARTAPI_CDECL
#define __device_builtin__
#define __device_builtin_texture_type__
#define __device_builtin_surface_type__
#define __cudart_builtin__
#define __NV_SILENCE_HOST_DEPRECATION_BEGIN
#define __NV_SILENCE_HOST_DEPRECATION_END

#if !defined(__CUDACC_RTC__)
#define __no_return__ __attribute__((noreturn))
#define __noinline__ __attribute__((noinline))
#define __forceinline__ __inline__ __attribute__((always_inline))
#define __inline_hint__
#define __align__(n) __attribute__((aligned(n)))
#define __specialization_static
#define __thread__ __thread
#define __import__
#define __export__
#define __annotate__(a)
#define __location__(a)
#define __builtin_align__(n) __align__(n)
#define CUDARTAPI_CDECL
#endif
#endif

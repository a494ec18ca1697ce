// Launches the kernels that NVRTC compiled: finds the image for the device, and hands it to CUDA's driver. Only the
// build with NVRTC includes it, after the source, so that errors name the op.
#pragma once

#include <dlfcn.h>
#include <opkit/kernel.h>
#include <opkit/nvrtc.h>

namespace opkit {
namespace rtc __attribute__((visibility("hidden"))) {

  // Written by the build step behind the assembly of this unit, and seen only there.
  struct Image {
    int32_t capability;  // 90 for 9.0
    int32_t is_ptx;
    int32_t is_exact;   // of 9.0a: for no other device
    int32_t is_family;  // of 10.0f: for later ones of the same major number
    const void* data;
  };
  struct Entry {
    Kernel* kernel;
    const void* function;
    const char* symbol;  // in the images
    const char* name;    // in the source
  };
  extern "C" __attribute__((visibility("hidden"))) const Image opkit_rtc_images[];
  extern "C" __attribute__((visibility("hidden"))) const Entry opkit_rtc_kernels[];

  // CUDA's driver, which comes with the device and not with the toolkit; its prototypes are those of cuda.h.
  struct Driver {
    int (*cuLibraryLoadData)(void** library, const void* code, int* jit_options, void** jit_values,
                             unsigned jit_count, int* options, void** values, unsigned count);
    int (*cuLibraryGetKernel)(void** kernel, void* library, const char* name);
    int (*cuKernelGetFunction)(void** function, void* kernel);
    int (*cuFuncSetAttribute)(void* function, int attribute, int value);
    int (*cuLaunchKernel)(void* function, unsigned grid_x, unsigned grid_y, unsigned grid_z,
                          unsigned block_x, unsigned block_y, unsigned block_z, unsigned shared,
                          void* stream, void** arguments, void** extra);
    int (*cuOccupancyMaxActiveBlocksPerMultiprocessor)(int* blocks, void* function, int threads,
                                                       size_t shared);
    int (*cuGetErrorName)(int status, const char** text);
    int (*cuGetErrorString)(int status, const char** text);

    Driver() {
      void* library = dlopen("libcuda.so.1", RTLD_NOW | RTLD_LOCAL);
      if (!library) fail("launching a kernel: CUDA's driver does not load: ", dlerror());
#define OPKIT_FROM_DRIVER(name)                                          \
  if (!(name = reinterpret_cast<decltype(name)>(dlsym(library, #name)))) \
  fail("launching a kernel: CUDA's driver has no " #name                 \
       "; expected one of CUDA 12 or newer. "                            \
       "Update NVIDIA's driver.")
      OPKIT_FROM_DRIVER(cuLibraryLoadData);
      OPKIT_FROM_DRIVER(cuLibraryGetKernel);
      OPKIT_FROM_DRIVER(cuKernelGetFunction);
      OPKIT_FROM_DRIVER(cuFuncSetAttribute);
      OPKIT_FROM_DRIVER(cuLaunchKernel);
      OPKIT_FROM_DRIVER(cuOccupancyMaxActiveBlocksPerMultiprocessor);
      OPKIT_FROM_DRIVER(cuGetErrorName);
      OPKIT_FROM_DRIVER(cuGetErrorString);
#undef OPKIT_FROM_DRIVER
    }
  };

  inline const Driver& driver() {
    static const Driver driver;
    return driver;
  }

  inline const Entry& entry(const Kernel& kernel) {
    const Entry* at = opkit_rtc_kernels;
    while (at->kernel != &kernel) ++at;
    return *at;
  }

  inline Kernel& find(const void* function) {
    for (const Entry* at = opkit_rtc_kernels; at->kernel; ++at)
      if (at->function == function) return *at->kernel;
    fail("a function that is no kernel of this source was passed to CUDA as one");
  }

  template <class... Parts>
  void expect(int status, const char* doing, const Kernel& kernel, const Parts&... parts) {
    if (status == 0) return;
    const char *symbol = "an unknown error", *text = "";
    driver().cuGetErrorName(status, &symbol);
    driver().cuGetErrorString(status, &text);
    fail(doing, " ", entry(kernel).name, parts..., ": ", text, " (", symbol, ")");
  }

  // The image for a device: compiled for it, else for a lower one of the same major number, else PTX, which the driver
  // compiles.
  inline int choose(int capability) {
    int best = -1, best_rank = -1;
    for (int i = 0; opkit_rtc_images[i].data; ++i) {
      const Image& image = opkit_rtc_images[i];
      const bool same = image.capability == capability,
                 major = image.capability / 10 == capability / 10;
      const bool fits = same || (!image.is_exact && image.capability < capability &&
                                 (major || (image.is_ptx && !image.is_family)));
      const int rank = image.capability + (image.is_ptx ? 0 : 10000);
      if (fits && rank > best_rank) best = i, best_rank = rank;
    }
    return best;
  }

  inline int image_for_device() {
    static constexpr int kDevices = 128;
    static int chosen[kDevices];  // 1 more than the image; 0 is not known yet
    int device = 0, major = 0, minor = 0;
    cudaError_t status = cudaGetDevice(&device);
    if (status == cudaSuccess && device < kDevices) {
      if (const int known = __atomic_load_n(&chosen[device], __ATOMIC_RELAXED)) return known - 1;
    }
    if (status == cudaSuccess)
      status = cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device);
    if (status == cudaSuccess)
      status = cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device);
    if (status != cudaSuccess)
      fail("launching a kernel: CUDA names no device: ", cudaGetErrorString(status));
    const int image = choose(major * 10 + minor);
    if (image < 0) {
      Text built;
      for (const Image* at = opkit_rtc_images; at->data; ++at)
        built << " " << at->capability / 10 << "." << at->capability % 10
              << (at->is_exact ? "a" : "") << (at->is_family ? "f" : "")
              << (at->is_ptx ? "+PTX" : "");
      fail("launching a kernel: device ", device, " has the architecture ", major, ".", minor,
           ", the kernel is compiled for", built.c_str(), ". Add ", major, ".", minor,
           " to TORCH_CUDA_ARCH_LIST, or unset it");
    }
    if (device < kDevices) __atomic_store_n(&chosen[device], image + 1, __ATOMIC_RELAXED);
    return image;
  }

  // Loading allocates, which a stream under capture forbids unless it is told that this is not part of the graph.
  class OutsideOfCapture {
   public:
    OutsideOfCapture() { cudaThreadExchangeStreamCaptureMode(&mode_); }
    ~OutsideOfCapture() { cudaThreadExchangeStreamCaptureMode(&mode_); }

   private:
    cudaStreamCaptureMode mode_ = cudaStreamCaptureModeRelaxed;
  };

  inline void* library(int image, const Kernel& kernel) {
    static void* loaded[Kernel::kImages];
    void* known = __atomic_load_n(&loaded[image], __ATOMIC_ACQUIRE);
    if (known) return known;
    expect(driver().cuLibraryLoadData(&known, opkit_rtc_images[image].data, nullptr, nullptr, 0,
                                      nullptr, nullptr, 0),
           "loading", kernel);
    __atomic_store_n(&loaded[image], known, __ATOMIC_RELEASE);  // two threads may both load it
    return known;
  }

  // The kernel in the image for the current device.
  inline void* load(Kernel & kernel, int image) {
    void* function = __atomic_load_n(&kernel.loaded[image], __ATOMIC_ACQUIRE);
    if (function) return function;
    const OutsideOfCapture outside;
    cudaFree(nullptr);  // a thread that has not used CUDA yet has no context
    expect(driver().cuLibraryGetKernel(&function, library(image, kernel), entry(kernel).symbol),
           "loading", kernel);
    void* here = nullptr;  // the driver loads it into the context when it is asked for
    expect(driver().cuKernelGetFunction(&here, function), "loading", kernel);
    __atomic_store_n(&kernel.loaded[image], function, __ATOMIC_RELEASE);
    return function;
  }

  // The function of a kernel in the current context, which has attributes of its own.
  inline void* function(Kernel & kernel) {
    void* function = nullptr;
    const OutsideOfCapture outside;
    cudaFree(nullptr);
    expect(driver().cuKernelGetFunction(&function, load(kernel, image_for_device())), "loading",
           kernel);
    return function;
  }

  inline void launch(Kernel & kernel, const Config& config, void** arguments) {
    static constexpr unsigned kFree = 48 * 1024;
    static constexpr int kMaxDynamicShared = 8, kInvalidContext = 201;
    const int image = image_for_device();
    void* const loaded = load(kernel, image);
    void* launched = loaded;
    const unsigned shared = static_cast<unsigned>(config.shared);
    if (shared > kFree) {
      launched = function(kernel);
      expect(driver().cuFuncSetAttribute(launched, kMaxDynamicShared, static_cast<int>(shared)),
             "giving", kernel, " ", shared, " bytes of shared memory");
    }
    const auto run = [&] {
      return driver().cuLaunchKernel(launched, config.grid.x, config.grid.y, config.grid.z,
                                     config.block.x, config.block.y, config.block.z, shared,
                                     config.stream, arguments, nullptr);
    };
    int status = run();
    if (status == kInvalidContext && cudaFree(nullptr) == cudaSuccess) status = run();
    expect(status, "launching", kernel, " with ", config.grid.x, " x ", config.grid.y, " x ",
           config.grid.z, " blocks of ", config.block.x, " x ", config.block.y, " x ",
           config.block.z, " threads and ", shared, " bytes of shared memory");
  }

  // The driver's numbers for attributes of functions and for errors are the runtime's.
  inline cudaError_t set_attribute(Kernel & kernel, cudaFuncAttribute attribute, int value) {
    return static_cast<cudaError_t>(
        driver().cuFuncSetAttribute(function(kernel), static_cast<int>(attribute), value));
  }

  inline cudaError_t count_blocks(int* blocks, Kernel& kernel, int threads, size_t shared) {
    return static_cast<cudaError_t>(driver().cuOccupancyMaxActiveBlocksPerMultiprocessor(
        blocks, function(kernel), threads, shared));
  }

}  // namespace rtc
}  // namespace opkit

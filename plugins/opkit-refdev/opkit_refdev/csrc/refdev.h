// What the parts of the device share. Its memory is the host's, and everything on it has happened when a call returns.
#pragma once
#include <ATen/core/Generator.h>
#include <ATen/core/Tensor.h>
#include <c10/core/Device.h>

#include <optional>
#include <string>

namespace refdev {

constexpr auto kType = c10::DeviceType::PrivateUse1;
constexpr c10::DeviceIndex kDevices = 2;
constexpr int kStreams = 32;  // of each device, beside its default stream

// streams.cpp: the device and the streams that this thread uses
c10::DeviceIndex current_device();
void set_device(c10::DeviceIndex index);
c10::Device device_of(c10::DeviceIndex index);

// memory.cpp
c10::Allocator* allocator();
c10::Allocator* pinned_allocator();
bool is_pinned(const void* data);
c10::DeviceIndex owner_of(const void* data);
void set_memory_limit(c10::DeviceIndex device, int64_t bytes);

// random.cpp
const at::Generator& default_generator(c10::DeviceIndex index);
at::Generator new_generator(c10::DeviceIndex index);
at::Generator host_generator(const std::optional<at::Generator>& generator, c10::DeviceIndex index);

// hooks.cpp
void register_hooks();

// tensors.cpp
at::Tensor on_host(const at::Tensor& tensor);  // the same memory as a tensor of the CPU
at::Tensor on_device(const at::Tensor& host, c10::Device device);  // a copy

// profiler.cpp: the time that something took on the device, noted while a profile is being made
void register_profiler();
class Span {
 public:
  explicit Span(std::string name);
  ~Span();
  Span(const Span&) = delete;
  Span& operator=(const Span&) = delete;

 private:
  std::string name_;
  int64_t start_;
};

}  // namespace refdev

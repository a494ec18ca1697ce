// The current device, streams and events. Work is done when its call returns, so every stream is always idle.
#include "refdev.h"

#include <c10/core/DeviceCapability.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>

#include <array>
#include <atomic>
#include <chrono>

namespace refdev {
namespace {

using Clock = std::chrono::steady_clock;

thread_local c10::DeviceIndex current = 0;
thread_local std::array<c10::StreamId, kDevices> current_stream = {};

struct Event {
  Clock::time_point time;
  c10::DeviceIndex device;
};

c10::Stream stream(c10::Device device, c10::StreamId id) {
  return c10::Stream(c10::Stream::UNSAFE, device, id);
}

c10::Device full(c10::Device device) {
  return device_of(device.has_index() ? device.index() : current);
}

struct Guard final : c10::impl::DeviceGuardImplInterface {
  static constexpr c10::DeviceType static_type = kType;
  Guard() = default;
  explicit Guard(c10::DeviceType) {}

  c10::DeviceType type() const override { return kType; }

  c10::Device exchangeDevice(c10::Device device) const override {
    const c10::Device before = getDevice();
    setDevice(device);
    return before;
  }
  c10::Device getDevice() const override { return {kType, current}; }
  void setDevice(c10::Device device) const override { set_device(device.index()); }
  void uncheckedSetDevice(c10::Device device) const noexcept override { current = device.index(); }
  c10::DeviceIndex deviceCount() const noexcept override { return kDevices; }

  c10::Stream getStream(c10::Device device) const override {
    return stream(full(device), current_stream[full(device).index()]);
  }
  c10::Stream getDefaultStream(c10::Device device) const override {
    return stream(full(device), 0);
  }
  c10::Stream getNewStream(c10::Device device, int) const override {
    static std::array<std::atomic<uint32_t>, kDevices> made = {};
    return stream(full(device), 1 + made[full(device).index()]++ % kStreams);
  }
  c10::Stream getStreamFromGlobalPool(c10::Device device, bool) const override {
    return getNewStream(device, 0);
  }
  c10::Stream exchangeStream(c10::Stream next) const override {
    const c10::Stream before = getStream(next.device());
    current_stream[next.device_index()] = next.id();
    return before;
  }
  void* getStreamNativeHandle(const c10::Stream of) const override {
    return reinterpret_cast<void*>(of.id());
  }
  bool queryStream(const c10::Stream&) const override { return true; }
  void synchronizeStream(const c10::Stream&) const override {}
  void synchronizeDevice(const c10::DeviceIndex) const override {}

  void record(void** event, const c10::Stream& on, const c10::DeviceIndex,
              const c10::EventFlag) const override {
    if (*event == nullptr) *event = new Event();
    *static_cast<Event*>(*event) = {Clock::now(), on.device_index()};
  }
  void block(void*, const c10::Stream&) const override {}
  bool queryEvent(void*) const override { return true; }
  void synchronizeEvent(void*) const override {}
  void destroyEvent(void* event, const c10::DeviceIndex) const noexcept override {
    delete static_cast<Event*>(event);
  }
  double elapsedTime(void* start, void* end, const c10::DeviceIndex) const override {
    TORCH_CHECK(start != nullptr && end != nullptr,
                "refdev: both events must be recorded before their time is asked for");
    const auto& from = *static_cast<Event*>(start);
    const auto& to = *static_cast<Event*>(end);
    return std::chrono::duration<double, std::milli>(to.time - from.time).count();
  }

  c10::DeviceCapability getDeviceCapability(c10::Device) const override {
    return {};
  }  // every dtype
};

C10_REGISTER_GUARD_IMPL(PrivateUse1, Guard)

}  // namespace

c10::DeviceIndex current_device() { return current; }

c10::Device device_of(c10::DeviceIndex index) {
  TORCH_CHECK(index >= 0 && index < kDevices, "refdev:", int(index),
              " does not exist; expected an index from 0 to ", kDevices - 1);
  return {kType, index};
}

void set_device(c10::DeviceIndex index) {
  current = index < 0 ? current : device_of(index).index();
}

}  // namespace refdev

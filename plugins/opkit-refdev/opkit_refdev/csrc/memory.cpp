// Memory of the device: blocks of the host's, counted, with a limit for each device.
#include "refdev.h"

#include <c10/core/CachingDeviceAllocator.h>
#include <unistd.h>

#include <array>
#include <cstdlib>
#include <cstring>
#include <iterator>
#include <map>
#include <mutex>
#include <unordered_map>

namespace refdev {
namespace {

using c10::CachingAllocator::StatArray;
using c10::CachingAllocator::StatType;
using c10::CachingDeviceAllocator::DeviceStats;

constexpr size_t kAlignment = 64;
constexpr size_t kLarge = size_t{1} << 20;

struct Block {
  size_t size;
  c10::DeviceIndex device;
};

void* from_host(size_t size) {
  void* data = nullptr;
  TORCH_CHECK(posix_memalign(&data, kAlignment, size) == 0, "refdev: the host has no ", size,
              " bytes of memory left");
  return data;
}

// No cache: a block that is not used goes back to the host, so what is reserved is what is allocated.
class Memory final : public c10::DeviceAllocator {
 public:
  c10::DataPtr allocate(size_t size) override {
    const auto device = current_device();
    void* data = size ? take(size, device) : nullptr;
    return {data, data, &give_back, device_of(device)};
  }

  c10::DeleterFnPtr raw_deleter() const override { return &give_back; }

  void copy_data(void* to, const void* from, size_t count) const override {
    default_copy_data(to, from, count);
  }

  bool initialized() override { return true; }
  void emptyCache(c10::MempoolId_t) override {}
  void recordStream(const c10::DataPtr&, c10::Stream) override {}  // streams are always idle

  DeviceStats getDeviceStats(c10::DeviceIndex device) override {
    std::lock_guard<std::mutex> lock(mutex_);
    return stats_.at(device);
  }

  void resetAccumulatedStats(c10::DeviceIndex device) override {
    each(device, [](c10::CachingAllocator::Stat& stat) { stat.reset_accumulated(); });
  }

  void resetPeakStats(c10::DeviceIndex device) override {
    each(device, [](c10::CachingAllocator::Stat& stat) { stat.reset_peak(); });
  }

  std::pair<size_t, size_t> getMemoryInfo(c10::DeviceIndex device) override {
    std::lock_guard<std::mutex> lock(mutex_);
    return {limit_.at(device) - used(device), limit_.at(device)};
  }

  void set_limit(c10::DeviceIndex device, size_t bytes) {
    std::lock_guard<std::mutex> lock(mutex_);
    limit_.at(device) = bytes;
  }

  c10::DeviceIndex owner_of(const void* data) {
    std::lock_guard<std::mutex> lock(mutex_);
    const auto found = blocks_.find(data);
    return found == blocks_.end() ? current_device() : found->second.device;
  }

 private:
  void* take(size_t size, c10::DeviceIndex device) {
    std::lock_guard<std::mutex> lock(mutex_);
    if (used(device) + size > limit_.at(device)) {
      stats_.at(device).num_ooms++;
      TORCH_CHECK_WITH(OutOfMemoryError, false, "refdev:", int(device), " is out of memory: ", size,
                       " bytes were asked for and ", used(device), " of ", limit_.at(device),
                       " are in use. Free tensors, or see torch.refdev.set_memory_limit.");
    }
    void* data = from_host(size);
    blocks_[data] = {size, device};
    count(device, size,
          [](c10::CachingAllocator::Stat& stat, size_t amount) { stat.increase(amount); });
    stats_.at(device).num_device_alloc++;
    return data;
  }

  static void give_back(void* data);

  void forget(void* data) {
    std::lock_guard<std::mutex> lock(mutex_);
    const auto found = blocks_.find(data);
    const auto [size, device] = found->second;
    count(device, size,
          [](c10::CachingAllocator::Stat& stat, size_t amount) { stat.decrease(amount); });
    stats_.at(device).num_device_free++;
    blocks_.erase(found);
  }

  size_t used(c10::DeviceIndex device) {
    return stats_.at(device).allocated_bytes[static_cast<size_t>(StatType::AGGREGATE)].current;
  }

  template <typename F>
  void count(c10::DeviceIndex device, size_t size, const F& change) {
    auto& stats = stats_.at(device);
    for (const auto type :
         {StatType::AGGREGATE, size >= kLarge ? StatType::LARGE_POOL : StatType::SMALL_POOL}) {
      const auto i = static_cast<size_t>(type);
      for (StatArray* blocks : {&stats.allocation, &stats.segment, &stats.active})
        change((*blocks)[i], 1);
      for (StatArray* bytes : {&stats.allocated_bytes, &stats.reserved_bytes, &stats.active_bytes,
                               &stats.requested_bytes})
        change((*bytes)[i], size);
    }
  }

  template <typename F>
  void each(c10::DeviceIndex device, const F& change) {
    std::lock_guard<std::mutex> lock(mutex_);
    auto& stats = stats_.at(device);
    for (StatArray* array :
         {&stats.allocation, &stats.segment, &stats.active, &stats.allocated_bytes,
          &stats.reserved_bytes, &stats.active_bytes, &stats.requested_bytes})
      for (auto& stat : *array) change(stat);
  }

  static size_t of_host() {
    return size_t(sysconf(_SC_PHYS_PAGES)) * size_t(sysconf(_SC_PAGE_SIZE));
  }

  std::mutex mutex_;
  std::unordered_map<const void*, Block> blocks_;
  std::array<DeviceStats, kDevices> stats_;
  std::array<size_t, kDevices> limit_ = {of_host(), of_host()};
};

// Never destroyed: tensors may outlive what is.
Memory& memory() {
  static auto* const memory = new Memory();
  return *memory;
}

void Memory::give_back(void* data) {
  if (data == nullptr) return;
  memory().forget(data);
  std::free(data);
}

// Pinned memory: the host's, of which it is known that it is.
class Pinned final : public c10::Allocator {
 public:
  c10::DataPtr allocate(size_t size) override {
    void* data = size ? from_host(size) : nullptr;
    std::lock_guard<std::mutex> lock(mutex_);
    if (data != nullptr) blocks_[reinterpret_cast<uintptr_t>(data)] = size;
    return {data, data, &give_back, c10::Device(c10::DeviceType::CPU)};
  }

  c10::DeleterFnPtr raw_deleter() const override { return &give_back; }
  void copy_data(void* to, const void* from, size_t count) const override {
    default_copy_data(to, from, count);
  }

  bool holds(const void* data) {
    std::lock_guard<std::mutex> lock(mutex_);
    const auto address = reinterpret_cast<uintptr_t>(data);
    auto after = blocks_.upper_bound(address);
    return after != blocks_.begin() && address < std::prev(after)->first + std::prev(after)->second;
  }

 private:
  static void give_back(void* data);
  std::mutex mutex_;
  std::map<uintptr_t, size_t> blocks_;
};

Pinned& pinned() {
  static auto* const pinned = new Pinned();
  return *pinned;
}

void Pinned::give_back(void* data) {
  {
    std::lock_guard<std::mutex> lock(pinned().mutex_);
    pinned().blocks_.erase(reinterpret_cast<uintptr_t>(data));
  }
  std::free(data);
}

const int registered = [] {
  c10::SetAllocator(kType, &memory());
  return 0;
}();

}  // namespace

c10::Allocator* allocator() { return &memory(); }
c10::Allocator* pinned_allocator() { return &pinned(); }
bool is_pinned(const void* data) { return pinned().holds(data); }
c10::DeviceIndex owner_of(const void* data) { return memory().owner_of(data); }

void set_memory_limit(c10::DeviceIndex device, int64_t bytes) {
  TORCH_CHECK(bytes >= 0, "refdev: a memory limit of ", bytes, " bytes; expected 0 or more");
  memory().set_limit(device_of(device).index(), size_t(bytes));
}

}  // namespace refdev

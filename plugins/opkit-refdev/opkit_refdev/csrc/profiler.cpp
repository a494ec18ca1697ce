// What the profiler shows of the device: a span for each kernel, copy and fallback, on its stream.
#include "refdev.h"

#include <c10/util/ApproximateClock.h>
#include <torch/csrc/profiler/stubs/base.h>

#if __has_include(<torch/csrc/profiler/standalone/privateuse1_profiler.h>)  // since torch 2.12
#define USE_KINETO
#include <libkineto.h>
#include <torch/csrc/profiler/standalone/privateuse1_profiler.h>
#define REFDEV_HAS_ACTIVITIES 1
#endif

#include <unistd.h>

#include <atomic>
#include <mutex>

namespace refdev {
namespace {

struct Record {
  std::string name;
  int64_t start;
  int64_t end;
  c10::DeviceIndex device;
};

std::atomic<bool> recording{false};
std::mutex mutex;
std::vector<Record> records;

#ifdef REFDEV_HAS_ACTIVITIES

using libkineto::ActivityType;

class Session final : public libkineto::IActivityProfilerSession {
 public:
  void start() override {
    std::lock_guard<std::mutex> lock(mutex);
    records.clear();
    recording = true;
  }

  void stop() override { recording = false; }
  std::vector<std::string> errors() override { return {}; }

  void processTrace(libkineto::ActivityLogger& logger) override {
    fill();
    for (const auto& activity : buffer_->activities) activity->log(logger);
  }

  std::unique_ptr<libkineto::DeviceInfo> getDeviceInfo() override { return nullptr; }
  std::vector<libkineto::ResourceInfo> getResourceInfos() override { return {}; }

  std::unique_ptr<libkineto::CpuTraceBuffer> getTraceBuffer() override {
    fill();
    return std::move(buffer_);
  }

 private:
  void fill() {
    std::lock_guard<std::mutex> lock(mutex);
    if (!buffer_) {
      buffer_ = std::make_unique<libkineto::CpuTraceBuffer>();
      buffer_->span = libkineto::TraceSpan(0, 0, "refdev");
    }
    for (const auto& record : records) {
      buffer_->emplace_activity(buffer_->span, ActivityType::CONCURRENT_KERNEL, record.name);
      auto& activity = *buffer_->activities.back();
      activity.startTime = record.start;
      activity.endTime = record.end;
      activity.device = record.device;
      activity.resource = 0;
    }
    records.clear();
  }

  std::unique_ptr<libkineto::CpuTraceBuffer> buffer_;
};

class Profiler final : public libkineto::IActivityProfiler {
 public:
  const std::string& name() const override { return name_; }
  const std::set<ActivityType>& availableActivities() const override { return types_; }

  std::unique_ptr<libkineto::IActivityProfilerSession> configure(
      const std::set<ActivityType>&, const libkineto::Config&) override {
    return std::make_unique<Session>();
  }
  std::unique_ptr<libkineto::IActivityProfilerSession> configure(
      int64_t, int64_t, const std::set<ActivityType>&, const libkineto::Config&) override {
    return std::make_unique<Session>();
  }

 private:
  const std::string name_ = "refdev";
  const std::set<ActivityType> types_ = {ActivityType::CONCURRENT_KERNEL};
};

void register_activities() {
  torch::profiler::impl::PrivateUse1ProfilerRegistry::instance().registerFactory(
      [] { return std::make_unique<Profiler>(); });
}

#else

void register_activities() {}

#endif

// The older way, which every torch has: an event before and after each op.
struct Stubs final : torch::profiler::impl::ProfilerStubs {
  void record(c10::DeviceIndex* device, torch::profiler::impl::ProfilerVoidEventStub* event,
              int64_t* cpu_ns) const override {
    const int64_t now = c10::getTime();
    if (device != nullptr) *device = current_device();
    if (cpu_ns != nullptr) *cpu_ns = now;
    *event = std::make_shared<int64_t>(now);
  }
  float elapsed(const torch::profiler::impl::ProfilerVoidEventStub* from,
                const torch::profiler::impl::ProfilerVoidEventStub* to) const override {
    return float(*std::static_pointer_cast<int64_t>(*to) -
                 *std::static_pointer_cast<int64_t>(*from)) /
           1000.f;
  }
  void mark(const char*) const override {}
  void rangePush(const char*) const override {}
  void rangePop() const override {}
  bool enabled() const override { return true; }
  void onEachDevice(std::function<void(int)> visit) const override {
    for (int i = 0; i < kDevices; ++i) visit(i);
  }
  void synchronize() const override {}
};

}  // namespace

void register_profiler() {
  static auto* const stubs = new Stubs();
  torch::profiler::impl::registerPrivateUse1Methods(stubs);
  register_activities();
}

Span::Span(std::string name)
    : name_(recording ? std::move(name) : std::string()), start_(recording ? c10::getTime() : 0) {}

Span::~Span() {
  if (!recording || start_ == 0) return;
  std::lock_guard<std::mutex> lock(mutex);
  records.push_back({std::move(name_), start_, c10::getTime(), current_device()});
}

}  // namespace refdev

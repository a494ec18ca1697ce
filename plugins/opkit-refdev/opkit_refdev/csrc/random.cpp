// Random numbers of the device: a generator of the host inside one of the device, so that CPU kernels can draw from it.
#include "refdev.h"

#include <ATen/CPUGeneratorImpl.h>

namespace refdev {
namespace {

class Generator final : public c10::GeneratorImpl {
 public:
  Generator(c10::DeviceIndex index, at::Generator host)
      : c10::GeneratorImpl(device_of(index), c10::DispatchKeySet(c10::DispatchKey::PrivateUse1)),
        host_(std::move(host)) {}

  static c10::DeviceType device_type() { return kType; }  // for check_generator
  const at::Generator& host() const { return host_; }

  void set_current_seed(uint64_t seed) override { host_.set_current_seed(seed); }
  uint64_t current_seed() const override { return host_.current_seed(); }
  uint64_t seed() override {
    auto host = host_;
    return host.seed();
  }
  void set_offset(uint64_t offset) override { host_.set_offset(offset); }
  uint64_t get_offset() const override { return host_.get_offset(); }
  void set_state(const c10::TensorImpl& state) override {
    host_.unsafeGetGeneratorImpl()->set_state(state);
  }
  c10::intrusive_ptr<c10::TensorImpl> get_state() const override {
    return host_.unsafeGetGeneratorImpl()->get_state();
  }

 private:
  Generator* clone_impl() const override { return new Generator(device().index(), host_.clone()); }

  at::Generator host_;
};

}  // namespace

at::Generator new_generator(c10::DeviceIndex index) {
  return at::make_generator<Generator>(index < 0 ? current_device() : index,
                                       at::detail::createCPUGenerator());
}

const at::Generator& default_generator(c10::DeviceIndex index) {
  static const std::vector<at::Generator> all = {new_generator(0), new_generator(1)};
  static_assert(kDevices == 2);
  return all[device_of(index < 0 ? current_device() : index).index()];
}

at::Generator host_generator(const std::optional<at::Generator>& generator,
                             c10::DeviceIndex index) {
  const bool given = generator.has_value() && generator->defined();
  const at::Generator& used = given ? *generator : default_generator(index);
  return used.device().type() == kType ? at::check_generator<Generator>(used)->host() : used;
}

}  // namespace refdev

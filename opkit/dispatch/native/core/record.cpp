#include "record.h"

namespace opkit_core {

std::atomic<uint64_t> epoch{1};
std::atomic<bool> preferences{false};

std::shared_ptr<const Formula> Record::formula() const {
  const std::lock_guard<std::mutex> lock(mutex_);
  return formula_;
}

void Record::set_formula(std::shared_ptr<const Formula> formula) {
  const std::lock_guard<std::mutex> lock(mutex_);
  formula_.swap(formula);
}

const Kernel* Record::known(const Case& when) const {
  if (epoch_ != epoch.load(std::memory_order_acquire)) { return nullptr; }
  for (const Choice& choice : choices_) {
    if (choice.when.device != when.device || choice.when.dtype != when.dtype ||
        choice.when.deterministic != when.deterministic || choice.when.bucket != when.bucket) {
      continue;
    }
    if (choice.when.wanted == when.wanted) { return choice.kernel.get(); }
    if (choice.when.wanted != nullptr &&
        when.wanted != nullptr) {  // another object, as a rule an equal one
      const int same = PyObject_RichCompareBool(choice.when.wanted, when.wanted, Py_EQ);
      if (same < 0) { PyErr_Clear(); }
      if (same > 0) { return choice.kernel.get(); }
    }
  }
  return nullptr;
}

std::shared_ptr<const Kernel> Record::known_by_all(c10::DeviceType device, c10::ScalarType dtype,
                                                   uint8_t bucket) const {
  const std::lock_guard<std::mutex> lock(mutex_);
  if (epoch_ == epoch.load(std::memory_order_acquire)) {
    for (const Choice& choice : choices_) {
      const Case& when = choice.when;
      if (when.device == device && when.dtype == dtype && when.bucket == bucket &&
          !when.deterministic && when.wanted == nullptr) {
        return choice.kernel;
      }
    }
  }
  return nullptr;
}

void Record::remember(const Case& when, std::shared_ptr<const Kernel> kernel, uint64_t epoch) {
  Kept wanted(Ref::borrow(when.wanted));
  const std::lock_guard<std::mutex> lock(mutex_);
  if (epoch_ != epoch) {
    std::move(choices_.begin(), choices_.end(), std::back_inserter(dropped_));
    choices_.clear();
    epoch_ = epoch;
  }
  choices_.push_back({when, std::move(wanted), std::move(kernel)});
}

Calling::~Calling() {
  if (--record_.calls_ == 0 && !record_.dropped_.empty()) {
    std::vector<Choice> dropped;  // what goes with them may run Python, and calls of the op
    dropped.swap(record_.dropped_);
  }
}

}  // namespace opkit_core

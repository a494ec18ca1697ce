// A call: the kernel, and the results.
#pragma once

#include "arguments.h"
#include "state.h"

namespace opkit_core {

// What a kernel returned: as torch carries it, and as the caller gets it.
struct Returned {
  Ref raw;
  Ref whole;
};

// A kernel for the time of a call: one that is remembered, or one of this call alone.
class Chosen {
 public:
  explicit Chosen(const Kernel* known) : kernel_(known) {}
  explicit Chosen(std::shared_ptr<const Kernel> own) : kernel_(own.get()), own_(std::move(own)) {}

  const Kernel& operator*() const { return *kernel_; }

 private:
  const Kernel* kernel_;
  std::shared_ptr<const Kernel> own_;
};

// The size of a call as `Case` has it: one more than the bit length of the number of elements, which is the bucket in
// dispatch/measured.py.
uint8_t bucket_of(const Record& record, const Arguments& arguments);

// Chooses a kernel, for as long as the `Calling` of the caller; Python is asked where that was never done.
Chosen select(Record& record, const Arguments& arguments);

// Runs a kernel below autograd.
Returned run(Record& record, const Kernel& kernel, Arguments& arguments);

// Runs a native kernel on a stack of arguments, which it replaces by the results. Needs no GIL.
void run_native(const Kernel& kernel, c10::DispatchKey key, torch::jit::Stack& stack);

// The key of the kernels for the device of a plain tensor.
c10::DispatchKey device_key(const at::Tensor& tensor);

// Runs a kernel, and records how the call is differentiated.
Returned differentiate(std::shared_ptr<Record> record, const Kernel& kernel, Arguments& arguments);

// The results among what was returned, one for each that is declared.
c10::SmallVector<PyObject*, 4> flat_results(const Record& record, PyObject* raw);

}  // namespace opkit_core

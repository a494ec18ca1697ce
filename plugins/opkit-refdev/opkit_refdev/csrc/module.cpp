// What Python needs of the device beyond torch's own functions. Importing the module makes the device usable.
#include <torch/csrc/utils/pybind.h>

#include "collectives.h"
#include "refdev.h"

PYBIND11_MODULE(TORCH_EXTENSION_NAME, m) {
  refdev::register_hooks();
  refdev::register_profiler();
  m.def("device_count", [] { return refdev::kDevices; });
  m.def("current_device", &refdev::current_device);
  m.def("set_device", &refdev::set_device);
  m.def("default_generator", &refdev::default_generator);
  m.def("set_memory_limit", &refdev::set_memory_limit);
  m.def("collectives_over", &refdev::collectives_over);
}

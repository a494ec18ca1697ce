"""torch.compile for the device: Inductor's C++ kernels for the CPU, which run on its memory, as that is the host's.

Inductor asks `torch.refdev` for the classes here when it first compiles for the device; importing this tells Dynamo
of it too, and imports both.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
from torch._dynamo.device_interface import DeviceInterface, register_interface_for_device
from torch._inductor import config
from torch._inductor.codegen.common import DeviceOpOverrides, register_device_op_overrides
from torch._inductor.codegen.cpp import CppScheduling
from torch._inductor.codegen.cpp_wrapper_cpu import CppWrapperCpu
from torch._inductor.codegen.wrapper import PythonWrapperCodegen as _PythonWrapperCodegen
from torch._inductor.codegen.wrapper import SubgraphPythonWrapperCodegen
from torch._inductor.codegen.wrapper_fxir import WrapperFxCodegen
from torch._inductor.virtualized import V

from opkit_refdev import runtime
from opkit_refdev.stub import device_count, is_available

__all__ = ["CppWrapperCodegen", "PythonWrapperCodegen", "Scheduling", "WrapperFxCodegen"]

Scheduling = CppScheduling


class PythonWrapperCodegen(_PythonWrapperCodegen):
    """The Python around the kernels, which are called as those of the CPU."""

    @staticmethod
    def create(is_subgraph: bool, name: str | None, parent: Any, partition_signatures: Any = None) -> Any:
        """Return the generator for a graph, or for one inside another."""
        if is_subgraph:
            return SubgraphPythonWrapperCodegen(name, parent, partition_signatures)
        return PythonWrapperCodegen()

    def _generate_kernel_call_helper(
        self, kernel_name: str, call_args: Any, *, device: Any = None, **options: Any
    ) -> Any:
        device = device or V.graph.get_current_device_or_throw()
        if device.type == "refdev":
            device = torch.device("cpu")
        return super()._generate_kernel_call_helper(kernel_name, call_args, device=device, **options)


# Inductor registers a device only where it has all four, and says nothing where one is missing.
CppWrapperCodegen = CppWrapperCpu


class _Overrides(DeviceOpOverrides):
    def import_get_raw_stream_as(self, name: str) -> str:
        return f"def {name}(index): return 0"

    def set_device(self, device_idx: int) -> str:
        return "pass"

    def synchronize(self) -> str:
        return "pass"

    def device_guard(self, device_idx: int) -> str:
        return f"torch.refdev.device({device_idx})"

    def cpp_kernel_type(self) -> str:
        return "void*"


class _Interface(DeviceInterface):
    device = torch.refdev.device
    Event = torch.Event
    Stream = torch.Stream

    class Worker:
        @staticmethod
        def set_device(device: int) -> None:
            runtime.set_device(device)

        @staticmethod
        def current_device() -> int:
            return runtime.current_device()

        @staticmethod
        def get_device_properties(device: Any = None) -> Any:
            return SimpleNamespace(type="refdev", index=0, multi_processor_count=1)

    current_device = staticmethod(runtime.current_device)
    set_device = staticmethod(runtime.set_device)
    current_stream = staticmethod(runtime.current_stream)
    set_stream = staticmethod(runtime.set_stream)
    stream = staticmethod(runtime.stream)
    device_count = staticmethod(device_count)
    is_available = staticmethod(is_available)
    synchronize = staticmethod(runtime.synchronize)
    memory_allocated = staticmethod(runtime.memory_allocated)

    @staticmethod
    def maybe_exchange_device(device: int) -> int:
        before = runtime.current_device()
        if device >= 0:
            runtime.set_device(device)
        return before

    exchange_device = maybe_exchange_device

    @staticmethod
    def get_raw_stream(device_idx: int) -> int:
        return 0

    @staticmethod
    def get_compute_capability(device: Any = None) -> int:
        return 0

    @staticmethod
    def is_bf16_supported(including_emulation: bool = False) -> bool:
        return True


# Inductor asks for the device "cpu" by name before it leaves these out, which its C++ scheduling does not know
# (torch/_inductor/scheduler.py, shared_data_after_reordering_loop). They go when it asks the scheduling.
for _option in ("loop_ordering_after_fusion", "loop_reindexing_after_fusion"):
    if hasattr(config, _option):
        setattr(config, _option, False)

register_interface_for_device("refdev", _Interface)
for _index in range(device_count()):
    register_interface_for_device(f"refdev:{_index}", _Interface)
register_device_op_overrides("refdev", _Overrides())

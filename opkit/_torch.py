"""The one place where opkit touches what is private in torch, beside `_torch_build` for its build files.

Each entry says which upstream code it stands on, and when it may go. The test-suite has run over them on torch
2.11, 2.13 and 2.15. Nothing else in opkit uses a name of torch that starts with an underscore.
"""

from __future__ import annotations

import ctypes
import functools
import sys
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.autograd import forward_ad

F = TypeVar("F", bound=Callable[..., Any])

# torch/_library/autograd.py uses these three for the Python autograd kernel of custom_op. They go
# when torch offers "redispatch below autograd" publicly.
below_autograd: Callable[[], Any] = torch._C._AutoDispatchBelowAutograd
after_autograd: Any = torch._C._after_autograd_keyset
any_requires_grad: Callable[..., bool] = torch._C._any_requires_grad

# torch/_library/custom_ops.py uses it in the ADInplaceOrView kernel of mutating custom ops.
after_inplace_or_view: Any = torch._C._after_ADInplaceOrView_keyset

# Whether two tensors share a storage; untyped_storage() would create two Python objects for it.
is_alias_of: Callable[[Tensor, Tensor], bool] = torch._C._is_alias_of  # type: ignore[attr-defined]

# The documented way to see every operation; only its module is private (torch/utils/_python_dispatch.py).
TorchDispatchMode = torch.utils._python_dispatch.TorchDispatchMode

# Objects that torch carries to autograd's own threads (at::ThreadLocalState). pytorch has no public
# way to do that; torch/_dynamo and torch/distributed use the same two.
_STASHED = "opkit"


def stash(value: Any) -> None:
    """Keep `value` for this thread and for the autograd threads that work on its behalf."""
    if not _stash_takes_a_reference():
        ctypes.pythonapi.Py_IncRef(ctypes.py_object(value))
    torch._C._stash_obj_in_tls(_STASHED, value)


@functools.cache
def _stash_takes_a_reference() -> bool:
    """Whether torch counts its reference to a stashed object.

    torch 2.11 does not, and gives one back all the same when the object is replaced, which frees it twice
    (torch/csrc/autograd/init.cpp; right in 2.13). Drop this with support for torch before 2.13.
    """
    probe = object()
    before = sys.getrefcount(probe)
    torch._C._stash_obj_in_tls(_STASHED, probe)
    if sys.getrefcount(probe) > before:
        return True
    ctypes.pythonapi.Py_IncRef(ctypes.py_object(probe))
    return False


def stashed() -> Any:
    """Return what `stash` kept, or None."""
    return torch._C._get_obj_in_tls(_STASHED) if torch._C._is_key_in_tls(_STASHED) else None


# What Dynamo keeps of one attempt at tracing a function; it starts anew after a graph break, so
# that nothing of a failed attempt is left (torch/_dynamo/output_graph.py creates it).
tracing: Callable[[], Any] = torch._guards.TracingContext.try_get


def in_subgraph() -> bool:
    """Whether Dynamo is tracing the body of a higher-order operator, such as a checkpointed function.

    There it refuses code that changes objects from outside (torch/_dynamo/variables/higher_order_ops.py).
    """
    from torch._dynamo.symbolic_convert import InstructionTranslator

    return not InstructionTranslator.current_tx().output.is_root_tracer()


def register_meta(
    library: torch.library.Library, name: str, function: Callable[..., Any], source: str
) -> None:
    """Register the meta function of an op defined in `library`.

    `Library._register_fake` looks up the source text of its caller, which takes 0.45 ms per op;
    opkit knows the source already (torch/_library/fake_impl.py, FakeImplHolder.register).
    """
    entry = torch._library.simple_registry.singleton.find(f"{library.ns}::{name}")
    handle = entry.fake_impl.register(function, source, lib=library)
    library._registration_handles.append(handle)


def destroy(library: torch.library.Library) -> None:
    """Take back everything that was defined and registered through `library`."""
    library._destroy()


def in_forward_mode() -> bool:
    """Whether a forward-mode level is open (torch/autograd/forward_ad.py)."""
    return forward_ad._current_level >= 0


def has_tangent(tensor: Tensor) -> bool:
    """Whether `tensor` carries a forward-mode tangent."""
    return in_forward_mode() and forward_ad.unpack_dual(tensor).tangent is not None


def constant_while_tracing(function: F) -> F:
    """Have Dynamo run `function` as it traces, and take its result for a constant.

    `torch.compiler.assume_constant_result` does just this (torch/_dynamo/decorators.py), but imports
    Dynamo first, a second that programs without torch.compile need not spend.
    """
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function


class Straight:
    """Whether calls of an overload may go straight to opkit's kernel, without another trip through dispatch.

    They may where nothing but a device is left below autograd, and nobody else has a kernel on that device:
    the dispatcher is asked once per kind of call, and torch's list of later registrations from Python every time.
    """

    def __init__(self, overload: Any) -> None:
        self._name = overload.name()
        self._known: dict[int, bool] = {}
        # torch/library.py notes every Library.impl there, as namespace/op/key.
        qualified = self._name.replace("::", "/")
        self._impls = torch.library._impls
        self._cpu, self._cuda = f"{qualified}/CPU", f"{qualified}/CUDA"

    def __call__(self, keyset: Any) -> bool:
        """Return the answer for a call with the dispatch keys `keyset`."""
        kind = keyset.raw_repr()
        known = self._known.get(kind)
        if known is None:
            highest = (keyset & after_inplace_or_view).highestPriorityTypeId()
            plain = highest in (torch._C.DispatchKey.CPU, torch._C.DispatchKey.CUDA)
            has = torch._C._dispatch_has_kernel_for_dispatch_key
            known = self._known[kind] = plain and not has(self._name, highest)
        return known and self._cpu not in self._impls and self._cuda not in self._impls


def dispatch_key(device: str) -> str:
    """Return the name of the dispatch key of a device type (torch/library.py uses the same)."""
    return str(torch._C._dispatch_key_for_device(device))


def privateuse_name() -> str:
    """Return the name under which PrivateUse1 goes now."""
    return str(torch._C._get_privateuse1_backend_name())

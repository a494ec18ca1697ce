"""What opkit touches of torch's private interfaces for calling ops: keys, modes, transforms and threads.

With `_torch_library` for defining ops and registering kernels, `_torch_device` for plugins' devices, `_torch_build` for
torch's build files and `_torch_compile` for its compiler this is the one small place for that: nothing else in opkit
uses a name of torch that starts with an underscore. Each entry says which upstream code it stands on, and when it may
go. The test-suite has run over them on torch 2.11, 2.13 and 2.15.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import sys
import weakref
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.autograd import forward_ad, profiler

F = TypeVar("F", bound=Callable[..., Any])

# torch/_library/autograd.py uses these three for the Python autograd kernel of custom_op. They go
# when torch offers "redispatch below autograd" publicly.
below_autograd: Callable[[], Any] = torch._C._AutoDispatchBelowAutograd
after_autograd: Any = torch._C._after_autograd_keyset
any_requires_grad: Callable[..., bool] = torch._C._any_requires_grad

# Dispatch keys from their raw form (c10/core/DispatchKeySet.h).
keyset: Callable[[int], Any] = torch._C.DispatchKeySet.from_raw_repr

# torch/_library/custom_ops.py uses it in the ADInplaceOrView kernel of mutating custom ops.
after_inplace_or_view: Any = torch._C._after_ADInplaceOrView_keyset

# Whether two tensors share a storage; untyped_storage() would create two Python objects for it.
is_alias_of: Callable[[Tensor, Tensor], bool] = torch._C._is_alias_of  # type: ignore[attr-defined]

# The documented way to see every operation; only its module is private (torch/utils/_python_dispatch.py).
TorchDispatchMode = torch.utils._python_dispatch.TorchDispatchMode

# Objects that torch carries to autograd's own threads (at::ThreadLocalState). pytorch has no public
# way to do that; torch/_dynamo and torch/distributed use the same two.
_STASHED = "opkit"


def stash(value: Any, key: str = _STASHED) -> None:
    """Keep `value` for this thread and for the autograd threads that work on its behalf."""
    if not _stash_takes_a_reference():
        ctypes.pythonapi.Py_IncRef(ctypes.py_object(value))
    torch._C._stash_obj_in_tls(key, value)


@functools.cache
def _stash_takes_a_reference() -> bool:
    """Whether torch counts its reference to a stashed object.

    torch 2.11 does not, and gives one back all the same when the object is replaced, which frees it twice
    (torch/csrc/autograd/init.cpp; right in 2.13). Drop this with support for torch before 2.13.
    """
    probe = object()
    before = sys.getrefcount(probe)
    torch._C._stash_obj_in_tls(f"{_STASHED}_probe", probe)
    if sys.getrefcount(probe) > before:
        return True
    ctypes.pythonapi.Py_IncRef(ctypes.py_object(probe))
    return False


def stashed(key: str = _STASHED) -> Any:
    """Return what `stash` kept, or None."""
    return torch._C._get_obj_in_tls(key) if torch._C._is_key_in_tls(key) else None


# What Dynamo keeps of one attempt at tracing a function; it starts anew after a graph break, so
# that nothing of a failed attempt is left (torch/_dynamo/output_graph.py creates it).
tracing: Callable[[], Any] = torch._guards.TracingContext.try_get


def _is_compiling() -> bool:
    return torch.compiler.is_compiling() or tracing() is not None


# torch 2.11 says so to Dynamo alone, and no longer when AOTAutograd traces a formula, with the same TracingContext
# (torch/_dynamo/convert_frame.py, _compile_session_context in 2.13). Drop it with support for torch before 2.13.
is_compiling: Callable[[], bool] = (
    torch.compiler.is_compiling if hasattr(torch.compiler, "_compile_session_context") else _is_compiling
)


def in_subgraph() -> bool:
    """Whether Dynamo is tracing the body of a higher-order operator, such as a checkpointed function.

    There it refuses code that changes objects from outside (torch/_dynamo/variables/higher_order_ops.py).
    """
    from torch._dynamo.symbolic_convert import InstructionTranslator

    return not InstructionTranslator.current_tx().output.is_root_tracer()


# Whether a transform of torch.func is in force around the call (torch/autograd/function.py asks the same).
in_func_transform: Callable[[], bool] = torch._C._are_functorch_transforms_active


# What Dynamo traced with a forward-mode level in it: running that opens the level in C++ alone.
_traced_forward_mode: weakref.WeakSet[Any] = weakref.WeakSet()
_runs_forward_mode = False


def in_forward_mode() -> bool:
    """Whether a forward-mode level may be open (torch/autograd/forward_ad.py, torch/_functorch/predispatch.py)."""
    if forward_ad._current_level >= 0 or in_func_transform():
        return True
    if not _runs_forward_mode:
        return False
    context = tracing()
    if context is not None:  # looking for tangents is an operation, which a graph without any must not have
        return context in _traced_forward_mode
    return torch._C._get_dispatch_mode(torch._C._TorchDispatchModeKey.PROXY) is None


def has_tangent(tensor: Tensor) -> bool:
    """Whether `tensor` carries a forward-mode tangent."""
    global _runs_forward_mode
    found = in_forward_mode() and tangent(tensor) is not None
    context = tracing() if found else None
    if context is not None:
        _runs_forward_mode = True
        _traced_forward_mode.add(context)
    return found


def tangent(tensor: Tensor) -> Tensor | None:
    """Return the tangent that `tensor` carries. There is one level, whatever forward_ad knows of it."""
    if tensor.layout is not torch.strided and tensor.layout is not torch.jagged:
        return None  # torch cannot give a sparse tensor one, and raises where it is asked
    found: Tensor | None = torch._VF._unpack_dual(tensor, level=0)[1]
    return found


def primal(tensor: Tensor) -> Tensor:
    """Return `tensor` without its tangent, and with its place in the graph of reverse mode."""
    if not has_tangent(tensor):
        return tensor
    found: Tensor = torch._VF._unpack_dual(tensor, level=0)[0]
    return found


def make_dual(tensor: Tensor, tangent: Tensor) -> Tensor:
    """Return `tensor` with a tangent."""
    dual: Tensor = torch._VF._make_dual(tensor, tangent, level=0)
    return dual


def in_func_gradient() -> bool:
    """Whether the transform of torch.func that runs now is one of reverse mode (grad, vjp, jacrev)."""
    top = torch._C._functorch.peek_interpreter_stack()
    return top is not None and top.key() == torch._C._functorch.TransformType.Grad


@contextlib.contextmanager
def at_one_level() -> Iterator[None]:
    """Let an autograd.Function run for the one level of torch.func whose kernel is running.

    torch's own functions are differentiated so, level by level, in their C++ autograd kernels. For Python ones torch
    takes another way, above the dispatcher (torch/_functorch/autograd_function.py); inside an autograd kernel of
    the dispatcher the C++ way is right. It goes when torch.library's autograd kernels do this (pytorch#168393).
    """
    before = torch._C._functorch.get_single_level_autograd_function_allowed()
    torch._C._functorch.set_single_level_autograd_function_allowed(True)
    try:
        yield
    finally:
        torch._C._functorch.set_single_level_autograd_function_allowed(before)


def differentiation_modes() -> tuple[bool, bool]:
    """Return whether reverse mode and forward mode are on."""
    return torch.is_grad_enabled(), torch._C._is_fwd_grad_enabled()


@contextlib.contextmanager
def differentiating(reverse: bool, forward: bool) -> Iterator[None]:
    """Turn reverse mode and forward mode on or off.

    torch turns both off inside an autograd.Function, also for the outer levels of torch.func, which then lose
    derivatives silently (torch/_functorch/autograd_function.py turns them on again in the same place).
    """
    before = torch._C._is_fwd_grad_enabled()
    with torch.set_grad_enabled(reverse):
        torch._C._set_fwd_grad_enabled(forward)
        try:
            yield
        finally:
            torch._C._set_fwd_grad_enabled(before)


class LevelFunction(torch.autograd.function._SingleLevelFunction):
    """An autograd.Function that only a dispatcher kernel applies, once for each level of torch.func.

    `autograd.Function` itself first asks for torch.func and unwraps dead wrappers of it, which the dispatcher has done
    by then (torch/autograd/function.py up to 2.14, in C++ later). torch takes this base class for the same purpose.
    """

    _compiled_autograd_key = staticmethod(torch.autograd.Function._compiled_autograd_key)


def constant_while_tracing(function: F) -> F:
    """Have Dynamo run `function` as it traces, and take its result for a constant.

    `torch.compiler.assume_constant_result` does just this (torch/_dynamo/decorators.py), but imports
    Dynamo first, a second that programs without torch.compile need not spend.
    """
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function


def dispatch_key(device: str) -> str:
    """Return the name of the dispatch key of a device type (torch/library.py uses the same)."""
    return str(torch._C._dispatch_key_for_device(device))


def outside_modes() -> Any:
    """Have ops called inside see real tensors, whatever is traced, mapped or differentiated around them.

    They are dispatched as in a fresh thread (c10/core/DispatchKeySet.h: default_included_set, default_excluded_set).
    torch/utils/_mode_utils.py (no_dispatch) is not enough, as a level of torch.func brings modes back.
    """
    key, keys = torch._C.DispatchKey, torch._C.DispatchKeySet
    included = keys(key.BackendSelect) | keys(key.ADInplaceOrView)
    excluded = functools.reduce(
        lambda a, b: a | b, (keys(getattr(key, name)) for name in dir(key) if name.startswith("Autocast"))
    )
    return torch._C._ForceDispatchKeyGuard(included, excluded)


def default_device() -> torch.device | None:
    """Return what torch.set_default_device has set, None where it was not called.

    torch.get_default_device answers `cpu` in both cases, and setting that is another thing than setting none.
    """
    context = getattr(getattr(torch, "_GLOBAL_DEVICE_CONTEXT", None), "device_context", None)
    return getattr(context, "device", None)


# ---------------------------------------------------------------- torch.vmap
# torch/library.py (register_vmap) and torch/_functorch/autograd_function.py do the same with the same names. They
# go when torch's register_vmap takes ops with keyword-only tensors.


def vmap_level() -> tuple[int, Any, str]:
    """Return the level, the batch size and the randomness of the innermost torch.vmap in force."""
    from torch._functorch.pyfunctorch import retrieve_current_functorch_interpreter

    interpreter: Any = retrieve_current_functorch_interpreter()
    return interpreter.level(), interpreter.batch_size(), interpreter.randomness()


def unbatched(tensor: Tensor, level: int) -> tuple[Tensor, int | None]:
    """Return a tensor without the wrapper of a vmap level, and its batched dimension, None without a wrapper."""
    return torch._C._functorch._unwrap_batched(tensor, level)


def batched(tensor: Tensor, dim: int, level: int) -> Tensor:
    """Return a tensor as one of whose dimensions a vmap level is over."""
    return torch._C._functorch._add_batch_dim(tensor, dim, level)


def below_vmap() -> Any:
    """Have ops called inside go to what stands below the innermost torch.vmap."""
    key = torch._C.DispatchKey
    keys = torch._C.DispatchKeySet(key.FuncTorchBatched) | torch._C.DispatchKeySet(key.FuncTorchVmapMode)
    return torch._C._ExcludeDispatchKeyGuard(keys)


def is_plain(values: Sequence[Any]) -> bool:
    """Whether all tensors have data to look at: no wrappers, no tracing, no mode and no graph being captured."""
    if torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack():
        return False
    for value in values:
        for one in value if isinstance(value, (list, tuple)) else (value,):
            if not isinstance(one, Tensor):
                continue
            if type(one) not in (Tensor, torch.nn.Parameter) or one.device.type == "meta":
                return False
            if torch._C._functorch.is_functorch_wrapped_tensor(one) or one.layout is not torch.strided:
                return False
            if one.is_cuda and is_capturing():
                return False
    return True


def is_capturing() -> bool:
    """Whether a CUDA graph is being captured, which takes in whatever runs."""
    return torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing()


# ---------------------------------------------------------------- torch.profiler


def is_profiled() -> bool:
    """Whether some profile is taken in this process, by torch.profiler or emit_nvtx.

    torch keeps this flag for such questions (torch/autograd/profiler.py).
    """
    return profiler._is_profiler_enabled


def in_profile(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """Return a function whose run has a name in the profile that is taken (torch/_inductor does the same)."""

    def run(*args: Any, **kwargs: Any) -> Any:
        with torch._C._profiler._RecordFunctionFast(name):
            return function(*args, **kwargs)

    return run


# ---------------------------------------------------------------- torch.autocast


def below_autocast(device_type: str) -> Any:
    """Have ops called inside run without autocast on a device type (torch/_library/custom_ops.py does the same)."""
    key = getattr(torch._C.DispatchKey, f"Autocast{dispatch_key(device_type)}")
    return torch._C._ExcludeDispatchKeyGuard(torch._C.DispatchKeySet(key))


def is_view(tensor: Tensor) -> bool:
    """Whether a tensor is a view of another one."""
    return tensor._is_view()


def autocast_region() -> Callable[[], object]:
    """Return what gives None once the outermost autocast region in force has ended.

    torch keeps the casts of weights until then (at::autocast::cached_cast, clear_cache), and tells nobody. So
    this has it cast a weight of its own, and watches that cast go. Where it does not see the cast, the answer is
    None at once, and nothing is kept. Drop this when torch offers cached_cast in Python.
    """
    with torch.inference_mode(False), torch.enable_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        product = torch.mm(_weight(), _weight())
    cast = getattr(product.grad_fn, "_saved_self", None)
    return (lambda: None) if cast is None else weakref.ref(cast)


@functools.cache
def _weight() -> Tensor:
    with torch.inference_mode(False):
        return torch.ones(1, 1, device="cpu", requires_grad=True)

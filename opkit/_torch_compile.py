"""The one place where opkit touches what is private in torch's compiler: Dynamo, AOTAutograd and Inductor.

Each entry says which upstream code it stands on, and when it may go. Nothing here imports the compiler before it
is in use: that takes seconds. The code it stands on is the same in torch 2.11, 2.13 and 2.15 except as noted.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from types import CodeType
from typing import Any


def extend_cache_keys(fingerprint: Callable[[Any], Any]) -> None:
    """Make what `fingerprint` returns for a graph a part of the keys of torch's FX-graph and AOTAutograd caches.

    Where it raises, the caches are bypassed for that graph. `FxGraphHashDetails` holds all that either key is made
    of, and is pickled whole (torch/_inductor/codecache.py; AOTAutogradCacheDetails derives from it). torch has
    no hook for what a custom op is: its own three, pytorch#144344, #187319 and #160472, are open. Goes when
    an op can say its part of the key.
    """
    codecache = sys.modules.get("torch._inductor.codecache")  # Dynamo's backends import it
    if codecache is None or getattr(codecache.FxGraphHashDetails, "_opkit", False):
        return
    details = codecache.FxGraphHashDetails
    initialize = details.__init__

    @functools.wraps(initialize)
    def extended(self: Any, gm: Any, *args: Any, **kwargs: Any) -> None:
        initialize(self, gm, *args, **kwargs)
        if gm is not None:
            try:
                found = fingerprint(gm)
            except Exception as err:
                raise codecache.BypassFxGraphCache(f"opkit: {err}") from err
            if found:
                self.opkit_fingerprints = found

    details.__init__ = extended
    details._opkit = True


def traced_code() -> CodeType | None:
    """Return the code of the function that Dynamo is compiling in this thread, or None.

    torch/_dynamo/symbolic_convert.py; a compiled function is kept with its code object.
    """
    convert = sys.modules.get("torch._dynamo.symbolic_convert")
    if convert is None:
        return None
    translator = getattr(convert.tls, "current_tx", None)
    return None if translator is None else translator.output.root_tx.f_code


def frame_callback() -> Callable[[], Any]:
    """Return what gives Dynamo's callback for the frames of this thread: None where it leaves them alone.

    A callable of torch/csrc/dynamo/eval_frame.c, there without the rest of Dynamo.
    """
    from torch._C._dynamo.eval_frame import get_eval_frame_callback

    return get_eval_frame_callback


def forget_compiled(code: CodeType) -> None:
    """Have functions with this code compiled anew when they are called (torch/_dynamo/eval_frame.py)."""
    from torch._dynamo.eval_frame import reset_code  # type: ignore[attr-defined]

    reset_code(code)


def decompose_in_inductor(overload: Any, function: Callable[..., Any]) -> None:
    """Have Inductor replace calls of an overload by what `function` does, which must not say NotImplemented.

    Only Inductor sees it. Its tables are private (torch/_inductor/decomposition.py), read when AOTAutograd traces
    a graph and kept in a cached copy for the default setting. Inductor asserts that an op that it calls as it is
    has no entry in them. Goes when torch.library can register a decomposition for Inductor.
    """
    from torch._inductor import decomposition

    decomposition.fast_random_decomps()[overload] = function
    decomposition.decompositions[overload] = function


def forget_decomposition(overload: Any) -> None:
    """Take back what `decompose_in_inductor` did."""
    decomposition = sys.modules.get("torch._inductor.decomposition")
    if decomposition is not None:
        decomposition.fast_random_decomps().pop(overload, None)
        decomposition.decompositions.pop(overload, None)


def functional(function: Callable[..., Any]) -> Callable[..., Any]:
    """Return `function` without mutation in what a tracer sees of it (torch/_subclasses/functional_tensor.py)."""
    from torch._subclasses.functional_tensor import FunctionalTensorMode, dispatch_functionalize

    return dispatch_functionalize(function, FunctionalTensorMode())


def functional_call(overload: Any, arguments: dict[str, Any]) -> Any:
    """Call a mutating overload on copies, which the compiler leaves out where nobody uses the original again.

    The results come first, then the copies, in schema order (torch/_higher_order_ops/auto_functionalize.py).
    """
    from torch._higher_order_ops.auto_functionalize import auto_functionalized

    return auto_functionalized(overload, **arguments)


def outside_compiled_autograd(function: Callable[..., Any], *given: Any) -> Any:
    """Call a function from a node that compiled autograd is tracing, where it may differentiate something itself.

    What it does is traced all the same. torch's own Python nodes are traced by Dynamo, which sees nothing of this
    (torch/_dynamo/compiled_autograd.py; the context manager is what its error text names).
    """
    from torch._dynamo.compiled_autograd import _disable

    with _disable():
        return function(*given)


def find_backend(name: str) -> Callable[..., Any]:
    """Return a backend of torch.compile by its name, for one that does something more.

    torch.compile takes a name or a function, and has no way to wrap the one in the other
    (torch/_dynamo/backends/registry.py).
    """
    from torch._dynamo.backends.registry import lookup_backend

    found: Callable[..., Any] = lookup_backend(name)
    return found

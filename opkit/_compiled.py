"""What compiled functions took from an op, and what compilers make of it: fingerprints, variants, decompositions.

Not what the op is: that it asks the op.
"""

from __future__ import annotations

import sys
import weakref
from collections.abc import Callable, Sequence
from types import CodeType
from typing import TYPE_CHECKING, Any

import torch

from opkit import _registry, _torch, _torch_compile
from opkit.dispatch import preference
from opkit.dispatch.preference import Preference
from opkit.spec.schema import tensors
from opkit.transforms import fingerprint
from opkit.transforms.inline import decomposition, wanted

if TYPE_CHECKING:
    from opkit._op import Op

_used: weakref.WeakSet[Compiled] = weakref.WeakSet()  # of ops that some function was compiled with
_offering: weakref.WeakSet[Compiled] = weakref.WeakSet()  # of ops of which Inductor may make something else


class Compiled:
    """One op as compilers know it.

    Attributes:
        op: the op.
        inline: whether it is inlined where nobody says otherwise.
        codes: of the functions that were compiled with it.
        preferring: the overload that takes preferred backends as an argument, once there is need of it.
        inlined: the overload of the calls that are inlined because a context says so, likewise.
    """

    def __init__(self, op: Op[..., Any], *, inline: bool) -> None:
        self.op = op
        self.inline = inline
        self.codes: weakref.WeakSet[CodeType] | None = None  # few of a library's ops are ever compiled
        self.preferring: Any = None
        self.inlined: Any = None
        self._gone = False
        if inline:
            self.offer()

    def offer(self) -> None:
        """Remember that Inductor may make something else of the op, while it is there."""
        if not self._gone:
            _offering.add(self)

    def changed(self) -> None:
        """Have functions compiled anew that were compiled with what the op has been until now."""
        for other in list(_used) if _used else ():
            if other.codes and (other is self or fingerprint.depends(other.op, self.op.name)):
                for code in list(other.codes):
                    _torch_compile.forget_compiled(code)
                other.codes.clear()

    def forget(self) -> None:
        """Forget the op, which goes."""
        self._gone = True
        _offering.discard(self)
        self.changed()
        for overload in (self.op.overload, self.inlined):
            _torch_compile.forget_decomposition(overload)

    def variant(self, preferred: str) -> Any:
        """Return the overload for a call under these preferences; Dynamo traces this."""
        return self.inlined if _ensure_variant(self.op.name, preferred) else self.preferring

    def foreseen_inplace(self, values: Sequence[Any]) -> str:
        """Return the name of the overload that overwrites what the kernel of a call will, or nothing."""
        return _foreseen_inplace(self.op.name, *_kinds(values))

    def trace(self, /, *args: Any, opkit_backend: str | None = None, **kwargs: Any) -> Any:
        """Be the op's meta function, and have the compiler that calls it know what it must of the op."""
        op = self.op
        _torch_compile.extend_cache_keys(_fingerprints)
        code = _torch_compile.traced_code()
        if code is not None:
            self.codes = self.codes or weakref.WeakSet()
            self.codes.add(code)
            _used.add(self)
        around = preference.inline_around()
        for name in self._ops_behind() if around and code is not None else ():
            _ensure_variant(name, Preference(None, inline=tuple(around.split(","))).encode())
        # All of them: formulas are traced later, when Inductor's tables are read already.
        for offering in list(_offering):
            offering.offer_to_inductor()
        return op._meta.trace(op.schema.fill(args, kwargs))

    def offer_to_inductor(self) -> None:
        """Tell Inductor what it may make of the op, before it looks."""
        op, offer = self.op, _torch_compile.decompose_in_inductor
        if self.inlined is not None:
            offer(self.inlined, decomposition(op.schema, op.reference, op._meta))
        if self.inline:
            offer(op.overload, decomposition(op.schema, op.reference, op._meta))
        elif op._may_overwrite and op._table.overwrites() and not any(p.mutated for p in op.schema.params):
            op._overwriting.define()  # also for code from a cache, which calls them
            offer(op.overload, op._overwriting.decomposition())

    def _ops_behind(self) -> list[str]:
        """Return the names of the ops that the op's formula and reference call."""
        known = {op.name for op in _registry.all_ops()}
        try:
            return sorted(known & fingerprint.of(self.op)[1])
        except fingerprint.UnseenError:
            return sorted(known)


def _fingerprints(graph_module: Any) -> list[tuple[str, str]]:
    """Return what compile caches must know of the ops in a graph."""
    found = fingerprint.of_graph(
        graph_module, {op.schema.home or op.name: op for op in _registry.all_ops()}.get
    )
    return [*found, ("opkit", sys.modules["opkit"].__version__)] if found else []


@_torch.constant_while_tracing
def before_trace(name: str) -> str | None:
    """Do what must be done with an op before Dynamo traces a call of it; return `preference.traced_inside`.

    It keeps its overload, as Dynamo would guard on there being none kept. And one whose results nothing describes is
    refused here: what the meta function raises comes last in what Dynamo says.
    """
    op = _registry.get(name)
    op.__dict__["overload"] = op._target()
    op._meta.check_traceable()
    return preference.traced_inside()


@_torch.constant_while_tracing
def _foreseen_inplace(name: str, device: str, dtype: str) -> str:
    return _registry.get(name)._overwriting.foresee(device, getattr(torch, dtype, None))


@_torch.constant_while_tracing
def _ensure_variant(name: str, preferred: str) -> bool:
    """Define the overload that takes its preferred backends as an argument; Dynamo runs this as it traces.

    It takes the name, as torch 2.11 passes only constants to such a function, and returns whether the call is to
    be inlined: that overload is another one, as Inductor has one answer for all calls of an overload.
    """
    op = _registry.get(name)
    made = op._compiled
    if wanted(Preference.decode(preferred).inline, op.schema, made.inline):
        if made.inlined is None:
            made.inlined = op._define(f"{fingerprint.OF_OPKIT}inlined")()
            made.offer()
        made.offer_to_inductor()
        return True
    if made.preferring is None:
        made.preferring = op._define(".opkit_using")()
    return False


def _kinds(values: Sequence[Any]) -> tuple[str, str]:
    """Return device type and dtype of the first tensor, as text."""
    first = next(iter(tensors(values)), None)
    return ("cpu", "") if first is None else (first.device.type, str(first.dtype).removeprefix("torch."))


def decompositions(*ops: Op[..., Any]) -> dict[Any, Callable[..., Any]]:
    """Return the references of ops as a decomposition table, for exporters and `run_decompositions`.

    An exporter that knows torch's operations needs nothing else of the op. Ops that mutate their arguments are
    left out, as tracers replace them first.

    Args:
        *ops: by default all that are registered, those of installed plugins included.

    Example:
        >>> import opkit, torch
        >>> from opkit_kernels import vector_add
        >>> class Model(torch.nn.Module):
        ...     def forward(self, x):
        ...         return vector_add(x, x)
        >>> program = torch.export.export(Model(), (torch.ones(2),))
        >>> plain = program.run_decompositions(opkit.decompositions())
        >>> [str(node.target) for node in plain.graph.nodes if node.op == "call_function"]
        ['aten.add.Tensor']
    """
    if not ops:
        ops = tuple(filter(None, map(_registry.find, _registry.list_ops())))
    found: dict[Any, Callable[..., Any]] = {}
    for op in ops:
        if not (op._table.declared or any(p.mutated for p in op.schema.params)):
            function = decomposition(op.schema, op.reference, op._meta)
            overloads = (op.overload, op._compiled.preferring, op._compiled.inlined)
            found.update(dict.fromkeys((o for o in overloads if o is not None), function))
    return found

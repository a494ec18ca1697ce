"""What a compiler makes of an op: the reference, where it is inlined; a kernel that overwrites what is dead, otherwise.

Only Inductor sees these decompositions, so that everything before it (autograd, export, other backends) has the op.
`decompositions()` is the same for those who ask.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from types import TracebackType
from typing import Any

import torch

from opkit import _torch_compile
from opkit.dispatch import outputs, preference
from opkit.dispatch.meta import Meta
from opkit.errors import OpkitError, RegistrationError
from opkit.spec.schema import Schema, check_name


class inline:  # noqa: N801  (a context manager, named like torch.no_grad)
    """Have Inductor fuse through the references of ops, for the calls inside the `with`.

    Inside a compiled function it is about the calls in its body. Around one it is about all calls in functions that
    are compiled or called there, in every thread, and changing it compiles them anew. It changes neither eager
    calls, which run kernels, nor gradients, which follow the registered formula.

    Args:
        *ops: names `namespace::name`, or ops; without any it is about all ops that mutate nothing.
        enabled: False keeps ops as they are that are declared with `inline=True`.

    Raises:
        SchemaError: one of the names is not `namespace::name`.
        RegistrationError: an op mutates its arguments; at the call, while it is being compiled.

    Example:
        >>> import opkit, torch
        >>> from opkit_kernels import vector_add
        >>> @torch.compile(backend="eager")
        ... def twice(x):
        ...     with opkit.inline("opkit::vector_add"):
        ...         return vector_add(x, x)
        >>> twice(torch.ones(2))
        tensor([2., 2.])
    """

    def __init__(self, *ops: Any, enabled: bool = True) -> None:
        sign = "+" if enabled else "-"
        names = [op if isinstance(op, str) else op.name for op in ops]
        for name in names:
            check_name(name, "choosing what to inline")
        self._said = tuple(sign + name for name in names) or (sign,)
        self._inside = preference.Context(preference.Preference(None, inline=self._said))
        self._before: list[str] = []

    def __enter__(self) -> None:
        if torch.compiler.is_dynamo_compiling() or torch.compiler.is_exporting():
            self._inside.__enter__()
        else:
            before = preference.inline_around()
            said = ",".join((before, *self._said) if before else self._said)
            self._before.append(preference.set_inline_around(said))

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if torch.compiler.is_dynamo_compiling() or torch.compiler.is_exporting():
            self._inside.__exit__(kind, error, trace)
        else:
            preference.set_inline_around(self._before.pop())


def wanted(said: Sequence[str], schema: Schema, declared: bool) -> bool:
    """Whether an op is to be inlined, by what contexts said and by its declaration; the innermost one counts.

    Raises:
        RegistrationError: one named an op that mutates. One that is about all ops leaves it as it is.
    """
    for one in reversed(said):
        if one[1:] == schema.name and one[0] == "+":
            refuse_mutation(schema)
        if one[1:] in ("", schema.name):
            return one[0] == "+" and not any(p.mutated for p in schema.params)
    return declared


def decomposition(schema: Schema, reference: Callable[..., Any], meta: Meta) -> Callable[..., Any]:
    """Return what an op is in terms of torch's own: its reference, held to what the op declares."""
    call = schema.adapt(reference)

    def decomposed(*args: Any, opkit_backend: str | None = None, **kwargs: Any) -> Any:
        values = schema.fill(args, kwargs)
        metas, device = meta.promised(values)
        args, kwargs = schema.split(values)
        with torch.autocast(device.type if device else "cpu", enabled=False):  # as in dispatch/run.py
            try:
                returned = _torch_compile.functional(call)(*args, **kwargs)
            except OpkitError:
                raise
            except RuntimeError as err:
                raise RegistrationError(
                    f"inlining {schema.name}: its reference cannot be traced, {type(err).__name__}: {err} "
                    "Expected one whose sizes and branches do not depend on data. Declare the op without "
                    "inline=True, or change the reference.",
                    op=schema.name,
                ) from err
        return outputs.conform(schema, "reference", values, returned, metas, device)

    return decomposed


def refuse_mutation(schema: Schema) -> None:
    """Raise for an op that mutates its arguments, which cannot be inlined."""
    mutated = [p.name for p in schema.params if p.mutated]
    if mutated:
        raise RegistrationError(
            f"inlining {schema.name}: it mutates {', '.join(mutated)}; expected an op that mutates nothing, as the "
            "compiler replaces ops after it has taken mutation out of the graph. Write the op without mutation, or "
            "leave inline=True out.",
            op=schema.name,
        )

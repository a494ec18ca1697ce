"""What a compiler makes of an op: the reference, where it is inlined; a kernel that overwrites what is dead, otherwise.

Only Inductor sees these decompositions, so that everything before it (autograd, export, other backends) has the op.
`opkit.decompositions()` is the same for those who ask.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from opkit import _torch_compile
from opkit.dispatch import outputs
from opkit.dispatch.meta import Meta
from opkit.errors import OpkitError, RegistrationError
from opkit.spec.schema import Schema


def wanted(said: Sequence[str], schema: Schema, declared: bool) -> bool:
    """Whether an op is to be inlined, by what contexts said and by its declaration; the innermost one counts.

    Raises:
        RegistrationError: one named an op that mutates. One that is about all ops leaves it as it is.
    """
    for one in reversed(said):
        if one[1:] == schema.name and one[0] == "+":
            check_inline(schema)
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


def check_inline(schema: Schema) -> None:
    """Raise for an op that mutates its arguments, which cannot be inlined."""
    mutated = [p.name for p in schema.params if p.mutated]
    if mutated:
        raise RegistrationError(
            f"inlining {schema.name}: it mutates {', '.join(mutated)}; expected an op that mutates nothing, as the "
            "compiler replaces ops after it has taken mutation out of the graph. Write the op without mutation, or "
            "leave inline=True out.",
            op=schema.name,
        )

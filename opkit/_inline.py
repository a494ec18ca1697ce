"""`inline`: where Inductor fuses through the references of ops, by a context in the place of the declaration."""

from __future__ import annotations

from types import TracebackType
from typing import Any

import torch

from opkit import _registry, _torch
from opkit.dispatch import preference
from opkit.spec.schema import check_name


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
        OpNotFoundError: no op has one of the names.
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
            _check_defined(name)
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


@_torch.constant_while_tracing
def _check_defined(name: str) -> None:
    _registry.named(name, f"inlining {name}")

"""`declare`: an op that is a schema alone; what it computes is left to kernels."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Sequence
from types import FrameType
from typing import Any

import torch

from opkit import _make
from opkit._op import Op
from opkit.errors import NoKernelError, SchemaError
from opkit.spec import text
from opkit.spec.schema import Schema, describe


def declare(
    schema: str, *, shapes: str | None = None, tags: Sequence[torch.Tag] = (), **options: Any
) -> Op[..., Any]:
    """Define an op by its schema, without a reference.

    A call needs a kernel that takes it; without one it raises and says so. Everything else is as for `opkit.op`.

    Args:
        schema: as torch writes it, `namespace::name(Tensor x, int[] k) -> Tensor`. A Tensor that the op writes
            into is marked there: `Tensor(a!) x`.
        shapes: the shape line, see `opkit.op`.
        tags: torch tags to define the op with.
        **options: `layout`, `flops` and `effects`, see `opkit.op`.

    Raises:
        SchemaError: torch does not parse the schema, or an op cannot be so.
        ShapeError: the shape line does not fit it.
        DuplicateOpError: the name is defined elsewhere.

    Example:
        >>> import opkit, torch
        >>> triple = opkit.declare("doc::triple(Tensor x) -> Tensor", shapes="n -> n")
        >>> triple
        <opkit.Op doc::triple (no reference)>
        >>> triple(torch.ones(2, device="meta")).shape
        torch.Size([2])
        >>> @triple.register_kernel("cpu")
        ... def _(x):
        ...     return 3 * x
        >>> triple(torch.ones(2))
        tensor([3., 3.])
    """
    if callable(schema):
        raise SchemaError(
            f"declaring an op from {describe(schema)}: @opkit.declare was used as a decorator; expected the text of a "
            "schema, as it is for ops without a Python reference. Write "
            f'@opkit.op("mylib::{getattr(schema, "__name__", "my_op")}") to make an op of the function.'
        )
    return declaring(schema, sys._getframe(1), shapes=shapes, tags=tags, **options)


def declaring(schema: str, frame: FrameType, **options: Any) -> Op[..., Any]:
    """Do what `declare` does, for a caller in `frame`."""
    read = text.from_text(schema, "declaring")
    return _make.make(read, _stand_in(read, frame), declared=True, **options)


def place(function: Any, frame: FrameType, name: str, title: str, doc: str) -> None:
    """Have error texts show a function as `title`, where `frame` is now, and pickle find the op in its module."""
    code = function.__code__
    function.__code__ = code.replace(co_filename=frame.f_code.co_filename, co_firstlineno=frame.f_lineno)
    function.__module__ = frame.f_globals.get("__name__", "__main__")
    function.__name__, function.__qualname__, function.__doc__ = name, title, doc


def _stand_in(schema: Schema, frame: FrameType) -> Callable[..., Any]:
    """Return what stands for the reference: it raises, and error texts show it at the place of the declaration."""

    def declared(*args: Any, **kwargs: Any) -> Any:
        raise NoKernelError(
            f"calling the reference of {schema.name}: the op is declared without one, so nothing says what it "
            "computes; expected a kernel or a formula in its place. Register one.",
            op=schema.name,
        )

    place(declared, frame, schema.opname, f"declare({schema.name})", str(schema))
    kinds = inspect.Parameter
    declared.__signature__ = inspect.Signature(  # type: ignore[attr-defined]
        [
            kinds(
                p.name,
                kinds.KEYWORD_ONLY if p.keyword_only else kinds.POSITIONAL_OR_KEYWORD,
                default=p.default,
            )
            for p in schema.params
        ]
    )
    return declared

"""A `with` after which the ops and kernels that were registered inside of it are gone."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator

import torch

from opkit import _registry


@contextlib.contextmanager
def isolated() -> Iterator[None]:
    """Take back, at the end, the ops that were defined inside and the kernels that were registered on others.

    Ops that are defined already must be imported before: what is imported inside counts as defined there. Formulas and
    other rules that were registered on an op from outside stay.

    Example:
        >>> import opkit, torch
        >>> with isolated():
        ...     @opkit.op("doc::passing", shapes="n -> n")
        ...     def passing(x: torch.Tensor) -> torch.Tensor:
        ...         return x + 0
        >>> opkit.find("doc::passing")
    """
    before = {op.name: op for op in _registry.all_ops()}
    kernels = {name: dict(op._table._kernels) for name, op in before.items()}
    additions = {name: list(added) for name, added in _registry._additions.items()}
    try:
        yield
    finally:
        for op in _registry.all_ops():
            if op.name not in before:
                _registry.remove(op.name)
            elif op._table._kernels != kernels[op.name]:
                op._table._kernels = kernels[op.name]
                op._table.reconsider()
        _registry._additions.clear()
        _registry._additions.update(additions)
        if "torch._dynamo" in sys.modules:  # graphs hold overloads that are gone
            torch.compiler.reset()

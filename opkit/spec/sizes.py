"""Comparing sizes that may be a tracer's symbols, whose value sometimes only a call knows."""

from __future__ import annotations

from typing import Any

LARGEST = 2**63 - 1
"""What torch's sizes can be, and int64_t in native glue."""


def differ(one: Any, other: Any) -> bool:
    """Whether two sizes, or two shapes, are known to differ; where only a call can tell, it will have to assert it."""
    if isinstance(one, tuple):
        return len(one) != len(other) or any(map(differ, one, other))
    if isinstance(one, int) and isinstance(other, int):
        return one != other
    from torch.fx.experimental.symbolic_shapes import (
        expect_true,
        guard_or_false,
    )  # a second, and tracers have it

    return bool(guard_or_false(one != other)) or not expect_true(one == other)


def can_be_a_size(size: Any) -> bool:
    """Whether a number can be a size of a tensor, or is a symbol that is not known to be negative."""
    if isinstance(size, int):
        return 0 <= size <= LARGEST
    from torch.fx.experimental.symbolic_shapes import guard_or_false

    return not guard_or_false(size < 0)

"""Strategies for hypothesis: calls of an op, drawn from what it declares. Needs hypothesis.

Tensors are drawn by their shapes, layouts and a seed, not element by element, so what fails is shrunk to small sizes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from opkit._op import Op
from opkit.errors import ArgumentError, OpkitError
from opkit.testing import calls
from opkit.testing.arguments import mapped
from opkit.testing.layouts import LAYOUTS
from opkit.testing.samples import Sample

if TYPE_CHECKING:
    from hypothesis.strategies import DrawFn, SearchStrategy

_MOST_DIMS = 3  # of a `*b`


def arguments(
    op: Op[..., Any],
    *,
    sizes: Mapping[str, SearchStrategy[int]] | None = None,
    values: Mapping[str, SearchStrategy[Any] | Callable[..., Any]] | None = None,
    dtypes: Sequence[torch.dtype] = (torch.float32,),
    layouts: Sequence[str] = tuple(LAYOUTS),
    largest: int = 8,
    device: str = "cpu",
) -> SearchStrategy[Sample]:
    """Return a strategy for calls of an op: `op(*sample.args, **sample.kwargs)`.

    Sizes, the number of dimensions of each `*b`, layouts, dtypes, optional tensors, bools and arguments that name their
    values are drawn; sizes are equal where the shape line has one name. Other arguments have their defaults.

    Args:
        op: whose calls are drawn.
        sizes: how large a dimension is, by its name in the shape line. Others are from 0 to `largest`, and an int
            argument from 1.
        values: of arguments that the declaration does not say enough of, an index for instance: a strategy, or a
            function of the argument's shape, if it is a tensor, and of the sizes by name that returns one or a value.
        dtypes: of tensors whose dtype the shape line leaves open.
        layouts: of tensors, see `opkit.testing.samples.sample`.
        largest: size of a dimension.
        device: of tensors.

    Raises:
        OpkitError: hypothesis is not installed.
        ArgumentError: the declaration does not say enough, or a name is none of the op's.

    Example:
        >>> import hypothesis, opkit, torch
        >>> op = opkit.get("opkit::swiglu")
        >>> @hypothesis.settings(max_examples=5)
        ... @hypothesis.given(opkit.testing.strategies.arguments(op))
        ... def test(sample):
        ...     found = op(*sample.args, **sample.kwargs)
        ...     torch.testing.assert_close(found, op.reference(*sample.args, **sample.kwargs))
        >>> test()
    """
    try:
        from hypothesis import strategies as st
    except ImportError as error:
        raise OpkitError(
            "making a strategy: hypothesis is not installed; expected it for opkit.testing.strategies. Install it: "
            "pip install 'torch-opkit[test]'.",
            op=op.name,
        ) from error
    names, ints, stars = calls.dimensions(op)
    given_sizes, given = dict(sizes or {}), dict(values or {})
    _check(op, given_sizes, (*names, *ints, *stars), "a size")
    _check(op, given, [p.name for p in op.schema.params], "values")
    tensors = {t.name: t for t in calls.plan_of(op).inputs}
    optional = [n for n, t in tensors.items() if t.optional and n not in given and _says(op, n, given)]
    never = {n for n, t in tensors.items() if n in given or (t.optional and n not in optional)}
    empty = dict.fromkeys(given)  # in the place of values that are given
    calls.arguments(
        op, calls.sized(op, 5, (2,), {}), absent={*never, *optional}, scalars=empty
    )  # or it raises
    few = _few(op, given)

    def size(name: str, least: int) -> SearchStrategy[int]:
        return given_sizes[name] if name in given_sizes else st.integers(least, max(largest, least))

    @st.composite
    def drawn(draw: DrawFn) -> Sample:
        chosen = {n: draw(size(n, 0), label=n) for n in names}
        chosen |= {n: draw(size(n, 1), label=n) for n in ints}
        many = {s: tuple(draw(st.lists(size(s, 0), max_size=_MOST_DIMS), label=f"*{s}")) for s in stars}
        absent = {n for n in optional if draw(st.booleans(), label=f"without {n}")}
        shapes = calls.Shapes(chosen, many, draw(st.integers(1, 3), label="_"))
        scalars = {n: draw(st.sampled_from(v), label=n) for n, v in few.items()}
        made = calls.arguments(
            op,
            shapes,
            dtype=draw(st.sampled_from(list(dtypes)), label="dtype"),
            device=device,
            absent=absent | never,
            elements=draw(st.integers(0, 3), label="elements") if _has_lists(op) else 2,
            scalars={**scalars, **empty},
            numbers=draw(st.integers(0, 1000), label="numbers"),
        )
        mutated = {p.name for p in op.schema.params if p.mutated}

        def lay(name: str, tensor: Tensor) -> Tensor:
            fit = [n for n in layouts if n != "expanded" or name.split("[")[0] not in mutated]
            return LAYOUTS[draw(st.sampled_from(fit), label=f"{name} is")](tensor)

        laid = list(mapped(op, made, lay))
        for place, param in enumerate(op.schema.params):
            if param.name in given:
                value = given[param.name]
                if not isinstance(value, st.SearchStrategy):
                    shape = shapes.of(tensors[param.name], ()) if param.name in tensors else ()
                    value = value(torch.Size(shape), {**chosen, **many})
                is_drawn = isinstance(value, st.SearchStrategy)
                laid[place] = draw(value, label=param.name) if is_drawn else value
        return Sample("drawn", *op.schema.split(op.schema.restore(laid)))

    return drawn()


def _check(op: Op[..., Any], given: Mapping[str, Any], known: Sequence[str], what: str) -> None:
    for name in given:
        if name not in known:
            raise ArgumentError(
                f"making a strategy for {op.name}: found {what} for {name!r}; expected some of "
                f"{', '.join(known) or 'none'}. Correct the name.",
                op=op.name,
            )


def _says(op: Op[..., Any], name: str, given: Mapping[str, Any]) -> bool:
    """Whether the declaration says what an optional tensor may hold."""
    others = {t.name for t in calls.plan_of(op).inputs if t.optional} - {name}
    try:
        calls.arguments(
            op, calls.sized(op, 5, (2,), {}), absent={*others, *given}, scalars=dict.fromkeys(given)
        )
    except calls.UnmadeError:
        return False
    return True


def _few(op: Op[..., Any], given: Mapping[str, Any]) -> dict[str, list[Any]]:
    """Return the values of arguments that have few: bools, and those that name theirs."""
    found = {}
    for param in op.schema.params:
        values = (False, True) if param.type.base == "bool" else calls.choices(param)
        if values and not param.type.is_list and param.name not in given:
            usual = [param.default] if param.default is None else []
            found[param.name] = [*values, *usual]
    return found


def _has_lists(op: Op[..., Any]) -> bool:
    return any(t.entry.is_list for t in calls.plan_of(op).inputs)

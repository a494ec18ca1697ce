"""Samples: calls of an op that are made from what it declares, its shape line above all.

The shape line says which dimensions are equal, annotations and defaults say the rest. Where that does not make a call
(which values an index may have is said nowhere), the error names what is missing, and how to give it.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch

from opkit import _cases
from opkit._op import Op
from opkit.errors import ArgumentError, did_you_mean
from opkit.spec.plan import DTYPES
from opkit.spec.schema import REQUIRED, Param
from opkit.testing.arguments import FLOATING, castable, mapped, named, reason, reference
from opkit.testing.calls import UnmadeError, arguments, choices, plan_of, sized
from opkit.testing.calls import dimensions as dimensions
from opkit.testing.layouts import LAYOUTS, laid

LARGE = (1 << 17) + 3  # about how many elements the largest argument has: more than one thread takes


class Sample(NamedTuple):
    """One call of an op: `op(*sample.args, **sample.kwargs)`. `name` says what is special about it."""

    name: str
    args: tuple[Any, ...]
    kwargs: dict[str, Any]


class Missing(NamedTuple):
    """A sample that cannot be made, and why."""

    name: str
    reason: str


def sample(
    op: Op[..., Any],
    sizes: Mapping[str, int | Sequence[int]] | None = None,
    *,
    dtype: torch.dtype = torch.float32,
    device: str | torch.device = "cpu",
    layout: str = "contiguous",
    absent: Iterable[str] = (),
) -> Sample:
    """Make a call of an op from its declaration, with sizes by their names in the shape line.

    Tensors hold standard normal numbers that depend on the argument's name only; other arguments have their defaults.

    Args:
        op: whose call it is.
        sizes: of dimensions by name; of `*b` a size or several. What is not named has a small size of its own.
        dtype: of the tensors whose dtype the shape line leaves open.
        device: of all tensors.
        layout: `contiguous`, `transposed`, `sliced`, `expanded` or `misaligned`: how tensors lie in memory.
        absent: optional tensors to be left out; the others are there.

    Raises:
        ArgumentError: a name is not in the shape line, or the declaration does not say enough.

    Example:
        >>> import opkit
        >>> op = opkit.get("opkit::rms_norm")
        >>> made = opkit.testing.samples.sample(op, {"b": 4, "n": 32})
        >>> op(*made.args, **made.kwargs).y.shape
        torch.Size([4, 32])
    """
    names, ints, stars = dimensions(op)
    given = dict(sizes or {})
    known = (*names, *ints, *stars)
    for name in given:
        if name not in known:
            raise ArgumentError(
                f"making a call of {op.name}: found a size for {name!r}; expected some of "
                f"{', '.join(known) or 'none'}, the names in its shape line {plan_of(op).line}."
                f"{did_you_mean(name, known)} Correct it.",
                op=op.name,
            )
    if layout not in LAYOUTS:
        raise ArgumentError(
            f"making a call of {op.name}: found the layout {layout!r}; expected one of {', '.join(LAYOUTS)}."
            f"{did_you_mean(layout, LAYOUTS)} Name one of these.",
            op=op.name,
        )
    shapes = sized(op, 5, (2,), given)
    values = laid(op, arguments(op, shapes, dtype=dtype, device=device, absent=absent), layout)
    return Sample("", *op.schema.split(op.schema.restore(values)))


def listed(op: Op[..., Any], cases: Any, doing: str = "checking") -> list[Sample]:
    """Return cases that a user lists, `(x, y)` or `((x, y), {"eps": 1e-3})`, as samples.

    Raises:
        ArgumentError: they are none, or there is none.
    """
    made = []
    for i, case in enumerate(_cases.listed(op, cases, doing)):
        args, kwargs = case
        op.schema.fill(*op.schema.carry(args, kwargs))  # what does not fit is said here
        made.append(Sample(f"sample {i}", tuple(args), dict(kwargs)))
    if not made:
        raise ArgumentError(
            f"{doing} {op.name}: found no samples; expected at least one. Write samples=[(args, kwargs)].",
            op=op.name,
        )
    return made


def registered(op: Op[..., Any], device: str = "cpu") -> list[Sample] | None:
    """Return what the function given to `register_samples` returns, None where there is none."""
    function = op._samples
    if function is None:
        return None
    try:
        takes = bool(inspect.signature(function).parameters)
        cases = function(device) if takes else function()
    except Exception as error:
        raise ArgumentError(
            f"making samples of {op.name}: the function given to register_samples failed with {reason(error)}; "
            "expected a list of cases. Call it in Python to see where it fails.",
            op=op.name,
        ) from error
    return listed(op, cases, "making samples of")


def derived(
    op: Op[..., Any], device: str = "cpu", *, given: Sequence[Sample] | None = None
) -> tuple[list[Sample], list[Missing]]:
    """Return the samples that `check(op)` calls an op with, the plain one first; and those that cannot be made.

    There is a small one, in every layout and dtype, with and without each optional tensor, with every value of bools
    and of arguments that name their values; sizes 1, 0, odd, multiples of 32, and large. Those that the reference
    refuses are missing: the shape line does not say all that it expects. Of `given` ones, the first also comes in
    every layout and dtype.

    Raises:
        ArgumentError: the declaration does not say enough for any.

    Example:
        >>> import opkit
        >>> made, missing = opkit.testing.samples.derived(opkit.get("opkit::swiglu"))
        >>> made[0].name, made[0].args[0].shape, missing
        ('small', torch.Size([2, 5]), [])
    """
    found: list[Sample] = []
    missing = [] if given else [Missing(f"with {name}", lack) for name, lack in _unmade(op, device).items()]
    makers: list[Maker]
    if given:
        found += given  # also those that the reference refuses: it is at fault then, or they are
        makers = [*_varied(op, given[0])]
    else:
        makers = [*_makers(op, device, [name.removeprefix("with ") for name, _ in missing])]
    for name, make in makers:
        try:
            values = make()
        except UnmadeError as error:
            if not found:
                raise
            missing.append(Missing(name, error.lack))
            continue
        refused = _refused(op, values)
        if refused:
            missing.append(Missing(name, f"the reference refuses it, {refused}"))
        else:
            found.append(Sample(name, *op.schema.split(op.schema.restore(values))))
    if not found:
        raise UnmadeError(op, missing[-1].reason)
    return found, missing


def _unmade(op: Op[..., Any], device: str) -> dict[str, str]:
    """Return the optional tensors that nothing says the values of, with what is missing."""
    found: dict[str, str] = {}
    for tensor in plan_of(op).inputs if op._meta.plan is not None else ():
        others = {t.name for t in plan_of(op).inputs if t.optional} - {tensor.name}
        try:
            arguments(op, sized(op, 5, (2,), {}), device=device, absent=others)
        except UnmadeError as error:
            if tensor.optional:
                found[tensor.name] = error.lack
    return found


def _values(op: Op[..., Any], one: Sample) -> tuple[Any, ...]:
    return op.schema.fill(*op.schema.carry(one.args, one.kwargs))


def _refused(op: Op[..., Any], values: Sequence[Any]) -> str | None:
    """Return why the reference does not take a call, if so."""
    if op._table.declared:
        return None
    args, kwargs = op.schema.split(mapped(op, values, lambda _, t: t.clone()))
    try:
        with torch.no_grad():
            reference(op)(*args, **kwargs)
    except Exception as error:
        return reason(error)
    return None


Maker = tuple[str, Callable[[], tuple[Any, ...]]]


def _makers(op: Op[..., Any], device: str, gone: Sequence[str]) -> Iterator[Maker]:
    """Yield the samples of the set by name, each as a function that makes it."""
    plan = plan_of(op)
    bound, _, stars = dimensions(op)
    degree = max((len(t.entry.dims) for t in plan.inputs), default=1) or 1
    side = max(int(LARGE ** (1 / degree)), 2) | 1

    def make(
        size: int = 5,
        batch: tuple[int, ...] = (2,),
        step: int = 1,
        absent: Sequence[str] = (),
        **options: Any,
    ) -> Callable[[], Any]:
        without = (*absent, *gone)
        many = batch if bound else (*batch, size)
        return lambda: arguments(
            op, sized(op, size, many, {}, step), device=device, absent=without, **options
        )

    small = make()
    yield "small", small
    optional = [t.name for t in plan.inputs if t.optional and t.name not in gone]
    for without in [
        *([optional] if optional else []),
        *([[n] for n in optional] if len(optional) > 1 else []),
    ]:
        yield f"without {', '.join(without)}", make(absent=without)
    for dtype in _dtypes(op):
        yield str(dtype).removeprefix("torch."), make(dtype=dtype)
    yield from _laid(op, small)
    for param, value in _choices(op):
        yield f"{param.name}={_shown(param, value)}", make(scalars={param.name: value})
    yield "sizes 1", make(1, ())
    yield "odd sizes", make(7, (3, 1), 2)
    yield "sizes of 32", make(32, (4,), 32)
    if stars:
        yield "an empty batch", make(5, (0,))
    if bound:
        yield "sizes 0", make(0, (2,))
    yield "large", make(side, (side,) if bound else (), 2)


def _varied(op: Op[..., Any], first: Sample) -> Iterator[Maker]:
    """Yield a sample that somebody gave in other dtypes and layouts."""
    values = _values(op, first)
    names = castable(op, values)
    own = {v.dtype for n, v in named([p.name for p in op.schema.params], values).items() if n in names}
    for dtype in FLOATING if names else ():
        if dtype not in own:
            cast = mapped(op, values, lambda n, t: t.to(dtype) if n in names else t)  # noqa: B023
            yield f"{first.name}, {str(dtype).removeprefix('torch.')}", functools.partial(tuple, cast)
    for name, make in _laid(op, lambda: values):
        yield f"{first.name}, {name}", make


def _laid(op: Op[..., Any], make: Callable[[], tuple[Any, ...]]) -> Iterator[Maker]:
    if not any(p.type.base == "Tensor" for p in op.schema.params):
        return
    for layout in LAYOUTS:
        if layout != "contiguous":
            yield layout, functools.partial(_remade, op, make, layout)


def _remade(op: Op[..., Any], make: Callable[[], tuple[Any, ...]], layout: str) -> tuple[Any, ...]:
    return laid(op, make(), layout)


def _dtypes(op: Op[..., Any]) -> list[torch.dtype]:
    """Return the dtypes beside float32 that open tensors come in: floating ones, those of kernels and annotations."""
    named = [d for k in op._table.all() for d in k.dtypes or ()]
    annotated = [DTYPES[d] for t in plan_of(op).inputs for d in t.entry.dtypes if t.dtype is None]
    usual = () if annotated or op._table.declared else FLOATING
    found = [d for d in dict.fromkeys((*usual, *named, *annotated)) if d != torch.float32]
    return [d for d in found if d.is_floating_point or d.is_complex] if _is_open(op) else []


def _is_open(op: Op[..., Any]) -> bool:
    """Whether some tensor's dtype is not fixed by the shape line."""
    return any(t.dtype is None or t.dtype.kind != "fixed" for t in plan_of(op).inputs)


def _choices(op: Op[..., Any]) -> Iterator[tuple[Param, Any]]:
    """Yield the arguments whose values are few, with each value that is not the usual one."""
    for param in op.schema.params:
        if param.type.is_list:
            continue
        values = (False, True) if param.type.base == "bool" else choices(param)
        usual = param.default if param.default is not REQUIRED else next(iter(values), None)
        for value in values:
            if value != usual:
                yield param, value


def _shown(param: Param, value: Any) -> str:
    value = param.type.restore(value) if param.type.is_carried else value
    return getattr(value, "name", None) or repr(value)

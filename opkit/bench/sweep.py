"""The calls that are compared: what a user's case makes of each combination of sizes, in each dtype."""

from __future__ import annotations

import difflib
import inspect
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch

from opkit import _cases
from opkit._op import Op
from opkit.dispatch import measured, select
from opkit.errors import ArgumentError, did_you_mean
from opkit.spec.plan import DTYPES
from opkit.testing.arguments import cast, castable, mapped

Sizes = dict[str, Any]
_GIVEN = ("dtype", "device")  # arguments of a case that have a meaning of their own


class Call(NamedTuple):
    """One combination: all arguments in schema order, and which of them the case gave: a peer gets no others."""

    sizes: Sizes
    dtype: str
    device: str
    values: tuple[Any, ...]
    given: Given


class Given(NamedTuple):
    """How many arguments the case gave by position, and which by name."""

    positional: int
    names: tuple[str, ...]

    def split(self, op: Op[..., Any], values: Sequence[Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Return values in schema order as the (args, kwargs) that the case would give."""
        by_name = dict(zip((p.name for p in op.schema.params), values, strict=True))
        return tuple(values[: self.positional]), {name: by_name[name] for name in self.names}


class Sweep:
    """Every combination of the sizes in `over`, in every dtype.

    Raises:
        ArgumentError: the case takes other sizes than `over` has, or something is no list or dtype.
    """

    def __init__(
        self,
        op: Op[..., Any],
        case: Callable[..., Any],
        over: Mapping[str, Sequence[Any]] | None,
        dtypes: Sequence[torch.dtype | str] | None,
        device: str | None,
    ) -> None:
        self._op = op
        self._case = case
        self._device = device
        self._takes, needs = _parameters(op, case)
        self.over = _lists(op, over)
        self._check_names(needs)
        self._dtypes = _dtypes(op, dtypes)
        if self._dtypes == [None] and "dtype" in needs:
            self._dtypes = [torch.float32]

    def __len__(self) -> int:
        combinations = 1
        for values in self.over.values():
            combinations *= len(values)
        return combinations * len(self._dtypes)

    def __iter__(self) -> Iterator[Call]:
        for dtype in self._dtypes:
            for sizes in itertools.product(*self.over.values()):
                yield self._call(dict(zip(self.over, sizes, strict=True)), dtype)

    def _check_names(self, needs: Sequence[str]) -> None:
        takes = None if self._takes is None else [name for name in self._takes if name not in _GIVEN]
        for name in self.over:
            if takes is not None and name not in takes:
                raise self._error(
                    f"over= names {name!r}, which the case does not take; it takes {', '.join(takes) or 'nothing'}."
                    f"{did_you_mean(name, takes)} Name its arguments."
                )
        missing = [name for name in needs if name not in self.over and name not in _GIVEN]
        if missing:
            near = [n for n in self.over if difflib.get_close_matches(n, missing)]
            raise self._error(
                f"the case needs {', '.join(missing)}, and over= has {', '.join(self.over) or 'nothing'}; expected a "
                f"list for each.{' Perhaps ' + near[0] + ' is another name of it.' if near else ''} Write "
                f'over={{"{missing[0]}": [256, 1024]}}, or give the argument a default.'
            )

    def _call(self, sizes: Sizes, dtype: torch.dtype | None) -> Call:
        given = dict(sizes)
        takes = _GIVEN if self._takes is None else self._takes
        own = "dtype" in takes and dtype is not None
        if own:
            given["dtype"] = dtype
        if "device" in takes and (self._device is not None or self._takes is not None):
            given["device"] = self._device or "cpu"
        op, where = self._op, ", ".join(f"{n}={v!r}" for n, v in given.items())
        try:
            made = self._case(**given)
        except Exception as error:
            raise self._error(
                f"the case called with {where or 'no arguments'} failed with {type(error).__name__}: {error}. Expected "
                "it to return (args, kwargs); call it in Python to see where it fails."
            ) from error
        if not isinstance(made, (tuple, list)):
            raise self._error(
                f"the case returned a {type(made).__name__}; expected (args, kwargs). Write: return "
                f"({', '.join(p.name for p in op.schema.positional)},), {{}}."
            )
        try:
            args, kwargs = _cases.listed(op, [made], "benchmarking")[0]
            values = _cases.fill(op, (args, kwargs), "benchmarking")
        except TypeError as error:
            raise self._error(
                f"what the case returned for {where or 'no arguments'} does not fit: {error}. Return the arguments of "
                "a call."
            ) from None
        if self._device is not None and "device" not in takes:
            values = mapped(op, values, lambda _, t: t.to(self._device))
        if dtype is not None and not own:
            if not castable(op, op.schema.fill(*op.schema.carry(*op.schema.split(values)))):
                raise self._error(
                    "dtypes= is given, and the shape line leaves the dtype of no floating argument open; expected one "
                    "that can be cast. Give the case an argument dtype, or leave dtypes= out."
                )
            values = _marked_as(op, values, cast(op, values, dtype))
        op._meta.expect(op.schema.fill(*op.schema.carry(*op.schema.split(values))))  # raises for wrong shapes
        device = select.device_of(op.schema, values)
        dtype_name = measured.short(select.first_dtype(values))
        return Call(sizes, dtype_name, device, values, Given(len(args), tuple(kwargs)))

    def _error(self, text: str) -> ArgumentError:
        return ArgumentError(f"benchmarking {self._op.name}: {text}", op=self._op.name)


def _marked_as(op: Op[..., Any], before: Sequence[Any], values: Sequence[Any]) -> tuple[Any, ...]:
    """Return values with gradients asked for where they were before: a cast forgets it."""
    marked: set[str] = set()
    mapped(op, before, lambda name, t: marked.add(name) if t.requires_grad else None)
    return mapped(op, values, lambda name, t: t.requires_grad_() if name in marked else t)


def _parameters(op: Op[..., Any], case: Callable[..., Any]) -> tuple[list[str] | None, list[str]]:
    """Return the names of what a case takes, None where it takes any, and of what it needs."""
    if not callable(case):
        raise ArgumentError(
            f"benchmarking {op.name}: the case is of type {type(case).__name__}; expected a function of sizes that "
            "returns (args, kwargs). Write: def case(n): return (torch.randn(n),), {}",
            op=op.name,
        )
    try:
        parameters = inspect.signature(case).parameters.values()
    except ValueError:  # a builtin
        return None, []
    named = [p for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
    takes = None if any(p.kind is p.VAR_KEYWORD for p in parameters) else [p.name for p in named]
    return takes, [p.name for p in named if p.default is p.empty]


def _lists(op: Op[..., Any], over: Any) -> dict[str, list[Any]]:
    if over is None:
        return {}
    if not isinstance(over, Mapping):
        raise ArgumentError(
            f"benchmarking {op.name}: over= is of type {type(over).__name__}; expected lists of sizes by name. Write "
            'over={"n": [256, 1024]}.',
            op=op.name,
        )
    found: dict[str, list[Any]] = {}
    for name, values in over.items():
        listed = list(values) if isinstance(values, (list, tuple, range)) else []
        if not listed or not all(isinstance(v, (int, float, str)) for v in listed):
            raise ArgumentError(
                f"benchmarking {op.name}: over= has {name}={values!r}; expected a list of numbers or texts. Write "
                f'over={{"{name}": [256, 1024]}}.',
                op=op.name,
            )
        found[str(name)] = listed
    return found


def _dtypes(op: Op[..., Any], dtypes: Any) -> list[torch.dtype | None]:
    if dtypes is None:
        return [None]
    found: list[torch.dtype | None] = []
    for dtype in [dtypes] if isinstance(dtypes, (str, torch.dtype)) else list(dtypes):
        name = str(dtype).removeprefix("torch.")
        if name not in DTYPES:
            raise ArgumentError(
                f"benchmarking {op.name}: dtypes= has {dtype!r}; expected dtypes of torch, such as torch.float32 or "
                f"'bfloat16'.{did_you_mean(name, DTYPES)} Name one.",
                op=op.name,
            )
        found.append(DTYPES[name])
    return found or [None]

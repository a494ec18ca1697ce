"""Kernels that overwrite arguments behind a functional contract: which arguments, and what is found in them after.

A call owns its arguments, so the plain call gives such a kernel copies. Where the caller gives an argument away
(`Op.maybe_inplace`), or a compiled graph has no further use for it, the kernel gets the buffer itself.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch

from opkit import _torch
from opkit.errors import OutputError, RegistrationError
from opkit.spec.plan import Plan
from opkit.spec.schema import Schema, tensors

_FEW = 16  # pairs of tensors, which are compared faster one by one
_PLAIN = (torch.Tensor, torch.nn.Parameter)

# For each argument that a kernel overwrites, its place, and the place of the result that is in it afterwards.
Inplace = tuple[tuple[int, int | None], ...]


def resolve(
    schema: Schema, plan: Plan | None, inplace: Iterable[str] | Mapping[str, str | None], doing: str
) -> Inplace:
    """Return what `inplace=` says of a kernel; a bare name takes the first free result of the same entry.

    Raises:
        RegistrationError: a name is not that of a Tensor argument, or of a Tensor result, or is there twice.
    """

    def wrong(found: str, expected: str, advice: str) -> RegistrationError:
        return RegistrationError(
            f"{doing}: inplace={inplace!r} {found}; expected {expected}. {advice}.", op=schema.name
        )

    if not inplace:  # nearly always
        return ()
    given = {inplace: ...} if isinstance(inplace, str) else inplace
    pairs = dict(given) if isinstance(given, Mapping) else dict.fromkeys(given, ...)
    places = {p.name: i for i, p in enumerate(schema.params)}
    results = {r.name: i for i, r in enumerate(schema.results) if str(r.type) == "Tensor"}
    taken = [name for name in pairs.values() if isinstance(name, str)]
    found: list[tuple[int, int | None]] = []
    for name, result in pairs.items():
        param = schema.params[places[name]] if name in places else None
        if param is None or str(param.type) != "Tensor" or param.mutated:
            fits = [p.name for p in schema.params if str(p.type) == "Tensor" and not p.mutated]
            raise wrong(
                f"names {name!r}",
                f"Tensor arguments that the op does not declare to mutate: {', '.join(fits) or 'none'}",
                "Name some of these",
            )
        if result is ...:
            result = _like(schema, plan, name, [r for r in results if r not in taken])
            taken += [result] if result else []
        if result is not None and (result not in results or taken.count(result) > 1):
            raise wrong(
                f"has the result {result!r} in {name}",
                f"one of {', '.join(results) or 'none'}, each once, or None",
                "Say which result the kernel leaves in which argument",
            )
        found.append((places[name], None if result is None else results[result]))
    return tuple(sorted(found))


def _like(schema: Schema, plan: Plan | None, name: str, results: Sequence[str]) -> str | None:
    """Return the first of the results whose shape and dtype are those of an argument, by the shape line."""
    if plan is None:
        return None
    own = next(t for t in plan.inputs if t.name == name)
    first = next(p.name for p in schema.params if p.type.base == "Tensor")
    for result in plan.outputs:
        if result.name not in results or result.entry.dims != own.entry.dims or _open(result.entry.dims):
            continue
        rule = result.dtype
        if rule is None or rule.kind == "first":
            same = first == name
        elif rule.kind == "tensor":
            same = rule.name == name
        else:
            same = rule == own.dtype
        if same:
            return result.name
    return None


def _open(dims: Sequence[Any]) -> bool:
    """Whether sizes are not told by their text alone: `_` and `...` stand for any size."""
    return any(d.is_any or d.is_open for d in dims)


def copied(inplace: Inplace, values: Sequence[Any], given: frozenset[int]) -> tuple[Any, ...]:
    """Return a call's arguments with copies of those that a kernel overwrites and nobody has given away.

    An argument that shares memory with others, or with itself, is never given away.
    """
    own = list(values)
    for place, _ in inplace:
        if place not in given or _shared(values, place):
            own[place] = values[place].clone(memory_format=torch.contiguous_format)
    return tuple(own)


def _shared(values: Sequence[Any], place: int) -> bool:
    """Whether an argument's elements are also those of another argument, or lie on each other."""
    value = values[place]
    if overlaps_itself(value):
        return True
    for other_place, other in enumerate(values):
        for one in other if isinstance(other, (list, tuple)) else (other,):
            if other_place != place and isinstance(one, torch.Tensor) and _torch.is_alias_of(one, value):
                return True
    return False


def overlaps_itself(value: torch.Tensor) -> bool:
    """Whether some elements may lie on each other, as in what `expand` and `unfold` return."""
    if value.is_contiguous():
        return False
    axes = [(n, step) for n, step in zip(value.shape, value.stride(), strict=True) if n > 1]
    for i, (_, step) in enumerate(axes):
        within = [(n - 1) * s for j, (n, s) in enumerate(axes) if j != i and s <= step]
        if step <= sum(within):
            return True
    return False


def check_placed(
    schema: Schema, backend: str, inplace: Inplace, own: Sequence[Any], outputs: Sequence[Any]
) -> None:
    """Raise where a result shares memory with an argument that is not said to hold it."""
    for index, output in enumerate(outputs):
        for place, result in inplace:
            if (
                isinstance(output, torch.Tensor)
                and index != result
                and _torch.is_alias_of(output, own[place])
            ):
                name, argument = schema.results[index].name, schema.params[place].name
                raise OutputError(
                    f"calling {schema.name}: the {backend} kernel returned as {name} a tensor that shares storage "
                    f"with {argument}; expected fresh storage, or {name} in {argument} by inplace=. Write "
                    f"inplace={{{argument!r}: {name!r}}} where it registers the kernel.",
                    op=schema.name,
                )


def leave(schema: Schema, output: torch.Tensor, argument: torch.Tensor, result: int, place: int) -> None:
    """Have an argument hold a result, which it may be already."""
    if output.shape != argument.shape or output.dtype != argument.dtype:
        raise OutputError(
            f"calling {schema.name}: {schema.results[result].name} is {output.dtype} of shape "
            f"{tuple(output.shape)}, the argument {schema.params[place].name} that takes it by inplace= is "
            f"{argument.dtype} of shape {tuple(argument.shape)}; expected the same. Say None instead of "
            f"{schema.results[result].name!r} where the kernel is registered.",
            op=schema.name,
        )
    same = output.data_ptr() == argument.data_ptr() and output.stride() == argument.stride()
    if not (same and _torch.is_alias_of(output, argument)):
        argument.copy_(output)


def apart(mutated: Sequence[int], values: Sequence[Any]) -> tuple[Any, ...]:
    """Return a mutating call's arguments with copies of those it only reads that lie in what it writes.

    Inductor makes such calls of others: it drops the clone in `y = x.clone(); op(y, x)` (pytorch#198031, open in
    2.15), and the kernel would read what it has written.
    """
    written = tensors([values[place] for place in mutated])
    read = tensors([value for place, value in enumerate(values) if place not in mutated])
    if len(written) * len(read) > _FEW and not _may_meet(written, read):
        return tuple(values)
    own = list(values)
    for place, value in enumerate(values):
        if place in mutated:
            continue
        if isinstance(value, torch.Tensor):
            if any(meet(value, w) for w in written):
                own[place] = value.clone()
        elif isinstance(value, (list, tuple)) and any(meet(v, w) for v in tensors(value) for w in written):
            own[place] = [v.clone() if isinstance(v, torch.Tensor) else v for v in value]
    return tuple(own)


def _may_meet(written: Sequence[torch.Tensor], read: Sequence[torch.Tensor]) -> bool:
    """Whether some of the ones and some of the others share memory, asked of all at once: there may be thousands."""
    spans: list[tuple[int, int, bool]] = []
    for these, writes in ((written, True), (read, False)):
        for tensor in these:
            if type(tensor) not in _PLAIN or tensor.layout is not torch.strided:
                return True  # who has no address
            at = tensor.data_ptr()
            if tensor.is_contiguous():
                spans.append((at, at + tensor.nbytes, writes))
            else:
                start, end = _extent(tensor)
                spans.append((at, at + end - start, writes))
    spans.sort()
    ends = {True: 0, False: 0}
    for start, end, writes in spans:
        if start < min(end, ends[not writes]):
            return True
        ends[writes] = max(ends[writes], end)
    return False


def meet(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Whether two tensors share memory, taking each for all between its first and its last element."""
    if not _torch.is_alias_of(one, other):
        return False
    (start, end), (begin, stop) = _extent(one), _extent(other)
    return start < stop and begin < end


def _extent(tensor: torch.Tensor) -> tuple[int, int]:
    if tensor.layout is not torch.strided or tensor.numel() == 0:
        return 0, 0
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    start = int(tensor.storage_offset()) * tensor.element_size()
    return start, start + int(last + 1) * tensor.element_size()

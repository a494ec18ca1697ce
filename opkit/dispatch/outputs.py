"""What a Python kernel returned, made what the declaration promises, or refused.

torch trusts a kernel's outputs to be what the meta function said; where they are not, a compiled
graph reads garbage without an error. So this holds for every call, not only in tests.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from opkit import _torch
from opkit.errors import OutputError
from opkit.spec.plan import OpenSize, OutputMeta
from opkit.spec.schema import Result, Schema


def conform(
    schema: Schema,
    backend: str,
    values: Sequence[Any],
    returned: Any,
    metas: Sequence[Any] | None,
    device: torch.device | None,
) -> Any:
    """Return the outputs in the form torch expects; `metas` is None where nothing is known of them.

    Raises:
        OutputError: a count, type, shape, dtype or device differs from the declaration, or an
            output shares storage with an input or another output.
    """
    if (
        metas
        and len(metas) == 1
        and isinstance(metas[0], OutputMeta)
        and metas[0][2:] == _DERIVED
        and isinstance(returned, Tensor)
    ):
        shape, dtype, _, _ = metas[0]  # one tensor that fits: the case to be quick in
        fits = returned.shape == shape and returned.dtype == dtype and returned.device == device
        if fits and returned.is_contiguous() and not (returned.is_conj() or returned.is_neg()):
            _refuse_alias(schema, backend, 0, returned, values, ())
            return returned
    outputs = list(schema.flatten(returned))
    if len(outputs) != len(schema.results) or (not schema.results and returned is not None):
        found = "a value" if not schema.results else f"{len(outputs)} values"
        raise _error(schema, backend, f"returned {found}", f"{len(schema.results) or 'none'}", "Return")
    before: list[Tensor] = []
    opened: dict[str, tuple[int, str]] = {}
    for index, (result, output) in enumerate(zip(schema.results, outputs, strict=True)):
        if result.is_number:
            outputs[index] = _number(schema, backend, result, output)
            continue
        meta = metas[index] if metas is not None else None
        if result.type.optional and (output is None or meta is ABSENT):
            _check_presence(schema, backend, result.name, output, meta)
            continue
        many = result.type.is_list
        holes = result.type.optional_elements
        if many and not (
            isinstance(output, (list, tuple))
            and all(isinstance(o, Tensor) or (holes and o is None) for o in output)
        ):
            raise _type_error(schema, backend, result.name, output, "a list of tensors")
        if not many and not isinstance(output, Tensor):
            raise _type_error(schema, backend, result.name, output, "a Tensor")
        tensors = output if many else [output]
        for one in tensors:
            if one is not None:
                _refuse_alias(schema, backend, index, one, values, before)
                before.append(one)
        if meta is not None:
            wanted = meta if many else [meta]
            if len(wanted) != len(tensors):
                found = f"returned {len(tensors)} tensors as {result.name}"
                raise _error(schema, backend, found, f"{len(wanted)} by {_source(*wanted[:1])}", "Return")
            for o, m in zip(tensors, wanted, strict=True):
                _check_presence(schema, backend, result.name, o, m)
            closed = (
                m if o is None else _closed(schema, backend, result.name, o, m, opened)
                for o, m in zip(tensors, wanted, strict=True)
            )
            tensors = [
                None if o is None else _fit(schema, backend, result.name, o, m, device)
                for o, m in zip(tensors, closed, strict=True)
            ]
        outputs[index] = list(tensors) if many else tensors[0]
    return schema.raw(outputs)


_DERIVED = (None, None)  # stride and device of an output that the shape line describes
ABSENT: Any = object()  # in the place of an optional output's metadata: the meta function says None


def _check_presence(schema: Schema, backend: str, name: str, output: Any, meta: Any) -> None:
    """Raise where an optional tensor is there, or is not, and its meta function says otherwise."""
    if meta is not None and (output is None) != (meta is ABSENT):
        found, expected = ("None", "a Tensor") if output is None else ("a Tensor", "None")
        raise _error(
            schema, backend, f"returned {found} as {name}", f"{expected} by its meta function", "Return"
        )


def _number(schema: Schema, backend: str, result: Result, output: Any) -> Any:
    """Return an int, float or bool, or raise; the dispatcher would read another type as it likes."""
    kinds = {"float": (float, int), "bool": (bool,)}.get(result.type.base, (int,))
    if not isinstance(output, kinds) or (isinstance(output, bool) and bool not in kinds):
        expected = {"SymInt": "int"}.get(result.type.base, result.type.base)
        raise _type_error(
            schema, backend, result.name, output, f"{'an' if expected == 'int' else 'a'} {expected}"
        )
    return float(output) if result.type.base == "float" else output


def _closed(
    schema: Schema,
    backend: str,
    name: str,
    output: Tensor,
    meta: OutputMeta,
    opened: dict[str, tuple[int, str]],
) -> OutputMeta:
    """Return metadata with the sizes of `output` where they depend on data; `opened` has those of its names."""
    if output.dim() != len(meta.shape) or not any(isinstance(size, OpenSize) for size in meta.shape):
        return meta
    shape = list(meta.shape)
    for axis, (size, found) in enumerate(zip(meta.shape, output.shape, strict=True)):
        if not isinstance(size, OpenSize):
            continue
        shape[axis] = found
        if size.bound is not None and found > size.bound:
            returned = f"returned {name} with {found} in dimension {axis}, ?{size.name}"
            raise _error(schema, backend, returned, f"at most {size.bound} by the shape line", "Return")
        known, where = opened.setdefault(size.name, (found, name))
        if found != known:
            returned = f"returned {name} with {found} in dimension {axis}, ?{size.name}"
            raise _error(schema, backend, returned, f"{known}, as in {where}", "Return")
    return meta._replace(shape=tuple(shape))


def _fit(
    schema: Schema, backend: str, name: str, output: Tensor, meta: OutputMeta, device: torch.device | None
) -> Tensor:
    """Return an output in the layout it must have, or raise."""
    device = meta.device or device
    if output.shape != meta.shape or output.dtype != meta.dtype or not _same(output.device, device):
        raise _meta_error(schema, backend, name, output, meta, device)
    if output.is_conj() or output.is_neg():
        output = output.resolve_conj().resolve_neg()
    if meta.stride is None:
        return output.contiguous()
    strides = zip(meta.shape, output.stride(), meta.stride, strict=True)
    if all(found == wanted for size, found, wanted in strides if size > 1):
        return output
    return torch.empty_strided(meta.shape, meta.stride, dtype=meta.dtype, device=output.device).copy_(output)


def _same(found: torch.device, declared: torch.device | None) -> bool:
    """Whether two devices are one, where `cuda` stands for any index of it."""
    if found == declared:
        return True
    return declared is not None and found.type == declared.type and None in (found.index, declared.index)


def _refuse_alias(
    schema: Schema, backend: str, index: int, output: Tensor, values: Sequence[Any], before: Sequence[Tensor]
) -> None:
    for position, value in enumerate(values):
        if isinstance(value, Tensor):
            if _torch.is_alias_of(output, value):
                raise _alias_error(schema, backend, index, f"argument {schema.params[position].name}")
        elif isinstance(value, (list, tuple)):
            for one in value:
                if isinstance(one, Tensor) and _torch.is_alias_of(output, one):
                    raise _alias_error(schema, backend, index, f"argument {schema.params[position].name}")
    for other in before:
        if _torch.is_alias_of(output, other):
            raise _alias_error(schema, backend, index, "another output")


def _alias_error(schema: Schema, backend: str, index: int, what: str) -> OutputError:
    return OutputError(
        f"calling {schema.name}: the {backend} kernel returned as {schema.results[index].name} a tensor that "
        f"shares storage with {what}; expected fresh storage, since compiled code may overwrite either. "
        "Return a copy: .clone().",
        op=schema.name,
    )


def _type_error(schema: Schema, backend: str, name: str, found: Any, expected: str) -> OutputError:
    return _error(schema, backend, f"returned {type(found).__name__} as {name}", expected, "Return")


def _source(*metas: OutputMeta) -> str:
    """Return what says the metadata of an output, or of the elements of a list."""
    return "the shape line" if metas and metas[0][2:] == _DERIVED else "the meta function"


def _meta_error(
    schema: Schema,
    backend: str,
    name: str,
    output: Tensor,
    meta: OutputMeta,
    device: torch.device | None,
) -> OutputError:
    pairs = (
        ("shape", tuple(output.shape), tuple(meta.shape)),
        ("dtype", output.dtype, meta.dtype),
        ("device", output.device, device),
    )
    field, found, expected = next(pair for pair in pairs if pair[1] != pair[2])
    return _error(
        schema,
        backend,
        f"returned {name} with the {field} {found}",
        f"{expected} by {_source(meta)}",
        "Change one of them, so that the kernel returns",
    )


def _error(schema: Schema, backend: str, found: str, expected: str, advice: str) -> OutputError:
    return OutputError(
        f"calling {schema.name}: the {backend} kernel {found}; expected {expected}. {advice} what is declared: "
        f"{schema}.",
        op=schema.name,
    )

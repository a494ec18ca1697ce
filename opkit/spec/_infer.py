"""The check of a plan as generated Python: a few comparisons per tensor, then the outputs' metadata.

It runs in every call of a Python kernel and under tracing, so it is straight code without loops.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from opkit.spec.shapes import Dim

if TYPE_CHECKING:
    from opkit.spec.plan import DtypeRule, Plan


def python_expression(dim: Dim) -> str:
    """Return the size as Python over the generated names `_d_<name>`."""
    return re.sub(r"[A-Za-z_]\w*", r"_d_\g<0>", dim.text)


def source(plan: Plan) -> str:
    """Return the Python text of `infer` for a plan."""
    lines = [f"def infer({', '.join(p.name for p in plan.schema.params)}):"]
    everything = ", ".join(p.name for p in plan.schema.params)
    emit = lines.append
    known = set(plan.int_names)
    for name in plan.int_names:
        emit(f"    _d_{name} = {name}")
    unsure = {n for n, who in plan.binders.items() if any(_optional(plan, w) for w in who)}
    for name in sorted(unsure):
        emit(f"    _d_{name} = None")
    late: list[str] = []
    for index, tensors in enumerate(plan.inputs):
        pad, shape = "    ", f"_s_{index}"
        if tensors.optional:
            emit(f"    if {tensors.name} is not None:")
            pad = "        "
        emit(f"{pad}{shape} = {tensors.name}.shape")
        dims, star = tensors.entry.dims, tensors.entry.star
        count = len(dims) - (star is not None)
        emit(f"{pad}if len({shape}) {'<' if star is not None else '!='} {count}: _explain({everything})")
        for position, dim in enumerate(dims):
            after = star is not None and position > star
            place = f"{shape}[{position - len(dims) if after else position}]"
            if dim.star:
                stop = position + 1 - len(dims)
                place = f"{shape}[{position}:{stop if stop else ''}]"
            if dim.is_any:
                continue
            if dim.star or dim.is_name:
                variable = f"_d_{dim.text}"
                if dim.text not in known and dim.text not in unsure:
                    emit(f"{pad}{variable} = {place}")
                    known.add(dim.text)
                elif dim.text in unsure:
                    emit(f"{pad}if {variable} is None: {variable} = {place}")
                    emit(f"{pad}elif {place} != {variable}: _explain({everything})")
                else:
                    emit(f"{pad}if {place} != {variable}: _explain({everything})")
            else:
                guards = [f"{tensors.name} is not None"] if tensors.optional else []
                guards += [f"_d_{n} is not None" for n in dim.names() if n in unsure]
                test = " and ".join([*guards, f"{place} != {python_expression(dim)}"])
                late.append(f"    if {test}: _explain({everything})")
        if tensors.dtype is not None:
            want = _python_dtype(tensors.dtype, plan)
            emit(f"{pad}if {tensors.name}.dtype != {want}: _explain({everything})")
    lines += late
    lines += _device_checks(plan, everything)
    for tensors in plan.outputs:
        for name in {n for d in tensors.entry.dims for n in d.names()} & unsure:
            emit(f"    if _d_{name} is None: _explain({everything})")
    params = plan.device_params
    if plan.outputs and all(p.type.optional for p in params):
        emit(f"    if {' and '.join(f'{p.name} is None' for p in params)}: _explain({everything})")
    outputs = []
    for tensors in plan.outputs:
        parts = [_part(d) for d in tensors.entry.dims]
        shape = "(" + "".join(f"{part}, " for part in parts) + ")"
        outputs.append(f"_Meta({shape}, {_python_dtype(tensors.dtype, plan)})")
    device = _first(plan, "device")
    emit(f"    return ({''.join(o + ', ' for o in outputs)}), {device}")
    if any(sign in str(d) for t in (*plan.inputs, *plan.outputs) for d in t.entry.dims for sign in "/%"):
        lines[1:] = ["    try:", *(f"    {line}" for line in lines[1:]), "    except ZeroDivisionError:"]
        emit(f"        _explain({everything})")
    return "\n".join(lines) + "\n"


def _part(dim: Dim) -> str:
    """Return Python for what a dimension adds to the shape of an output."""
    if dim.is_open:
        return f"_Open({dim.text!r}, {python_expression(dim.bound) if dim.bound else None})"
    return f"*_d_{dim.text}" if dim.star else python_expression(dim)


def _device_checks(plan: Plan, everything: str) -> list[str]:
    """Return checks that every tensor is on the device of the first."""
    lines = []
    first = _first(plan, "device")
    for param in [p for p in plan.schema.params if p.type.is_tensor][1:]:
        given = f"{param.name} is not None and " if param.type.optional else ""
        lines.append(f"    if {given}{param.name}.device != {first}: _explain({everything})")
    return lines


def _optional(plan: Plan, name: str) -> bool:
    return next(t.optional for t in plan.inputs if t.name == name)


def _python_dtype(rule: DtypeRule | None, plan: Plan) -> str:
    assert rule is not None
    if rule.kind == "fixed":
        return f"_torch.{rule.name}"
    if rule.kind == "tensor":
        param = next(p for p in plan.schema.params if p.name == rule.name)
        own = f"{rule.name}.dtype"
        return (
            f"({own} if {rule.name} is not None else {_first(plan, 'dtype')})" if param.type.optional else own
        )
    return rule.name if rule.kind == "value" else _first(plan, "dtype")


def _first(plan: Plan, attribute: str) -> str:
    """Return Python for an attribute of the first Tensor argument that is not None."""
    text = "None"
    for param in reversed(plan.device_params):
        if not param.type.is_tensor:
            text = f"_torch.device({param.name})"
        elif param.type.optional:
            text = f"({param.name}.{attribute} if {param.name} is not None else {text})"
        else:
            text = f"{param.name}.{attribute}"
    return text

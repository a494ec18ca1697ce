"""The check of a plan as generated Python: a few comparisons per tensor, then the outputs' metadata.

It runs in every call of a Python kernel and under tracing, so it is straight code; only lists are walked.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING

from opkit.spec.shapes import Dim
from opkit.spec.sizes import LARGEST

if TYPE_CHECKING:
    from opkit.spec.plan import DtypeRule, Plan, Tensors
    from opkit.spec.schema import Param


def python_expression(dim: Dim) -> str:
    """Return the size as Python over the generated names `_d_<name>`."""
    return re.sub(r"[A-Za-z_]\w*", r"_d_\g<0>", dim.text)


def source(plan: Plan, *, symbols: bool = False) -> str:
    """Return the Python text of `infer` for a plan; with `symbols` it may compare what only a call knows."""
    return _Writer(plan, symbols).text()


class _Writer:
    """Puts the function together: bindings and checks in the order of the arguments, then what needs all names."""

    def __init__(self, plan: Plan, symbols: bool) -> None:
        self.plan = plan
        self.symbols = symbols
        self.everything = ", ".join(p.name for p in plan.schema.params)
        self.fail = f"_explain({self.everything})"
        self.lines: list[str] = []
        self.late: list[str] = []
        self.known = set(plan.int_names)
        self.ints = {*plan.int_names, *plan.optional_ints}
        params = plan.device_params
        sure = next((i for i, p in enumerate(params) if not p.type.optional and not p.type.is_list), None)
        self.before = params if sure is None else params[: sure + 1]
        """Those that decide the outputs' device and dtype: up to the first that is always there."""
        self.searched = any(p.type.is_list for p in self.before)

    def text(self) -> str:
        plan, emit = self.plan, self.lines.append
        for name in plan.int_names:
            emit(f"    _d_{name} = {name}")
        for name in sorted(plan.unsure | plan.each):
            emit(f"    _d_{name} = {name if name in plan.optional_ints else None}")
        if self.searched:
            emit(f"    _f = _first({', '.join(p.name for p in self.before)})")
        for index, tensors in enumerate(plan.inputs):
            self._input(index, tensors)
        self.lines += self.late
        self._devices()
        unknown = self._nothing()
        if unknown:
            emit(f"    if {unknown}: {self.fail}")
        outputs = [self._output(i, t) for i, t in enumerate(plan.outputs)]
        metas = iter(outputs)
        parts = [next(metas) if r.type.base == "Tensor" else "None" for r in plan.schema.results]
        device = "None if _f is None else _f.device" if self.searched else self._first("device")
        emit(f"    return ({''.join(p + ', ' for p in parts)}), {device}")
        lines = self.lines
        if any(sign in str(d) for t in (*plan.inputs, *plan.outputs) for d in t.entry.dims for sign in "/%"):
            lines = ["    try:", *(f"    {line}" for line in lines), "    except ZeroDivisionError:"]
            lines.append(f"        {self.fail}")
        return "\n".join([f"def infer({self.everything}):", *lines]) + "\n"

    # ---------------------------------------------------------------- inputs

    def _input(self, index: int, tensors: Tensors) -> None:
        emit, name, pad = self.lines.append, tensors.name, "    "
        if tensors.optional:
            emit(f"    if {name} is not None:")
            pad = "        "
        if tensors.entry.is_list:
            self._list(index, tensors, pad)
            return
        emit(f"{pad}_s_{index} = {name}.shape")
        self._dims(tensors, pad, f"_s_{index}")
        self._dtype(index, tensors, pad, name)
        for test in self._expressions(tensors, f"_s_{index}"):
            given = f"{name} is not None and " if tensors.optional else ""
            self.late.append(f"    if {given}{test}: {self.fail}")

    def _list(self, index: int, tensors: Tensors, pad: str) -> None:
        emit, name = self.lines.append, tensors.name
        star = tensors.each(self.plan)
        if star is not None:
            emit(f"{pad}if _d_{star} is None: _d_{star} = [None] * len({name})")
            emit(f"{pad}elif len(_d_{star}) != len({name}): {self.fail}")
        other = tensors.dtype.name if tensors.dtype is not None and tensors.dtype.kind == "each" else None
        if other is not None:
            emit(f"{pad}if {other} is not None and len({other}) != len({name}): {self.fail}")
        numbered = star is not None or other is not None
        walk = f"for _i, _x in enumerate({name}):" if numbered else f"for _x in {name}:"
        emit(f"{pad}{walk}")
        inner = pad + "    "
        if tensors.optional_elements:
            emit(f"{inner}if _x is None: continue")
        emit(f"{inner}_s = _x.shape")
        self._dims(tensors, inner, "_s", star)
        self._dtype(index, tensors, inner, "_x")
        emit(f"{inner}if _x.device != {self._first('device')}: {self.fail}")
        tests = self._expressions(tensors, "_x.shape")
        if tests:
            walked = f"{name} or ()" if tensors.optional else name
            self.late.append(f"    for _x in {walked}:")
            given = "_x is not None and " if tensors.optional_elements else ""
            self.late += [f"        if {given}{test}: {self.fail}" for test in tests]

    def _dims(self, tensors: Tensors, pad: str, shape: str, each: str | None = None) -> None:
        emit, dims, star = self.lines.append, tensors.entry.dims, tensors.entry.star
        count = len(dims) - (star is not None)
        if star is None or count:
            emit(f"{pad}if len({shape}) {'<' if star is not None else '!='} {count}: {self.fail}")
        for position, dim in enumerate(dims):
            if dim.is_any or not (dim.star or dim.is_name):
                continue
            place, variable = _place(tensors, position, shape), f"_d_{dim.text}"
            if dim.star and dim.text == each:
                emit(f"{pad}if {variable}[_i] is None: {variable}[_i] = {place}")
                emit(f"{pad}elif {self._differ(place, f'{variable}[_i]')}: {self.fail}")
            elif dim.text in self.plan.unsure:
                emit(f"{pad}if {variable} is None: {variable} = {place}")
                emit(f"{pad}elif {self._differ(place, variable)}: {self.fail}")
            elif dim.text in self.known:
                emit(f"{pad}if {self._differ(place, variable)}: {self.fail}")
            else:
                emit(f"{pad}{variable} = {place}")
                self.known.add(dim.text)

    def _expressions(self, tensors: Tensors, shape: str) -> list[str]:
        """Return tests of the sizes that only follow once every name is bound."""
        tests = []
        for position, dim in enumerate(tensors.entry.dims):
            if not (dim.is_any or dim.star or dim.is_name):
                guards = [f"_d_{n} is not None" for n in dim.names() if n in self.plan.unsure]
                differs = self._differ(_place(tensors, position, shape), python_expression(dim))
                tests.append(" and ".join([*guards, differs]))
        return tests

    def _differ(self, one: str, other: str) -> str:
        return f"_differ({one}, {other})" if self.symbols else f"{one} != {other}"

    def _dtype(self, index: int, tensors: Tensors, pad: str, value: str) -> None:
        if tensors.dtype is not None:
            rule, given = tensors.dtype, ""
            if rule.kind == "value" and self.plan.param(rule.name).type.optional:
                given = f"{rule.name} is not None and "
            self.lines.append(f"{pad}if {given}{value}.dtype != {self._wanted(rule)}: {self.fail}")
        if tensors.entry.dtypes:
            self.lines.append(f"{pad}if {value}.dtype not in _in_{index}: {self.fail}")

    def _devices(self) -> None:
        """Check that every tensor is on the device of the first."""
        for param in [p for p in self.plan.schema.params if p.type.base == "Tensor"][1:]:
            if not param.type.is_list:  # those are walked anyway
                given = f"{param.name} is not None and " if param.type.optional else ""
                self.lines.append(
                    f"    if {given}{param.name}.device != {self._first('device')}: {self.fail}"
                )

    # ---------------------------------------------------------------- outputs

    def _nothing(self) -> str:
        """Return a test of whether nothing says where the outputs live."""
        if not self.plan.outputs or not all(p.type.optional or p.type.is_list for p in self.before):
            return ""
        nothing = "_f is None" if self.searched else " and ".join(f"{p.name} is None" for p in self.before)
        if all(t.length_of for t in self.plan.outputs):  # of an empty list there is nothing to say
            lengths = dict.fromkeys(t.length_of for t in self.plan.outputs)
            return f"{nothing} and ({' or '.join(map(str, lengths))})"
        return nothing

    def _output(self, index: int, tensors: Tensors) -> str:
        """Write the checks of what an output's sizes stand on; return Python for its metadata."""
        emit, pad, length = self.lines.append, "    ", tensors.length_of
        if (tensors.entry.is_list and length is None) or any(d.is_any for d in tensors.entry.dims):
            return "None"
        star = tensors.each(self.plan)
        if length is not None:
            param = self.plan.param(length)
            if param.type.optional:
                emit(f"    if {length} is None: {self.fail}")
            if param.type.optional_elements and tensors.dtype is not None and tensors.dtype.kind == "each":
                emit(f"    if any(_x is None for _x in {length}): {self.fail}")
            elif param.type.optional_elements and star is not None:
                emit(f"    if any(_e is None for _e in _d_{star}): {self.fail}")
            emit(f"    if {length}:")
            pad = "        "
        before = len(self.lines)
        for name in sorted({n for d in tensors.entry.dims for n in d.names()} & self.plan.unsure):
            emit(f"{pad}if _d_{name} is None: {self.fail}")
        parts = []
        for position, dim in enumerate(tensors.entry.dims):
            size = dim.bound if dim.is_open else dim
            text = "None"
            if size is not None and size.star:
                text = f"*_e_{size.text}" if size.text == star else f"*_d_{size.text}"
            elif size is not None:
                text = self._size(f"_n_{index}_{position}", size, pad)
            parts.append(f"_Open({dim.text!r}, {text})" if dim.is_open else text)
        wanted = "_x.dtype" if _is_each(tensors.dtype) else self._wanted(tensors.dtype)
        if tensors.entry.dtypes:
            found = f"any(_x.dtype not in _out_{index} for _x in {length})" if wanted == "_x.dtype" else ""
            emit(f"{pad}if {found or f'{wanted} not in _out_{index}'}: {self.fail}")
        if length is not None and len(self.lines) == before:
            self.lines.pop()  # the test of the length, which has nothing to guard
        meta = f"_Meta(({''.join(p + ', ' for p in parts)}), {wanted})"
        if length is None:
            return meta
        if star is not None:
            return f"[{meta} for _x, _e_{star} in zip({length}, _d_{star})]"
        return f"[{meta} for _x in {length}]"

    def _size(self, variable: str, dim: Dim, pad: str) -> str:
        """Return Python for a size of an output; one that is computed is held to what a size can be."""
        text = python_expression(dim)
        if dim.text.isdigit() or (dim.is_name and dim.text not in self.ints):
            return text
        self.lines.append(f"{pad}{variable} = {text}")
        fits = f"0 <= {variable} <= {LARGEST} if {variable}.__class__ is int else _fits({variable})"
        self.lines.append(f"{pad}if not ({fits}): {self.fail}")
        return variable

    # ---------------------------------------------------------------- dtypes and devices

    def _wanted(self, rule: DtypeRule | None) -> str:
        """Return Python for the dtype that a rule means, inside of the loop over a list where it is `each`."""
        assert rule is not None
        if rule.kind == "fixed":
            return f"_torch.{rule.name}"
        if rule.kind == "each":
            others, own = self.plan.param(rule.name).type, f"{rule.name}[_i].dtype"
            if others.optional_elements:
                own = f"({own} if {rule.name}[_i] is not None else _x.dtype)"
            return f"({own} if {rule.name} is not None else _x.dtype)" if others.optional else own
        if rule.kind == "tensor":
            own = f"{rule.name}.dtype"
            if self.plan.param(rule.name).type.optional:
                return f"({own} if {rule.name} is not None else {self._first('dtype')})"
            return own
        if rule.kind == "value" and self.plan.param(rule.name).type.optional:
            return f"({rule.name} if {rule.name} is not None else {self._first('dtype')})"
        return rule.name if rule.kind == "value" else self._first("dtype")

    def _first(self, attribute: str) -> str:
        """Return Python for an attribute of the first tensor that is not None."""
        if self.searched:
            return f"_f.{attribute}"
        return _choice(self.before, attribute)


def _choice(params: Sequence[Param], attribute: str) -> str:
    text = "None"
    for param in reversed(params):
        if not param.type.is_tensor:
            own = f"_torch.device({param.name})"
            text = f"({own} if {param.name} is not None else {text})" if param.type.optional else own
        elif param.type.optional:
            text = f"({param.name}.{attribute} if {param.name} is not None else {text})"
        else:
            text = f"{param.name}.{attribute}"
    return text


def _place(tensors: Tensors, position: int, shape: str) -> str:
    """Return Python for the size, or the sizes, that a dimension of an entry stands for."""
    dims, star = tensors.entry.dims, tensors.entry.star
    if star == position:
        stop = position + 1 - len(dims)
        return f"{shape}[{position}:{stop if stop else ''}]" if len(dims) > 1 else shape
    after = star is not None and position > star
    return f"{shape}[{position - len(dims) if after else position}]"


def _is_each(rule: DtypeRule | None) -> bool:
    return rule is not None and rule.kind == "each"

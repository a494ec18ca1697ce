"""What a call may not do in a frozen process, and how that is said: with the line that prepares for it.

`select` and `run` ask here whenever a call would select a kernel for the first time, load one, or ask plugins; a
call whose kernel is decided never comes here. Who is frozen, `_frozen` knows.
"""

from __future__ import annotations

import contextlib
import enum
import threading
import time
import weakref
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from opkit import _config, _frozen
from opkit import _sources as sources
from opkit.cpp.light import Source
from opkit.dispatch import preference
from opkit.dispatch.preference import Preference
from opkit.dispatch.table import Fetch, Kernel, KernelTable
from opkit.errors import BuildError
from opkit.spec.schema import Schema

_NONE = Preference()
_announced: weakref.WeakSet[Kernel] = weakref.WeakSet()  # whose loading a warning has told already
_asking = threading.local()  # has `call`, the schema and the arguments of the call that plugins are asked for


def consult(schema: Schema, values: Sequence[Any]) -> None:
    """Let sources register their kernels, on behalf of a call."""
    before = getattr(_asking, "call", None)
    _asking.call = schema, values
    try:
        sources.consult_for_kernels()
    finally:
        _asking.call = before


def fetch(schema: Schema, values: Sequence[Any], kernel: Fetch) -> None:
    """Fetch a kernel that is known by name only, on behalf of a call."""
    before = getattr(_asking, "call", None)
    _asking.call = schema, values
    try:
        kernel()
    finally:
        _asking.call = before


def refuse_plugins(names: Sequence[str]) -> None:
    """Raise, or warn, where plugins may not be loaded."""
    held = _frozen.hold()
    if held is None:
        return
    schema, values = getattr(_asking, "call", None) or (None, ())
    plugins = f"the plugin{'s' if len(names) > 1 else ''} {', '.join(names)}"
    if schema is None:
        text = (
            f"looking for ops and kernels: {held.why}, and {plugins} would be loaded; expected them to be loaded "
            "before. Load them first, with opkit.prepare or opkit.plugins.load()."
        )
        _frozen.refuse(held, text, would="load a plugin")
        return
    _refuse_call(held, schema, values, f"load {plugins}", would="load a plugin")


def select(
    table: KernelTable,
    kind: tuple[str, torch.dtype | None, Preference],
    kernel: Kernel,
    values: Sequence[Any],
    rejected: Sequence[tuple[Kernel, str]],
) -> None:
    """Note that a call of this kind runs a kernel which none before it ran, or raise where that may not be.

    While a CUDA graph is captured nobody may have asked for this, so there a first kernel may run: one that need not
    be loaded, of an op that ran no other for this device and dtype, whatever was preferred.
    """
    held = _frozen.hold()
    before = table.selected.get(kind)
    if held is None:
        refused = False
    elif held.mode == "capture":
        before = {k for other, ran in table.selected.items() if other[:2] == kind[:2] for k in ran} or None
        refused = before is not None and kernel not in before
    else:
        refused = before is not None or kernel not in table.prepared
    if held is not None and refused:
        device, dtype, wanted = kind
        of = f"{_short(dtype)} on {device}" if dtype is not None else device
        then = ""
        if isinstance(kernel.function, Source) and not kernel.slot():
            then = f" and {_way(table, kernel)} its kernel"
            _announced.add(kernel)
        if before is None:
            what = f"select {kernel.backend}{then}, where nothing was selected for {of} so far"
        else:
            names = ", ".join(sorted({k.backend for k in before})) or "a kernel that is replaced now"
            why = "; ".join(f"{k.backend}: {reason}" for k, reason in rejected if k in before)
            what = f"select {kernel.backend}{then}, where {names} was selected for {of}{f' ({why})' if why else ''}"
        _refuse_call(held, table.schema, values, what, would="select", wanted=wanted)
    table.selected.setdefault(kind, set()).add(kernel)
    if (events := _frozen.events()) is not None:
        name = table.schema.name
        events.append(_frozen.Event("selected", name, kernel.backend, describe(table.schema, values)))


def load(table: KernelTable, kernel: Kernel, values: Sequence[Any]) -> None:
    """Raise where a call may not load the native kernel that it needs."""
    held = _frozen.hold()
    if held is not None and kernel not in _announced:
        way = _way(table, kernel)
        _refuse_call(held, table.schema, values, f"{way} its {kernel.backend} kernel", would=way)
    _announced.discard(kernel)


@contextlib.contextmanager
def loading(schema: Schema, kernel: Kernel, values: Sequence[Any] | None) -> Iterator[None]:
    """Note that a native kernel is loaded inside, for a call if there are `values`, and whether it is built."""
    inside: list[_frozen.Event] = []
    begun = time.perf_counter()
    with _frozen.preparing(inside):  # what it builds has been asked for
        yield
    if (events := _frozen.events()) is not None:
        what = "built" if any(event.what == "built" for event in inside) else "loaded"
        arguments = "" if values is None else describe(schema, values)
        seconds = time.perf_counter() - begun
        events.append(_frozen.Event(what, schema.name, kernel.backend, arguments, seconds))


def _way(table: KernelTable, kernel: Kernel) -> str:
    """Return what is to be done before a native kernel can run: `build` or `load`."""
    assert isinstance(kernel.function, Source)
    try:
        return "load" if kernel.function.find(table.schema, table.plan(), kernel.backend) else "build"
    except BuildError:  # nothing can be built here, or the source is wrong
        return "build"


def _refuse_call(
    held: _frozen.Hold,
    schema: Schema,
    values: Sequence[Any],
    what: str,
    *,
    would: str,
    wanted: Preference = _NONE,
) -> None:
    line = preparing_line(schema, values, wanted)
    text = (
        f"calling {schema.name} with {describe(schema, values)}: {held.why}, and the call would {what}. Expected a "
        f"call that was prepared. Prepare it first:\n    {line}"
    )
    _frozen.refuse(held, text, op=schema.name, would=would, prepare=line)


def describe(schema: Schema, values: Sequence[Any]) -> str:
    """Return the arguments of a call as a reader wants them: names, shapes, dtypes, the device."""
    parts: list[str] = []
    devices: dict[str, None] = {}
    for param, value in zip(schema.params, values, strict=True):
        listed = isinstance(value, (list, tuple))
        for index, one in enumerate(value if listed else (value,)):
            if isinstance(one, Tensor):
                name = f"{param.name}[{index}]" if listed else param.name
                parts.append(f"{name} {_size(one.shape)} {_short(one.dtype)}")
                devices[one.device.type] = None
        if not isinstance(value, Tensor) and not _holds_tensors(value) and not _is_default(param, value):
            parts.append(f"{param.name}={_code(value)}")
    text = ", ".join(parts) or "no arguments"
    return f"{text} on {' and '.join(devices)}" if devices else text


def preparing_line(schema: Schema, values: Sequence[Any], wanted: Preference) -> str:
    """Return the line of code that prepares for a call."""
    shown = [_code(value) for value in schema.restore(values)]
    last = max(
        (i for i, p in enumerate(schema.positional) if not _is_default(p, values[i])),
        default=-1,
    )
    case = f"({', '.join(shown[: last + 1])}{',' if last == 0 else ''})"
    rest = list(enumerate(schema.params))[len(schema.positional) :]
    named = ", ".join(f"{p.name!r}: {shown[i]}" for i, p in rest if not _is_default(p, values[i]))
    if named:
        case = f"({case}, {{{named}}})"
    line = f"opkit.prepare({schema.name!r}, [{case}])"
    contexts = _contexts(wanted)
    return f"with {', '.join(contexts)}: {line}" if contexts else line


def _contexts(wanted: Preference) -> list[str]:
    """Return the contexts that a preference comes from, as code."""
    found = []
    if wanted.names and (wanted.names, wanted.strict) != (_config.get("OPKIT_BACKEND"), False):
        strict = ", strict=True" if wanted.strict else ""
        found.append(f"opkit.use_backend({', '.join(map(repr, wanted.names))}{strict})")
    stated = [n for n in wanted.required if preference.requires(n)]  # else it is a setting of torch
    if stated:
        found.append(f"opkit.require({', '.join(map(repr, stated))})")
    return found


def _code(value: Any) -> str:
    """Return an expression for a value; tensors are zeros of the same kind."""
    if isinstance(value, Tensor):
        return _tensor_code(value)
    if isinstance(value, (list, tuple)):
        inside = ", ".join(map(_code, value))
        if isinstance(value, list):
            return f"[{inside}]"
        return f"({inside},)" if len(value) == 1 else f"({inside})"
    if isinstance(value, enum.Enum):
        return f"{type(value).__name__}.{value.name}"
    if isinstance(value, torch.device):
        return f"torch.device({str(value)!r})"
    if isinstance(value, torch.Generator):
        return f"torch.Generator({str(value.device)!r})"
    if isinstance(value, float) and repr(value) in ("inf", "-inf", "nan"):
        return f"float({repr(value)!r})"
    return repr(value)


def _tensor_code(tensor: Tensor) -> str:
    options = "" if tensor.dtype is torch.get_default_dtype() else f", dtype={tensor.dtype}"
    if tensor.device.type != "cpu":
        options += f", device={str(tensor.device)!r}"
    if tensor.requires_grad and tensor.is_leaf:
        options += ", requires_grad=True"
    if tensor.layout is not torch.strided or tensor.is_contiguous():
        return f"torch.zeros({', '.join(map(str, tensor.shape)) or '()'}{options})"
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return f"torch.zeros({last + 1}{options}).as_strided({_size(tensor.shape)}, {tensor.stride()})"


def _holds_tensors(value: Any) -> bool:
    return isinstance(value, (list, tuple)) and any(isinstance(one, Tensor) for one in value)


def _is_default(param: Any, value: Any) -> bool:
    if isinstance(value, Tensor) or _holds_tensors(value):
        return False
    return type(value) is type(param.default) and bool(value == param.default)


def _size(shape: Sequence[int]) -> str:
    return str(tuple(shape))


def _short(dtype: torch.dtype | None) -> str:
    return str(dtype).removeprefix("torch.")

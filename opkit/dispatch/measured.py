"""What was measured of an op on this machine: which kernel was the fastest, for calls of which size.

    <OPKIT_CACHE_DIR>/tuned/<machine>/<op>.json     all that was measured of an op there

`opkit.tune` measures and writes, `select` asks. A file that is absent says nothing, one that is damaged says nothing
and is warned of; neither keeps a call from running. Sizes are told apart by powers of two: the bucket of a call is the
bit length of the number of elements of all its tensors together.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import json
import math
import os
import platform
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import CodeType, MappingProxyType
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from opkit.cpp import _roots, _turn, cache
from opkit.errors import warn
from opkit.spec.schema import tensors

if TYPE_CHECKING:
    from opkit.dispatch.table import Kernel

_FORMAT = 1

Kind = tuple[str, int]
"""The dtype of the first tensor, `none` where there is none, and the bucket."""


@dataclass(frozen=True)
class Measurement:
    """What was measured for one kind of calls.

    Attributes:
        winner: the backend to run.
        seconds: what a call took, for each backend that could take one.
        kernels: all that were registered for the device, and what tells the code of each from another.
        cases: the arguments of the calls.
    """

    winner: str
    seconds: Mapping[str, float]
    kernels: Mapping[str, str]
    cases: tuple[str, ...] = ()

    def __str__(self) -> str:
        times = {
            name: shown(self.seconds[name]) for name in sorted(self.seconds, key=self.seconds.__getitem__)
        }
        own = times.pop(self.winner)
        others = ", ".join(f"{name} {time}" for name, time in times.items())
        return f"measured {own} ({others})" if others else f"measured {own}"


class Verdict(NamedTuple):
    """The backend that was the fastest at calls like one, or None; and why, or why not, as `explain` says it."""

    winner: str | None = None
    reason: str = ""


UNKNOWN = Verdict()


@dataclass(frozen=True)
class Measured:
    """All that was measured of an op, for one device type."""

    kinds: Mapping[Kind, Measurement] = field(default_factory=lambda: MappingProxyType({}))

    def __bool__(self) -> bool:
        return bool(self.kinds)

    def verdict(self, dtype: torch.dtype | None, bucket: int, kernels: Iterable[Kernel]) -> Verdict:
        """Return what it says of a call: nothing, where the kernels are no longer those that were measured."""
        if not self.kinds:
            return UNKNOWN
        name = short(dtype)
        found = self.kinds.get((name, bucket))
        if found is None:
            return Verdict(reason=f"{span(bucket)} of {name} were not measured")
        now = {kernel.backend: kernel.identity for kernel in kernels}
        if now == found.kernels:
            return Verdict(found.winner, str(found))
        return Verdict(reason=f"measured {_difference(found.kernels, now)}; run opkit.tune again")


def _difference(then: Mapping[str, str], now: Mapping[str, str]) -> str:
    added, gone = sorted(now.keys() - then.keys()), sorted(then.keys() - now.keys())
    if added:
        return f"without {', '.join(added)}"
    if gone:
        return f"with {', '.join(gone)}, which is not registered"
    return f"with other code of {', '.join(name for name in sorted(now) if now[name] != then[name])}"


# ---------------------------------------------------------------- what a call is like


def bucket_of(values: Sequence[Any]) -> int:
    """Return the bucket of a call: the core computes the same, in core/call.cpp."""
    return sum(tensor.numel() for tensor in tensors(values)).bit_length()


def span(bucket: int) -> str:
    """Return the sizes of a bucket.

    >>> span(0), span(1), span(4)
    ('0 elements', '1 elements', '8 to 15 elements')
    """
    first, last = 1 << bucket >> 1, (1 << bucket) - 1
    return f"{first} to {last} elements" if first < last else f"{last} elements"


def short(dtype: torch.dtype | None) -> str:
    """Return the name of a dtype in a file and in texts."""
    return "none" if dtype is None else str(dtype).removeprefix("torch.")


def shown(seconds: float) -> str:
    """Return a time as a reader wants it.

    >>> shown(1.234e-5), shown(0.5)
    ('12.3 us', '500 ms')
    """
    for unit, length in (("s", 1.0), ("ms", 1e-3), ("us", 1e-6)):
        if seconds >= length:
            return f"{seconds / length:.3g} {unit}"
    return f"{seconds * 1e9:.3g} ns"


def identity(function: Callable[..., Any]) -> str:
    """Return what tells a Python function from an edited one: its bytecode, whatever line it stands on."""
    while isinstance(function, functools.partial):
        function = function.func
    function = inspect.unwrap(function)
    code = getattr(function, "__code__", None) or getattr(type(function).__call__, "__code__", None)
    if isinstance(code, CodeType):
        return cache.digest(_content(code))
    return getattr(function, "__qualname__", type(function).__qualname__)


def _content(constant: Any) -> Any:
    """Return a constant of a function as text that is the same in every process."""
    if isinstance(constant, CodeType):
        return constant.co_code, constant.co_names, [_content(one) for one in constant.co_consts]
    return sorted(map(repr, constant)) if isinstance(constant, frozenset) else repr(constant)


# ---------------------------------------------------------------- where it is kept


def machine(device: str) -> str:
    """Return what measurements of a device type are valid for: a processor, its threads, and torch's version."""
    threads = f" {torch.get_num_threads()} threads" if device == "cpu" else ""
    return f"{model(device)}{threads} torch {torch.__version__}"


def model(device: str) -> str:
    """Return the processor, or a device type with the name of what it is."""
    return _processor() if device == "cpu" else f"{device} {_name_of(device)}".rstrip()


def read(op: str, device: str) -> Measured:
    """Return what was measured of an op on this machine, in this cache or one that is only read."""
    found: dict[Kind, Measurement] = {}
    with contextlib.suppress(RuntimeError):  # of a user without a home
        for root in reversed((_roots.own(), *_roots.read_only())):
            if os.path.isdir(f"{root}/tuned"):
                advice = f"Run opkit.tune on {op} again, or remove the file."
                found.update(_read(_path(root, op, device), op, advice))
    return Measured(MappingProxyType(found))


def make_room(op: str) -> None:
    """Make the cache folder.

    Raises:
        BuildError: it cannot be written, or others may write it.
    """
    _roots.make(f"tuning {op}")


def keep(op: str, device: str, new: Mapping[Kind, Measurement]) -> None:
    """Write what was measured, over what was measured before and by other processes.

    Raises:
        BuildError: the cache folder cannot be written.
    """
    doing = f"tuning {op}"
    root = _roots.make(doing)
    path = _path(root, op, device)
    with (
        cache.writing(doing),
        _turn.take(Path(root, "locks", f"tuned-{path.stem}.lock"), f"what is known of {op}"),
    ):
        os.makedirs(path.parent, mode=0o755, exist_ok=True)
        kinds = {**_read(path, op, "It is replaced."), **new}
        content = {
            "format": _FORMAT,
            "op": op,
            "machine": machine(device),
            "measured": [{"dtype": d, "bucket": b, **asdict(kinds[d, b])} for d, b in sorted(kinds)],
        }
        unfinished = path.with_name(f"{path.name}.{os.urandom(8).hex()}")
        try:
            unfinished.write_text(json.dumps(content, indent=1))
            os.replace(unfinished, path)
        except OSError:
            unfinished.unlink(missing_ok=True)
            raise


def forget(op: str) -> None:
    """Remove what was measured of an op, on any machine that shares the cache.

    Raises:
        BuildError: the cache folder cannot be written.
    """
    with cache.writing(f"forgetting what was measured of {op}"):
        for path in Path(_roots.own(), "tuned").glob(f"*/{_file(op)}"):
            path.unlink(missing_ok=True)


def _path(root: str, op: str, device: str) -> Path:
    here = machine(device)
    return Path(root, "tuned", f"{cache.slug(here)}-{cache.digest(here)[:8]}", _file(op))


def _file(op: str) -> str:
    return f"{cache.slug(op)}.json"


def _read(path: Path, op: str, advice: str) -> dict[Kind, Measurement]:
    try:
        content = json.loads(path.read_bytes())
        if content["format"] != _FORMAT or content["op"] != op:  # a later opkit's, or of another long name
            return {}
        return dict(map(_parsed, content["measured"]))
    except OSError:  # as a rule there is none
        return {}
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        warn(
            f"reading what was measured of {op}: {path} is damaged ({type(error).__name__}: {error}); expected what "
            f"opkit.tune wrote. Kernels are chosen as if nothing was measured. {advice}"
        )
        return {}


def _parsed(entry: Mapping[str, Any]) -> tuple[Kind, Measurement]:
    """Return what an entry of a file says; raises what `_read` expects where it is none."""
    seconds = {str(name): float(time) for name, time in entry["seconds"].items()}
    kernels = {str(name): str(code) for name, code in entry["kernels"].items()}
    winner, bucket = entry["winner"], entry["bucket"]
    if winner not in seconds or not seconds.keys() <= kernels.keys() or not isinstance(bucket, int):
        raise ValueError(f"the winner is {winner!r} and the bucket {bucket!r}")
    if not all(0 < time < math.inf for time in seconds.values()):
        raise ValueError(f"the times are {seconds}")
    return (str(entry["dtype"]), bucket), Measurement(
        winner, seconds, kernels, tuple(map(str, entry["cases"]))
    )


@functools.cache
def _processor() -> str:
    """Return the model of the processor, as Linux names it."""
    described: dict[str, str] = {}
    with contextlib.suppress(OSError), open("/proc/cpuinfo") as stream:
        for line in stream:
            if not line.strip():  # the first processor is described
                break
            name, _, value = line.partition(":")
            described[name.strip()] = value.strip()
    arm = [described[name] for name in ("CPU implementer", "CPU part", "CPU variant") if name in described]
    return described.get("model name") or " ".join((platform.machine(), *arm))


def _name_of(device: str) -> str:
    name = getattr(getattr(torch, device, None), "get_device_name", None)
    if name is None:
        return ""
    try:
        return str(name())
    except Exception:  # a plugin's device: no call fails because it has no name
        return ""

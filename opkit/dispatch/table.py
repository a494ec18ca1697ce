"""The kernels of one op: what is registered, by whom, for which device and under which conditions.

Responsible for keeping kernels; choosing one is `select`, running it is `run`.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch

from opkit import _torch_device
from opkit.cpp.light import Source
from opkit.dispatch import inplace as inplaces
from opkit.dispatch import measured, native, preference
from opkit.dispatch.inplace import Inplace
from opkit.dispatch.measured import Measured
from opkit.errors import RegistrationError, did_you_mean, warn
from opkit.spec.plan import Plan
from opkit.spec.schema import Schema, check_signature, describe

REFERENCE = "reference"
_DEVICES = ("cpu", "cuda", "xpu", "mps", "hpu", "mtia", "meta")


class Fetch(Protocol):
    """Where a kernel is that is known by name only. Called when it is selected, it puts the kernel into its place."""

    @property
    def busy(self) -> bool:
        """Whether this thread is fetching it."""

    def __call__(self) -> None: ...


@dataclass(frozen=True, eq=False)
class Kernel:
    """One implementation of an op. `function` is Python, or native source that is built when needed.

    Registering the same file again makes another kernel: the file may have changed.
    """

    backend: str
    device: str
    function: Callable[..., Any] | Source
    dtypes: tuple[torch.dtype, ...] | None = None
    when: Callable[..., bool | str] | None = None
    priority: int = 0
    source: str = ""
    properties: tuple[str, ...] = ()
    inplace: Inplace = ()
    fetch: Fetch | None = None
    stated: bool = False  # `source` is what the one who registers it said
    _slots: list[list[Any]] = field(default_factory=lambda: [[]], repr=False)

    def slot(self) -> list[Any]:
        """Return where the built kernel is kept: a list of at most one, until `forget`."""
        return self._slots[0]

    def forget(self) -> None:
        """Have it built anew. Whoever builds now puts it where nobody looks any more."""
        self._slots[0] = []
        native.choose_anew()

    @functools.cached_property
    def identity(self) -> str:
        """What tells its code from another one's, in any process; of a plugin's kernel, which version that has."""
        if self.stated:
            return self.source
        function = self.function
        return function.identity() if isinstance(function, Source) else measured.identity(function)


class KernelTable:
    """The kernels of one op, keyed by device and backend, and the choices already made among them."""

    def __init__(self, schema: Schema, reference: Callable[..., Any], *, declared: bool = False) -> None:
        self.schema = schema
        self.declared = declared  # there is no reference: what stands for it only raises
        self.quiet = False  # whether running the reference needs no warning
        self._kernels: dict[tuple[str, str], Kernel] = {}
        self.decided: dict[Any, Kernel] = {}
        self._measured: dict[str, Measured] = {}
        # What ran for each kind of call, by device, dtype and preference, and what may run for any: see `frozen`.
        self.selected: dict[Any, set[Kernel]] = {}
        self.prepared: set[Kernel] = set()
        # The shape line, where native glue allocates by it; the runner sets it.
        self.plan: Callable[[], Plan | None] = lambda: None
        self.reference = Kernel(REFERENCE, "any", schema.adapt(reference), source=describe(reference))

    def add(self, kernel: Kernel) -> None:
        """Register a kernel; one that takes the place of another from elsewhere warns."""
        key = (kernel.device, kernel.backend)
        old = self._kernels.get(key)
        if old is not None and old.source != kernel.source:
            warn(
                f"{self.schema.name}: the {kernel.backend} kernel for {kernel.device} from {kernel.source} "
                f"replaces the one from {old.source}. Give one of them another backend= to keep both."
            )
        self._kernels[key] = kernel
        if old is not None:  # nor is its library kept
            for kernels in (self.prepared, *self.selected.values()):
                kernels.discard(old)
        preference.know(kernel.backend)
        self.reconsider()

    def discard(self, kernel: Kernel) -> None:
        """Forget a kernel, if it is there still."""
        if self._kernels.get((kernel.device, kernel.backend)) is kernel:
            del self._kernels[kernel.device, kernel.backend]
            self.reconsider()

    def reconsider(self) -> None:
        """Forget the choices made."""
        self.decided = {}  # not cleared: a choice that is being made now goes to the old one
        native.choose_anew()

    def measured(self, device: str) -> Measured:
        """Return what was measured of the op on this machine; it is read when it is first asked for."""
        found = self._measured.get(device)
        if found is None:
            self._measured[device] = Measured()  # if reading it warns, and warnings are errors
            found = self._measured[device] = measured.read(self.schema.name, device)
        return found

    def is_measured(self) -> bool:
        """Whether choices depend on the size of calls, for some device."""
        return any(self._measured.values())

    def measure_anew(self) -> None:
        """Forget what was measured, and the choices made by it: both are in the cache, or gone from it."""
        self._measured = {}
        self.reconsider()

    def has_kernels(self) -> bool:
        """Whether there is any beside the reference; plugins are not asked."""
        return len(self._kernels) > 0  # torch 2.11 traces no bool of a dict

    def for_device(self, device: str) -> list[Kernel]:
        """Return the kernels for a device, most wanted first, the reference last."""
        found = [k for k in self._kernels.values() if k.device == device]
        return [*sorted(found, key=lambda k: (-k.priority, k.backend)), *self._last()]

    def overwrites(self) -> bool:
        """Whether some kernel overwrites arguments."""
        return any(k.inplace for k in self._kernels.values())

    def all(self) -> list[Kernel]:
        """Return every kernel, by device."""
        return [
            *sorted(self._kernels.values(), key=lambda k: (k.device, -k.priority, k.backend)),
            *self._last(),
        ]

    def _last(self) -> list[Kernel]:
        return [] if self.declared else [self.reference]


def device_type(device: str, op: str) -> str:
    """Return the device type that `device` names.

    Raises:
        RegistrationError: torch knows no such device.
    """
    try:
        return torch.device(device).type
    except RuntimeError:
        known = dict.fromkeys((*_DEVICES, _torch_device.slot()))
        hint = " Did you mean 'cuda'?" if device in ("gpu", "nvidia") else did_you_mean(device, known)
        raise RegistrationError(
            f"registering a kernel for {op}: torch knows no device {device!r}; expected one of "
            f"{', '.join(known)}.{hint} Name the device type in the first argument, the way the kernel is "
            "written in backend=.",
            op=op,
        ) from None


def make_kernel(
    schema: Schema,
    device: str,
    function: Callable[..., Any] | Source,
    *,
    backend: str | None,
    dtypes: Iterable[torch.dtype] | None,
    when: Callable[..., bool | str] | None,
    priority: int,
    source: str | None,
    properties: Iterable[str] = (),
    inplace: Iterable[str] | Mapping[str, str | None] = (),
    plan: Plan | None = None,
) -> Kernel:
    """Return a checked kernel for an op.

    Raises:
        RegistrationError: the device, the backend, a dtype or the function does not fit.
    """
    op = schema.name
    device = device_type(device, op)
    if device == "meta":
        raise RegistrationError(
            f"registering a kernel for {op}: found the device 'meta'; expected one that holds data. What happens on "
            "meta is said by the shape line or by register_fake.",
            op=op,
        )
    native = isinstance(function, Source)
    if backend is None:
        backend = function.backend if isinstance(function, Source) else "python"
    if backend == REFERENCE:
        raise RegistrationError(
            f"registering a kernel for {op}: the backend name 'reference' belongs to the decorated function. "
            "Choose another name, such as 'python'.",
            op=op,
        )
    if not native and not callable(function):
        raise RegistrationError(
            f"registering a {backend} kernel for {op}: found {function!r}; expected a function or "
            "opkit.cpp.kernel(...). Pass one of these.",
            op=op,
        )
    if not isinstance(backend, str) or not re.fullmatch(r"[A-Za-z_][\w.-]*", backend):
        raise RegistrationError(
            f"registering a kernel for {op}: found the backend {backend!r}; expected a name of letters, digits, "
            "'_', '.' and '-'. Write backend='fast'.",
            op=op,
        )
    if not isinstance(priority, int):
        raise RegistrationError(
            f"registering a {backend} kernel for {op}: found priority={priority!r}; expected an int. Kernels with "
            "a higher one are tried first.",
            op=op,
        )
    if dtypes is not None:  # it may be an iterator
        dtypes = (dtypes,) if isinstance(dtypes, torch.dtype) else tuple(dtypes)
    wrong = [d for d in dtypes or () if not isinstance(d, torch.dtype)]
    if wrong:
        raise RegistrationError(
            f"registering a {backend} kernel for {op}: dtypes holds {wrong[0]!r}; expected torch dtypes. "
            "Write dtypes=(torch.float32,).",
            op=op,
        )
    if when is not None:
        check_signature(schema, when, f"the condition (when=) of a {backend} kernel")
    where = source or (str(function) if isinstance(function, Source) else describe(function))
    doing = f"registering a {backend} kernel for {op}"
    stated = preference.check_properties(properties, doing, RegistrationError, op)
    reused = inplaces.resolve(schema, plan, inplace, doing)
    if not isinstance(function, Source):
        function = schema.adapt(function)
    condition = when and schema.adapt(when)
    return Kernel(
        backend, device, function, dtypes, condition, priority, where, stated, reused, stated=source is not None
    )  # fmt: skip

"""What a plugin's function is handed, to say what it brings.

Kernels are collected here and take effect after the function has returned; a function that raises
leaves nothing behind. Applying them, and reporting what does not fit, is the loader's part.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ParamSpec, TypeVar, overload

if TYPE_CHECKING:
    from types import ModuleType

    import torch

    from opkit._op import Op
    from opkit.cpp.light import Source
    from opkit.cpp.toolchain import Toolchain

P = ParamSpec("P")
R = TypeVar("R")
F = TypeVar("F", bound=Callable[..., Any])
S = TypeVar("S", bound="Source | Callable[..., Any]")


@dataclass
class Registration:
    """A kernel that waits for its op, or was given to it."""

    op: str
    device: str
    function: Callable[..., Any] | Source
    backend: str
    dtypes: tuple[torch.dtype, ...] | None
    when: Callable[..., bool | str] | None
    priority: int
    properties: tuple[str, ...] = ()
    inplace: tuple[str, ...] | Mapping[str, str | None] = ()
    applied: bool = False
    refused: bool = False

    def __str__(self) -> str:
        return f"{self.op} on {self.device} ({self.backend})"

    def apply(self, op: Op[..., Any], source: str) -> None:
        """Register the kernel on the op that it was waiting for."""
        self.applied, self.refused = False, True
        op.register_kernel(
            self.device,
            self.function,
            backend=self.backend,
            dtypes=self.dtypes,
            when=self.when,
            priority=self.priority,
            properties=self.properties,
            inplace=self.inplace,
            source=source,
        )
        self.applied, self.refused = True, False


class Registry:
    """What a plugin's function gets: with it the plugin declares ops and registers kernels.

    It is usable until the function returns.

    Args:
        source: who registers, as `explain` shows it.

    Attributes:
        devices: the devices that were registered, each with the reason why it is not set up, if it is not.
        lasting: whether the next process may take it that the plugin registers the same again.

    Example:
        >>> import torch
        >>> def register(registry: Registry) -> None:
        ...     @registry.op("doc::plus_one", shapes="*b -> *b")
        ...     def plus_one(x: torch.Tensor) -> torch.Tensor:
        ...         return x + 1
        ...     @registry.register_kernel("doc::plus_one", "cpu", backend="fast")
        ...     def plus_one_fast(x):
        ...         return x.add(1)
        >>> registry = Registry("opkit-doc 1.0")
        >>> register(registry)
        >>> print(registry.registrations[0])
        doc::plus_one on cpu (fast)
    """

    def __init__(self, source: str) -> None:
        self.source = source
        self.registrations: list[Registration] = []
        self._ops: list[Op[..., Any]] = []
        self._toolchains: list[str] = []
        self.devices: dict[str, str] = {}
        self.lasting = True
        self._closed = False

    def op(
        self,
        name: str,
        *,
        shapes: str | None = None,
        mutates_args: Sequence[str] = (),
        schema: str | None = None,
        inline: bool = False,
        tags: Sequence[torch.Tag] = (),
        layout: str | torch.memory_format | None = None,
        flops: Callable[..., Any] | None = None,
        effects: bool = False,
    ) -> Callable[[Callable[P, R]], Op[P, R]]:
        """Make the decorated function an op, exactly as `opkit.op` does.

        Raises:
            SchemaError, ShapeError, DuplicateOpError: as `opkit.op` does.
        """
        from opkit import _make
        from opkit.spec.schema import check_name

        self._check_open(f"declaring {name}")
        check_name(name)
        scope = dict(sys._getframe(1).f_locals)
        decorate: Callable[[Callable[P, R]], Op[P, R]] = _make.declaring(
            name, scope, shapes=shapes, mutates_args=mutates_args, schema=schema, inline=inline, tags=tags,
            layout=layout, flops=flops, effects=effects,
        )  # fmt: skip

        def remember(function: Callable[P, R]) -> Op[P, R]:
            made = decorate(function)
            self._ops.append(made)
            return made

        return remember

    def declare(
        self, schema: str, *, shapes: str | None = None, tags: Sequence[torch.Tag] = (), **options: Any
    ) -> Op[..., Any]:
        """Define an op without a reference, exactly as `opkit.declare` does.

        Raises:
            SchemaError, ShapeError, DuplicateOpError: as `opkit.declare` does.
            RegistrationError: the plugin's function has returned.
        """
        from opkit import _declare

        self._check_open(f"declaring {schema}")
        made = _declare.declaring(schema, sys._getframe(1), shapes=shapes, tags=tags, **options)
        self._ops.append(made)
        return made

    @overload
    def register_kernel(
        self,
        op: str,
        device: str,
        fn: None = None,
        *,
        backend: str,
        dtypes: Iterable[torch.dtype] | None = None,
        when: Callable[..., bool | str] | None = None,
        priority: int = 0,
        properties: Iterable[str] = (),
        inplace: Iterable[str] | Mapping[str, str | None] = (),
    ) -> Callable[[F], F]: ...

    @overload
    def register_kernel(
        self,
        op: str,
        device: str,
        fn: S,
        *,
        backend: str,
        dtypes: Iterable[torch.dtype] | None = None,
        when: Callable[..., bool | str] | None = None,
        priority: int = 0,
        properties: Iterable[str] = (),
        inplace: Iterable[str] | Mapping[str, str | None] = (),
    ) -> S: ...

    def register_kernel(
        self,
        op: str,
        device: str,
        fn: Any = None,
        *,
        backend: str,
        dtypes: Iterable[torch.dtype] | None = None,
        when: Callable[..., bool | str] | None = None,
        priority: int = 0,
        properties: Iterable[str] = (),
        inplace: Iterable[str] | Mapping[str, str | None] = (),
    ) -> Any:
        """Add a kernel to an op, which may be defined now or later. Also a decorator.

        Whether it fits the op is checked when there is one; what does not fit is reported as this
        plugin's failure and left out.

        Args:
            op: the op's name, `namespace::name`.
            device: torch's device type, such as `cpu` or `cuda`.
            fn: a Python function with the op's signature, or `opkit.cpp.kernel(...)`.
            backend: the name of the way it is written; what users give to `opkit.use_backend`.
            dtypes: take only calls whose first tensor has one of these.
            when: called with all arguments, keyword-only ones by name; returns True, or False or a
                reason (str) why the kernel cannot take the call.
            priority: higher ones are tried first.
            properties: what the kernel states of itself, for `opkit.require`.
            inplace: arguments that it overwrites, as for `Op.register_kernel`.

        Raises:
            SchemaError: `op` is not `namespace::name`.
            RegistrationError: torch knows no such device, or the plugin's function has returned.
        """
        from opkit.dispatch.table import device_type
        from opkit.spec.schema import check_name

        if fn is None:
            return lambda f: self.register_kernel(
                op, device, f, backend=backend, dtypes=dtypes, when=when, priority=priority,
                properties=properties, inplace=inplace,
            )  # fmt: skip
        self._check_open(f"registering a {backend} kernel for {op}")
        check_name(op)
        device = device_type(device, op)
        taken = tuple(dtypes) if dtypes is not None else None
        stated = (properties,) if isinstance(properties, str) else tuple(properties)
        reused = (
            dict(inplace)
            if isinstance(inplace, Mapping)
            else (inplace,)
            if isinstance(inplace, str)
            else inplace
        )
        reused = reused if isinstance(reused, dict) else tuple(reused)  # they may be iterators
        self.registrations.append(
            Registration(op, device, fn, backend, taken, when, priority, stated, reused)
        )
        return fn

    def register_toolchain(self, toolchain: Toolchain) -> None:
        """Let source of a language of the plugin's own be compiled, from now on.

        Args:
            toolchain: see `opkit.cpp.Toolchain`.

        Raises:
            ConfigError: another toolchain has one of its suffixes.
            RegistrationError: the plugin's function has returned.
        """
        from opkit.cpp import toolchain as toolchains

        self._check_open(f"registering the toolchain {toolchain.name}")
        toolchains.register(toolchain)
        self._toolchains.append(toolchain.name)

    def register_device(
        self,
        name: str,
        *,
        stub: ModuleType | str,
        loader: Callable[[], ModuleType | None] | str,
        probe: Mapping[str, str | Sequence[str]] | Callable[[], bool | str] | None = None,
    ) -> None:
        """Bring a device for torch's slot, whose library is loaded at the first tensor on it.

        It gets the slot if the user chose it (OPKIT_DEVICE), or if nobody chose one and the probe says yes. The
        same in the manifest has torch know the device as soon as it is imported.

        Args:
            name: what it is called in `torch.device(name)`.
            stub: the module that answers as `torch.<name>` without the library, or its name. It has `device_count`;
                what opkit adds is in `opkit.plugins.device`.
            loader: loads the library and returns the rest of `torch.<name>` as a module; or `module:function`.
            probe: a dict of what must exist, of the kinds `file`, `variable` and `module`; or a function that
                returns True, or False or a reason (str) why there is no such device here.

        Raises:
            PluginError: it is wanted and another device has the slot, or torch has something else of that name.
            RegistrationError: the plugin's function has returned, or `probe` is none of these.

        Example:
            >>> registry = Registry("opkit-opk 1.0 (plugin opk)")
            >>> registry.register_device(
            ...     "opk", stub="opkit_opk.stub", loader="opkit_opk.native:load", probe={"file": "/dev/opk0"}
            ... )
            >>> registry.devices  # there is no such card here, and none of the modules was imported
            {'opk': 'its probe does not find the file /dev/opk0'}
        """
        from opkit.plugins import boot
        from opkit.plugins.device import Device, install, owner

        self._check_open(f"registering the device {name}")
        self.lasting = False  # the next process is to have it too, and only the plugin can say where
        probing = _probe(name, self.source, probe)
        has_slot = owner()
        if has_slot is not None and (has_slot.name, has_slot.source) == (name, self.source):
            return  # the manifest has the same
        self.devices[name] = boot.offer(name, probing)
        if not self.devices[name]:
            install(Device(name, stub, loader, self.source, self.source))

    @property
    def ops(self) -> tuple[str, ...]:
        """The names of the ops that were declared."""
        return tuple(made.name for made in self._ops)

    @property
    def toolchains(self) -> tuple[str, ...]:
        """The names of the toolchains that were registered."""
        return tuple(self._toolchains)

    def close(self) -> None:
        """Take nothing more."""
        self._closed = True

    def take_back(self) -> None:
        """Remove the ops and toolchains that were registered, and forget the kernels."""
        from opkit import _registry
        from opkit.cpp import toolchain as toolchains

        for name in self._toolchains:
            toolchains.unregister(name)
        for made in self._ops:
            if _registry._ops.get(made.name) is made:
                _registry.remove(made.name)
        self.registrations.clear()

    def _check_open(self, doing: str) -> None:
        if self._closed:
            from opkit.errors import RegistrationError

            raise RegistrationError(
                f"{doing} for {self.source}: the plugin's function has returned already; expected this while "
                "it runs. Register in the function, or use opkit.op and opkit.get(name).register_kernel."
            )


def _probe(name: str, source: str, probe: Any) -> Callable[[], bool | str] | None:
    """Return a probe as a function."""
    if probe is None or callable(probe):
        made: Callable[[], bool | str] | None = probe
        return made
    import opkit_boot
    from opkit.plugins.manifest import PROBES

    if not isinstance(probe, Mapping) or not probe or not set(probe) <= set(PROBES):
        from opkit.errors import RegistrationError

        raise RegistrationError(
            f"registering the device {name} for {source}: its probe is {probe!r}; expected a function, or a dict with "
            f"some of {', '.join(PROBES)}. Write probe={{'file': '/dev/...'}}."
        )
    pairs = [
        (kind, one) for kind, named in probe.items() for one in ([named] if isinstance(named, str) else named)
    ]

    def find() -> bool | str:
        absent = opkit_boot.missing(pairs)
        return f"its probe does not find {' and '.join(absent)}" if absent else True

    return find

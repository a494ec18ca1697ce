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

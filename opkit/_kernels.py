"""What an op has of kernels: registering them, building the native ones, and asking which one runs."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, Generic, ParamSpec, TypeVar, overload

import torch

from opkit._compiled import Compiled
from opkit.cpp.light import Source
from opkit.dispatch import select, table
from opkit.dispatch.meta import Meta
from opkit.dispatch.run import Runner
from opkit.dispatch.select import Candidate, Explanation
from opkit.dispatch.table import Fetch, Kernel, KernelTable
from opkit.errors import BackendError, did_you_mean
from opkit.spec.schema import Schema, check_signature

P = ParamSpec("P")
R = TypeVar("R")
F = TypeVar("F", bound=Callable[..., Any])
S = TypeVar("S", bound="Source | Callable[..., Any]")


class HasKernels(Generic[P, R]):
    """An op, as the holder of its kernels."""

    name: str
    schema: Schema
    _table: KernelTable
    _meta: Meta
    _runner: Runner
    _compiled: Compiled

    @overload
    def register_kernel(
        self,
        device: str,
        function: None = None,
        *,
        backend: str | None = None,
        dtypes: Iterable[torch.dtype] | None = None,
        when: Callable[..., bool | str] | None = None,
        priority: int = 0,
        properties: Iterable[str] = (),
        inplace: Iterable[str] | Mapping[str, str | None] = (),
        source: str | None = None,
    ) -> Callable[[F], F]: ...

    @overload
    def register_kernel(
        self,
        device: str,
        function: S,
        *,
        backend: str | None = None,
        dtypes: Iterable[torch.dtype] | None = None,
        when: Callable[..., bool | str] | None = None,
        priority: int = 0,
        properties: Iterable[str] = (),
        inplace: Iterable[str] | Mapping[str, str | None] = (),
        source: str | None = None,
    ) -> S: ...

    def register_kernel(
        self,
        device: str,
        function: Any = None,
        *,
        backend: str | None = None,
        dtypes: Iterable[torch.dtype] | None = None,
        when: Callable[..., bool | str] | None = None,
        priority: int = 0,
        properties: Iterable[str] = (),
        inplace: Iterable[str] | Mapping[str, str | None] = (),
        source: str | None = None,
    ) -> Any:
        """Add a kernel for a device. Also a decorator.

        Args:
            device: torch's device type, such as `cpu` or `cuda`.
            function: a Python function with the op's signature, or `opkit.cpp.kernel(...)`.
            backend: the name of the way it is written; `python`, or that of the native source.
            dtypes: take only calls whose first tensor has one of these.
            when: called with all arguments, keyword-only ones by name; returns True, or False or a
                reason (str) why the kernel cannot take the call. Not called while tracing.
            priority: higher ones are tried first.
            properties: what `opkit.require` may ask for: some of `deterministic` (the same arguments give the
                same bits), `batch_invariant` (what comes out for one element of the batch does not depend on the
                others) and `graph_safe` (it can be captured in a CUDA graph).
            inplace: arguments that the kernel overwrites. It gets copies of them, or the buffers themselves where
                the caller gives them away (`maybe_inplace`) or a compiled graph has no further use for them. It
                may return one as a result: the first of the same entry in the shape line, or as a mapping says,
                `{"x": "y"}`, with None where the argument is only destroyed.
            source: who registers it, for `explain`; by default the function's place.

        Raises:
            RegistrationError: the device or a property is unknown, or the function does not fit the op.

        Example:
            >>> import opkit, torch
            >>> @opkit.op("doc::double", shapes="*b -> *b")
            ... def double(x: torch.Tensor) -> torch.Tensor:
            ...     return 2 * x
            >>> @double.register_kernel("cpu", backend="add", dtypes=(torch.float32,))
            ... def _(x):
            ...     return x + x
            >>> double.explain(torch.ones(2)).selected
            'add'
        """
        if function is None:
            return lambda f: self.register_kernel(
                device, f, backend=backend, dtypes=dtypes, when=when, priority=priority, source=source,
                properties=properties, inplace=inplace,
            )  # fmt: skip
        kernel = table.make_kernel(
            self.schema,
            device,
            function,
            backend=backend,
            dtypes=dtypes,
            when=when,
            priority=priority,
            source=source,
            properties=properties,
            inplace=inplace,
            plan=self._meta.plan,
        )
        if not isinstance(function, Source):
            check_signature(self.schema, function, f"a {kernel.backend} kernel")
        self._enter_kernel(kernel)
        return function

    def _enter_kernel(self, kernel: Kernel) -> None:
        self._table.add(kernel)
        if kernel.inplace:  # what it overwrites is decided when a graph is compiled
            self._compiled.offer()
            self._compiled.changed()

    def _expect_kernel(
        self,
        device: str,
        fetch: Fetch,
        *,
        backend: str,
        dtypes: Iterable[torch.dtype] | None,
        priority: int,
        properties: Iterable[str],
        inplace: Iterable[str] | Mapping[str, str | None],
        source: str,
    ) -> None:
        """Add a kernel that is known by name only; `fetch` is called when it is selected.

        Raises:
            RegistrationError: as `register_kernel` does.
        """

        def absent(*_values: Any) -> Any:
            raise AssertionError(f"the {backend} kernel of {self.name} is to be fetched before it is called")

        kernel = table.make_kernel(
            self.schema, device, absent, backend=backend, dtypes=dtypes, when=None, priority=priority,
            source=source, properties=properties, inplace=inplace, plan=self._meta.plan,
        )  # fmt: skip
        self._enter_kernel(dataclasses.replace(kernel, fetch=fetch))

    def _forget_expected(self, fetch: Fetch) -> None:
        """Take a kernel out that `_expect_kernel` added and that cannot be fetched."""
        for kernel in self._table.all():
            if kernel.fetch is fetch:
                self._table.discard(kernel)

    @property
    def kernels(self) -> tuple[Candidate, ...]:
        """The kernels on every device, those of plugins included, as `explain` records them."""
        return select.listing(self._table)

    def explain(self, /, *args: P.args, **kwargs: P.kwargs) -> Explanation:
        """Say which kernel a call with these arguments would run, and why not the others.

        Compiles nothing. The result prints as a table; `.candidates` has the records, `.selected` the
        backend.

        Example:
            >>> import opkit, torch
            >>> from opkit_kernels import vector_add
            >>> vector_add.explain(torch.ones(2), torch.ones(2)).selected
            'cpp'
        """
        return select.explain(self._table, self.schema.fill(*self.schema.carry(args, kwargs)))

    def build(self, *backends: str) -> list[Path]:
        """Compile native kernels of the op now, and load none of them. Calls after that run what was built.

        Works without the device that they are for: with nvcc, a CUDA kernel compiles on any machine.

        Args:
            *backends: whose kernels; by default all that have native source.

        Returns:
            The libraries' paths.

        Raises:
            BuildError: the source does not compile, or there is no compiler for it.
            BackendError: the op has no native kernel of that backend.

        Example:
            >>> from opkit_kernels import vector_add
            >>> [path.suffix for path in vector_add.build("cpp")]
            ['.so']
        """
        paths = []
        for kernel in self.native_kernels(*backends):
            assert isinstance(kernel.function, Source)
            paths.append(kernel.function.build(self.schema, self._runner.native_plan, kernel.backend))
            kernel.forget()  # its source may have been edited
        return paths

    def native_kernels(self, *backends: str) -> list[Kernel]:
        """Return the kernels that are native source, of all backends or of some.

        Raises:
            BackendError: the op has no native kernel of that backend.

        Example:
            >>> from opkit_kernels import vector_add
            >>> [kernel.device for kernel in vector_add.native_kernels("cpp", "cuda")]
            ['cpu', 'cuda']
        """
        for kernel in self._table.all():
            if kernel.fetch is not None:
                kernel.fetch()
        found = [k for k in self._table.all() if isinstance(k.function, Source)]
        known = {k.backend for k in found}
        for name in backends:
            if name not in known:
                raise BackendError(
                    f"building {self.name}: no native kernel has the backend {name!r}; native kernels of the op: "
                    f"{', '.join(sorted(known)) or 'none'}.{did_you_mean(name, known)} Name one of these.",
                    op=self.name,
                )
        return [k for k in found if not backends or k.backend in backends]

    def compile_commands(self, *backends: str) -> list[dict[str, Any]]:
        """Return how the native kernels are compiled, as entries of compile_commands.json for clangd.

        Raises:
            BackendError: the op has no native kernel of that backend.

        Example:
            >>> from opkit_kernels import vector_add
            >>> [sorted(entry) for entry in vector_add.compile_commands("cpp")]
            [['arguments', 'directory', 'file']]
        """
        commands: list[dict[str, Any]] = []
        for kernel in self.native_kernels(*backends):
            assert isinstance(kernel.function, Source)
            job = kernel.function.job(self.schema, self._runner.native_plan, kernel.backend)
            commands += job.compile_commands()
        return commands

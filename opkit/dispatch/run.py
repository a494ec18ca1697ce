"""Running an op on real tensors: choose a kernel, call it, hold it to its declaration."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any, cast

import torch

from opkit._torch import in_profile, is_profiled
from opkit.cpp.light import Bound, Source
from opkit.dispatch import frozen, outputs, preference, select
from opkit.dispatch import inplace as inplaces
from opkit.dispatch.inplace import Inplace
from opkit.dispatch.meta import Meta
from opkit.dispatch.table import Kernel, KernelTable
from opkit.errors import NoKernelError
from opkit.spec.plan import Plan


class Runner:
    """The kernel that torch's dispatcher sees on every device of one op."""

    def __init__(self, table: KernelTable, meta: Meta) -> None:
        self.table = table
        self.schema = table.schema
        self.meta = meta
        table.plan = lambda: self.native_plan
        self.arrive: Callable[[], None] | None = None
        """Called before calls, until it takes itself away: see `native.path`."""
        self._count = len(table.schema.params)
        self._mutated = tuple(i for i, p in enumerate(table.schema.params) if p.mutated)
        self._factory = not any(p.type.base == "Tensor" for p in table.schema.params)

    @property
    def native_plan(self) -> Plan | None:
        """The shape line, where native glue allocates the outputs by it."""
        plan = self.meta.plan
        return plan if plan is not None and plan.missing is None and self.meta.function is None else None

    def __call__(self, /, *args: Any, **kwargs: Any) -> Any:
        if self.arrive is not None:
            self.arrive()
        values = args if len(args) == self._count and not kwargs else self.schema.fill(args, kwargs)
        if self._factory and self.meta.known and select.device_of(self.schema, values) == "meta":
            return self.meta.trace(values)  # no tensor has told torch's dispatcher the device
        if self._mutated:
            values = inplaces.apart(self._mutated, values)
        kernel = select.choose(self.table, values)
        if kernel.inplace:
            return self.overwriting(kernel, values)
        if isinstance(kernel.function, Source):
            return self._native(kernel, values)
        metas, device = self.meta.expect(values)
        if kernel is self.table.reference and preference.requires("deterministic"):
            with _deterministic(), torch.autocast(device.type if device else "cpu", enabled=False):
                returned = self._python(kernel, values)
        elif device is not None and torch.is_autocast_enabled(device.type):
            with torch.autocast(device.type, enabled=False):  # the declared dtypes hold there too
                returned = self._python(kernel, values)
        else:
            returned = self._python(kernel, values)
        return outputs.conform(self.schema, kernel.backend, values, returned, metas, device)

    def overwriting(
        self, kernel: Kernel, values: tuple[Any, ...], given: frozenset[int] = frozenset()
    ) -> Any:
        """Run a kernel that overwrites arguments: those whose places are `given`, and copies of the others."""
        metas, device = self.meta.expect(values)  # before anything is overwritten
        own = inplaces.copied(kernel.inplace, values, given)
        if isinstance(kernel.function, Source):
            return self._native(kernel, own)
        with torch.autocast(device.type if device else "cpu", enabled=False):
            returned = self._python(kernel, own)
        overwritten = {place for place, _ in kernel.inplace}
        others = [None if place in overwritten else value for place, value in enumerate(values)]
        inplaces.check_placed(self.schema, kernel.backend, kernel.inplace, own, self.schema.flatten(returned))
        return outputs.conform(self.schema, kernel.backend, others, returned, metas, device)

    def into(self, places: Inplace) -> Callable[..., Any]:
        """Return what an overload runs that overwrites the arguments of these places, and returns the other results.

        It holds whichever kernel is chosen: results are copied where that one left them elsewhere.
        """
        given = frozenset(place for place, _ in places)
        within = {result: place for place, result in places if result is not None}

        def run(*args: Any, **kwargs: Any) -> Any:
            values = self.schema.fill(args, kwargs)
            kernel = select.choose(self.table, values)
            returned = self.overwriting(kernel, values, given) if kernel.inplace else self(*values)
            results = self.schema.flatten(returned)
            for result, place in within.items():
                inplaces.leave(self.schema, results[result], values[place], result, place)
            return self.schema.raw([r for index, r in enumerate(results) if index not in within])

        return run

    def _python(self, kernel: Kernel, values: tuple[Any, ...]) -> Any:
        function = cast("Callable[..., Any]", kernel.function)
        if is_profiled():
            function = in_profile(f"{self.schema.name}@{kernel.backend}", function)
        if not self.schema.keyword_only:
            return function(*values)
        args, kwargs = self.schema.split(values)
        return function(*args, **kwargs)

    def forget(self) -> None:
        """Bind native kernels anew, as the outputs' metadata comes from somewhere else now."""
        for kernel in self.table.all():
            kernel.forget()

    def preferring(self, /, *args: Any, opkit_backend: str, **kwargs: Any) -> Any:
        """Run under the preference that a compiled function traced around the call."""
        with preference.Context(preference.Preference.decode(opkit_backend)):
            return self(*args, **kwargs)

    def load(self, kernel: Kernel, values: tuple[Any, ...] | None = None) -> Bound:
        """Build and load a native kernel; `values` are those of the call that needs it, if one does."""
        assert isinstance(kernel.function, Source)
        slot = kernel.slot()  # before it is built, see `Kernel.forget`
        if values is not None:
            frozen.load(self.table, kernel, values)
        with frozen.loading(self.schema, kernel, values):
            bound = kernel.function.bind(
                self.schema, self.native_plan, kernel.device, self.meta.outputs, kernel.backend
            )
        slot.append(bound)
        return bound

    def bound(self, kernel: Kernel, values: tuple[Any, ...]) -> Bound:
        """Return a native kernel as a call needs it, built and loaded where that was not done."""
        slot = kernel.slot()
        if slot:
            return slot[0]  # type: ignore[no-any-return]
        if self.meta.plan is not None:
            self.meta.plan.infer(*values)  # wrong arguments are reported without a build
        return self.load(kernel, values)

    def explain(self, kernel: Kernel, values: tuple[Any, ...]) -> None:
        """Raise what is wrong with the arguments on which a native kernel failed, where opkit can tell."""
        if self.meta.plan is not None:
            self.meta.plan.infer(*values)  # where the arguments do not fit, this error names dimensions
        self._refuse_layouts(kernel, values)

    def _native(self, kernel: Kernel, values: tuple[Any, ...]) -> Any:
        bound = self.bound(kernel, values)
        call, plan = bound.call, self.meta.plan
        if is_profiled():
            call = in_profile(f"{self.schema.name}@{kernel.backend}", call)
        if plan is not None and (self.meta.function is not None or plan.missing is not None):
            plan.infer(*values)  # the glue has no shape line to check them by
        if bound.allocates:
            metas, device = self.meta.expect(values)
            returned = call(*values)
            return outputs.conform(self.schema, kernel.backend, values, returned, metas, device)
        try:
            return call(*values)
        except RuntimeError:
            self.explain(kernel, values)
            raise

    def _refuse_layouts(self, kernel: Kernel, values: tuple[Any, ...]) -> None:
        for param, value in zip(self.schema.params, values, strict=True):
            if isinstance(value, torch.Tensor) and value.layout is not torch.strided:
                raise NoKernelError(
                    f"calling {self.schema.name}: argument {param.name} has the layout {value.layout}; expected "
                    f"torch.strided, which the {kernel.backend} kernel reads. Convert it: {param.name}.to_dense().",
                    op=self.schema.name,
                )


@contextlib.contextmanager
def _deterministic() -> Iterator[None]:
    """Have torch's operations be deterministic or raise."""
    before = (
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
    )
    if not before[0]:
        torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        if not before[0]:
            torch.use_deterministic_algorithms(before[0], warn_only=before[1])

"""Running an op on real tensors: choose a kernel, call it, hold it to its declaration."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from opkit.cpp.light import Bound, Source
from opkit.dispatch import outputs, preference, select
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
        self._count = len(table.schema.params)

    @property
    def native_plan(self) -> Plan | None:
        """The shape line, where native glue allocates the outputs by it."""
        return self.meta.plan if self.meta.function is None else None

    def __call__(self, /, *args: Any, **kwargs: Any) -> Any:
        values = args if len(args) == self._count and not kwargs else self.schema.fill(args, kwargs)
        kernel = select.choose(self.table, values)
        if isinstance(kernel.function, Source):
            return self._native(kernel, values)
        metas, device = self.meta.expect(values)
        if device is not None and torch.is_autocast_enabled(device.type):
            with torch.autocast(device.type, enabled=False):  # the declared dtypes hold there too
                returned = self._python(kernel.function, values)
        else:
            returned = self._python(kernel.function, values)
        return outputs.conform(self.schema, kernel.backend, values, returned, metas, device)

    def _python(self, function: Callable[..., Any], values: tuple[Any, ...]) -> Any:
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
        wanted = preference.Preference.decode(opkit_backend)
        with preference.use_backend(*wanted.names, strict=wanted.strict):
            return self(*args, **kwargs)

    def _native(self, kernel: Kernel, values: tuple[Any, ...]) -> Any:
        slot = kernel.slot()
        if slot:
            bound: Bound = slot[0]
        else:
            assert isinstance(kernel.function, Source)
            plan = self.native_plan
            if self.meta.plan is not None:
                self.meta.plan.infer(*values)  # wrong arguments are reported without a build
            bound = kernel.function.bind(
                self.schema, plan, kernel.device, self.meta.of_registered, kernel.backend
            )
            slot.append(bound)
        plan = self.meta.plan
        if plan is not None and self.meta.function is not None:
            plan.infer(*values)  # the glue has no shape line to check them by
        if bound.allocates:
            metas, device = self.meta.expect(values)
            returned = bound.call(*values)
            return outputs.conform(self.schema, kernel.backend, values, returned, metas, device)
        try:
            return bound.call(*values)
        except RuntimeError:
            if plan is not None:
                plan.infer(*values)  # where the arguments do not fit, this error names dimensions
            self._refuse_layouts(kernel, values)
            raise

    def _refuse_layouts(self, kernel: Kernel, values: tuple[Any, ...]) -> None:
        for param, value in zip(self.schema.params, values, strict=True):
            if isinstance(value, torch.Tensor) and value.layout is not torch.strided:
                raise NoKernelError(
                    f"calling {self.schema.name}: argument {param.name} has the layout {value.layout}; expected "
                    f"torch.strided, which the {kernel.backend} kernel reads. Convert it: {param.name}.to_dense().",
                    op=self.schema.name,
                )

"""Running an op on real tensors: choose a kernel, call it, hold it to its declaration."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from opkit.cpp.light import Source
from opkit.dispatch import outputs, preference, select
from opkit.dispatch.table import Kernel, KernelTable
from opkit.errors import BuildError
from opkit.spec.plan import Plan


class Runner:
    """The kernel that torch's dispatcher sees on every device of one op."""

    def __init__(self, table: KernelTable, plan: Plan | None, meta: Callable[..., Any]) -> None:
        self.table = table
        self.schema = table.schema
        self.plan = plan
        self.meta = meta
        self._count = len(table.schema.params)
        self._built: dict[Kernel, Callable[..., Any]] = {}

    def __call__(self, /, *args: Any, **kwargs: Any) -> Any:
        values = args if len(args) == self._count and not kwargs else self.schema.fill(args, kwargs)
        kernel = select.choose(self.table, values)
        if isinstance(kernel.function, Source):
            return self._native(kernel, values)
        metas = device = None
        if self.plan is not None:
            metas, device = self.plan.infer(*values)
        if self.schema.keyword_only:
            args, kwargs = self.schema.split(values)
            returned = kernel.function(*args, **kwargs)
        else:
            returned = kernel.function(*values)
        return outputs.conform(self.schema, kernel.backend, values, returned, metas, device)

    def without_plan(self) -> None:
        """Let the meta function alone say what outputs are, where one was registered."""
        self.plan = None
        self._built.clear()

    def preferring(self, /, *args: Any, opkit_backend: str, **kwargs: Any) -> Any:
        """Run under the preference that a compiled function traced around the call."""
        wanted = preference.Preference.decode(opkit_backend)
        with preference.use_backend(*wanted.names, strict=wanted.strict):
            return self(*args, **kwargs)

    def _native(self, kernel: Kernel, values: tuple[Any, ...]) -> Any:
        call = self._built.get(kernel)
        if call is None:
            assert isinstance(kernel.function, Source)
            if self.plan is not None:
                self.plan.infer(*values)  # wrong arguments are reported without a build
            call = kernel.function.bind(self.schema, self.plan, kernel.device, self.meta, kernel.backend)
            self._built[kernel] = call
        try:
            return call(*values)
        except RuntimeError as error:
            if self.plan is not None and not isinstance(error, BuildError):
                self.plan.infer(*values)  # where the arguments do not fit, this error names dimensions
            raise

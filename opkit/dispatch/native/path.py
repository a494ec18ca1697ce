"""How the calls of one op go: through the core, once it is there, and what the core asks Python.

The core decides nothing by itself. It asks here which kernel takes a kind of call, and remembers the answer; it comes
here with results that are not plainly what is declared, and with calls that it cannot take.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from types import ModuleType
from typing import TYPE_CHECKING, Any

from opkit import _torch_compile
from opkit._torch_library import Overload
from opkit.cpp.light import Source
from opkit.dispatch import native, outputs, preference, select
from opkit.dispatch.native import description
from opkit.dispatch.native.description import Derivation, PlanValue
from opkit.dispatch.run import Runner
from opkit.spec.plan import OutputMeta

if TYPE_CHECKING:
    from opkit.dispatch.table import Kernel

_PYTHON, _NATIVE, _RUN, _ASKED, _FILLED = range(5)  # `Kernel::How` in core/record.h


class Path:
    """The calls of one op.

    Args:
        runner: runs calls in Python.
        run: what the op's kernel is in torch: the runner, or what brings arguments into a layout first.
        derivation: how the op is differentiated.
        overload: the op in torch.
        contiguous: whether `run` makes tensors contiguous, and does nothing else.
    """

    def __init__(
        self,
        runner: Runner,
        run: Callable[..., Any],
        derivation: Derivation,
        overload: Overload,
        *,
        contiguous: bool,
    ) -> None:
        self._runner = runner
        self._run = run
        self._derivation = derivation
        self._overload = overload
        self._contiguous = contiguous
        self._kernels: Any = None  # the core's, in torch
        self._native: Any = None  # the core's record
        self._plan: PlanValue | None = None
        self._op: Any = None
        self._autocast = False

    def register(self, op: Any) -> bool:
        """Register the core's kernels of an op that was just defined, and is not called yet; return whether it was.

        Never later: torch reads its table of kernels without a lock, and other threads may be calling the op.
        """
        core = native.core()
        if core is None or not description.is_plain(self._runner.schema):
            return False
        mutates = any(p.mutated for p in self._runner.schema.params)
        describe = functools.partial(self._describe, core, op)
        self._kernels = core.register_op(self._overload.qualified, mutates, describe)
        return True

    def attach(self, op: Any) -> bool:
        """Send calls of an op that Python serves through the core; return whether nothing is left to be done."""
        native.need()
        core = native.core()
        if core is None:
            return native.is_off()
        if description.is_plain(self._runner.schema):
            self._describe(core, op)
        return True

    def _describe(self, core: ModuleType, op: Any) -> Any:
        """Return the core's record of an op, which is called for the first time, and have calls enter there."""
        if self._native is None:
            made = self._make(core)
            if self._native is None:  # no other thread was faster
                self._native, self._op = made, op
                made.set_formula(self._derivation.formula())  # one registered meanwhile
                if self._autocast:
                    made.set_autocast()
                core.seal(type(op), _torch_compile.frame_callback())
                made.open(op)
                self._overload.call_by(functools.partial(core.OverloadCall, made))
        return self._native

    def _make(self, core: ModuleType) -> Any:
        runner, schema = self._runner, self._runner.schema
        declared = runner.meta.plan
        self._plan = description.plan(declared) if declared is not None else None
        derivation = self._derivation
        container = schema.container
        if preference.is_used():
            core.expect_preferences()
        return core.Native(
            description.RecordValue(
                name=schema.name,
                torch_name=self._overload.qualified,
                formula=derivation.formula(),
                positional=len(schema.positional),
                params=description.params(schema),
                results=description.results(schema),
                plan=self._plan,
                keywords=tuple(p.name for p in schema.keyword_only) or None,
                container=container,
                is_tuple=isinstance(container, type) and issubclass(container, tuple),
                contiguous=self._contiguous,
                choose=self._choose,
                run=self._run,
                expect=self._expect,
                conform=self._conform,
                explain=self._explain,
                pack=schema.pack,
                derivation=derivation,
            )
        )

    def formula_changed(self) -> None:
        """Have the core differentiate by the formula that is registered now."""
        if self._native is not None:
            self._native.set_formula(self._derivation.formula())

    def autocast_registered(self) -> None:
        """Leave calls under autocast to torch's dispatcher, where the op's rule is."""
        self._autocast = True
        if self._native is not None:
            self._native.set_autocast()

    def detach(self) -> None:
        """Have Python alone serve the op, which goes."""
        core = native.core()
        if core is not None and self._native is not None:
            core.close(self._op)
            self._overload.call_by(None)
        self._kernels = self._native = self._op = None

    # ---------------------------------------------------------------- what the core asks

    def _choose(self, values: tuple[Any, ...]) -> tuple[Kernel, int, Any, Any, bool, bool]:
        """Return the kernel of a call, how it is called and as what, and what to keep for that.

        And whether all calls of the kind run it, and whether the kind has a size.
        """
        table = self._runner.table
        kernel = select.choose(table, values)
        how, function, kept = self._how(kernel, values)
        return kernel, how, function, kept, select.is_decided(table, values), table.is_measured()

    def _how(self, kernel: Kernel, values: tuple[Any, ...]) -> tuple[int, Any, Any]:
        runner, declared = self._runner, self._runner.meta.plan
        arranges = self._run is not runner and not self._contiguous
        if arranges or type(runner) is not Runner or kernel.inplace:
            return _RUN, None, None
        if isinstance(kernel.function, Source):
            bound = runner.bound(kernel, values)
            silent = declared is None and runner.meta.function is None and not runner.schema.results
            if bound.allocates:
                return _RUN, None, None
            if runner.native_plan is not None or silent:
                return _NATIVE, bound.library.name, bound
            filled = runner.meta.function is not None and declared is None
            return (_FILLED, bound.library.name, bound) if filled else (_RUN, None, None)
        if kernel is runner.table.reference and "deterministic" in select.wanted_now().required:
            return _RUN, None, None
        asked = runner.meta.function is not None or (declared is not None and self._plan is None)
        function = runner.schema.unadapted(kernel.function)  # the core gives it what Python code sees
        return _ASKED if asked else _PYTHON, function, None

    def _expect(self, values: tuple[Any, ...]) -> tuple[tuple[Any, ...], ...] | None:
        """Return shape, strides and dtype of the results, or None where something else is said of them."""
        metas, device = self._runner.meta.expect(values)
        if metas is None or not all(_is_plain(meta, device) for meta in metas):
            return None
        return tuple((tuple(meta.shape), meta.stride, meta.dtype) for meta in metas)

    def _conform(self, kernel: Kernel, values: tuple[Any, ...], returned: Any) -> Any:
        metas, device = self._runner.meta.expect(values)
        return outputs.conform(self._runner.schema, kernel.backend, values, returned, metas, device)

    def _explain(self, kernel: Kernel, values: tuple[Any, ...]) -> None:
        """Raise what is wrong with a call that failed, if opkit knows; else torch's own error is."""
        self._runner.explain(kernel, values)


def _is_plain(meta: Any, device: Any) -> bool:
    """Whether it is the metadata of one tensor on the call's device whose sizes are known."""
    return (
        isinstance(meta, OutputMeta)
        and meta.device in (None, device)
        and all(type(s) is int for s in meta.shape)
    )

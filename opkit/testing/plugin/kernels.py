"""The tests of what a plugin brings: each kernel against its op's reference, and each op against its declaration."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import opkit
from opkit.errors import OpkitError
from opkit.plugins.manifest import KernelEntry
from opkit.testing import checker, properties, results
from opkit.testing.plugin import calls
from opkit.testing.plugin.shared import FLOATING, Shared
from opkit.testing.plugin.subject import find

# What takes no compiler: of the rest, opcheck is a test of its own here.
_CHECKS = ("schema", "meta", "results", "gradients", "second derivatives", "forward mode", "properties")


class Kernels(Shared):
    """Ops and kernels of a plugin are called."""

    def pytest_generate_tests(self, metafunc: pytest.Metafunc) -> None:
        """Have a test for each kernel and op that the manifest names."""
        try:
            subject = find(self.name)
        except OpkitError:
            subject = None  # the tests without parameters say so
        kernels = subject.kernels if subject else ()
        ops = subject.manifest.ops if subject else ()
        if "dtype" in metafunc.fixturenames:
            pairs = [(kernel, dtype) for kernel in kernels for dtype in kernel.dtypes or FLOATING]
            ids = [f"{_label(kernel)}-{dtype}" for kernel, dtype in pairs]
            metafunc.parametrize(("kernel", "dtype"), pairs or [_none_of("kernels", 2)], ids=ids or None)
        elif "kernel" in metafunc.fixturenames:
            metafunc.parametrize("kernel", kernels or [_none_of("kernels")], ids=_label)
        elif "op" in metafunc.fixturenames:
            metafunc.parametrize("op", ops or [_none_of("ops")])

    def test_a_kernel_gives_what_the_reference_does(self, kernel: KernelEntry, dtype: str) -> None:
        op = self._op(kernel)
        wrong: list[str] = []
        rejected: dict[str, None] = {}
        taken, slack = 0, self.slack(kernel.op, dtype)
        for label, n in calls.SIZES.items():
            given = self._values(op, n, kernel.device, dtype)
            for layout, values in calls.layouts(op, given) if given is not None else ():
                where = f"{label}, {layout}" if n else label
                with self._shown(f"{kernel} in {dtype} ({where})"):
                    for record in results.kernels(op, values, only=kernel.backend, slack=slack):
                        if record.what == "kernel":
                            rejected[f"{where}: {record.found}"] = None
                        else:
                            taken += 1
                            wrong += [f"{where}: {record}"] if record.status == "failed" else []
                if label != "small" and layout == "contiguous":
                    break  # the layouts are put to the test with the small one
        self._none(wrong, f"calling {kernel} in {dtype}", "what the reference gives in float64")
        if not taken:
            text = "it to take one of the calls. Return some from `case` that it takes"
            self._fail(f"calling {kernel} in {dtype}", list(rejected) or ["it is not in force"], text)

    def test_a_kernel_is_what_it_states(self, kernel: KernelEntry) -> None:
        if not kernel.properties:
            pytest.skip("it states no properties")
        op, values = self._small(kernel)
        found = properties.records(op, values, only=kernel.backend)
        failed = [str(record) for record in found if record.status == "failed"]
        self._none(failed, f"calling {kernel}", f"it to be {', '.join(kernel.properties)}")

    def test_a_kernel_passes_opcheck(self, kernel: KernelEntry) -> None:
        op, values = self._small(kernel)
        args, kwargs = op.schema.split(values)
        with self._shown(f"torch.library.opcheck of {kernel}"), opkit.use_backend(kernel.backend):
            torch.library.opcheck(op.overload, args, kwargs)

    def test_an_op_is_what_it_declares(self, op: str) -> None:
        found = opkit.get(op)
        values = self._values(found, calls.SIZES["small"], "cpu", "float32")
        if values is None:
            pytest.skip(f"`case` has no small call of {op}")
        args, kwargs = found.schema.split(values)
        with self._shown(f"opkit.testing.check of {op}"):
            checker.check(found, *args, checks=_CHECKS, **kwargs)


def _label(kernel: KernelEntry | None) -> str:
    return f"{kernel.op}-{kernel.device}-{kernel.backend}" if kernel else "none"


def _none_of(what: str, count: int = 1) -> Any:
    """Return the parameters of a test that has nothing to test."""
    return pytest.param(*[None] * count, marks=pytest.mark.skip(f"its manifest names no {what}"), id="none")

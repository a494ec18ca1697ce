"""What all tests of the suite share: the plugin that they are about, processes that look at it, and texts."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any, NoReturn

import pytest
import torch

import opkit
from opkit._op import Op
from opkit.errors import ArgumentError, OpkitError
from opkit.plugins.manifest import KernelEntry
from opkit.testing.arguments import mapped, reason
from opkit.testing.devices import is_there
from opkit.testing.plugin import calls, fresh
from opkit.testing.plugin.calls import Call, Case
from opkit.testing.plugin.subject import Subject, find

FLOATING = ("float32", "float64", "bfloat16", "float16")
# In which modules are imported; where the plugin's own is not among them, opkit imports it when it is needed.
ORDERS = (
    "torch,opkit",
    "opkit,torch",
    "opkit,PACKAGE,torch",
    "PACKAGE,torch,opkit",
)


class Shared:
    """A suite without tests; `opkit.testing.plugin.Suite` says what its attributes mean."""

    name = ""
    limit = 600.0

    def case(self, op: str, n: int) -> Case | None:
        raise NotImplementedError

    def slack(self, op: str, dtype: str) -> float:
        return 0.0

    def _subject(self) -> Subject:
        try:
            return find(self.name)
        except OpkitError as error:
            pytest.fail(str(error), pytrace=False)

    def _chosen(self, subject: Subject) -> dict[str, str]:
        """Return the environment in which the plugin is used, and no other one."""
        chosen = {"OPKIT_PLUGINS": subject.name}
        return {**chosen, "OPKIT_DEVICE": subject.device} if subject.device else chosen

    def _probe(self, probe: str, *words: str, **environment: str) -> Any:
        seen = fresh.run(probe, *words, limit=self.limit, **environment)
        if seen.ended:
            self._fail(
                f"looking at it in a process of its own ({probe})", [f"the process {seen.ended}"], "an answer"
            )
        return seen.found

    def _loaded(self, order: str) -> Any:
        subject = self._subject()
        modules = order.replace("PACKAGE", subject.package)
        return self._probe(
            "order",
            modules,
            subject.name,
            subject.package,
            subject.device,
            *subject.foreign,
            **self._chosen(subject),
        )

    def _absent(self, *stand_ins: str, **environment: str) -> Any:
        subject = self._subject()
        backends = ",".join({kernel.backend for kernel in subject.kernels})
        own, foreign = ",".join(subject.manifest.ops), ",".join(subject.foreign)
        return self._probe(
            "absent", subject.name, subject.package, backends, own, foreign, *stand_ins, **environment
        )

    def _op(self, kernel: KernelEntry) -> Op[..., Any]:
        self._subject()
        if not is_there(kernel.device):
            pytest.skip(f"there is no device {kernel.device} here")
        op = opkit.find(kernel.op)
        if op is None:
            pytest.skip(f"nothing here defines {kernel.op}: import it in the test module")
        return op

    def _values(self, op: Op[..., Any], n: int, device: str, dtype: str) -> tuple[Any, ...] | None:
        """Return the arguments of a call, or None where `case` has none of this size."""
        try:
            case = self.case(op.name, n)
            return None if case is None else calls.values(op, case, getattr(torch, dtype), device)
        except ArgumentError as error:
            pytest.skip(str(error))

    def _small(self, kernel: KernelEntry) -> tuple[Op[..., Any], tuple[Any, ...]]:
        """Return the op of a kernel, and the arguments of a small call."""
        op = self._op(kernel)
        values = self._values(op, calls.SIZES["small"], kernel.device, (kernel.dtypes or FLOATING)[0])
        return op, values if values is not None else pytest.skip(f"`case` has no small call of {op.name}")

    def _calls(self, subject: Subject, *, foreign: bool = False) -> Sequence[Call]:
        """Return a small call of each kernel that runs here, perhaps only of ops of others."""
        made = []
        for kernel in subject.kernels:
            op = opkit.find(kernel.op) if kernel.device == "cpu" else None
            if op is None or (foreign and kernel.op in subject.manifest.ops):
                continue
            dtype = (kernel.dtypes or FLOATING)[0]
            with contextlib.suppress(ArgumentError):
                if (case := self.case(op.name, calls.SIZES["small"])) is not None:
                    values = calls.values(op, case, getattr(torch, dtype), kernel.device)
                    given = mapped(op, values, lambda _, t: t.contiguous())
                    made.append(Call(kernel.op, kernel.backend, given, self.slack(op.name, dtype)))
        return made

    @contextlib.contextmanager
    def _shown(self, doing: str) -> Iterator[None]:
        """Report what is raised as what was found."""
        try:
            yield
        except Exception as error:
            self._fail(doing, [str(error) if isinstance(error, OpkitError) else reason(error)], "no error")

    def _none(self, found: Any, doing: str, expected: str) -> None:
        what = list(found)
        if what:
            self._fail(doing, what, expected)

    def _fail(self, doing: str, found: Sequence[str], expected: str) -> NoReturn:
        lines = "".join(f"\n  {one}" for one in found)
        pytest.fail(f"the plugin {self.name}, {doing}: expected {expected}; found:{lines}", pytrace=False)

"""The four tests of `torch.library.opcheck`, each as a record of its own."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from opkit._op import Op
from opkit.dispatch.preference import use_backend
from opkit.testing.arguments import FLOATING, copied, differentiable, mapped, reason
from opkit.testing.report import Record
from opkit.testing.tracing import why_not

TESTS = {
    "opcheck schema": "test_schema",
    "opcheck autograd": "test_autograd_registration",
    "opcheck fake tensor": "test_faketensor",
    "opcheck aot": "test_aot_dispatch_dynamic",
}
_TRACING = ("opcheck fake tensor", "opcheck aot")


def records(op: Op[..., Any], backend: str, values: Sequence[Any], wanted: Sequence[str]) -> Iterator[Record]:
    """Yield what those tests that are wanted find of a call, with arguments that require grad where they can."""
    leaves = differentiable(op)
    for name, test in TESTS.items():
        if name not in wanted:
            continue
        if not leaves and name == "opcheck autograd":
            yield Record(
                op.name, backend, test, "not applicable", "the op has no gradient formula", check=name
            )
            continue
        missing = why_not(op) if name in _TRACING else None
        if missing is not None:
            yield Record(op.name, backend, test, "not applicable", missing, check=name)
            continue

        def leaf(argument: str, tensor: Tensor) -> Tensor:
            copy = copied(tensor)
            wants = argument.split("[")[0] in leaves and (tensor.dtype in FLOATING or tensor.is_complex())
            return copy.requires_grad_() if wants else copy

        args, kwargs = op.schema.split(mapped(op, values, leaf))
        found: Any
        try:
            with use_backend(backend), contextlib.redirect_stdout(io.StringIO()):
                found = torch.library.opcheck(
                    op.overload, args, kwargs, test_utils=test, raise_exception=False
                )[test]
        except Exception as err:
            found = err
        if found == "SUCCESS":
            yield Record(op.name, backend, test, "passed", check=name)
        else:
            text = reason(found) if isinstance(found, Exception) else str(found)
            yield Record(op.name, backend, test, "failed", text, "no such error", check=name)

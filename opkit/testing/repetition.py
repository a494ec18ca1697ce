"""The same call again: one after another, and from several threads at once."""

from __future__ import annotations

import sys
import threading
from collections.abc import Iterator, Sequence
from typing import Any

import torch

from opkit._op import Op
from opkit.dispatch.preference import use_backend
from opkit.testing.arguments import is_random, named, outcome, reason
from opkit.testing.difference import difference, tolerance
from opkit.testing.properties import same
from opkit.testing.report import Record

REPEATS = 5
THREADS = 4
CALLS = 8  # of each thread
_MEANWHILE = f"while {THREADS - 1} other threads made calls"
_ALLOWED = torch.Tag.nondeterministic_bitwise


def determinism(op: Op[..., Any], backend: str, values: Sequence[Any]) -> Iterator[Record]:
    """Yield whether the same arguments give the same bits each time."""
    allowed = "the op is tagged nondeterministic_bitwise" if _ALLOWED in op.overload.tags else None
    why = "the op draws random numbers" if is_random(op) else allowed
    if why is not None:
        yield Record(op.name, backend, "same bits", "not applicable", why)
        return
    with use_backend(backend, strict=True), torch.no_grad():
        first = outcome(op, values)
        for repeat in range(1, REPEATS):
            for name, value in outcome(op, values).items():
                if not same(value, first[name]):
                    text = f"other bits in {name} in call {repeat + 1} than in the first"
                    expected = "the same, or tags=(torch.Tag.nondeterministic_bitwise,) in the declaration"
                    yield Record(op.name, backend, "same bits", "failed", text, expected)
                    return
    yield Record(op.name, backend, "same bits", "passed")


def thread_safety(op: Op[..., Any], backend: str, calls: Sequence[Sequence[Any]]) -> Iterator[Record]:
    """Yield whether threads disturb each other. Each makes a call of its own, over and over."""
    if is_random(op):
        yield Record(op.name, backend, "threads", "not applicable", "the op draws random numbers")
        return
    given = [calls[i % len(calls)] for i in range(THREADS)]
    with use_backend(backend, strict=True), torch.no_grad():
        alone = [outcome(op, values) for values in given]
    start = threading.Barrier(THREADS)
    wrong: list[tuple[str, str]] = []

    def work(index: int) -> None:
        values, right = given[index], alone[index]
        part = tolerance(named([p.name for p in op.schema.params], values).values())
        try:
            start.wait(60)
            with use_backend(backend, strict=True), torch.no_grad():
                for _ in range(CALLS):
                    for name, value in outcome(op, values).items():
                        differs = difference(value, right[name], part)
                        if differs is not None:
                            text = f"{differs.found}, in {name} {_MEANWHILE}"
                            wrong.append((text, f"{differs.expected}, as alone"))
                            return
        except Exception as err:
            wrong.append((f"{reason(err)}, {_MEANWHILE}", "a result, as alone"))

    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)  # so that threads meet in the middle of Python code too
    try:
        threads = [threading.Thread(target=work, args=(i,), daemon=True) for i in range(THREADS)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        sys.setswitchinterval(before)
    yield Record(op.name, backend, "threads", "failed" if wrong else "passed", *(wrong[0] if wrong else ()))

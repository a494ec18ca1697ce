"""What a kernel states of itself in `properties=`, put to the test; `opkit.require` believes it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from opkit._op import Op
from opkit.dispatch.preference import use_backend
from opkit.dispatch.select import device_of
from opkit.testing.arguments import mapped, outcome, reason
from opkit.testing.report import Record

REPEATS = 10  # calls for each number of threads
ROWS = 32  # of a batch that are compared


def records(op: Op[..., Any], values: Sequence[Any], *, only: str | None = None) -> Iterator[Record]:
    """Yield what is found of every kernel that states something and can take the call; perhaps `only` of a backend."""
    args, kwargs = op.schema.split(op.schema.restore(values))
    able = {c.backend for c in op.explain(*args, **kwargs).candidates if c.status != "rejected"}
    able = able if only is None else able & {only}
    tests = {"deterministic": _deterministic, "batch_invariant": _batch_invariant, "graph_safe": _graph_safe}
    for kernel in op._table.for_device(device_of(op.schema, values)):
        for name in kernel.properties if kernel.backend in able else ():
            try:
                with use_backend(kernel.backend, strict=True), torch.no_grad():
                    status, found, expected = tests[name](op, values)
            except Exception as err:
                status, found, expected = "failed", reason(err), "a result"
            yield Record(op.name, kernel.backend, name, status, found, expected)


def _deterministic(op: Op[..., Any], values: Sequence[Any]) -> tuple[str, str, str]:
    """Repeat the call, also with other numbers of threads."""
    first = outcome(op, values)
    before = torch.get_num_threads()
    try:
        for threads in dict.fromkeys((before, 1, 2, before + 1)):
            torch.set_num_threads(threads)
            for _ in range(REPEATS):
                for name, value in outcome(op, values).items():
                    if not same(value, first[name]):
                        found = f"other bits in {name} with {threads} threads than in the first call with {before}"
                        return "failed", found, "the same bits from the same arguments"
    finally:
        torch.set_num_threads(before)
    return "passed", "", ""


def _batch_invariant(op: Op[..., Any], values: Sequence[Any]) -> tuple[str, str, str]:
    """Compare rows of a batch with the rows alone."""
    plan = op._meta.plan
    entries = {} if plan is None else {t.name: t.entry for t in plan.inputs if t.name}
    results = {} if plan is None else {t.name: t.entry for t in plan.outputs}
    results.update({f"argument {name}": entry for name, entry in entries.items()})
    each = frozenset() if plan is None else plan.each
    star = next(
        (e.dims[0].text for e in entries.values() if e.star == 0 and e.dims[0].text not in (*each, "...")),
        None,
    )
    if star is None:
        return "not applicable", "no argument has a leading *b in the shape line", ""

    def batch(entry: Any, tensor: Tensor) -> tuple[int, ...]:
        """Return the sizes of its *b; none where it has no such dimensions."""
        leads = entry is not None and entry.star == 0 and entry.dims[0].text == star
        return tuple(tensor.shape[: tensor.dim() - len(entry.dims) + 1]) if leads else ()

    sizes: list[tuple[int, ...]] = []
    mapped(op, values, lambda name, t: sizes.append(batch(entries.get(name.split("[")[0]), t)))
    shape = max(sizes, key=len, default=())
    rows = torch.Size(shape).numel()
    if rows < 2:
        return "not applicable", f"the batch is {tuple(shape)}; pass one of several rows", ""

    def row(entry: Any, tensor: Tensor, index: Sequence[int]) -> Tensor:
        count = len(batch(entry, tensor))
        return tensor[tuple(slice(i, i + 1) for i in index[:count])]

    whole = outcome(op, values)
    compared = False
    for flat in dict.fromkeys(torch.linspace(0, rows - 1, min(rows, ROWS)).long().tolist()):
        index = [int(i) for i in torch.unravel_index(torch.tensor(flat), shape)]
        alone = mapped(op, values, lambda name, t: row(entries.get(name.split("[")[0]), t, index).clone())  # noqa: B023
        for name, value in outcome(op, alone).items():
            entry = results.get(name.split("[")[0])
            if not isinstance(value, Tensor) or not batch(entry, value):
                continue
            compared = True
            if not same(row(entry, whole[name], index), value):
                return (
                    "failed",
                    f"other bits in {name} at {index} of the batch than for that row alone",
                    "the same bits",
                )
    return ("passed", "", "") if compared else ("not applicable", f"no result has a leading *{star}", "")


def _graph_safe(op: Op[..., Any], values: Sequence[Any]) -> tuple[str, str, str]:
    """Say that nothing is tested: a CUDA graph is what it is about, and this check captures none."""
    return (
        "not applicable",
        "it is about the capture in a CUDA graph, which takes a GPU; capture a call there",
        "",
    )


def same(left: Any, right: Any) -> bool:
    """Whether two results are the same to the bit."""
    if not (isinstance(left, Tensor) and isinstance(right, Tensor)):
        return left is right or bool(left == right) or (left != left and right != right)
    if left.shape != right.shape or left.dtype != right.dtype:
        return False
    return torch.equal(*(t.detach().contiguous().reshape(-1).view(torch.uint8) for t in (left, right)))

"""Every op of torch's OpInfo on the device against the CPU: the first float32 sample, forward and backward.

    python sweep.py                 all ops, in processes of their own; prints the figures and what differs, and why
    python sweep.py --part 0/20     one op in twenty
    python sweep.py --only fft      ops with that in their name

Each op runs in a forked child, so that one which crashes or hangs is one result among others. What is known to differ
is in KNOWN, each with its reason; the script ends with 1 where anything else does, or anything crashes.
"""

from __future__ import annotations

import argparse
import collections
import os
import signal
import sys
import time
import warnings
from collections.abc import Iterator

import torch
from torch.utils import _pytree

LIMIT = 20  # seconds for an op, forward and backward
UNWRITTEN = ("empty", "empty_like", "empty_permuted", "empty_strided", "new_empty", "new_empty_strided")
_NO_SPARSE = "there are no sparse tensors on the device"
KNOWN = {
    "sparse.mm.reduce": _NO_SPARSE,
    "sparse.sampled_addmm": _NO_SPARSE,
    "tensor_split": "its indices must be on the CPU, for every device; the sweep moves all tensors of a sample",
    "to_sparse": _NO_SPARSE,
}


def tensors(tree: object) -> list[torch.Tensor]:
    return [leaf for leaf in _pytree.tree_leaves(tree) if isinstance(leaf, torch.Tensor)]


def on_device(tree: object) -> object:
    """Move the tensors of a sample; leaves that want gradients stay leaves."""

    def move(value: object) -> object:
        if isinstance(value, torch.device):
            return torch.device("refdev")
        if not isinstance(value, torch.Tensor):
            return value
        return value.detach().to("refdev").requires_grad_(value.requires_grad)

    return _pytree.tree_map(move, tree)


def difference(cpu: list[torch.Tensor], device: list[torch.Tensor], *, values: bool = True) -> str:
    """Return in words how two results differ, or nothing."""
    if len(cpu) != len(device):
        return f"{len(device)} results instead of {len(cpu)}"
    for a, b in zip(cpu, device, strict=True):
        a, b = a.detach(), b.detach().cpu()
        if a.shape != b.shape or a.dtype != b.dtype:
            return f"{b.dtype} {tuple(b.shape)} instead of {a.dtype} {tuple(a.shape)}"
        if a.layout != torch.strided:
            a, b = a.to_dense(), b.to_dense()
        wide = torch.complex128 if a.is_complex() else torch.float64
        if values and not torch.allclose(a.to(wide), b.to(wide), rtol=1e-4, atol=1e-5, equal_nan=True):
            return "other values"
    return ""


def run(op: object, sample: object, moved: bool) -> tuple[object, list[torch.Tensor]]:
    """Return what the op gives, and the tensors of the sample that want gradients."""
    torch.manual_seed(0)
    given = (sample.input, sample.args, dict(sample.kwargs))
    if moved:
        given = on_device(given)
        if given[2].get("device") is not None:
            given[2]["device"] = "refdev"
    return op.op(given[0], *given[1], **given[2]), [t for t in tensors(given) if t.requires_grad]


def gradients(result: object, wanted: list[torch.Tensor]) -> list[torch.Tensor]:
    """Return the gradients of the sum of what depends on something."""
    outputs = [t for t in tensors(result) if t.requires_grad]
    seeds = [torch.ones_like(t) for t in outputs]
    found = torch.autograd.grad(outputs, wanted, seeds, allow_unused=True)
    return [g for g in found if g is not None]


def examine(op: object) -> str:
    """Return `ok` or what is wrong, after `forward` or `backward`; `skip` where the CPU itself cannot."""
    if torch.float32 not in op.dtypes:
        return "skip"
    differentiable = op.supports_autograd and torch.float32 in op.backward_dtypes
    try:
        sample = next(iter(op.sample_inputs("cpu", torch.float32, requires_grad=differentiable)))
        expected, leaves = run(op, sample, moved=False)
    except Exception:
        return "skip"
    try:
        found, moved = run(op, sample, moved=True)
        if said := difference(tensors(expected), tensors(found), values=op.name not in UNWRITTEN):
            return f"forward: {said}"
    except Exception as error:
        return f"forward: {_describe(error)}"
    if not any(t.requires_grad for t in tensors(expected)) or not leaves:
        return "ok (forward only)"
    try:
        wanted = gradients(expected, leaves)
    except Exception:
        return "ok (forward only)"
    try:
        said = difference(wanted, gradients(found, moved))
        return f"backward: {said}" if said else "ok"
    except Exception as error:
        return f"backward: {_describe(error)}"


def _describe(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:150]}"


def in_child(op: object) -> str:
    """Return what `examine` says, or what ended its process."""
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        signal.alarm(LIMIT)
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
        # torch makes its thread pool anew in a child, and aborts where autograd's threads for two devices both do.
        torch.set_num_threads(1)
        os.write(write, examine(op).encode()[:1000])
        os._exit(0)
    os.close(write)
    with os.fdopen(read, "rb") as answer:
        said = answer.read().decode()
    _, status = os.waitpid(child, 0)
    if os.WIFSIGNALED(status):
        number = os.WTERMSIG(status)
        return "hang" if number == signal.SIGALRM else f"crash: {signal.Signals(number).name}"
    return said or "crash: no answer"


def sweep(part: int = 0, parts: int = 1, only: str = "") -> Iterator[tuple[str, str]]:
    """Yield each op's name with what became of it."""
    from torch.testing._internal.common_methods_invocations import op_db

    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    torch.ones(1, device="refdev")  # the library is loaded before the first fork
    for index, op in enumerate(op_db):
        if index % parts == part and only in op.name:
            name = f"{op.name}.{op.variant_test_name}" if op.variant_test_name else op.name
            yield name, in_child(op)


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--part", default="0/1", metavar="I/N")
    parser.add_argument("--only", default="")
    parser.add_argument("--verbose", action="store_true")
    options = parser.parse_args()
    part, parts = map(int, options.part.split("/"))
    start, counts, wrong = time.time(), collections.Counter(), []
    for name, said in sweep(part, parts, options.only):
        counts["ok" if said.startswith("ok") else said.partition(":")[0]] += 1
        counts["with backward"] += said == "ok"
        if options.verbose or not said.startswith(("ok", "skip")):
            print(f"{name}: {said}" + (f" [{KNOWN[name]}]" if name in KNOWN else ""), flush=True)
        if said.startswith(("crash", "hang")) or not (said.startswith(("ok", "skip")) or name in KNOWN):
            wrong.append(name)
    ran = sum(counts.values()) - counts["skip"] - counts["with backward"]
    print(
        f"{dict(counts)}; {counts['ok']} of {ran} equal, {100 * counts['ok'] / max(ran, 1):.1f} %, "
        f"in {time.time() - start:.0f} s"
    )
    if wrong:
        print(f"not known to differ: {', '.join(wrong)}")
    return bool(wrong)


if __name__ == "__main__":
    sys.exit(main())

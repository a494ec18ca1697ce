"""What a call does to its arguments: it changes those that the schema names, and nothing else."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from opkit._op import Op
from opkit.dispatch.preference import use_backend
from opkit.testing.arguments import copied, mapped, named, outputs, reason
from opkit.testing.report import Record


def records(op: Op[..., Any], backend: str, values: Sequence[Any]) -> Iterator[Record]:
    """Yield what a backend does to the memory of the arguments, also beside them where they are views."""
    given = mapped(op, values, lambda _, t: copied(t))
    tensors = {
        n: t for n, t in named([p.name for p in op.schema.params], given).items() if isinstance(t, Tensor)
    }
    written = {p.name for p in op.schema.params if p.mutated}
    before = {name: (_bytes(t).clone(), t._version) for name, t in tensors.items()}
    try:
        with use_backend(backend, strict=True), torch.no_grad():
            found = outputs(op, op.overload, given)
    except Exception as err:
        yield Record(op.name, backend, "call", "failed", reason(err), "a result")
        return
    wrong = False
    for name, tensor in tensors.items():
        memory, version = before[name]
        may = name.split("[")[0] in written
        if may:  # what lies beside it stays
            _view(memory, tensor).copy_(tensor)
        if not torch.equal(memory, _bytes(tensor)):
            wrong = True
            what = f"memory beside {name} was written to" if may else f"{name} was written to"
            name = name.split("[")[0]
            expected = (
                "only the elements of the argument to change"
                if may
                else f"it to stay as it is, or mutates_args=({name!r},) in the declaration"
            )
            yield Record(op.name, backend, f"argument {name}", "failed", what, expected)
        elif may and tensor._version == version:
            wrong = True
            found_text = f"the version counter of {name} is what it was, so autograd cannot see the change"
            yield Record(op.name, backend, f"argument {name}", "failed", found_text, "a higher one")
    for output, value in found.items():
        alike = [n for n, t in tensors.items() if isinstance(value, Tensor) and _shares(value, t)]
        if alike and not output.startswith("argument "):
            wrong = True
            text = f"it shares memory with the argument {alike[0]}"
            yield Record(op.name, backend, f"result {output}", "failed", text, "memory of its own")
    if not wrong:
        yield Record(op.name, backend, "arguments", "passed")


def _bytes(tensor: Tensor) -> Tensor:
    """Return all memory that a tensor is a view of."""
    return torch.empty(0, dtype=torch.uint8, device=tensor.device).set_(tensor.untyped_storage())


def _view(memory: Tensor, like: Tensor) -> Tensor:
    """Return bytes as a tensor that lies in them as `like` lies in its memory."""
    return torch.empty(0, dtype=like.dtype, device=memory.device).set_(
        memory.untyped_storage(), like.storage_offset(), like.shape, like.stride()
    )


def _shares(left: Tensor, right: Tensor) -> bool:
    storages = left.untyped_storage(), right.untyped_storage()
    return storages[0].nbytes() > 0 and storages[0].data_ptr() == storages[1].data_ptr()

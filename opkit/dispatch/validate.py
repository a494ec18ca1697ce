"""OPKIT_VALIDATE: every call held to its declaration, also where that costs a copy of the arguments.

Without it a kernel may do unseen what torch does not forgive: a native kernel may return what its meta function does
not say, and any kernel may write into an argument. Responsible for finding that; what always holds is in `outputs`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from opkit import _config, _torch
from opkit.dispatch import outputs
from opkit.dispatch.meta import Meta
from opkit.dispatch.run import Runner
from opkit.dispatch.table import Kernel, KernelTable
from opkit.errors import OutputError
from opkit.spec.plan import OutputMeta


def runner(table: KernelTable, meta: Meta) -> Runner:
    """Return what runs an op: under OPKIT_VALIDATE, one that compares; decided when the op is defined."""
    return (ValidatingRunner if _config.get("OPKIT_VALIDATE") else Runner)(table, meta)


class ValidatingRunner(Runner):
    """Runs kernels, and compares arguments and outputs with the declaration."""

    def _python(self, kernel: Kernel, values: tuple[Any, ...]) -> Any:
        kept = self._keep(kernel, values)
        returned = super()._python(kernel, values)
        self._compare(kernel, values, kept)
        return returned

    def _native(self, kernel: Kernel, values: tuple[Any, ...]) -> Any:
        kept = self._keep(kernel, values)
        returned = super()._native(kernel, values)
        self._compare(kernel, values, kept)
        metas, device = self.meta.expect(values)
        overwritten = {place for place, _ in kernel.inplace}
        others = [None if place in overwritten else value for place, value in enumerate(values)]
        outputs.conform(self.schema, kernel.backend, others, returned, metas, device)
        for name, output, meta in self._described(returned, metas):
            wanted = meta.stride or _contiguous(output.shape)
            pairs = zip(output.shape, output.stride(), wanted, strict=True)
            if any(found != stride for size, found, stride in pairs if size > 1):
                raise OutputError(
                    f"calling {self.schema.name}: the {kernel.backend} kernel returned {name} with the strides "
                    f"{tuple(output.stride())}; expected {tuple(wanted)} by the "
                    f"{'shape line' if meta.stride is None else 'meta function'}. Change one of them, so that the "
                    f"kernel returns what is declared: {self.schema}.",
                    op=self.schema.name,
                )
        return returned

    def _described(
        self, returned: Any, metas: Sequence[Any] | None
    ) -> Iterator[tuple[str, Tensor, OutputMeta]]:
        """Return the tensors that something is known of, with what is known."""
        values = self.schema.flatten(returned)
        for result, value, meta in zip(self.schema.results, values, metas or (), strict=bool(metas)):
            if isinstance(meta, OutputMeta) and isinstance(value, Tensor):
                yield result.name, value, meta
            elif isinstance(meta, list):
                yield from (
                    (f"{result.name}[{i}]", v, m) for i, (v, m) in enumerate(zip(value, meta, strict=True))
                )

    # ---------------------------------------------------------------- arguments

    def _keep(self, kernel: Kernel, values: Sequence[Any]) -> list[tuple[str, Tensor, Tensor]]:
        """Return the tensors that the kernel must leave as they are, with their names and copies."""
        mutable = [p.mutated for p in self.schema.params]
        for place, _ in kernel.inplace:  # its own copies, or buffers that were given away
            mutable[place] = True
        given = [
            (f"{p.name}[{i}]" if p.type.is_list else p.name, one, changes)
            for p, value, changes in zip(self.schema.params, values, mutable, strict=True)
            for i, one in enumerate(value if isinstance(value, (list, tuple)) else (value,))
            if isinstance(one, Tensor) and one.layout is torch.strided
        ]
        if any(v.is_cuda for _, v, _ in given) and torch.cuda.is_current_stream_capturing():
            return []  # a graph that is captured can compare nothing
        written = [v for _, v, changes in given if changes]
        return [
            (name, value, _bits(value).clone())
            for name, value, changes in given
            if not changes and not any(_torch.is_alias_of(value, w) for w in written)
        ]

    def _compare(self, kernel: Kernel, values: Sequence[Any], kept: list[tuple[str, Tensor, Tensor]]) -> None:
        """Raise where a kernel has changed one of the tensors kept.

        Raises:
            OutputError: it has; the first element that differs is named.
        """
        for name, value, before in kept:
            now = _bits(value)
            if torch.equal(before, now):
                continue
            first = int((before != now).nonzero()[0]) // value.element_size()
            place = [int(i) for i in torch.unravel_index(torch.tensor(first), value.shape)]
            raise OutputError(
                f"calling {self.schema.name}: the {kernel.backend} kernel wrote into argument {name}, first at "
                f"{place}; expected it to leave alone what the op does not declare to mutate. Write into a copy, or "
                f"declare it: mutates_args=({name.split('[')[0]!r},).",
                op=self.schema.name,
            )


def _bits(value: Tensor) -> Tensor:
    """Return the bytes of a tensor's elements in their order, so that NaN is like NaN."""
    whole = value.detach().resolve_conj().resolve_neg().contiguous()
    return whole.view(-1).view(torch.uint8)


def _contiguous(shape: Sequence[int]) -> tuple[int, ...]:
    strides, step = [], 1
    for size in reversed(shape):
        strides.append(step)
        step *= max(size, 1)
    return tuple(reversed(strides))

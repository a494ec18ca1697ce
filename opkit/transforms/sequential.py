"""The rule `sequential`: an op called once per sample, and what the calls return put together."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from opkit.errors import VmapError
from opkit.spec.schema import Schema, tensors
from opkit.transforms.batch import Dims, sample


class Sequential:
    """The loop over the samples of one op; `trace` gives empty results, for a batch of no samples."""

    def __init__(self, schema: Schema, trace: Callable[[Sequence[Any]], Any]) -> None:
        self.schema = schema
        self._trace = trace

    def run(
        self, call: Callable[..., Any], size: int, dims: Dims, values: Sequence[Any], *, same_draws: bool
    ) -> tuple[Sequence[Any], Dims]:
        """Return the outputs of `size` calls as those of one, and which of their dimensions is the batch.

        Args:
            call: calls the op with arguments in schema order, and returns its results.
            size: how many samples there are.
            dims: for each argument, where it has the batch.
            values: the arguments.
            same_draws: whether each sample draws the same random numbers.

        Raises:
            VmapError: the samples share an argument that the op mutates, or return what cannot be put together.
        """
        for _value, dim, param in zip(values, dims, self.schema.params, strict=True):
            if param.mutated and not (
                all(d is not None for d in dim) if isinstance(dim, list) else dim is not None
            ):
                refuse_shared(self.schema, param)
        if size == 0:
            return self._of_none(dims, values)
        states = _Draws(values) if same_draws else None
        samples = []
        for index in range(size):
            if states is not None:
                states.restart()
            samples.append(call([sample(v, d, index) for v, d in zip(values, dims, strict=True)]))
        names = [r.name for r in self.schema.results]
        stacked = [
            self._stack(name, each) for name, each in zip(names, zip(*samples, strict=True), strict=False)
        ]
        return stacked, [0] * len(stacked)

    def _stack(self, name: str, each: Sequence[Any]) -> Any:
        first = each[0]
        if isinstance(first, (list, tuple)):
            if len({len(one) for one in each}) > 1:
                raise self._uneven(name, [f"{len(one)} tensors" for one in each])
            return [self._stack(name, one) for one in zip(*each, strict=True)]
        if isinstance(first, Tensor):
            if any(not isinstance(one, Tensor) or one.shape != first.shape for one in each):
                raise self._uneven(name, [tuple(o.shape) if isinstance(o, Tensor) else o for o in each])
            return torch.stack(list(each))
        if any(one != first for one in each):
            raise self._uneven(name, each)
        return first

    def _uneven(self, name: str, found: Sequence[Any]) -> VmapError:
        different = list(dict.fromkeys(map(str, found)))[:3]
        return VmapError(
            f"mapping {self.schema.name} with torch.vmap: its samples returned as {name} {' and '.join(different)}; "
            "expected the same for every sample, since they become one. Call it in a loop, or have the op return "
            "tensors of one size.",
            op=self.schema.name,
        )

    def _of_none(self, dims: Dims, values: Sequence[Any]) -> tuple[Sequence[Any], Dims]:
        """Return the outputs for no samples: a shape without data, from the meta function."""
        one = [sample(v, d, None) for v, d in zip(values, dims, strict=True)]
        device = next(t.device for t in tensors(values))
        outputs = self.schema.flatten(self._trace(one))

        def none(output: Any) -> Any:
            if isinstance(output, (list, tuple)):
                return [none(o) for o in output]
            if not isinstance(output, Tensor):
                return output
            return torch.empty((0, *output.shape), dtype=output.dtype, device=device)

        return [none(o) for o in outputs], [0] * len(outputs)


def refuse_shared(schema: Schema, param: Any) -> None:
    """Raise where the op mutates an argument of which there is one for all samples."""
    if param.mutated:
        raise VmapError(
            f"mapping {schema.name} with torch.vmap: the op mutates {param.name}, of which there is one for "
            "all samples; expected one per sample, as each writes its own result. Map over it too (in_dims), "
            f"with as many copies as samples: {param.name}.expand(...).clone().",
            op=schema.name,
        )


class _Draws:
    """The random generators that a call may draw from, which start anew for each sample."""

    def __init__(self, values: Sequence[Any]) -> None:
        self._devices = {t.device for t in tensors(values)} | {torch.device("cpu")}
        self._generators = [v for v in values if isinstance(v, torch.Generator)]
        for device in self._devices:
            if device.type not in ("cpu", "meta"):
                module = getattr(torch, device.type)
                self._generators.append(module.default_generators[device.index or 0])
        self._generators.append(torch.default_generator)
        self._states = [g.get_state() for g in self._generators]

    def restart(self) -> None:
        for generator, state in zip(self._generators, self._states, strict=True):
            generator.set_state(state)

"""The relatives of a functional op that overwrite arguments, for callers and compilers that give these away.

Each leaves results in arguments, and returns the others. They hold whichever kernel runs: `dispatch.run` copies
where one leaves its results elsewhere. How they become the op again is `restore`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from opkit import _torch, _torch_compile, _torch_library
from opkit.dispatch import inplace as inplaces
from opkit.dispatch import select
from opkit.dispatch.inplace import Inplace
from opkit.dispatch.meta import Meta
from opkit.dispatch.run import Runner
from opkit.spec.schema import Schema
from opkit.transforms import gradient, mutation
from opkit.transforms.fingerprint import OF_OPKIT
from opkit.transforms.formula import NoFormula


class Overwriting:
    """What of an op overwrites arguments; `library` is where its overloads are defined."""

    def __init__(self, schema: Schema, runner: Runner, meta: Meta, library: Any, tags: Sequence[Any]) -> None:
        self.schema = schema
        self._runner = runner
        self._meta = meta
        self._library = library
        self._tags = tags
        self._overloads: dict[str, tuple[Inplace, Any]] = {}

    def places(self, values: Sequence[Any]) -> Inplace:
        """Return what the kernel that a call will run overwrites, if it may."""
        table = self._runner.table
        device, dtype = select.device_of(self.schema, values), select.first_dtype(values)
        places = select.foreseen(table, device, dtype).inplace
        if not _can_hold(places, values):
            return ()
        if any(result is not None for _, result in places):
            promised, _ = self._meta.promised(values)
            for place, result in places:
                if result is not None and promised is not None:
                    meta, value = promised[result], values[place]
                    if tuple(meta.shape) != tuple(value.shape) or meta.dtype != value.dtype:
                        return ()
        return places

    def find(self, values: Sequence[Any]) -> str:
        """Return the name of the overload for a call whose arguments the caller gives away, or nothing."""
        places = () if _torch.in_func_transform() else self.places(values)
        return self.name(places) if places else ""

    def foresee(self, device: str, dtype: torch.dtype | None) -> str:
        """Return the same for a call that Dynamo traces."""
        places = select.foreseen(self._runner.table, device, dtype).inplace
        return self.name(places) if places else ""

    def declared(self) -> tuple[Any, ...]:
        """Return what a graph depends on that was compiled with overwriting in it."""
        kernels = self._runner.table.all()
        if not any(k.inplace for k in kernels):
            return ()
        choice = [(k.device, k.backend, k.priority, k.dtypes, k.properties, k.inplace) for k in kernels]
        return tuple(choice), select.wanted_now()

    def name(self, places: Inplace) -> str:
        """Return the name of the overload for these places; it exists after that."""
        name = f"{OF_OPKIT}into" + "".join(f"_{p}" + ("" if r is None else f"_as_{r}") for p, r in places)
        if name not in self._overloads:
            self._overloads[name] = places, self._define(name, places)
        return name

    def define(self) -> None:
        """Define the relatives that some kernel may need."""
        self.name(())
        for kernel in self._runner.table.all():
            if kernel.inplace:
                self.name(kernel.inplace)

    def overload(self, places: Inplace) -> Any:
        """Return the overload for these places."""
        return self._overloads[self.name(places)][1]

    def call(self, name: str, values: Sequence[Any]) -> Any:
        """Call the overload of a name, and return all results in torch's form."""
        places, overload = self._overloads[name]
        args, kwargs = self.schema.split(values)
        rest = overload(*args, **kwargs)
        others = len(self.schema.results) - sum(result is not None for _, result in places)
        return self._restore(places, (rest,) if others < 2 else rest, values)

    def can_hold(self, name: str, values: Sequence[Any]) -> bool:
        """Whether the arguments that an overload overwrites have room for results."""
        return _can_hold(self._overloads[name][0], values)

    def leaves_in(self, name: str, values: Sequence[Any], outs: Sequence[Tensor]) -> bool:
        """Whether a call that overwrites arguments leaves all results where they are wanted, and destroys no more."""
        places, _ = self._overloads[name]
        held = all(result is not None and values[place] is outs[result] for place, result in places)
        return held and len(places) == len(outs)

    def decomposition(self) -> Callable[..., Any]:
        """Return how Inductor sees the op: as one that overwrites copies. It leaves out those of what is dead.

        Where nothing may be overwritten it is the relative that overwrites nothing, and not NotImplemented: since
        torch 2.13 Inductor asserts that an op that it calls as it is has no decomposition.
        """
        schema = self.schema

        def decomposed(*args: Any, **kwargs: Any) -> Any:
            values = schema.fill(args, kwargs)
            places = self.places(values)
            if not places:
                return self.overload(())(*args, **kwargs)
            arguments = {p.name: v for p, v in zip(schema.params, values, strict=True)}
            found = _torch_compile.functional_call(self.overload(places), arguments)
            copies = found[-len(places) :]
            after = list(values)
            for (place, _), copy in zip(places, copies, strict=True):
                after[place] = copy
            return self._restore(places, found[: -len(places)], after)

        return decomposed

    def _restore(self, places: Inplace, rest: Sequence[Any], values: Sequence[Any]) -> Any:
        """Return all results, those in arguments among them."""
        within = {result: place for place, result in places if result is not None}
        others = iter(rest)
        count = range(len(self.schema.results))
        return self.schema.raw([values[within[i]] if i in within else next(others) for i in count])

    def _define(self, name: str, places: Inplace) -> Any:
        schema = self.schema
        given = {place for place, _ in places}
        within = {result for _, result in places}
        own = replace(
            schema,
            params=tuple(replace(p, mutated=p.mutated or i in given) for i, p in enumerate(schema.params)),
            results=tuple(r for i, r in enumerate(schema.results) if i not in within),
        )

        def trace(*args: Any, **kwargs: Any) -> Any:
            results = schema.flatten(self._meta.trace(schema.fill(args, kwargs)))
            return schema.raw([r for i, r in enumerate(results) if i not in within])

        qualified = schema.opname + name
        _torch_library.define(self._library, own.declaration(qualified), self._tags)
        target = _torch_library.Overload(schema.namespace, qualified)
        run = self._runner.into(places)
        _torch_library.register_meta(self._library, qualified, trace, __file__)
        self._library.impl(qualified, run, "CompositeExplicitAutograd")
        kernel = gradient.autograd_kernel(
            own, target, run, lambda: NoFormula(own), lambda: None, variant=False
        )
        self._library.impl(qualified, kernel, "Autograd", with_keyset=True)
        version = mutation.version_kernel(own, target, gradient.EXTRA)
        self._library.impl(qualified, version, "ADInplaceOrView", with_keyset=True)
        return target()


def _can_hold(places: Inplace, values: Sequence[Any]) -> bool:
    return not any(inplaces.overlaps_itself(values[place]) for place, _ in places)


def may_be_needed(values: Sequence[Any]) -> bool:
    """Whether autograd may need an argument of a call again."""
    if not torch.is_grad_enabled():
        return False
    for value in values:
        for one in value if isinstance(value, (list, tuple)) else (value,):
            if isinstance(one, Tensor) and one.requires_grad:
                return True
    return False

"""An op on DTensors: which placements of its arguments it can work on, and how its results are then placed.

Derived from the shape line: tensors may be sharded along `*b`, if every result has it, since there the op works on
each index by itself; else everything is replicated. The author may name more such dimensions, or write a function.
Responsible for the rule and for telling torch in time: DTensor is imported by few programs, and often after the op
is defined.
"""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import importlib.util
import inspect
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from types import ModuleType
from typing import Any

from opkit import _torch_library
from opkit.errors import NoKernelError, RegistrationError
from opkit.spec.plan import Plan
from opkit.spec.schema import Schema, describe
from opkit.spec.shapes import Entry
from opkit.transforms.batch import Stars, differs
from opkit.transforms.gradient import EXTRA

_DTENSOR = "torch.distributed.tensor"
_Strategy = tuple[list[Any], list[Any]]  # the placements of the results, and those of the arguments


class Sharding:
    """The sharding rule of one op."""

    def __init__(self, schema: Schema, plan: Plan | None, *, random: bool) -> None:
        self.schema = schema
        self.plan = plan
        self.rule: Callable[..., Any] | None = None
        self.dims: tuple[str, ...] = ()
        self._overload: _torch_library.Overload | None = None
        self._tried = False
        # Replicas of random numbers would differ, mutation would be lost in a redistributed copy, and torch counts
        # the outputs by the schema, in which a list is one.
        many = any(r.type.is_list or r.type.base != "Tensor" or r.type.optional for r in schema.results)
        mutates = any(p.mutated for p in schema.params)
        self.is_derived = not (random or mutates or many) and bool(schema.results)

    def register(self, rule: Callable[..., Any] | None, dims: Sequence[str]) -> None:
        """Take the author's rule, or the names of dimensions along which the op works on each index by itself.

        Raises:
            RegistrationError: DTensor cannot take the op, or the rule or a name does not fit it.
        """
        if rule is None:
            self._check_dims(dims)
        elif dims:
            raise self._refusal("a function and dims=", "one of them", "A function says all there is to say")
        elif not callable(rule):
            raise self._refusal(repr(rule), "a function of the op's arguments", "Pass one, or dims=")
        if any(p.mutated for p in self.schema.params):
            names = ", ".join(p.name for p in self.schema.params if p.mutated)
            raise self._refusal(
                f"an op that mutates {names}", "one that mutates nothing",
                "DTensor may hand it a redistributed copy, and what it writes is lost: return a new tensor, or call "
                "it on to_local()",
            )  # fmt: skip
        if rule is not None:
            self._check_function(rule)
        elif not self.is_derived:
            raise self._refusal(
                "an op that draws random numbers, or has lists or numbers among its results",
                "one whose results are tensors, alike wherever the arguments are", "Write a function",
            )  # fmt: skip
        self.rule, self.dims = rule, tuple(dims)

    def _check_function(self, rule: Callable[..., Any]) -> None:
        args, kwargs = self.schema.split([p.name for p in self.schema.params])
        try:
            inspect.signature(rule).bind(*args, **kwargs)
        except TypeError:
            names = ", ".join(p.name for p in self.schema.params)
            raise self._refusal(
                f"{describe(rule)} with the signature {inspect.signature(rule)}",
                f"the op's arguments ({names})", "Change its parameters",
            ) from None  # fmt: skip
        except ValueError:  # a builtin without a signature
            return

    def _check_dims(self, dims: Sequence[str]) -> None:
        if dims and self.plan is None:
            raise self._refusal(
                "dims= for an op without a shape line", "a shape line", "Declare it with shapes="
            )
        for name in dims:
            assert self.plan is not None
            where = [(t.name, list(_places(t.entry, name))) for t in (*self.plan.inputs, *self.plan.outputs)]
            known = sorted({d.text for t in self.plan.inputs for d in t.entry.dims if d.is_name})
            if not any(places for _, places in where):
                raise self._refusal(f"dims= with {name!r}", f"one of {', '.join(known)}", "Name dimensions")
            without = [n for n, places in where[len(self.plan.inputs) :] if not places]
            if without:
                raise self._refusal(
                    f"dims= with {name!r}, which {without[0]} does not have", "a dimension of every result",
                    "Name another, or write a function",
                )  # fmt: skip
            twice = [n for n, places in where if len(places) > 1]
            used = [d for t in (*self.plan.inputs, *self.plan.outputs) for d in t.entry.dims]
            if twice or name in self.plan.int_names or any(name in d.names() and not d.is_name for d in used):
                raise self._refusal(
                    f"dims= with {name!r}, of which a rank would see a part",
                    "a dimension that no tensor has twice, and no argument and no other dimension depends on",
                    "Name another, or write a function",
                )  # fmt: skip

    def _refusal(self, found: str, expected: str, advice: str) -> RegistrationError:
        return RegistrationError(
            f"registering a sharding rule of {self.schema.name}: found {found}; expected {expected}. {advice}.",
            op=self.schema.name,
        )

    # ---------------------------------------------------------------- torch's side

    def tell_torch(self, overload: _torch_library.Overload) -> None:
        """Register the rule for an overload: now, or as soon as somebody imports DTensor."""
        self._overload = self._overload or overload
        if self.rule is not None or self.is_derived:
            _known[overload] = self
            if _DTENSOR in sys.modules:
                _hand_over(overload, self)
            else:
                _watch()

    def forget(self, overloads: Sequence[_torch_library.Overload]) -> None:
        """Take the rule of overloads back."""
        for overload in overloads:
            _known.pop(overload, None)
            if _DTENSOR in sys.modules:
                _torch_library.forget_sharding(overload())

    def strategies(self, *args: Any, **kwargs: Any) -> list[_Strategy]:
        """Return what `torch.distributed.tensor.experimental.register_sharding` asks for: (results, arguments)."""
        kwargs.pop(EXTRA, None)
        values = self.schema.fill(args, kwargs)
        if self.rule is None:
            found = list(self._derived(values))
        else:
            args, kwargs = self.schema.split(values)
            found = [(list(outs), list(ins)) for outs, ins in self.rule(*args, **kwargs)]
        for _, ins in found:
            self._check_count(ins)
        return [(outs, self._flat(ins, values)) for outs, ins in self._without_moves(found, values)]

    def _without_moves(self, found: list[_Strategy], values: Sequence[Any]) -> list[_Strategy]:
        """Leave out what would move a keyword-only tensor: DTensor hands on the part that is there (pytorch#167977)."""
        count = len(self.schema.positional)
        for index, (param, spec) in enumerate(zip(self.schema.keyword_only, values[count:], strict=True)):
            placements = set(getattr(spec, "placements", ()))
            if not placements:
                continue
            found = [one for one in found if {one[1][count + index]} == placements]
            if not found:
                raise NoKernelError(
                    f"sharding {self.schema.name}: the keyword-only argument {param.name} is placed "
                    f"{tuple(spec.placements)}, which the op cannot work on, and DTensor does not move keyword-only "
                    f"tensors; expected one that is replicated. Write {param.name}.redistribute(placements="
                    f"[{', '.join(['Replicate()'] * len(spec.placements))}]).",
                    op=self.schema.name,
                )
        return found

    def _check_count(self, placements: Sequence[Any]) -> None:
        if len(placements) != len(self.schema.params):
            raise RegistrationError(
                f"sharding {self.schema.name}: its rule gave {len(placements)} placements of arguments; expected "
                f"{len(self.schema.params)}, one per argument and None for those that are no tensors: "
                f"{', '.join(p.name for p in self.schema.params)}. Correct the function given to register_sharding.",
                op=self.schema.name,
            )

    def _flat(self, placements: list[Any], values: Sequence[Any]) -> list[Any]:
        """Return one placement per tensor that is there, in order, as torch counts them."""
        flat: list[Any] = []
        for param, placement, value in zip(self.schema.params, placements, values, strict=True):
            if param.type.base != "Tensor" or value is None:
                continue
            if isinstance(value, (list, tuple)):
                each = placement if isinstance(placement, (list, tuple)) else [placement] * len(value)
                flat += [one for one, v in zip(each, value, strict=True) if v is not None]
            else:
                flat.append(placement)
        return flat

    def _derived(self, values: Sequence[Any]) -> Iterator[_Strategy]:
        from torch.distributed.tensor import Replicate, Shard

        schema = self.schema
        tensors = [p.type.base == "Tensor" for p in schema.params]
        yield [Replicate() for _ in schema.results], [Replicate() if t else None for t in tensors]
        if self.plan is None:
            return
        given = {p.name: v for p, v in zip(schema.params, values, strict=True) if v is not None}
        ranks = {name: found for name, v in given.items() if (found := _rank(v)) is not None}
        entries = {t.name: t.entry for t in self.plan.inputs}
        for inputs, outputs in self._splits(entries, ranks, given, values):
            yield (
                [Shard(place) for place in outputs],
                [
                    None
                    if not tensor
                    else Replicate()
                    if inputs.get(p.name) is None
                    else Shard(inputs[p.name])
                    for p, tensor in zip(schema.params, tensors, strict=True)
                ],
            )

    def _try(self, stars: Stars, star: str, values: Sequence[Any]) -> bool:
        """Put `*b` to the test once, before a rank sees only a part of a tensor; return whether it could be tested.

        Raises:
            RegistrationError: the op gave other results for a part.
        """
        if self._tried:
            return True
        schema, plan = self.schema, self.plan
        assert plan is not None
        self._tried, found = differs(
            schema, plan, stars, star, values, self._call,
            lambda spec: (spec.shape, spec.tensor_meta.dtype, spec.mesh.device_type),
        )  # fmt: skip
        if found is not None:
            self._tried = False
            raise RegistrationError(
                f"sharding {schema.name}: its shape line lets DTensor split tensors along '*{star}', and called with a "
                f"part it gave {found[0]} otherwise than with the whole (apart by {found[1]:.3g}); expected an op that "
                "works on each index there by itself. Write other names in the shape line, or say which placements are "
                "right: register_sharding(function).",
                op=schema.name,
            )
        return self._tried

    def _call(self, values: Sequence[Any]) -> tuple[Any, ...]:
        assert self._overload is not None  # torch has been told
        args, kwargs = self.schema.split(values)
        return self.schema.flatten(self._overload()(*args, **kwargs))

    def _splits(
        self,
        entries: dict[str, Entry],
        ranks: dict[str, int],
        given: Mapping[str, Any],
        values: Sequence[Any],
    ) -> Iterator[tuple[dict[str, int], list[int]]]:
        """Return dimensions that a mesh may split: where each argument, and each result, has one of them."""
        plan = self.plan
        assert plan is not None
        stars = Stars.of(self.schema, plan)
        names = {star for star, _ in stars.outputs} if stars is not None else set()
        lengths = {
            entry.dims[entry.star].text: ranks[name] - len(entry.dims) + 1
            for name, entry in entries.items()
            if entry.star is not None and name in ranks
        }
        if stars is not None and len(names) == 1:
            (star,) = names
            known = all(
                name in ranks for name, (own, _) in stars.inputs.items() if own == star and name in given
            )
            length = lengths.get(star, 0) if known else 0
            if length and not self._try(stars, star, values):
                length = 0
            for index in range(length):
                inputs = {n: at + index for n, (s, at) in stars.inputs.items() if s == star and n in ranks}
                yield inputs, [at + index for _, at in stars.outputs]
        for dim in self.dims:
            found = {}
            for name, entry in entries.items():
                for place in _places(entry, dim):
                    if name in ranks:
                        found[name] = (
                            place
                            if entry.star is None or place < entry.star
                            else place + ranks[name] - len(entry.dims)
                        )
            outputs = []
            for tensors in plan.outputs:
                place = next(_places(tensors.entry, dim))
                at = tensors.entry.star
                outputs.append(
                    place if at is None or place < at else place + lengths[tensors.entry.dims[at].text] - 1
                )
            yield found, outputs


def _places(entry: Entry, name: str) -> Iterator[int]:
    return (i for i, d in enumerate(entry.dims) if d.is_name and d.text == name)


def _rank(spec: Any) -> int | None:
    """Return the number of dimensions of a tensor, or of those in a list, if there is one number."""
    each = {one.ndim for one in (spec if isinstance(spec, (list, tuple)) else [spec]) if hasattr(one, "ndim")}
    return each.pop() if len(each) == 1 else None


# ---------------------------------------------------------------- until DTensor is there

_known: dict[_torch_library.Overload, Sharding] = {}


def _hand_over(overload: _torch_library.Overload, sharding: Sharding) -> None:
    schema = sharding.schema
    plain = [i for i, p in enumerate(schema.positional) if p.type.base != "Tensor"]
    names = [p.name for p in schema.keyword_only]
    _torch_library.register_sharding(
        overload(), sharding.strategies, plain[0] if plain else len(schema.positional), names
    )


def _watch() -> None:
    if not any(isinstance(finder, _Watch) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Watch())


class _Watch(importlib.abc.MetaPathFinder):
    """Sees DTensor being imported, tells it the rules of the ops that are there, and goes away."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        """Let the others find the module, and be called when it has run."""
        if fullname != _DTENSOR:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(fullname)
        loader: Any = spec.loader if spec is not None else None
        if loader is not None:
            execute = loader.exec_module

            def exec_module(module: ModuleType) -> None:
                execute(module)
                for overload, sharding in list(_known.items()):
                    _hand_over(overload, sharding)

            loader.exec_module = exec_module
        return spec

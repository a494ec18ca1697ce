"""An op under `torch.vmap`: how one call stands for a batch of calls.

The rule is the author's (`register_vmap`), or derived from the shape line where every batched tensor and
every result has the same `*b`, or else the op is called once per sample. Responsible for torch.vmap only:
what else torch does to the op goes on below, since the rule calls the op again.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from opkit import _torch, _torch_library
from opkit.errors import RegistrationError, VmapError, did_you_mean, warn
from opkit.spec.plan import Plan
from opkit.spec.schema import Schema, describe, tensors
from opkit.transforms.batch import Dims, Stars, Trial, differs, without
from opkit.transforms.gradient import EXTRA
from opkit.transforms.sequential import Sequential, refuse_shared

CHOICES = {
    "sequential": "one call per sample",
    "expand": "one call, every tensor with the batch dimension in front",
    "elementwise": "one call, all tensors broadcast to one shape",
}

_ABSENT = object()


class VmapInfo(NamedTuple):
    """What a rule is told of the map: how many samples, and what `torch.vmap` was given as randomness."""

    batch_size: Any  # int or torch.SymInt
    randomness: str


class Batching:
    """The vmap rule of one op."""

    def __init__(
        self,
        schema: Schema,
        plan: Plan | None,
        trace: Callable[[Sequence[Any]], Any],
        *,
        random: bool,
        ordered: bool,
    ) -> None:
        """Take what is declared: `trace` gives empty results, for a batch of no samples.

        Args:
            schema: of the op.
            plan: its shape line.
            trace: the meta function, on arguments in schema order.
            random: whether the op draws random numbers.
            ordered: whether it has side effects, one per sample.
        """
        self.schema = schema
        self.plan = plan
        self.random = random
        self.ordered = ordered
        self._sequential = Sequential(schema, trace)
        self.rule: str | Callable[..., Any] | None = None
        self._stars: Any = _ABSENT
        self._confirmed = False
        self._warned = False

    def register(self, rule: str | Callable[..., Any]) -> None:
        """Take the author's choice instead of what is derived.

        Raises:
            RegistrationError: it is neither a choice nor a function that fits the op.
        """
        if isinstance(rule, str):
            self._check_choice(rule)
        elif callable(rule):
            self._check_function(rule)
        else:
            raise self._refusal(repr(rule), "Pass one of these")
        self.rule = rule
        self._confirmed = False

    def _check_choice(self, rule: str) -> None:
        if rule not in CHOICES:
            raise self._refusal(repr(rule), f"Name one of these.{did_you_mean(rule, CHOICES)}", dot="")
        if rule == "sequential" or self.plan is None:
            return
        for described in (*self.plan.inputs, *self.plan.outputs):
            if described.entry.star is None:
                raise RegistrationError(
                    f"registering a vmap rule of {self.schema.name}: found {rule!r}, which gives every tensor one "
                    f"more dimension in front; expected a shape line that allows it, but {described.name} is "
                    f"'{described.entry}'. Write '*b {described.entry}' there, or register 'sequential' or a function.",
                    op=self.schema.name,
                )

    def _check_function(self, rule: Callable[..., Any]) -> None:
        args, kwargs = self.schema.split([p.name for p in self.schema.params])
        try:
            inspect.signature(rule).bind("info", "in_dims", *args, **kwargs)
        except TypeError:
            names = ", ".join(["info", "in_dims", *(p.name for p in self.schema.params)])
            raise RegistrationError(
                f"registering a vmap rule of {self.schema.name}: found {describe(rule)} with the signature "
                f"{inspect.signature(rule)}; expected ({names}), keyword-only arguments by name. Change its "
                "parameters.",
                op=self.schema.name,
            ) from None
        except ValueError:  # a builtin without a signature
            return

    def _refusal(self, found: str, advice: str, dot: str = ".") -> RegistrationError:
        choices = ", ".join(f"{name!r} ({meaning})" for name, meaning in CHOICES.items())
        return RegistrationError(
            f"registering a vmap rule of {self.schema.name}: found {found}; expected {choices}, or a function "
            f"(info, in_dims, *args) that returns (output, out_dims). {advice}{dot}",
            op=self.schema.name,
        )

    # ---------------------------------------------------------------- torch's side

    @property
    def keys(self) -> tuple[str, ...]:
        """The dispatch keys that the kernel is for.

        Calls without a batched tensor come to FuncTorchVmapMode; they matter to ops that draw random numbers, of
        which each sample may want its own.
        """
        return ("FuncTorchBatched", "FuncTorchVmapMode") if self.random else ("FuncTorchBatched",)

    def kernel(self, overload: _torch_library.Overload) -> Callable[..., Any]:
        """Return the kernel for the dispatch keys of torch.vmap that `keys` names."""
        schema = self.schema

        def kernel(keyset: Any, /, *args: Any, **kwargs: Any) -> Any:
            extra = {EXTRA: kwargs.pop(EXTRA)} if EXTRA in kwargs else {}
            values = schema.fill(args, kwargs)
            level, size, randomness = _torch.vmap_level()
            own, dims = _unwrap(values, level)

            def call(values: Sequence[Any]) -> tuple[Any, ...]:
                args, kwargs = schema.split(values)
                return schema.flatten(overload()(*args, **kwargs, **extra))

            if self.random and randomness == "error":
                raise VmapError(
                    f"mapping {schema.name} with torch.vmap: the op draws random numbers, and vmap was called with "
                    'randomness="error", its default; expected a word on whether the samples share them. Write '
                    'torch.vmap(..., randomness="different") or "same".',
                    op=schema.name,
                )
            with _torch.below_vmap():
                one = not any(map(_any, dims)) and not (self.random and randomness == "different")
                if one:
                    return schema.raw(call(own))
                outputs, out_dims = self._apply(call, VmapInfo(size, randomness), dims, own)
            return schema.raw([_wrap(o, d, level) for o, d in zip(outputs, out_dims, strict=True)])

        return kernel

    def _apply(
        self, call: Callable[..., Any], info: VmapInfo, dims: Dims, values: Sequence[Any]
    ) -> tuple[Sequence[Any], Dims]:
        """Return the outputs of a batch of calls, and which of their dimensions is the batch."""
        rule = self.rule
        if callable(rule):
            args, kwargs = self.schema.split(self.schema.restore(values))
            return self._read(rule(info, tuple(dims), *args, **kwargs))
        if self.random and (info.randomness == "same" or not any(map(_any, dims))):
            rule = "sequential"
        if rule is None:
            names = [p.name for p, d in zip(self.schema.params, dims, strict=True) if _any(d)]
            star = None if self.ordered or self.stars is None else self.stars.place(names)
            if star is not None:
                return self._by_shape_line(call, star, info, dims, values)
            self._warn_of_loop(names)
        if rule == "sequential" or rule is None:
            return self._sequential.run(
                call, int(info.batch_size), dims, values, same_draws=self.random and info.randomness == "same"
            )
        if rule == "expand":
            values = [self._front(v, d, info, p) for v, d, p in self._each(values, dims)]
        else:
            values = self._broadcast(values, dims, info)
        return self._at_once(call, info, values, [0] * len(values), [0] * len(self.schema.results))

    @property
    def stars(self) -> Stars | None:
        """Where `*b` stands in the shape line, if that decides the rule."""
        if self._stars is _ABSENT:
            self._stars = Stars.of(self.schema, self.plan)
        found: Stars | None = self._stars
        return found

    def _each(self, values: Sequence[Any], dims: Dims) -> Iterator[tuple[Any, Any, Any]]:
        return zip(values, dims, self.schema.params, strict=True)

    def _warn_of_loop(self, batched: Sequence[str]) -> None:
        if self._warned or self.ordered:
            return
        self._warned = True
        why = "it has no shape line"
        if self.plan is not None:
            described = [t for t in self.plan.inputs if t.name in batched] + [*self.plan.outputs]
            missing = [t.name for t in described if t.entry.star is None]
            why = (
                f"its shape line has no '*b' for {', '.join(missing)}"
                if missing
                else "its declaration does not say how"
            )
        warn(
            f"mapping {self.schema.name} with torch.vmap over {', '.join(batched)} calls it once per sample, which "
            f"may be slow: {why}. Declare it with shapes= where each batched tensor and each result has '*b', or "
            f"say how: register_vmap with {', '.join(map(repr, CHOICES))} or a function."
        )

    # ---------------------------------------------------------------- rules

    def _by_shape_line(
        self, call: Callable[..., Any], star: str, info: VmapInfo, dims: Dims, values: Sequence[Any]
    ) -> tuple[Sequence[Any], Dims]:
        """Call once, with the batch as the first of the dimensions `*star`."""
        assert self.stars is not None
        places = [self.stars.inputs.get(p.name, (None, 0)) for p in self.schema.params]
        moved = [
            self._front(v, d, info, p, at) if name == star else v
            for (v, d, p), (name, at) in zip(self._each(values, dims), places, strict=True)
        ]
        in_dims = [at if name == star else None for name, at in places]
        if (
            not self._confirmed
            and not self.random
            and not _torch.is_plain(moved)
            and not _torch.is_capturing()
        ):
            assert self.plan is not None
            self._confirmed, found = differs(
                self.schema, self.plan, self.stars, star, moved, call, lambda t: (t.shape, t.dtype, t.device)
            )
            self._refuse(found)
        return self._at_once(call, info, moved, in_dims, [at for _, at in self.stars.outputs])

    def _at_once(
        self, call: Callable[..., Any], info: VmapInfo, values: Sequence[Any], in_dims: Dims, out_dims: Dims
    ) -> tuple[Sequence[Any], Dims]:
        """Call once for all samples; the first time that samples differ, compare with the op on one alone."""
        confirm = not self._confirmed and not self.random and info.batch_size > 1 and _torch.is_plain(values)
        if not confirm:
            return call(values), out_dims
        trial = Trial(self.schema, values, in_dims)
        outputs = call(values)
        self._confirmed = trial.telling
        self._refuse(trial.difference(call, values, outputs, out_dims))
        return outputs, out_dims

    def _refuse(self, found: tuple[str, float] | None) -> None:
        """Raise where the op was found not to keep its samples apart."""
        if found is None:
            return
        self._confirmed = False
        said = "its rule" if self.rule else "'*b' in its shape line"
        raise VmapError(
            f"mapping {self.schema.name} with torch.vmap: called once for the whole batch, as {said} allows, it gave "
            f"{found[0]} of the first sample otherwise than alone (apart by {found[1]:.3g}); expected an op that works "
            'on each index of the batch by itself. Say register_vmap("sequential"), or write other names than '
            "'*b' in the shape line; if the op draws random numbers, declare it with "
            "tags=[torch.Tag.nondeterministic_seeded].",
            op=self.schema.name,
        )

    def _front(self, value: Any, dim: Any, info: VmapInfo, param: Any, at: int = 0) -> Any:
        """Return a tensor, or those of a list, with the batch as dimension `at`, expanded where there is none."""
        if isinstance(value, (list, tuple)):
            each = dim if isinstance(dim, (list, tuple)) else [None] * len(value)
            return [self._front(v, d, info, param, at) for v, d in zip(value, each, strict=True)]
        if not isinstance(value, Tensor):
            return value
        if dim is not None:
            return value.movedim(dim, at)
        refuse_shared(self.schema, param)
        return value.unsqueeze(at).expand(*value.shape[:at], info.batch_size, *value.shape[at:])

    def _broadcast(self, values: Sequence[Any], dims: Dims, info: VmapInfo) -> list[Any]:
        """Return all tensors with the batch in front and the shape that the samples broadcast to."""
        shapes = [
            without(t.shape, d)
            for v, dim in zip(values, dims, strict=True)
            for t, d in zip(tensors([v]), _tensor_dims(v, dim), strict=True)
        ]
        try:
            shape = torch.broadcast_shapes(*shapes)
        except RuntimeError:
            raise VmapError(
                f"mapping {self.schema.name} with torch.vmap: its rule is 'elementwise', and the samples have the "
                f"shapes {', '.join(str(tuple(s)) for s in shapes)}; expected shapes that broadcast to one. Register "
                "another rule with register_vmap, such as 'sequential'.",
                op=self.schema.name,
            ) from None

        def spread(value: Any, dim: Any, param: Any) -> Any:
            if isinstance(value, (list, tuple)):
                each = dim if isinstance(dim, (list, tuple)) else [None] * len(value)
                return [spread(v, d, param) for v, d in zip(value, each, strict=True)]
            if not isinstance(value, Tensor):
                return value
            if dim is None or without(value.shape, dim) != tuple(shape):
                refuse_shared(self.schema, param)
            front = value.unsqueeze(0) if dim is None else value.movedim(dim, 0)
            ones = (1,) * (len(shape) + 1 - front.dim())
            return front.reshape(front.shape[0], *ones, *front.shape[1:]).expand(info.batch_size, *shape)

        return [spread(v, d, p) for v, d, p in self._each(values, dims)]

    def _read(self, returned: Any) -> tuple[Sequence[Any], Dims]:
        """Return the outputs and dimensions that an author's rule returned, one for each result."""
        if not isinstance(returned, tuple) or len(returned) != 2:
            found = f"{len(returned)} values" if isinstance(returned, tuple) else type(returned).__name__
            raise self._wrong(f"returned {found}", "two, (output, out_dims)")
        output, out_dims = returned
        if not self.schema.results:
            return (), ()
        outputs = self.schema.flatten(output)
        count = len(self.schema.results)
        if len(outputs) != count:
            raise self._wrong(f"returned {len(outputs)} outputs", f"{count}")
        for result, one in zip(self.schema.results, outputs, strict=True):
            if (
                result.type.base == "Tensor"
                and isinstance(one, Tensor) == result.type.is_list
                and one is not None
            ):
                wanted = "a list of tensors" if result.type.is_list else "a Tensor"
                raise self._wrong(f"returned {type(one).__name__} as {result.name}", wanted)
        if out_dims is None or isinstance(out_dims, int):
            dims: Sequence[Any] = [out_dims] * count
        elif count == 1 and self.schema.results[0].type.is_list and len(out_dims) != 1:
            dims = [out_dims]
        else:
            dims = list(out_dims)
        if len(dims) != count:
            raise self._wrong(
                f"returned {len(dims)} out_dims for {count} outputs", "one each, an int or None"
            )
        return outputs, dims

    def _wrong(self, found: str, expected: str) -> VmapError:
        assert callable(self.rule)
        return VmapError(
            f"mapping {self.schema.name} with torch.vmap: its rule {describe(self.rule)} {found}; expected "
            f"{expected}. Correct the function given to register_vmap.",
            op=self.schema.name,
        )


# ---------------------------------------------------------------- arguments with and without a batch


def _unwrap(values: Sequence[Any], level: int) -> tuple[list[Any], list[Any]]:
    """Return arguments without the wrappers of a vmap level, and their batched dimensions."""
    own: list[Any] = []
    dims: list[Any] = []
    for value in values:
        if isinstance(value, Tensor):
            tensor, dim = _torch.unbatched(value, level)
            own.append(tensor)
            dims.append(dim)
        elif isinstance(value, (list, tuple)) and any(isinstance(v, Tensor) for v in value):
            inner, each = _unwrap(value, level)
            own.append(inner)
            dims.append(each)
        else:
            own.append(value)
            dims.append(None)
    return own, dims


def _wrap(output: Any, dim: Any, level: int) -> Any:
    if isinstance(output, (list, tuple)):
        each = dim if isinstance(dim, (list, tuple)) else [dim] * len(output)
        return [_wrap(o, d, level) for o, d in zip(output, each, strict=True)]
    if dim is None or not isinstance(output, Tensor):
        return output
    return _torch.batched(output, dim, level)


def _any(dim: Any) -> bool:
    return any(map(_any, dim)) if isinstance(dim, (list, tuple)) else dim is not None


def _tensor_dims(value: Any, dim: Any) -> list[Any]:
    if not isinstance(value, (list, tuple)):
        return [dim] if isinstance(value, Tensor) else []
    each = dim if isinstance(dim, (list, tuple)) else [None] * len(value)
    return [d for v, d in zip(value, each, strict=True) if isinstance(v, Tensor)]

"""What is registered on an op beside kernels, in words: one short text for each rule."""

from __future__ import annotations

from typing import Any

from opkit._op import Op
from opkit.spec.schema import describe
from opkit.transforms.formula import FunctionFormula, NoFormula, OpFormula
from opkit.transforms.forward_mode import FunctionTangents
from opkit.transforms.vmap import CHOICES


def described(op: Op[..., Any]) -> dict[str, str]:
    """Return every rule of an op, registered, derived, or none."""
    return {
        "meta": _meta(op),
        "gradient": _gradient(op),
        "forward mode": _forward_mode(op),
        "vmap": _vmap(op),
        "autocast": ", ".join(f"{device}: {_short(dtype)}" for device, dtype in op._autocast.dtypes.items())
        or "none: it runs in the dtypes that it is given",
        "sharding": _sharding(op),
    }


def _meta(op: Op[..., Any]) -> str:
    if op._meta.function is not None:
        return describe(op._meta.function)
    if op._meta.known:
        return "from the shape line"
    return "none: the op cannot be traced" if op.schema.results else "nothing to say, as there are no results"


def _gradient(op: Op[..., Any]) -> str:
    formula = op._formula
    if isinstance(formula, NoFormula):
        return "none: differentiating it raises"
    if isinstance(formula, FunctionFormula):
        text = describe(formula.backward)
    elif isinstance(formula, OpFormula):
        text = f"{formula.formula.name}{_saves(op, formula)}"
    else:
        text = "from the reference, which runs once more in backward"
    names = dict.fromkeys([*(p.name for p in op.schema.params), *(r.name for r in op.schema.results)])
    without = [name for name in names if name in formula.non_differentiable]
    return f"{text}; none for {', '.join(without)}" if without else text


def _saves(op: Op[..., Any], formula: OpFormula) -> str:
    taken, returned = op.schema.params, op.schema.results
    names = [(taken[i] if side == "in" else returned[i]).name for side, i in formula.saves]
    return f", which takes {', '.join(names)} too" if names else ""


def _forward_mode(op: Op[..., Any]) -> str:
    tangents = op._tangents or op._formula.tangents
    if tangents is None:
        return "none: forward mode raises"
    if isinstance(tangents, FunctionTangents):
        return describe(tangents.jvp)
    return "from the reference"


def _vmap(op: Op[..., Any]) -> str:
    batching = op._batching
    if isinstance(batching.rule, str):
        return f"{batching.rule}, {CHOICES[batching.rule]}"
    if batching.rule is not None:
        return describe(batching.rule)
    stars = None if batching.ordered else batching.stars
    if stars is not None and (names := {name for name, _ in (*stars.inputs.values(), *stars.outputs)}):
        return f"from *{', *'.join(sorted(names))} in the shape line"
    return CHOICES["sequential"]


def _sharding(op: Op[..., Any]) -> str:
    sharding = op._sharding
    if sharding.rule is not None:
        return describe(sharding.rule)
    if not sharding.is_derived:
        return "none: DTensor refuses it"
    stars = op._batching.stars
    names = sorted({f"*{name}" for name, _ in stars.outputs}) if stars is not None else []
    along = [*names, *sharding.dims]
    return f"along {', '.join(along)} of the shape line" if along else "replicated"


def _short(dtype: Any) -> str:
    return str(dtype).removeprefix("torch.")

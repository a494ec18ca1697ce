"""Other forms of one definition: results written into given tensors, and a mutating op without mutation.

They are written in terms of the op itself, so that everything it is holds for them: checks, compile, export.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from opkit.dispatch import inplace as inplaces
from opkit.errors import GradientError, OutputError, RegistrationError
from opkit.spec.schema import Schema, tensors


def into(schema: Schema, results: Sequence[Any], out: Any) -> Any:
    """Write results into the tensors `out`, where they are not there yet; return what the caller gets.

    Raises:
        OutputError: another number, shape, dtype or device.
    """
    outs = outputs_of(schema, out)
    for result, output, target in zip(schema.results, results, outs, strict=True):
        for field in ("shape", "dtype", "device"):
            found, expected = getattr(target, field), getattr(output, field)
            if found != expected:
                shown = (
                    tuple(found) if field == "shape" else found,
                    tuple(expected) if field == "shape" else expected,
                )
                raise OutputError(
                    f"calling {schema.name} with out=: the tensor for {result.name} has the {field} {shown[0]}; "
                    f"expected {shown[1]}. Pass torch.empty({tuple(output.shape)}, dtype={output.dtype}).",
                    op=schema.name,
                )
    for output, target in zip(results, outs, strict=True):
        if output is not target:
            target.copy_(output)
    return schema.pack(schema.raw(outs))


def outputs_of(schema: Schema, out: Any) -> tuple[Tensor, ...]:
    """Return the tensors of `out=`, one for each result.

    Raises:
        RegistrationError: the op has results that no tensor can hold.
        OutputError: another number of tensors, something else, or tensors that share memory.
    """
    if not schema.results or any(str(r.type) != "Tensor" for r in schema.results):
        raise RegistrationError(
            f"calling {schema.name} with out=: it returns ({', '.join(str(r.type) for r in schema.results)}); expected "
            "an op whose results are tensors, one at least. Call the op, and copy what it returns.",
            op=schema.name,
        )
    outs = tuple(out) if isinstance(out, (tuple, list)) else (out,)
    if len(outs) != len(schema.results) or not all(isinstance(o, Tensor) for o in outs):
        raise OutputError(
            f"calling {schema.name} with out=: found ({', '.join(type(o).__name__ for o in outs)}); expected "
            f"{len(schema.results)} tensors: {', '.join(r.name for r in schema.results)}. Pass one for each.",
            op=schema.name,
        )
    compiling = torch.compiler.is_dynamo_compiling()  # which cannot look at memory
    for i, one in enumerate(outs):
        others = outs[:i]
        if any(one is o or (not compiling and inplaces.meet(one, o)) for o in others) or (
            inplaces.overlaps_itself(one)
        ):
            raise OutputError(
                f"calling {schema.name} with out=: the tensor for {schema.results[i].name} has elements that are also "
                "those of another result, or lie on each other; expected memory of its own. Pass torch.empty(...) for "
                "each.",
                op=schema.name,
            )
    return outs


def refuse_gradients(schema: Schema, values: Sequence[Any], outs: Sequence[Tensor]) -> None:
    """Raise where autograd would have to see a result being written into a tensor."""
    if torch.is_grad_enabled() and any(t.requires_grad for t in tensors((*values, *outs))):
        raise GradientError(
            f"calling {schema.name} with out=: an argument requires grad; expected none that does, as "
            "torch's own operations do with out=. Call it under torch.no_grad(), or without out=.",
            op=schema.name,
        )


def functional(
    schema: Schema, call: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]
) -> Any:
    """Call a mutating op on copies of what it mutates; return its results, and after them these copies.

    Raises:
        RegistrationError: the op mutates nothing.
    """
    mutated = [i for i, p in enumerate(schema.params) if p.mutated]
    if not mutated:
        raise RegistrationError(
            f"calling the functional form of {schema.name}: it mutates nothing; expected an op with mutates_args. "
            "Call the op itself.",
            op=schema.name,
        )
    values = list(schema.fill(args, kwargs))
    for place in mutated:
        value = values[place]
        values[place] = [v.clone() for v in value] if isinstance(value, (list, tuple)) else value.clone()
    positional, named = schema.split(values)
    results = schema.flatten(call(*positional, **named))
    return (*results, *(values[place] for place in mutated))

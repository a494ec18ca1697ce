"""An op in what torch traces: compiled with dynamic shapes, and exported."""

from __future__ import annotations

import ast
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from opkit import _torch_compile
from opkit._op import Op
from opkit.dispatch.preference import use_backend
from opkit.errors import RegistrationError
from opkit.spec.schema import tensors
from opkit.testing.arguments import (
    FLOATING,
    copied,
    differentiable,
    is_random,
    mapped,
    named,
    outputs,
    reason,
)
from opkit.testing.difference import difference, tolerance
from opkit.testing.report import Record
from opkit.transforms.formula import NoFormula

_MOST = 3  # sets of sizes that are compiled for
Found = dict[str, Any]


def why_not(op: Op[..., Any]) -> str | None:
    """Return why an op cannot be traced, None where it can."""
    if is_random(op):
        return "the op draws random numbers"
    try:
        op._meta.check_traceable()
    except RegistrationError as err:
        return reason(err)
    return None


# ---------------------------------------------------------------- torch.compile


def compiled(op: Op[..., Any], backend: str, calls: Sequence[Sequence[Any]]) -> Iterator[Record]:
    """Yield what torch.compile makes of the first call and of those that differ from it in sizes only."""
    missing = why_not(op)
    if missing is not None:
        yield Record(op.name, backend, "compile", "not applicable", missing)
        return
    distinct = _alike(op, backend, calls)[:_MOST]
    run = _fresh(op, op.schema.restore(distinct[0]))
    graphs = 0
    lower = _torch_compile.find_backend("aot_eager")

    def counting(*given: Any) -> Any:
        nonlocal graphs
        graphs += 1
        return lower(*given)

    function = torch.compile(run, fullgraph=True, dynamic=True, backend=counting)
    for values in distinct:
        try:
            expected = _run(op, run, backend, values)
        except Exception as err:
            yield Record(op.name, backend, "compile", "failed", f"in eager mode, {reason(err)}", "a result")
            return
        try:
            found = _run(op, function, backend, values)
        except Exception as err:
            yield Record(op.name, backend, "compile", "failed", reason(err), "one graph")
            return
        wrong = _differs(op, values, found, expected)
        if wrong is not None:
            yield Record(op.name, backend, "compile", "failed", *wrong)
            return
    sizes = f"{len(distinct)} set{'s' * (len(distinct) != 1)} of sizes"
    text = f"{graphs} graph{'s' * (graphs != 1)} for {sizes}"
    if graphs > 1:
        yield Record(op.name, backend, "compile", "failed", text, f"1 graph for {sizes}")
    else:
        yield Record(op.name, backend, "compile", "passed", text)


def _alike(op: Op[..., Any], backend: str, calls: Sequence[Sequence[Any]]) -> list[Sequence[Any]]:
    """Return the most calls that one graph should do for: they differ in sizes only, and in no special way.

    Sizes of 0 and 1 are special to torch, those of outputs too, and dimensions that happen to have the same size.
    """
    groups: dict[Any, dict[str, Sequence[Any]]] = {}
    for values in calls:
        try:
            with use_backend(backend, strict=True), torch.no_grad():
                found = list(outputs(op, op.overload, mapped(op, values, lambda _, t: copied(t))).values())
        except Exception:
            found = []
        sizes = [size for t in tensors(values) for size in t.shape]
        equal = tuple(sizes.index(size) for size in sizes)
        group = groups.setdefault((kind(values), kind(found), equal), {})
        group.setdefault(str([_sizes(v) for v in values]), values)
    return list(max(groups.values(), key=len).values())


def kind(values: Sequence[Any]) -> tuple[Any, ...]:
    """Return what a graph with symbolic sizes may depend on; that of sizes 0 and 1 is a graph of its own."""

    def one(value: Any) -> Any:
        if isinstance(value, (list, tuple)):
            return tuple(map(one, value))
        if isinstance(value, Tensor):
            special = tuple(size if size < 2 else None for size in value.shape)
            return special, value.dtype, value.device, value.is_contiguous()
        if isinstance(value, int) and not isinstance(value, bool):
            return value if value < 2 else "int"
        return type(value), repr(value)

    return tuple(map(one, values))


def _sizes(value: Any) -> Any:
    if isinstance(value, (list, tuple)):
        return [_sizes(v) for v in value]
    return tuple(value.shape) if isinstance(value, Tensor) else value


def _fresh(op: Op[..., Any], values: Sequence[Any]) -> Callable[..., Any]:
    """Return a call of the op that Dynamo has not seen: what it remembers belongs to the code of a function.

    Of the arguments in `values`, those that are no tensors and no sizes are constants in it: Dynamo compiles a function
    of a float twice, as it tries first to have it as a tensor.
    """
    names: dict[str, Any] = {"op": op}
    words = []
    for i, (param, value) in enumerate(zip(op.schema.params, values, strict=True)):
        names[f"constant{i}"] = value
        if type(value) is int or tensors([value]):
            word = f"values[{i}]"
        else:
            word = repr(value) if _is_literal(value) else f"constant{i}"
        words.append(f"{param.name}={word}" if param.keyword_only else word)
    exec(
        compile(f"def run(*values):\n    return op({', '.join(words)})\n", f"<call of {op.name}>", "exec"),
        names,
    )
    run: Callable[..., Any] = names["run"]
    return run


def _is_literal(value: Any) -> bool:
    """Whether Python reads its text as the same value."""
    try:
        return bool(ast.literal_eval(repr(value)) == value)
    except (ValueError, SyntaxError):
        return False


def _run(op: Op[..., Any], function: Callable[..., Any], backend: str, values: Sequence[Any]) -> Found:
    """Return results, and the gradients of what can be differentiated for the sum of the results."""
    wanted = frozenset() if isinstance(op._formula, NoFormula) else differentiable(op)
    leaves: dict[str, Tensor] = {}

    def leaf(name: str, tensor: Tensor) -> Tensor:
        copy = copied(tensor)
        if name.split("[")[0] in wanted and (tensor.dtype in FLOATING or tensor.is_complex()):
            leaves[name] = copy.requires_grad_()
        return copy

    with use_backend(backend), torch.enable_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        given = mapped(op, values, leaf)
        found = named(
            [r.name for r in op.schema.results], op.schema.flatten(function(*op.schema.restore(given)))
        )
        for param, value in zip(op.schema.params, given, strict=True):
            if param.mutated:
                found.update(named([f"argument {param.name}"], [value]))
        ends = [o for o in found.values() if isinstance(o, Tensor) and o.requires_grad]
        if ends:
            grads = torch.autograd.grad(
                ends, list(leaves.values()), [torch.ones_like(e) for e in ends], allow_unused=True
            )
            found.update({f"gradient of {n}": g for n, g in zip(leaves, grads, strict=True)})
    return {n: v.detach() if isinstance(v, Tensor) else v for n, v in found.items()}


def _differs(
    op: Op[..., Any], values: Sequence[Any], found: Found, expected: Found
) -> tuple[str, str] | None:
    part = tolerance(named([p.name for p in op.schema.params], values).values())
    for name, value in expected.items():
        wrong = difference(found.get(name), value, part)
        if wrong is not None:
            return f"{wrong.found}, in {name}", f"{wrong.expected}, as in eager mode"
    return None


# ---------------------------------------------------------------- torch.export


def exported(op: Op[..., Any], backend: str, values: Sequence[Any]) -> Iterator[Record]:
    """Yield what torch.export makes of a call."""
    missing = why_not(op)
    given_tensors = {
        n: t for n, t in named([p.name for p in op.schema.params], values).items() if isinstance(t, Tensor)
    }
    if missing is None and not given_tensors:
        missing = "the call has no tensors"
    if missing is not None:
        yield Record(op.name, backend, "export", "not applicable", missing)
        return

    class Call(torch.nn.Module):
        def forward(self, *given: Tensor) -> Any:
            by_name = dict(zip(given_tensors, given, strict=True))
            args, kwargs = op.schema.split(mapped(op, values, lambda n, _: by_name[n]))
            return op.overload(*args, **kwargs)

    def fresh() -> tuple[Tensor, ...]:
        return tuple(copied(t) for t in given_tensors.values())

    def run(function: Callable[..., Any]) -> Found:
        given = fresh()
        found = named([r.name for r in op.schema.results], op.schema.flatten(function(*given)))
        mutated = {p.name for p in op.schema.params if p.mutated}
        written = {n: t for n, t in zip(given_tensors, given, strict=True) if n.split("[")[0] in mutated}
        return {**found, **{f"argument {n}": t for n, t in written.items()}}

    try:
        with use_backend(backend), torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            program = torch.export.export(Call(), fresh())
            found, expected = run(program.module()), run(Call())
    except Exception as err:
        yield Record(op.name, backend, "export", "failed", reason(err), "a program")
        return
    targets = [node.target for node in program.graph.nodes if node.op == "call_function"]
    if op.overload not in targets:
        text = f"a graph of {', '.join(map(str, targets)) or 'nothing'}"
        yield Record(op.name, backend, "export", "failed", text, f"{op.overload} in it")
        return
    wrong = _differs(op, values, found, expected)
    yield Record(op.name, backend, "export", "failed" if wrong else "passed", *(wrong or ()))

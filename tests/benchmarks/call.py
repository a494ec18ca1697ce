"""What a call costs beside its kernel: opkit against its peers, as ratios to the plain function with the same body.

Tensors have 16 floats. "reach" is what opkit is held to: a ratio to the plain function, or a peer that it must not
be slower than. Results and gradients are compared with the plain function's before anything is timed.

    python tests/benchmarks/call.py [--only TEXT]    the rows whose title has TEXT
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import os
import statistics
from collections.abc import Callable, Mapping
from typing import Any

os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the profiler tells stderr each time that it starts

import _peers as peers
import torch
from _measure import Run, ratio, rounds, running, save, table
from _peers import CPP, CUSTOM_OP, FUNCTION, LIBRARY, OPKIT, PLAIN

REPEATS = 31
AT_LEAST = 0.004  # seconds of each turn: many short ones, as other work on the machine comes in bursts
AGAIN = "plain function again"  # its ratio to itself is the noise
SAME = 1.02  # what "not slower" tolerates: two runs of one function differ by this
PEERS = (CUSTOM_OP, LIBRARY, FUNCTION, CPP)


@dataclasses.dataclass(frozen=True)
class Case:
    """A row: one statement, run with every peer as `op`."""

    title: str
    peers: Mapping[str, Callable[..., Any]]
    statement: str
    names: Mapping[str, Any]
    reach: float | None = None
    """What opkit's ratio to the plain function must not exceed."""
    rival: str | None = None
    """Which peer opkit must not be slower than."""
    reset: str = "pass"
    result: str = ""
    """Where the statement's result is found, if it has none of its own."""
    state: Callable[[], contextlib.AbstractContextManager[Any]] = contextlib.nullcontext

    def outcome(self, op: Callable[..., Any]) -> Any:
        names = {**self.names, "op": op}
        exec(self.reset, names)
        with self.state():
            if not self.result:
                return eval(self.statement, names)
            exec(self.statement, names)
        return eval(self.result, names).clone()

    def check(self) -> None:
        """Raise where a peer computes something else than the plain function."""
        expected = self.outcome(self.peers[PLAIN])
        for name, op in self.peers.items():
            found = self.outcome(op)
            if isinstance(expected, tuple):
                found, expected = tuple(found), tuple(expected)
            torch.testing.assert_close(found, expected, msg=lambda text, n=name: f"{self.title}, {n}: {text}")

    def run(self, op: Callable[..., Any]) -> Run:
        timed = running(self.statement, {**self.names, "op": op})

        def in_state(number: int) -> float:
            with self.state():
                return timed(number)

        return in_state


def fused(ops: Mapping[str, Callable[..., Any]]) -> dict[str, Callable[..., Any]]:
    """Return graphs with each op between aten's. Each has code of its own, as Dynamo keeps graphs by it."""
    compiled = {}
    for name, op in ops.items():
        names = {"op": op}
        exec("def graph(x):\n    return op(x * 2 + 1) * 3 - 1", names)
        compiled[name] = torch.compile(names["graph"], fullgraph=True)
    return compiled


def held() -> list[Case]:
    """Return the rows that opkit is held to."""
    x, needs_grad = torch.randn(16), torch.randn(16, requires_grad=True)
    many = {name: torch.randn(16) for name in "abcdefghijklmn"}
    ten = {"out": torch.zeros(16), **{name: many[name] for name in "bcdefghij"}}
    rich = {"y": many["b"], "z": many["c"], "w": many["d"], "ints": [1, 2, 3], "floats": [1.0, 2.0, 3.0]}
    rich_call = "op(x, y, z, w, ints, floats, ints, floats, ints, floats, True, 'sum')"
    call, keywords = f"op({', '.join(many)})", f"op({', '.join(f'{name}={name}' for name in many)})"
    one, grad = {"x": x}, {"x": needs_grad}
    cast = {"xs": [x, many["b"]], "dtype": torch.float64, "device": torch.device("cpu")}
    backward: dict[str, Any] = {
        "statement": "op(x).backward(ones)",
        "names": {**grad, "ones": torch.ones(16)},
        "reset": "x.grad = None",
        "result": "x.grad",
    }
    return [
        Case("1 tensor, no grad, Python kernel", peers.SINE, "op(x)", one, reach=1.15),
        Case("1 tensor, no grad, C++ kernel", peers.NATIVE_SINE, "op(x)", one, rival=CPP),
        Case("forward with grad, Python kernel", peers.SINE_WITH_GRAD, "op(x)", grad, reach=1.6),
        Case("forward with grad, C++ kernel", peers.NATIVE_SINE_WITH_GRAD, "op(x)", grad, reach=1.6),
        Case("forward + backward, Op in C++", peers.NATIVE_SINE_WITH_GRAD, **backward, reach=1.1, rival=CPP),
        Case("forward + backward, Python formula", peers.SINE_WITH_GRAD, **backward),
        Case("14 arguments, #177109", peers.FOURTEEN, call, many, reach=1.1),
        Case("the same by keyword", peers.FOURTEEN_BY_KEYWORD, keywords, many, reach=1.25),
        Case("tensors and lists, #176592", peers.RICH, rich_call, {**one, **rich}, rival=FUNCTION),
        Case("the same, forward with grad", peers.RICH_WITH_GRAD, rich_call, {**grad, **rich}, rival=FUNCTION),
        Case(
            "10 arguments, mutating", peers.TEN, f"op({', '.join(ten)})", ten,
            reach=1.5, reset="out.zero_()", result="out",
        ),
        Case("NamedTuple of 3 outputs", peers.THREE, "op(x)", one, reach=1.3),
        Case("with register_fake for a shape line", peers.DESCRIBED, "op(x)", one),
        Case("the same with a list, dtype and device", peers.CAST, "op(xs, dtype, device)", cast),
        Case("in an Inductor graph, Python kernel", fused(peers.SINE), "op(x)", one, reach=1.25),
        Case("in an Inductor graph, C++ kernel", fused(peers.NATIVE_SINE), "op(x)", one, reach=1.25),
    ]  # fmt: skip


def in_states() -> list[Case]:
    """Return the rows that are only looked at."""
    x, needs_grad = torch.randn(16), torch.randn(16, requires_grad=True)
    states = (
        ("inference_mode", torch.inference_mode, x),
        ("no_grad", torch.no_grad, needs_grad),
        ("autocast", lambda: torch.autocast("cpu", torch.bfloat16), x),
        ("profiler", torch.profiler.profile, x),
    )
    kernels = (("Python", peers.SINE_WITH_GRAD), ("C++", peers.NATIVE_SINE_WITH_GRAD))
    return [
        Case(f"under {title}, {kernel} kernel", sines, "op(x)", {"x": value}, state=state)
        for title, state, value in states
        for kernel, sines in kernels
    ]


def measure(case: Case) -> dict[str, Any]:
    """Return a row: the medians in seconds, and the ratios that it is judged by."""
    case.check()
    runs = {name: case.run(op) for name, op in case.peers.items()}
    found = rounds({**runs, AGAIN: case.run(case.peers[PLAIN])}, repeats=REPEATS, at_least=AT_LEAST)
    ratios = {name: ratio(found, name, PLAIN) for name in found}
    to_rival = ratio(found, OPKIT, case.rival) if case.rival else None
    verdicts = [ratios[OPKIT] <= case.reach] if case.reach else []
    verdicts += [to_rival <= SAME] if to_rival else []
    return {
        "case": case.title,
        "seconds": {name: statistics.median(times) for name, times in found.items()},
        "ratios": ratios,
        "reach": case.reach,
        "rival": case.rival,
        "to_rival": to_rival,
        "met": all(verdicts) if verdicts else None,
    }


def goal(row: Mapping[str, Any]) -> str:
    parts = [f"≤ {row['reach']:.2f}x"] if row["reach"] else []
    parts += [f"≤ {row['rival'].split('.')[-1]} ({row['to_rival']:.2f}x)"] if row["rival"] else []
    return "\n".join(parts)


def show(title: str, rows: list[dict[str, Any]], *, goals: bool) -> None:
    verdicts = {True: "yes", False: "no", None: ""}
    header = ["", "plain, us", OPKIT, *(("reach", "met") if goals else ()), *PEERS]
    lines = []
    for row in rows:
        ratios = [f"{row['ratios'][name]:.2f}x" if name in row["ratios"] else "–" for name in (OPKIT, *PEERS)]
        judged = [goal(row), verdicts[row["met"]]] if goals else []
        lines.append([row["case"], f"{row['seconds'][PLAIN] * 1e6:.2f}", ratios[0], *judged, *ratios[1:]])
    noise = [row["ratios"][AGAIN] for row in rows]
    spread = f"{min(noise):.2f} to {max(noise):.2f}x"
    note = f"ratios to the plain function, in parentheses to that peer; the plain function again: {spread}\n"
    table(title, [name.replace(".", ".\n") for name in header], lines, note=note)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", default="", metavar="TEXT", help="the rows whose title has this text")
    only = parser.parse_args().only
    torch.set_num_threads(1)
    tables = {"cost of a call": held(), "cost of a call in a special state": in_states()}
    titles = [case.title for cases in tables.values() for case in cases]
    if not any(only in title for title in titles):
        parser.error(f"no title has {only!r}; expected part of one of these: {'; '.join(titles)}")
    measured: dict[str, list[dict[str, Any]]] = {}
    for title, cases in tables.items():
        rows = [measure(case) for case in cases if only in case.title]
        if rows:
            show(title, rows, goals=any(case.reach for case in cases))
        measured[title] = rows
    if not only:
        save("call", measured)


if __name__ == "__main__":
    main()

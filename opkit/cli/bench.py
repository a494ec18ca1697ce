"""`opkit bench`: what `opkit.bench.compare` measures of one op, as tables, JSON, Markdown or a picture."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from typing import Any

from opkit.cli import _imports, _ops, _output
from opkit.errors import OpkitError, OpNotFoundError

HELP = "measure the backends of an op, verified first, beside each other and the machine's limit"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("op", metavar="OP", help="namespace::name")
    _imports.add_argument(parser)
    parser.add_argument(
        "--case",
        metavar="FILE.py:FUNCTION",
        help="a function of sizes that returns (args, kwargs) of a call (default: calls made from the shape line)",
    )
    parser.add_argument(
        "--over",
        action="append",
        default=[],
        metavar="NAME=SIZES",
        help="sizes for an argument of the case, or a name in the shape line: n=256,1024; may be given more than once: "
        "every combination",
    )
    parser.add_argument(
        "--dtype", action="append", metavar="DTYPE", help="such as bfloat16; may be given more than once"
    )
    parser.add_argument(
        "--backend", action="append", metavar="NAME", help="only this one; may be given more than once"
    )
    parser.add_argument(
        "--against",
        action="append",
        default=[],
        metavar="NAME=FILE.py:FUNCTION",
        help="another function of the same arguments to compare with; may be given more than once",
    )
    parser.add_argument(
        "--compiled", action="store_true", help="compare with torch.compile of the reference, too"
    )
    parser.add_argument("--device", metavar="NAME", help="for the case, such as cuda (default: cpu)")
    parser.add_argument(
        "--caches", action="append", choices=("warm", "cold"), help="only warm or cold caches (default: both)"
    )
    parser.add_argument("--forward", action="store_true", help="no gradients")
    parser.add_argument(
        "--seconds",
        type=float,
        metavar="N",
        help="how long each candidate is called with each call (default: 0.1)",
    )
    parser.add_argument("--baseline", metavar="FILE", help="a saved report; what is slower is exit code 1")
    parser.add_argument("--save", metavar="FILE", help="write the report as JSON, for --baseline")
    parser.add_argument("--plot", metavar="FILE", help="draw it: .svg, .png or .pdf")
    parser.add_argument(
        "--theme", choices=("light", "dark"), default="light", help="of the picture (default: light)"
    )
    shown = parser.add_mutually_exclusive_group()
    shown.add_argument("--json", action="store_true", help="as JSON, for programs")
    shown.add_argument("--markdown", action="store_true", help="as Markdown")


def run(arguments: argparse.Namespace) -> int:
    from opkit import bench

    _imports.run(arguments.imports)
    case = _function("--case", arguments.case, "(args, kwargs)") if arguments.case else None
    options: dict[str, Any] = {} if arguments.seconds is None else {"min_run_time": arguments.seconds}
    report = bench.compare(
        _named(arguments.op),
        case,
        over=dict(_sizes(text) for text in arguments.over),
        dtypes=arguments.dtype,
        backends=arguments.backend,
        against=dict(_peer(text) for text in arguments.against),
        compiled=arguments.compiled,
        backward=False if arguments.forward else None,
        caches=arguments.caches,
        device=arguments.device,
        baseline=arguments.baseline,
        **options,
    )
    if arguments.save:
        report.save(arguments.save)
    if arguments.plot:
        report.plot(arguments.plot, theme=arguments.theme)
    if arguments.json:
        print(report.to_json())
    elif arguments.markdown:
        print(report.to_markdown(), end="")
    elif console := _output.console():
        console.print(report)
    else:
        print(report)
    return int(not report.ok)


def _named(text: str) -> str:
    """Return the name of the one op that a name or a pattern means."""
    import opkit

    names = _ops.matching([text], opkit.list_ops(), doing="benchmarking")
    if len(names) > 1:
        raise OpNotFoundError(
            f"benchmarking {text}: it means {len(names)} ops, {', '.join(names)}; expected one. Name one of them."
        )
    return names[0]


def _function(option: str, text: str, returns: str) -> Callable[..., Any]:
    return _imports.find_function(option, text, returns=returns)


def _sizes(text: str) -> tuple[str, Sequence[Any]]:
    """Return what `n=256,1024` says."""
    name, _, values = text.partition("=")
    listed = [_number(value) for value in values.split(",") if value]
    if not name or not listed:
        raise OpkitError(
            f"reading --over {text}: found no sizes; expected a name, = and sizes. Write for instance: --over "
            "n=256,1024."
        )
    return name, listed


def _number(text: str) -> Any:
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            pass
    return text


def _peer(text: str) -> tuple[str, Callable[..., Any]]:
    """Return what `eager=file.py:function` says."""
    name, _, place = text.partition("=")
    if not place:
        raise OpkitError(
            f"reading --against {text}: found no name; expected a name, = and a function. Write for instance: "
            "--against eager=peers.py:function."
        )
    return name, _function("--against", place, "what the op returns")

"""The option `--print-completion`: what shells need to complete `opkit` with the Tab key. It takes shtab, an extra."""

from __future__ import annotations

import argparse
import importlib.util
import re
from collections.abc import Iterator
from typing import Any

from opkit.errors import OpkitError

_SHELLS = ("bash", "zsh", "tcsh")
_FILES = re.compile(r"FILE|FOLDER|PATH")


def add_argument(parser: argparse.ArgumentParser) -> None:
    """Give the command line the option."""
    parser.add_argument(
        "--print-completion",
        action=_Print,
        choices=_SHELLS,
        metavar="SHELL",
        help=f"print what completes commands and options in {', '.join(_SHELLS)}, and exit",
    )


class _Print(argparse.Action):
    def __call__(
        self, parser: argparse.ArgumentParser, _namespace: Any, shell: Any, _option: Any = None
    ) -> None:
        if importlib.util.find_spec("shtab") is None:
            raise OpkitError(
                f"printing completions for {shell}: shtab is not installed, which writes them. Install it: "
                "pip install 'torch-opkit[cli]'."
            )
        import shtab

        for action in _actions(parser):
            if isinstance(action.metavar, str) and _FILES.search(action.metavar):
                action.complete = shtab.FILE  # type: ignore[attr-defined]
        print(shtab.complete(parser, shell=shell))
        parser.exit()


def _actions(parser: argparse.ArgumentParser) -> Iterator[argparse.Action]:
    """Yield the arguments of a parser and of the commands in it."""
    for action in parser._actions:
        yield action
        if isinstance(action, argparse._SubParsersAction):
            for command in action.choices.values():
                yield from _actions(command)

"""The command `opkit`: one module per command, named in `_COMMANDS`.

A command's module has `HELP`, `add_arguments(parser)` and `run(arguments) -> int`, and imports what is
slow only in the latter. What a user did wrong is one text on stderr, never a traceback.

Exit codes: 0 done, 1 it could not be done or something was found wrong, 2 wrong usage, 130 interrupted.
"""

from __future__ import annotations

import argparse
import importlib
import os
import sys
from collections.abc import Sequence

from opkit import _frozen
from opkit.cli import _completion
from opkit.errors import OpkitError

_COMMANDS = (
    "bench",
    "build",
    "cache",
    "check",
    "doctor",
    "info",
    "new",
    "ops",
    "plugins",
    "prepare",
    "stubs",
)


def parser() -> argparse.ArgumentParser:
    """Return what reads command lines; every command's module is imported for it."""
    made = argparse.ArgumentParser(
        prog="opkit", description="A toolkit for people who write PyTorch operators."
    )
    _completion.add_argument(made)
    commands = made.add_subparsers(metavar="COMMAND", required=True)
    for name in _COMMANDS:
        module = importlib.import_module(f"opkit.cli.{name}")
        command = commands.add_parser(name, help=module.HELP, description=module.HELP)
        module.add_arguments(command)
        command.set_defaults(run=module.run)
    return made


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command line and return its exit code.

    Args:
        argv: the words after `opkit`; by default those of this process.
    """
    try:
        arguments = parser().parse_args(argv)
        with _frozen.thawed():  # OPKIT_FROZEN is about the processes after this one
            code: int = arguments.run(arguments)
        sys.stdout.flush()
        return code
    except SystemExit as stop:  # argparse: help was printed, or the usage was wrong
        return stop.code if isinstance(stop.code, int) else 2
    except OpkitError as error:
        print(f"opkit: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("opkit: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:  # `opkit cache list | head`: nobody reads on
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        return 0
    except OSError as error:
        print(f"opkit: {error}", file=sys.stderr)
        return 1

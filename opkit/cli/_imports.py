"""The option `--import`, with which a command sees the ops that a module or a script defines."""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import sys
from collections.abc import Sequence
from pathlib import Path

from opkit.errors import OpkitError


def add_argument(parser: argparse.ArgumentParser) -> None:
    """Give a command the option."""
    parser.add_argument(
        "--import",
        dest="imports",
        action="append",
        default=[],
        metavar="MODULE|FILE",
        help="a module or a .py file that defines ops; may be given more than once",
    )


def run(names: Sequence[str]) -> None:
    """Import what the option named.

    Raises:
        OpkitError: there is no such module or file, or it fails.
    """
    if "" not in sys.path:
        sys.path.insert(0, "")  # as `python -m` has it
    for name in names:
        try:
            _run(name)
        except (Exception, SystemExit) as error:
            if isinstance(error, ModuleNotFoundError) and error.name in (name, name.split(".")[0]):
                raise OpkitError(
                    f"importing {name}: there is no such module or file; expected a module that Python finds, or "
                    "a path to a .py file. Correct it, or start in the folder that has it."
                ) from None
            raise OpkitError(
                f"importing {name}: it failed with {type(error).__name__}: {error}. Expected it to import; run "
                f"{'python ' + name if name.endswith('.py') else 'python -m ' + name} to see where it fails."
            ) from error


def module_name(name: str) -> str:
    """Return the name in `sys.modules` of what `run` imported."""
    return Path(name).stem if name.endswith(".py") else name


def _run(name: str) -> None:
    path = Path(name)
    if path.suffix != ".py":
        importlib.import_module(name)
        return
    spec = importlib.util.spec_from_file_location(path.stem, path.resolve())
    if spec is None or spec.loader is None or not path.is_file():
        raise ModuleNotFoundError(name=name)
    module = importlib.util.module_from_spec(spec)
    sys.modules[path.stem] = module
    sys.path.insert(0, str(path.resolve().parent))
    spec.loader.exec_module(module)

"""The option `--import`, with which a command sees the ops that a module or a script defines."""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import inspect
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, cast

from opkit.errors import OpkitError, did_you_mean


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
            said = str(error).rstrip(".")
            raise OpkitError(
                f"importing {name}: it failed with {type(error).__name__}: {said}. Expected it to import; run "
                f"{'python ' + name if name.endswith('.py') else 'python -m ' + name} to see where it fails."
            ) from error


def module_name(name: str) -> str:
    """Return the name in `sys.modules` of what `run` imported."""
    return Path(name).stem if name.endswith(".py") else name


def find_function(option: str, text: str, *, returns: str) -> Callable[..., Any]:
    """Return the function that an option names, `FILE.py:FUNCTION` or `MODULE:FUNCTION`; its file is imported.

    Raises:
        OpkitError: there is no such file or function; `returns` says what one is expected to return.
    """
    place, _, name = text.rpartition(":")
    if not place:
        raise OpkitError(
            f"reading {option} {text}: found no function's name; expected a file or module, a colon and a function. "
            f"Write for instance: {option} serving.py:cases."
        )
    if not _is_imported(place):  # a second time would define its ops anew
        run([place])
    module = sys.modules[module_name(place)]
    function = getattr(module, name, None)
    if not callable(function):
        known = [n for n, v in vars(module).items() if inspect.isfunction(v)]
        raise OpkitError(
            f"reading {option} {text}: {place} has no function {name!r}; expected one of {', '.join(known) or 'some'}."
            f"{did_you_mean(name, known)} Name the one that returns {returns}."
        )
    return cast("Callable[..., Any]", function)


def _is_imported(place: str) -> bool:
    file = getattr(sys.modules.get(module_name(place)), "__file__", None)
    return file is not None and (not place.endswith(".py") or Path(file) == Path(place).resolve())


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

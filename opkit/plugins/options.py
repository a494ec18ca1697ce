"""What the user says of plugins: in variables, in the project's pyproject.toml under `[tool.opkit]`, in an own file.

    plugins = ["fast==1.2.0", "numba"]     # like OPKIT_PLUGINS: only these
    plugins-deny = ["slow"]                # like OPKIT_PLUGINS_DENY: not these
    autoload = "ops"                       # like OPKIT_AUTOLOAD
    device = "opk"                         # like OPKIT_DEVICE
    strict = true                          # like OPKIT_STRICT

The project is that of the working directory: the nearest pyproject.toml in it or above it. The user's file is
opkit/config.toml in $XDG_CONFIG_HOME or ~/.config, with the same keys at its top. What they say is kept in the
catalog, so that a file which has not changed is not parsed again.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import opkit_boot
from opkit import _config
from opkit.errors import ConfigError, did_you_mean
from opkit.plugins import store

VARIABLES = {
    "plugins": "OPKIT_PLUGINS",
    "plugins-deny": "OPKIT_PLUGINS_DENY",
    "autoload": "OPKIT_AUTOLOAD",
    "device": "OPKIT_DEVICE",
    "strict": "OPKIT_STRICT",
}


class Said(NamedTuple):
    """A value, and who says so, as the user finds it."""

    value: Any
    where: str


Files = Sequence[tuple[str, dict[str, str]]]


def files() -> Files:
    """Return what the project's file and the user's say: where that is, and values as the variables would have them.

    Raises:
        ConfigError: a file has a key or a value that opkit does not know.
    """
    project, user = project_file(), user_file()
    of_project = [(f"[tool.opkit] of {project}", _texts(project, ("tool", "opkit")))] if project else []
    return [*of_project, (user, _texts(user, ()))]


def said(key: str, where_else: Files | None = None) -> Iterator[Said]:
    """Yield what is said of a key, the most specific first: the variable, the project, the user.

    Args:
        key: one of `VARIABLES`.
        where_else: what `files` gave, where it was asked already.

    Raises:
        ConfigError: a variable or a file has a value that opkit does not know.
    """
    variable = VARIABLES[key]
    if os.environ.get(variable):  # set to nothing is as good as unset
        yield Said(_config.get(variable), variable)
    for file, texts in files() if where_else is None else where_else:
        if key in texts:
            where = f"{key} in {file}"
            yield Said(_parse(variable, texts[key], where), where)


def of_user() -> dict[str, str]:
    """Return what the user's own file says, each value as the variable would have it."""
    return _texts(user_file(), ())


def user_file() -> str:
    """Return the path of the user's own file."""
    folder = os.environ.get("XDG_CONFIG_HOME") or os.path.expanduser("~/.config")
    return os.path.join(folder, "opkit", "config.toml")


def project_file() -> str | None:
    """Return the project's pyproject.toml, or None where there is none."""
    try:
        folder = os.getcwd()
    except OSError:
        return None
    while not os.path.isfile(path := os.path.join(folder, "pyproject.toml")):
        folder, inner = os.path.dirname(folder), folder
        if folder == inner:
            return None
    return path


def _parse(variable: str, text: str, where: str) -> Any:
    try:
        return _config.parse(variable, text)
    except ConfigError as error:
        raise ConfigError(str(error).replace(f"reading {variable}", f"reading {where}", 1)) from None


def _texts(path: str, table: tuple[str, ...]) -> dict[str, str]:
    """Return what a file says, each value as the variable would have it."""
    now = opkit_boot.stamp(path)
    if now is None:
        return {}
    key = ("options", path)
    kept = store.kept(key)
    if kept is None or kept[0] != now:
        kept = (now, _read(path, table))
        store.keep(key, kept)
    found: dict[str, str] = kept[1]
    return found


def _read(path: str, table: tuple[str, ...]) -> dict[str, str]:
    content: Any = _toml(path, own=not table)
    for name in table:
        content = content.get(name, {}) if isinstance(content, dict) else {}
    where = f"[tool.opkit] of {path}" if table else path
    return {key: _text(key, value, where) for key, value in content.items()}


def _text(key: str, value: Any, where: str) -> str:
    if key not in VARIABLES:
        raise ConfigError(
            f"reading {where}: found the key {key!r}; expected some of {', '.join(VARIABLES)}."
            f"{did_you_mean(key, VARIABLES)} Take it out or correct it."
        )
    is_list = key in ("plugins", "plugins-deny")
    if is_list and isinstance(value, list) and all(isinstance(one, str) for one in value):
        return ",".join(value)
    if isinstance(value, bool) and not is_list:
        return str(int(value))
    if isinstance(value, str):
        return value
    wanted = "a list of texts" if is_list else "a text, true or false"
    raise ConfigError(f"reading {where}: {key} is {value!r}; expected {wanted}. Correct it.")


def _toml(path: str, *, own: bool) -> dict[str, Any]:
    """Return what a file says; of a project's file that is no TOML others will complain."""
    from opkit.plugins import toml

    try:
        return toml.loads(Path(path).read_text(encoding="utf-8"))
    except OSError:
        return {}
    except ValueError as error:
        if not own:
            return {}
        raise ConfigError(
            f"reading {path}: it is no TOML ({error}); expected TOML. Correct that line."
        ) from None

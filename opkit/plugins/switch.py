"""Turning plugins on and off in the user's own file. Comments and other keys in it stay.

Files of projects and variables are not touched: where one of them decides, that is said.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Sequence

from opkit import _config
from opkit.plugins import isolation, options
from opkit.plugins.discovery import normalized


def enable(name: str) -> list[str]:
    """Take a plugin off the deny-list, and put it onto the allow-list if there is one; return what was changed."""
    changed = [f"{name} has another try"] if isolation.forgive(name) else []
    denied, allowed = _listed("plugins-deny"), _listed("plugins")
    left = [one for one in denied or () if not _same(one, name)]
    if denied is not None and left != denied:
        changed.append(_write("plugins-deny", left))
    if allowed is not None and not any(_same(_name(one), name) for one in allowed):
        changed.append(_write("plugins", [*allowed, name]))
    return changed or [f"{options.user_file()} does not keep {name} out"]


def disable(name: str) -> list[str]:
    """Put a plugin onto the deny-list; return what was changed."""
    denied = _listed("plugins-deny") or []
    if any(_same(one, name) for one in denied):
        return [f"{options.user_file()} keeps {name} out already"]
    return [_write("plugins-deny", [*denied, name])]


def _listed(key: str) -> list[str] | None:
    """Return a list in the user's file, or None where it has none."""
    text = options.of_user().get(key)
    return None if text is None else [part.strip() for part in text.split(",") if part.strip()]


def _name(pin: str) -> str:
    ((name, _, _),) = _config.parse("OPKIT_PLUGINS", pin)
    return str(name)


def _same(one: str, other: str) -> bool:
    return one == other or normalized(one) == normalized(other)


def _write(key: str, names: Sequence[str]) -> str:
    """Write a list into the user's file, in the place of the one that was there."""
    path = options.user_file()
    os.makedirs(os.path.dirname(path), exist_ok=True)
    before = ""
    if os.path.exists(path):
        with open(path, encoding="utf-8") as file:
            before = file.read()
    line = f"{key} = {json.dumps(list(names), ensure_ascii=False)}"
    old = re.compile(rf'^{key}[ \t]*=[ \t]*(\[[^\]]*\]|"[^"\n]*"|\'[^\'\n]*\')[^\n]*', re.MULTILINE)
    after, found = old.subn(lambda _: line, before, count=1)
    text = after if found else f"{line}\n{before}"
    unfinished = f"{path}.{os.getpid()}"
    with open(unfinished, "w", encoding="utf-8") as file:
        file.write(text)
    os.replace(unfinished, path)
    return f"{path} now has {line}"

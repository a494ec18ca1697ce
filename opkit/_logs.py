"""What opkit tells of its work: one logger a room, `opkit.build`, `opkit.select`, …, of Python's `logging`.

They say nothing until they are asked to, by OPKIT_LOGS or by a program that sets them up as it does its own.
Responsible for the names, the levels and the one handler; what is said, and when, is the rooms' part.
"""

from __future__ import annotations

import logging
import sys

from opkit import _config

INFO = logging.INFO
_FORMAT = "[%(asctime)s.%(msecs)03d] %(name)s: %(message)s"


def logger(room: str) -> logging.Logger:
    """Return the logger of a room.

    >>> logger("build").name
    'opkit.build'
    """
    assert room in _config.ROOMS
    return logging.getLogger(f"opkit.{room}")


class _Stderr(logging.StreamHandler):  # type: ignore[type-arg]
    """Writes where stderr is now, not where it was when opkit was imported."""

    def __init__(self) -> None:
        logging.Handler.__init__(self)
        self.setFormatter(logging.Formatter(_FORMAT, "%H:%M:%S"))

    @property
    def stream(self):  # type: ignore[no-untyped-def]
        return sys.stderr


def set_up() -> None:
    """Have the loggers say what OPKIT_LOGS asks for.

    Raises:
        ConfigError: it names a room that there is not.
    """
    asked: dict[str, int] = _config.get("OPKIT_LOGS")
    top = logging.getLogger("opkit")
    for handler in [
        handler for handler in top.handlers if isinstance(handler, (_Stderr, logging.NullHandler))
    ]:
        top.removeHandler(handler)
    for room in _config.ROOMS:
        logger(room).setLevel(asked.get(room, logging.NOTSET))
    # Without any handler Python writes errors to stderr, which opkit raises.
    top.addHandler(_Stderr() if asked else logging.NullHandler())
    top.propagate = not asked  # else a program that logs as well would say everything twice


set_up()

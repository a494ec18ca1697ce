"""Whether this process may still build, load and select: `freeze`, OPKIT_FROZEN, and CUDA graphs being captured.

Responsible for who may, and for raising or warning; what a call would do, and how that is said, is `dispatch.frozen`.
It belongs to the process. `opkit.prepare` is exempt, on its thread and on the autograd threads that work for it.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from types import TracebackType
from typing import NamedTuple

from opkit import _config
from opkit.errors import FrozenError, warn

_said: str | None = None  # by `freeze`: "error", "warn" or "" for not frozen; None: what OPKIT_FROZEN says
_PREPARING = "opkit_preparing"  # the thread's own, see `_torch.stash`


class Hold(NamedTuple):
    """Why nothing new may be built, loaded or selected; `mode` is `error`, `warn` or `capture`."""

    why: str
    mode: str


class Event(NamedTuple):
    """Something that was new to the process: `what` is `selected`, `loaded` or `built`."""

    what: str
    op: str
    backend: str
    arguments: str = ""
    seconds: float = 0.0


class freeze:  # noqa: N801  (named like torch.set_grad_enabled: it acts when called, and `with` takes it back)
    """Make it an error to build, to load a plugin, or to select another kernel than before.

    Calls like those that `opkit.prepare` made, or that were made until now, go on; others raise, before anything
    happens, and name the op, its arguments and the line that prepares them. What counts is the kernel: a call whose
    device, dtype (of the first tensor) and preference (`use_backend`, `require`) were seen may be of any shape,
    unless a condition (`when=`), what was measured of its size (`opkit.tune`), or a kernel registered meanwhile has it
    run a kernel that was not selected for them.

    It holds for the whole process, all threads and compiled functions included, until it is called again, or to the
    end of the `with`. OPKIT_FROZEN=1 (or `warn`) says the same from the start; what is said here counts more.
    `opkit.prepare`, `opkit.plugins.load` and the commands go on working; `Op.build` and `opkit.cpp.load` raise where
    the library is in no cache.

    While a CUDA graph is captured, what would build, load, or run another kernel than before always raises.

    Args:
        warn: warn, and go on.

    Raises:
        FrozenError: later, at a call that was not prepared.

    Example:
        >>> import opkit, torch
        >>> @opkit.op("doc::twice_frozen", shapes="*b -> *b")
        ... def twice_frozen(x: torch.Tensor) -> torch.Tensor:
        ...     return 2 * x
        >>> _ = opkit.prepare(twice_frozen, [(torch.zeros(3),)])
        >>> with opkit.freeze():
        ...     twice_frozen(torch.ones(2))
        ...     try:
        ...         twice_frozen(torch.ones(2, dtype=torch.float64))
        ...     except opkit.FrozenError as error:
        ...         print(error.prepare)
        tensor([2., 2.])
        opkit.prepare('doc::twice_frozen', [(torch.zeros(2, dtype=torch.float64),)])
    """

    def __init__(self, *, warn: bool = False) -> None:
        self._before = _say("warn" if warn else "error")

    def __enter__(self) -> None:
        pass

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        _say(self._before)


def _say(said: str | None) -> str | None:
    global _said
    before, _said = _said, said
    return before


@contextlib.contextmanager
def thawed() -> Iterator[None]:
    """Let the whole process build and load, whatever was said: for a command, whose purpose that is."""
    before = _say("")
    try:
        yield
    finally:
        _say(before)


@contextlib.contextmanager
def preparing(listed: list[Event]) -> Iterator[None]:
    """Let this thread build, load and select, and list what that was."""
    from opkit import _torch

    before = _torch.stashed(_PREPARING)
    _torch.stash(listed, _PREPARING)
    try:
        yield
    finally:
        _torch.stash(before, _PREPARING)


def hold() -> Hold | None:
    """Return why nothing new may happen in this thread now, or None."""
    if is_capturing():
        return Hold("a CUDA graph is being captured", "capture")
    mode = _config.get("OPKIT_FROZEN") if _said is None else _said
    if not mode or events() is not None:
        return None
    why = "OPKIT_FROZEN is set" if _said is None else "opkit.freeze() is in force"
    return Hold(why, mode)


def refuse(held: Hold, text: str, *, would: str, op: str | None = None, prepare: str | None = None) -> None:
    """Raise FrozenError, or where that is enough, warn."""
    if held.mode != "warn":
        raise FrozenError(text, op=op, would=would, prepare=prepare)
    warn(text)


def events() -> list[Event] | None:
    """Return where what happens on this thread is listed, if it is `preparing`."""
    torch = sys.modules.get("opkit._torch")
    found: list[Event] | None = None if torch is None else torch.stashed(_PREPARING)
    return found


def refuse_build(label: str) -> None:
    """Raise, or warn, where nothing may be built; `label` says what is not in any cache."""
    held = hold()
    if held is not None:
        refuse(
            held,
            f"building {label}: {held.why}, and it is in no cache; expected what was built before. Build it first, "
            "with opkit.prepare or the command `opkit build`, or look whether OPKIT_CACHE_DIR is the folder that it "
            "was built into.",
            would="build",
        )


def is_capturing() -> bool:
    """Whether a CUDA graph is being captured; asks torch only where it is imported."""
    if not hasattr(sys.modules.get("torch"), "cuda"):
        return False
    from opkit import _torch

    return _torch.is_capturing()

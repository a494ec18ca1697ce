"""One call into a plugin's code, with everything around it that keeps the process whole.

    watchdog    interrupts it where it hangs
    quarantine  has the next process know, should this one die of it
    natives     tries its native libraries before they are opened here
    settings    puts torch's settings back
    patches     notices what it replaces in torch

Says what happened and leaves it to the caller what that means for the plugin.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Generic, NamedTuple, TypeVar

from opkit.plugins import patches, quarantine, trial
from opkit.plugins.natives import Natives, Refusal
from opkit.plugins.patches import Patches
from opkit.plugins.settings import Settings
from opkit.plugins.watchdog import HungError, Stopped, Watchdog

T = TypeVar("T")


class Subject(NamedTuple):
    """The plugin that is called.

    Attributes:
        name: the plugin's.
        version: of its distribution, and of what else matters: a quarantine holds for it alone.
        natives: its native libraries.
        declared: what its manifest says that it changes in torch.
        limit: seconds that a call may take, 0 for any number.
    """

    name: str
    version: str
    natives: Natives
    declared: Sequence[str] = ()
    limit: float = 0


@dataclass(frozen=True)
class Outcome(Generic[T]):
    """What a call came to: a value, or the exception that ended it.

    Attributes:
        refusals: the native libraries that it was not let open.
        notes: what it changed and left behind, in words.
    """

    value: T | None
    error: BaseException | None
    refusals: Sequence[Refusal]
    notes: Sequence[str]


def call(subject: Subject, doing: str, function: Callable[[], T]) -> Outcome[T]:
    """Run `function`, and contain whatever it raises.

    Raises:
        Stopped: the user pressed Ctrl-C meanwhile. A KeyboardInterrupt that the plugin raises is contained.
    """
    value: T | None = None
    error: BaseException | None = None
    known = len(subject.natives.refusals)
    try:
        with (
            _changes(subject.declared) as changes,
            quarantine.marked(subject.name, subject.version, doing),
            subject.natives.watched(),
        ):
            try:
                value = Watchdog(doing, limit=subject.limit).run(function)
            except Stopped:
                raise
            except BaseException as raised:
                error = raised
    except KeyboardInterrupt as stop:  # of the plugin's own none comes so far
        raise Stopped(*stop.args).with_traceback(stop.__traceback__) from None
    refusals = subject.natives.refusals[known:]
    _remember(subject, error, refusals)
    return Outcome(value, error, refusals, changes.notes())


def forgive(name: str) -> bool:
    """Let a plugin have another try: forget why it is left out, and what became of its native libraries."""
    return any([quarantine.lift(name), trial.forget(name)])


class _Changes:
    """What a call changes in torch, and the threads that it leaves."""

    def __init__(self, declared: Sequence[str]) -> None:
        self._declared = declared
        self._set: list[str] = []
        self._replaced: list[str] = []
        self._threads: list[str] = []
        self.begin()

    def begin(self) -> None:
        """Go by how things are now."""
        self._settings = Settings()
        self._patches = Patches()
        self._running = set(threading.enumerate())

    def look(self) -> None:
        """Note what was changed, and put the settings back."""
        self._set += self._settings.put_back(self._declared)
        self._replaced += self._patches.found()
        self._threads += [
            thread.name
            for thread in threading.enumerate()
            if thread not in self._running and thread.is_alive() and not thread.daemon
        ]

    def notes(self) -> list[str]:
        """Return what was changed, in words."""
        replaced = sorted(self._replaced)
        wild = patches.undeclared(replaced, self._declared)
        said = {
            "as its manifest says, it called": [name for name in self._set if name in self._declared],
            "it changed a setting, which was put back": [n for n in self._set if n not in self._declared],
            "as its manifest says, it replaced": [name for name in replaced if name not in wild],
            "it replaced, without its manifest saying so": wild,
            "it left threads running that the end of the process waits for": self._threads,
        }
        return [f"{what}: {', '.join(names)}" for what, names in said.items() if names]


_calls = threading.local()  # the changes of each thread's calls, the innermost last


@contextlib.contextmanager
def _changes(declared: Sequence[str]) -> Iterator[_Changes]:
    """Note what is changed meanwhile. In a call within a call that is not put down to the outer one."""
    stack: list[_Changes] = _calls.__dict__.setdefault("stack", [])
    if stack:
        stack[-1].look()
    changes = _Changes(declared)
    stack.append(changes)
    try:
        yield changes
    finally:
        changes.look()
        stack.pop()
        if stack:
            stack[-1].begin()


def _remember(subject: Subject, error: BaseException | None, refusals: Sequence[Refusal]) -> None:
    """Let the next process know what it need not find out again."""
    harmful = [refusal for refusal in refusals if refusal.cause != "conflict"]
    if isinstance(error, HungError):
        quarantine.suspect(subject.name, subject.version, f"it hung twice in a row: {error}", error.where)
    elif error is not None and harmful:
        quarantine.put(subject.name, subject.version, str(harmful[0]), harmful[0].said)
    else:
        quarantine.clear(subject.name, subject.version)

"""What became of one plugin, and why.

    discovered ─→ rejected (policy | version | conflict | probe)
              ├─→ quarantined
              └─→ registered ─→ loaded | failed

`registered`: what it brings is known and none of it is imported. A plugin of which only some kernels fail is
`failed`, and its others are in force. What leads from one state to the next is the loader's part.
"""

from __future__ import annotations

import threading
import traceback
from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal

from opkit.plugins.discovery import Found

if TYPE_CHECKING:
    from opkit.plugins.manifest import Manifest
    from opkit.plugins.natives import Natives, Refusal
    from opkit.plugins.registry import Registration, Registry
    from opkit.plugins.standin import StandIn

Status = Literal["discovered", "rejected", "registered", "loaded", "failed", "quarantined"]
Cause = Literal["policy", "version", "conflict", "probe"]


class State:
    """One plugin.

    Attributes:
        found: where it is and what it says of itself.
        cause: why it is rejected, in one word.
        rule: what decided: a variable, a file, a line of the manifest.
        reason: what happened, in a sentence without a full stop.
        remedy: what to do about it, one line.
        traceback: of the first failure, from the plugin's first frame on.
        doing: what was being done to it last, for the text of a failure.
        notes: what else there is to know, such as patches of torch.
        stand_ins: the kernels that the manifest names, fetched or not.
        registrations: the kernels that its function registered.
        registry: what its function was called with.
        remembered: what it registered the last time, where it has no manifest.
        natives: its native libraries, once it was called.
        refusals: those that its last call was not let open.
        wants_ops: whether its ops and kernels are wanted, and not only its device.
        called: whether the entry point's function has been called.
        has_run: whether code of it has run in this process and come to something.
        reported: whether the user was told of the failure.
    """

    status: Status = "discovered"
    cause: Cause | Literal[""] = ""
    rule = ""
    reason = ""
    remedy = ""
    traceback = ""
    doing = ""
    registry: Registry | None = None
    remembered: Manifest | None = None
    natives: Natives | None = None
    refusals: Sequence[Refusal] = ()
    wants_ops = True
    called = False
    has_run = False
    reported = False

    def __init__(self, found: Found) -> None:
        self.found = found
        self.notes: list[str] = []
        self.stand_ins: list[StandIn] = []
        self.registrations: list[Registration] = []
        self._threads: list[int] = []

    @property
    def manifest(self) -> Manifest | None:
        """What is known of the plugin without importing it: its manifest, or what is remembered."""
        return self.found.manifest or self.remembered

    @property
    def is_out(self) -> bool:
        """Whether nothing of it is used."""
        return self.status in ("rejected", "quarantined") or (
            self.status == "failed" and not self.is_in_force
        )

    @property
    def is_in_force(self) -> bool:
        """Whether some of what it brings is used, or is still to be loaded."""
        promised = self.manifest is not None and bool(self.manifest.ops) and not self.called
        return bool(self.registrations) or promised or not all(s.gone for s in self.stand_ins)

    @property
    def is_wrong(self) -> bool:
        """Whether the user should know of it: everything that keeps it out, but what the user asked for."""
        return self.status in ("failed", "quarantined") or (
            self.status == "rejected" and self.cause in ("version", "conflict")
        )

    @property
    def is_loading(self) -> bool:
        """Whether this thread is in a call of the plugin."""
        return threading.get_ident() in self._threads

    def enter(self) -> None:
        """Note that this thread calls the plugin from now on."""
        self._threads.append(threading.get_ident())

    def leave(self) -> None:
        """Note that the call is over."""
        self._threads.remove(threading.get_ident())

    def leave_behind(self, thread: int) -> bool:
        """Forget the calls of other threads than this one, which a fork has left behind; return whether there were."""
        stay = [one for one in self._threads if one == thread]
        were, self._threads = stay != self._threads, stay
        return were

    def reject(self, cause: Cause, *, rule: str, reason: str, remedy: str) -> None:
        """Leave the plugin out."""
        self.status, self.cause = "rejected", cause
        self.rule, self.reason, self.remedy = rule, reason, remedy

    def quarantine(self, reason: str, remedy: str, *, rule: str = "it broke a process") -> None:
        """Leave the plugin out, as it ended a process or would."""
        self.status, self.rule, self.reason, self.remedy = "quarantined", rule, reason, remedy

    def fail(self, reason: str, remedy: str, error: BaseException | None = None) -> None:
        """Note a failure; of several, all reasons and the first traceback are kept."""
        if reason in self.reason:
            return
        self.status = "failed"
        self.reason = f"{self.reason}; {reason}" if self.reason else reason
        self.remedy = self.remedy or remedy
        if error is not None and not self.traceback:
            self.traceback = _format(error)


def describe(error: BaseException) -> str:
    """Return an exception in one line."""
    try:
        text = str(error).strip().partition("\n")[0]
    except Exception:
        text = "its text cannot be shown"
    return f"{type(error).__name__}: {text}".removesuffix(": ").rstrip(".")


def blame(found: Found) -> str:
    """Return what to do about a plugin that is at fault itself."""
    return f"Report it to the authors of {found.distribution}, or take it out: pip uninstall {found.distribution}."


def remedy(found: Found, error: BaseException) -> str:
    """Return what to do about what a plugin raised."""
    if isinstance(error, ModuleNotFoundError) and error.name:
        missing = error.name.partition(".")[0]
        if missing != found.module.partition(".")[0]:
            return f"Install what provides the module {missing!r}, or take it out: pip uninstall {found.distribution}."
        return f"Reinstall {found.distribution}: its entry point names a module that is not there."
    return blame(found)


def _format(error: BaseException) -> str:
    """Return the traceback as text, from the plugin's first frame on."""
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None and _is_ours(trace.tb_frame.f_code.co_filename):
        trace = trace.tb_next
    return "".join(traceback.format_exception(type(error), error, trace))


def _is_ours(filename: str) -> bool:
    return filename.startswith((_ROOM, "<frozen importlib")) or filename.endswith("importlib/__init__.py")


_ROOM = __file__.rpartition("/")[0]

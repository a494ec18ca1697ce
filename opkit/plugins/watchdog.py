"""A call that must come back: one that hangs in Python is interrupted, and it is said where it hung.

On the main thread the interruption comes the way Ctrl-C does, so that it also ends waiting for a lock, a
socket or a child process. On any other thread it comes between two steps of the interpreter: there a
call that waits is interrupted when its wait is over. What hangs in C and never looks for signals cannot
be interrupted at all; stderr then says so, and where. Opening native libraries is tried out beforehand
instead, see trial.

This module says nothing of what the call was for, and remembers nothing.
"""

from __future__ import annotations

import _thread
import contextlib
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any, TypeVar

T = TypeVar("T")

_AGAIN = 1.0  # seconds until a call that swallowed the interruption gets another
_SAY_AFTER = 3  # interruptions without effect, until stderr says so


class HungError(Exception):
    """A call did not come back in time; `where` is the stack it was interrupted in, as text."""

    def __init__(self, doing: str, limit: float, place: str, where: str) -> None:
        super().__init__(f"{doing} had not come back after {limit:g} s, and was interrupted at {place}")
        self.place = place
        self.where = where


class Stopped(KeyboardInterrupt):
    """The user pressed Ctrl-C while the call ran; a KeyboardInterrupt that is none of these is the call's own."""


class _Stop(BaseException):
    """What is raised in a call that hangs; no `except Exception` of the plugin catches it."""


_calls = threading.local()  # the watchdogs of each thread, the innermost call last


@contextlib.contextmanager
def paused() -> Iterator[None]:
    """Let time pass without counting it: what opkit itself does, or waits for, inside a watched call."""
    watched: list[Watchdog] = list(getattr(_calls, "stack", ()))
    started = time.monotonic()
    for watchdog in watched:
        watchdog._paused += 1
    try:
        yield
    finally:
        for watchdog in watched:
            watchdog._deadline += time.monotonic() - started
            watchdog._paused -= 1


class Watchdog:
    """Watches one call.

    Args:
        doing: what the call does, for texts: `importing opkit_fast`.
        limit: seconds until it is interrupted; 0 for never.

    Example:
        >>> import time
        >>> Watchdog("waiting", limit=0.05).run(lambda: time.sleep(60))
        Traceback (most recent call last):
        opkit.plugins.watchdog.HungError: waiting had not come back after 0.05 s, and was interrupted at ...
    """

    def __init__(self, doing: str, *, limit: float) -> None:
        self._doing = doing
        self._limit = limit
        self._thread = threading.get_ident()
        self._place = self._where = ""
        self._is_over = self._is_firing = self._has_signalled = False
        self._paused = 0
        self._deadline = 0.0
        self._end, self._ended = _thread.allocate_lock(), _thread.allocate_lock()
        self._former: Any = None  # the handler of SIGINT, where ours stands in for it
        self._handler = self._on_signal  # one object, to know it again
        self._was_stopped_by_user = False

    def run(self, function: Callable[[], T]) -> T:
        """Call `function` and return what it returns.

        Raises:
            HungError: it did not come back in time.
            Stopped: the user pressed Ctrl-C meanwhile.
        """
        with paused():  # a call within a call: the outer one is not to blame for the time
            try:
                try:
                    self._arm()
                    result = function()
                finally:
                    self._disarm()
            except BaseException as error:
                self._disarm()  # the interruption may have come while that was done
                if self._where:
                    raise self._hung() from (None if isinstance(error, _Stop) else error)
                if self._was_stopped_by_user and isinstance(error, KeyboardInterrupt):
                    raise Stopped(*error.args).with_traceback(error.__traceback__) from None
                raise
        if self._where:  # it swallowed the interruption, and what it returns may be half of something
            raise self._hung()
        return result

    def _hung(self) -> HungError:
        return HungError(self._doing, self._limit, self._place, self._where)

    def _arm(self) -> None:
        stack = _calls.__dict__.setdefault("stack", [])
        stack.append(self)
        former = signal.getsignal(signal.SIGINT)
        if former is not None and threading.main_thread().ident == self._thread:
            with contextlib.suppress(ValueError):  # a sub-interpreter: Python has no signals there
                signal.signal(signal.SIGINT, self._handler)
                self._former = former
        if self._limit:
            self._deadline = time.monotonic() + self._limit
            self._end.acquire()
            self._ended.acquire()
            with contextlib.suppress(RuntimeError):  # no more threads: the call goes unwatched
                # Not threading.Thread: its start waits for the thread, which takes ten times as long.
                _thread.start_new_thread(self._watch, ())

    def _disarm(self) -> None:
        while True:
            try:
                self._is_over = True
                self._finish()
                return
            except _Stop:  # sent before, and arrived only now
                continue

    def _finish(self) -> None:
        stack = _calls.stack
        if self in stack:
            stack.remove(self)
        with contextlib.suppress(RuntimeError):  # it is open already
            self._end.release()
        if self._is_firing:
            # After this no more is sent, and what was sent can be taken back. It is not acquired: an interruption
            # between that and the release would have this wait for itself.
            while self._ended.locked():
                time.sleep(0.0002)
            _raise_in(self._thread, None)
        if self._former is not None and signal.getsignal(signal.SIGINT) is self._handler:
            signal.signal(signal.SIGINT, self._former)

    def _watch(self) -> None:
        """Run on a thread of its own: wait until the call is over, and interrupt it where that takes too long."""
        sent = 0
        try:
            while not self._end.acquire(timeout=max(0.001, self._deadline - time.monotonic())):
                if self._paused:
                    self._deadline = max(self._deadline, time.monotonic() + 0.05)
                elif time.monotonic() >= self._deadline:
                    self._is_firing = True  # before the look at whether it is over: see _finish
                    if self._is_over:
                        return
                    self._interrupt()
                    sent += 1
                    if sent == _SAY_AFTER:
                        self._say()
                    self._deadline = time.monotonic() + _AGAIN
        finally:
            self._ended.release()

    def _interrupt(self) -> None:
        frame = sys._current_frames().get(self._thread)
        if not self._where and frame is not None:
            stack = _of_the_call(traceback.extract_stack(frame))
            self._place = f"{stack[-1].filename}:{stack[-1].lineno} in {stack[-1].name}"
            self._where = "".join(traceback.format_list(stack))
        if self._former is not None:
            self._has_signalled = True
            signal.pthread_kill(self._thread, signal.SIGINT)
        else:
            _raise_in(self._thread, _Stop)

    def _say(self) -> None:
        from opkit.cpp import _progress

        _progress.say(
            f"opkit: {self._doing} has not come back after {self._limit:g} s and cannot be interrupted: it waits "
            f"in native code, called at {self._place}"
        )

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if self._has_signalled:
            self._has_signalled = False
            if not self._is_over:
                raise _Stop
            return
        self._was_stopped_by_user = True
        if callable(self._former):
            self._former(number, frame)
        elif self._former == signal.SIG_DFL:
            signal.signal(number, signal.SIG_DFL)
            signal.raise_signal(number)


def _raise_in(thread: int, error: type[BaseException] | None) -> None:
    """Have a thread raise an exception before its next step, or take that back."""
    import ctypes

    raised = None if error is None else ctypes.py_object(error)
    ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(thread), raised)


def _of_the_call(stack: traceback.StackSummary) -> list[traceback.FrameSummary]:
    """Return the frames within the call, without those that led to it."""
    ours = [n for n, frame in enumerate(stack) if (frame.filename, frame.name) == (__file__, "run")]
    return stack[ours[-1] + 1 :] if ours and ours[-1] + 1 < len(stack) else stack[-1:]

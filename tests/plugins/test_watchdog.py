"""Calls that hang are interrupted, whatever they wait for; those that do not are not touched."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time

import pytest

from opkit.plugins.watchdog import HungError, Stopped, Watchdog, paused

LONG = 30.0  # seconds; a test that waits for it has failed


def spin():
    while True:
        pass


def wait_for_a_lock():
    lock = threading.Lock()
    lock.acquire()
    lock.acquire()


def wait_for_a_process():
    process = subprocess.Popen(["sleep", str(LONG)])
    try:
        process.wait()
    finally:
        process.kill()
        process.wait()


def swallow():
    until = time.monotonic() + LONG
    while time.monotonic() < until:
        try:
            time.sleep(LONG)
        except BaseException:
            return "half"


HANGING = {
    "spin": spin,
    "sleep": lambda: time.sleep(LONG),
    "lock": wait_for_a_lock,
    "process": wait_for_a_process,
    "swallow": swallow,
}


def on_a_thread(function):
    """Return what `function` returns, or the exception that it raises, on another thread."""
    found = []

    def run():
        try:
            found.append(function())
        except BaseException as error:
            found.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join(LONG)
    return found[0]


@pytest.mark.parametrize("case", HANGING)
def test_a_call_that_hangs_is_interrupted_and_said_where(case):
    started = time.monotonic()
    with pytest.raises(
        HungError, match=r"^waiting had not come back after 0.1 s, and was interrupted at .*:\d+ in "
    ) as caught:
        Watchdog("waiting", limit=0.1).run(HANGING[case])
    assert time.monotonic() - started < LONG / 2
    assert "test_watchdog.py" in caught.value.where
    assert "watchdog.py" not in caught.value.where.replace("test_watchdog.py", "")  # opkit's own frames


def test_the_interrupted_process_is_whole_again():
    handler = signal.getsignal(signal.SIGINT)
    for _ in range(3):
        with pytest.raises(HungError):
            Watchdog("waiting", limit=0.02).run(spin)
    assert signal.getsignal(signal.SIGINT) is handler
    assert Watchdog("adding", limit=LONG).run(lambda: 1 + 1) == 2
    time.sleep(0.05)  # an interruption that came late would end this
    with pytest.raises(KeyboardInterrupt):
        signal.raise_signal(signal.SIGINT)


def test_a_call_that_ends_just_in_time_leaves_no_interruption_behind():
    ended = []

    def calls():
        for _ in range(200):
            try:
                ended.append(Watchdog("waiting", limit=0.002).run(lambda: time.sleep(0.00195)))
            except HungError as error:
                ended.append(error)
            sum(range(1000))
        return True

    assert calls() is True
    assert on_a_thread(calls) is True
    assert len(ended) == 400


def test_a_call_on_another_thread_is_interrupted_between_two_steps():
    error = on_a_thread(lambda: Watchdog("spinning", limit=0.1).run(spin))
    assert isinstance(error, HungError)
    assert " in spin" in str(error)


def test_what_a_call_returns_and_raises_comes_through():
    assert Watchdog("x", limit=LONG).run(lambda: 5) == 5
    assert Watchdog("x", limit=0).run(lambda: 5) == 5
    with pytest.raises(SystemExit, match="3"):
        Watchdog("x", limit=LONG).run(lambda: sys.exit(3))
    with pytest.raises(ValueError) as caught:
        Watchdog("x", limit=0.05).run(raise_when_interrupted)
    assert str(caught.value) == "no time"


def raise_when_interrupted():
    raise ValueError("no time")


def test_what_an_interrupted_call_raises_instead_is_the_cause():
    def unwilling():
        try:
            time.sleep(LONG)
        except BaseException:
            raise ValueError("was busy") from None

    with pytest.raises(HungError) as caught:
        Watchdog("x", limit=0.05).run(unwilling)
    assert isinstance(caught.value.__cause__, ValueError)


def test_ctrl_c_of_the_user_is_told_from_what_a_call_raises():
    with pytest.raises(Stopped):
        Watchdog("x", limit=LONG).run(lambda: os.kill(os.getpid(), signal.SIGINT) or time.sleep(LONG))

    def interrupts():
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt) as caught:
        Watchdog("x", limit=LONG).run(interrupts)
    assert type(caught.value) is KeyboardInterrupt


@pytest.mark.parametrize("handler", [signal.SIG_IGN, signal.SIG_DFL], ids=["ignored", "default"])
def test_a_program_that_does_not_want_ctrl_c_is_watched_too(handler):
    before = signal.signal(signal.SIGINT, handler)
    try:
        with pytest.raises(HungError):
            Watchdog("x", limit=0.05).run(lambda: time.sleep(LONG))
        assert signal.getsignal(signal.SIGINT) == handler
        if handler == signal.SIG_IGN:
            Watchdog("x", limit=LONG).run(lambda: signal.raise_signal(signal.SIGINT))
    finally:
        signal.signal(signal.SIGINT, before)


def test_a_handler_that_the_call_installs_stays():
    before = signal.getsignal(signal.SIGINT)
    mine = lambda number, frame: None
    try:
        Watchdog("x", limit=LONG).run(lambda: signal.signal(signal.SIGINT, mine))
        assert signal.getsignal(signal.SIGINT) is mine
    finally:
        signal.signal(signal.SIGINT, before)


def test_time_spent_in_a_call_within_is_not_counted_and_the_inner_one_is_blamed():
    def outer():
        with pytest.raises(HungError, match="^inner had not"):
            Watchdog("inner", limit=0.4).run(lambda: time.sleep(LONG))
        return "went on"

    assert Watchdog("outer", limit=0.2).run(outer) == "went on"


def test_paused_time_is_not_counted():
    def waits():
        with paused():
            time.sleep(0.4)
        return "came back"

    assert Watchdog("x", limit=0.2).run(waits) == "came back"
    with pytest.raises(HungError):
        Watchdog("x", limit=0.1).run(lambda: (waits(), time.sleep(LONG)))


def test_stderr_says_that_native_code_cannot_be_interrupted(compiled):
    library = compiled(
        "#include <time.h>\n#include <unistd.h>\n"
        "void busy(int s) { for (time_t end = time(0) + s; time(0) < end;) usleep(10000); }"
    )
    script = (
        "import ctypes; from opkit.plugins.watchdog import Watchdog\n"
        f"Watchdog('calling fast', limit=0.1).run(lambda: ctypes.CDLL({library!r}).busy(4))\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60)
    said = (
        "opkit: calling fast has not come back after 0.1 s and cannot be interrupted: it waits in native code"
    )
    assert f"{said}, called at <string>:2 in <lambda>\n" in done.stderr
    assert "HungError: calling fast had not come back" in done.stderr  # once it did

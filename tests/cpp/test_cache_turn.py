"""One build for many: who builds, who waits, and what those get."""

from __future__ import annotations

import fcntl
import os
import signal
import socket
import threading
import time
import types
from pathlib import Path

import pytest

from opkit.cpp import _owner, _progress, _turn, cache
from opkit.cpp._owner import Owner
from opkit.errors import BuildError, Diagnostic
from tests.cpp.cache_tools import Builder, exit_code, forked, obtain, temporaries, until

pytestmark = pytest.mark.usefixtures("cache_dir")


class Slow:
    """A build that waits until it is told to go on, in any process."""

    def __init__(self, folder: Path, content: bytes = b"theirs", error: BuildError | None = None) -> None:
        self.started, self.go, self.content, self.error = folder / "started", folder / "go", content, error

    def __call__(self, work):
        self.started.write_text("")
        assert until(self.go.exists)
        if self.error:
            raise self.error
        return Builder(self.content)(work)


def count(path: Path):
    """A build that leaves a line for each time it runs, in any process."""

    def build(work):
        with path.open("a") as stream:
            stream.write("built\n")
        time.sleep(0.2)
        return Builder()(work)

    return build


def threads(number: int, function) -> list:
    results = []

    def run():
        try:
            results.append(function())
        except BuildError as error:
            results.append(error)

    started = [threading.Thread(target=run) for _ in range(number)]
    for thread in started:
        thread.start()
    return [started, results]


def waiting_for(cache_dir: Path, key="k") -> bool:
    """Whether the build of `key` is in progress."""
    with (cache_dir / "locks" / f"f-{key}.lock").open() as stream:
        try:
            fcntl.flock(stream, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
    return False


def test_eight_processes_cause_one_build(tmp_path, cache_dir):
    built, go = tmp_path / "built", tmp_path / "go"
    library = str(cache_dir / "lib" / "f-k")

    def work():
        until(go.exists)
        assert str(obtain(count(built))).startswith(library)

    pids = [forked(work) for _ in range(8)]
    go.write_text("")
    assert [exit_code(pid) for pid in pids] == [0] * 8
    assert built.read_text() == "built\n"
    assert temporaries(cache_dir) == []


def test_eight_threads_cause_one_build(tmp_path):
    built = tmp_path / "built"
    started, results = threads(8, lambda: obtain(count(built)))
    for thread in started:
        thread.join()
    assert len(set(results)) == 1
    assert built.read_text() == "built\n"


def test_one_label_and_different_keys_at_once_give_each_its_own(tmp_path):
    def build(key):
        def run(work):
            time.sleep(0.05)
            return Builder(key.encode())(work)

        return run

    def work(key):
        assert obtain(build(key), key).read_text() == key

    pids = [forked(lambda key=key: work(key)) for key in ("k1", "k2", "k3")]
    assert [exit_code(pid) for pid in pids] == [0, 0, 0]


@pytest.fixture
def said(monkeypatch):
    """What those who wait say; they do so at once."""
    lines = []
    monkeypatch.setattr(_turn, "_SAY_AFTER", 0.02)
    monkeypatch.setattr(_turn, "_LOOK_AFTER", 0.02)
    monkeypatch.setattr(_progress, "say", lines.append)
    return lines


def test_who_waits_says_once_for_whom_and_since_when(tmp_path, said):
    slow = Slow(tmp_path)
    pid = forked(lambda: obtain(slow))
    assert until(slow.started.exists)
    mine = Builder(b"mine")
    started, results = threads(1, lambda: obtain(mine))
    assert until(lambda: said)
    time.sleep(0.1)
    slow.go.write_text("")
    started[0].join()
    assert exit_code(pid) == 0
    assert said == [f"opkit: waiting for f, which pid {pid} on {socket.gethostname()} builds since 0 s"]
    assert results[0].read_bytes() == b"theirs"
    assert mine.count == 0


@pytest.mark.parametrize(("rank", "wanted"), [(None, "text\n"), ("0", "text\n"), ("1", "")])
def test_only_one_rank_speaks(capsys, monkeypatch, rank, wanted):
    monkeypatch.delenv("RANK", raising=False)
    if rank:
        monkeypatch.setenv("RANK", rank)
    _progress.say("text")
    assert capsys.readouterr() == ("", wanted)


def test_those_who_waited_raise_the_same_error_without_building(tmp_path, cache_dir):
    error = BuildError(
        "building f: 1 error, at größe.cpp:3: no",
        op="demo::f",
        diagnostics=[Diagnostic("größe.cpp", 3, 1, "no")],
        log_path=tmp_path / "log.txt",
        command="g++ größe.cpp",
    )
    slow = Slow(tmp_path, error=error)

    def fails():
        with pytest.raises(BuildError):
            obtain(slow)

    pid = forked(fails)
    assert until(slow.started.exists)
    mine = Builder(b"mine")
    started, results = threads(3, lambda: obtain(mine))
    time.sleep(0.1)  # until they wait
    slow.go.write_text("")
    for thread in started:
        thread.join()
    assert exit_code(pid) == 0
    assert [type(result) for result in results] == [BuildError] * 3
    for found in results:
        assert str(found) == str(error)
        assert (found.op, found.diagnostics, found.log_path, found.command) == (
            error.op,
            error.diagnostics,
            error.log_path,
            error.command,
        )
    assert mine.count == 0
    assert obtain(mine).read_bytes() == b"mine"  # whoever comes later tries again


def test_who_waits_for_a_killed_builder_builds_though_an_older_build_failed(tmp_path, cache_dir):
    def fail(work):
        raise BuildError("old")

    with pytest.raises(BuildError, match="old"):
        obtain(fail)
    lock = cache_dir / "locks" / "f-k.lock"
    failure = lock.read_bytes()
    slow = Slow(tmp_path)
    pid = forked(lambda: obtain(slow))
    assert until(slow.started.exists)
    lock.write_bytes(failure)  # as it is until a builder has said who it is
    started, results = threads(1, lambda: obtain(Builder(b"mine")))
    time.sleep(0.1)
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    started[0].join()
    assert results[0].read_bytes() == b"mine"


def test_a_killed_build_blocks_nobody_and_is_collected(tmp_path, cache_dir):
    def build(work):
        (work.folder / "half.o").write_text("half")
        return Slow(tmp_path)(work)

    pid = forked(lambda: obtain(build))
    assert until((tmp_path / "started").exists)
    assert len(temporaries(cache_dir)) == 1
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    assert obtain(Builder()).read_bytes() == b"library"
    assert temporaries(cache_dir) == []


def test_a_lock_that_a_child_of_a_dead_builder_inherited_holds_nobody_up(tmp_path, cache_dir, said):
    child = tmp_path / "child"

    def build(work):
        child.write_text(str(forked(lambda: time.sleep(600))))
        return Slow(tmp_path)(work)

    pid = forked(lambda: obtain(build))
    assert until((tmp_path / "started").exists)
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    try:
        assert waiting_for(cache_dir)
        started, results = threads(3, lambda: obtain(Builder(b"mine")))
        for thread in started:
            thread.join(30)
        assert [result.read_bytes() for result in results] == [b"mine"] * 3
        assert not waiting_for(cache_dir)
    finally:
        os.kill(int(child.read_text()), signal.SIGKILL)


def test_a_lock_that_a_child_inherited_is_free_when_the_build_is_done(tmp_path, cache_dir):
    children = []

    def build(work):
        children.append(forked(lambda: time.sleep(600)))
        return Builder()(work)

    obtain(build)
    assert not waiting_for(cache_dir)
    os.kill(children[0], signal.SIGKILL)
    os.waitpid(children[0], 0)


def test_a_builder_that_is_stopped_holds_nobody_up(tmp_path, said):
    slow = Slow(tmp_path)
    pid = forked(lambda: obtain(slow))
    assert until(slow.started.exists)
    os.kill(pid, signal.SIGSTOP)
    try:
        assert obtain(Builder(b"mine")).read_bytes() == b"mine"
        slow.go.write_text("")
    finally:
        os.kill(pid, signal.SIGCONT)
    assert exit_code(pid) == 0
    assert cache.find("f-k").read_bytes() == b"mine"


def test_a_builder_that_never_ends_holds_nobody_up_for_ever(tmp_path, monkeypatch):
    monkeypatch.setattr(_turn, "_PATIENCE", 0.1)
    slow = Slow(tmp_path)
    pid = forked(lambda: obtain(slow))
    assert until(slow.started.exists)
    assert obtain(Builder(b"mine")).read_bytes() == b"mine"
    slow.go.write_text("")
    assert exit_code(pid) == 0


def test_a_lock_folder_that_vanishes_holds_nobody_up(tmp_path, cache_dir):
    slow = Slow(tmp_path)
    pid = forked(lambda: obtain(slow))
    assert until(slow.started.exists)
    started, results = threads(1, lambda: obtain(Builder(b"mine")))
    time.sleep(0.05)
    for path in (cache_dir / "locks").iterdir():
        path.unlink()
    started[0].join(30)
    assert results[0].read_bytes() == b"mine"
    slow.go.write_text("")
    assert exit_code(pid) == 0


def test_a_lock_whose_file_was_replaced_is_no_turn(tmp_path):
    path = tmp_path / "locks" / "f.lock"
    path.parent.mkdir()
    old = path.open("w")
    fcntl.flock(old, fcntl.LOCK_EX)
    entered = threading.Event()

    def wait():
        with _turn.take(path, "f"):
            entered.set()

    waiting = threading.Thread(target=wait)
    waiting.start()
    with path.with_name("new").open("w") as new:
        fcntl.flock(new, fcntl.LOCK_EX)
        time.sleep(0.05)  # until it waits
        path.with_name("new").replace(path)
        old.close()
        assert not entered.wait(0.2)
    assert entered.wait(60)
    waiting.join()


def test_without_locks_two_builds_of_one_key_give_one_library(monkeypatch):
    def no_lock(*args):
        raise OSError("no locks here")

    monkeypatch.setattr(fcntl, "flock", no_lock)

    def build(work):
        obtain(Builder(b"the faster one"))
        return Builder(b"the slower one")(work)

    assert obtain(build).read_bytes() == b"the faster one"


def test_without_locks_what_a_killed_build_left_is_collected(tmp_path, cache_dir, monkeypatch):
    def no_lock(*args):
        raise OSError("no locks here")

    monkeypatch.setattr(fcntl, "flock", no_lock)
    slow = Slow(tmp_path)
    pid = forked(lambda: obtain(slow))
    assert until(slow.started.exists)
    obtain(Builder(), "other")
    assert len(temporaries(cache_dir)) == 1
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    obtain(Builder(), "another")
    assert temporaries(cache_dir) == []


def test_a_lock_file_with_anything_in_it_is_taken(cache_dir):
    (cache_dir / "locks").mkdir(parents=True, mode=0o755)
    (cache_dir / "locks" / "f-k.lock").write_bytes(b'{"owner": "\xff"')
    cache_dir.chmod(0o700)
    assert obtain(Builder()).exists()


def test_an_interrupted_wait_leaves_no_open_file(tmp_path, monkeypatch):
    slow = Slow(tmp_path)
    started, _ = threads(1, lambda: obtain(slow))
    assert until(slow.started.exists)
    open_files = len(os.listdir("/proc/self/fd"))

    def interrupt(seconds):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(_turn, "time", types.SimpleNamespace(monotonic=time.monotonic, sleep=interrupt))
        with pytest.raises(KeyboardInterrupt):
            obtain(Builder())
    assert len(os.listdir("/proc/self/fd")) == open_files
    slow.go.write_text("")
    started[0].join()


def test_an_owner_is_known_by_more_than_its_pid():
    me = Owner.me()
    assert Owner.parse(me.dumps()) == me
    assert not me.is_gone()
    assert Owner(me.pid, me.host, me.where, "1", me.since).is_gone()
    assert not Owner(me.pid, me.host, "another kernel", "1", me.since).is_gone()
    assert str(Owner(1, "far", "another kernel", "1", 0.0)) == "pid 1 on far builds"
    zombie = forked(lambda: None)
    assert until(lambda: _owner._state(zombie)[0] == "Z")
    assert Owner(zombie, me.host, me.where, _owner._state(zombie)[1], 0.0).is_gone()
    os.waitpid(zombie, 0)
    assert Owner.parse(b"{}") is None
    assert Owner.parse(b"\xff") is None

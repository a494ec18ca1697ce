from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path

import pytest

from opkit import _config
from opkit.cpp import cache
from opkit.errors import BuildError


@pytest.fixture(autouse=True)
def cache_dir(tmp_path, monkeypatch):
    monkeypatch.setenv("OPKIT_CACHE_DIR", str(tmp_path / "cache"))
    _config.refresh()
    yield tmp_path / "cache"
    _config.refresh()


class Builder:
    """Builds a library with given content, and counts."""

    def __init__(self, content: bytes = b"library") -> None:
        self.content = content
        self.count = 0

    def __call__(self, work: cache.Workspace) -> Path:
        self.count += 1
        library = work.folder / "it.so"
        library.write_bytes(self.content)
        return library


def python(code: str, cache_dir: Path, **kwargs) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(code)],
        env={**os.environ, "OPKIT_CACHE_DIR": str(cache_dir), "PYTHONPATH": os.pathsep.join(sys.path)},
        text=True,
        **kwargs,
    )


def test_obtain_builds_once_and_publishes_whole(cache_dir):
    build = Builder()
    first = cache.obtain(lambda: "k1", label="demo::f [cpp]", build=build)
    second = cache.obtain(lambda: "k1", label="demo::f [cpp]", build=build)
    assert first == second
    assert first.parent == cache_dir / "lib" / "demo-f-cpp-k1"
    assert first.read_bytes() == b"library"
    assert build.count == 1
    assert list((cache_dir / "tmp").iterdir()) == []


def test_another_key_is_another_entry():
    one = cache.obtain(lambda: "k1", label="f", build=Builder(b"1"))
    two = cache.obtain(lambda: "k2", label="f", build=Builder(b"2"))
    assert (one.read_bytes(), two.read_bytes()) == (b"1", b"2")


@pytest.mark.parametrize("damage", [b"", b"librarY", None], ids=["truncated", "altered", "missing"])
def test_a_damaged_entry_is_built_again(damage):
    build = Builder()
    library = cache.obtain(lambda: "k", label="f", build=build)
    if damage is None:
        library.unlink()
    else:
        library.write_bytes(damage)
    assert cache.obtain(lambda: "k", label="f", build=build).read_bytes() == b"library"
    assert build.count == 2


def test_a_failed_build_leaves_no_entry_and_is_tried_again(cache_dir):
    def fail(work):
        (work.folder / "log.txt").write_text("no")
        raise BuildError(str(work.keep()))

    for _ in range(2):
        with pytest.raises(BuildError) as caught:
            cache.obtain(lambda: "k", label="f", build=fail)
        assert Path(str(caught.value)) == cache_dir / "failed" / "f-k"
        assert (cache_dir / "failed" / "f-k" / "log.txt").read_text() == "no"
    assert cache.find("f-k") is None
    assert list((cache_dir / "tmp").iterdir()) == []
    assert cache.obtain(lambda: "k", label="f", build=Builder()).exists()


def test_sources_that_change_during_the_build_are_built_again():
    keys = iter(["old", "new", "new"])
    build = Builder()
    library = cache.obtain(lambda: next(keys), label="f", build=build)
    assert library.parent.name == "f-new"
    assert cache.find("f-old") is None
    assert build.count == 2


def test_sources_that_never_hold_still_are_an_error():
    counter = iter(range(100))
    with pytest.raises(BuildError, match="building f: its sources changed during each of 3 builds"):
        cache.obtain(lambda: str(next(counter)), label="f", build=Builder())


def test_an_unwritable_folder_names_the_variable(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("OPKIT_CACHE_DIR", str(tmp_path / "file" / "cache"))
    _config.refresh()
    with pytest.raises(
        BuildError, match=r"building f: the cache .*file/cache cannot be written.*OPKIT_CACHE_DIR"
    ):
        cache.obtain(lambda: "k", label="f", build=Builder())


def test_a_hit_writes_nothing(cache_dir, monkeypatch):
    library = cache.obtain(lambda: "k", label="f", build=Builder())
    for name in ("_lock", "_workspace", "_publish"):
        monkeypatch.setattr(cache, name, None)
    assert cache.obtain(lambda: "k", label="f", build=Builder()) == library


def test_a_killed_build_blocks_nobody_and_is_collected(cache_dir):
    code = """
        import time
        from opkit.cpp import cache
        def build(work):
            (work.folder / "half.o").write_text("half")
            print("building", flush=True)
            time.sleep(600)
        cache.obtain(lambda: "k", label="f", build=build)
    """
    process = python(code, cache_dir, stdout=subprocess.PIPE)
    assert process.stdout.readline() == "building\n"
    assert len([path for path in (cache_dir / "tmp").iterdir() if path.is_dir()]) == 1
    process.send_signal(signal.SIGKILL)
    process.wait()
    process.stdout.close()
    assert cache.obtain(lambda: "k", label="f", build=Builder()).read_bytes() == b"library"
    assert list((cache_dir / "tmp").iterdir()) == []


def test_a_build_in_progress_is_not_collected(cache_dir):
    def build(work):
        cache.obtain(lambda: "inner", label="g", build=Builder())
        assert work.folder.exists()
        return Builder()(work)

    assert cache.obtain(lambda: "outer", label="f", build=build).exists()


def test_waiting_for_another_process_is_said_on_stderr(capsys, monkeypatch):
    monkeypatch.setattr(cache, "_SAY_AFTER", 0.05)
    started, go_on = threading.Event(), threading.Event()

    def slow(work):
        started.set()
        go_on.wait(60)
        return Builder(b"theirs")(work)

    other = threading.Thread(target=cache.obtain, args=(lambda: "k",), kwargs={"label": "f", "build": slow})
    other.start()
    started.wait(60)
    mine = Builder(b"mine")
    result = []
    waiting = threading.Thread(
        target=lambda: result.append(cache.obtain(lambda: "k", label="f", build=mine)),
    )
    waiting.start()
    deadline = time.monotonic() + 60
    said = ""
    while "waiting for another process that builds f" not in said and time.monotonic() < deadline:
        said += capsys.readouterr().err
        time.sleep(0.02)
    go_on.set()
    other.join()
    waiting.join()
    assert "opkit: waiting for another process that builds f" in said
    assert result[0].read_bytes() == b"theirs"
    assert mine.count == 0


def test_without_locks_two_builds_of_one_key_give_one_library(monkeypatch):
    def no_lock(*args, **kwargs):
        raise OSError("no locks here")

    monkeypatch.setattr(cache.FileLock, "acquire", no_lock)

    def build(work):
        cache.obtain(lambda: "k", label="f", build=Builder(b"the faster one"))
        return Builder(b"the slower one")(work)

    library = cache.obtain(lambda: "k", label="f", build=build)
    assert library.read_bytes() == b"the faster one"


def test_what_failed_long_ago_is_removed(cache_dir):
    old, recent = cache_dir / "failed" / "old", cache_dir / "failed" / "recent"
    old.mkdir(parents=True)
    recent.mkdir()
    os.utime(old, (1, 1))
    cache.obtain(lambda: "k", label="f", build=Builder())
    assert not old.exists()
    assert recent.exists()

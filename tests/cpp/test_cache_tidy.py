"""What is removed from the cache, and what is not: nothing that a live process holds."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import pytest

from opkit import _config
from opkit.cpp import _live, cache, tidy
from tests.cpp.cache_tools import Builder, exit_code, forked, obtain, temporaries, until

pytestmark = pytest.mark.usefixtures("cache_dir")


@pytest.fixture
def limit(monkeypatch):
    def set_to(size):
        monkeypatch.setenv("OPKIT_CACHE_LIMIT", str(size))
        _config.refresh()

    return set_to


def there(cache_dir) -> list[str]:
    return sorted(
        entry.name.removeprefix("f-") for entry in tidy.entries(str(cache_dir)) if not entry.is_removed
    )


def elsewhere(*keys: str, size: int = 1000, at: int = 1000) -> None:
    """Have a process that ends build `keys`, which are used at times from `at` on."""

    def build():
        for i, key in enumerate(keys):
            library = obtain(Builder(b"x" * size), key)
            os.utime(library.parent / "manifest.json", (at + i, at + i))

    assert exit_code(forked(build)) == 0


def holder(tmp_path, *keys: str) -> int:
    """Start a process that is given `keys` and lives until it is killed."""

    def hold():
        for key in keys:
            assert cache.find(f"f-{key}")
        (tmp_path / "holds").write_text("")
        time.sleep(600)

    pid = forked(hold)
    assert until((tmp_path / "holds").exists)
    (tmp_path / "holds").unlink()
    return pid


def kill(pid: int) -> None:
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)


# ---------------------------------------------------------------- the limit


def test_the_least_recently_used_entries_go_when_the_limit_is_reached(cache_dir, limit):
    elsewhere("a", "b", "c", "d")
    limit(5000)
    obtain(Builder(b"x" * 1000), "e")
    assert there(cache_dir) == ["c", "d", "e"]  # each is 1000 bytes and a manifest
    assert not (cache_dir / "lib" / "f-a").exists()
    assert temporaries(cache_dir) == []


def test_a_hit_is_a_use(cache_dir, limit):
    elsewhere("a", "b", "c", "d")
    assert exit_code(forked(lambda: cache.find("f-a"))) == 0
    limit(5000)
    obtain(Builder(b"x" * 1000), "e")
    assert there(cache_dir) == ["a", "d", "e"]


@pytest.mark.parametrize(
    "text", [None, "", "x", "99999999999999"], ids=["none", "empty", "text", "too large"]
)
def test_the_size_of_all_entries_is_found_out_where_it_is_not_known(cache_dir, text):
    elsewhere("a", "b")
    (cache_dir / "size").unlink()
    if text is not None:
        (cache_dir / "size").write_text(text)
    obtain(Builder(), "c")
    assert int((cache_dir / "size").read_text()) == sum(entry.size for entry in tidy.entries(str(cache_dir)))
    assert there(cache_dir) == ["a", "b", "c"]


def test_the_size_of_all_entries_is_kept_without_looking_at_them(cache_dir, monkeypatch):
    elsewhere("a", "b")
    monkeypatch.setattr(tidy, "_LOOK_AGAIN", 0.0)
    entries, asked = tidy.entries, []
    monkeypatch.setattr(tidy, "entries", lambda root, name=None: asked.append(name) or entries(root, name))
    obtain(Builder(), "c")
    assert asked == ["f-c"]
    assert int((cache_dir / "size").read_text()) == sum(entry.size for entry in entries(str(cache_dir)))


def test_zero_is_no_limit(cache_dir, limit):
    elsewhere("a", "b")
    limit(0)
    obtain(Builder(), "c")
    assert there(cache_dir) == ["a", "b", "c"]
    assert not (cache_dir / "size").exists()


def test_what_this_process_was_given_stays_whatever_the_limit(cache_dir, limit):
    limit(1)
    libraries = [obtain(Builder(), key) for key in "abc"]
    assert all(library.exists() for library in libraries)


def test_what_another_process_holds_stays_until_it_is_killed(tmp_path, cache_dir, limit):
    elsewhere("a", "b")
    pid = holder(tmp_path, "a")
    limit(1)
    obtain(Builder(), "c")
    assert there(cache_dir) == ["a", "c"]
    kill(pid)
    obtain(Builder(), "d")
    assert there(cache_dir) == ["c", "d"]


def test_in_place_of_what_is_held_the_next_one_goes(tmp_path, cache_dir, limit):
    elsewhere("a", "b", "c", "d")
    pid = holder(tmp_path, "a")
    os.utime(next((cache_dir / "lib" / "f-a").glob("*/manifest.json")), (1, 1))
    limit(5900)
    obtain(Builder(b"x" * 1000), "e")
    assert there(cache_dir) == ["a", "c", "d", "e"]
    kill(pid)


def test_a_forked_child_holds_what_its_parent_was_given(tmp_path, cache_dir):
    elsewhere("a")
    child = tmp_path / "child"

    def parent():
        assert cache.find("f-a")
        child.write_text(str(forked(lambda: time.sleep(600))))

    assert exit_code(forked(parent)) == 0
    assert tidy.remove(str(cache_dir), tidy.entries(str(cache_dir))) == []
    assert there(cache_dir) == ["a"]
    os.kill(int(child.read_text()), signal.SIGKILL)
    assert until(lambda: not tidy.held(str(cache_dir)))
    assert len(tidy.remove(str(cache_dir), tidy.entries(str(cache_dir)))) == 1


def test_what_a_child_is_given_is_its_own(tmp_path, cache_dir):
    elsewhere("a", "b")
    assert cache.find("f-a")
    pid = holder(tmp_path, "b")
    assert {held.partition("/")[0] for held in tidy.held(str(cache_dir))} == {"f-a", "f-b"}
    kill(pid)
    assert {held.partition("/")[0] for held in tidy.held(str(cache_dir))} == {"f-a"}


def test_an_entry_taken_while_it_is_being_removed_stays(cache_dir, monkeypatch):
    """Between the look at who holds what and the removal, somebody is given the entry."""
    elsewhere("a")
    scan = _live.scan

    def given_in_between(root):
        _live.hold(root, next(tidy.entries(root)).id)  # as a hit does, which has read the manifest before
        return scan(root)

    monkeypatch.setattr(_live, "scan", given_in_between)
    assert tidy.remove(str(cache_dir), tidy.entries(str(cache_dir))) == []
    assert cache.find("f-a")


def test_a_hit_on_an_entry_that_is_being_removed_is_none(cache_dir, monkeypatch):
    elsewhere("a")
    hold = _live.hold

    def removed_in_between(root, entry):
        manifest = Path(root, "lib", entry, "manifest.json")
        manifest.rename(f"{manifest}.removed")
        return hold(root, entry)

    monkeypatch.setattr(_live, "hold", removed_in_between)
    assert cache.find("f-a") is None


def test_an_entry_built_anew_while_it_is_being_removed_stays(cache_dir, monkeypatch):
    elsewhere("a")
    scan = _live.scan

    def built_in_between(root):
        found = scan(root)
        assert cache.find("f-a") is None
        with monkeypatch.context() as patch:
            patch.setattr(_live, "scan", scan)
            obtain(Builder(b"new"), "a")
        return found

    monkeypatch.setattr(_live, "scan", built_in_between)
    assert tidy.remove(str(cache_dir), tidy.entries(str(cache_dir))) == []
    assert cache.find("f-a").read_bytes() == b"new"


def test_a_removal_that_was_interrupted_is_finished_or_undone(tmp_path, cache_dir, limit):
    elsewhere("a", "b")
    pid = holder(tmp_path, "a")
    for manifest in cache_dir.rglob("manifest.json"):
        manifest.rename(f"{manifest}.removed")
    limit(1)
    obtain(Builder(), "c")
    assert there(cache_dir) == ["a", "c"]
    kill(pid)


def test_of_one_key_only_some_variants_are_kept(tmp_path, cache_dir):
    header = tmp_path / "a.h"

    def build():
        for i in range(12):
            header.write_text(str(i))
            library = obtain(Builder(depends=[header]))
            os.utime(library.parent / "manifest.json", (i, i))

    for _ in range(2):  # the second one builds what the first one removed
        assert exit_code(forked(build)) == 0
    obtain(Builder(), "other")
    header.write_text("new")
    obtain(Builder(depends=[header]))
    assert there(cache_dir).count("k") == 8
    assert cache.find("f-k")
    assert cache.find("f-other")


# ---------------------------------------------------------------- what is left over


def test_what_failed_long_ago_is_removed_and_locks_with_it(cache_dir):
    obtain(Builder(), "before")
    for name in ("old", "recent"):
        (cache_dir / "failed" / name).mkdir()
        (cache_dir / "locks" / f"{name}.lock").write_text("")
    os.utime(cache_dir / "failed" / "old", (1, 1))
    os.utime(cache_dir / "locks" / "old.lock", (1, 1))
    obtain(Builder())
    assert os.listdir(cache_dir / "failed") == ["recent"]
    assert sorted(os.listdir(cache_dir / "locks")) == ["f-before.lock", "f-k.lock", "recent.lock"]


def test_a_build_in_progress_is_not_collected(cache_dir):
    def build(work):
        obtain(Builder(), "inner", "g")
        assert exit_code(forked(lambda: obtain(Builder(), "of a child", "h"))) == 0
        assert work.folder.exists()
        return Builder()(work)

    assert obtain(build, "outer").exists()


def test_what_a_killed_builder_left_is_collected_though_its_parent_lives(tmp_path, cache_dir):
    obtain(Builder(), "of the parent")

    def build(work):
        (tmp_path / "started").write_text("")
        time.sleep(600)

    pid = forked(lambda: obtain(build))
    assert until((tmp_path / "started").exists)
    kill(pid)
    assert len(temporaries(cache_dir)) == 1
    obtain(Builder())
    assert temporaries(cache_dir) == []


def test_anything_else_in_the_folder_of_builds_is_collected(cache_dir):
    obtain(Builder(), "before")
    (cache_dir / "tmp" / "folder-0-0" / "deep").mkdir(parents=True)
    (cache_dir / "tmp" / "file").write_text("")
    (cache_dir / "tmp" / "link").symlink_to("nowhere")
    obtain(Builder())
    assert temporaries(cache_dir) == []


# ---------------------------------------------------------------- who lives


def test_who_leaves_empties_its_file_for_the_next_one_unless_a_child_holds_it(tmp_path, cache_dir):
    elsewhere("a")
    child = tmp_path / "child"

    def leave(has_child):
        assert cache.find("f-a")
        if has_child:
            child.write_text(str(forked(lambda: time.sleep(600))))
        _live._leave()  # as at the end of any process that is not killed

    tidy.held(str(cache_dir))
    assert exit_code(forked(lambda: leave(False))) == 0
    (left,) = (cache_dir / "live").iterdir()
    assert left.read_text() == ""
    assert exit_code(forked(lambda: leave(True))) == 0
    assert list((cache_dir / "live").iterdir()) == [left]
    assert left.read_text().startswith("f-a/")
    assert exit_code(forked(lambda: leave(False))) == 0
    assert left.read_text().startswith("f-a/")
    os.kill(int(child.read_text()), signal.SIGKILL)


def test_a_file_that_is_taken_is_not_removed_as_one_of_the_dead(cache_dir):
    elsewhere("a")

    def leave():
        assert cache.find("f-a")
        _live._leave()

    tidy.held(str(cache_dir))
    assert exit_code(forked(leave)) == 0
    (left,) = (cache_dir / "live").iterdir()
    assert cache.find("f-a")
    assert _live.scan(str(cache_dir)) == ({left.name}, {entry.id for entry in tidy.entries(str(cache_dir))})
    assert list((cache_dir / "live").iterdir()) == [left]


def test_two_do_not_take_the_same_file(cache_dir):
    def leave(depth):
        assert _live.hold(str(cache_dir), f"entry{depth}")
        if depth:
            assert exit_code(forked(lambda: leave(depth - 1))) == 0
        _live._leave()

    elsewhere("a")
    tidy.held(str(cache_dir))
    for _ in range(2):
        assert exit_code(forked(lambda: leave(3))) == 0
        assert len(os.listdir(cache_dir / "live")) == 4


def test_the_file_of_a_killed_builder_goes_to_nobody_while_its_folder_is_there(tmp_path, cache_dir):
    def build(work):
        (tmp_path / "started").write_text(work.folder.name)
        time.sleep(600)

    pid = forked(lambda: obtain(build))
    assert until((tmp_path / "started").exists)
    kill(pid)
    (left,) = [file for file in (cache_dir / "live").iterdir() if file.read_text()]
    assert tidy.owner_of((tmp_path / "started").read_text()) == left.name
    assert _live.hold(str(cache_dir), "entry")
    assert len(os.listdir(cache_dir / "live")) == 2


def test_the_files_of_the_dead_are_forgotten(tmp_path, cache_dir):
    elsewhere("a")
    kill(holder(tmp_path, "a"))
    assert os.listdir(cache_dir / "live") != []
    assert tidy.held(str(cache_dir)) == set()
    assert os.listdir(cache_dir / "live") == []


def test_a_daemon_that_closes_every_file_does_not_write_into_the_next_one(tmp_path, cache_dir):
    elsewhere("a", "b")

    def daemon():
        assert cache.find("f-a")
        os.closerange(3, 1000)
        users = [os.open(tmp_path / str(i), os.O_RDWR | os.O_CREAT) for i in range(400)]
        assert cache.find("f-b")
        assert [os.fstat(fd).st_size for fd in users] == [0] * 400

    assert exit_code(forked(daemon)) == 0

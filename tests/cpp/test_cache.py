from __future__ import annotations

import errno
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

from opkit import _config
from opkit.cpp import _manifest, cache, tidy
from opkit.errors import BuildError
from tests.cpp.cache_tools import Builder, exit_code, forked, obtain, python, temporaries

pytestmark = pytest.mark.usefixtures("cache_dir")


def variants(cache_dir: Path, name: str = "f-k") -> list[str]:
    return sorted(os.listdir(cache_dir / "lib" / name))


def hashed(monkeypatch) -> list[str]:
    """The files that are read from now on."""
    read = []
    original = _manifest.sha256
    monkeypatch.setattr(_manifest, "sha256", lambda path: read.append(Path(path).name) or original(path))
    return read


# ---------------------------------------------------------------- entries


def test_obtain_builds_once_and_publishes_whole(cache_dir):
    build = Builder()
    first = obtain(build, "k1", "demo::f [cpp]")
    second = obtain(build, "k1", "demo::f [cpp]")
    assert first == second == cache.find("demo-f-cpp-k1")
    assert first.parent.parent == cache_dir / "lib" / "demo-f-cpp-k1"
    assert first.read_bytes() == b"library"
    assert build.count == 1
    assert temporaries(cache_dir) == []


def test_another_key_is_another_entry():
    one = obtain(Builder(b"1"), "k1")
    two = obtain(Builder(b"2"), "k2")
    assert (one.read_bytes(), two.read_bytes()) == (b"1", b"2")


@pytest.mark.parametrize("damage", [b"", b"librarY", None], ids=["truncated", "altered", "missing"])
def test_a_damaged_entry_is_built_again(damage):
    build = Builder()
    library = obtain(build)
    if damage is None:
        library.unlink()
    else:
        library.write_bytes(damage)
    assert cache.find("f-k") is None
    assert obtain(build).read_bytes() == b"library"
    assert build.count == 2


def test_a_truncated_library_is_seen_by_its_size_whatever_its_time():
    library = obtain(Builder())
    before = library.stat()
    library.write_bytes(b"libr")
    os.utime(library, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert cache.find("f-k") is None


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "[]",
        "null",
        '{"format": 1}',
        "[" * 100_000,
        '{"format": 1, "name": "f-k", "files": 3, "depends": []}',
    ],
    ids=["empty", "cut", "list", "null", "bare", "deep", "kinds"],
)
def test_a_damaged_manifest_is_no_entry_and_is_replaced(text):
    library = obtain(Builder())
    (library.parent / "manifest.json").write_text(text)
    assert cache.find("f-k") is None
    assert obtain(Builder(b"again")).read_bytes() == b"again"
    assert cache.find("f-k") == library


def test_an_entry_copied_with_other_times_is_found_and_read_once(cache_dir, monkeypatch):
    library = obtain(Builder())
    os.utime(library, (1, 1))
    read = hashed(monkeypatch)
    assert [cache.find("f-k"), cache.find("f-k")] == [library, library]
    assert read == ["it.so"]
    assert temporaries(cache_dir) == []


def test_a_name_says_which_entry_it_is(cache_dir):
    library = obtain(Builder())
    shutil.copytree(library.parent, cache_dir / "lib" / "g-k" / library.parent.name)
    assert cache.find("g-k") is None


def test_what_an_earlier_format_left_is_no_entry(cache_dir):
    old = cache_dir / "lib" / "f-k"
    old.mkdir(parents=True)
    (old / "it.so").write_bytes(b"old")
    (old / "manifest.json").write_text(json.dumps({"library": "it.so", "sha256": "0" * 64, "label": "f"}))
    assert cache.find("f-k") is None
    assert obtain(Builder()).read_bytes() == b"library"


@pytest.mark.parametrize("name", ["größe::k 核 [cpp]", "a b", "..", "/", "x" * 300])
def test_any_label_makes_a_name(name, cache_dir):
    library = obtain(Builder(), label=name)
    assert library.is_relative_to(cache_dir / "lib")
    assert obtain(Builder(b"other"), label=name) == library


def test_a_cache_folder_with_spaces_and_other_letters(tmp_path, monkeypatch):
    monkeypatch.setenv("OPKIT_CACHE_DIR", str(tmp_path / "ein Ordner ünd 核"))
    _config.refresh()
    header = tmp_path / "größe 1.h"
    header.write_text("1")
    library = obtain(Builder(depends=[header]))
    assert obtain(Builder(b"other"), "k") == library
    header.write_text("2")
    assert obtain(Builder(b"other", depends=[header])).read_bytes() == b"other"


def test_a_file_name_that_is_no_text_can_be_depended_on(tmp_path):
    header = os.fsencode(tmp_path) + b"/\xff.h"
    Path(os.fsdecode(header)).write_text("1")
    library = obtain(Builder(depends=[os.fsdecode(header)]))
    assert obtain(Builder(b"other")) == library


def test_nobody_but_the_owner_may_write_what_is_published(cache_dir):
    before = os.umask(0)
    try:
        library = obtain(Builder())
    finally:
        os.umask(before)
    written = [path for path in cache_dir.rglob("*") if "lib" in path.parts and path.stat().st_mode & 0o022]
    assert written == []
    assert cache_dir.stat().st_mode & 0o777 == 0o700
    assert library.stat().st_mode & 0o777 == 0o644


# ---------------------------------------------------------------- what an entry depends on


def test_an_edited_dependency_is_another_variant_and_the_first_one_is_found_again(tmp_path, cache_dir):
    header = tmp_path / "a.h"
    builds = {text: Builder(text.encode(), depends=[header]) for text in ("one", "two")}
    for text in ("one", "two", "one", "two"):
        header.write_text(text)
        assert obtain(builds[text]).read_text() == text
    assert [build.count for build in builds.values()] == [1, 1]
    assert len(variants(cache_dir)) == 2


def test_an_edit_in_the_same_tick_with_the_same_size_is_seen(tmp_path):
    header = tmp_path / "a.h"
    header.write_text("one")
    time_of = header.stat().st_mtime_ns
    obtain(Builder(b"one", depends=[header]))
    header.write_text("two")
    os.utime(header, ns=(time_of, time_of))
    assert obtain(Builder(b"two", depends=[header])).read_text() == "two"


@pytest.mark.parametrize("gone", ["removed", "dangling", "folder", "pipe"])
def test_a_dependency_that_is_no_file_any_more_makes_the_entry_out_of_date(tmp_path, gone):
    header = tmp_path / "a.h"
    header.write_text("")
    obtain(Builder(depends=[header]))
    header.unlink()
    if gone == "dangling":
        header.symlink_to(tmp_path / "nothing")
    elif gone == "folder":
        header.mkdir()
    elif gone == "pipe":
        os.mkfifo(header)
    assert cache.find("f-k") is None


def test_a_touched_dependency_is_read_once_and_its_time_is_remembered(tmp_path, monkeypatch):
    header = tmp_path / "a.h"
    header.write_text("1")
    os.utime(header, (1000, 1000))
    library = obtain(Builder(depends=[header]))
    os.utime(header, (2000, 2000))
    read = hashed(monkeypatch)
    for _ in range(3):
        assert cache.find("f-k") == library
    assert read == ["a.h"]


def test_a_dependency_that_was_not_touched_is_not_read(tmp_path, monkeypatch):
    header = tmp_path / "a.h"
    header.write_text("1")
    os.utime(header, (1000, 1000))
    library = obtain(Builder(depends=[header]))
    assert hashed(monkeypatch) == []
    assert cache.find("f-k") == library


def test_files_of_the_workspace_are_no_dependencies(cache_dir):
    def build(work):
        (work.folder / "unit.cpp").write_text("")
        work.depend_on(
            ["unit.cpp", "./unit.cpp", work.folder / "unit.cpp", "../../../../../../../../etc/passwd"]
        )
        return Builder()(work)

    manifest = json.loads((obtain(build).parent / "manifest.json").read_bytes())
    assert [path for path, *_ in manifest["depends"]] == ["/etc/passwd"]


def test_files_of_opkit_and_of_python_are_listed_wherever_they_are(cache_dir):
    paths = [
        _manifest.__file__,
        f"{sys.prefix}/pyvenv.cfg" if os.path.exists(f"{sys.prefix}/pyvenv.cfg") else os.__file__,
    ]
    manifest = json.loads((obtain(Builder(depends=paths)).parent / "manifest.json").read_bytes())
    listed = [path for path, *_ in manifest["depends"]]
    assert listed[0] == "{opkit}/cpp/_manifest.py"
    assert [_manifest.expand(path) for path in listed] == paths
    assert cache.find("f-k")


def test_a_dependency_edited_during_the_build_leads_to_another_build(tmp_path):
    header = tmp_path / "a.h"
    header.write_text("old")
    contents = []

    def build(work):
        contents.append(header.read_text())
        (work.folder / "it.so").write_text(contents[-1])
        work.depend_on([header])
        if len(contents) == 1:
            time.sleep(0.02)  # past the tick of the file system's clock, as any compiler takes
            header.write_text("new")
        return work.folder / "it.so"

    assert obtain(build).read_text() == "new"
    assert contents == ["old", "new"]


def test_a_file_system_whose_clock_is_ahead_costs_one_more_build_and_no_error(tmp_path, monkeypatch):
    header = tmp_path / "a.h"
    header.write_text("1")
    init = cache.Workspace.__init__

    def early(self, folder, name):
        init(self, folder, name)
        self._started -= 3600 * 10**9

    monkeypatch.setattr(cache.Workspace, "__init__", early)
    build = Builder(depends=[header])
    assert obtain(build).read_bytes() == b"library"
    assert build.count == 2


def test_sources_that_change_during_the_build_are_built_again():
    keys = iter(["old", "new", "new", "new"])
    build = Builder()
    library = cache.obtain(lambda: next(keys), label="f", build=build)
    assert library.parent.parent.name == "f-new"
    assert cache.find("f-old") is None
    assert build.count == 2


def test_sources_that_never_hold_still_are_an_error():
    counter = iter(range(100))
    with pytest.raises(
        BuildError, match="building f: its sources, or the cache folder .*, changed during each of 3 builds"
    ):
        cache.obtain(lambda: str(next(counter)), label="f", build=Builder())


# ---------------------------------------------------------------- a hit


def test_a_hit_starts_no_process_writes_no_file_and_imports_nothing_heavy(cache_dir, tmp_path):
    header = tmp_path / "a.h"
    header.write_text("1")
    os.utime(header, (1000, 1000))
    library = obtain(Builder(depends=[header]))
    hit = """
        import sys
        from opkit.cpp import cache
        before = set(sys.modules)
        def refuse(event, arguments):
            if event in ("subprocess.Popen", "os.posix_spawn", "os.fork"):
                raise RuntimeError(event)
            if event == "open" and isinstance(arguments[1], str) and set(arguments[1]) & set("wxa+"):
                raise RuntimeError(arguments)
        sys.addaudithook(refuse)
        print(cache.obtain(lambda: "k", label="f", build=None))
        print(sorted({"fsspec", "filelock", "concurrent", "opkit.cpp.remote", "opkit.cpp._turn", "opkit.cpp.tidy"}
              & (set(sys.modules) - before)))
        """
    for _ in range(3):
        process = python(hit, cache_dir, stdout=subprocess.PIPE)
        assert process.communicate()[0].split("\n")[:2] == [str(library), "[]"]
        assert process.returncode == 0
        assert len(os.listdir(cache_dir / "live")) == 2  # the others take one in turn


def test_a_hit_says_when_it_was_used_last(cache_dir):
    assert exit_code(forked(lambda: obtain(Builder()))) == 0
    manifest = next(cache_dir.rglob("manifest.json"))
    os.utime(manifest, (1000, 1000))
    assert cache.find("f-k")
    assert manifest.stat().st_mtime > 1_000_000


# ---------------------------------------------------------------- builds that fail


def test_a_failed_build_leaves_no_entry_and_is_tried_again(cache_dir):
    def fail(work):
        (work.folder / "log.txt").write_text("no")
        raise BuildError(str(work.keep()))

    for _ in range(2):
        with pytest.raises(BuildError) as caught:
            obtain(fail)
        assert Path(str(caught.value)) == cache_dir / "failed" / "f-k"
        assert (cache_dir / "failed" / "f-k" / "log.txt").read_text() == "no"
    assert cache.find("f-k") is None
    assert temporaries(cache_dir) == []
    assert obtain(Builder()).exists()


def test_any_other_exception_of_a_build_is_passed_on(cache_dir):
    with pytest.raises(KeyError):
        obtain(lambda work: {}["no"])
    assert temporaries(cache_dir) == []
    assert obtain(Builder()).exists()


def test_a_cache_folder_that_vanishes_during_a_build_is_made_again(cache_dir):
    build = Builder()

    def vanish(work):
        if build.count == 0:
            shutil.rmtree(cache_dir)
            build.count = 1
            (work.folder / "it.so").write_bytes(b"")
        return build(work)

    assert obtain(vanish).read_bytes() == b"library"
    assert cache.find("f-k")


def test_a_cache_folder_that_vanishes_after_a_build_is_made_again(cache_dir):
    build = Builder()

    def vanish(work):
        library = build(work)
        if build.count == 1:
            shutil.rmtree(cache_dir)
        return library

    assert obtain(vanish).read_bytes() == b"library"
    assert build.count == 2


def test_a_cache_folder_that_vanishes_each_time_is_an_error(cache_dir):
    def vanish(work):
        shutil.rmtree(cache_dir)
        return work.folder / "it.so"

    with pytest.raises(BuildError, match="the cache folder .*/cache, changed during each of 3 builds"):
        obtain(vanish)


def test_a_cache_folder_that_vanishes_between_two_hits_is_built_into_again(cache_dir):
    obtain(Builder())
    shutil.rmtree(cache_dir)
    assert obtain(Builder(b"again")).read_bytes() == b"again"
    assert {held.partition("/")[0] for held in tidy.held(str(cache_dir))} == {"f-k"}


def test_a_clock_that_is_set_back_changes_nothing(tmp_path, monkeypatch):
    header = tmp_path / "a.h"
    header.write_text("1")
    first = obtain(Builder(b"1", depends=[header]))
    monkeypatch.setattr(time, "time", lambda: 1000.0)
    monkeypatch.setattr(time, "time_ns", lambda: 1000 * 10**9)
    assert obtain(Builder(b"no")) == first
    header.write_text("2")
    assert obtain(Builder(b"2", depends=[header])).read_bytes() == b"2"
    header.write_text("1")
    assert obtain(Builder(b"no")) == first


@pytest.mark.parametrize("where", ["build", "utime", "fsync", "rename", "write"])
def test_a_full_disk_is_said_wherever_it_is_met(cache_dir, monkeypatch, where):
    def full(*args, **kwargs):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        build = Builder()
        if where == "build":
            build = full
        elif where == "write":
            patch.setattr(_manifest, "write", full)
        else:
            patch.setattr(os, where, full)
        with pytest.raises(BuildError) as caught:
            obtain(build)
    assert str(caught.value) == (
        f"building f: the cache folder {cache_dir} cannot be written (No space left on device); expected a folder "
        "that this user may write and that has room. Set OPKIT_CACHE_DIR to one."
    )
    assert temporaries(cache_dir) == []
    assert cache.find("f-k") is None
    assert obtain(Builder()).exists()

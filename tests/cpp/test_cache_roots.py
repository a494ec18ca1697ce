"""Which folders are the cache, and which are refused: others' libraries are not run."""

from __future__ import annotations

import os
import pwd
import shutil
import subprocess
import tempfile
from pathlib import Path

import pytest

from opkit import _config
from opkit.cpp import _turn, cache, tidy  # noqa: F401  (another user may not be able to read the sources)
from opkit.errors import BuildError
from tests.cpp.cache_tools import Builder, exit_code, forked, obtain, temporaries

needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="needs to run as root, to be another user too")
SOMEBODY = 54321


@pytest.fixture(autouse=True)
def cache_dir(tmp_path, use):
    yield use(tmp_path / "cache")
    _config.refresh()


@pytest.fixture
def use(monkeypatch):
    def set_to(folder, *others):
        monkeypatch.setenv("OPKIT_CACHE_DIR", str(folder))
        monkeypatch.setenv("OPKIT_CACHE_PATH", os.pathsep.join(map(str, others)))
        _config.refresh()
        return Path(folder)

    return set_to


@pytest.fixture
def public():
    """A folder that every user may read and search."""
    folder = Path(tempfile.mkdtemp(prefix="opkit-test-"))
    folder.chmod(0o755)
    yield folder
    shutil.rmtree(folder)


def as_somebody(function) -> int | None:
    def run():
        os.setgroups([])
        os.setgid(SOMEBODY)
        os.setuid(SOMEBODY)
        function()

    return exit_code(forked(run))


def state(folder: Path) -> dict[str, tuple[int, int]]:
    return {str(p): (p.lstat().st_mtime_ns, p.lstat().st_size) for p in [folder, *folder.rglob("*")]}


# ---------------------------------------------------------------- only the owner writes


@pytest.mark.parametrize("mode", [0o775, 0o757, 0o777, 0o1777], ids=oct)
def test_a_folder_that_others_may_write_is_refused_with_the_remedy(cache_dir, mode):
    cache_dir.mkdir()
    cache_dir.chmod(mode)
    with pytest.raises(BuildError) as caught:
        obtain(Builder(), label="demo::f [cpp]")
    me = pwd.getpwuid(os.geteuid()).pw_name
    assert str(caught.value) == (
        f"building demo::f [cpp]: the cache folder {cache_dir} may be written by others than user {me} (its mode is "
        f"{mode:04o}); expected one that only its owner writes, because "
        f"libraries in it are run. Run chmod go-w {cache_dir}, or name another folder in OPKIT_CACHE_DIR."
    )
    assert list(cache_dir.iterdir()) == []
    with pytest.raises(BuildError, match="looking for f-k: the cache folder"):
        cache.find("f-k")
    cache_dir.chmod(mode & ~0o022)
    assert obtain(Builder()).exists()


def test_a_folder_within_that_others_may_write_is_refused_too(cache_dir):
    (cache_dir / "lib").mkdir(parents=True)
    (cache_dir / "lib").chmod(0o777)
    with pytest.raises(
        BuildError, match=r"/cache/lib may be written by others .*chmod go-w .*/cache/lib, or"
    ):
        obtain(Builder())


@needs_root
def test_a_folder_of_another_user_is_refused_with_the_remedy(cache_dir):
    cache_dir.mkdir()
    os.chown(cache_dir, SOMEBODY, SOMEBODY)
    with pytest.raises(BuildError) as caught:
        obtain(Builder())
    assert str(caught.value) == (
        f"building f: the cache folder {cache_dir} belongs to user {SOMEBODY}, and this process runs as user root; "
        "expected a folder of its own, because libraries in it are run. Set OPKIT_CACHE_DIR to one; a folder of "
        "others that is only read is named in OPKIT_CACHE_PATH."
    )
    assert list(cache_dir.iterdir()) == []


def test_a_folder_is_looked_at_once_per_process(cache_dir, monkeypatch):
    obtain(Builder())
    stat = os.stat
    seen = []
    monkeypatch.setattr(os, "stat", lambda path, **kwargs: seen.append(str(path)) or stat(path, **kwargs))
    cache.find("f-k")
    cache.find("f-k")
    assert str(cache_dir) not in seen


def test_a_folder_of_others_that_anyone_may_write_is_refused(tmp_path, cache_dir, use):
    other = tmp_path / "other"
    other.mkdir()
    other.chmod(0o777)
    use(cache_dir, other)
    with pytest.raises(
        BuildError, match=r"/other may be written by others .* name another folder in OPKIT_CACHE_PATH"
    ):
        obtain(Builder())


@needs_root
def test_two_users_with_one_folder(public, use):
    """Neither runs what the other one built, unless it says so."""
    folder = use(public / "cache")
    library = obtain(Builder(b"root's"))

    def refused():
        with pytest.raises(
            BuildError, match=f"belongs to user root, and this process runs as user {SOMEBODY}"
        ):
            obtain(Builder())

    assert as_somebody(refused) == 0
    folder.chmod(0o755)
    own = public / "own"
    own.mkdir()
    os.chown(own, SOMEBODY, SOMEBODY)
    use(own, folder)
    before = state(folder)

    def reads():
        assert obtain(Builder(b"mine")) == library
        assert obtain(Builder(b"mine"), "other").is_relative_to(own)

    assert as_somebody(reads) == 0
    assert state(folder) == before


# ---------------------------------------------------------------- folders that are only read


def test_folders_that_are_only_read_are_looked_in_after_the_own_one_in_order(tmp_path, use):
    first, second, own = (tmp_path / name for name in ("first", "second", "own"))
    for folder in (first, second):
        use(folder)
        obtain(Builder(folder.name.encode()))
    use(second)
    obtain(Builder(b"only there"), "other")
    before = state(first), state(second)
    use(own, first, tmp_path / "nothing", second)
    assert cache.find("f-k").read_bytes() == b"first"
    assert cache.find("f-other").read_bytes() == b"only there"
    assert (state(first), state(second)) == before
    assert not own.exists()
    assert obtain(Builder(b"own"), "new").is_relative_to(own)


def test_a_copied_cache_with_other_times_is_a_hit_though_it_cannot_be_written(tmp_path, use):
    header = tmp_path / "a.h"
    header.write_text("1")
    built = use(tmp_path / "built")
    obtain(Builder(depends=[header]))
    copied = tmp_path / "copied"
    shutil.copytree(built, copied, copy_function=shutil.copyfile)
    os.utime(header, (1, 1))
    before = state(copied)
    use(tmp_path / "own", copied)
    assert [cache.find("f-k").is_relative_to(copied) for _ in range(2)] == [True, True]
    assert state(copied) == before


def test_damage_in_a_folder_that_is_only_read_leads_to_a_build(tmp_path, use):
    use(tmp_path / "other")
    obtain(Builder()).write_bytes(b"")
    own = use(tmp_path / "own", tmp_path / "other")
    assert obtain(Builder(b"built")).is_relative_to(own)


@needs_root
def test_an_own_cache_that_cannot_be_written_is_a_hit_and_an_error_for_what_is_not_there(public, use):
    folder = use(public / "cache")
    obtain(Builder())
    for path in [folder, *folder.rglob("*")]:
        os.chown(path, SOMEBODY, SOMEBODY)
        path.chmod(0o555 if path.is_dir() else 0o444)

    def run():
        assert cache.find("f-k")
        assert obtain(Builder()).read_bytes() == b"library"
        with pytest.raises(
            BuildError, match=r"building f: the cache folder .* cannot be written \(Permission denied\)"
        ):
            obtain(Builder(), "other")

    before = state(folder)
    assert as_somebody(run) == 0
    assert state(folder) == before


# ---------------------------------------------------------------- folders that cannot be


@pytest.mark.parametrize("kind", ["below a file", "a file", "a dangling link"])
def test_an_impossible_folder_names_the_variable(tmp_path, use, kind):
    (tmp_path / "file").write_text("")
    (tmp_path / "link").symlink_to(tmp_path / "nothing")
    use(tmp_path / {"below a file": "file/cache", "a file": "file", "a dangling link": "link"}[kind])
    with pytest.raises(
        BuildError, match=r"building f: the cache folder .* cannot be written .*Set OPKIT_CACHE_DIR"
    ):
        obtain(Builder())


@needs_root
def test_a_disk_that_is_full_is_an_error_and_what_was_built_before_is_found(tmp_path, use):
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=256k", "none", disk], capture_output=True
    ).returncode:
        pytest.skip("no file system can be mounted here")
    try:
        use(disk / "cache")
        library = obtain(Builder(b"x" * 1000))
        # Less and less room, down to none: whatever is written first fails at some point.
        for room in (100_000, 40_000, 8_000, 4_000, 0):
            free = os.statvfs(disk).f_bavail * os.statvfs(disk).f_frsize
            (disk / f"filler{room}").write_bytes(b"x" * max(0, free - room))
            with pytest.raises(BuildError, match=r"cannot be written \(No space left on device\)"):
                obtain(Builder(b"y" * 120_000), "large")
            assert temporaries(disk / "cache") == []
            assert cache.find("f-large") is None
            assert cache.find("f-k") == library
        for filler in disk.glob("filler*"):
            filler.unlink()
        assert obtain(Builder(b"y" * 120_000), "large").exists()
    finally:
        subprocess.run(["umount", "-l", disk], check=True)

from __future__ import annotations

import json
import os
import subprocess
import sys
import time

import pytest

from opkit import _config, cli
from opkit.cpp import cache, tidy
from tests.cpp.cache_tools import Builder, exit_code, forked, obtain


@pytest.fixture(autouse=True)
def cache_dir(tmp_path, use):
    yield use(tmp_path / "cache")
    _config.refresh()


@pytest.fixture
def use(monkeypatch):
    def set_to(folder):
        monkeypatch.setenv("OPKIT_CACHE_DIR", str(folder))
        _config.refresh()
        return folder

    return set_to


@pytest.fixture
def opkit(capsys):
    """Run a command line; returns its exit code, and what it printed on stdout and stderr."""

    def run(*words):
        capsys.readouterr()
        code = cli.main(["cache", *words])
        return code, *capsys.readouterr()

    return run


def elsewhere(*keys: str, label="demo::f [cpp]", age: float = 0.0) -> None:
    """Have a process that ends build `keys`, last used `age` days ago."""

    def build():
        for key in keys:
            library = obtain(Builder(b"x" * 1000), key, label)
            used = time.time() - age * 86400
            os.utime(library.parent / "manifest.json", (used, used))

    assert exit_code(forked(build)) == 0


def names(cache_dir) -> list[str]:
    return sorted(entry.name for entry in tidy.entries(str(cache_dir)))


# ---------------------------------------------------------------- list


def test_list_says_so_where_there_is_nothing(opkit, cache_dir):
    assert opkit("list") == (0, f"no compiled kernels in {cache_dir}\n", "")
    assert opkit("list", "--json") == (0, "[]\n", "")
    assert not cache_dir.exists()


def test_list_shows_the_last_used_first(opkit, cache_dir):
    elsewhere("old", age=3)
    elsewhere("new", label="demo::g [cpp]")
    held = cache.find("demo-g-cpp-new")
    code, out, err = opkit("list")
    lines = out.splitlines()
    assert (code, err) == (0, "")
    assert " demo::g [cpp] " in lines[0]
    assert lines[0].endswith(" (in use)")
    assert lines[1].split()[2:7] == ["3", "d", "demo::f", "[cpp]", f"demo-f-cpp-old/{held.parent.name}"]
    assert lines[2].startswith("2 kernels, ")
    assert lines[2].endswith(f", in {cache_dir}")
    rows = json.loads(opkit("list", "--json")[1])
    assert [row["label"] for row in rows] == ["demo::g [cpp]", "demo::f [cpp]"]
    assert rows[0]["library"] == str(held)
    assert [row["held"] for row in rows] == [True, False]


def test_list_shows_folders_that_are_only_read(opkit, cache_dir, use, tmp_path, monkeypatch):
    elsewhere("k")
    monkeypatch.setenv("OPKIT_CACHE_PATH", str(cache_dir))
    use(tmp_path / "own")
    assert [row["root"] for row in json.loads(opkit("list", "--json")[1])] == [str(cache_dir)]


# ---------------------------------------------------------------- clean


def test_clean_removes_what_builds_left_and_keeps_kernels(opkit, cache_dir):
    elsewhere("k")
    (cache_dir / "failed" / "f").mkdir()
    (cache_dir / "tmp" / "f-0-0").mkdir()
    assert opkit("clean") == (0, f"removed 0 kernels, 0 B, from {cache_dir}\n", "")
    assert names(cache_dir) == ["demo-f-cpp-k"]
    assert list((cache_dir / "failed").iterdir()) == list((cache_dir / "tmp").iterdir()) == []


def test_clean_all_keeps_what_live_processes_hold(opkit, cache_dir):
    elsewhere("a", "b")
    assert cache.find("demo-f-cpp-a")
    code, out, _ = opkit("clean", "--all")
    assert code == 0
    assert out.startswith("removed 1 kernel, ")
    assert out.endswith(f"from {cache_dir}\nkept 1 kernel that live processes hold\n")
    assert names(cache_dir) == ["demo-f-cpp-a"]


def test_clean_by_age_and_by_size(opkit, cache_dir):
    elsewhere("a", age=10)
    elsewhere("b", age=2)
    elsewhere("c", age=1)
    assert opkit("clean", "--older-than", "5")[1].startswith("removed 1 kernel, ")
    assert names(cache_dir) == ["demo-f-cpp-b", "demo-f-cpp-c"]
    assert opkit("clean", "--max-size", "2K")[1].startswith("removed 1 kernel, ")
    assert names(cache_dir) == ["demo-f-cpp-c"]
    assert opkit("clean", "--max-size", "0")[1].startswith("removed 1 kernel, ")
    assert names(cache_dir) == []


def test_clean_keeps_to_the_limit_of_the_environment(opkit, cache_dir, monkeypatch):
    elsewhere("a", age=2)
    elsewhere("b", age=1)
    monkeypatch.setenv("OPKIT_CACHE_LIMIT", "2K")
    _config.refresh()
    opkit("clean")
    assert names(cache_dir) == ["demo-f-cpp-b"]


@pytest.mark.parametrize("words", [["--older-than", "x"], ["--older-than", "-1"], ["--max-size", "big"]])
def test_clean_refuses_what_is_no_number(opkit, words):
    code, out, err = opkit("clean", *words)
    assert (code, out) == (2, "")
    assert f"argument {words[0]}: " in err
    assert "Traceback" not in err


# ---------------------------------------------------------------- verify


def test_verify_removes_what_is_damaged(opkit, cache_dir):
    elsewhere("a", "b")
    library = next((cache_dir / "lib" / "demo-f-cpp-a").glob("*/it.so"))
    stat = library.stat()
    library.write_bytes(b"y" * 1000)
    os.utime(library, ns=(stat.st_atime_ns, stat.st_mtime_ns))  # so that only reading it tells
    code, out, err = opkit("verify")
    assert (code, err) == (1, "")
    assert out == (
        f"damaged: demo-f-cpp-a/{library.parent.name} (removed)\n1 kernel whole, 1 damaged, in {cache_dir}\n"
    )
    assert opkit("verify") == (0, f"1 kernel whole, 0 damaged, in {cache_dir}\n", "")
    assert names(cache_dir) == ["demo-f-cpp-b"]


def test_verify_as_json_and_in_a_folder_that_is_only_read(opkit, cache_dir, use, tmp_path, monkeypatch):
    elsewhere("a")
    for manifest in cache_dir.rglob("manifest.json"):
        manifest.write_text("")
    monkeypatch.setenv("OPKIT_CACHE_PATH", str(cache_dir))
    use(tmp_path / "own")
    code, out, _ = opkit("verify", "--json")
    assert code == 1
    data = json.loads(out)
    assert data["whole"] == 0
    assert [(row["name"], row["removed"]) for row in data["damaged"]] == [("demo-f-cpp-a", False)]
    assert f"(kept: {cache_dir} is only read; remove it there)" in opkit("verify")[1]
    assert names(cache_dir) == ["demo-f-cpp-a"]


# ---------------------------------------------------------------- push and pull


def test_push_and_pull_carry_kernels_from_one_machine_to_another(opkit, cache_dir, use, tmp_path):
    elsewhere("a", "b")
    elsewhere("k", label="demo::other [cpp]")
    url = f"file://{tmp_path}/shared"
    code, out, err = opkit("push", "--to", url, "demo::f")
    assert (code, out) == (0, f"pushed 2 kernels to {url}; 0 were there\n")
    assert [line.split()[:2] for line in err.splitlines()] == [["push", "1/2"], ["push", "2/2"]]
    assert opkit("push", "--to", url)[1] == f"pushed 1 kernel to {url}; 2 were there\n"
    there = use(tmp_path / "there")
    code, out, err = opkit("pull", "--from", url, "demo-f-*")
    assert (code, out) == (0, f"pulled 2 kernels from {url}; 0 were here\n")
    assert [line.split()[:2] for line in err.splitlines()] == [["pull", "1/2"], ["pull", "2/2"]]
    assert names(there) == ["demo-f-cpp-a", "demo-f-cpp-b"]
    assert opkit("pull", "--from", url)[1] == f"pulled 1 kernel from {url}; 2 were here\n"
    assert obtain(None, "a", "demo::f [cpp]").read_bytes() == b"x" * 1000


def test_push_and_pull_use_the_shared_cache_of_the_environment(opkit, tmp_path, monkeypatch):
    elsewhere("a")
    monkeypatch.setenv("OPKIT_CACHE_REMOTE", f"file://{tmp_path}/shared")
    _config.refresh()
    assert opkit("push")[0] == 0
    assert opkit("pull")[1] == f"pulled 0 kernels from file://{tmp_path}/shared; 1 were here\n"


def test_push_and_pull_say_so_where_there_is_nothing(opkit, tmp_path):
    url = f"file://{tmp_path}/shared"
    assert opkit("push", "--to", url) == (0, f"pushed 0 kernels to {url}; 0 were there\n", "")
    assert opkit("pull", "--from", url) == (0, f"pulled 0 kernels from {url}; 0 were here\n", "")


@pytest.mark.parametrize(("action", "option"), [("push", "--to"), ("pull", "--from")])
def test_push_and_pull_need_an_address(opkit, action, option):
    assert opkit(action) == (
        1,
        "",
        f"opkit: opkit cache {action}: no shared cache is named. Expected {option} URL, or OPKIT_CACHE_REMOTE, as in "
        f"opkit cache {action} {option} s3://bucket/kernels\n",
    )


def test_a_name_that_nothing_has_is_said(opkit, tmp_path, cache_dir):
    elsewhere("a")
    assert opkit("push", "--to", f"file://{tmp_path}/shared", "demo::nothing") == (
        1,
        "",
        f"opkit: looking for 'demo::nothing' in the cache {cache_dir}: nothing there has that name. Expected an op "
        "such as demo::f, or a name that `opkit cache list` shows.\n",
    )


def test_push_leaves_out_what_is_damaged(opkit, cache_dir, tmp_path):
    elsewhere("a", "b")
    next((cache_dir / "lib" / "demo-f-cpp-a").glob("*/it.so")).write_bytes(b"")
    code, out, err = opkit("push", "--to", f"file://{tmp_path}/shared")
    assert code == 1
    assert out.startswith("pushed 1 kernel to ")
    assert err.endswith("opkit: left out 1 damaged; run opkit cache verify\n")


def test_pull_refuses_what_is_damaged_and_goes_on(opkit, cache_dir, use, tmp_path):
    elsewhere("a")
    elsewhere("b", label="demo::g [cpp]")
    url = f"file://{tmp_path}/shared"
    opkit("push", "--to", url)
    manifest = next((tmp_path / "shared" / "lib" / "demo-f-cpp-a").iterdir())
    manifest.write_text("{}")
    there = use(tmp_path / "there")
    code, out, err = opkit("pull", "--from", url)
    assert (code, out) == (1, f"pulled 1 kernel from {url}; 0 were here\n")
    assert f"opkit: reading {url}/lib/demo-f-cpp-a/" in err
    assert names(there) == ["demo-g-cpp-b"]


def test_a_shared_cache_that_cannot_be_reached_is_one_text(opkit):
    code, out, err = opkit("pull", "--from", "nosuch://x")
    assert (code, out) == (1, "")
    assert err == "opkit: using the shared cache nosuch://x: Protocol not known: nosuch\n"


# ---------------------------------------------------------------- the command itself


def test_a_folder_that_is_refused_is_one_text(opkit, cache_dir):
    cache_dir.mkdir()
    cache_dir.chmod(0o777)
    for action in (["list"], ["clean", "--all"], ["verify"]):
        code, _, err = opkit(*action)
        assert code == 1
        assert err.startswith(
            f"opkit: opening the cache: the cache folder {cache_dir} may be written by others"
        )


@pytest.mark.parametrize("words", [[], ["nonsense"]])
def test_wrong_usage_is_exit_code_2(opkit, words):
    code, out, err = opkit(*words)
    assert (code, out) == (2, "")
    assert err.startswith("usage: opkit cache")


def test_help_is_exit_code_0(opkit):
    code, out, _ = opkit("push", "--help")
    assert code == 0
    assert "--to URL" in out


def test_an_interrupt_is_no_traceback(opkit, monkeypatch):
    def interrupt():
        raise KeyboardInterrupt

    monkeypatch.setattr(cache, "roots", interrupt)
    assert opkit("list") == (130, "", "opkit: interrupted\n")


def test_a_cache_that_cannot_be_written_is_no_traceback(opkit, monkeypatch):
    def refuse(*args):
        raise PermissionError(13, "Permission denied", "/the/cache")

    elsewhere("a")
    monkeypatch.setattr(os, "rename", refuse)
    assert opkit("clean", "--all") == (1, "", "opkit: [Errno 13] Permission denied: '/the/cache'\n")


def test_nobody_who_reads_on_is_no_traceback(cache_dir):
    elsewhere("a")

    def closed():
        read, write = os.pipe()
        os.close(read)
        os.dup2(write, 1)
        sys.stdout = os.fdopen(1, "w")
        assert cli.main(["cache", "list"]) == 0
        sys.stdout.flush()

    assert exit_code(forked(closed)) == 0


def test_python_m_opkit_is_the_same_command(cache_dir):
    done = subprocess.run([sys.executable, "-m", "opkit", "cache", "list"], capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, f"no compiled kernels in {cache_dir}\n", "")

"""A plugin that a process died of is left out by the next one, until somebody lifts that."""

from __future__ import annotations

import fcntl
import os
import re
import subprocess
import sys
import textwrap
import threading

import pytest

from opkit.plugins import quarantine, records

pytestmark = pytest.mark.usefixtures("cache_dir")

CRASH = "os.kill(os.getpid(), signal.SIGSEGV)"
KILL = "os.kill(os.getpid(), signal.SIGKILL)"


def process(ending: str, name: str = "fast", version: str = "1.0", before: str = "") -> int:
    """Run a process that ends so while it calls a plugin; return its exit code."""
    code = f"""
        import os, signal, sys
        {before}
        from opkit.plugins import quarantine
        with quarantine.marked({name!r}, {version!r}, "loading fast:register"):
            {ending}
    """
    clean = {k: v for k, v in os.environ.items() if k != "PYTHONFAULTHANDLER"}
    return subprocess.run([sys.executable, "-c", textwrap.dedent(code)], env=clean).returncode


def marks() -> list[str]:
    return os.listdir(records.path("calls"))


def test_a_crash_quarantines_at_once_and_says_where_it_was():
    assert process(CRASH) == -11
    found = quarantine.find("fast", "1.0")
    assert found is not None
    assert (found.name, found.version) == ("fast", "1.0")
    assert found.reason == "loading fast:register crashed the process (Segmentation fault)"
    assert re.search(r'File "<string>", line \d+ in <module>', found.evidence)
    assert quarantine.find_all([("fast", "1.0"), ("other", "1.0")]) == {("fast", "1.0"): found}
    assert marks() == []


def test_it_holds_for_one_plugin_and_version():
    process(CRASH)
    assert quarantine.find("fast", "1.0")
    assert quarantine.find("fast", "1.1") is None
    assert quarantine.find("faster", "1.0") is None


def test_it_holds_until_it_is_lifted():
    assert not quarantine.lift("fast")
    process(CRASH)
    assert quarantine.lift("fast")  # before anybody has looked
    assert quarantine.find("fast", "1.0") is None
    quarantine.put("fast", "1.0", "its library crashes", "here")
    quarantine.put("faster", "1.0", "its library crashes")
    quarantine.clear("fast", "1.0")  # another process that has it loaded
    assert quarantine.find("fast", "1.0").evidence == "here"
    assert quarantine.lift("fast")
    assert quarantine.find("fast", "1.0") is None
    assert quarantine.find("faster", "1.0") is not None
    assert quarantine.remedy("fast").endswith(": opkit plugins enable fast.")


@pytest.mark.parametrize("ending", [KILL, "os._exit(0)"])
def test_a_process_that_ends_without_a_crash_counts_and_the_second_in_a_row_quarantines(ending):
    process(ending)
    assert quarantine.find("fast", "1.0") is None
    process(ending)
    reason = "loading fast:register ended the process, 2 times in a row, without a crash"
    assert quarantine.find("fast", "1.0").reason == reason


def test_the_processes_of_a_job_that_are_ended_together_count_once():
    for _ in range(3):
        process(KILL)
    assert quarantine.find("fast", "1.0") is None
    assert quarantine.find("fast", "1.0") is None
    process(KILL)
    assert quarantine.find("fast", "1.0")


def test_a_call_that_works_starts_the_count_anew():
    process(KILL)
    assert quarantine.find("fast", "1.0") is None
    with quarantine.marked("fast", "1.0", "loading"):
        pass
    quarantine.clear("fast", "1.0")
    process(KILL)
    assert quarantine.find("fast", "1.0") is None


def test_suspecting_twice_quarantines():
    quarantine.suspect("fast", "1.0", "it hung", "here")
    assert quarantine.find("fast", "1.0") is None
    quarantine.suspect("fast", "1.0", "it hung again", "there")
    assert quarantine.find("fast", "1.0")[2:4] == ("it hung again", "there")


def test_a_call_that_goes_on_or_raises_is_no_crash():
    with quarantine.marked("fast", "1.0", "loading"):
        (name,) = marks()
        code = "from opkit.plugins import quarantine; print(quarantine.find('fast', '1.0'))"
        assert subprocess.run([sys.executable, "-c", code], capture_output=True).stdout == b"None\n"
        assert marks() == [name]
    with pytest.raises(ValueError), quarantine.marked("fast", "1.0", "loading"):
        raise ValueError
    assert marks() == []
    assert process("sys.exit(3)") == 3
    assert quarantine.find("fast", "1.0") is None


def test_a_call_that_begins_while_another_process_looks_is_not_taken_for_one_that_ended(monkeypatch):
    flock, looks = fcntl.flock, []

    def looked_at(fd, how):
        if not looks:  # as another process does, which has opened the file just now
            other = os.open(f"/proc/self/fd/{fd}", os.O_RDWR)
            flock(other, fcntl.LOCK_EX)
            looks.append(threading.Timer(0.02, os.close, [other]))
            looks[0].start()
        flock(fd, how)

    monkeypatch.setattr(fcntl, "flock", looked_at)
    with quarantine.marked("fast", "1.0", "loading fast"):
        looks[0].join()
        assert quarantine.find("fast", "1.0") is None
        assert len(marks()) == 1
    assert not quarantine.lift("fast")  # nothing was counted


def test_the_innermost_of_calls_within_calls_is_to_blame():
    process(
        f"\n            with quarantine.marked('inner', '2', 'loading inner:f'):\n                {CRASH}"
    )
    assert quarantine.find("inner", "2").reason.startswith("loading inner:f crashed")
    assert quarantine.find("fast", "1.0") is None
    inner = "with quarantine.marked('inner', '2', 'x'): pass"
    process(f"\n            {inner}\n            {CRASH}", version="2.0")
    assert "crashed" in quarantine.find("fast", "2.0").reason


def test_a_child_that_was_forked_meanwhile_takes_nothing_away():
    with quarantine.marked("fast", "1.0", "loading"):
        pid = os.fork()
        if pid == 0:
            try:
                raise ValueError
            except ValueError:
                pass
            os._exit(0)
        os.waitpid(pid, 0)
        assert len(marks()) == 1


def test_faulthandler_of_the_user_is_left_alone():
    before = "import faulthandler; faulthandler.enable(open('/dev/null', 'w'))"
    assert process(CRASH, before=before) == -11
    assert quarantine.find("fast", "1.0") is None  # it cannot be told from being ended from outside
    process(CRASH, before=before)
    assert quarantine.find("fast", "1.0")
    code = f"import faulthandler; {before}; faulthandler.is_enabled() or os._exit(4)"
    assert process("import faulthandler; assert faulthandler.is_enabled()", before=code) == 0
    assert process("pass\n        import faulthandler; assert not faulthandler.is_enabled()") == 0


def test_nothing_breaks_where_nothing_can_be_remembered(monkeypatch, tmp_path):
    from opkit import _config

    (tmp_path / "file").write_text("")
    monkeypatch.setenv("OPKIT_CACHE_DIR", str(tmp_path / "file"))
    _config.refresh()
    with quarantine.marked("fast", "1.0", "loading"):
        pass
    quarantine.put("fast", "1.0", "reason")
    quarantine.clear("fast", "1.0")
    assert quarantine.find_all([("fast", "1.0")]) == {}
    assert not quarantine.lift("fast")


def test_a_damaged_record_is_no_record():
    quarantine.put("fast", "1.0", "reason")
    (name,) = os.listdir(records.path("quarantine"))
    for text, reason in (('{"strikes": 2', None), ('{"strikes": 2}', "it broke a process")):
        with open(records.path("quarantine", name), "w") as stream:
            stream.write(text)
        assert getattr(quarantine.find("fast", "1.0"), "reason", None) == reason

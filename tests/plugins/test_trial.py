"""Native libraries are opened in another process first, and what became of them is remembered by their content."""

from __future__ import annotations

import os
import shutil
import sys
import threading
from pathlib import Path

import pytest

from opkit.plugins import trial
from opkit.plugins.trial import Trial

pytestmark = pytest.mark.usefixtures("cache_dir")

GOOD = "int it(void) { return 1; }"
AT_OPENING = "__attribute__((constructor)) static void start(void) { %s }"
CRASHING = AT_OPENING % "*(volatile int *)0 = 1;"
LEAVING = "#include <stdlib.h>\n" + AT_OPENING % "exit(0);"
ABORTING = "#include <stdio.h>\n#include <stdlib.h>\n" + AT_OPENING % 'fputs("no licence", stderr); abort();'
HANGING = "#include <unistd.h>\n" + AT_OPENING % "for (;;) pause();"
LACKING = "void nowhere(void); " + AT_OPENING % "nowhere();"


@pytest.fixture
def tries(monkeypatch):
    """The libraries that were tried, and not remembered."""
    found, original = [], trial._try
    monkeypatch.setattr(trial, "_try", lambda path, *args: found.append(path) or original(path, *args))
    return found


def test_a_good_library_passes_and_is_remembered_by_its_content(compiled, tries, tmp_path):
    library = compiled(GOOD)
    assert trial.of(library, plugin="fast") == Trial("passed")
    copy = shutil.copy(library, tmp_path / "copy.so")
    os.utime(library, (1, 1))
    for path in (library, library, copy):
        assert trial.of(path, plugin="fast").outcome == "passed"
    assert tries == [library]


def test_another_content_at_the_same_place_is_tried(compiled, tries):
    library = compiled(GOOD)
    trial.of(library, plugin="fast")
    compiled("int other(void) { return 2; }")
    trial.of(library, plugin="fast")
    assert tries == [library, library]


def test_what_kills_the_process_is_crashed(compiled, tries):
    library = compiled(CRASHING)
    found = trial.of(library, plugin="fast")
    assert (found.outcome, found.detail) == ("crashed", "the process ended by SIGSEGV")
    assert "Fatal Python error: Segmentation fault" in found.said
    assert found.is_harmful
    assert trial.of(library, plugin="fast") == found
    assert tries == [library]
    assert not trial.forget("other")
    assert trial.forget("fast")
    assert trial.of(library, plugin="fast").detail == found.detail
    assert tries == [library, library]


def test_what_ends_the_process_is_crashed_and_its_last_words_are_kept(compiled):
    found = trial.of(compiled(LEAVING), plugin="fast")
    assert (found.outcome, found.detail) == ("crashed", "the process ended with exit code 0")
    found = trial.of(compiled(ABORTING), plugin="fast")
    assert (found.outcome, found.detail) == ("crashed", "the process ended by SIGABRT")
    assert "no licence" in found.said


def test_what_does_not_come_back_is_hung(compiled):
    found = trial.of(compiled(HANGING), plugin="fast", limit=0.5)
    assert (found.outcome, found.detail) == ("hung", "it was not open after 0.5 s")
    assert "in _open" in found.said
    assert found.is_harmful


def test_what_cannot_be_opened_does_no_harm(compiled, tmp_path):
    found = trial.of(compiled(LACKING), plugin="fast")
    assert found.outcome == "passed"
    assert found.detail.startswith("OSError: ")
    assert "undefined symbol: nowhere" in found.detail
    absent = trial.of(str(tmp_path / "absent.so"), plugin="fast")
    assert absent == Trial("untried", "it cannot be read (No such file or directory)")
    assert not absent.is_harmful


def test_libraries_that_come_before_are_opened_before(compiled):
    first = compiled("void nowhere(void) {}", "first", "-Wl,-soname,first.so")
    second = compiled(LACKING, "second", f"-L{Path(first).parent}", "-l:first.so")
    assert "first.so" in trial.of(second, plugin="fast").detail  # the linker does not know where it is
    assert trial.of(second, plugin="fast", after=[first]) == Trial("passed")


def test_an_extension_module_is_imported(compiled):
    code = "void *PyInit_fast(void) { *(volatile int *)0 = 1; return 0; }"
    library = compiled(code, "fast")
    assert trial.of(library, plugin="fast").outcome == "passed"  # opening it is not all
    assert trial.of(library, plugin="fast", module="fast").outcome == "crashed"


def test_of_several_that_want_to_know_one_finds_out(compiled, tries):
    library, found = compiled(GOOD), []
    threads = [
        threading.Thread(target=lambda: found.append(trial.of(library, plugin="fast"))) for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [Trial("passed")] * 4
    assert tries == [library]


def test_a_process_that_does_not_start_says_nothing_about_the_library(compiled, monkeypatch):
    library = compiled(CRASHING)
    monkeypatch.setattr(sys, "executable", "/bin/false")
    found = trial.of(library, plugin="fast")
    assert (found.outcome, found.detail) == ("untried", "the process for it did not start")
    monkeypatch.setattr(sys, "executable", "/nowhere/python")
    assert (
        trial.of(library, plugin="fast").detail == "no process could be started (No such file or directory)"
    )
    monkeypatch.setattr(sys, "executable", "")
    assert "was not started by a Python" in trial.of(library, plugin="fast").detail
    monkeypatch.undo()
    assert trial.of(library, plugin="fast").outcome == "crashed"

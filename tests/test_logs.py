"""OPKIT_LOGS: which rooms speak, what they say, and that they cost nothing while they are silent."""

from __future__ import annotations

import logging
import os
import re
import subprocess
import sys

import pytest
import torch
from torch import Tensor

import opkit
from opkit import _config, _logs
from opkit.dispatch import select

TWICE = """
#include <opkit/kernel.h>
void twice(opkit::Tensor x, opkit::Tensor y) {
  for (int64_t i = 0; i < x.numel(); ++i) y.data<float>()[i] = 2 * x.data<float>()[i];
}
"""
SCRIPT = f"""
import opkit, torch
@opkit.op("demo::twice", shapes="*b -> *b")
def twice(x: torch.Tensor) -> torch.Tensor:
    return 2 * x
twice.register_kernel("cpu", opkit.cpp.kernel('''{TWICE}'''), dtypes=(torch.float32,))
for dtype in (torch.float32, torch.float32, torch.float64):
    twice(torch.ones(3, dtype=dtype))
"""


@pytest.fixture
def twice(registry):
    @opkit.op("t::twice", shapes="*b -> *b")
    def twice(x: Tensor) -> Tensor:
        return 2 * x

    return twice


@pytest.fixture
def logs(monkeypatch):
    """Sets OPKIT_LOGS, as if the process had begun with it."""

    def set_up(text):
        monkeypatch.setenv("OPKIT_LOGS", text)
        _config.refresh()
        _logs.set_up()

    yield set_up
    monkeypatch.undo()
    _config.refresh()
    _logs.set_up()


def test_a_process_says_on_stderr_what_it_builds_finds_and_selects(tmp_path):
    environment = {**os.environ, "OPKIT_CACHE_DIR": str(tmp_path), "OPKIT_NATIVE": "0"}

    def said(logs):
        run = subprocess.run(
            [sys.executable, "-W", "ignore", "-c", SCRIPT],
            env={**environment, "OPKIT_LOGS": logs}, capture_output=True, text=True, check=True,
        )  # fmt: skip
        lines = [line for line in run.stderr.splitlines() if line.startswith("[")]
        assert all(re.match(r"\[\d\d:\d\d:\d\d\.\d{3}\] opkit\.\w+: ", line) for line in lines), run.stderr
        return [line.partition("] ")[2] for line in lines]

    first = said("cache,+build,+select")
    assert first[:2] == [
        "opkit.select: demo::twice: x (3,) float32 on cpu runs cpp (priority 0)",
        "opkit.cache: demo::twice [cpp]: in no cache",
    ]
    assert any(line.startswith("opkit.build: demo::twice [cpp]: building in ") for line in first)
    assert any(re.fullmatch(r"opkit\.build: demo::twice \[cpp\]: built in \d+\.\d\d s", s) for s in first)
    assert any("opkit.build: $ " in line and " -O3 " in line for line in first)
    assert first[-2:] == [
        "opkit.select: demo::twice: x (3,) float64 on cpu runs reference (last fallback)",
        "opkit.select: demo::twice: not cpp: dtype float64 is not among float32",
    ]
    second = said("cache")
    assert len(second) == 1
    assert second[0].startswith(f"opkit.cache: demo::twice [cpp]: found in {tmp_path}/lib/demo-twice-cpp-")


def test_a_program_may_set_the_loggers_up_itself(twice, caplog):
    with caplog.at_level(logging.INFO, "opkit.select"):
        twice(torch.ones(2, 3))
        twice(torch.ones(2, 3))
    assert caplog.messages == ["t::twice: x (2, 3) float32 on cpu runs reference (last fallback)"]


def test_a_choice_says_why(twice, caplog):
    twice.register_kernel("cpu", lambda x: x + x, backend="sum", when=lambda x: x.numel() > 3 or "too short")
    twice.register_kernel("cpu", lambda x: 2 * x, backend="mul", priority=-1)
    with caplog.at_level(logging.DEBUG, "opkit.select"):
        twice(torch.ones(2))
        with opkit.use_backend("mul"):
            twice(torch.ones(9))
    assert caplog.messages == [
        "t::twice: x (2,) float32 on cpu runs mul (priority -1)",
        "t::twice: not sum: too short",
        "t::twice: x (9,) float32 on cpu runs mul (preferred (mul))",
    ]


def test_calls_whose_kernel_is_decided_do_not_ask_a_logger(twice, monkeypatch):
    twice(torch.ones(2))
    monkeypatch.setattr(select, "_LOG", None)  # any use of it raises
    twice(torch.ones(2))
    with pytest.raises(AttributeError):
        twice(torch.ones(2).double())


def test_a_build_that_fails_is_an_error_in_the_log(twice, caplog):
    twice.register_kernel("cpu", opkit.cpp.kernel(TWICE.replace("numel()", "numle()")))
    with caplog.at_level(logging.ERROR, "opkit.build"), pytest.raises(opkit.BuildError):
        twice(torch.ones(2))
    (message,) = caplog.messages
    assert message.startswith("t::twice [cpp]: failed: building t::twice [cpp]")


def test_nothing_is_said_where_nothing_is_asked(tmp_path):
    environment = {**os.environ, "OPKIT_CACHE_DIR": str(tmp_path), "OPKIT_NATIVE": "0"}
    wrong = SCRIPT.replace("numel()", "numle()")
    run = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", wrong], env=environment, capture_output=True, text=True
    )
    assert "opkit.BuildError: building demo::twice [cpp]: 1 error" in run.stderr
    assert "demo::twice [cpp]: failed: " not in run.stderr


def test_what_is_measured_is_told(twice, caplog):
    twice.register_kernel("cpu", lambda x: x + x, backend="sum")
    with caplog.at_level(logging.INFO, "opkit.tune"):
        opkit.tune(twice, [(torch.ones(2),)], min_run_time=0.001)
    assert len(caplog.messages) == 2
    assert sum(message.endswith(", and is chosen") for message in caplog.messages) == 1
    assert caplog.messages[0].startswith("t::twice: x (2,) float32 on cpu: ")


def test_signs_are_levels_and_all_is_every_room(logs):
    logs("+build,select,-cache")
    levels = {room: _logs.logger(room).level for room in _config.ROOMS}
    assert levels == {"build": 10, "select": 20, "cache": 40, "native": 0, "plugins": 0, "tune": 0}
    logs("all,+tune")
    assert {_logs.logger(room).level for room in _config.ROOMS} == {10, 20}


def test_what_is_said_goes_to_the_stderr_of_now_and_nowhere_twice(logs, twice, capsys, caplog):
    logs("select")
    logs("select")
    twice(torch.ones(2))
    assert capsys.readouterr().err.count("opkit.select: t::twice: x (2,) float32 on cpu runs reference") == 1
    assert caplog.messages == []
    logs("")
    twice(torch.ones(2).double())
    assert capsys.readouterr().err == ""


def test_a_room_that_there_is_not_is_refused_with_those_that_there_are(logs):
    with pytest.raises(opkit.ConfigError) as caught:
        logs("+build,selects")
    assert str(caught.value) == (
        "reading OPKIT_LOGS: found 'selects'; expected one of build, cache, native, plugins, select, tune, all, with + "
        "before it for more and - for errors only. Did you mean 'select'? It says: what opkit tells of its work on "
        "stderr: +build,select. Unset it or use a legal value."
    )

"""Taking turns: in which order, how often, and what is done before each."""

from __future__ import annotations

import contextlib

import pytest

from opkit.bench import timing
from opkit.bench.timing import Contestant


class Log:
    """What was called, in order, by contestants that take some seconds a call."""

    def __init__(self, time):
        self.time = time
        self.events = []

    def contestant(self, name, seconds):
        def prepare():
            self.events.append(f"prepare {name}")

            def call():
                self.events.append(name)
                self.time.now += seconds

            return call

        @contextlib.contextmanager
        def inside():
            self.events.append(f"enter {name}")
            yield

        return Contestant(prepare, inside)

    def order(self):
        return [e.removeprefix("enter ") for e in self.events if e.startswith("enter ")]


@pytest.fixture
def log(time):
    return Log(time)


def test_contestants_take_turns_forwards_and_backwards(log):
    both = {name: log.contestant(name, 1e-3) for name in "ab"}
    timing.cold(both, lambda: None, rounds=4, min_run_time=10)
    assert "".join(log.order()) == "abbaabba"


def test_cold_calls_are_single_and_after_a_flush(log):
    found = timing.cold(
        {"a": log.contestant("a", 0.5)}, lambda: log.events.append("flush"), rounds=3, min_run_time=10
    )
    assert log.events == ["enter a", "prepare a", "flush", "a"] * 3
    assert found["a"].number == 1
    assert found["a"].times == pytest.approx((0.501,) * 3)


def test_a_flush_takes_no_part_in_the_time(log, time):
    def flush():
        time.now += 100

    assert timing.cold({"a": log.contestant("a", 0.5)}, flush, rounds=3, min_run_time=10)["a"].times[0] < 1


def test_warm_calls_follow_one_that_is_not_timed(log):
    found = timing.warm({"a": log.contestant("a", 1.0)}, rounds=3, min_run_time=1e-3)
    assert log.events[-4:] == ["enter a", "prepare a", "a", "a"]
    assert found["a"].times == pytest.approx((1.0,) * 3, rel=0.01)


def test_short_calls_are_timed_many_in_a_row(log):
    found = timing.warm(
        {"a": log.contestant("a", 0.01), "b": log.contestant("b", 1.0)}, rounds=5, min_run_time=10
    )
    assert found["a"].number == pytest.approx(2 / 0.01, rel=0.2)
    assert found["b"].number == 2
    assert len(found["a"].times) == len(found["b"].times) == 5
    assert found["a"].times[0] == pytest.approx(0.01, rel=0.01)


def test_slow_calls_get_three_rounds(log):
    found = timing.warm({"a": log.contestant("a", 100.0)}, rounds=9, min_run_time=1)
    assert len(found["a"].times) == 3


def test_a_clock_that_stands_still_ends(monkeypatch):
    monkeypatch.setattr(timing, "_MOST_CALLS", 100)
    monkeypatch.setattr(timing, "clock", lambda: 0.0)
    nothing = Contestant(lambda: lambda: None, contextlib.nullcontext)
    found = timing.warm({"a": nothing}, rounds=3, min_run_time=1)
    assert found["a"].number == 100
    assert found["a"].times == (1e-9,) * 3


def test_the_clock_waits_for_the_device(monkeypatch):
    from torch.utils import benchmark

    monkeypatch.setattr(benchmark, "timer", lambda: 42.0)
    assert timing.clock() == 42.0

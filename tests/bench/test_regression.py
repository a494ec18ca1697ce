"""What counts as slower than before, and what does not."""

from __future__ import annotations

import dataclasses

import pytest

from opkit.bench.regression import FLOOR
from opkit.errors import ArgumentError
from tests.bench.reports import report, row


def copy(seconds=1.0, **other):
    return row("copy", (seconds,) * 3, kind="limit", **other)


def statuses(regression):
    return [change.status for change in regression.changes]


BEFORE = report(row("fast", (2.0, 2.0, 2.0)), copy())


def test_the_same_is_the_same():
    regression = BEFORE.compare_to(BEFORE)
    assert statuses(regression) == ["same"]
    assert regression.ok
    assert str(regression) == "a::b against the baseline: 0 slower, 0 faster, 1 the same"


def test_slower_by_more_than_noise_is_named():
    regression = report(row("fast", (3.0, 3.0, 3.0)), copy()).compare_to(BEFORE)
    assert not regression.ok
    assert str(regression) == (
        "a::b against the baseline: 1 slower, 0 faster, 0 the same\n"
        "  slower: fast at n=4, float32, forward, warm: 2 s before, 3 s now, 1.50x (noise 10%)"
    )
    assert regression.to_dict()["changes"][0]["ratio"] == 1.5


def test_faster_is_named_and_no_regression():
    regression = report(row("fast", (1.0, 1.0, 1.0)), copy()).compare_to(BEFORE)
    assert regression.ok
    assert "  faster: fast at n=4, float32, forward, warm: 2 s before, 1 s now, 0.50x (noise 10%)" in str(
        regression
    )


def test_two_runs_may_differ_by_the_floor():
    near = 2.0 * (1 + FLOOR) * 0.99
    assert report(row("fast", (near,) * 3), copy()).compare_to(BEFORE).ok
    far = 2.0 * (1 + FLOOR) * 1.01
    assert not report(row("fast", (far,) * 3), copy()).compare_to(BEFORE).ok


def test_rounds_that_differ_are_noise():
    differing = report(row("fast", (2.2, 2.3, 2.4)), copy()).compare_to(BEFORE).changes[0]
    assert differing.status == "same"
    assert FLOOR < differing.noise < 0.5
    unsteady = report(row("fast", (1.5, 3.0, 5.0)), copy())
    change = unsteady.compare_to(BEFORE).changes[0]
    assert change.noise > 0.5
    assert change.status == "unsure"


def test_what_was_too_disturbed_is_no_regression_and_said():
    regression = report(row("fast", (30.0, 50.0, 90.0)), copy()).compare_to(BEFORE)
    assert regression.ok
    assert str(regression) == (
        "a::b against the baseline: 0 slower, 0 faster, 0 the same, 1 too disturbed to say: measure again when the "
        "machine is idle"
    )


def test_a_kernel_that_was_once_as_fast_as_before_was_disturbed():
    rest = (3.0,) * 6
    alike = row("copy", (1.0,) * 7, kind="limit")
    assert report(row("fast", (2.0, *rest)), alike).compare_to(BEFORE).ok
    assert not report(row("fast", (2.9, *rest)), alike).compare_to(BEFORE).ok


def test_a_machine_that_is_slower_today_accuses_no_kernel():
    assert report(row("fast", (4.0,) * 3), copy(2.0)).compare_to(BEFORE).ok


def test_a_copy_that_is_faster_today_accuses_no_kernel():
    assert report(row("fast", (2.0,) * 3), copy(0.5)).compare_to(BEFORE).ok


def test_without_a_copy_the_time_alone_counts():
    before = report(row("fast", (2.0,) * 3))
    assert not report(row("fast", (3.0,) * 3)).compare_to(before).ok


def test_what_was_timed_and_is_wrong_now_is_a_regression():
    wrong = row("fast", status="wrong", reason="out is 2 at [0]")
    regression = report(wrong, copy()).compare_to(BEFORE)
    assert [str(change) for change in regression.slower] == [
        "wrong: fast at n=4, float32, forward, warm: out is 2 at [0]"
    ]


def test_what_is_gone_is_a_regression():
    regression = report(copy()).compare_to(BEFORE)
    assert [str(change) for change in regression.slower] == [
        "gone: fast at n=4, float32, forward, warm: it is no candidate any more"
    ]
    assert statuses(report(row("fast", reason="n is odd"), copy()).compare_to(BEFORE)) == ["gone"]


def test_what_was_not_asked_for_is_not_gone():
    named = report(
        row("other", (1.0,) * 3), row("fast", (2.0,) * 3), copy(), settings={"backends": ["other"]}
    )
    before = report(
        row("fast", (2.0,) * 3), row("third", (2.0,) * 3), row("eager", (2.0,) * 3, kind="peer"), copy()
    )
    assert [c.name for c in named.compare_to(before).changes] == ["fast"]
    everything = report(row("fast", (2.0,) * 3), copy())
    assert [(c.name, c.status) for c in everything.compare_to(before).changes] == [
        ("fast", "same"), ("third", "gone"),
    ]  # fmt: skip


def test_only_calls_of_both_are_compared():
    before = report(row("fast", (2.0,) * 3), copy(), row("fast", (2.0,) * 3, n=8), copy(n=8))
    assert statuses(report(row("fast", (2.0,) * 3), copy()).compare_to(before)) == ["same"]


def test_what_is_new_is_not_compared():
    assert statuses(report(row("new", (9.0,) * 3), row("fast", (2.0,) * 3)).compare_to(BEFORE)) == ["same"]


@pytest.mark.parametrize(
    ("before", "text"),
    [
        (
            dataclasses.replace(BEFORE, op="a::c"),
            "comparing a::b with a baseline: that is of a::c; expected one of the same op. Name another file.",
        ),
        (
            dataclasses.replace(BEFORE, machine={**BEFORE.machine, "threads": 4}),
            "comparing a::b with a baseline: it was measured on another machine, threads 4 there and 2 here; expected "
            "the same. Write a baseline of this one with report.save.",
        ),
        (
            report(row("fast", (1.0,) * 3, n=99)),
            "comparing a::b with a baseline: they have no call in common; expected the same sizes, dtypes and caches. "
            "Measure with those of the baseline, or write a new one with report.save.",
        ),
    ],
)
def test_what_cannot_be_compared_is_said(before, text):
    with pytest.raises(ArgumentError) as caught:
        BEFORE.compare_to(before)
    assert str(caught.value) == text


def test_another_torch_is_compared():
    other = dataclasses.replace(BEFORE, machine={**BEFORE.machine, "torch": "2.14.0"})
    assert BEFORE.compare_to(other).ok


def test_compare_takes_a_baseline(scale, compare, time, tmp_path):
    before = compare(scale, over={"n": [4]}, backends=["fast"])
    path = before.save(tmp_path / "before.json")
    assert compare(scale, over={"n": [4]}, backends=["fast"], baseline=path).ok
    scale.register_kernel("cpu", time.taking(2, lambda x, w, p: x * w**p), backend="fast")
    report = compare(scale, over={"n": [4]}, backends=["fast"], baseline=before)
    assert not report.ok
    assert "slower: fast at n=4, float32, forward, warm: 1 s before, 2 s now, 2.00x" in " ".join(
        str(report).split()
    )
    assert not report.to_dict()["regression"]["ok"]


def test_a_baseline_that_is_not_there_is_said_before_anything_runs(scale, compare):
    with pytest.raises(ArgumentError, match="reading the report nowhere.json"):
        compare(scale, lambda: 1 / 0, baseline="nowhere.json")

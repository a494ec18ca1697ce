"""A report as values: what it keeps, reads again, and is asked for."""

from __future__ import annotations

import json

import pytest
from torch.utils import benchmark

import opkit
from opkit.bench.report import parsed
from opkit.errors import ArgumentError
from tests.bench.reports import MACHINE, report, row


def test_ratios_are_medians_of_rounds_and_not_of_times():
    # Each round is disturbed for both alike: by the medians alone "fast" would be 2.5 times as fast.
    fast, reference = row("fast", (1, 10, 4)), row("reference", (2, 20, 8))
    assert report(fast, reference).speedup(fast) == 2
    assert report(row("fast", (1, 2, 10)), row("reference", (3, 2, 10))).speedup(row("fast", (1, 2, 10))) == 1


def test_the_limit_is_the_copy_in_the_same_rounds():
    fast, copy = row("fast", (2, 4, 6)), row("copy", (1, 2, 3), kind="limit")
    assert report(fast, copy).of_limit(fast) == 0.5
    assert report(fast).of_limit(fast) is None
    assert fast.bandwidth == 250
    assert fast.throughput is None


def test_the_limit_of_what_computes_is_the_greater_one():
    fast, copy = row("fast", (2, 2, 2), flops=1e3, peak=1e3), row("copy", (0.1,) * 3, kind="limit", flops=1e3)
    assert report(fast, copy).of_limit(fast) == 0.5


def test_speed_ups_are_to_the_first_where_the_reference_was_not_timed():
    assert report(row("far"), row("a", (1,) * 3), row("b", (2,) * 3)).standard == "a"
    assert report(row("far")).standard == "reference"
    assert report(row("a", (1,) * 3)).speedup(row("a", (1,) * 3), to="nobody") is None


def test_rows_are_found_by_attributes_and_sizes():
    rows = row("a", (1,), n=4), row("a", (1,), n=8), row("b", (1,), n=8)
    assert report(*rows).find(n=8) == rows[1:]
    assert report(*rows).find(name="a", n=8) == rows[1:2]
    assert report(*rows).find(nothing=1) == ()


def test_a_report_has_a_short_repr():
    assert repr(report(row("a", (1,) * 3))) == "<opkit.bench.Report of a::b: 1 rows, ok>"
    assert repr(report(row("a", status="wrong"))) == "<opkit.bench.Report of a::b: 1 rows, not ok>"


def test_doubt_is_how_rounds_differ():
    assert row("a", (1, 1, 1)).doubt == 0
    assert row("a", (1, 2)).doubt == 0
    assert 0.1 < row("a", (1, 2, 3)).doubt < 1


def test_a_report_is_loaded_as_it_was_saved(tmp_path):
    saved = report(row("a", (1.5, 2, 3)), row("b", status="wrong", reason="off"), settings={"rounds": 3})
    path = saved.save(tmp_path / "saved.json")
    assert opkit.bench.load(path) == saved
    assert opkit.bench.load(str(path)) == saved
    assert opkit.bench.load(saved) is saved
    content = json.loads(path.read_text())
    assert content["machine"] == MACHINE
    assert [r["seconds"] for r in content["rows"]] == [2, None]


def test_what_a_later_opkit_adds_to_rows_is_left_out():
    content = report(row("a", (1.0,) * 3)).to_dict()
    content["rows"][0]["more"] = 1
    assert parsed(content).rows[0].name == "a"


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("{", "it is none (JSONDecodeError: "),
        ("[]", "it is none (TypeError: "),
        ("{}", "it is none (KeyError: 'format')"),
        ('{"format": 99}', "it is none (ValueError: its format is 99, this opkit reads 1)"),
        (
            '{"format": 1, "op": "a", "machine": {}, "settings": {}, "rows": [{}]}',
            "it is none (KeyError: 'times')",
        ),
    ],
)
def test_a_file_that_is_no_report_is_said(tmp_path, text, said):
    path = tmp_path / "saved.json"
    path.write_text(text)
    with pytest.raises(ArgumentError) as caught:
        opkit.bench.load(path)
    assert f"reading the report {path}: {said}" in str(caught.value)
    assert str(caught.value).endswith(
        "expected what report.save or opkit bench --save wrote. Write it again."
    )


@pytest.mark.parametrize(
    ("rows", "said"),
    [
        ([row("a", (1, 0, 1))], "a at n=4, float32, forward, warm has the times (1.0, 0.0, 1.0)"),
        (
            [row("a", (1, 1)), row("b", (1,))],
            "b at n=4, float32, forward, warm has not as many rounds as the others",
        ),
    ],
)
def test_times_that_cannot_be_compared_are_said(tmp_path, rows, said):
    with pytest.raises(ArgumentError) as caught:
        opkit.bench.load(report(*rows).save(tmp_path / "saved.json"))
    assert said in str(caught.value)


def test_a_report_that_is_not_there_is_said(tmp_path):
    with pytest.raises(
        ArgumentError, match="no.json: No such file or directory; expected a file that report.save"
    ):
        opkit.bench.load(tmp_path / "no.json")


def test_torch_compares_the_same_measurements(capsys):
    found = report(row("a", (1e-3, 2e-3, 3e-3)), row("b", (1e-3,) * 3), row("c")).measurements()
    assert [m.median for m in found] == [2e-3, 1e-3]
    benchmark.Compare(found).print()
    printed = capsys.readouterr().out
    assert "a::b, forward, warm" in printed
    assert "n=4, float32" in printed

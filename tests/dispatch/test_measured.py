from __future__ import annotations

import functools
import json
import os
import subprocess
import sys
import textwrap
import warnings

import pytest
import torch

import opkit
from opkit.dispatch import measured
from tests.tune_cases import LARGE, RAN, SMALL, add_small, files, make, ran, selected, tune, wait

pytestmark = pytest.mark.usefixtures("registry", "cache_dir")


@pytest.fixture
def op():
    return make()


# ---------------------------------------------------------------- how long it holds


@pytest.mark.filterwarnings("ignore:.* replaces the one from")
def test_a_further_kernel_a_changed_one_or_one_that_is_gone_has_the_op_chosen_as_before(op):
    tune(op, SMALL)
    op.register_kernel("cpu", lambda x: (wait("new", True), x.clone())[1], backend="new", priority=-1)
    assert selected(op, SMALL)[::4] == ("large", "priority 1 (measured without new; run opkit.tune again)")
    assert ran(op, SMALL) == "large"
    tune(op, SMALL)
    assert ran(op, SMALL) == "small"

    again = make("t::again")
    tune(again, SMALL)
    again.register_kernel("cpu", lambda x: (wait("small", False), x.clone())[1], backend="small")
    said = "priority 1 (measured with other code of small; run opkit.tune again)"
    assert selected(again, SMALL).reason == said
    add_small(again)
    assert selected(again, SMALL).backend == "small"
    again._table.discard(next(k for k in again._table.all() if k.backend == "large"))
    said = "priority 0 (measured with large, which is not registered; run opkit.tune again)"
    assert selected(again, SMALL).reason == said


def test_a_function_is_the_same_wherever_it_stands_and_another_one_once_it_is_edited():
    def identity(text):
        scope = {"functools": functools}
        exec(text, scope)
        return measured.identity(scope["f"])

    same = [
        "def f(x):\n    return [y + 1.5 for y in x]",
        "\n\ndef f(x):\n    # a comment\n    return [y + 1.5 for y in x]",
        "def g(x):\n    return [y + 1.5 for y in x]\nf = functools.partial(g)",
        "def g(x):\n    return [y + 1.5 for y in x]\nf = functools.wraps(g)(lambda x: g(x))",
        "class F:\n    def __call__(x):\n        return [y + 1.5 for y in x]\nf = F()",
    ]
    others = [text.replace("1.5", "2.5") for text in same[:1]] + ["def f(x):\n    return sum(x)", "f = len"]
    assert len({identity(text) for text in same}) == 1
    assert len({identity(text) for text in (same[0], *others)}) == 4


def test_a_plugins_kernel_is_the_same_before_and_after_it_is_fetched(op):
    class Fetch:
        busy = False

        def __init__(self, op):
            op._expect_kernel(
                "cpu",
                self,
                backend="late",
                dtypes=None,
                priority=-1,
                properties=(),
                inplace=(),
                source="late 1.0",
            )
            self.op = op

        def __call__(self):
            kernel = lambda x: (wait("late", False), x.clone())[1]  # noqa: E731
            self.op.register_kernel("cpu", kernel, backend="late", priority=-1, source="late 1.0")

    op._table.discard(next(k for k in op._table.all() if k.backend == "small"))
    Fetch(op)
    assert [r.backend for r in tune(op, SMALL).records if r.chosen] == ["late"]
    again = make()
    again._table.discard(next(k for k in again._table.all() if k.backend == "small"))
    Fetch(again)
    assert ran(again, SMALL) == "late"
    assert selected(again, SMALL).reason.startswith("measured ")


def test_a_kernel_for_another_device_changes_nothing(op):
    tune(op, SMALL)
    op.register_kernel("cuda", lambda x: x.clone(), backend="far")
    assert ran(op, SMALL) == "small"


def test_a_size_is_measured_anew_and_the_others_stay(op):
    tune(op, SMALL, LARGE)
    before = selected(op, LARGE).reason
    report = tune(op, SMALL)
    assert measured.shown(next(r.seconds for r in report.records if r.chosen)) in selected(op, SMALL).reason
    assert before.startswith("measured ")
    assert selected(op, LARGE).reason == before


def test_forgetting_takes_away_what_was_measured_of_one_op(op, cache_dir):
    other = make("t::other")
    tune(op, SMALL)
    tune(other, SMALL)
    report = opkit.tune(op, forget=True)
    assert (report.records, ran(op, SMALL), ran(other, SMALL)) == ((), "large", "small")
    assert selected(op, SMALL).reason == "priority 1"
    assert [path.name for path in files(cache_dir)] == ["t-other.json"]
    tune(op, SMALL, LARGE)
    tune(op, LARGE, forget=True)
    assert (ran(op, SMALL), ran(op, LARGE)) == ("large", "large")
    assert "were not measured" in selected(op, SMALL).reason


# ---------------------------------------------------------------- what is kept


def test_what_was_measured_is_of_a_processor_its_threads_and_a_torch(op, cache_dir, monkeypatch):
    tune(op, SMALL)
    (path,) = files(cache_dir)
    content = json.loads(path.read_text())
    assert (content["op"], path.name) == ("t::tuned", "t-tuned.json")
    assert content["machine"] == measured.machine("cpu")
    assert f"{torch.get_num_threads()} threads torch {torch.__version__}" in content["machine"]
    (entry,) = content["measured"]
    assert (entry["dtype"], entry["bucket"], entry["winner"]) == ("float32", 3, "small")
    assert entry["kernels"].keys() == entry["seconds"].keys() == {"small", "large", "reference"}
    monkeypatch.setattr(torch, "get_num_threads", lambda: 77)
    assert ran(make("t::tuned"), SMALL) == "large"
    monkeypatch.undo()


def test_another_device_is_told_by_its_name(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "H200")
    assert measured.machine("cuda") == f"cuda H200 torch {torch.__version__}"
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: 1 / 0)
    assert measured.machine("cuda") == f"cuda torch {torch.__version__}"
    assert measured.machine("meta") == f"meta torch {torch.__version__}"


def test_an_op_that_is_defined_anew_finds_what_was_measured(op):
    tune(op, SMALL)
    assert ran(make(), SMALL) == "small"


def test_a_cache_that_is_only_read_is_looked_into_and_the_own_one_counts_more(
    op, cache_dir, tmp_path, monkeypatch
):
    tune(op, SMALL, LARGE)
    os.rename(cache_dir, tmp_path / "image")
    monkeypatch.setenv("OPKIT_CACHE_PATH", str(tmp_path / "image"))
    opkit._config.refresh()
    assert ran(make(), SMALL) == "small"
    (path,) = (tmp_path / "image" / "tuned").glob("*/*.json")
    own = cache_dir / path.relative_to(tmp_path / "image")
    own.parent.mkdir(parents=True)
    own.write_text(path.read_text().replace('"winner": "small"', '"winner": "reference"'))
    assert (ran(make(), SMALL), ran(make(), LARGE)) == ("reference", "large")


@pytest.mark.parametrize(
    "damage",
    [
        lambda text: "",
        lambda text: text[:-20],
        lambda text: "[]",
        lambda text: text.replace('"winner": "small"', '"winner": "none"'),
        lambda text: text.replace('"bucket": 3', '"bucket": "3"'),
        lambda text: text.replace('"seconds": {', '"seconds": {"odd": NaN, '),
        lambda text: text.replace('"cases"', '"sizes"'),
    ],
    ids=["empty", "cut", "a list", "a winner that was not measured", "a bucket", "a time", "a key"],
)
def test_a_damaged_file_is_nothing_measured_and_said_once(op, cache_dir, damage):
    tune(op, SMALL)
    (path,) = files(cache_dir)
    path.write_text(damage(path.read_text()))
    again = make()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        assert ran(again, SMALL) == "large"
        assert selected(again, LARGE).reason == "priority 1"
    (warning,) = caught
    text = str(warning.message)
    assert text.startswith(f"reading what was measured of t::tuned: {path} is damaged (")
    assert "expected what opkit.tune wrote. Kernels are chosen as if nothing was measured." in text
    assert text.endswith("Run opkit.tune on t::tuned again, or remove the file.")
    with pytest.warns(UserWarning, match="It is replaced"):
        tune(again, SMALL)
    assert ran(make(), SMALL) == "small"


def test_a_damaged_file_is_no_error_where_warnings_are_more_than_once(op, cache_dir):
    tune(op, SMALL)
    files(cache_dir)[0].write_text("{")
    again = make()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(UserWarning, match="is damaged"):
            again(SMALL)
        assert ran(again, SMALL) == "large"


def test_a_file_of_a_later_format_or_another_op_is_nothing_measured(op, cache_dir):
    tune(op, SMALL)
    (path,) = files(cache_dir)
    text = path.read_text()
    for other in (text.replace('"format": 1', '"format": 2'), text.replace("t::tuned", "t::other")):
        path.write_text(other)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert ran(make(), SMALL) == "large"


def test_a_cache_that_cannot_be_written_is_said_before_anything_runs(op, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("OPKIT_CACHE_DIR", str(tmp_path / "file"))
    opkit._config.refresh()
    RAN.clear()
    with pytest.raises(opkit.BuildError, match="tuning t::tuned: the cache folder .* cannot be written"):
        tune(op, SMALL)
    assert RAN == []
    assert ran(op, SMALL) == "large"


def test_an_op_that_was_never_measured_looks_into_the_cache_once(op, monkeypatch):
    looked = []
    read = measured.read
    monkeypatch.setattr(measured, "read", lambda *args: looked.append(args) or read(*args))
    for dtype in (torch.float32, torch.float64):
        op(SMALL.to(dtype)), op(LARGE.to(dtype))
    assert looked == [("t::tuned", "cpu")]
    assert all(len(key) == 3 for key in op._table.decided)


# ---------------------------------------------------------------- across processes

PROCESS = """
import sys, time, torch, opkit

@opkit.op("t::shared", shapes="*b -> *b")
def shared(x: torch.Tensor) -> torch.Tensor:
    time.sleep(0.001)
    return x.clone()

@shared.register_kernel("cpu", backend="first", priority=1)
def _(x):
    time.sleep(0.001)
    return x.clone()

@shared.register_kernel("cpu", backend="fast")
def _(x):
    return x.clone() if str(x.dtype) in {"torch.float32", "torch.float64", "torch.int8"} else x + 0

for size in map(int, sys.argv[1:]):
    opkit.tune(shared, [(torch.ones(size),)], min_run_time=0)
print(*(shared.explain(torch.ones(1 << n)).selected for n in range(10)))
"""


@pytest.mark.slow
def test_other_processes_use_what_was_measured_and_several_at_once_lose_nothing(cache_dir, tmp_path):
    script = tmp_path / "shared.py"
    script.write_text(textwrap.dedent(PROCESS))

    def start(*sizes, seed="0"):
        environment = {**os.environ, "OPKIT_AUTOLOAD": "0", "PYTHONHASHSEED": seed}
        return subprocess.Popen(
            [sys.executable, str(script), *map(str, sizes)], stdout=subprocess.PIPE, env=environment
        )

    def printed(process):
        out, _ = process.communicate(timeout=300)
        assert process.returncode == 0
        return out.decode().split()

    both = [start(1, 4, 16, 64, seed="1"), start(2, 8, 32, 128, seed="2")]
    for process in both:
        printed(process)
    assert printed(start(seed="3")) == ["fast"] * 8 + ["first"] * 2
    (path,) = files(cache_dir)
    assert len(json.loads(path.read_text())["measured"]) == 8
    assert os.listdir(path.parent) == [path.name]

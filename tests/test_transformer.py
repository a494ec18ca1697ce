"""examples/transformer learns alike with opkit's ops and in plain torch."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

EXAMPLE = Path(__file__).parents[1] / "examples" / "transformer"
MODULES = ("model", "text", "train")


@pytest.fixture
def example(monkeypatch: pytest.MonkeyPatch) -> Iterator[SimpleNamespace]:
    """Its modules, whose names another example may have too."""
    monkeypatch.syspath_prepend(str(EXAMPLE))
    for name in MODULES:
        monkeypatch.delitem(sys.modules, name, raising=False)
    yield SimpleNamespace(**{name: __import__(name) for name in MODULES})
    for name in MODULES:
        del sys.modules[name]


def small(example: SimpleNamespace, **options: object) -> object:
    size = example.model.Size(width=32, heads=2, layers=2, context=16)
    return example.train.Run("opkit", size=size, batch=8, steps=4, **{"compiled": False, **options})


@pytest.mark.parametrize(
    ("options", "within"),
    [({}, 1e-6), ({"compiled": True, "backend": "aot_eager"}, 1e-6), ({"autocast": True}, 3e-3)],
    ids=["eager", "compiled", "autocast"],
)
def test_both_learn_alike(example, options, within):
    run = small(example, **options)
    ours = torch.tensor(list(example.train.curve(run)))
    plain = torch.tensor(list(example.train.curve(replace(run, ops="plain"))))
    assert (ours - plain).abs().max() < within * plain.max()
    assert ours[-1] < ours[0]


def test_two_processes_learn_as_one_does(example):
    run = small(example)
    alone = torch.tensor(list(example.train.curve(run)))
    together = torch.tensor(example.train.curve_of_ranks(run, 2))
    assert (together - alone).abs().max() < 1e-6 * alone.max()


def test_ranks_share_a_batch(example):
    text = example.text.sources(1000)
    whole = next(example.text.batches(text, 4, 8))
    parts = [next(example.text.batches(text, 4, 8, rank=rank, ranks=2)) for rank in range(2)]
    assert torch.equal(torch.cat(parts), whole)
    assert whole.shape == (4, 9)


@pytest.mark.skipif(
    not torch.cuda.is_available(), reason="no CUDA device: torch.cuda.is_available() is false"
)
@pytest.mark.parametrize("autocast", [False, True])
def test_both_learn_alike_on_cuda(example, autocast):
    run = small(example, device="cuda", autocast=autocast)
    ours = torch.tensor(list(example.train.curve(run)))
    plain = torch.tensor(list(example.train.curve(replace(run, ops="plain"))))
    assert (ours - plain).abs().max() < (3e-3 if autocast else 1e-5) * plain.max()

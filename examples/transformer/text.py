"""Text that is on every machine: the sources of Python's standard library, as bytes."""

from __future__ import annotations

import sysconfig
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor


def sources(limit: int = 4 << 20) -> Tensor:
    """Return the first bytes of the modules, in the order of their names."""
    folder = Path(sysconfig.get_paths()["stdlib"])
    text = bytearray()
    for path in sorted(folder.glob("*.py")):
        text += path.read_bytes()
        if len(text) >= limit:
            break
    return torch.frombuffer(text[:limit], dtype=torch.uint8).long()


def batches(
    text: Tensor, batch: int, context: int, *, seed: int = 0, rank: int = 0, ranks: int = 1
) -> Iterator[Tensor]:
    """Yield pieces of text [batch / ranks, context + 1] at random places: of each batch, those of this rank."""
    places = torch.Generator().manual_seed(seed)
    window = torch.arange(context + 1)
    while True:
        starts = torch.randint(len(text) - context, (batch,), generator=places)
        yield text[starts.chunk(ranks)[rank][:, None] + window]

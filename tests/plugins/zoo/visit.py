"""A program that uses torch and the ops of good plugins, with bad ones installed; run as `visit.py HOW FOLDER`.

Every process that has seen all of it leaves what it was told of the plugins in a file in FOLDER.
"""

from __future__ import annotations

import json
import os
import sys
import warnings
from types import ModuleType


def look(folder: str, *, is_first: bool = True) -> None:
    """Use torch, let every plugin be loaded, use the good ones, and note what became of all."""
    import torch

    import opkit

    if is_first:
        look.taken = torch.library.Library("zoo_taken", "DEF")
    if hasattr(torch, "zoo_device"):
        assert "no driver" in device_error(torch)
    before = os.getcwd()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        opkit.plugins.load()
        double, add = opkit.get("zoo::double"), opkit.get("opkit::vector_add")
    x = torch.arange(-2.0, 2.0, requires_grad=True)
    (torch.relu(x) * 3).sum().backward()
    assert x.grad.tolist() == [0, 0, 0, 3]
    assert torch.nn.Linear(2, 2).to(torch.float64)(torch.ones(1, 2, dtype=torch.float64)).shape == (1, 2)
    assert (torch.ones(1).dtype, os.getcwd()) == (torch.float32, before)
    x = x.detach()
    assert double.explain(x).selected == "good"
    assert double(x).tolist() == [-4, -2, 0, 2]
    assert add.explain(x, x).selected == "good_too"
    assert add(x, x).tolist() == [-4, -2, 0, 2]
    told = {p.name: [p.status, opkit.plugins.why(p.name)] for p in opkit.plugins.list()}
    with open(os.path.join(folder, f"{os.getpid()}.json"), "w") as stream:
        json.dump(told, stream)


def device_error(torch: ModuleType) -> str:
    """Return what using a device whose library does not open raises."""
    try:
        torch.ones(2, device="zoo_device")
    except RuntimeError as error:
        return str(error)
    return ""


class Looking:
    """A data set whose items are had by looking."""

    def __init__(self, folder: str) -> None:
        self.folder = folder

    def __len__(self) -> int:
        return 2

    def __getitem__(self, index: int) -> int:
        look(self.folder)
        return index


def load_data(folder: str, context: str) -> None:
    import torch.utils.data

    loader = torch.utils.data.DataLoader(Looking(folder), num_workers=2, multiprocessing_context=context)
    assert len(list(loader)) == 2


def in_rank(rank: int, folder: str) -> None:
    look(folder)


def main(how: str, folder: str) -> None:
    if how in ("fork", "spawn"):
        load_data(folder, how)
    elif how == "fork_after":
        look(folder)
        load_data_again(folder)
    elif how == "mp_spawn":
        import torch.multiprocessing

        torch.multiprocessing.spawn(in_rank, args=(folder,), nprocs=2)
    else:
        look(folder)


def load_data_again(folder: str) -> None:
    """Look in forked workers of a process that has looked."""
    import torch.utils.data

    class Again(Looking):
        def __getitem__(self, index: int) -> int:
            look(self.folder, is_first=False)
            return index

    loader = torch.utils.data.DataLoader(Again(folder), num_workers=2, multiprocessing_context="fork")
    assert len(list(loader)) == 2


if __name__ == "__main__":
    main(*sys.argv[1:])

"""Training steps of one transformer: compiled or not, under autocast or not, on one process or on several."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from model import Size, Transformer, plain, with_opkit
from text import batches, sources
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel


@dataclass(frozen=True)
class Run:
    """What is trained, and how."""

    ops: str  # plain or opkit
    size: Size = field(default_factory=Size)
    batch: int = 16
    steps: int = 100
    compiled: bool = True
    backend: str = "inductor"
    autocast: bool = False
    device: str = "cpu"


def stepper(
    run: Run, wrap: Callable[[torch.nn.Module], torch.nn.Module] = lambda net: net
) -> Callable[[Tensor], float]:
    """Return what trains a new network on a batch and returns its loss."""
    torch.manual_seed(0)
    ops = with_opkit() if run.ops == "opkit" else plain()
    net = Transformer(run.size, ops).to(run.device)
    optimiser = ops.adamw(net.parameters(), 2e-3)
    wrapped = wrap(net)
    loss_of = torch.compile(wrapped, fullgraph=True, backend=run.backend) if run.compiled else wrapped

    def precision() -> AbstractContextManager[object]:
        return torch.autocast(run.device, torch.bfloat16) if run.autocast else nullcontext()

    def step(tokens: Tensor) -> float:
        optimiser.zero_grad(set_to_none=True)
        with precision():
            loss = loss_of(tokens.to(run.device))
        loss.backward()
        optimiser.step()
        return float(loss.detach())

    return step


def curve(run: Run) -> Iterator[float]:
    """Train on this process and yield the loss of each step."""
    step = stepper(run)
    data = batches(sources(), run.batch, run.size.context)
    for _ in range(run.steps):
        yield step(next(data))


def curve_of_ranks(run: Run, ranks: int = 2) -> list[float]:
    """Train on several processes with DistributedDataParallel over gloo, and return the mean loss of each step."""
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(_rank, (run, ranks, folder), nprocs=ranks)
        losses = [torch.load(os.path.join(folder, f"{rank}.pt")) for rank in range(ranks)]
    return torch.stack(losses).mean(0).tolist()


def _rank(rank: int, run: Run, ranks: int, folder: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=ranks)
    torch.set_num_threads(max(1, torch.get_num_threads() // ranks))
    step = stepper(run, DistributedDataParallel)
    data = batches(sources(), run.batch, run.size.context, rank=rank, ranks=ranks)
    losses = [step(next(data)) for _ in range(run.steps)]
    torch.save(torch.tensor(losses), os.path.join(folder, f"{rank}.pt"))
    dist.destroy_process_group()

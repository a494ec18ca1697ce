"""Train the demo's network with one set of ops, and measure it: one process per line of the table.

    python examples/demo/train.py opkit --backend cpp --compile

Prints a line `@ {"epoch": ...}` after each epoch, and a line `= {...}` with the result at the end.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from model import Network, plain, with_opkit
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor

EPOCHS, BATCH, TIMED_STEPS = 40, 128, 200


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("ops", choices=("plain", "opkit"))
    parser.add_argument("--backend", help="the backends that opkit's ops must run on, by preference")
    parser.add_argument("--compile", action="store_true", help="train under torch.compile(fullgraph=True)")
    options = parser.parse_args()
    with only(options.backend):
        result = train(options.ops, compiled=options.compile)
        result["explain"] = explain() if options.ops == "opkit" else ""
    result["plugins"] = plugins() if options.ops == "opkit" else ""
    print("=", json.dumps(result), flush=True)


def only(backends: str | None) -> AbstractContextManager[Any]:
    """Allow the named backends alone, so that what is measured is what is said."""
    if backends is None:
        return nullcontext()
    import opkit

    return opkit.use_backend(*backends.split(","), strict=True)


def train(kind: str, *, compiled: bool) -> dict[str, Any]:
    """Train on three quarters of the digits and return what was measured."""
    torch.set_num_threads(1)  # the network is small, and a busy neighbour distorts two threads most
    torch.manual_seed(0)
    images, labels = load_digits(return_X_y=True)
    x, x_test, y, y_test = train_test_split(
        torch.tensor(images / 16.0, dtype=torch.float32),
        torch.tensor(labels),
        test_size=0.25,
        random_state=0,
        stratify=labels,
    )
    net = Network(plain() if kind == "plain" else with_opkit())
    initial = {name: value.clone() for name, value in net.state_dict().items()}
    start = time.perf_counter()
    loss_of = torch.compile(net, fullgraph=True) if compiled else net
    optimiser = torch.optim.AdamW(net.parameters(), lr=2e-3, weight_decay=0.05, foreach=True)

    decay = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, EPOCHS)

    def step(pixels: Tensor, target: Tensor) -> float:
        optimiser.zero_grad(set_to_none=True)
        loss = loss_of(pixels, target).mean()
        loss.backward()
        optimiser.step()
        return float(loss.detach())

    step(x[:BATCH], y[:BATCH])
    first_step = time.perf_counter() - start
    curve = []
    for epoch in range(EPOCHS):
        order = torch.randperm(len(x))
        for batch in order.split(BATCH)[:-1]:  # the last one is smaller
            step(x[batch], y[batch])
        decay.step()
        accuracy = float((net.logits(x_test).argmax(-1) == y_test).float().mean())
        curve.append(accuracy)
        print("@", json.dumps({"epoch": epoch + 1, "of": EPOCHS, "accuracy": accuracy}), flush=True)
    times = [timed(step, x[:BATCH], y[:BATCH]) for _ in range(TIMED_STEPS)]
    net.load_state_dict(initial)
    return {
        "accuracy": accuracy,
        "curve": curve,
        "first_step_s": first_step,
        "step_ms": statistics.median(times) * 1e3,
        "difference": difference(net, loss_of, x[:BATCH], y[:BATCH]),
    }


def timed(step: Callable[[Tensor, Tensor], float], pixels: Tensor, target: Tensor) -> float:
    start = time.perf_counter()
    step(pixels, target)
    return time.perf_counter() - start


def difference(net: Network, loss_of: Callable[..., Tensor], pixels: Tensor, target: Tensor) -> float:
    """Return the largest difference of loss and gradients from plain torch in float64, per largest value."""
    exact = Network(plain()).double()
    exact.load_state_dict(net.state_dict())
    net.zero_grad(set_to_none=True)
    found, expected = [], []
    for which, (loss, data) in zip(
        (found, expected), ((loss_of, pixels), (exact, pixels.double())), strict=True
    ):
        rows = loss(data, target)
        rows.mean().backward()
        which.append(rows.detach().double())
    found += [p.grad.double() for p in net.parameters()]
    expected += [p.grad for p in exact.parameters()]
    return max(float((f - e).abs().max() / e.abs().max()) for f, e in zip(found, expected, strict=True))


def explain() -> str:
    """Return why rms_norm runs on the kernel it runs on."""
    import opkit_kernels

    return str(opkit_kernels.rms_norm.explain(torch.ones(4, 128), torch.ones(128)))


def plugins() -> str:
    """Return the plugins that opkit found in this environment."""
    import opkit

    found = opkit.plugins.list()
    return ", ".join(f"{p.name} ({p.distribution} {p.version}): {p.status}" for p in found) or "none"


if __name__ == "__main__":
    main()

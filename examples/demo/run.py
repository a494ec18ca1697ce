"""`make demo`: train on real digits with opkit's ops, then let an installed plugin take them over.

Teaches nothing about writing ops (the numbered examples do); it shows that what they teach holds
together: ops declared in Python, compiled from C++ on first use, replaced by a pip-installed plugin,
all inside torch.compile while a model learns.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from plot import plot
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.table import Table

HERE = Path(__file__).parent
ROOT = HERE.parent.parent
PLUGIN = "opkit-numba"
OUTPUT = ROOT / "demo-output"
console = Console(highlight=False)


@dataclass(frozen=True)
class Run:
    """One line of the table."""

    title: str
    arguments: tuple[str, ...]


BEFORE = (
    Run("torch eager", ("plain",)),
    Run("torch compiled", ("plain", "--compile")),
    Run("opkit cpp", ("opkit", "--backend", "cpp", "--compile")),
    Run("opkit reference", ("opkit", "--backend", "reference", "--compile")),
)
# numba has no cross_entropy; that one stays with C++.
AFTER = Run("opkit numba", ("opkit", "--backend", "numba,cpp", "--compile"))


def main() -> None:
    start = time.perf_counter()
    pip("uninstall", "--yes", PLUGIN)  # from an earlier demo, so that it is seen to arrive
    console.print("[bold]1  Training a residual network on 1,797 handwritten digits[/]")
    results = {run.title: train(run) for run in BEFORE}
    cpp = results["opkit cpp"]
    console.print("\n[bold]2  Why rms_norm ran in C++[/]")
    console.print(f"{cpp['explain']}\nplugins: {cpp['plugins']}", soft_wrap=True)
    console.print(f"\n[bold]3  pip install plugins/{PLUGIN}[/]")
    with console.status("installing"):
        pip("install", "-c", str(ROOT / "constraints.txt"), str(ROOT / "plugins" / PLUGIN))
    results[AFTER.title] = numba = train(AFTER)
    console.print(f"plugins: {numba['plugins']}\n{numba['explain']}", soft_wrap=True)
    console.print("\n[bold]4  What was measured[/]")
    report(results)
    figure = plot(results, OUTPUT)
    seconds = time.perf_counter() - start
    console.print(f"\nPlot: {figure.relative_to(ROOT)} (and .png). The demo took {seconds:.0f} s.")
    worst = min(result["accuracy"] for result in results.values())
    if worst < 0.96:
        sys.exit(f"demo: an accuracy of {worst:.1%} is below 96 %")


def pip(*arguments: str) -> None:
    """Run pip in this environment; show what it said only if it failed."""
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet", *arguments]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"demo: {' '.join(command)} failed:\n{done.stdout}{done.stderr}")


def train(run: Run) -> dict[str, Any]:
    """Run train.py in a process of its own, showing its epochs, and return its result."""
    command = [sys.executable, "-u", str(HERE / "train.py"), *run.arguments]
    progress = Progress(
        SpinnerColumn(finished_text="✓"),
        TextColumn(f"{run.title:<16}"),
        BarColumn(bar_width=24),
        TextColumn("{task.description}"),
        TimeElapsedColumn(),
        console=console,
    )
    result: dict[str, Any] | None = None
    environment = {**os.environ, "TORCHINDUCTOR_COMPILE_THREADS": "1"}  # no worker pool to wait for
    with tempfile.TemporaryFile("w+") as errors, progress:
        task = progress.add_task("importing torch, compiling", total=None)
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors, text=True, env=environment)
        assert process.stdout is not None
        for line in process.stdout:
            kind, _, text = line.partition(" ")
            if kind == "@":
                epoch = json.loads(text)
                description = f"epoch {epoch['epoch']:>2}, accuracy {epoch['accuracy']:.1%}"
                progress.update(task, total=epoch["of"], completed=epoch["epoch"], description=description)
            elif kind == "=":
                result = json.loads(text)
        process.wait()
        errors.seek(0)
        said = errors.read()
    for line in said.splitlines():
        if line.startswith("opkit:"):
            console.print(f"   {line}", style="dim", markup=False)
    if process.returncode or result is None:
        sys.exit(f"demo: {' '.join(command)} failed:\n{said}")
    return result


def report(results: dict[str, dict[str, Any]]) -> None:
    """Print the table: every backend beside the same model in plain torch."""
    eager, compiled = (results[run.title]["step_ms"] for run in BEFORE[:2])
    table = Table(
        box=SIMPLE_HEAD,
        collapse_padding=True,
        pad_edge=False,
        caption="Step: forward, backward and AdamW on 128 digits, one thread, median of 200. opkit's rows run "
        "under torch.compile. Ratios below 1 are faster.",
        caption_justify="left",
    )
    for heading in ("", "step ms", "/ eager", "/ compiled", "first s", "error", "accuracy"):
        table.add_column(heading, justify="right" if heading else "left", no_wrap=True)
    for title, result in results.items():
        table.add_row(
            title,
            f"{result['step_ms']:.2f}",
            f"{result['step_ms'] / eager:.2f}",
            f"{result['step_ms'] / compiled:.2f}",
            f"{result['first_step_s']:.1f}",
            f"{result['difference']:.1e}",
            f"{result['accuracy']:.1%}",
        )
    console.print(table)
    console.print(
        "first s: the first step, with all compiling. error: the largest difference of loss and gradients\n"
        "from plain torch in float64, relative to the largest value.",
        soft_wrap=True,
    )


if __name__ == "__main__":
    main()

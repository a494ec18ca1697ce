"""The demo's picture: how long a step takes, and how each backend learns."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")  # no display needed
import matplotlib.pyplot as plt

COLOURS = {"torch": "#9aa5b1", "opkit": "#2563eb"}
STYLES = ("-", "--", "-.", ":", (0, (5, 1)))


def plot(results: dict[str, dict[str, Any]], folder: Path) -> Path:
    """Draw the results as `digits.svg` and `digits.png` in `folder`, and return the first path."""
    folder.mkdir(exist_ok=True)
    figure, (bars, curves) = plt.subplots(1, 2, figsize=(11, 4), layout="constrained")
    titles = list(results)
    steps = [results[title]["step_ms"] for title in titles]
    colours = [COLOURS[title.split()[0]] for title in titles]
    drawn = bars.barh(titles, steps, color=colours)
    bars.bar_label(drawn, [f" {step:.2f}" for step in steps])
    bars.invert_yaxis()
    bars.set_xlabel("training step, ms (median)")
    bars.set_xlim(0, max(steps) * 1.15)
    for title, style in zip(titles, STYLES, strict=True):
        curve = results[title]["curve"]
        curves.plot(range(1, len(curve) + 1), [100 * a for a in curve], linestyle=style, label=title)
    curves.axhline(96, color="#d1d5db", linewidth=1)
    curves.set_xlabel("epoch")
    curves.set_ylabel("test accuracy, %")
    curves.set_ylim(90, 100)
    curves.legend(loc="lower right", frameon=False)
    for axes in (bars, curves):
        axes.spines[["top", "right"]].set_visible(False)
    path = folder / "digits.svg"
    figure.savefig(path)
    figure.savefig(path.with_suffix(".png"), dpi=120)
    plt.close(figure)
    return path

"""What this teaches: which kernel is faster, how sure that is, and how much the machine has left.

`opkit.bench.compare` first holds every candidate to the reference in float64, and does not time what is wrong. Then
they take turns, so that what else the machine does hits all of them, and a copy of as many bytes takes its turn, too:
no kernel that must read and write them is faster. What is printed here can be kept as JSON, drawn, and compared with a
later run.

The op is log-sum-exp of rows. One kernel is wrong, and is found out before it wins.
"""

import importlib.util
import tempfile
from pathlib import Path

import torch
from torch import Tensor

import opkit


@opkit.op("demo::logsumexp", shapes="m n -> m")
def logsumexp(x: Tensor) -> Tensor:
    """Return the logarithm of the sum of the exponentials of each row."""
    largest = x.amax(1, keepdim=True)
    return (x - largest).exp().sum(1).log() + largest.squeeze(1)


@logsumexp.register_kernel("cpu", backend="torch")
def by_torch(x: Tensor) -> Tensor:
    """Let torch do it."""
    return torch.logsumexp(x, 1)


@logsumexp.register_kernel("cpu", backend="hasty", priority=-1)
def hasty(x: Tensor) -> Tensor:
    """Leave out the largest element, and overflow for rows that are large."""
    return x.exp().sum(1).log()


def case(m: int, n: int) -> tuple[Tensor]:
    """Return the arguments of a call of these sizes."""
    return (100 * torch.randn(m, n),)


def main() -> None:
    """Compare, print, keep, draw, and compare again."""
    sizes = {"m": [16], "n": [128, 512]}
    options = {"caches": ["warm"], "min_run_time": 0.01, "rounds": 5, "progress": False}
    peers = {"loop": lambda x: torch.stack([torch.logsumexp(row, 0) for row in x])}
    report = opkit.bench.compare(logsumexp, case, over=sizes, against=peers, **options)
    print(report)
    assert {row.name for row in report.wrong} == {"hasty"}
    for row in report.find(name="torch"):
        assert row.status == "timed"  # how fast it is, only an idle machine can say
        faster, limit = report.speedup(row, to="loop"), report.of_limit(row)
        print(
            f"n={row.sizes['n']}: {faster:.1f} times as fast as the loop, at {limit:.0%} of what a copy reaches"
        )

    with tempfile.TemporaryDirectory() as folder:
        saved = report.save(Path(folder) / "before.json")
        # Later, or on another branch. What is slower than noise explains is named, and the command exits with 1:
        # opkit bench demo::logsumexp --import 09_benchmarking.py --case 09_benchmarking.py:case --baseline before.json
        again = opkit.bench.compare(
            logsumexp, case, over=sizes, backends=["torch"], baseline=saved, **options
        )
        assert again.regression is not None
        print(f"against {saved.name}: compared with another run of the same kernels")
        if importlib.util.find_spec("matplotlib") is None:
            print("skipped: pip install 'torch-opkit[bench]' brings what draws")
        else:
            for theme in ("light", "dark"):
                picture = report.plot(Path(folder) / f"{theme}.svg", theme=theme)
                assert picture.read_text().startswith("<?xml")
            print("drawn as light.svg and dark.svg")


if __name__ == "__main__":
    main()

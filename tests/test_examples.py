"""Every examples/NN_topic.py runs alone, asserts its own result, and says what it showed."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[1] / "examples"

# What each prints: the words of its lesson, not its figures.
EXPECTED = {
    "01_python_op.py": (
        "eager: <opkit.Op demo::softmax",
        "one graph for 4 sizes",
        "refused: calling demo::softmax",
    ),
    "04_triton_kernel.py": (
        "agrees with float64" if importlib.util.find_spec("triton") else "skipped: Triton",
    ),
    "06_shapes.py": (
        "refused: calling demo::attend: dimension 3 of key (d) is 6, but dimension 3 of query bound d to 8",
        "10 rows of 100 have 93 windows of 8 each",
        "1 graph for 3 sizes",
        "demo::scale_all(Tensor[] tensors, float factor) -> (Tensor[])",
    ),
    "08_testing.py": (
        "a kernel without its last lines passes",
        "calls of the cpp kernel are wrong",
        ", 0 failed, ",
        "test_squares_are_never_negative[cpp] PASSED",
        "test_gradient_is_twice_the_argument[reference] PASSED",
    ),
    "09_benchmarking.py": (
        "wrong: hasty at m=16, n=128",
        "against before.json",
        "drawn as light.svg and dark.svg",
    ),
    "10_notebook.py": ("# Kernels in a notebook", "cpp        selected", "4 of the results are tables"),
    "12_fusion.py": (
        "opaque: 2 loops, and the by_hand kernel between them",
        "inlined: 1 loop for everything",
    ),
    "05_gradients.py": ("the autograd.Function is refused, the op compiles", "agrees too"),
    "02_cpp_kernel.py": ("expected 0 <= decay < 1", "the gradient too", "'z' was not declared"),
    "03_cuda_kernel.py": ("cpu: the reference agrees",),
    "13_choosing_backends.py": (
        "matmul     selected",
        "too short to gain from it",
        "OPKIT_BACKEND=rows,reference: rows",
        "runs its reference on cpu",
        "the same graph",
    ),
    "07_writing_a_plugin.py": (
        "fast       selected   priority 0  opkit-fast 1.0",
        "OPKIT_AUTOLOAD turns calling plugins off",
        "No module named 'opkit_fast_and_missing'",
    ),
    "14_pybind11_module.py": (
        "103 bytes are 29 tokens",
        "an exception of C++ is one of Python: IndexError",
    ),
    "11_prebuilt_package.py": (
        "py3-none-linux",
        "cpp        selected",
        "nothing was compiled: there was no compiler",
    ),
}


@pytest.fixture(scope="module")
def environment(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Without OPKIT_* of whoever runs the tests, and with one cache of kernels for all examples."""
    clean = {name: value for name, value in os.environ.items() if not name.startswith("OPKIT_")}
    return {**clean, "OPKIT_CACHE_DIR": str(tmp_path_factory.mktemp("cache"))}


def test_every_example_is_listed_here() -> None:
    assert sorted(EXPECTED) == sorted(path.name for path in EXAMPLES.glob("[0-9][0-9]_*.py"))


@pytest.mark.parametrize("name", EXPECTED)
def test_example_runs_and_says_what_it_showed(name: str, environment: dict[str, str], tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, EXAMPLES / name],
        env=environment,
        cwd=tmp_path,  # it runs from anywhere
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
    for words in EXPECTED[name]:
        assert words in done.stdout, f"{words!r} is not in:\n{done.stdout}"
    assert not list(tmp_path.iterdir()), "an example leaves nothing behind where it runs"

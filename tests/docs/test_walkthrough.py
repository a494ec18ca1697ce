"""What a new user types, from an empty folder to an installed package, shows what the page says."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from opkit.cpp import compilers
from tests.docs import console

PAGE = Path(__file__).parent / "pages" / "walkthrough.md"

needs_gcc = pytest.mark.skipif(
    "g++" not in str(getattr(compilers.find_cxx(), "path", "")) or shutil.which("bash") is None,
    reason="the page shows what g++ says",
)


@pytest.mark.slow
@needs_gcc
def test_each_step_shows_what_the_page_says(tmp_path):
    count = 0
    for step, shown in console.play(PAGE, console.Terminal(tmp_path)):
        wanted = f"{PAGE.name}:{step.line}: $ {step.command}\n{console.settled(step.output)}"
        assert f"{PAGE.name}:{step.line}: $ {step.command}\n{console.settled(shown)}" == wanted
        count += 1
    assert count >= 8


def test_only_what_differs_from_run_to_run_is_left_out():
    assert console.settled("built in 1.25 s, 3.10x") == console.settled("built in 17 ms, 12x")
    assert console.settled("built in 1.25 s") != console.settled("failed after 1.25 s")
    assert console.settled("12 passed, 0 failed") != console.settled("12 passed, 1 failed")

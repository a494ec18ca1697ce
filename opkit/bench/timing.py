"""How long calls take: all candidates in turns, so that what else the machine does disturbs all of them alike.

A call is timed by `torch.utils.benchmark`'s clock, which waits for the device. This knows nothing of ops.
"""

from __future__ import annotations

import math
import timeit
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from typing import NamedTuple

from torch.utils import benchmark

LEAST = 3  # rounds in any case
_MOST_CALLS = 1_000_000  # in a block
_PATIENCE = 5  # times `min_run_time` that slow calls may take together


class Contestant(NamedTuple):
    """What is timed: `prepare` returns a call, with arguments of its own; `inside` is entered around both."""

    prepare: Callable[[], Callable[[], object]]
    inside: Callable[[], AbstractContextManager[object]]


class Timed(NamedTuple):
    """The seconds of a call in each round, and how many calls in a row were timed for it."""

    times: tuple[float, ...]
    number: int


def warm(contestants: Mapping[str, Contestant], *, rounds: int, min_run_time: float) -> dict[str, Timed]:
    """Return what each takes while its arguments are in the caches, where they fit.

    Each is called for `min_run_time` seconds together, in as many blocks as there are `rounds`; where one call takes
    longer than a block there are fewer, but three.
    """
    block = min_run_time / rounds
    numbers = {name: _number(one, block) for name, one in contestants.items()}
    return _turns(
        contestants, numbers, lambda one, number: _seconds(one, number, warm=True), rounds, min_run_time
    )


def cold(
    contestants: Mapping[str, Contestant], flush: Callable[[], None], *, rounds: int, min_run_time: float
) -> dict[str, Timed]:
    """Return what a single call takes after `flush` has emptied the caches."""
    numbers = dict.fromkeys(contestants, 1)
    return _turns(contestants, numbers, lambda one, _: _seconds(one, 1, before=flush), rounds, min_run_time)


def clock() -> float:
    """Return the time, after the device has done what it was told to."""
    return benchmark.timer()


def _turns(
    contestants: Mapping[str, Contestant],
    numbers: Mapping[str, int],
    measure: Callable[[Contestant, int], float],
    rounds: int,
    min_run_time: float,
) -> dict[str, Timed]:
    found: dict[str, list[float]] = {name: [] for name in contestants}
    for turn in range(rounds):
        # Every other round goes backwards, so that none always runs after the same one.
        for name in list(contestants)[:: -1 if turn % 2 else 1]:
            found[name].append(measure(contestants[name], numbers[name]))
        spent = sum(sum(times) * numbers[name] for name, times in found.items())
        if turn + 1 >= LEAST and spent > _PATIENCE * min_run_time * len(contestants):
            break
    return {name: Timed(tuple(times), numbers[name]) for name, times in found.items()}


def _number(one: Contestant, block: float) -> int:
    """Return how many calls in a row take as long as a block."""
    number = 1
    while number < _MOST_CALLS and (taken := _seconds(one, number, warm=True) * number) < 0.9 * block:
        number = min(10 * number, math.ceil(number * block / max(taken, 1e-9)), _MOST_CALLS)
    return number


def _seconds(
    one: Contestant, number: int, *, warm: bool = False, before: Callable[[], None] | None = None
) -> float:
    """Return the seconds of a call, out of `number` in a row."""
    with one.inside():
        call = one.prepare()
        if warm:
            call()
        if before is not None:
            before()
        return max(timeit.Timer(call, timer=clock).timeit(number) / number, 1e-9)

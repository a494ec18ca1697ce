"""Whether what a manifest requires is here: torch, opkit, Python and the platform, told without importing torch."""

from __future__ import annotations

import fnmatch
from collections.abc import Sequence
from typing import Any

from opkit.plugins import catalog, store
from opkit.plugins.catalog import Facts
from opkit.plugins.manifest import Requires
from opkit.plugins.state import State


def apply(states: Sequence[State]) -> None:
    """Leave plugins out whose manifests require something else than what is here."""
    facts = catalog.facts()
    for state in states:
        manifest = state.found.manifest
        if manifest is not None and any(manifest.requires):
            _apply(state, manifest.requires, facts)


def _apply(state: State, needs: Requires, facts: Facts) -> None:
    unmet = store.answer(("requires", *needs, *facts), lambda: _unmet(needs, facts))
    if not unmet:
        return
    what, wanted, here = unmet
    remedies = {
        "torch": f"Install torch {wanted}, or a version of {state.found.distribution} for torch {here}.",
        "opkit": f"Install torch-opkit {wanted}, or a version of {state.found.distribution} for opkit {here}.",
    }
    state.reject(
        "version",
        rule=f"requires.{'platforms' if what == 'platform' else what} in {state.found.manifest_path}",
        reason=f"it requires {what} {wanted}, and this is {here or 'none that is installed'}"
        if wanted
        else f"its manifest has {here!r} for {what}, which is no range of versions",
        remedy=remedies.get(what) or f"Install a version of {state.found.distribution} for {what} {here}.",
    )


def _unmet(needs: Requires, facts: Facts) -> tuple[str, str, str] | None:
    """Return what is not met, the range and what is here; the range is empty where it is none."""
    if needs.platforms and not any(fnmatch.fnmatchcase(facts.platform, one) for one in needs.platforms):
        return "platform", ", ".join(needs.platforms), facts.platform
    ranges: Any = {"torch": needs.torch, "opkit": needs.opkit, "python": needs.python}
    for what, wanted in ranges.items():
        if not wanted:
            continue
        here = getattr(facts, what) or "0"
        try:
            fits = _compared(wanted, here)
            fits = _contains(wanted, here) if fits is None else fits
        except ValueError:
            return what, "", wanted
        if not fits:
            return what, wanted, getattr(facts, what)
    return None


def _compared(wanted: str, here: str) -> bool | None:
    """Return whether a plain version is in a range of `>=` and `<` with plain versions, or None where it is another.

    Nearly all ranges are that, and importing `packaging` takes longer than everything else of a first start.
    """
    version = _release(here.partition("+")[0])
    bounds = [(clause.strip(), clause.strip().lstrip("<>=")) for clause in wanted.split(",")]
    releases = [(clause.removesuffix(bound), _release(bound)) for clause, bound in bounds]
    if not version or any(sign not in (">=", "<") or not bound for sign, bound in releases):
        return None
    return all((version >= bound) is (sign == ">=") for sign, bound in releases)


def _release(text: str) -> list[int]:
    """Return the numbers of a version without the zeros at its end, nothing where it has more than numbers."""
    parts = text.strip().split(".")
    if not all(part.isdecimal() and part.isascii() for part in parts):
        return []
    while len(parts) > 1 and not int(parts[-1]):
        parts.pop()
    return list(map(int, parts))


def _contains(wanted: str, here: str) -> bool:
    """Return whether a version is in a range.

    Raises:
        ValueError: it is none.
    """
    from packaging.specifiers import SpecifierSet

    # A nightly of torch and a development version of opkit are in the range around them.
    return SpecifierSet(wanted).contains(here, prereleases=True)

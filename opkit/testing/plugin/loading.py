"""The tests of loading a plugin: what its manifest says, what is imported when, and what is different afterwards."""

from __future__ import annotations

import pytest

from opkit.testing.plugin.shared import ORDERS, Shared

_PATCHES = "it replaced, without its manifest saying so"
_NOTES = ("it replaced", "it changed a setting", "it left threads")  # which have tests of their own
# Or tested apart.
_EXPECTED = ("as its manifest says", "its device", "the library of its device", "it replaced")


class Loading(Shared):
    """A plugin is loaded."""

    def test_the_manifest_says_what_is_true(self) -> None:
        subject = self._subject()
        found = self._probe("manifest", subject.state.found.manifest_path, *_NOTES)
        self._none(found, f"comparing {subject.state.found.manifest_path} with the plugin", "no difference")

    def test_nothing_is_imported_until_it_is_needed(self) -> None:
        for order in ORDERS[:2]:
            early = self._loaded(order)["early"]
            what = [f"{self._subject().package} is imported by {doing}" for doing in early]
            self._none(what, "starting without using the plugin", "nothing of it to be imported")

    @pytest.mark.parametrize("order", ORDERS)
    def test_it_loads_whatever_is_imported_first(self, order: str) -> None:
        found = self._loaded(order)
        self._none(filter(None, found["loaded"][:1]), f"loading it after import {order}", "no error")
        if found["status"] != "loaded":
            self._fail(f"loading it after import {order}", [found["why"]], "it to be loaded")

    def test_loading_and_booting_twice_changes_nothing(self) -> None:
        found = self._loaded(ORDERS[0])
        self._none(filter(None, [*found["loaded"], found["booted"]]), "loading it twice", "no error")

    def test_what_it_replaces_in_torch_is_declared(self) -> None:
        notes = self._loaded(ORDERS[0])["notes"]
        found = [note for note in notes if note.startswith(_PATCHES)]
        self._none(found, "loading it", "what it replaces under `patches` in its manifest")

    def test_it_leaves_the_process_as_it_was(self) -> None:
        notes = self._loaded(ORDERS[0])["notes"]
        found = [note for note in notes if not note.startswith(_EXPECTED)]
        self._none(found, "loading it", "nothing but its ops, kernels, toolchain and device")

    def test_its_device_computes(self) -> None:
        if not self._subject().device:
            pytest.skip("it brings no device")
        self._none(
            filter(None, [self._loaded(ORDERS[0])["used"]]), "computing on its device", "what the CPU gives"
        )

"""The tests of a plugin that is not there: turned off, uninstalled, or broken."""

from __future__ import annotations

import json
from pathlib import Path

from opkit.testing.plugin import calls, uninstalled
from opkit.testing.plugin.shared import ORDERS, Shared


class Absence(Shared):
    """A plugin is not there."""

    def test_turned_off_it_is_not_there(self) -> None:
        found = self._absent(OPKIT_AUTOLOAD="0")
        if found["cause"] != "policy":
            found["left"].append(f"it is {found['status'] or 'not found'}")
        self._none(found["left"], "using opkit with OPKIT_AUTOLOAD=0", "it to be left out")

    def test_uninstalled_it_is_not_there(self, tmp_path: Path) -> None:
        subject = self._subject()
        stand_ins = uninstalled.mirror(subject, tmp_path / "site")
        words = json.dumps(stand_ins)
        cache = {"OPKIT_CACHE_DIR": str(tmp_path / "cache"), "OPKIT_NATIVE": "0"}
        if subject.name not in self._probe("installed", words, **cache):
            self._fail("looking at a copy of its folder", ["it is not found there"], "it to be found")
        uninstalled.uninstall(subject, stand_ins.values())
        found = self._absent(words, **cache)
        left = [*found["left"], *filter(None, [found["found"]])]
        self._none(left, "using opkit after it was uninstalled", "nothing to be left of it")
        self._loaded(ORDERS[0])  # which may leave files behind
        what = [f"{file} is in no installer's list" for file in subject.unrecorded()]
        self._none(what, "uninstalling it", "the files in its package to be those that were installed")

    def test_broken_it_breaks_nothing(self, tmp_path: Path) -> None:
        subject = self._subject()
        what = "library" if subject.is_native else "package"
        own = {"OPKIT_CACHE_DIR": str(tmp_path / "cache"), "OPKIT_NATIVE": "0", "CXX": "/none", "PATH": ""}
        file = tmp_path / "calls"
        calls.save(self._calls(subject, foreign=what == "package"), file)
        found = self._probe(
            "broken", what, subject.name, subject.package, str(subject.folder), subject.device, str(file),
            **self._chosen(subject), **(own if what == "library" else {}),
        )  # fmt: skip
        self._none(found["problems"], f"using opkit while its {what} is broken", "nothing else to be broken")
        if what == "package" and "is broken by opkit's conformance kit" not in found["why"]:
            self._fail("breaking its package", [found["why"]], "opkit.plugins.why to say so")

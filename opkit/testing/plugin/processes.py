"""The test of a plugin in child processes, however they are started."""

from __future__ import annotations

from pathlib import Path

import pytest

from opkit.testing.plugin import calls
from opkit.testing.plugin.shared import Shared


class Processes(Shared):
    """A plugin is used in child processes."""

    def test_child_processes_can_use_it(self, tmp_path: Path) -> None:
        subject = self._subject()
        file = tmp_path / "calls"
        made = self._calls(subject)
        if not made and not subject.device:
            pytest.skip("there is no call of one of its kernels that this machine can make")
        calls.save(made, file)
        found = self._probe("children", str(file), subject.device, str(self.limit), **self._chosen(subject))
        for where, seen in found.items():
            safe = where != "fork" or subject.manifest.fork == "safe"
            self._none(seen["problems"], f"using it in {_child(where)}", "what the reference gives")
            other = [
                f"{op} is given to {chosen or 'nobody'}"
                for op, backend, chosen in seen["selected"]
                if (chosen == backend) != safe
            ]
            wanted = "its kernels to be used" if safe else 'its kernels to be left out, as fork = "unsafe"'
            self._none(other, f"preferring it in {_child(where)}", wanted)


def _child(where: str) -> str:
    return where if where == "the parent" else f"a child process started by {where}"

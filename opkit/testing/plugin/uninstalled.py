"""The folders of `sys.path` as they are, and as they are once a distribution has been uninstalled from them.

There may be several that have it: an editable install keeps metadata beside the sources too.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

from opkit.plugins.discovery import normalized
from opkit.testing.plugin.subject import Subject


def mirror(subject: Subject, target: Path) -> dict[str, str]:
    """Make stand-ins for the folders that the plugin is installed in, which hold by links all that these do."""
    made: dict[str, str] = {}
    for folder in dict.fromkeys(Path(entry or ".").resolve() for entry in sys.path):
        if folder.is_dir() and any(_metadata(subject, folder)):
            stand_in = target / str(len(made))
            stand_in.mkdir(parents=True)
            for entry in folder.iterdir():
                (stand_in / entry.name).symlink_to(entry)
            made[str(folder)] = str(stand_in)
    return made


def uninstall(subject: Subject, stand_ins: Iterable[str]) -> None:
    """Take the plugin's distribution and package out of such stand-ins."""
    for folder in map(Path, stand_ins):
        for entry in [
            *_metadata(subject, folder),
            folder / subject.package,
            folder / f"{subject.package}.py",
        ]:
            entry.unlink(missing_ok=True)


def _metadata(subject: Subject, folder: Path) -> Iterator[Path]:
    distribution = normalized(subject.state.found.distribution)
    for entry in folder.glob("*-info"):
        if normalized(entry.name.rpartition(".")[0].partition("-")[0]) == distribution:
            yield entry

from __future__ import annotations

import json
import warnings
from pathlib import Path

import pytest

from opkit.cpp import prebuilt
from opkit.cpp._audit import Audit

AUDIT = Audit((2, 10), {"GLIBC": "2.32"}, ())


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with one library, for 8.0 and 9.0+PTX."""
    built = tmp_path / "built.so"
    built.write_bytes(b"a library")
    prebuilt.save(built, tmp_path / "_opkit", "f-1", architectures=("8.0", "9.0+PTX"), audit=AUDIT)
    return tmp_path / "_opkit"


def test_saved_library_is_found_by_its_name(folder: Path) -> None:
    assert prebuilt.find(folder, "f-1", ()) == folder / "f-1.so"
    assert (folder / "f-1.so").read_bytes() == b"a library"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert prebuilt.find(folder, "f-2", ()) is None
        assert prebuilt.find(folder / "none", "f-1", ()) is None


def test_record_says_what_the_library_needs(folder: Path) -> None:
    told = json.loads((folder / "f-1.json").read_text())
    assert told["needs"] == {"torch": "2.10", "GLIBC": "2.32"}


@pytest.mark.parametrize(
    ("built", "wanted", "runs"),
    [
        (("8.0",), "8.0", True),
        (("8.0",), "8.6", True),  # the same major, the minor not above
        (("8.6",), "8.0", False),
        (("8.0",), "9.0", False),
        (("8.0+PTX",), "9.0", True),  # the driver compiles PTX for what is newer
        (("9.0+PTX",), "8.6", False),
        (("8.0", "9.0+PTX"), "12.0", True),
        (("8.0", "9.0+PTX"), "9.0+PTX", True),
        (("8.0", "9.0"), "9.0+PTX", True),
        (("9.0a",), "9.0", True),  # for this one alone
        (("10.0a+PTX",), "10.3", False),
        (("10.0f",), "10.3", True),  # for its family
        (("10.0f+PTX",), "12.0", False),
        (("9.0",), "9.0a", False),  # its instructions were asked for
        (("9.0+PTX",), "9.0a", False),
        (("9.0a",), "9.0a", True),
        (("9.0",), "gfx942", False),
        (("gfx942",), "gfx942", True),
        (("gfx942",), "9.0", False),
        ((), "8.0", False),
    ],
)
def test_covers_says_whether_code_runs_on_an_architecture(
    built: tuple[str, ...], wanted: str, runs: bool
) -> None:
    assert prebuilt.covers(built, wanted) is runs


def test_library_is_found_only_where_it_runs_on_every_device(folder: Path) -> None:
    assert prebuilt.find(folder, "f-1", ("8.6", "9.0"))
    assert prebuilt.find(folder, "f-1", ("8.6", "7.5")) is None


def _truncate(folder: Path) -> None:
    (folder / "f-1.so").write_bytes(b"a lib")


def _remove(folder: Path) -> None:
    (folder / "f-1.so").unlink()


def _garble(folder: Path) -> None:
    (folder / "f-1.json").write_text('{"sha256": ')


def _empty(folder: Path) -> None:
    (folder / "f-1.json").write_text("[]")


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (_truncate, "its content is not what was installed"),
        (_remove, "it cannot be read: No such file or directory"),
        (_garble, "f-1.json is not what was installed"),
        (_empty, "f-1.json is not what was installed"),
    ],
)
def test_damaged_library_is_left_alone_with_one_warning(folder: Path, damage, reason: str) -> None:
    damage(folder)
    with pytest.warns(
        UserWarning, match=f"loading f-1.so from .*: {reason}. The kernel is compiled instead"
    ) as seen:
        assert [prebuilt.find(folder, "f-1", ()) for _ in range(2)] == [None, None]
    assert len(seen) == 1
    assert "Install the package again" in str(seen[0].message)


def test_library_replaced_in_a_running_process_is_verified_again(folder: Path) -> None:
    assert prebuilt.find(folder, "f-1", ())
    (folder / "f-1.so").write_bytes(b"another one")
    with pytest.warns(UserWarning, match="its content is not what was installed"):
        assert prebuilt.find(folder, "f-1", ()) is None

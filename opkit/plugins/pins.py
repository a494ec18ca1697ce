"""Names of plugins as policy has them, with pins: `fast`, `fast==1.2.0`, `fast@sha256:9f86…`, or both.

A plugin is named by its entry point or by its distribution. The digest is that of the distribution's RECORD, which
has the digest of every file; a pin by it holds only while these files are what RECORD says.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import NamedTuple

from opkit.plugins.discovery import Found, normalized


class Pin(NamedTuple):
    """One plugin that is wanted; `version` and `digest` are empty where any will do."""

    name: str
    version: str = ""
    digest: str = ""

    def names(self, found: Found) -> bool:
        """Whether this is about a plugin."""
        return self.name == found.name or normalized(self.name) == normalized(found.distribution)

    def mismatch(self, found: Found) -> str:
        """Return how a plugin differs from what is pinned, or nothing."""
        if self.version and self.version != found.version:
            return f"it is pinned to version {self.version}, and {found.version} is installed"
        if not self.digest:
            return ""
        digest = record_digest(found)
        if not digest:
            return "it is pinned by its RECORD, and its distribution has none"
        if digest != self.digest:
            return f"it is pinned to the RECORD sha256:{self.digest}, and that of what is installed is sha256:{digest}"
        if changed := next(_changed(found), None):
            return f"it is pinned by its RECORD, and the file {changed} is not what RECORD says"
        return ""


def record_digest(found: Found) -> str:
    """Return the sha256 of the distribution's RECORD, or nothing where it has none."""
    import hashlib

    try:
        with open(os.path.join(found.metadata, "RECORD"), "rb") as file:
            return hashlib.sha256(file.read()).hexdigest()
    except OSError:
        return ""


def _changed(found: Found) -> Iterator[str]:
    """Yield the files that are not what RECORD says; an editable install has its code elsewhere."""
    import base64
    import csv
    import hashlib

    if _is_editable(found):
        yield "of an editable install, which RECORD does not list,"
        return
    with open(os.path.join(found.metadata, "RECORD"), encoding="utf-8", newline="") as file:
        for path, stated, *_ in csv.reader(file):
            kind, _, digest = stated.partition("=")
            if kind != "sha256":  # RECORD itself, and bytecode
                continue
            try:
                with open(os.path.join(found.location, path), "rb") as content:
                    actual = hashlib.sha256(content.read()).digest()
            except OSError:
                actual = b""
            if base64.urlsafe_b64encode(actual).rstrip(b"=").decode() != digest:
                yield path


def _is_editable(found: Found) -> bool:
    try:
        with open(os.path.join(found.metadata, "direct_url.json"), encoding="utf-8") as file:
            return '"editable": true' in file.read()
    except OSError:
        return False

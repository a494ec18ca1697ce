"""The code of the pages that are written by hand runs, and prints what they say; the others are made of what runs."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from opkit import _logs
from tests import documents

PAGES = sorted((Path(__file__).parent / "pages").rglob("*.md"))
# Shown and not run as such: commands, which tests of the pages name; files that a walkthrough writes.
KINDS = {"python", "text", "sh", "console", "cpp", "toml"}


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.stem)
def test_code_of_a_page_prints_what_the_page_says(page, registry):
    assert {block.kind for block in documents.blocks(page)} <= KINDS
    documents.run(page)
    _logs.set_up()  # as it was, whatever the page did


def test_output_that_is_not_what_a_page_says_is_an_error(tmp_path):
    page = tmp_path / "page.md"
    page.write_text("```python\nprint(1 + 1)\n```\n\nso\n\n```text\n3\n```\n")
    with pytest.raises(AssertionError, match=re.escape("page.md:8: it printed\n2")):
        documents.run(page)

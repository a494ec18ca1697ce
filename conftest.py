"""What every pytest run here has: the hypothesis profiles, and the examples in docstrings as tests.

A docstring is one test and sees the names of its module, as in the standard doctest. pytest's own
`--doctest-modules` would import `kernels/` a second time, under that name, and define its ops twice.
"""

from __future__ import annotations

import doctest
import importlib
from collections.abc import Iterator
from pathlib import Path

import hypothesis
from sybil import Document, Example, Region, Sybil
from sybil.document import PythonDocStringDocument

# Native kernels compile inside the first example of a test, so no example has a deadline.
hypothesis.settings.register_profile("opkit", deadline=None)
hypothesis.settings.register_profile("soak", deadline=None, max_examples=5000, print_blob=True)
hypothesis.settings.load_profile("opkit")

pytest_plugins = ["opkit.testing.pytest_plugin"]  # in a checkout that was installed before there was one

_ROOT = Path(__file__).parent
_PARSER = doctest.DocTestParser()
_FLAGS = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE


class _Docstrings(PythonDocStringDocument):
    def __init__(self, text: str, path: str) -> None:
        Document.__init__(self, text, path)  # the class between imports the file by its path


def _parse_docstring(document: Document) -> Iterator[Region]:
    if ">>> " in document.text:
        yield Region(0, len(document.text), document.text, _run_docstring)


def _run_docstring(example: Example) -> str:
    parts = list(Path(example.path).relative_to(_ROOT).with_suffix("").parts)
    parts[0] = {"kernels": "opkit_kernels"}.get(parts[0], parts[0])
    module = importlib.import_module(".".join(parts).removesuffix(".__init__"))
    # Functions that an example defines are users', and opkit's errors name where they stand.
    names = {**vars(module), "__name__": "__main__"}
    test = _PARSER.get_doctest(example.parsed, names, module.__name__, example.path, example.line - 1)
    report: list[str] = []
    doctest.DocTestRunner(verbose=False, optionflags=_FLAGS).run(test, out=report.append, clear_globs=False)
    return "".join(report)


pytest_collect_file = Sybil(
    parsers=[_parse_docstring],
    patterns=["opkit/**/*.py", "kernels/**/*.py"],
    document_types={".py": _Docstrings},
).pytest()

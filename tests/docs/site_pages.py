"""The pages of the site that are made from what exists: the README, the examples, the commands, the settings.

mkdocs calls the functions named on_*. Nothing here imports torch: the reference is read from the sources.
"""

from __future__ import annotations

import argparse
import ast
import importlib
import json
import os
import re
import sys
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
OWN = "tests/docs/pages/"
LANGUAGES = {".py": "python", ".cpp": "cpp", ".cu": "cuda", ".h": "cpp", ".toml": "toml"}


def on_config(config: Any) -> Any:
    """Have `kernels/` found under the name that it is installed as, and the examples listed."""
    if str(ROOT) not in sys.path:
        sys.path.insert(0, str(ROOT))
    sources = ROOT / "build" / "docs"
    sources.mkdir(parents=True, exist_ok=True)
    link = sources / "opkit_kernels"
    if not link.exists():
        link.unlink(missing_ok=True)
        link.symlink_to(ROOT / "kernels")
    for entry in config.nav:
        if "Examples" in entry:
            entry["Examples"] = [
                {"Overview": "examples/index.md"},
                *({_title(path): f"examples/{path.stem}.md"} for path in _examples()),
            ]
    return config


def on_files(files: Files, config: Any) -> Files:
    """Add the pages that are made."""
    made = {
        "index.md": _readme(),
        "changes.md": (ROOT / "CHANGELOG.md").read_text(),
        "settings.md": _settings(),
        "reference/headers.md": _headers(),
        "reference/commands.md": _commands(),
        "reference/shipped.md": _shipped(),
        "examples/index.md": _overview(),
        **{f"examples/{path.stem}.md": _example(path) for path in _examples()},
    }
    for name, text in made.items():
        files.append(File.generated(config, name, content=text))
    return files


# ---------------------------------------------------------------- README


def _readme() -> str:
    """Return the README with its links to files led to pages, or taken out."""
    text = (ROOT / "README.md").read_text()

    def lead(match: re.Match[str]) -> str:
        words, target = match.groups()
        if target.startswith(("http", "#")):
            return match[0]
        if target.startswith(OWN):
            return f"[{words}]({target.removeprefix(OWN)})"
        path = Path(target)
        if path.parts[0] == "examples":
            page = f"examples/{path.stem}.md" if len(path.parts) > 1 else "examples/index.md"
            return f"[{words}]({page})"
        if path.parts[0] == "kernels":
            return f"[{words}](reference/shipped.md)"
        return words

    parts = re.split(r"(^```.*?^```$)", text, flags=re.MULTILINE | re.DOTALL)  # code at the odd places
    parts[::2] = [re.sub(r"(?<!!)\[([^\]]+)\]\(([^)\n]+)\)", lead, prose) for prose in parts[::2]]
    return "".join(parts).replace(f"]({OWN}", "](")  # pictures, too


# ---------------------------------------------------------------- examples


def _examples() -> list[Path]:
    return sorted((ROOT / "examples").glob("[0-9][0-9]_*.py"))


def _docstring(path: Path) -> str:
    return ast.get_docstring(ast.parse(path.read_text())) or ""


def _title(path: Path) -> str:
    """Return the first sentence of an example's docstring, without the words that all begin with."""
    first = _docstring(path).partition("\n")[0].removeprefix("What this teaches: ").rstrip(".")
    return first[0].upper() + first[1:]


def _overview() -> str:
    rows = "\n".join(f"- {path.stem[:2]}: [{_title(path)}]({path.stem}.md)" for path in _examples())
    return (
        "# Examples\n\nEach runs alone on the CPU in under a minute, asserts its own result, and prints what it "
        f"showed, as in `python examples/01_python_op.py`. The test-suite runs all of them.\n\n{rows}\n"
    )


def _example(path: Path) -> str:
    """Return a page with what an example teaches, its code, and the files that belong to it."""
    text = path.read_text()
    prose = _docstring(path).partition("\n")[2].strip()
    code = text[text.index('"""', 3) + 3 :].strip()
    parts = [f"# {_title(path)}", prose, f'```python title="examples/{path.name}"\n{code}\n```']
    for other in sorted(path.parent.rglob(f"{path.stem[:2]}_*")):
        for file in sorted(other.rglob("*")) if other.is_dir() else [other]:
            if file.suffix == ".ipynb":
                parts += _cells(file)
            elif file.suffix in LANGUAGES and file != path:
                name = file.relative_to(path.parent)
                parts.append(
                    f'```{LANGUAGES[file.suffix]} title="examples/{name}"\n{file.read_text().strip()}\n```'
                )
    return "\n\n".join(parts) + "\n"


def _cells(notebook: Path) -> list[str]:
    """Return the cells of a notebook, whose headings are below that of the page."""
    parts = [f"## examples/{notebook.name}"]
    for cell in json.loads(notebook.read_text())["cells"]:
        text = "".join(cell["source"])
        parts.append(
            f"```python\n{text}\n```" if cell["cell_type"] == "code" else re.sub(r"(?m)^#", "##", text)
        )
    return parts


# ---------------------------------------------------------------- settings, commands, headers


def _settings() -> str:
    from opkit import _config

    rows = "\n".join(
        f"| `{v.name}` | {v.meaning} | {f'`{v.default}`' if v.default else ''} |"
        for v in _config.VARIABLES.values()
        if not v.meaning.startswith("set by opkit")
    )
    return (
        "# Settings\n\nEnvironment variables, read when they are first needed. A value that is not legal is an error "
        "that lists the legal ones.\n\n"
        f"| variable | what it says | default |\n|---|---|---|\n{rows}\n\n"
        "`CXX`, `CUDA_HOME`, `TORCH_CUDA_ARCH_LIST`, `TORCH_EXTENSIONS_DIR`, `MAX_JOBS` and `NO_COLOR` mean what they "
        "mean to torch and to other tools. The plugins' settings may also be in `pyproject.toml`, see "
        "`opkit plugins why NAME`, which says where each was found.\n"
    )


def _commands() -> str:
    """Return the help of every command."""
    os.environ["COLUMNS"] = "80"
    cli = importlib.import_module("opkit.cli")
    parts = ["# Commands\n\n`opkit` and `python -m opkit` are the same."]
    for name, parser in _parsers(cli.parser()):
        parts.append(f"## {name}\n\n```text\n{parser.format_help().strip()}\n```")
    return "\n\n".join(parts) + "\n"


def _parsers(parser: argparse.ArgumentParser) -> list[tuple[str, argparse.ArgumentParser]]:
    found = [(parser.prog, parser)]
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for one in dict.fromkeys(action.choices.values()):
                found += _parsers(one)
    return found


def _headers() -> str:
    """Return the public headers of kernels, as they are: they say themselves what they are for."""
    folder = ROOT / "opkit" / "cpp" / "include" / "opkit"
    parts = [
        "# Headers for kernels\n\nA light kernel includes `opkit/kernel.h`, which includes what else is here. The "
        "other headers are for what their first lines say."
    ]
    for name in ("kernel.h", "view.h", "number.h", "error.h", "launch.h", "vec.h", "python.h"):
        text = (folder / name).read_text()
        parts.append(f"## opkit/{name}\n\n```cpp\n{text.strip()}\n```")
    return "\n\n".join(parts) + "\n"


def _shipped() -> str:
    """Return a page on the ops of opkit_kernels, read from their sources."""
    parts = [
        "# The ops that opkit ships\n\nThe package `opkit_kernels`: each op has a reference, a gradient, and kernels "
        "in C++, CUDA and Triton. `opkit info opkit::NAME` shows what of these can run here."
    ]
    for folder in sorted((ROOT / "kernels").iterdir()):
        module = folder / f"{folder.name}.py"
        if module.is_file():
            parts.append(
                f"::: opkit_kernels.{folder.name}.{folder.name}.{folder.name}\n"
                "    options:\n      show_root_full_path: false\n      show_root_toc_entry: true"
            )
    return "\n\n".join(parts) + "\n"

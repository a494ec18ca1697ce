"""`opkit info`: what it says of an op, and the C++ declaration that it prints."""

from __future__ import annotations

import json
import sys

import pytest
import torch
from torch import Tensor

import opkit
from opkit import cli
from opkit.cpp import compilers

MODULE = '''
import enum
from typing import NamedTuple

import opkit, torch
from torch import Tensor

class Halves(NamedTuple):
    left: Tensor
    right: Tensor

@opkit.op("cliinfo::halves", shapes="*b n -> *b n, *b n", mutates_args=("count",))
def halves(x: Tensor, factor: float = 0.5, *, count: Tensor) -> Halves:
    """Return two halves.

    And more.
    """
    count += 1
    return Halves(x * factor, x * factor)

halves.register_kernel("cpu", opkit.cpp.kernel("void halves() {}"))

def backward(ctx, *grads): ...

halves.register_autograd(backward, non_differentiable=("right", "count"))
halves.register_autocast("cpu", torch.bfloat16)
halves.register_vmap("sequential")

@opkit.op("cliinfo::turn", shapes="*b -> *b")
def turn(x: Tensor, by: complex) -> Tensor:
    return x * by
'''.replace('"*b n -> *b n, *b n"', '"*b n, () -> *b n, *b n"')


@pytest.fixture
def script(tmp_path, registry, monkeypatch):
    (tmp_path / "cliinfo_module.py").write_text(MODULE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.delitem(sys.modules, "cliinfo_module", raising=False)
    monkeypatch.setattr(compilers, "find_cxx", lambda: None)
    monkeypatch.delenv("CXX", raising=False)
    return "cliinfo_module.py"


def info(*words: str) -> int:
    return cli.main(["info", *words])


SCHEMA = "cliinfo::halves(Tensor x, float factor=0.5, *, Tensor(k0!) count) -> (Tensor left, Tensor right)"
RULES = {
    "meta": "from the shape line",
    "gradient": "backward (FOLDER/cliinfo_module.py:23); none for count, right",
    "forward mode": "none: forward mode raises",
    "vmap": "sequential, one call per sample",
    "autocast": "cpu: bfloat16",
    "sharding": "none: DTensor refuses it",
}


def test_json_has_all_that_is_declared_and_registered(script, tmp_path, capsys):
    assert info("cliinfo::halves", "--json", "--import", script) == 0
    found = json.loads(capsys.readouterr().out)
    kernels = found.pop("kernels")
    folder = str(tmp_path)
    assert found == {
        "name": "cliinfo::halves",
        "schema": SCHEMA,
        "shapes": "*b n, () -> *b n, *b n",
        "doc": "Return two halves.",
        "module": "cliinfo_module",
        "defined": f"halves ({folder}/cliinfo_module.py:12)",
        "mutates": ["count"],
        "inline": False,
        "rules": {rule: text.replace("FOLDER", folder) for rule, text in RULES.items()},
        "signature": "void halves(opkit::Tensor x, double factor, opkit::Tensor count, opkit::Tensor left, "
        "opkit::Tensor right);",
    }
    assert [(k["backend"], k["device"], k["status"]) for k in kernels] == [
        ("cpp", "cpu", "rejected"),
        ("reference", "any", "available"),
    ]
    assert sorted(kernels[0]) == ["backend", "device", "reason", "source", "status"]


def test_a_pipe_gets_plain_text_with_paths_from_here(script, capsys):
    assert info("cliinfo::halves", "--import", script) == 0
    assert capsys.readouterr().out.splitlines() == [
        SCHEMA,
        "  Return two halves.",
        "",
        "shapes        *b n, () -> *b n, *b n",
        "defined       halves (cliinfo_module.py:12)",
        "mutates       count",
        "meta          from the shape line",
        "gradient      backward (cliinfo_module.py:23); none for count, right",
        "forward mode  none: forward mode raises",
        "vmap          sequential, one call per sample",
        "autocast      cpu: bfloat16",
        "sharding      none: DTensor refuses it",
        "",
        "cpu  cpp        rejected   source at cliinfo_module.py:21; no C++ compiler was found (install g++ or set CXX)",
        "any  reference  available  halves (cliinfo_module.py:12)",
    ]


def test_a_terminal_gets_tables_of_80_columns(script, terminal, monkeypatch):
    assert terminal("info", "cliinfo::halves", "--import", script) == 0
    coloured = terminal.lines
    assert terminal.colours
    assert max(map(len, coloured)) <= 80
    assert coloured[0].startswith("cliinfo::halves(Tensor x, float factor=0.5, *")
    assert "autocast      cpu: bfloat16" in coloured
    assert any(line.split() == ["device", "backend", "status", "source"] for line in coloured)
    monkeypatch.setenv("NO_COLOR", "1")
    assert terminal("info", "cliinfo::halves") == 0
    assert terminal.lines == coloured
    assert not terminal.colours


def test_a_terminal_without_rich_gets_plain_text_of_80_columns(script, terminal, without):
    without("rich")
    assert terminal("info", "cliinfo::halves", "--import", script) == 0
    assert "\x1b" not in terminal.getvalue()
    assert max(map(len, terminal.lines[2:])) <= 80
    at = next(i for i, line in enumerate(terminal.lines) if line.startswith("cpu  cpp"))
    assert terminal.lines[at + 1].strip().startswith("no C++ compiler was found")


def test_signature_is_the_declaration_alone(capsys):
    assert info("opkit::rms_norm", "--signature") == 0
    assert capsys.readouterr().out == (
        "void rms_norm(opkit::Tensor x, opkit::Tensor weight, double eps, opkit::Tensor y, opkit::Tensor rstd);\n"
    )


@pytest.mark.skipif(compilers.find_cxx() is None, reason="needs a C++ compiler")
def test_what_signature_prints_compiles_as_a_kernel(registry, capsys):
    @opkit.op("cliinfo::mixed", shapes="n, [*s] -> n")
    def mixed(
        x: Tensor, many: list[Tensor], k: int, name: str, on: bool | None, dtype: torch.dtype
    ) -> Tensor:
        return x.clone()

    assert info("cliinfo::mixed", "--signature") == 0
    declared = capsys.readouterr().out.strip().removesuffix(";")
    mixed.register_kernel("cpu", opkit.cpp.kernel(f"#include <opkit/kernel.h>\n{declared} {{}}\n"))
    assert mixed.build("cpp")[0].exists()


def test_an_op_that_no_light_kernel_can_have_has_no_signature(script, capsys):
    assert info("cliinfo::turn", "--signature", "--import", script) == 1
    shown = capsys.readouterr()
    assert shown.out == ""
    assert shown.err.startswith(
        "opkit: building cliinfo::turn: argument by is complex, which a light kernel cannot take; expected Tensor"
    )
    assert info("cliinfo::turn", "--json") == 0
    assert json.loads(capsys.readouterr().out)["signature"] is None


def test_a_list_of_str_has_no_signature(registry, capsys):
    opkit.declare("cliinfo::join(str[] names, Tensor x) -> ()", shapes="n ->")
    assert info("cliinfo::join", "--signature") == 1
    assert (
        "argument names is a list of str, which it cannot take; expected one str" in capsys.readouterr().err
    )


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("opkit::vector_ad", "describing opkit::vector_ad: no op has that name; known are "),
        (
            "opkit::vector_ad",
            "Did you mean 'opkit::vector_add'? Name the module that defines it with --import.",
        ),
        (
            "opkit::swiglu*",
            "describing opkit::swiglu*: it means 2 ops, opkit::swiglu, opkit::swiglu_backward; expected one. Name "
            "one of them, or list them with opkit ops.",
        ),
    ],
)
def test_what_is_no_op_is_one_text(capsys, name, text):
    assert info(name) == 1
    error = capsys.readouterr().err
    assert text in error
    assert "Traceback" not in error


def test_a_pattern_that_means_one_op_is_its_name(capsys):
    assert info("opkit::vector_*", "--signature") == 0
    assert capsys.readouterr().out.startswith("void vector_add(")

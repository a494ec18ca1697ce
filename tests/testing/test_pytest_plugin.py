"""pytest's plugin: a test for each backend, a registry that is as before, and no torch where nobody needs it."""

from __future__ import annotations

import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

import opkit
from opkit import _registry
from opkit.testing import pytest_plugin
from opkit.testing.isolation import isolated

pytest_plugins = "pytester"
pytestmark = pytest.mark.usefixtures("registry")

OP = """
import opkit, pytest, torch
from torch import Tensor

@opkit.op("pp::plus", shapes="n -> n")
def plus(x: Tensor) -> Tensor:
    return x + 1

plus.register_kernel("cpu", lambda x: x + 1, backend="fast")
plus.register_kernel("cpu", lambda x: x + 1, backend="narrow", dtypes=(torch.float64,))
plus.register_kernel("xpu", lambda x: x + 1, backend="far")
pytestmark = pytest.mark.opkit_op(op=plus)
"""


@pytest.fixture
def run(pytester):
    """Run pytest here, in a module that has the op, and return what it says."""

    def run(text, *words, op=OP):
        pytester.makepyfile(op + textwrap.dedent(text))
        with isolated():
            return pytester.runpytest_inprocess(
                "-p", "opkit.testing.pytest_plugin", "-p", "no:cacheprovider", *words
            )

    return run


SEEN = """
    def test_it(opkit_backend):
        x = torch.ones(2, dtype=torch.float64)
        assert plus.explain(x).selected == opkit_backend
        assert plus(x).tolist() == [2, 2]
"""


def test_a_test_runs_once_for_each_backend(run):
    result = run(SEEN, "-v")
    result.assert_outcomes(passed=3)
    result.stdout.fnmatch_lines(
        ["*test_it?fast? PASSED*", "*test_it?narrow? PASSED*", "*test_it?reference? PASSED*"]
    )
    assert f"opkit: {opkit.__version__}" in result.stdout.lines


def test_the_command_line_chooses_backends(run):
    result = run(SEEN, "--opkit-backend", "fast,reference", "--opkit-backend=tiled", "-rs")
    result.assert_outcomes(passed=2, skipped=1)
    result.stdout.fnmatch_lines(
        [
            f"opkit: {opkit.__version__}, only backend fast, reference, tiled",
            "*pp::plus has no tiled kernel for cpu; it has fast, narrow, reference",
        ]
    )


def test_a_backend_that_cannot_take_a_call_is_not_another_one(run):
    result = run("""
        def test_it(opkit_backend):
            plus(torch.ones(2))
    """)
    result.assert_outcomes(passed=2, failed=1)
    result.stdout.fnmatch_lines(["*dtype float32 is not among float64*"])


def test_other_devices_and_calls_of_other_backends(run):
    result = run("""
        @pytest.mark.opkit_op("pp::plus", device="xpu")
        def test_far(opkit_backend):
            pass

        @pytest.mark.opkit_op("pp::plus", strict=False)
        def test_loose(opkit_backend):
            plus(torch.ones(2))
    """, "-rs")  # fmt: skip
    result.assert_outcomes(passed=3, skipped=2)
    result.stdout.fnmatch_lines(["*there is no device xpu here"])


@pytest.mark.parametrize(
    ("marker", "said"),
    [
        ("", "found the fixture opkit_backend without the op that it is about; expected one op, whose backends it goes "
         "over. Write @pytest.mark.opkit_op('demo::f') above the test"),
        ("pytest.mark.opkit_op()", "found the fixture opkit_backend with opkit_op()"),
        ("pytest.mark.opkit_op('pp::minus')", "looking up pp::minus: no op has that name"),
        ("pytest.mark.opkit_op(3)", "found opkit_op(3); expected an opkit.Op or its name. Pass op=f, what @opkit.op"),
        ("pytest.mark.opkit_op(op=plus, divece='cpu')", "opkit_op(..., divece=); expected op=, device= or strict=."),
    ],
)  # fmt: skip
def test_a_marker_that_is_wrong(run, marker, said):
    op = OP[: OP.index("pytestmark")] + (f"pytestmark = {marker}\n" if marker else "")
    result = run(SEEN, op=op)
    result.assert_outcomes(errors=1)
    text = " ".join(result.stdout.str().split())
    assert "collecting test_a_marker_that_is_wrong.py::test_it: " in text
    assert said in text


def test_what_a_test_defines_is_gone_after_it(run):
    result = run("""
        def test_defines(opkit_registry):
            @opkit.op("pp::mine", shapes="n -> n")
            def mine(x: Tensor) -> Tensor:
                return x + 2
            plus.register_kernel("cpu", lambda x: x + 2, backend="added", priority=1)
            assert plus(torch.ones(1)).item() == 3

        def test_sees_nothing_of_it():
            assert opkit.find("pp::mine") is None
            assert "added" not in [k.backend for k in plus.kernels]
            assert plus(torch.ones(1)).item() == 2
    """)
    result.assert_outcomes(passed=2)


def test_what_waits_for_an_op_is_forgotten_too():
    before = dict(_registry._additions)
    with isolated():
        _registry.when_defined("pp::later", lambda op: None)
        assert "pp::later" in _registry._additions
    assert dict(_registry._additions) == before


def test_the_marker_is_known_and_listed(run):
    result = run("def test_it(opkit_backend): pass", "--strict-markers", "--markers")
    result.stdout.fnmatch_lines(["@pytest.mark.opkit_op(op, device='cpu', strict=True): *"])


def test_loading_it_imports_no_torch_and_works_without_it():
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent("""
            import sys
            sys.modules["torch"] = None  # importing it fails
            import pytest
            class Empty:
                def pytest_collection(self, session): return True
            code = pytest.main(["-p", "opkit.testing.pytest_plugin", "--co", "-q", "/dev/null"], plugins=[Empty()])
            from opkit.testing import pytest_plugin
            heavy = {"torch", "rich", "hypothesis", "opkit.testing.checker", "opkit_kernels"}
            print(sorted(n for n in heavy & set(sys.modules) if sys.modules[n] is not None))
        """)],
        capture_output=True, text=True, env={"PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1", "PATH": "/usr/bin"},
    )  # fmt: skip
    assert done.stdout.splitlines()[-1] == "[]", done.stdout + done.stderr


def test_the_entry_point_is_the_module():
    text = (Path(opkit.__file__).parents[1] / "pyproject.toml").read_text()
    assert f'"{pytest_plugin.__name__}" = "{pytest_plugin.__name__}"' in text

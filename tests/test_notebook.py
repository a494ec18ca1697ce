"""Notebooks: cells are run by IPython itself, in this process."""

from __future__ import annotations

import html
import re
import subprocess
import sys

import pytest

import opkit
from opkit.cpp import compilers, nvrtc
from opkit.errors import BuildError, OpNotFoundError

pytest.importorskip("IPython", reason="needs ipython")

from IPython.core.error import UsageError
from IPython.core.interactiveshell import InteractiveShell
from IPython.utils.capture import capture_output
from traitlets.config import Config

pytestmark = pytest.mark.usefixtures("registry")
needs_compiler = pytest.mark.skipif(compilers.find_cxx() is None, reason="needs a C++ compiler")

DECLARE = '''
@opkit.op("cells::scale", shapes="*b n, n -> *b n")
def scale(x: Tensor, factor: Tensor) -> Tensor:
    """Multiply rows."""
    return x * factor
'''
KERNEL = """
#include <opkit/kernel.h>
void scale(opkit::Tensor x, opkit::Tensor factor, opkit::Tensor y) {
  const int64_t n = y.size(-1);
  for (int64_t i = 0; i < y.numel(); ++i)
    y.data<float>()[i] = x.data<float>()[i] * factor.data<float>()[i % n] + PLUS;
}
""".lstrip()


class Notebook:
    """Runs cells as a notebook does, and remembers what the last one showed."""

    def __init__(self):
        config = Config(HistoryManager={"enabled": False})
        self.shell = InteractiveShell(config=config, user_ns={})
        self.shell.display_formatter.active_types = ["text/plain", "text/html"]
        self.shown = self.number = None

    def __call__(self, cell):
        """Run a cell that is to succeed; return its value."""
        with capture_output() as self.shown:
            done = self.shell.run_cell(cell, store_history=True)
        assert done.success, self.shown.stdout + self.shown.stderr
        self.number = done.execution_count
        return done.result

    def fails(self, cell):
        """Run a cell that is to fail; return the error."""
        with capture_output() as self.shown:
            done = self.shell.run_cell(cell, store_history=True)
        self.number = done.execution_count
        assert done.error_in_exec is not None
        return done.error_in_exec

    def html(self, value):
        return self.shell.display_formatter.format(value)[0]["text/html"]


@pytest.fixture
def cell(monkeypatch):
    """A notebook with the extension loaded and an op declared."""
    from opkit.notebook import _magics

    monkeypatch.setattr(_magics, "_cells", {})
    for name in ("displayhook", "excepthook"):
        monkeypatch.setattr(sys, name, getattr(sys, name))
    monkeypatch.setitem(
        sys.modules, "__main__", sys.modules["__main__"]
    )  # which becomes the notebook's module
    notebook = Notebook()
    notebook("import opkit, torch\nfrom torch import Tensor")
    notebook("%load_ext opkit")
    notebook(DECLARE)
    return notebook


def text(page: str) -> str:
    """What one reads of HTML."""
    return html.unescape(re.sub(r"<[^>]+>", " ", page))


CALL = "scale(torch.ones(2, 3), torch.full((3,), 2.0)).tolist()[0][0]"


@needs_compiler
def test_a_cell_becomes_a_kernel_and_its_edit_takes_its_place(cell, recwarn):
    op = cell(f"%%opkit_cpp scale\n{KERNEL.replace('PLUS', '1')}")
    assert op is cell("scale")
    assert op.explain(*cell("torch.ones(2, 3), torch.ones(3)")).selected == "cpp"
    assert cell(CALL) == 3
    cell(f"%%opkit_cpp cells::scale\n{KERNEL.replace('PLUS', '2')}")
    made = cell.number
    assert cell(CALL) == 4
    assert [kernel.source for kernel in op.kernels if kernel.backend == "cpp"] == [f"cell In [{made}]"]
    assert not [w for w in recwarn if "replaces" in str(w.message)]


@needs_compiler
def test_kernels_are_kept_where_the_op_is_declared_again(cell):
    cell(f"%%opkit_cpp scale\n{KERNEL.replace('PLUS', '1')}")
    cell(DECLARE.replace("x * factor", "factor * x"))
    assert cell(CALL) == 3
    assert cell("scale.kernels")[0].backend == "cpp"


@needs_compiler
def test_options_say_what_the_kernel_takes(cell):
    op = cell(
        "%%opkit_cpp scale --backend fast --dtypes float32,torch.float64 --priority 3 --properties deterministic"
        " --when \"lambda x, factor: x.is_contiguous() or 'not contiguous'\" --cflags='-O1 -DPLUS=4' --symbol scale\n"
        f"{KERNEL}"
    )
    (kernel,) = op.native_kernels("fast")
    assert [str(dtype) for dtype in kernel.dtypes] == ["torch.float32", "torch.float64"]
    assert (kernel.priority, tuple(kernel.properties)) == (3, ("deterministic",))
    assert cell(CALL) == 6
    explained = cell("scale.explain(torch.ones(3, 3).t()[:, :2], torch.ones(2))")
    assert explained.selected == "reference"
    assert "not contiguous" in str(explained)
    assert "not contiguous" in cell.shown.stdout  # as the terminal shows it


@pytest.mark.skipif(
    compilers.find_nvcc() is None and nvrtc.TOOLCHAIN.find() is None, reason="needs nvcc or NVRTC"
)
@needs_compiler
def test_a_cell_of_cuda_is_compiled_without_a_device(cell):
    kernel = """
#include <opkit/kernel.h>
__global__ void run(const float* x, float* y) { y[threadIdx.x] = x[threadIdx.x]; }
void scale(opkit::Tensor x, opkit::Tensor factor, opkit::Tensor y) {
  run<<<1, 32, 0, opkit::stream()>>>(x.data<float>(), y.data<float>());
}
"""
    op = cell(f"%%opkit_cuda scale{kernel}")
    assert [(k.device, k.backend) for k in op.native_kernels()] == [("cuda", "cuda")]


# ---------------------------------------------------------------- errors


@needs_compiler
def test_an_error_names_the_line_of_the_cell_and_the_kernel_stays(cell):
    cell(f"%%opkit_cpp scale\n{KERNEL.replace('PLUS', '1')}")
    error = cell.fails(f"%%opkit_cpp scale\n{KERNEL.replace('PLUS', 'Nothing')}")
    assert isinstance(error, BuildError)
    assert [(d.file, d.line) for d in error.diagnostics[:1]] == [(f"In [{cell.number}]", 6)]
    assert str(error).endswith("\ncells::scale keeps the cpp kernel that it has.")
    assert f"In [{cell.number}]:6" in cell.shown.stdout + cell.shown.stderr
    assert "Traceback" not in cell.shown.stdout + cell.shown.stderr
    assert "_magics.py" not in cell.shown.stdout + cell.shown.stderr
    assert cell(CALL) == 3
    error = cell.fails(f"%%opkit_cpp scale --backend other\n{KERNEL.replace('PLUS', 'Nothing')}")
    assert "keeps" not in str(error)
    assert [kernel.backend for kernel in cell("scale.kernels")] == ["cpp", "reference"]


def test_a_cell_for_no_op(cell):
    error = cell.fails("%%opkit_cpp scael\nint x;")
    assert isinstance(error, OpNotFoundError)
    assert str(error) == (
        "looking up scael for a cell: it is no op's name, and no variable here that holds an op; those that do are "
        "scale. Did you mean 'scale'? Write namespace::name, or the variable."
    )
    assert str(cell.fails("%%opkit_cpp cells::scael\nint x;")).startswith(
        "looking up cells::scael for a cell: no op has that name; defined are "
    )
    assert isinstance(cell.fails("%%opkit_cpp\nint x;"), UsageError)
    assert "the following arguments are required: op" in cell.shown.stderr


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ("--dtypes float33",
         "--dtypes has 'float33'; expected torch's dtypes, with commas between. Write --dtypes float32,float64."),
        ("--when missing",
         "--when is missing, which fails with NameError: name 'missing' is not defined; expected a function of the "
         "op's arguments. Define one in a cell before, and give its name."),
        ("--when 'lambda x", "reading scale --when 'lambda x: No closing quotation"),
        ("--wen x", "unrecognized arguments: --wen x"),
    ],
)  # fmt: skip
def test_options_that_will_not_do(cell, options, said):
    assert isinstance(error := cell.fails(f"%%opkit_cpp scale {options}\nint x;"), UsageError)
    assert said in str(error)
    assert [kernel.backend for kernel in cell("scale.kernels")] == ["reference"]


@needs_compiler
def test_what_the_registration_refuses_is_said_without_a_traceback(cell):
    error = cell.fails(
        f"%%opkit_cpp scale --device gpu -DPLUS=1\n{KERNEL}".replace("-DPLUS=1", "--cflags=-DPLUS=1")
    )
    assert isinstance(error, opkit.RegistrationError)
    assert "torch knows no device 'gpu'" in cell.shown.stdout + cell.shown.stderr
    assert "_magics.py" not in cell.shown.stdout + cell.shown.stderr


# ---------------------------------------------------------------- how things look


def test_an_op_shows_its_contract_and_its_kernels(cell):
    cell("@scale.register_kernel('cuda', backend='fast')\ndef fast(x, factor): return x")
    page = cell.html(cell("scale"))
    read = " ".join(text(page).split())
    assert read.startswith(
        "cells::scale (Tensor x, Tensor factor) -> (Tensor) shapes *b n, n -> *b n device backend"
    )
    assert "cuda fast available fast (" in read
    assert page.count("<tr>") == 3
    assert "&lt;ipython-input" in page  # what is no markup is escaped


def test_an_explanation_shows_every_candidate(cell):
    cell(
        "@scale.register_kernel('cpu', backend='fast', dtypes=(torch.float64,))\ndef fast(x, factor): return x"
    )
    page = cell.html(cell("scale.explain(torch.ones(2, 3), torch.ones(3))"))
    read = " ".join(text(page).split())
    assert read.startswith("cells::scale on cpu backend status reason source fast rejected ")
    assert "reference selected last fallback scale (" in read
    assert re.search(r'color: #2da44e; font-weight: bold">selected<', page)
    assert re.search(r'color: #bf8700">rejected<', page)


def test_a_report_is_shown_too(cell):
    record = "opkit.testing.Record('cells::scale', 'cpp', 'results', 'failed', '<1>', '2')"
    page = cell.html(cell(f"opkit.testing.Report('cells::scale', ({record},))"))
    assert "cells::scale" in page
    assert "&lt;1&gt;" in page
    assert "<table" in page


def test_importing_it_imports_no_ipython():
    code = "import sys, opkit; opkit.load_ipython_extension; print('IPython' in sys.modules, 'torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.strip() == "False False", done.stderr
    assert "load_ipython_extension" not in opkit.__all__

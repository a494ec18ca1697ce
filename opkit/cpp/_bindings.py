"""The unit that shows the functions of a source to Python, with pybind11 and without.

What takes longest in a small extension is pybind11's own code. opkit/python.h binds functions of
tensors and plain values in a third of the time. Where it does not do, `opkit.cpp._aten` compiles
the unit with pybind11 instead.
"""

from __future__ import annotations

import ctypes
import functools
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from opkit.cpp import _pch

EXPORTS = "functions= of load_inline"  # what compilers call the lines that export them

# What opkit/python.h has no type for, and headers that take as long as pybind11.
_BEYOND = re.compile(
    r"pybind|PYBIND|\bpy::|\bPy(?:[A-Z]|_)|\bPY_|THP"
    r"|<torch/(?:all|data|jit|nn|optim|python|script|serialize|torch)\.h>|<torch/csrc/(?!autograd/|stable/)"
)
_MORE = re.compile(r"\b(autograd|cuda|enumtype|fft|mps|nested|sparse|special|xpu)::")
_SYMBOL = re.compile(r'"(_Z\w+)"')


def including(headers: Sequence[str], files: Sequence[str]) -> str:
    lines = [f"#include <{header}>" for header in headers] + [f'#include "{file}"' for file in files]
    return "\n".join(lines) + "\n"


def with_pybind(documented: Mapping[str, str] | None, *, wrapped: bool) -> str:
    """Return the block that exports functions to Python, a line each under a name of its own."""
    if documented is None:
        return ""
    lines = ["PYBIND11_MODULE(TORCH_EXTENSION_NAME, m) {", f'#line 1 "{EXPORTS}"']
    for name, text in documented.items():
        value = f"torch::wrap_pybind_function({name})" if wrapped else name
        lines.append(f'  m.def("{name}", {value}, {json.dumps(text)});')
    return "\n".join([*lines, "}\n"])


def without_pybind(documented: Mapping[str, str], cpp: Mapping[str, str], cuda: Sequence[str]) -> str | None:
    """Return the unit that opkit/python.h binds, or None for texts that it cannot do for.

    Args:
        documented: the functions, with their docstrings.
        cpp: the C++ texts by their file names.
        cuda: the CUDA texts.
    """
    texts = [*cpp.values(), *cuda]
    if any(_BEYOND.search(text) for text in texts) or not _pch.is_enough(texts):
        return None
    if any(_pch.NARROWED in text for text in cuda):  # opkit/python.h in its place is nothing for nvcc
        return None
    more = {name for text in cpp.values() for name in _MORE.findall(text)}
    headers = [f"torch/{name.removesuffix('type')}.h" for name in sorted(more)]
    lines = ["static int opkit_add(PyObject* module) {", "  static PyMethodDef functions[] = {"]
    lines.append(f'#line 1 "{EXPORTS}"')
    for name, text in documented.items():
        lines.append(f'    opkit::python::Function<&{name}>::method("{name}", {json.dumps(text)}),')
    lines += [
        "    {nullptr, nullptr, 0, nullptr}};",
        "  return PyModule_AddFunctions(module, functions);",
        "}",
    ]
    lines.append("OPKIT_PYTHON_MODULE(TORCH_EXTENSION_NAME, opkit_add)\n")
    return including([_pch.BINDING, *headers], [*cpp]) + "\n".join(lines)


@functools.cache
def is_supported() -> bool:
    """Whether this torch exports what opkit/python.h declares by hand."""
    import torch

    try:
        library = ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / "libtorch_python.so"))
    except OSError:
        return False
    text = re.sub(r'"\s+"', "", _pch.DIRECT[_pch.BINDING])  # long names stand on two lines
    return all(hasattr(library, symbol) for symbol in _SYMBOL.findall(text))

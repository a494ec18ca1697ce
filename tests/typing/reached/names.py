"""Every way to reach an op or a module by name, among what a stub leaves as it is."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

import torch

import opkit
import reached.defined  # noqa: F401  (defines what is reached)

if TYPE_CHECKING:
    from collections.abc import Sequence

_LOG = logging.getLogger(__name__)
limit = 3
dtype: torch.dtype = torch.float32

split = opkit.get("reached::split")
scaled = opkit.declare("reached::scaled(Tensor x, float factor=2.5, *, ScalarType? dtype=None) -> Tensor")
total: opkit.Op[..., object] = opkit.get("reached::total")
added = torch.ops.aten.add.Tensor
ops = torch.ops.reached

try:
    missing = opkit.find("reached::missing")
except LookupError:
    missing = None

# What pybind11 writes into docstrings, without the time that it takes to compile.
SOURCE = r"""
#include <Python.h>
static PyObject* none(PyObject*, PyObject*) { Py_RETURN_NONE; }
static PyMethodDef methods[] = {
    {"twice", none, METH_VARARGS, "twice(arg0: torch.Tensor, arg1: typing.SupportsInt) -> torch.Tensor\n\nDouble."},
    {"halves", none, METH_VARARGS,
     "halves(xs: collections.abc.Sequence[torch.Tensor], by: float | None = None) -> list[torch.Tensor]"},
    {"either", none, METH_VARARGS,
     "either(*args, **kwargs)\nOverloaded function.\n\n1. either(x: int) -> int\n\n2. either(x: str) -> str"},
    {"beyond", none, METH_VARARGS, "beyond(x: at::Scalar, how: native.Mode = <Mode.A: 0>) -> std::map[int, int]"},
    {"unsaid", none, METH_VARARGS, nullptr},
    {nullptr, nullptr, 0, nullptr}};
static PyModuleDef module = {PyModuleDef_HEAD_INIT, "native", nullptr, -1, methods};
PyMODINIT_FUNC PyInit_native() {
  PyObject* made = PyModule_Create(&module);
  PyModule_AddIntConstant(made, "version", 3);
  return made;
}
"""
native = opkit.cpp.load("native", SOURCE)


class Model:
    """Stays as it is, but for the bodies of its methods."""

    rows: int = 4

    def __init__(self, sizes: Sequence[int], name: str = "model") -> None:
        self.sizes = sizes
        self.name = name
        self.calls = 0
        self.last: torch.Tensor | None = None

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        self.last = split(x).low
        return x


def plain(x: torch.Tensor, count: int = limit) -> list[torch.Tensor]:
    return [x] * count


if __name__ == "__main__":
    print(plain(torch.ones(2)))

"""The class from which an op has the raw memory that the core calls it by.

An instance has room for two C pointers, a vectorcall function and the core's record of the op, both null until the
core puts itself there. So the core may arrive after ops were made, and Python alone serves them until then.
"""

from __future__ import annotations

import ctypes
from typing import TYPE_CHECKING, Any

_POINTERS = 2  # as `Door` in core/module.cpp has them
_BASETYPE = 1 << 10  # Py_TPFLAGS_BASETYPE


class _Slot(ctypes.Structure):
    _fields_ = (("slot", ctypes.c_int), ("function", ctypes.c_void_p))


class _Spec(ctypes.Structure):
    """PyType_Spec of Python's stable C interface."""

    _fields_ = (
        ("name", ctypes.c_char_p),
        ("basicsize", ctypes.c_int),
        ("itemsize", ctypes.c_int),
        ("flags", ctypes.c_uint),
        ("slots", ctypes.POINTER(_Slot)),
    )


_NAME = b"opkit.dispatch.native.door.Door"  # Python 3.10 keeps the pointer


def _make() -> Any:
    slots = (_Slot * 1)()  # none, and the end
    size = object.__basicsize__ + _POINTERS * ctypes.sizeof(ctypes.c_void_p)
    spec = _Spec(_NAME, size, 0, _BASETYPE, slots)
    make = ctypes.pythonapi.PyType_FromSpec
    make.restype, make.argtypes = ctypes.py_object, [ctypes.POINTER(_Spec)]
    return make(ctypes.byref(spec))


if TYPE_CHECKING:

    class Door:
        """What an op inherits from."""

else:
    Door = _make()

"""The files beside an op's declaration that hold its kernels: <folder>.cpp, <folder>.cu and <folder>_triton.py.

A Triton module has a function for each op declared there, of its name and arguments, that launches its kernel and
returns the results. It imports triton, which may be missing, so nothing imports it before such a kernel is called.
Under TRITON_INTERPRET=1 Triton runs kernels in Python, to look into them, and they take tensors on the CPU too.
It puts functions of its own into triton.language while one runs, so that then they run one at a time.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import importlib.util
import os
import sys
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import opkit
from opkit_kernels._flags import CFLAGS

FLOATING = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
_INTERPRETS = os.environ.get("TRITON_INTERPRET") == "1"
_turn: contextlib.AbstractContextManager[object] = (
    threading.RLock() if _INTERPRETS else contextlib.nullcontext()
)
_INCLUDES = (Path(__file__).parent / "include",)


def register_files(
    op: opkit.Op[Any, Any],
    *,
    dtypes: Sequence[torch.dtype] = FLOATING,
    cpu_dtypes: Sequence[torch.dtype] | None = None,
    properties: Sequence[str] = ("deterministic",),
) -> None:
    """Register the kernels of an op that lie beside its declaration.

    Args:
        op: whose module is named after its folder.
        dtypes: that the kernels take as the first tensor's.
        cpu_dtypes: that the one in C++ takes, where these are others.
        properties: of all of them; those on CUDA can be captured in a graph besides.
    """
    module = op.reference.__module__
    path = Path(str(sys.modules[module].__file__))
    symbol = op.name.partition("::")[2]
    op.register_kernel(
        "cpu",
        opkit.cpp.kernel(
            path.with_suffix(".cpp"), symbol=symbol, extra_cflags=CFLAGS, extra_include_paths=_INCLUDES
        ),
        backend="cpp",
        dtypes=dtypes if cpu_dtypes is None else cpu_dtypes,
        properties=properties,
    )
    op.register_kernel(
        "cuda",
        opkit.cpp.kernel(path.with_suffix(".cu"), symbol=symbol, extra_include_paths=_INCLUDES),
        backend="cuda",
        dtypes=dtypes,
        properties=(*properties, "graph_safe"),
    )
    for device in ("cuda", "cpu") if _INTERPRETS else ("cuda",):
        op.register_kernel(
            device,
            _launcher(f"{module}_triton", symbol),
            backend="triton",
            dtypes=dtypes,
            # Where triton is, no condition: a choice that nothing need be asked for is made once.
            when=None if importlib.util.find_spec("triton") else _without_triton,
            properties=(*properties, "graph_safe"),
            source=str(path.with_name(f"{path.stem}_triton.py")),
        )


def _launcher(module: str, name: str) -> Callable[..., Any]:
    """Return a kernel that calls function `name` of `module`, on the device of the arguments."""

    @functools.cache
    def function() -> Callable[..., Any]:
        return getattr(importlib.import_module(module), name)

    def launch(*args: Any, **kwargs: Any) -> Any:
        first = _first_tensor((*args, *kwargs.values()))
        if first is None:  # empty lists
            return function()(*args, **kwargs)
        with _turn, torch.cuda.device_of(first):  # Triton launches on the current one
            return function()(*args, **kwargs)

    return launch


def _first_tensor(values: Sequence[Any]) -> Tensor | None:
    for value in values:
        found = _first_tensor(value) if isinstance(value, (list, tuple)) else value
        if isinstance(found, Tensor):
            return found
    return None


def _without_triton(*args: Any, **kwargs: Any) -> str:
    return "triton is not installed; try: pip install triton"

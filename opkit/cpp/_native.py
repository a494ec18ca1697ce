"""Native entry points as private ops of torch's dispatcher, through torch's C shim.

Every library gets a name of its own, so that an edited kernel never meets the old one. What is
registered stays for the life of the process, as the library does.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import inspect
import re
import subprocess
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from opkit import _torch
from opkit.errors import BuildError
from opkit.spec.schema import Schema

_NAMESPACE = "_opkit_native"
_ABI = 0x020A000000000000  # torch 2.10, the version whose stack layout glue.h reads

_registered: dict[tuple[str, str, str], tuple[Callable[..., Any], Any]] = {}
_lock = threading.Lock()


def register(path: Path, schema: Schema, device: str, *, with_outputs: bool) -> Callable[..., Any]:
    """Load a library and return its entry point as a private op; `with_outputs` passes outputs in."""
    declaration = _lowered(schema, with_outputs=with_outputs)
    key = (str(path), declaration, device)
    with _lock:
        if key not in _registered:
            _registered[key] = _define(path, schema, declaration, device)
        return _registered[key][0]


def _define(path: Path, schema: Schema, declaration: str, device: str) -> tuple[Callable[..., Any], Any]:
    shim = _shim()
    try:
        entry = ctypes.CDLL(str(path)).opkit_call
    except (OSError, AttributeError) as err:
        if "libtorch_cuda.so" in str(err) and torch.version.cuda is None:
            raise BuildError(
                f"loading the kernel of {schema.name} from {path}: it is compiled with nvcc and needs "
                f"libtorch_cuda.so, but torch {torch.__version__} is built without CUDA. Expected a torch with CUDA "
                "for CUDA source. Install one (https://pytorch.org/get-started), or write the kernel in C++, "
                "without cuda=True and the suffix .cu.",
                op=schema.name,
            ) from err
        missing = re.search(r"undefined symbol: (\S+)", str(err))
        raise BuildError(
            f"loading the kernel of {schema.name} from {path}: {err}. "
            + (
                f"Expected every function that it calls to be defined. Define {_demangled(missing.group(1))} in the "
                "source, or name the library that has it in extra_ldflags."
                if missing
                else f"Expected a library that fits torch {torch.__version__}. Remove the folder {path.parent} "
                "to have it built again."
            ),
            op=schema.name,
        ) from err
    digest = hashlib.sha256(f"{path}{declaration}{device}".encode()).hexdigest()[:16]
    name = f"{schema.namespace}__{schema.opname}_{digest}"
    library = torch.library.Library(_NAMESPACE, "FRAGMENT")
    library.define(name + declaration)
    handle = ctypes.c_void_p()
    dispatch_key = _torch.dispatch_key(device).encode()
    pointer = ctypes.cast(entry, ctypes.c_void_p)
    status = shim.aoti_torch_library_init_impl(
        _NAMESPACE.encode(), dispatch_key, str(path).encode(), 1, ctypes.byref(handle)
    )
    if not status:
        status = shim.torch_library_impl(handle, name.encode(), pointer, _ABI)
    if status:
        raise BuildError(
            f"loading the kernel of {schema.name} from {path}: torch refused it for the device {device}. Expected "
            "a device whose kernels torch's C shim registers: cpu, cuda or a plugin's.",
            op=schema.name,
        )
    overload = getattr(getattr(torch.ops, _NAMESPACE), name).default
    return overload, (library, handle)


def _demangled(symbol: str) -> str:
    """Return a C++ symbol as it stands in the source, where binutils can tell."""
    try:
        return subprocess.run(["c++filt", symbol], capture_output=True, text=True).stdout.strip() or symbol
    except OSError:
        return symbol


def _lowered(schema: Schema, *, with_outputs: bool) -> str:
    """Return the private op's arguments and results: all positional, int for SymInt."""
    params = [f"{str(p.type).replace('SymInt', 'int')} {p.name}" for p in schema.params]
    if with_outputs:
        params += [f"Tensor opkit_out{i}" for i in range(len(schema.results))]
        return f"({', '.join(params)}) -> ()"
    return f"({', '.join(params)}) -> ({', '.join(str(r.type) for r in schema.results)})"


@functools.cache
def _shim() -> ctypes.CDLL:
    """Return torch's C shim, once its numbers for dtypes are known to be those of kernel.h."""
    library = ctypes.CDLL(str(Path(inspect.getfile(torch)).parent / "lib" / "libtorch_cpu.so"))
    library.torch_library_impl.argtypes = [ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p, ctypes.c_uint64]
    library.aoti_torch_library_init_impl.argtypes = [
        ctypes.c_char_p,
        ctypes.c_char_p,
        ctypes.c_char_p,
        ctypes.c_uint32,
        ctypes.c_void_p,
    ]
    for name, number in dtype_numbers().items():
        if getattr(library, f"aoti_torch_dtype_{name}")() != number:
            raise BuildError(
                f"loading a native kernel: torch {torch.__version__} has another number for {name} than "
                "opkit/kernel.h. This opkit supports torch 2.11 to 2.15; install a newer opkit."
            )
    return library


def dtype_numbers() -> dict[str, int]:
    """Return the dtypes of opkit/kernel.h with their numbers, named as torch's C shim names them."""
    header = (Path(__file__).parent / "include" / "opkit" / "kernel.h").read_text()
    body = re.search(r"enum class DType : int32_t \{(.*?)\};", header, re.DOTALL)
    assert body is not None
    pairs = re.findall(r"(\w+) = (\d+)", body.group(1))
    return {("bool" if name == "boolean" else name): int(number) for name, number in pairs}

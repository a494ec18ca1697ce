"""Native entry points as private ops of torch's dispatcher, through torch's C shim.

Every library gets a name of its own, so that an edited kernel never meets the old one. It stays loaded
for as long as somebody holds what `register` returned.
"""

from __future__ import annotations

import _ctypes
import ctypes
import functools
import hashlib
import os
import threading
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from opkit import _torch
from opkit.cpp import compilers, diagnostics
from opkit.errors import BuildError
from opkit.spec.schema import Schema

_NAMESPACE = "_opkit_native"
_ABI = 0x020A000000000000  # torch 2.10, the version whose stack layout glue.h reads

DTYPES = {
    "uint8": 0,
    "int8": 1,
    "int16": 2,
    "int32": 3,
    "int64": 4,
    "float16": 5,
    "float32": 6,
    "float64": 7,
    "complex64": 9,
    "complex128": 10,
    "bool": 11,
    "bfloat16": 15,
    "float8_e5m2": 23,
    "float8_e4m3fn": 24,
    "float8_e5m2fnuz": 25,
    "float8_e4m3fnuz": 26,
    "uint16": 27,
    "uint32": 28,
    "uint64": 29,
    "float8_e8m0fnu": 44,
    "float4_e2m1fn_x2": 45,
}
"""The dtypes of opkit/kernel.h with their numbers, named as torch's C shim names them."""

_loaded: weakref.WeakValueDictionary[tuple[str, str, str], Loaded] = weakref.WeakValueDictionary()
_lock = threading.RLock()


class Loaded:
    """A library's entry point as a private op of torch, until nobody holds this."""

    def __init__(self, call: Callable[..., Any]) -> None:
        self.call = call


def register(path: Path, schema: Schema, device: str, *, with_outputs: bool, unload: bool = False) -> Loaded:
    """Load a library and register its entry point with torch.

    Args:
        path: the library.
        schema: the op's.
        device: the device type that it is a kernel for.
        with_outputs: the outputs are passed in, after the arguments.
        unload: whether the library is unmapped when nobody holds the result; not for code that a device may
            still be running then, or that torch may call to free what it returned.

    Raises:
        BuildError: the library does not load, or torch refuses its entry point.
    """
    declaration = _lowered(schema, with_outputs=with_outputs)
    key = (str(path), declaration, device)
    with _lock:
        found = _loaded.get(key)
        if found is None:
            found = _loaded[key] = _define(path, schema, declaration, device, unload)
        return found


def _define(path: Path, schema: Schema, declaration: str, device: str, unload: bool) -> Loaded:
    shim = _shim()
    try:
        opened = ctypes.CDLL(str(path))
        boxed = getattr(opened, "opkit_call", None)
        entry = boxed or opened.opkit_register
    except (OSError, AttributeError) as err:
        if "libtorch_cuda.so" in str(err) and torch.version.cuda is None:
            raise BuildError(
                f"loading the kernel of {schema.name} from {path}: it is compiled with nvcc and needs "
                f"libtorch_cuda.so, but torch {torch.__version__} is built without CUDA. Expected a torch with CUDA "
                "for CUDA source. Install one (https://pytorch.org/get-started), or write the kernel in C++, "
                "without cuda=True and the suffix .cu.",
                op=schema.name,
            ) from err
        if "undefined symbol" in str(err):
            raise diagnostics.unloadable(err, label=f"the kernel of {schema.name}", op=schema.name) from err
        raise BuildError(
            f"loading the kernel of {schema.name} from {path}: {err}. Expected a library that fits torch "
            f"{torch.__version__}. Remove the folder {path.parent} to have it built again.",
            op=schema.name,
        ) from err
    digest = hashlib.sha256(f"{path}{declaration}{device}".encode()).hexdigest()[:16]
    name = f"{schema.namespace}__{schema.opname}_{digest}"
    library = torch.library.Library(_NAMESPACE, "FRAGMENT")
    library.define(name + declaration)
    dispatch_key = _torch.dispatch_key(device).encode()
    if boxed is not None:
        handle = ctypes.c_void_p()
        pointer = ctypes.cast(entry, ctypes.c_void_p)
        status = shim.aoti_torch_library_init_impl(
            _NAMESPACE.encode(), dispatch_key, str(path).encode(), 1, ctypes.byref(handle)
        )
        if not status:
            status = shim.torch_library_impl(handle, name.encode(), pointer, _ABI)
        if status:
            _torch.destroy(library)
            raise BuildError(
                f"loading the kernel of {schema.name} from {path}: torch refused it for the device {device}. "
                "Expected a device whose kernels torch's C shim registers: cpu, cuda or a plugin's.",
                op=schema.name,
            )
        withdraw = functools.partial(shim.aoti_torch_delete_library_object, handle)
    else:
        said = ctypes.create_string_buffer(4096)
        entry.restype = ctypes.c_void_p
        registered = entry(_NAMESPACE.encode(), name.encode(), dispatch_key, said, len(said))
        if not registered:
            _torch.destroy(library)
            text = said.value.decode(errors="replace").strip()
            raise BuildError(
                f"loading the kernel of {schema.name} from {path}: torch refused its function for the device "
                f"{device}:\n{text}\nExpected a function of the op's schema {schema}. Correct its parameters.",
                op=schema.name,
            )
        withdraw = functools.partial(opened.opkit_unregister, ctypes.c_void_p(registered))
    loaded = Loaded(getattr(getattr(torch.ops, _NAMESPACE), name).default)
    # A thread that the kernel has started would go on in code that is gone.
    keeps = not unload or any(name in path.read_bytes() for name in (b"pthread_create", b"_ZNSt6thread"))
    library_handle = None if keeps else opened._handle
    end = weakref.finalize(loaded, _unload, name, withdraw, library, library_handle)
    end.atexit = False  # torch may be gone by then
    return loaded


def _unload(name: str, withdraw: Callable[[], Any], library: Any, handle: int | None) -> None:
    """Take the private op out of torch, then unmap the library."""
    with _lock:
        withdraw()
        _torch.destroy(library)
        vars(getattr(torch.ops, _NAMESPACE)).pop(name, None)
        if handle is not None:
            _ctypes.dlclose(handle)


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
    path = os.path.join(os.path.dirname(torch.__file__), "lib", "libtorch_cpu.so")
    library = ctypes.CDLL("libtorch_cpu.so")  # by its name: torch has loaded it, so no file is opened
    library.torch_library_impl.argtypes = [ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p, ctypes.c_uint64]
    library.aoti_torch_delete_library_object.argtypes = [ctypes.c_void_p]
    library.aoti_torch_library_init_impl.argtypes = [
        ctypes.c_char_p,
        ctypes.c_char_p,
        ctypes.c_char_p,
        ctypes.c_uint32,
        ctypes.c_void_p,
    ]
    stat = os.stat(path)
    compilers.known(("dtypes", path, stat.st_size, stat.st_mtime_ns, DTYPES), lambda: _agreed(library))
    return library


def _agreed(shim: ctypes.CDLL) -> str:
    """Compare torch's numbers for dtypes with those of kernel.h."""
    for name, number in DTYPES.items():
        ask = getattr(shim, f"aoti_torch_dtype_{name}", None)  # torch 2.11 cannot tell the newest dtypes
        if ask is not None and ask() != number:
            raise BuildError(
                f"loading a native kernel: torch {torch.__version__} has another number for {name} than "
                "opkit/kernel.h. This opkit supports torch 2.11 to 2.15; install a newer opkit."
            )
    return "agreed"

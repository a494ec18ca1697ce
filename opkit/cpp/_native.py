"""Native entry points as private ops of torch's dispatcher, through torch's C shim.

Every library gets a name of its own, and stays loaded for as long as somebody holds what `register`
returned.
"""

from __future__ import annotations

import _ctypes
import ctypes
import functools
import itertools
import os
import re
import sys
import threading
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from opkit import _torch, _torch_library
from opkit.cpp import diagnostics
from opkit.errors import BuildError
from opkit.spec.schema import Schema

_NAMESPACE = "_opkit_native"
_LENGTH = re.compile(r"\[\d+\]")  # torch's C++ knows a list of fixed length as any other
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

_THREADS = (b"pthread_create", b"_ZNSt6thread")
_REGISTER = ctypes.CFUNCTYPE(
    ctypes.c_void_p, ctypes.c_char_p, ctypes.c_char_p, ctypes.c_char_p, ctypes.c_char_p, ctypes.c_size_t
)
_UNREGISTER = ctypes.CFUNCTYPE(None, ctypes.c_void_p)

_loaded: weakref.WeakValueDictionary[tuple[str, str, str], Loaded] = weakref.WeakValueDictionary()
_lock = threading.RLock()
_numbers = itertools.count()  # of libraries, so that an edited kernel never meets the old one


class Loaded:
    """A library's entry point as a private op of torch, until nobody holds this."""

    def __init__(self, name: str, call: Callable[..., Any]) -> None:
        self.name = name
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
    shim = _shim(schema)
    try:
        # Without ctypes.CDLL, which makes a class for every library.
        handle = _ctypes.dlopen(str(path), ctypes.DEFAULT_MODE)
        boxed = _find_symbol(handle, "opkit_call")
        entry = boxed or _ctypes.dlsym(handle, "opkit_register")
    except OSError as err:
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
    name = f"{schema.namespace}__{schema.opname}_{next(_numbers)}"
    origin, dispatch_key = os.fsencode(path), _key(schema, device).encode()
    fragment, kernels = ctypes.c_void_p(), ctypes.c_void_p()
    shim.aoti_torch_library_init_fragment(_NAMESPACE.encode(), origin, 1, ctypes.byref(fragment))
    if shim.aoti_torch_library_def(fragment, f"{name}{declaration}".encode()):
        shim.aoti_torch_delete_library_object(fragment)
        raise BuildError(
            f"loading the kernel of {schema.name} from {path}: torch refused the schema {declaration}. Expected one "
            "that it parses. Correct the op's schema.",
            op=schema.name,
        )
    if boxed is not None:
        status = shim.aoti_torch_library_init_impl(
            _NAMESPACE.encode(), dispatch_key, origin, 1, ctypes.byref(kernels)
        )
        if not status:
            status = shim.torch_library_impl(kernels, name.encode(), boxed, _ABI)
        if status:
            shim.aoti_torch_delete_library_object(fragment)
            raise BuildError(
                f"loading the kernel of {schema.name} from {path}: torch refused it for the device {device}. "
                "Expected a device whose kernels torch's C shim registers: cpu, cuda or a plugin's.",
                op=schema.name,
            )
        withdraw = functools.partial(shim.aoti_torch_delete_library_object, kernels)
    else:
        said = ctypes.create_string_buffer(4096)
        registered = _REGISTER(entry)(_NAMESPACE.encode(), name.encode(), dispatch_key, said, len(said))
        if not registered:
            shim.aoti_torch_delete_library_object(fragment)
            text = said.value.decode(errors="replace").strip()
            raise BuildError(
                f"loading the kernel of {schema.name} from {path}: torch refused its function for the device "
                f"{device}:\n{text}\nExpected a function of the op's schema {schema}. Correct its parameters.",
                op=schema.name,
            )
        withdraw = functools.partial(_UNREGISTER(_ctypes.dlsym(handle, "opkit_unregister")), registered)
    qualified = f"{_NAMESPACE}::{name}"
    loaded = Loaded(qualified, _torch_library.overload(qualified))
    undefine = functools.partial(shim.aoti_torch_delete_library_object, fragment)
    end = weakref.finalize(loaded, _unload, name, withdraw, undefine, handle if unload else None, path)
    end.atexit = False  # torch may be gone by then
    return loaded


def _key(schema: Schema, device: str) -> str:
    """Return the dispatch key of the private op: one that also takes calls without a tensor, if there may be some."""
    tensors = [p.type for p in schema.params if p.type.is_tensor and not p.type.optional]
    return _torch.dispatch_key(device) if tensors else "CompositeExplicitAutograd"


def _find_symbol(handle: int, name: str) -> int | None:
    try:
        return _ctypes.dlsym(handle, name)
    except OSError:
        return None


def _unload(
    name: str, withdraw: Callable[[], Any], undefine: Callable[[], Any], handle: int | None, path: Path
) -> None:
    """Take the private op out of torch, then unmap the library."""
    with _lock:
        withdraw()
        undefine()
        vars(getattr(torch.ops, _NAMESPACE)).pop(name, None)
        if handle is not None and not _may_start_threads(path):
            _ctypes.dlclose(handle)


def _may_start_threads(path: Path) -> bool:
    """Whether a thread that the library has started could go on in code that is gone."""
    try:
        content = path.read_bytes()
    except OSError:  # the cache was removed
        return True
    return any(word in content for word in _THREADS)


def _lowered(schema: Schema, *, with_outputs: bool) -> str:
    """Return the private op's arguments and results: all positional, int for SymInt."""
    params = [f"{_LENGTH.sub('[]', str(p.type)).replace('SymInt', 'int')} {p.name}" for p in schema.params]
    if with_outputs:
        params += [f"{r.type} opkit_out{i}" for i, r in enumerate(schema.results)]
        return f"({', '.join(params)}) -> ()"
    return f"({', '.join(params)}) -> ({', '.join(str(r.type) for r in schema.results)})"


def _open_shim() -> ctypes.CDLL:
    library = ctypes.CDLL("libtorch_cpu.so")  # by its name: torch has loaded it, so no file is opened
    pointer, text, number = ctypes.c_void_p, ctypes.c_char_p, ctypes.c_uint32
    library.aoti_torch_library_init_fragment.argtypes = [text, text, number, pointer]
    library.aoti_torch_library_def.argtypes = [pointer, text]
    library.aoti_torch_library_init_impl.argtypes = [text, text, text, number, pointer]
    library.torch_library_impl.argtypes = [pointer, text, pointer, ctypes.c_uint64]
    library.aoti_torch_delete_library_object.argtypes = [pointer]
    return library


def _find_other_number(shim: ctypes.CDLL) -> str | None:
    """Return a dtype whose number is another one in torch than in kernel.h, or None."""
    for name, number in DTYPES.items():
        ask = getattr(shim, f"aoti_torch_dtype_{name}", None)  # torch 2.11 cannot tell the newest dtypes
        if ask is not None and ask() != number:
            return name
    return None


if sys.platform.startswith("linux"):  # elsewhere nothing is built
    _SHIM = _open_shim()
    _other = _find_other_number(_SHIM)


def _shim(schema: Schema) -> ctypes.CDLL:
    """Return torch's C shim.

    Raises:
        BuildError: its numbers for dtypes are not those of kernel.h.
    """
    if _other:
        raise BuildError(
            f"loading the kernel of {schema.name}: torch {torch.__version__} has another number for {_other} than "
            "opkit/kernel.h. Expected torch 2.11 to 2.15. Install a newer opkit.",
            op=schema.name,
        )
    return _SHIM

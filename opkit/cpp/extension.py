"""Extensions: pybind11 modules, TORCH_LIBRARY blocks and CUDA sources, in every tier.

`load`, `load_inline` and `build` take torch.utils.cpp_extension's parameters. Sources with torch's full
headers are built as torch would (`opkit.cpp._aten`), others by opkit's own driver. A name says nothing
about what is loaded, the content does.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import os
import re
import shutil
import uuid
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

from opkit.cpp import _arguments, _bindings, compile, diagnostics, toolchain
from opkit.cpp import tier as tiers
from opkit.cpp._aten import Job, Sources
from opkit.cpp._unit import Unit
from opkit.errors import BuildError

_LIBRARY_BLOCK = re.compile(r"^[ \t]*(?:STABLE_)?TORCH_LIBRARY[ \t]*\([ \t]*(\w+)[ \t]*,", re.MULTILINE)

_modules: dict[Path, ModuleType] = {}
_blocks: dict[str, Path] = {}  # namespaces whose TORCH_LIBRARY block is loaded


def load(
    name: str,
    sources: Sources,
    *,
    extra_cflags: Sequence[str] | None = None,
    extra_cuda_cflags: Sequence[str] | None = None,
    extra_ldflags: Sequence[str] | None = None,
    extra_include_paths: Sequence[str | os.PathLike[str]] | None = None,
    is_python_module: bool = True,
    build_directory: str | os.PathLike[str] | None = None,
    with_cuda: bool | None = None,
    verbose: bool = False,
    tier: str | None = None,
) -> Any:
    """Build an extension if its content is new, load it, and return the module.

    >>> module = load("fast", ["fast.cpp", "fast.cu"])  # doctest: +SKIP
    >>> module.run(x)  # doctest: +SKIP

    Args:
        name: the name of the module; its source says PYBIND11_MODULE(TORCH_EXTENSION_NAME, m).
        sources: a path, a source text, or a list of those.
        extra_cflags: flags for the C++ compiler, after `-O3 -DNDEBUG`.
        extra_cuda_cflags: flags for nvcc, after `-O3 -DNDEBUG`.
        extra_ldflags: flags for the linker.
        extra_include_paths: folders for `#include`.
        build_directory: a folder to put a copy of the library into, as `<name>.so`. What is loaded is
            the one in the cache, since a path that is loaded already would give its old content again.
        is_python_module: False for a library that registers ops: it is loaded with
            `torch.ops.load_library`, and its path is returned as a string.
        with_cuda: link CUDA's libraries; by default where a source is a `.cu` file.
        verbose: show on stderr what is run.
        tier: `light` for sources without a header of torch, `stable` for torch's stable ABI, `aten` for any
            other; by default what the sources include tells.

    Returns:
        The module, or the library's path where `is_python_module` is False.

    Raises:
        BuildError: it does not compile or does not load.
    """
    job = Job.of(
        name,
        sources,
        extra_cflags,
        extra_cuda_cflags,
        extra_ldflags,
        extra_include_paths,
        with_cuda,
        verbose,
        is_module=is_python_module,
    )
    library = _library(job, tier)
    _copy_into(build_directory, library, job.label)
    return _open(job, library, is_python_module)


def load_inline(
    name: str,
    cpp_sources: str | Sequence[str],
    *,
    cuda_sources: str | Sequence[str] | None = None,
    functions: str | Sequence[str] | Mapping[str, str] | None = None,
    extra_cflags: Sequence[str] | None = None,
    extra_cuda_cflags: Sequence[str] | None = None,
    extra_ldflags: Sequence[str] | None = None,
    extra_include_paths: Sequence[str | os.PathLike[str]] | None = None,
    is_python_module: bool = True,
    build_directory: str | os.PathLike[str] | None = None,
    with_cuda: bool | None = None,
    verbose: bool = False,
    with_pytorch_error_handling: bool = True,
    no_implicit_headers: bool = False,
) -> Any:
    """Build and load an extension whose sources are strings.

    >>> source = "at::Tensor twice(at::Tensor x) { return x * 2; }"
    >>> load_inline("doubling", source, functions=["twice"]).twice(x)  # doctest: +SKIP

    Args:
        name: the name of the module.
        cpp_sources: C++ text, or several that are compiled as one.
        cuda_sources: CUDA text, or several that are compiled as one.
        functions: what to export to Python: names, or a dict from names to docstrings.
        extra_cflags: see `load`.
        extra_cuda_cflags: see `load`.
        extra_ldflags: see `load`.
        extra_include_paths: see `load`.
        build_directory: see `load`.
        is_python_module: see `load`.
        with_cuda: see `load`.
        verbose: see `load`.
        with_pytorch_error_handling: turn torch's C++ exceptions into torch's Python ones.
        no_implicit_headers: do not include torch/extension.h (and torch/types.h, cuda.h and
            cuda_runtime.h in CUDA texts), for sources that include less and so build faster.

    Returns:
        The module, or the library's path where `is_python_module` is False.

    Raises:
        BuildError: it does not compile or does not load.
    """
    doing = f"building {name}"
    cpp = _arguments.texts(doing, "cpp_sources", cpp_sources)
    cuda = _arguments.texts(doing, "cuda_sources", cuda_sources)
    exported = _documented(doing, functions)
    texts = {f"{name}_{i}.cpp": text for i, text in enumerate(cpp)}
    texts |= {f"{name}_{i}.cuh": text for i, text in enumerate(cuda)}
    # The user's texts stay in files of their own, so that line numbers in errors are theirs.
    files = [f"{name}_{i}.cpp" for i in range(len(cpp))]
    direct = None
    if exported is not None and with_pytorch_error_handling and not no_implicit_headers:
        direct = _bindings.without_pybind(exported, dict(zip(files, cpp, strict=True)), cuda)
    headers = [] if no_implicit_headers else ["torch/extension.h"]
    texts["main.cpp"] = _bindings.including(headers, files)
    texts["main.cpp"] += _bindings.with_pybind(exported, wrapped=with_pytorch_error_handling)
    units = ["main.cpp"]
    if cuda:
        headers = [] if no_implicit_headers else ["torch/types.h", "cuda.h", "cuda_runtime.h"]
        texts["main.cu"] = _bindings.including(headers, [f"{name}_{i}.cuh" for i in range(len(cuda))])
        units.append("main.cu")
    job = Job.of(
        name,
        [],
        extra_cflags,
        extra_cuda_cflags,
        extra_ldflags,
        extra_include_paths,
        with_cuda,
        verbose,
        is_module=is_python_module,
        texts=texts,
        units=units,
    )
    job = dataclasses.replace(job, direct=direct)
    try:
        library = job.library()
    except BuildError as err:
        wrong = {d.line for d in err.diagnostics if d.file == _bindings.EXPORTS}
        names = [repr(name) for line, name in enumerate(exported or (), 1) if line in wrong]
        if not names:
            raise
        raise BuildError(
            f"{err}\nfunctions= names {', '.join(names)}; expected functions that cpp_sources declare or define, "
            "those of cuda_sources too. Correct the name, or declare the function in cpp_sources.",
            diagnostics=err.diagnostics,
            log_path=err.log_path,
            command=err.command,
        ) from None
    _copy_into(build_directory, library, job.label)
    return _open(job, library, is_python_module)


def build(
    name: str,
    sources: Sources,
    *,
    extra_cflags: Sequence[str] | None = None,
    extra_cuda_cflags: Sequence[str] | None = None,
    extra_ldflags: Sequence[str] | None = None,
    extra_include_paths: Sequence[str | os.PathLike[str]] | None = None,
    with_cuda: bool | None = None,
    verbose: bool = False,
    tier: str | None = None,
) -> Path:
    """Build an extension if its content is new, load nothing, and return the library's path.

    >>> path = build("doc_one", 'extern "C" int one() { return 1; }\\n')
    >>> path.name
    'doc_one.so'

    Args:
        name: the name of the library, and of the module if it is one.
        sources: as in `load`, like the other arguments.
        extra_cflags: see `load`.
        extra_cuda_cflags: see `load`.
        extra_ldflags: see `load`.
        extra_include_paths: see `load`.
        with_cuda: see `load`.
        verbose: see `load`.
        tier: see `load`.

    Raises:
        BuildError: it does not compile.
    """
    job = Job.of(
        name,
        sources,
        extra_cflags,
        extra_cuda_cflags,
        extra_ldflags,
        extra_include_paths,
        with_cuda,
        verbose,
        is_module=False,
    )
    return _library(job, tier)


def loaded() -> list[ModuleType]:
    """Return the modules that were loaded in this process."""
    return list(_modules.values())


def _library(job: Job, tier: str | None) -> Path:
    """Return the built library, by the driver of its tier."""
    tiers.check(f"building {job.name}", tier)
    if tier is None:
        scan = job.scan()
        tier = tiers.ATEN if scan.is_computed else tiers.infer(scan.spellings)
    units = []
    for index, path in enumerate(job.files):
        if used := toolchain.for_suffix(path.suffix):
            units.append(Unit.of_file(path, index, used))
    for name in job.units:
        if used := toolchain.for_suffix(Path(name).suffix):
            units.append(Unit(name, job.texts[name], used))
    if tier == tiers.ATEN or len(units) != len(job.files) + len(job.units):
        return job.library()
    return compile.Job(
        label=job.label,
        units=tuple(units),
        tier=tier,
        include_paths=job.include_paths,
        cflags=job.cflags,
        cuda_cflags=job.cuda_cflags,
        ldflags=job.ldflags,
        module=job.name,
        verbose=job.verbose,
    ).library()


def _copy_into(folder: str | os.PathLike[str] | None, library: Path, label: str) -> None:
    """Put a copy of `library` into `folder`, in one step for whoever reads it meanwhile."""
    if folder is None:
        return
    target = Path(folder) / library.name
    unfinished = target.with_name(f".{library.name}.{uuid.uuid4().hex}")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        try:
            shutil.copyfile(library, unfinished)
            os.replace(unfinished, target)
        finally:
            unfinished.unlink(missing_ok=True)
    except OSError as error:
        raise BuildError(
            f"building {label}: its library cannot be put into build_directory {str(folder)!r} "
            f"({error.strerror or error}); expected a folder that this user may write. Name another one."
        ) from error


def _open(job: Job, path: Path, is_python_module: bool) -> Any:
    """Load the library at `path` into this process, each content once."""
    texts = [*job.texts.values(), *(file.read_text(errors="replace") for file in job.files)]
    found = {block for text in texts for block in _LIBRARY_BLOCK.findall(text)}
    namespaces = {job.name if block == "TORCH_EXTENSION_NAME" else block for block in found}
    for namespace in sorted(namespaces):
        if _blocks.get(namespace, path) != path:  # torch would end the process
            raise BuildError(
                f"loading {job.label}: its TORCH_LIBRARY({namespace}, ...) block is already loaded in this "
                f"process from {_blocks[namespace]}, with other content; torch takes one a namespace. "
                "Restart the process, rename the namespace, or write TORCH_LIBRARY_FRAGMENT for more ops."
            )
    try:
        result = _import(job.name, path) if is_python_module else _load_library(path)
    except (ImportError, OSError) as error:
        if "module export function" not in str(error):
            raise diagnostics.unloadable(error, label=job.label) from error
        raise BuildError(
            f"loading {job.label}: {error}. Write PYBIND11_MODULE(TORCH_EXTENSION_NAME, m) for a module, or pass "
            "is_python_module=False for a library that only registers ops."
        ) from error
    _blocks.update(dict.fromkeys(namespaces, path))
    return result


def _import(name: str, path: Path) -> ModuleType:
    import torch  # noqa: F401  (the library finds torch's symbols in this process)

    if path not in _modules:
        # pybind11 3 keeps modules by the name in their spec (pybind11.h, cached_create_module): a second
        # content under one name would silently be the first one. What stands before the dot tells them apart.
        spec = importlib.util.spec_from_file_location(
            f"{path.parent.parent.name}-{path.parent.name}.{name}", path
        )
        if spec is None or spec.loader is None:
            raise ImportError(f"{path} is no extension module of this Python")
        module = importlib.util.module_from_spec(spec)
        module.__name__ = name  # before it runs: its classes take their __module__ from here
        spec.loader.exec_module(module)
        _modules[path] = module
    return _modules[path]


def _load_library(path: Path) -> str:
    import torch

    torch.ops.load_library(str(path))
    return str(path)


def _documented(
    doing: str, functions: str | Sequence[str] | Mapping[str, str] | None
) -> Mapping[str, str] | None:
    """Return `functions` as names with their docstrings."""
    if functions is None or isinstance(functions, Mapping):
        return functions
    return {name: name for name in _arguments.texts(doing, "functions", functions)}

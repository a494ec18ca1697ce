"""Packages that ship their kernels compiled: what `setup.py` needs, in one call.

    from setuptools import setup
    from opkit.cpp.setuptools import kernels

    setup(**kernels(["my_package"]))

Building a wheel then compiles the native kernels of every op that the named modules define, and puts
the libraries beside their sources, which the wheel has too. At run time a library is found where the
source is still the one that it was built from, see `opkit.cpp.prebuilt`; else the kernel is compiled.
So an editable install needs nothing built, and the modules are the same in all cases.

The wheel fits every Python 3 and every torch from 2.11, unless it has an `Extension` too. Building it
needs torch, which is no build requirement, as an isolated build would download it: users build with
`pip install --no-build-isolation` or `python -m build --no-isolation`.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import dataclasses
import importlib
import logging
import os
import shutil
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import setuptools  # type: ignore[import-untyped]
from setuptools.command.build_ext import build_ext  # type: ignore[import-untyped]

from opkit.cpp import _arguments, _audit, _jobs, cache, compilers, prebuilt, toolchain
from opkit.cpp.compile import Job
from opkit.errors import BuildError, did_you_mean

try:
    from setuptools.command.bdist_wheel import bdist_wheel  # type: ignore[import-untyped]
except ImportError:
    raise BuildError(
        f"building a package with kernels: setuptools is {setuptools.__version__}; expected 70.1 or newer, which "
        "builds wheels by itself. Write requires = ['setuptools>=70.1'] under [build-system] in pyproject.toml."
    ) from None

if TYPE_CHECKING:
    from opkit.cpp.light import Source
    from opkit.spec.plan import Plan
    from opkit.spec.schema import Schema

_NATIVE = (".cpp", ".cc", ".cxx", ".c", ".cu", ".cuh", ".h", ".hpp", ".hh", ".inl", ".inc")
_RPATH = "-Wl,-rpath,$ORIGIN"


@dataclasses.dataclass(frozen=True)
class _Mode:
    """Flags that come after the others, and so win over them."""

    cflags: tuple[str, ...] = ()
    cuda_cflags: tuple[str, ...] = ()


_MODES = {
    "release": _Mode(),
    "debug": _Mode(("-O0", "-g", "-UNDEBUG"), ("-G", "-UNDEBUG")),
    "release-with-debug-info": _Mode(("-O3", "-g"), ("-lineinfo",)),
}
# torch's own names, from its setup.py.
_MODE_VARIABLES = {"DEBUG": "debug", "REL_WITH_DEB_INFO": "release-with-debug-info"}


class Extension(setuptools.Extension):  # type: ignore[misc]
    """Name an extension with torch's full headers, for one version of torch and of Python.

    torch's own `BuildExtension` builds it. A package with one gets a wheel for the Python that builds it.

    Args:
        name: the module's full name: `my_package._C`.
        sources: the source files, relative to `setup.py`; one that ends in `.cu` makes it a CUDA extension.
        extra_cflags: more flags for the C++ compiler.
        extra_cuda_cflags: more flags for nvcc.
        extra_ldflags: more flags for the linker.
        extra_include_paths: folders for `#include`.

    Raises:
        BuildError: an argument is of the wrong kind.

    Example:
        >>> Extension("my_package._C", ["my_package/module.cpp"], extra_cflags=["-O3"]).name
        'my_package._C'
    """

    def __init__(
        self,
        name: str,
        sources: Sequence[str | os.PathLike[str]],
        *,
        extra_cflags: Sequence[str] = (),
        extra_cuda_cflags: Sequence[str] = (),
        extra_ldflags: Sequence[str] = (),
        extra_include_paths: Sequence[str | os.PathLike[str]] = (),
    ) -> None:
        doing = f"naming the extension {name}"
        super().__init__(name, [os.fspath(path) for path in sources])
        self.cflags = _arguments.flags(doing, "extra_cflags", extra_cflags)
        self.cuda_cflags = _arguments.flags(doing, "extra_cuda_cflags", extra_cuda_cflags)
        self.ldflags = _arguments.flags(doing, "extra_ldflags", extra_ldflags)
        self.folders = [
            os.fspath(path) for path in _arguments.folders(doing, "extra_include_paths", extra_include_paths)
        ]

    def prepare(self, mode: _Mode) -> None:
        """Become what torch's BuildExtension takes."""
        from torch.utils import cpp_extension

        is_cuda = any(source.endswith(".cu") for source in self.sources)
        make = cpp_extension.CUDAExtension if is_cuda else cpp_extension.CppExtension
        flags = {"cxx": ["-O3", *self.cflags, *mode.cflags]}
        if is_cuda:
            flags["nvcc"] = ["-O3", *self.cuda_cflags, *mode.cuda_cflags]
        made = make(
            self.name,
            self.sources,
            include_dirs=self.folders,
            extra_compile_args=flags,
            extra_link_args=[*self.ldflags, _RPATH],
        )
        self.__dict__.update(vars(made))  # in place: setuptools has put notes of its own on this one


class _Kernels(setuptools.Extension):  # type: ignore[misc]
    """Stands in `ext_modules` for the kernels, so that setuptools makes a wheel for this platform."""

    def __init__(self, modules: Sequence[str]) -> None:
        super().__init__(f"{modules[0].partition('.')[0]}.{prebuilt.FOLDER}", [])


def kernels(
    modules: Sequence[str],
    *,
    extensions: Sequence[Extension] = (),
    cuda: bool | None = None,
    mode: str = "release",
) -> dict[str, Any]:
    """Return the arguments of `setup` that make a package ship its kernels compiled.

    Compiled are the kernels in files of their own, of the light and the stable tier. Left to the machine that
    runs them are others, and those that ask for its processor (`-march=native`). Every library is audited:
    one that another torch or Python could not load ends the build. The wheel has the native sources and
    headers of its packages; headers from elsewhere are to be there at run time too, as they are in the key.

    GPU architectures are those of TORCH_CUDA_ARCH_LIST, by default 8.0 and 9.0+PTX. The mode is that of
    `build_ext --debug`, of torch's own variables DEBUG=1 and REL_WITH_DEB_INFO=1, or `mode`.

    Args:
        modules: modules whose import defines the ops and registers the kernels; `my_plugin:register` is a
            plugin's function, for which the modules that define its ops are named too.
        extensions: extensions with torch's full headers.
        cuda: whether CUDA kernels are compiled; by default where nvcc is found. True demands it.
        mode: `release`, `debug` (-O0 -g) or `release-with-debug-info` (-O3 -g).

    Returns:
        `ext_modules` and `cmdclass`, for `setup(**kernels([...]))`.

    Raises:
        BuildError: an argument is of the wrong kind.

    Example:
        >>> sorted(kernels(["my_package"]))
        ['cmdclass', 'ext_modules']
    """
    doing = "preparing a package with kernels"
    names = tuple(_arguments.texts(doing, "modules", modules))
    if not names:
        raise BuildError(f"{doing}: modules is empty; expected those that define its ops. Name one.")
    if mode not in _MODES:
        raise BuildError(
            f"{doing}: found mode={mode!r}; expected one of {', '.join(_MODES)}.{did_you_mean(mode, _MODES)} "
            "Write one of these."
        )
    base = _torch_build_ext() if extensions else build_ext
    settings = {"modules": names, "cuda": cuda, "mode": mode}
    return {
        "ext_modules": [_Kernels(names), *extensions],
        "cmdclass": {
            "build_ext": type("build_ext", (_BuildKernels, base), settings),
            "bdist_wheel": _BuildWheel,
        },
    }


def _torch_build_ext() -> Any:
    try:
        from torch.utils.cpp_extension import BuildExtension
    except ImportError:  # metadata and source distributions are made without torch
        return build_ext
    return BuildExtension


class _BuildWheel(bdist_wheel):  # type: ignore[misc]
    def get_tag(self) -> tuple[str, str, str]:
        python, abi, platform = super().get_tag()
        if all(isinstance(extension, _Kernels) for extension in self.distribution.ext_modules or ()):
            return "py3", "none", platform
        return python, abi, platform


class _BuildKernels(build_ext):  # type: ignore[misc]
    """`build_ext` with the kernels; torch's own where there are extensions of torch."""

    modules: tuple[str, ...] = ()
    cuda: bool | None = None
    mode = "release"
    extensions: list[setuptools.Extension]

    def finalize_options(self) -> None:
        super().finalize_options()
        mode = next((mode for name, mode in _MODE_VARIABLES.items() if _is_set(name)), self.mode)
        self.flags = _MODES["debug" if self.debug else mode]
        self.extensions = [e for e in self.extensions if not isinstance(e, _Kernels)]

    def get_source_files(self) -> list[str]:
        """Return what a source distribution has to have."""
        return [*super().get_source_files(), *(str(file) for file, _ in self._native_files())]

    def run(self) -> None:
        _require_torch(self.distribution.get_name())
        for extension in self.extensions:
            if isinstance(extension, Extension):
                extension.prepare(self.flags)
        super().run()
        if self.inplace:  # an editable install: kernels are compiled when they are first needed
            return
        folder = Path(self.build_lib).resolve()
        for file, inside in self._native_files():
            (folder / inside).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(file, folder / inside)
        for old in folder.rglob(prebuilt.FOLDER):
            shutil.rmtree(old)
        with _architectures(), _importing_from(folder):
            found = [(kernel, job) for kernel in _kernels(self.modules, folder) if (job := self._job(kernel))]
            with concurrent.futures.ThreadPoolExecutor(_jobs.limit(_jobs.CXX_MEMORY)) as pool:
                running = [pool.submit(self._compile, job) for _, job in found]
                try:
                    for (kernel, job), future in zip(found, running, strict=True):
                        self._ship(kernel, job, future.result())
                finally:
                    for future in running:
                        future.cancel()

    def _job(self, kernel: _Kernel) -> Job | None:
        """Return what is to be compiled, or None for what is left out."""
        reason = self._left_out(kernel.source)
        job = None if reason else kernel.source.job(kernel.schema, kernel.plan, kernel.backend)
        if isinstance(job, Job) and not job.is_open:
            return job
        if isinstance(job, Job):
            reason = "it includes a file by a macro, which only a compiler finds"
        reason = reason or "it is of the aten tier, and so for one torch alone"
        self._say(f"{kernel.label} is left to the machine that runs it: {reason}")
        return None

    def _compile(self, job: Job) -> Path:
        return dataclasses.replace(
            job,
            cflags=(*job.cflags, *self.flags.cflags),
            cuda_cflags=(*job.cuda_cflags, *self.flags.cuda_cflags),
            ldflags=(*job.ldflags, _RPATH),
        ).library()

    def _ship(self, kernel: _Kernel, job: Job, library: Path) -> None:
        needs = _audit.audit(library, label=kernel.label)
        # The key is that of the kernel as it is registered; how it is compiled here is not in it.
        name = f"{cache.slug(job.label)}-{job.source_key()}"
        assert job.carried is not None
        made = prebuilt.save(library, job.carried, name, architectures=job.architectures, audit=needs)
        for_what = f" for {', '.join(job.architectures)}" if job.architectures else ""
        self._say(f"{kernel.label}{for_what}: {made.stat().st_size >> 10} KiB, needs {needs}")

    def _left_out(self, source: Source) -> str:
        """Return why a kernel is not compiled here, or nothing."""
        if source.path is None:
            return "its source is a text, not a file"
        flags = (*source.extra_cflags, *source.extra_cuda_cflags)
        if any("arch=native" in flag or "mcpu=native" in flag for flag in flags):
            return "its flags ask for the processor that compiles it; name one that all users have"
        if source.toolchain is toolchain.CUDA and self.cuda is not None:
            if self.cuda:
                compilers.get_nvcc()  # NVRTC's libraries need the CUDA runtime of one major version
            return "" if self.cuda else "cuda=False"
        return "" if source.toolchain.find() else source.toolchain.why_none()

    def _native_files(self) -> Iterator[tuple[Path, Path]]:
        """Give the native sources and headers of the packages, each with its place in the wheel."""
        build_py = self.get_finalized_command("build_py")
        for package in self.distribution.packages or ():
            root = Path(build_py.get_package_dir(package))
            for file in sorted(root.rglob("*")):
                if file.suffix in _NATIVE and prebuilt.FOLDER not in file.parts:
                    yield file, Path(*package.split("."), file.relative_to(root))

    def _say(self, text: str) -> None:
        self.announce(f"opkit: {text}", level=logging.INFO)


@dataclasses.dataclass(frozen=True)
class _Kernel:
    """A kernel with native source, and the op that it is for."""

    schema: Schema
    plan: Plan | None
    backend: str
    source: Source

    @property
    def label(self) -> str:
        """What it is called in texts."""
        return f"{self.schema.name} [{self.backend}]"


def _kernels(modules: Sequence[str], folder: Path) -> Iterator[_Kernel]:
    """Give every native kernel whose source is in `folder`, once `modules` are imported."""
    import opkit  # the public door: which ops there are is known above this room
    from opkit.cpp.light import Source

    for entry in modules:
        name, _, function = entry.partition(":")
        module = importlib.import_module(name)
        place = Path(module.__file__ or "").resolve()
        if folder not in place.parents:
            raise BuildError(
                f"building the kernels of {name}: it is imported from {place}, not from the package that is being "
                f"built; expected it in {folder}. Name modules of the package, and import none of them in setup.py."
            )
        if function:
            registry = opkit.plugins.Registry(entry)
            getattr(module, function)(registry)
            for registration in registry.registrations:
                registration.apply(opkit.get(registration.op), entry)
    for op in filter(None, map(opkit.find, opkit.list_ops())):
        for kernel in op.native_kernels():
            source = kernel.function
            if isinstance(source, Source) and f"{folder}{os.sep}" in source.where:
                yield _Kernel(op.schema, op._runner.native_plan, kernel.backend, source)


@contextlib.contextmanager
def _importing_from(folder: Path) -> Iterator[None]:
    """Import from `folder` first, and leave no bytecode in what becomes the wheel."""
    before, sys.dont_write_bytecode = sys.dont_write_bytecode, True
    sys.path.insert(0, str(folder))
    importlib.invalidate_caches()
    try:
        yield
    finally:
        sys.path.remove(str(folder))
        sys.dont_write_bytecode = before


@contextlib.contextmanager
def _architectures() -> Iterator[None]:
    """Compile for all users' GPUs, not for those of the machine that builds."""
    if os.environ.get("TORCH_CUDA_ARCH_LIST", "").strip():
        yield
        return
    os.environ["TORCH_CUDA_ARCH_LIST"] = ";".join(compilers._DEFAULT_ARCHITECTURES)
    try:
        yield
    finally:
        del os.environ["TORCH_CUDA_ARCH_LIST"]


def _is_set(name: str) -> bool:
    return os.environ.get(name, "").strip().lower() in ("1", "true", "yes", "on", "y")


def _require_torch(package: str) -> None:
    try:
        import torch  # noqa: F401
    except ImportError as error:
        raise BuildError(
            f"building {package}: torch does not import here ({error}); expected it, as the kernels are compiled from "
            "the ops that the package defines. Install torch and build in its environment: pip install "
            "--no-build-isolation . or python -m build --no-isolation."
        ) from error

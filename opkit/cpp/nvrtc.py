"""CUDA source without nvcc: the C++ compiler for what runs on the host, NVRTC for the rest.

`_cuda_split` makes two programs of one source. The host's comes first, for it tells which instantiations of kernels
are launched; NVRTC compiles these for every architecture; the images and their names become part of the object file,
where `opkit/launch.h` finds them. No device is needed, and nothing is written outside of the folder of the source.
"""

from __future__ import annotations

import dataclasses
import re
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from opkit.cpp import _cuda_split, _nvrtc, compilers, diagnostics, toolchain
from opkit.cpp._nvrtc import Nvrtc
from opkit.cpp.compilers import Compiler
from opkit.cpp.toolchain import Options, Toolchain
from opkit.errors import BuildError

_HEADERS = (
    Path(__file__).parent / "include" / "opkit" / "nvrtc"
)  # in place of some of CUDA's and the system's
_MACRO_FLAGS = ("-D", "-U", "-I", "-isystem", "-iquote", "-include")
_HOST_FLAGS = ("-Xcompiler", "--compiler-options")
_NVCC_FLAGS = ("-O", "-expt-", "--expt-", "-ccbin", "--compiler-bindir", "-Xcudafe")  # of no use to NVRTC
_WITH_VALUE = (
    *_HOST_FLAGS,
    *_MACRO_FLAGS,
    "-ccbin",
    "--compiler-bindir",
    "-Xcudafe",
    "-Xptxas",
    "--ptxas-options",
)
_VARIABLE = re.compile(rf"\b_ZZ\w+E{len(_cuda_split.KERNEL)}{_cuda_split.KERNEL}\b")
# Where the preprocessor enters a file; #line gives no such.
_ENTERED = re.compile(r'^# 1 "(/(?:[^"\\]|\\.)*)" 1(?!\S)', re.MULTILINE)


def compile_unit(
    source: Path,
    output: Path,
    *,
    options: Options,
    label: str,
    op: str | None,
    execute: Callable[[list[str]], subprocess.CompletedProcess[str]],
) -> subprocess.CompletedProcess[str]:
    """Compile a file of CUDA source to an object file in the same folder.

    Returned is the command that failed, which repeats what NVRTC did where that is it, or else the last one.

    The files that it includes are written to a depfile beside the object, as the compilers do.

    Args:
        source: what is compiled; what is left of a failed build lies beside it.
        output: the object file.
        options: flags and folders, as for a toolchain's command.
        label: what is built, for texts: `demo::rms_norm [cuda]`.
        op: the op's qualified name, for the error.
        execute: runs a command in the folder of the source.

    Raises:
        BuildError: NVRTC does not know the architecture, or the source launches a kernel that has no name.
    """
    nvrtc = _nvrtc.find()
    assert nvrtc is not None  # `options.compiler` stands for it
    job = _Job(label, op, source, nvrtc, options, _Flags.of(options), execute)
    numbers = list(dict.fromkeys(architecture.split("+")[0] for architecture in options.architectures))
    known = _nvrtc.supported(nvrtc)
    for number in numbers:
        if number.rstrip("af") not in known:
            raise BuildError(
                f"building {label}: {nvrtc.version.split(',')[0]} does not compile for the architecture {number}; "
                f"it does for {', '.join(known)}. Set TORCH_CUDA_ARCH_LIST to some of these, or install the NVRTC of "
                "another CUDA.",
                op=op,
            )
    try:
        assembly, kernels = job.host_program()
        programs = [job.device_program(number) for number in numbers]
        names = [kernel.name for kernel in kernels]
        with ThreadPoolExecutor(len(numbers) or 1) as pool:
            images = list(pool.map(lambda n, p: job.compile_device(n, p, names), numbers, programs))
    except _FailedError as failed:
        return failed.command
    table = _Table(kernels)
    for number, (symbols, cubin, ptx) in zip(numbers, images, strict=True):
        ptx = ptx if f"{number}+PTX" in options.architectures else b""
        table.add(job.beside(f"{number}.cubin"), number, symbols, cubin)
        table.add(job.beside(f"{number}.ptx"), number, symbols, ptx)
    host = job.beside("host.s")
    host.write_text(assembly + table.assembly())
    done = execute([*options.cxx.command, "-c", host.name, "-o", output.name])
    if done.returncode:
        return done
    for file in source.parent.iterdir():
        if file.name.startswith(f"{source.name}.") and file not in (output, job.beside("d")):
            file.unlink()
    return done


class _FailedError(Exception):
    """A command that failed."""

    def __init__(self, command: subprocess.CompletedProcess[str]) -> None:
        self.command = command


class _Flags:
    """Flags for nvcc, by whom nvcc would pass them to."""

    def __init__(self) -> None:
        self.macros: list[str] = []  # for the preprocessor, on both sides
        self.host: list[str] = []
        self.device: list[str] = []

    @classmethod
    def of(cls, options: Options) -> _Flags:
        flags = cls()
        for flag in _joined(options.own_flags):
            if flag.startswith((*_MACRO_FLAGS, "-std=", "--std=")):
                flags.macros.append(re.sub("^--std", "-std", flag))
            elif flag.startswith(_HOST_FLAGS):
                words = re.split(r"(?<!\\),", flag.split("=", 1)[1])
                flags.host += [word.replace("\\,", ",") for word in words]
            elif not flag.startswith(_NVCC_FLAGS):
                flags.device.append(flag)
        return flags


def _joined(flags: Sequence[str]) -> Iterator[str]:
    """Yield every flag with its value in one word: `-D X` as `-DX`, `-Xptxas -O1` as `-Xptxas=-O1`."""
    rest = iter(flags)
    for flag in rest:
        if flag in _WITH_VALUE:
            yield f"{flag}{'=' if flag.startswith(('-X', '--')) else ''}{next(rest, '')}"
        else:
            yield flag


class _Kernel:
    """An instantiation of a kernel that the host's program launches, by its variable there."""

    def __init__(self, variable: str, assembly: str) -> None:
        text = diagnostics.demangled(variable).removesuffix(f"::{_cuda_split.KERNEL}")
        self.variable = variable
        self.name = _without_parameters(text.replace("(anonymous namespace)::", ""))
        mangled = "_Z" + variable[3:].removesuffix(f"E{len(_cuda_split.KERNEL)}{_cuda_split.KERNEL}")
        self.function = mangled if f"\n{mangled}:" in assembly else self.name  # else it is extern "C"


@dataclasses.dataclass(frozen=True)
class _Job:
    label: str
    op: str | None
    source: Path
    nvrtc: Nvrtc
    options: Options
    flags: _Flags
    execute: Callable[[list[str]], subprocess.CompletedProcess[str]]

    def run(self, command: list[str]) -> None:
        done = self.execute(command)
        if done.returncode:
            raise _FailedError(done)

    def beside(self, suffix: str) -> Path:
        return self.source.with_name(f"{self.source.name}.{suffix}")

    def command(self, *flags: str) -> list[str]:
        """Return the C++ compiler's command with the folders of all headers."""
        given = [*_joined(self.options.cflags), *self.flags.macros]
        # The files of a system folder would pass for the system's own.
        own = [re.sub("^-isystem", "-I", flag) for flag in given]
        return list(
            toolchain.CPP.command(
                dataclasses.replace(
                    self.options,
                    compiler=self.options.cxx,
                    include_paths=(_HEADERS, *self.options.include_paths, *self.nvrtc.include),
                    cflags=("-include", "opkit/nvrtc.h", *own),
                    own_flags=(*flags, "-DUSE_CUDA"),
                )
            )
        )

    def preprocess(self, flags: Sequence[str], output: Path) -> str:
        """Return the unit after the preprocessor."""
        self.run([*self.command(*flags), "-E", "-x", "c++", self.source.name, "-o", output.name])
        return output.read_text(errors="surrogateescape")

    def host_program(self) -> tuple[str, list[_Kernel]]:
        """Return the assembly of the host's program, and the kernels that it launches."""
        with self.source.open("a") as stream:
            stream.write("\n#if !defined(__CUDACC_RTC__)\n#include <opkit/launch.h>\n#endif\n")
        program, assembly = self.beside("host.ii"), self.beside("host.s")
        text = self.preprocess(self.flags.host, program)
        self._depend_on(text)
        program.write_text(_cuda_split.host(text, self.nvrtc.include), errors="surrogateescape")
        flags = [*self.flags.host, "-fno-lto", "-S"]
        self.run([*self.command(*flags), program.name, "-o", assembly.name])
        compiled = assembly.read_text()
        kernels = [_Kernel(found, compiled) for found in dict.fromkeys(_VARIABLE.findall(compiled))]
        for kernel in kernels:
            if "{lambda" in kernel.name or ")::" in kernel.name:
                raise BuildError(
                    f"building {self.label}: the kernel {kernel.name} has a template argument that is a lambda or "
                    "a type inside a function; expected types that NVRTC can name, for there is no nvcc here. "
                    "Write it as a struct outside of functions, or install nvcc.",
                    op=self.op,
                )
        return compiled, kernels

    def _depend_on(self, text: str) -> None:
        files = [re.sub(r"\\(.)", r"\1", file) for file in dict.fromkeys(_ENTERED.findall(text))]
        escaped = [
            re.sub(r"([ #\\])", r"\\\1", file).replace("$", "$$") for file in files if Path(file).is_file()
        ]
        self.beside("d").write_text(f"{self.source.name}: {' '.join(escaped)}\n", errors="surrogateescape")

    def device_program(self, number: str) -> str:
        """Return the program for NVRTC, for one architecture such as 9.0a."""
        digits = re.sub(r"\D", "", number)
        macros = [
            "-D__CUDACC_RTC__",
            "-D__CUDACC__",
            f"-D__CUDACC_VER_MAJOR__={self.nvrtc.major}",
            f"-D__CUDACC_VER_MINOR__={self.nvrtc.minor}",
            f"-D__CUDA_ARCH__={digits}0",
            *(
                [f"-D__CUDA_ARCH_FEAT_SM{digits}_ALL", f"-D__CUDA_ARCH_SPECIFIC__={digits}0"]
                * number.endswith("a")
            ),
            *([f"-D__CUDA_ARCH_FAMILY_SPECIFIC__={digits}0"] * number.endswith(("a", "f"))),
        ]
        text = self.preprocess(macros, self.beside(f"{number}.ii"))
        return _cuda_split.device(text, self.nvrtc.include)

    def compile_device(
        self, number: str, program: str, names: Sequence[str]
    ) -> tuple[list[str], bytes, bytes]:
        """Return the kernels' symbols, the cubin and the PTX for one architecture."""
        source = self.beside(f"{number}.cu")
        content = program.encode(errors="surrogateescape")
        source.write_bytes(content)
        standard = [flag for flag in self.command() if flag.startswith("-std=")][-1]
        options = [
            f"-arch=sm_{number.replace('.', '')}",
            standard.replace("gnu++", "c++"),
            "-default-device",
            "--device-int128",
            *self.flags.device,
        ]
        try:
            return _nvrtc.compile(self.nvrtc.library, content, options, names)
        except _nvrtc.RejectedError as rejected:
            command = [sys.executable, "-m", _nvrtc.__name__, str(self.nvrtc.library), source.name]
            command += [*options, "--", *names]
            raise _FailedError(subprocess.CompletedProcess(command, 1, f"{rejected}\n")) from None


class _Table:
    """The images and the kernels' names as assembly, in the form that `opkit/launch.h` reads."""

    def __init__(self, kernels: Sequence[_Kernel]) -> None:
        self.kernels = kernels
        self.symbols: Sequence[str] = ()
        self.images: list[tuple[str, str, bool]] = []  # file, architecture, is PTX

    def add(self, file: Path, number: str, symbols: Sequence[str], content: bytes) -> None:
        self.symbols = symbols  # the same for every architecture
        if content:
            file.write_bytes(content)
            self.images.append((file.name, number, file.suffix == ".ptx"))

    def assembly(self) -> str:
        lines = ['.section .rodata.opkit_images,"a"']
        for index, (file, _, _) in enumerate(self.images):
            lines += [".balign 64", f'.Lopkit_image_{index}: .incbin "{file}"', ".byte 0"]
        lines.append('.section .rodata.opkit_kernels,"a"')
        for index, (kernel, symbol) in enumerate(zip(self.kernels, self.symbols, strict=True)):
            lines += [
                f'.Lopkit_symbol_{index}: .asciz "{symbol}"',
                f'.Lopkit_name_{index}: .asciz "{kernel.name}"',
            ]
        lines += ['.section .data.rel.ro.opkit_rtc,"aw"', ".balign 8", "opkit_rtc_images:"]
        for index, (_, number, is_ptx) in enumerate(self.images):
            digits = re.sub(r"\D", "", number)
            exact, family = number.endswith("a"), number.endswith("f")
            lines += [f".long {digits}, {is_ptx:d}, {exact:d}, {family:d}", f".quad .Lopkit_image_{index}"]
        lines += [".long 0, 0, 0, 0", ".quad 0", "opkit_rtc_kernels:"]
        for index, kernel in enumerate(self.kernels):
            lines.append(
                f".quad {kernel.variable}, {kernel.function}, .Lopkit_symbol_{index}, .Lopkit_name_{index}"
            )
        return "\n".join([*lines, ".quad 0, 0, 0, 0", ""])


def _without_parameters(function: str) -> str:
    """Return the name of a demangled function with its template arguments.

    >>> _without_parameters("void a::f<int, (b)1>(c::d<int>, void (*)(int))")
    'a::f<int, (b)1>'
    """
    if function.endswith(")"):
        depth = 0
        for index in range(len(function) - 1, -1, -1):
            depth += {")": 1, "(": -1}.get(function[index], 0)
            if depth == 0:
                function = function[:index]
                break
    return function.removeprefix("void ")


def _compiler() -> Compiler | None:
    found = _nvrtc.find()
    return Compiler(found.library, found.version, ()) if found and compilers.find_cxx() else None


def _why_none() -> str:
    return _nvrtc.why_none() or compilers.why_no_cxx()


TOOLCHAIN = Toolchain(
    name=toolchain.CUDA.name,  # what it builds is the same op's kernel, for the same devices
    suffixes=toolchain.CUDA.suffixes,
    find=_compiler,
    why_none=_why_none,
    command=lambda options: ["nvrtc", *options.folders],
    flags=("nvrtc", *toolchain.CPP.flags),
    compile=compile_unit,
    architectures=toolchain.CUDA.architectures,
    libraries=toolchain.CUDA.libraries,  # it brings CUDA's runtime, which is called too
    link_flags=lambda compiler: ["-ldl"],
    guard=toolchain.CUDA.guard,
)
"""CUDA source where there is no nvcc; `compile_unit` does what its command cannot. For light kernels."""

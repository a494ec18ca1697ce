"""The light tier: a plain C++ or CUDA function becomes a kernel of an op.

`kernel(...)` only remembers the source. `Source.bind` writes boxed glue from the schema and the shape
line, compiles both as one unit, and registers the entry point through torch's C shim under a private
name that the content decides, so that an edited kernel never meets the old one.
"""

from __future__ import annotations

import ast
import ctypes
import dataclasses
import functools
import hashlib
import inspect
import re
import sys
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from opkit import _torch
from opkit.cpp import toolchain
from opkit.cpp.compile import shared_library
from opkit.errors import BuildError
from opkit.spec.plan import DtypeRule, Plan, Tensors, first_bindings
from opkit.spec.schema import Param, Schema
from opkit.spec.shapes import Dim

_NAMESPACE = "_opkit_native"
_ABI = 0x020A000000000000  # torch 2.10, the version whose stack layout glue.h reads
_SCALARS = {"SymInt": "int64_t", "float": "double", "bool": "bool", "ScalarType": "DType", "Device": "Device"}


@dataclasses.dataclass(frozen=True)
class Source:
    """Native source that becomes a kernel when an op first needs it. Made by `opkit.cpp.kernel`."""

    path: Path | None
    text: str | None
    symbol: str | None
    cuda: bool
    where: str
    extra_cflags: tuple[str, ...] = ()
    extra_cuda_cflags: tuple[str, ...] = ()
    extra_ldflags: tuple[str, ...] = ()
    extra_include_paths: tuple[Path, ...] = ()

    def __str__(self) -> str:
        return self.where

    @property
    def backend(self) -> str:
        """The backend that such source is registered under when nothing else is said."""
        return "cuda" if self.cuda else "cpp"

    def unavailable(self) -> str | None:
        """Return why it cannot be built on this machine, or None."""
        if not sys.platform.startswith("linux"):
            return f"opkit builds native kernels on Linux, this is {sys.platform}"
        if self.cuda and toolchain.find_nvcc() is None:
            return "nvcc was not found (set CUDA_HOME)"
        if not self.cuda and toolchain.find_cxx() is None:
            return "no C++ compiler was found (install g++ or set CXX)"
        return None

    def build(self, schema: Schema, plan: Plan | None) -> Path:
        """Compile the kernel with its glue for an op, and return the library's path."""
        unit = unit_source(self, schema, plan)
        try:
            return shared_library(
                unit,
                label=f"{schema.name} [{self.backend}]",
                op=schema.name,
                cuda=self.cuda,
                include_paths=self.extra_include_paths,
                extra_cflags=self.extra_cflags,
                extra_cuda_cflags=self.extra_cuda_cflags,
                extra_ldflags=self.extra_ldflags,
            )
        except BuildError as err:
            if any(d.file.startswith("opkit glue") for d in err.diagnostics):
                raise BuildError(
                    f"{err}\nThe kernel must be a function of this form:\n    {signature(self, schema)}",
                    op=schema.name,
                    diagnostics=err.diagnostics,
                    log_path=err.log_path,
                    command=err.command,
                ) from None
            raise

    def bind(
        self, schema: Schema, plan: Plan | None, device: str, meta: Callable[..., Any]
    ) -> Callable[..., Any]:
        """Return the built kernel as a function of all arguments; `meta` gives outputs without a plan."""
        call = _register(self.build(schema, plan), schema, plan, device)
        if plan is not None or not schema.results:
            return call

        def with_meta(*values: Any) -> Any:
            outputs = allocate_like(meta(*values), values)
            call(*values, *outputs)
            return schema.raw(outputs)

        return with_meta


def kernel(
    source: str | Path,
    *,
    symbol: str | None = None,
    extra_cflags: Sequence[str] = (),
    extra_cuda_cflags: Sequence[str] = (),
    extra_ldflags: Sequence[str] = (),
    extra_include_paths: Sequence[str | Path] = (),
    cuda: bool | None = None,
) -> Source:
    """Name native source as a kernel for `Op.register_kernel`; it is compiled on first use.

    The function is called like the op without its namespace, takes the inputs in schema order and
    then the outputs, and includes only `opkit/kernel.h`.

    Args:
        source: a path, relative to the calling file, or the source text itself (with a newline).
        symbol: name of the C++ function, where it is not the op's.
        extra_cflags: more flags for the C++ compiler, after `-O3`.
        extra_cuda_cflags: more flags for nvcc.
        extra_ldflags: more flags for the linker.
        extra_include_paths: folders for `#include`, relative to the calling file.
        cuda: whether nvcc compiles it; by default where the path ends in `.cu`.

    Raises:
        BuildError: the file does not exist.

    Example:
        >>> import opkit, torch
        >>> @opkit.op("doc::twice", shapes="*b -> *b")
        ... def twice(x: torch.Tensor) -> torch.Tensor:
        ...     return 2 * x
        >>> twice.register_kernel("cpu", opkit.cpp.kernel('''
        ... #include <opkit/kernel.h>
        ... void twice(opkit::Tensor x, opkit::Tensor y) {
        ...   OPKIT_CHECK(x.is_contiguous(), "x is not contiguous");
        ...   for (int64_t i = 0; i < x.numel(); ++i) y.data<float>()[i] = 2 * x.data<float>()[i];
        ... }
        ... '''))  # doctest: +ELLIPSIS
        Source(...)
        >>> twice(torch.ones(3))
        tensor([2., 2., 2.])
    """
    frame = sys._getframe(1)
    here = Path(frame.f_globals.get("__file__") or "unnamed").absolute().parent
    folders = tuple((here / folder).resolve() for folder in extra_include_paths)
    flags = (tuple(extra_cflags), tuple(extra_cuda_cflags), tuple(extra_ldflags), folders)
    if isinstance(source, str) and "\n" in source:
        where = f"source at {frame.f_code.co_filename}:{frame.f_lineno}"
        return Source(None, source, symbol, bool(cuda), where, *flags)
    path = here / source
    if not path.is_file():
        raise BuildError(
            f"naming a kernel: there is no file {path}; expected C++ or CUDA source. Paths are relative to the "
            "file that calls opkit.cpp.kernel; source text itself must contain a newline."
        )
    path = path.resolve()
    return Source(path, None, symbol, path.suffix == ".cu" if cuda is None else cuda, str(path), *flags)


def signature(source: Source, schema: Schema) -> str:
    """Return the C++ declaration that a light kernel of an op must have."""
    params = [f"{_parameter_type(p)} {p.name}" for p in schema.params]
    params += [
        f"opkit::{'Span<opkit::Tensor>' if r.type.is_list else 'Tensor'} {r.name}" for r in schema.results
    ]
    return f"void {source.symbol or schema.opname}({', '.join(params)});"


def _parameter_type(param: Param) -> str:
    t = param.type
    if t.base == "Tensor":
        text = "opkit::Tensor"
    elif t.base == "str":
        text = "opkit::StringView"
    else:
        text = _SCALARS[t.base]
        text = text if text[0].islower() else f"opkit::{text}"
    if t.is_list:
        text = f"opkit::Span<{text}>"
    if t.optional and not t.is_tensor:
        text = f"opkit::Optional<{text}>"
    return text


# ---------------------------------------------------------------- the generated unit


def unit_source(source: Source, schema: Schema, plan: Plan | None) -> str:
    """Return the translation unit of a kernel: its source, then the glue."""
    if any(r.type.is_list for r in schema.results):
        raise BuildError(
            f"building {schema.name} [{source.backend}]: the op returns a list of tensors, which a light kernel "
            "cannot allocate. Return a tuple of fixed length, or register a Python kernel.",
            op=schema.name,
        )
    include = f'#include "{source.path}"' if source.path else f'#line 1 "{source.where}"\n{source.text}'
    before, opened, arguments, devices = [], [], [], []
    for index, param in enumerate(schema.params):
        taken, view, argument = _argument(param, f"stack[{index}]")
        before.append(taken)
        opened += [view] if view else []
        arguments.append(argument)
        if param.type.is_tensor:
            devices.append(f"t_{param.name}")
    body = [*before, *opened]
    body += [f"same_device({devices[0]}, {other});" for other in devices[1:]]
    if source.cuda and devices:
        body.append(f"DeviceGuard device_guard({devices[0]});")
    finish: list[str] = []
    if plan is not None:
        made, finish = _outputs(plan)
        body += [*_checks(plan), *made]
        arguments += [f"t_{t.name}" for t in plan.outputs]
    else:
        count = len(schema.params)
        for index, result in enumerate(schema.results):
            body.append(f'TensorArg h_{result.name}(stack[{count + index}], "{result.name}", false, true);')
            arguments.append(f"h_{result.name}.open()")
    body.append(f"::{source.symbol or schema.opname}({', '.join(arguments)});")
    body += finish
    lines = "\n".join(f"    {line}" for line in body)
    return f"""#define OPKIT_OP "{schema.name}"
{include}
#include <opkit/glue.h>
#line 1 "opkit glue of {schema.name}"
extern "C" __attribute__((visibility("default"))) void opkit_call(uint64_t* stack, uint64_t, uint64_t) {{
  using namespace opkit;
  using namespace opkit::glue;
  guarded([&] {{
{lines}
  }});
}}
"""


def _argument(param: Param, slot: str) -> tuple[str, str, str]:
    """Return C++ that takes an argument off the stack, that opens it, and that passes it on."""
    name, t = param.name, param.type
    optional = "true" if t.optional else "false"
    changed = "true" if param.mutated else "false"
    if t.is_list:
        taken = f'ListArg l_{name}({slot}, "{name}", {optional});'
        if t.base == "Tensor":
            elements = "true" if t.optional_elements else "false"
            return taken, f"TensorList v_{name}(l_{name}, {elements}, {changed});", f"v_{name}"
        if t.base == "str":
            raise BuildError(f"building a light kernel: argument {name} is a list of str, which it cannot take")
        return taken, f"ScalarList<{_SCALARS[t.base]}> v_{name}(l_{name});", f"v_{name}"
    if t.base == "Tensor":
        taken = f'TensorArg h_{name}({slot}, "{name}", {optional}, {changed});'
        return taken, f"const Tensor t_{name} = h_{name}.open();", f"t_{name}"
    if t.base == "str":
        return f'StringArg v_{name}({slot}, "{name}", {optional});', "", f"v_{name}"
    scalar = _SCALARS[t.base]
    if t.optional:
        return f"const Optional<{scalar}> v_{name} = optional_scalar<{scalar}>({slot});", "", f"v_{name}"
    return f"const {scalar} v_{name} = decode<{scalar}>({slot});", "", f"v_{name}"


def _checks(plan: Plan) -> list[str]:
    """Return C++ that binds the dimensions of the shape line and checks every input against it."""
    binders = first_bindings(plan)
    optional = {t.name for t in plan.inputs if t.optional}
    unsure = {name for name, who in binders.items() if any(w in optional for w in who)}
    stars = {d.text for t in plan.inputs for d in t.entry.dims if d.star}
    lines = [f"const int64_t _d_{name} = v_{name};" for name in plan.int_names]
    for name in sorted(unsure):
        lines.append(f"{'Sizes' if name in stars else 'int64_t'} _d_{name}{{}}; bool _has_{name} = false;")
    known = set(plan.int_names)
    late = []
    for tensors in plan.inputs:
        view, dims, star = f"t_{tensors.name}", tensors.entry.dims, tensors.entry.star
        misfit = f'misfit({view}, "{tensors.entry}");'
        guard = f"if ({view}) " if tensors.optional else ""
        count = len(dims) - (star is not None)
        lines.append(f"{guard}if ({view}.dim() {'<' if star is not None else '!='} {count}) {misfit}")
        for position, dim in enumerate(dims):
            after = star is not None and position > star
            place = f"{view}.size({position - len(dims) if after else position})"
            if dim.star:
                place = f"Sizes({view}, {position}, {position + 1 - len(dims)})"
            variable = f"_d_{dim.text}"
            if dim.is_any:
                continue
            if not (dim.star or dim.is_name):
                names = [f"_has_{n}" for n in dim.names() if n in unsure]
                tests = " && ".join([*([view] if tensors.optional else []), *names, f"{place} != {_cpp(dim)}"])
                late.append(f"if ({tests}) {misfit}")
            elif dim.text in unsure:
                bind = f"{{ {variable} = {place}; _has_{dim.text} = true; }}"
                lines.append(
                    f"{guard}{{ if (!_has_{dim.text}) {bind} else if (!({place} == {variable})) {misfit} }}"
                )
            elif dim.text in known:
                lines.append(f"{guard}if (!({place} == {variable})) {misfit}")
            else:
                known.add(dim.text)
                lines.append(f"const {'Sizes' if dim.star else 'int64_t'} {variable} = {place};")
        if tensors.dtype is not None:
            lines.append(f"{guard}if ({view}.dtype() != {_dtype(tensors.dtype, plan)}) {misfit}")
    for tensors in plan.outputs:
        for name in sorted({n for d in tensors.entry.dims for n in d.names()} & unsure):
            late.append(f'if (!_has_{name}) fail("nothing binds the size {name} of output {tensors.name}");')
    return [*lines, *late]


def _outputs(plan: Plan) -> tuple[list[str], list[str]]:
    """Return C++ that allocates the outputs, and that puts them on the stack."""
    made, finish = [], []
    for index, tensors in enumerate(plan.outputs):
        made.append(f"Sizes s_{tensors.name};")
        for dim in tensors.entry.dims:
            made.append(f"s_{tensors.name}.push({'_d_' + dim.text if dim.star else _cpp(dim)});")
        made.append(f"TensorArg h_{tensors.name};")
        made.append(
            f'allocate(h_{tensors.name}, "{tensors.name}", s_{tensors.name}, '
            f"{_dtype(tensors.dtype, plan)}, {_first(plan, 'device()')});"
        )
        made.append(f"const Tensor t_{tensors.name} = h_{tensors.name}.open();")
        finish.append(f"stack[{index}] = h_{tensors.name}.release();")
    return made, finish


def _cpp(dim: Dim) -> str:
    """Return the size as C++ over the generated names `_d_<name>`."""

    def write(node: ast.expr) -> str:
        if isinstance(node, ast.BinOp):
            left, right = write(node.left), write(node.right)
            if isinstance(node.op, ast.FloorDiv):
                return f"floor_div({left}, {right})"
            if isinstance(node.op, ast.Mod):
                return f"floor_mod({left}, {right})"
            return f"({left} {'+' if isinstance(node.op, ast.Add) else '-' if isinstance(node.op, ast.Sub) else '*'} {right})"
        if isinstance(node, ast.Name):
            return f"_d_{node.id}"
        assert isinstance(node, ast.Constant)
        return f"int64_t({node.value})"

    return write(ast.parse(dim.text, mode="eval").body)


def _dtype(rule: DtypeRule | None, plan: Plan) -> str:
    assert rule is not None
    if rule.kind == "fixed":
        name = str(rule.fixed).removeprefix("torch.")
        return f"DType::{'boolean' if name == 'bool' else name}"
    if rule.kind == "value":
        return f"v_{rule.name}"
    if rule.kind == "tensor":
        param = next(p for p in plan.schema.params if p.name == rule.name)
        own = f"t_{rule.name}.dtype()"
        return f"(t_{rule.name} ? {own} : {_first(plan, 'dtype()')})" if param.type.optional else own
    return _first(plan, "dtype()")


def _first(plan: Plan, attribute: str) -> str:
    """Return C++ for an attribute of the first Tensor argument that is not None."""
    params = plan.device_params
    if not params[0].type.is_tensor:
        return f"v_{params[0].name}"
    text = f"t_{params[-1].name}.{attribute}"
    for param in reversed(params[:-1]):
        own = f"t_{param.name}.{attribute}"
        text = f"(t_{param.name} ? {own} : {text})" if param.type.optional else own
    return text


# ---------------------------------------------------------------- registering with torch

_registered: dict[tuple[str, str, str], tuple[Callable[..., Any], Any]] = {}
_lock = threading.Lock()


def _register(path: Path, schema: Schema, plan: Plan | None, device: str) -> Callable[..., Any]:
    """Load a library and return its entry point as a private op of torch's dispatcher."""
    declaration = _lowered(schema, with_outputs=plan is None)
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
        raise BuildError(
            f"loading the kernel of {schema.name} from {path}: {err}. Expected a library that fits torch "
            f"{torch.__version__}. Remove the folder {path.parent} to have it built again.",
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


def _lowered(schema: Schema, *, with_outputs: bool) -> str:
    """Return the private op's arguments and results: all positional, int for SymInt."""
    params = [f"{str(p.type).replace('SymInt', 'int')} {p.name}" for p in schema.params]
    if with_outputs:
        params += [f"Tensor {r.name}" for r in schema.results]
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


def allocate_like(outputs: Any, values: Sequence[Any]) -> tuple[torch.Tensor, ...]:
    """Return fresh tensors with the metadata of `outputs`, on the device of the first tensor."""
    flat = [v for value in values for v in (value if isinstance(value, (list, tuple)) else [value])]
    device = next((v.device for v in flat if isinstance(v, torch.Tensor)), None)
    made = outputs if isinstance(outputs, (tuple, list)) else (outputs,)
    return tuple(torch.empty_strided(o.shape, o.stride(), dtype=o.dtype, device=device) for o in made)

"""The glue of kernels that use torch's own headers: functions with tensor arguments and results.

The stable tier's entry point has the boxed form of torch's stable ABI, which does not compare types, so
the glue does. In the aten tier the function is registered by torch itself, which compares it with the
op's schema.
"""

from __future__ import annotations

import re

from opkit.errors import BuildError
from opkit.spec.schema import Schema, ValueType

_STABLE = {
    "Tensor": "torch::stable::Tensor",
    "SymInt": "int64_t",
    "int": "int64_t",
    "float": "double",
    "bool": "bool",
    "str": "std::string",
    "ScalarType": "torch::headeronly::ScalarType",
    "Device": "torch::stable::Device",
}
_ATEN = _STABLE | {
    "Tensor": "at::Tensor",
    "str": "c10::string_view",
    "ScalarType": "at::ScalarType",
    "Device": "at::Device",
    "complex": "c10::complex<double>",
    "Scalar": "at::Scalar",
    "Layout": "at::Layout",
    "MemoryFormat": "at::MemoryFormat",
    "Generator": "at::Generator",
}
_BLOCK = re.compile(r"^[ \t]*(?:STABLE_)?TORCH_LIBRARY(?:_IMPL|_FRAGMENT)?[ \t]*\(", re.MULTILINE)


def signature(symbol: str, schema: Schema, tier: str) -> str:
    """Return the C++ declaration that a kernel of an op must have in the tier."""
    names = _STABLE if tier == "stable" else _ATEN
    params = ", ".join(f"{_written(p.type, names)} {p.name}" for p in schema.params)
    return f"{_result(schema, names)} {symbol}({params});"


def refuse_registrations(text: str, schema: Schema) -> None:
    """Refuse a kernel source that registers ops by itself."""
    if found := _BLOCK.search(text):
        line = text.count("\n", 0, found.start()) + 1
        raise BuildError(
            f"building {schema.name}: line {line} of its source is a {found[0].strip().rstrip('(').strip()} block; "
            "expected a function alone, which opkit registers. Remove the block, or load the source with "
            "opkit.cpp.load, which takes such blocks.",
            op=schema.name,
        )


def stable_unit(kernel: str, symbol: str, schema: Schema) -> str:
    """Return the translation unit of a stable kernel: `kernel`, its text or an #include of it, then the glue."""
    named = [(p.name, p.type) for p in schema.params] + [(r.name, r.type) for r in schema.results]
    for name, value_type in named:
        if value_type.base not in _STABLE:
            raise BuildError(
                f"building {schema.name}: {name} is {value_type}, which opkit does not pass to a stable kernel; "
                f"expected {', '.join(_STABLE)}. Write it in the aten tier, with ATen's headers.",
                op=schema.name,
            )
    arguments = [_cpp(p.type, _STABLE) for p in schema.params]
    results = [_cpp(r.type, _STABLE) for r in schema.results]
    return f"""#define OPKIT_OP "{schema.name}"
{kernel}
#include <torch/csrc/stable/library.h>
#include <exception>
#include <optional>
#include <stdexcept>
#include <string>
#include <tuple>
#include <type_traits>
#include <utility>
#include <vector>
namespace opkit_glue {{
template <class F> struct Signature;
template <class R, class... A> struct Signature<R (*)(A...)> {{
  using arguments = std::tuple<std::decay_t<A>...>;
  using result = R;
}};
}}
#line 1 "opkit glue of {schema.namespace}.{schema.opname}"
using opkit_signature = opkit_glue::Signature<decltype(&::{symbol})>;
static_assert(std::is_same_v<opkit_signature::arguments, std::tuple<{", ".join(arguments)}>>, "other arguments");
static_assert(std::is_same_v<opkit_signature::result, {_result(schema, _STABLE)}>, "another result");
extern "C" __attribute__((visibility("default"))) void opkit_call(
    StableIValue* stack, uint64_t /*arguments*/, uint64_t /*results*/) {{
  try {{
{_boxed_call(symbol, arguments, results)}
  }} catch (const std::exception& error) {{
    throw std::runtime_error(std::string(OPKIT_OP ": ") + error.what());
  }}
}}
"""


def _boxed_call(symbol: str, arguments: list[str], results: list[str]) -> str:
    """Return what TORCH_BOX does, written out: as templates it takes a tenth of compiling a small kernel."""
    lines = [
        f"auto opkit_{i} = torch::stable::detail::to<{type_}>(stack[{i}]);"
        for i, type_ in enumerate(arguments)
    ]
    call = f"::{symbol}({', '.join(f'opkit_{i}' for i in range(len(arguments)))})"
    if not results:
        lines.append(f"{call};")
    elif len(results) == 1:
        lines.append(f"stack[0] = torch::stable::detail::from<{results[0]}>({call});")
    else:
        lines.append(f"auto opkit_results = {call};")
        lines += [
            f"stack[{i}] = torch::stable::detail::from<{type_}>(std::move(std::get<{i}>(opkit_results)));"
            for i, type_ in enumerate(results)
        ]
    return "\n".join(f"    {line}" for line in lines)


def aten_unit(kernel: str, symbol: str, schema: Schema) -> str:
    """Return the translation unit of an aten kernel: `kernel`, its text or an #include of it, then the glue."""
    return f"""#define OPKIT_OP "{schema.name}"
{kernel}
#include <torch/library.h>
#include <cstdio>
#include <memory>
#line 1 "opkit glue of {schema.namespace}.{schema.opname}"
extern "C" __attribute__((visibility("default"))) void* opkit_register(
    const char* space, const char* name, const char* key, char* said, size_t room) {{
  try {{
    auto library = std::make_unique<torch::Library>(
        torch::Library::IMPL, space, c10::parseDispatchKey(key), __FILE__, __LINE__);
    library->impl(name, TORCH_FN(::{symbol}));
    return library.release();
  }} catch (const std::exception& error) {{
    std::snprintf(said, room, "%s", error.what());
    return nullptr;
  }}
}}
extern "C" __attribute__((visibility("default"))) void opkit_unregister(void* library) {{
  delete static_cast<torch::Library*>(library);
}}
"""


def _result(schema: Schema, names: dict[str, str]) -> str:
    types = [_cpp(r.type, names) for r in schema.results]
    if len(types) == 1:
        return types[0]
    return f"std::tuple<{', '.join(types)}>" if types else "void"


def _cpp(t: ValueType, names: dict[str, str]) -> str:
    text = names[t.base]
    if t.is_list:
        text = f"std::optional<{text}>" if t.optional_elements else text
        text = f"std::vector<{text}>"
    return f"std::optional<{text}>" if t.optional else text


def _written(t: ValueType, names: dict[str, str]) -> str:
    text = _cpp(t, names)
    return (
        text
        if t.base in ("SymInt", "int", "float", "bool") and not (t.is_list or t.optional)
        else f"const {text}&"
    )

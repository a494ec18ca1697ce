"""The glue of a light kernel: C++ generated from the schema and the shape line.

The C++ does what `Plan.infer` does in Python: it takes the arguments off torch's stack, checks them
against the shape line, allocates the outputs, and calls the kernel. The two must agree; a test holds
them against each other.
"""

from __future__ import annotations

import ast

from opkit.cpp._native import DTYPES
from opkit.errors import BuildError
from opkit.spec.plan import DtypeRule, Plan, Tensors
from opkit.spec.schema import Param, Schema
from opkit.spec.shapes import Dim

_SCALARS = {
    "SymInt": "int64_t",
    "int": "int64_t",
    "float": "double",
    "bool": "bool",
    "ScalarType": "DType",
    "Device": "Device",
}


def signature(symbol: str, schema: Schema) -> str:
    """Return the C++ declaration that a light kernel of an op must have.

    Raises:
        BuildError: an argument or a result is of a type that has no form in opkit/kernel.h.
    """
    _refuse_types(schema)
    params = [f"{_parameter_type(p)} {p.name}" for p in schema.params]
    params += [
        f"opkit::{'Span<opkit::Tensor>' if r.type.is_list else 'Tensor'} {r.name}" for r in schema.results
    ]
    return f"void {symbol}({', '.join(params)});"


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


def unit_source(
    kernel: str, symbol: str, schema: Schema, plan: Plan | None, *, prelude: str = "", guard: str = ""
) -> str:
    """Return the translation unit of a kernel: `kernel`, its text or an #include of it, then the glue."""
    _refuse_types(schema)
    before, opened, arguments = [], [], []
    for index, param in enumerate(schema.params):
        taken, view, argument = _argument(param, f"stack[{index}]")
        before.append(taken)
        opened += [view] if view else []
        arguments.append(argument)
    body = [*before, *opened]
    tensors = [p for p in schema.params if p.type.base == "Tensor"]
    if len(tensors) == 1 and tensors[0].type.is_tensor:
        device = f"t_{tensors[0].name}"
    else:
        device = "call_device.tensor()"
        body.append("CallDevice call_device;")
        for param in tensors:
            taken = f"take_all(v_{param.name}.span())" if param.type.is_list else f"take(t_{param.name})"
            body.append(f"call_device.{taken};")
    if guard and tensors:
        body.append(guard.format(tensor=device))
    finish: list[str] = []
    if plan is not None:
        made, passed, finish = _outputs(plan)
        body += [*_checks(plan), *made]
        arguments += passed
    else:
        count = len(schema.params)
        for index, result in enumerate(schema.results):
            slot, name = f"stack[{count + index}]", result.name
            if result.type.is_list:
                body.append(f'ListArg l_out{index}({slot}, "{name}", false);')
                body.append(f"TensorList h_out{index}(l_out{index}, false, true);")
                arguments.append(f"h_out{index}.span()")
                continue
            body.append(f'TensorArg h_out{index}({slot}, "{name}", false, true);')
            arguments.append(f"h_out{index}.open()")
    body.append(f"::{symbol}({', '.join(arguments)});")
    body += finish
    lines = "\n".join(f"  {line}" for line in body)
    return f"""#define OPKIT_OP "{schema.name}"
{prelude}
{kernel}
#include <opkit/glue.h>
#line 1 "opkit glue of {schema.namespace}.{schema.opname}"
const char* const opkit::op_name = OPKIT_OP;
namespace opkit::glue {{  // so that the kernel's own names are no names here
extern "C" __attribute__((visibility("default"))) void opkit_call(uint64_t* stack, uint64_t, uint64_t) try {{
{lines}
}} catch (...) {{
  raise(handled());  // with the op's name
}}
}}
"""


def _refuse_types(schema: Schema) -> None:
    """Raise BuildError for an op that no light kernel can have."""
    for param in schema.params:
        _refuse(param, schema)
    for result in schema.results:
        if result.type.base != "Tensor" or result.type.optional:
            raise BuildError(
                f"building {schema.name}: its result {result.name} is {result.type}, which a light kernel cannot "
                "return; expected Tensor or list[Tensor]. Return a Tensor of no dimensions, or register a kernel that "
                "includes torch's headers, or a Python kernel.",
                op=schema.name,
            )


def _refuse(param: Param, schema: Schema) -> None:
    """Raise BuildError for an argument that has no form in opkit/kernel.h."""
    base = param.type.base
    if base == "str" and param.type.is_list:
        raise BuildError(
            f"building a light kernel of {schema.name}: argument {param.name} is a list of str, which it cannot take; "
            "expected one str, or a list of int, float or bool. Join it, or register a Python kernel.",
            op=schema.name,
        )
    if base in ("Tensor", "str") or base in _SCALARS:
        return
    parts = {"complex": "its real and imaginary parts as two floats", "Scalar": "it as a float"}
    instead = parts.get(base, "what the kernel needs of it as an int or a str")
    raise BuildError(
        f"building {schema.name}: argument {param.name} is {param.type}, which a light kernel cannot take; expected "
        f"Tensor, int, float, bool, str, dtype or device. Pass {instead}, include torch's headers for a kernel of "
        "the aten tier, or register a Python kernel.",
        op=schema.name,
    )


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
    stars = {d.text for t in plan.inputs for d in t.entry.dims if d.star}
    lines = [f"const int64_t _d_{name} = v_{name};" for name in plan.int_names]
    for name in sorted(plan.unsure):
        lines.append(f"{'Sizes' if name in stars else 'int64_t'} _d_{name}{{}}; bool _has_{name} = false;")
        if name in plan.optional_ints:
            lines.append(f"if (v_{name}) {{ _d_{name} = *v_{name}; _has_{name} = true; }}")
    known = set(plan.int_names)
    late: list[str] = []
    before: list[Tensors] = []
    for tensors in plan.inputs:
        if tensors.entry.is_list:
            lines.append(f"const Span<Tensor> a_{tensors.name} = v_{tensors.name}.span();")
            lines += _same_length(tensors, before, plan)
            walk = f"for (int64_t i = 0; i < a_{tensors.name}.size(); ++i) {{"
            element = [f"const Tensor& e = a_{tensors.name}[i];"]
            element += ["if (!e) continue;"] if tensors.optional_elements else []
            checks, later = _fit("e", "", tensors, plan, known, before)
            lines += [walk, *element, *checks, "}"]
            late += [walk, *element, *later, "}"] if later else []
        else:
            view = f"t_{tensors.name}"
            guard = f"if ({view}) " if tensors.optional else ""
            checks, later = _fit(view, guard, tensors, plan, known, before)
            lines += checks
            late += later
        before.append(tensors)
    for tensors in plan.outputs:
        for name in sorted({n for d in tensors.entry.dims for n in d.names()} & plan.unsure):
            given = f"a_{tensors.length_of}.size() && " if tensors.length_of else ""
            late.append(
                f'if ({given}!_has_{name}) fail("nothing binds the size {name} of output {tensors.name}");'
            )
    if any(t.length_of is None for t in plan.outputs) and all(
        p.type.optional or p.type.is_list for p in plan.device_params
    ):
        given = " || ".join(f"{'t' if p.type.is_tensor else 'v'}_{p.name}" for p in plan.device_params)
        if any(p.type.is_list for p in plan.device_params):
            given = "call_device.tensor()"
        late.append(f'if (!({given})) fail("all tensors are None, so nothing says where its outputs live");')
    return [*lines, *late]


def _fit(
    view: str, guard: str, tensors: Tensors, plan: Plan, known: set[str], before: list[Tensors]
) -> tuple[list[str], list[str]]:
    """Return C++ that holds one tensor to its entry, and what of it must wait until every name is bound."""
    dims, star = tensors.entry.dims, tensors.entry.star
    each = tensors.each(plan)
    lines, late = [], []
    misfit = f'misfit({view}, "{tensors.entry}");'
    count = len(dims) - (star is not None)
    lines.append(f"{guard}if ({view}.dim() {'<' if star is not None else '!='} {count}) {misfit}")
    for position, dim in enumerate(dims):
        place, variable = _place(view, tensors, position), f"_d_{dim.text}"
        if dim.is_any:
            continue
        if dim.star and dim.text == each:
            for other in (t for t in before if t.each(plan) == each):
                there = f"a_{other.name}[i]"
                lines.append(
                    f"if (i < a_{other.name}.size() && {there} && "
                    f"!({_place(there, other, other.entry.star or 0)} == {place})) {misfit}"
                )
        elif not (dim.star or dim.is_name):
            names = [f"_has_{n}" for n in dim.names() if n in plan.unsure]
            tests = " && ".join(
                [*([view] if tensors.optional and guard else []), *names, f"{place} != {_cpp(dim)}"]
            )
            late.append(f"if ({tests}) {misfit}")
        elif dim.text in plan.unsure:
            bind = f"{{ {variable} = {place}; _has_{dim.text} = true; }}"
            lines.append(
                f"{guard}{{ if (!_has_{dim.text}) {bind} else if (!({place} == {variable})) {misfit} }}"
            )
        elif dim.text in known:
            lines.append(f"{guard}if (!({place} == {variable})) {misfit}")
        else:
            known.add(dim.text)
            lines.append(f"const {'Sizes' if dim.star else 'int64_t'} {variable} = {place};")
    rule = tensors.dtype
    if rule is not None and rule.kind == "each":
        there = f"a_{rule.name}[i]"
        lines.append(
            f"if (i < a_{rule.name}.size() && {there} && {view}.dtype() != {there}.dtype()) {misfit}"
        )
    elif rule is not None:
        optional = rule.kind == "value" and plan.param(rule.name).type.optional
        given = f"if (v_{rule.name}) " if optional else ""
        lines.append(f"{guard}{given}if ({view}.dtype() != {_dtype(rule, plan)}) {misfit}")
    if tensors.entry.dtypes:
        names = [name for name in tensors.entry.dtypes if name in DTYPES]  # a kernel can name no others
        tests = " && ".join(f"{view}.dtype() != {_named(name, plan)}" for name in names) or "true"
        lines.append(f"{guard}if ({tests}) {misfit}")
    return lines, late


def _place(view: str, tensors: Tensors, position: int) -> str:
    """Return C++ for the size, or the sizes, that a dimension of an entry stands for."""
    dims, star = tensors.entry.dims, tensors.entry.star
    if star == position:
        return f"Sizes({view}, {position}, {position + 1 - len(dims)})"
    return f"{view}.size({position - len(dims) if star is not None and position > star else position})"


def _same_length(tensors: Tensors, before: list[Tensors], plan: Plan) -> list[str]:
    """Return C++ that compares the length of a list with those that it is alike, element by element."""
    star = tensors.each(plan)
    others = [t.name for t in before if star is not None and t.each(plan) == star]
    if tensors.dtype is not None and tensors.dtype.kind == "each":
        others.append(tensors.dtype.name)
    return [
        f"if (l_{tensors.name}.has() && l_{other}.has() && l_{tensors.name}.size() != l_{other}.size()) "
        f'fail("lists {tensors.name} and {other} have different lengths");'
        for other in dict.fromkeys(others)
    ]


def _outputs(plan: Plan) -> tuple[list[str], list[str], list[str]]:
    """Return C++ that allocates the outputs, that passes them on, and that puts them on the stack."""
    made, passed, finish = [], [], []
    checked, agree, closed = [], [], []
    first: dict[str, str] = {}
    for index, tensors in enumerate(plan.outputs):
        out = f"out{index}"  # not by name: an output may be called like an input
        opened = [dim for dim in tensors.entry.dims if dim.is_open]
        if tensors.entry.is_list:
            made += _list_output(out, tensors, plan)
            passed.append(f"h_{out}.span()")
            finish.append(f"stack[{index}] = h_{out}.release();")
            continue
        made.append(f"Sizes s_{out};")
        if opened:
            made.append(f"Open o_{out};")
            checked.append(f'o_{out}.check("{tensors.name}");')
            closed.append(f'o_{out}.close(h_{out}, "{tensors.name}");')
        for position, dim in enumerate(opened):
            size = f'o_{out}.size({position}), "{tensors.name}"'
            if first.setdefault(dim.text, size) != size:
                agree.append(f'same_size("{dim.text}", {first[dim.text]}, {size});')
        for dim in tensors.entry.dims:
            pushed = _bound(dim, tensors.name, plan) if dim.is_open else dim
            made.append(f"s_{out}.push({'_d_' + dim.text if dim.star else _cpp(pushed)});")
            if dim.is_open:
                made.append(f"o_{out}.add(s_{out}.count() - 1);")
        dtype, device = _dtype(tensors.dtype, plan), _first(plan, "device()")
        made.append(f"TensorArg h_{out};")
        made.append(f'allocate(h_{out}, "{tensors.name}", s_{out}, {dtype}, {device});')
        passed.append(f"h_{out}.open({f'o_{out}.found()' if opened else ''})")
        finish.append(f"stack[{index}] = h_{out}.release();")
    return made, passed, [*checked, *agree, *closed, *finish]


def _list_output(out: str, tensors: Tensors, plan: Plan) -> list[str]:
    """Return C++ that allocates a list of outputs, as long as the input list that it names."""
    for dim in tensors.entry.dims:
        if dim.is_open:
            raise BuildError(
                f"building {plan.schema.name}: the size {dim} of the tensors in output {tensors.name} depends on data, "
                "and a light kernel cannot set it in a list; expected it in an output of its own. Return a tuple, or "
                "register a Python kernel.",
                op=plan.schema.name,
            )
    length, name = tensors.length_of, tensors.name
    like = next(t for t in plan.inputs if t.name == length)
    star = tensors.each(plan)
    rule = tensors.dtype
    lines = [f'ListOut h_{out}(a_{length}.size(), "{name}");']
    if like.optional:
        lines.append(f'if (!l_{length}.has()) fail("output {name} is as long as {length}, which is None");')
    lines += [f"for (int64_t i = 0; i < a_{length}.size(); ++i) {{", f"const Tensor& e = a_{length}[i];"]
    each = rule is not None and rule.kind == "each"
    if like.optional_elements and (star is not None or each):
        lines.append(f'if (!e) fail("output {name} has nothing to be like where {length} has None");')
    lines.append("Sizes sizes;")
    for dim in tensors.entry.dims:
        size = _place("e", like, like.entry.star or 0) if dim.star and dim.text == star else f"_d_{dim.text}"
        lines.append(f"sizes.push({size if dim.star else _cpp(dim)});")
    dtype = "e.dtype()" if each else _dtype(rule, plan)
    lines.append(f'allocate(h_{out}.slot(i), "{name}", sizes, {dtype}, {_first(plan, "device()")});')
    return [*lines, "}", f"h_{out}.open();"]


def _bound(dim: Dim, output: str, plan: Plan) -> Dim:
    """Return how large a data-dependent size may become."""
    if dim.bound is None:
        raise BuildError(
            f"building {plan.schema.name}: the size {dim} of output {output} depends on data and has no bound, so "
            f"the glue cannot allocate the output for a light kernel; expected a bound such as {dim}<=2*n. Write "
            "it in the shape line, or register a Python kernel.",
            op=plan.schema.name,
        )
    return dim.bound


def _cpp(dim: Dim) -> str:
    """Return the size as C++ over the generated names `_d_<name>`."""

    def write(node: ast.expr) -> str:
        if isinstance(node, ast.BinOp):
            left, right = write(node.left), write(node.right)
            if isinstance(node.op, ast.FloorDiv):
                return f"floor_div({left}, {right})"
            if isinstance(node.op, ast.Mod):
                return f"floor_mod({left}, {right})"
            checked = {ast.Add: "plus", ast.Sub: "minus", ast.Mult: "times"}[type(node.op)]
            return f"{checked}({left}, {right})"
        if isinstance(node, ast.Name):
            return f"_d_{node.id}"
        assert isinstance(node, ast.Constant)
        return f"int64_t({node.value!r})"

    return write(ast.parse(dim.text, mode="eval").body)


def _dtype(rule: DtypeRule | None, plan: Plan) -> str:
    assert rule is not None
    if rule.kind == "fixed":
        return _named(str(rule.fixed).removeprefix("torch."), plan)
    if rule.kind == "value":
        own = f"v_{rule.name}"
        return f"({own} ? *{own} : {_first(plan, 'dtype()')})" if plan.param(rule.name).type.optional else own
    if rule.kind == "tensor":
        param = next(p for p in plan.schema.params if p.name == rule.name)
        own = f"t_{rule.name}.dtype()"
        return f"(t_{rule.name} ? {own} : {_first(plan, 'dtype()')})" if param.type.optional else own
    return _first(plan, "dtype()")


def _named(dtype: str, plan: Plan) -> str:
    """Return C++ for a dtype of torch."""
    if dtype not in DTYPES:
        raise BuildError(
            f"building {plan.schema.name}: the shape line '{plan.line}' has the dtype {dtype}, which a light kernel "
            f"does not know; expected one of {', '.join(DTYPES)}. Register a Python kernel, or one that includes "
            "torch's headers.",
            op=plan.schema.name,
        )
    return f"DType::{'boolean' if dtype == 'bool' else dtype}"


def _first(plan: Plan, attribute: str) -> str:
    """Return C++ for an attribute of the first tensor that is not None."""
    params = plan.device_params
    if params[0].type.base != "Tensor":
        return f"{'*' if params[0].type.optional else ''}v_{params[0].name}"
    if not params[0].type.optional and params[0].type.is_tensor:
        return f"t_{params[0].name}.{attribute}"
    if any(p.type.is_list for p in params):
        return f"call_device.tensor().{attribute}"
    text = f"t_{params[-1].name}.{attribute}"
    for param in reversed(params[:-1]):
        own = f"t_{param.name}.{attribute}"
        text = f"(t_{param.name} ? {own} : {text})" if param.type.optional else own
    return text

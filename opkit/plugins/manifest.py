"""The manifest of a plugin, `opkit-plugin.toml`: what it brings and what it needs, known without importing it.

    schema = 1
    name = "fast"                          # that of the entry point
    version = "1.2.0"                      # that of the distribution
    namespaces = ["fast"]                  # in which it defines ops or registers libraries; default: those of `ops`
    ops = ["fast::scale"]                  # which the entry point's function declares
    fork = "unsafe"                        # "safe" (default), or "unsafe": what ran here cannot run in a forked child
    patches = ["torch.nn.Module.to"]       # what it replaces in torch
    conflicts = ["other"]                  # plugins that it cannot be used with

    [requires]                             # each may be left out
    torch = ">=2.11,<2.16"
    opkit = ">=0.1"
    python = ">=3.10"
    platforms = ["linux-x86_64", "linux-aarch64"]

    [order]                                # relative to other plugins, where they are installed
    after = ["numba"]
    before = []

    [[kernels]]
    op = "opkit::rms_norm"
    device = "cpu"
    backend = "fast"                       # default: the plugin's name
    dtypes = ["float32", "float64"]        # default: all
    factory = "opkit_fast.norm:kernel"     # called without arguments, returns the kernel; without one, the entry
    when = "opkit_fast.norm:takes"         # point's function registers it
    priority = 0
    properties = ["deterministic"]
    inplace = ["x"]                        # or a table, { x = "y" }

    [device]
    name = "opk"
    stub = "opkit_fast.stub"
    loader = "opkit_fast.native:load"
    probe = { file = "/dev/opk*", variable = "OPK_HOME", module = "opk_runtime" }

    [toolchain]
    name = "fastc"
    suffixes = [".fast"]

Reads text and nothing else: whether a manifest tells the truth, `reality` finds out.
"""

from __future__ import annotations

import marshal
import re
from collections.abc import Iterable, Mapping
from functools import cached_property
from typing import Any, NamedTuple

from opkit.errors import PluginError, did_you_mean

FILE = "opkit-plugin.toml"
SCHEMA = 1
FORKS = ("safe", "unsafe")
PROBES = ("file", "variable", "module")

_NAME = r"[^\s=\[\]][^=\[\]]*"
_DOTTED = r"[^\W\d]\w*(\.[^\W\d]\w*)*"
_OBJECT = rf"{_DOTTED}:{_DOTTED}"
_OP = r"[A-Za-z_]\w*::[A-Za-z_]\w*(\.\w+)?"
_WORD = r"[A-Za-z_][\w.-]*"


class KernelEntry(NamedTuple):
    """A kernel that the plugin has; `when` and `factory` are `module:object`."""

    op: str
    device: str
    backend: str
    dtypes: tuple[str, ...] | None = None
    factory: str = ""
    when: str = ""
    priority: int = 0
    properties: tuple[str, ...] = ()
    inplace: tuple[tuple[str, str | None], ...] | tuple[str, ...] = ()

    def __str__(self) -> str:
        return f"{self.op} on {self.device} ({self.backend})"


class DeviceEntry(NamedTuple):
    """The device that the plugin brings; `probe` has what must exist, as pairs of a kind and a name."""

    name: str
    stub: str
    loader: str
    probe: tuple[tuple[str, str], ...] = ()


class ToolchainEntry(NamedTuple):
    """The toolchain that the entry point's function registers."""

    name: str
    suffixes: tuple[str, ...]


class Requires(NamedTuple):
    """What the plugin can be used with, as ranges of versions; empty where anything will do."""

    torch: str = ""
    opkit: str = ""
    python: str = ""
    platforms: tuple[str, ...] = ()


_ANYTHING = Requires()


def pack(kernels: Iterable[KernelEntry]) -> bytes:
    """Return kernels as a manifest keeps them."""
    return marshal.dumps(tuple(map(tuple, kernels)), 0)  # in which equal ones are the same bytes


_NO_KERNELS = pack(())


class _Kept(NamedTuple):
    name: str
    version: str
    requires: Requires = _ANYTHING
    namespaces: tuple[str, ...] = ()
    ops: tuple[str, ...] = ()
    packed: bytes = _NO_KERNELS
    device: DeviceEntry | None = None
    toolchain: ToolchainEntry | None = None
    fork: str = "safe"
    patches: tuple[str, ...] = ()
    conflicts: tuple[str, ...] = ()
    after: tuple[str, ...] = ()
    before: tuple[str, ...] = ()


class Manifest(_Kept):
    """What a plugin says of itself; the kernels are packed, as most processes need few of them."""

    @staticmethod
    def from_plain(values: tuple[Any, ...]) -> Manifest:
        """Return what `plain` was made of."""
        name, version, requires, namespaces, ops, packed, device, toolchain, *more = values
        return Manifest(
            name, version, Requires._make(requires), namespaces, ops, packed,
            device and DeviceEntry._make(device), toolchain and ToolchainEntry._make(toolchain), *more,
        )  # fmt: skip

    def plain(self) -> tuple[Any, ...]:
        """Return it as builtins, which `marshal` keeps."""
        found: tuple[Any, ...] = _plain(self)
        return found

    @cached_property
    def kernels(self) -> tuple[KernelEntry, ...]:
        """The kernels that the plugin has."""
        return tuple(map(KernelEntry._make, marshal.loads(self.packed)))


def _plain(value: Any) -> Any:
    return tuple(map(_plain, value)) if isinstance(value, tuple) else value


def parse(text: str, where: str) -> Manifest:
    """Return what a manifest says; `where` is its path, for errors.

    Raises:
        PluginError: it is no TOML, or not what schema 1 says.
    """
    return _manifest(_Table(_toml(text, where), where, ""))


def _toml(text: str, where: str) -> dict[str, Any]:
    from opkit.plugins import toml

    try:
        return toml.loads(text)
    except ValueError as error:
        raise PluginError(
            f"reading the manifest {where}: it is no TOML ({error}); expected a file as the documentation of "
            "opkit.plugins.manifest shows. Correct that line."
        ) from None


def _manifest(table: _Table) -> Manifest:
    schema = table.take("schema", int)
    if schema != SCHEMA:
        table.refuse(
            "schema", schema, f"{SCHEMA}, which this opkit reads", "Update opkit, or write schema = 1."
        )
    name = table.text("name", _NAME, "the name of the entry point")
    ops = table.texts("ops", _OP, "names such as fast::scale")
    requires, order = table.table("requires"), table.table("order")
    made = Manifest(
        name=name,
        version=table.text("version", r"\S+", "the version of the distribution"),
        requires=_requires(requires),
        namespaces=table.texts("namespaces", r"[A-Za-z_]\w*", "namespaces such as fast")
        or tuple(dict.fromkeys(op.partition("::")[0] for op in ops)),
        ops=ops,
        packed=pack(_kernel(one, name) for one in table.tables("kernels")),
        device=_device(table.table("device")) if "device" in table else None,
        toolchain=_toolchain(table.table("toolchain")) if "toolchain" in table else None,
        fork=table.choice("fork", FORKS),
        patches=table.texts("patches", rf"torch\.{_DOTTED}", "what is replaced, such as torch.nn.Module.to"),
        conflicts=table.texts("conflicts", _NAME, "names of plugins"),
        after=order.texts("after", _NAME, "names of plugins"),
        before=order.texts("before", _NAME, "names of plugins"),
    )
    order.close()
    table.close()
    _check_unique(made, table)
    return made


def _requires(table: _Table) -> Requires:
    torch, opkit, python = (
        table.text(key, None, 'a range such as ">=2.11,<3"', "") for key in ("torch", "opkit", "python")
    )
    platforms = table.texts("platforms", r"[\w*?-]+", "platforms such as linux-x86_64 or linux-*")
    found = Requires(torch, opkit, python, platforms)
    table.close()
    return found


def _kernel(table: _Table, plugin: str) -> KernelEntry:
    inplace = table.content.get("inplace")
    overwrites: Any
    if isinstance(inplace, dict):
        names = table.table("inplace")
        overwrites = tuple((key, names.text(key, r"\w+", "a result's name")) for key in list(names.content))
    else:
        overwrites = table.texts("inplace", r"\w+", "names of arguments, or a table of arguments and results")
    made = KernelEntry(
        op=table.text("op", _OP, "a name such as fast::scale"),
        device=table.text("device", _WORD, "torch's device type, such as cpu"),
        backend=table.text("backend", _WORD, "letters, digits, '_', '.' and '-'", plugin),
        dtypes=table.texts("dtypes", r"\w+", "names of torch's dtypes, such as float32") or None,
        factory=table.text("factory", _OBJECT, "module:function", ""),
        when=table.text("when", _OBJECT, "module:function", ""),
        priority=table.take("priority", int, 0),
        properties=table.texts("properties", r"\w+", "properties such as deterministic"),
        inplace=overwrites,
    )
    if made.when and not made.factory:
        table.refuse(
            "when", made.when, "it only with a factory", "Give it to register_kernel, or add a factory."
        )
    table.close()
    return made


def _device(table: _Table) -> DeviceEntry:
    probe = table.table("probe")
    for key in probe.content:
        if key not in PROBES:
            probe.unknown(key, PROBES)
    found = tuple(
        (kind, name) for kind in PROBES if kind in probe for name in probe.texts(kind, r".+", "names")
    )
    made = DeviceEntry(
        name=table.text("name", r"[a-z]\w*", "a name such as opk"),
        stub=table.text("stub", _DOTTED, "a module"),
        loader=table.text("loader", _OBJECT, "module:function"),
        probe=found,
    )
    table.close()
    return made


def _toolchain(table: _Table) -> ToolchainEntry:
    made = ToolchainEntry(
        name=table.text("name", _WORD, "a name such as fastc"),
        suffixes=table.texts("suffixes", r"\.[\w.+-]+", "suffixes such as .fast"),
    )
    table.close()
    return made


def _check_unique(made: Manifest, table: _Table) -> None:
    seen: set[tuple[str, str, str]] = set()
    for index, kernel in enumerate(made.kernels):
        if kernel[:3] in seen:
            table.refuse(
                f"kernels[{index}]",
                str(kernel),
                "each op, device and backend once",
                "Give one of the two another backend.",
            )
        seen.add(kernel[:3])


_MISSING: Any = object()
_KINDS = {int: "a whole number", str: "a text", list: "a list", dict: "a table"}


class _Table:
    """A table of the file. Keys are taken out as they are read; one that is left over is none of the schema's."""

    def __init__(self, content: Mapping[str, Any], where: str, prefix: str) -> None:
        self.content = content
        self.where = where
        self.prefix = prefix
        self._read: set[str] = set()

    def __contains__(self, key: str) -> bool:
        self._read.add(key)
        return key in self.content

    def take(self, key: str, kind: type, default: Any = _MISSING, *, wanted: str = "") -> Any:
        self._read.add(key)
        value = self.content.get(key, default)
        if value is _MISSING:
            self.refuse(key, _MISSING, wanted or _KINDS[kind], f"Add {self.prefix}{key}.")
        if value is not default and (not isinstance(value, kind) or isinstance(value, bool)):
            self.refuse(key, value, wanted or _KINDS[kind])
        return value

    def text(self, key: str, pattern: str | None, wanted: str, default: Any = _MISSING) -> str:
        value: str = self.take(key, str, default, wanted=wanted)
        if value is not default and pattern is not None and not re.fullmatch(pattern, value):
            self.refuse(key, value, wanted)
        return value

    def texts(self, key: str, pattern: str, wanted: str) -> tuple[str, ...]:
        self._read.add(key)
        value = self.content.get(key, [])
        values = [value] if isinstance(value, str) else value
        if not isinstance(values, list):
            self.refuse(key, value, f"a list of {wanted}")
        for index, one in enumerate(values):
            if not isinstance(one, str) or not re.fullmatch(pattern, one):
                self.refuse(f"{key}[{index}]", one, wanted)
        return tuple(values)

    def choice(self, key: str, words: tuple[str, ...]) -> str:
        value: str = self.take(key, str, words[0])
        if value not in words:
            self.refuse(key, value, f"one of {', '.join(words)}")
        return value

    def table(self, key: str) -> _Table:
        return _Table(self.take(key, dict, {}), self.where, f"{self.prefix}{key}.")

    def tables(self, key: str) -> list[_Table]:
        found = self.take(key, list, [])
        for index, one in enumerate(found):
            if not isinstance(one, dict):
                self.refuse(f"{key}[{index}]", one, f"a table, [[{key}]]")
        return [_Table(one, self.where, f"{self.prefix}{key}[{i}].") for i, one in enumerate(found)]

    def close(self) -> None:
        for key in self.content:
            if key not in self._read:
                self.unknown(key, sorted(self._read))

    def unknown(self, key: str, known: Any) -> None:
        raise PluginError(
            f"reading the manifest {self.where}: found the key {self.prefix}{key}; expected some of "
            f"{', '.join(known)}.{did_you_mean(key, known)} Take it out or correct it."
        )

    def refuse(self, key: str, value: Any, wanted: str, advice: str = "Correct it.") -> None:
        found = "is missing" if value is _MISSING else f"is {value!r}"
        raise PluginError(
            f"reading the manifest {self.where}: {self.prefix}{key} {found}; expected {wanted}. {advice}"
        )

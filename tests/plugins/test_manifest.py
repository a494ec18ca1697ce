"""What a manifest may say, and what is said of one that is wrong."""

from __future__ import annotations

import marshal

import pytest

from opkit.errors import PluginError
from opkit.plugins import manifest
from opkit.plugins.manifest import DeviceEntry, KernelEntry, Manifest, Requires, ToolchainEntry, pack, parse
from tests.plugins import tiny_device

HEAD = 'schema = 1\nname = "fast"\nversion = "1.2.0"\n'

FULL = (
    HEAD
    + """
ops = ["fast::scale", "other::scale"]
fork = "unsafe"
patches = ["torch.nn.Module.to"]
conflicts = ["slow"]

[requires]
torch = ">=2.11,<2.16"
opkit = ">=0.1"
python = ">=3.10"
platforms = ["linux-*"]

[order]
after = ["numba"]
before = ["last"]

[[kernels]]
op = "opkit::rms_norm"
device = "cpu"
dtypes = ["float32", "float64"]
factory = "opkit_fast.norm:kernel"
when = "opkit_fast.norm:takes"
priority = -1
properties = ["deterministic"]
inplace = { x = "y" }

[[kernels]]
op = "opkit::swiglu"
device = "cuda"
backend = "other"
inplace = "gate"

[device]
name = "opk"
stub = "opkit_fast.stub"
loader = "opkit_fast.native:load"
probe = { variable = "OPK_HOME", file = ["/dev/opk0", "/dev/opk1"] }

[toolchain]
name = "fastc"
suffixes = [".fast"]
"""
)


KERNELS = (
    KernelEntry(
        "opkit::rms_norm", "cpu", "fast", ("float32", "float64"), "opkit_fast.norm:kernel",
        "opkit_fast.norm:takes", -1, ("deterministic",), (("x", "y"),),
    ),
    KernelEntry("opkit::swiglu", "cuda", "other", inplace=("gate",)),
)  # fmt: skip


def test_everything_that_schema_1_has():
    assert parse(FULL, "here").kernels == KERNELS
    assert parse(FULL, "here") == Manifest(
        name="fast",
        version="1.2.0",
        requires=Requires(">=2.11,<2.16", ">=0.1", ">=3.10", ("linux-*",)),
        namespaces=("fast", "other"),
        ops=("fast::scale", "other::scale"),
        packed=pack(KERNELS),
        device=DeviceEntry(
            "opk", "opkit_fast.stub", "opkit_fast.native:load",
            (("file", "/dev/opk0"), ("file", "/dev/opk1"), ("variable", "OPK_HOME")),
        ),
        toolchain=ToolchainEntry("fastc", (".fast",)),
        fork="unsafe",
        patches=("torch.nn.Module.to",),
        conflicts=("slow",),
        after=("numba",),
        before=("last",),
    )  # fmt: skip


def test_the_example_in_the_documentation_is_one():
    shown = manifest.__doc__.split("importing it.\n\n")[1].split("\n\nReads text")[0]
    assert parse(shown.replace("\n    ", "\n").strip(), "here").device.name == "opk"


def test_least_is_name_and_version():
    assert parse(HEAD, "here") == Manifest("fast", "1.2.0")


@pytest.mark.parametrize("text", [HEAD, FULL])
def test_a_manifest_survives_marshal(text):
    made = parse(text, "here")
    assert Manifest.from_plain(marshal.loads(marshal.dumps(made.plain()))) == made


KERNEL = '[[kernels]]\nop = "a::b"\ndevice = "cpu"\n'
WRONG = {
    "no_toml": ("schema = ", "it is no TOML (Invalid value (at end of document)); expected a file"),
    "no_schema": ('name = "fast"', "schema is missing; expected a whole number. Add schema."),
    "newer_schema": ("schema = 2", "schema is 2; expected 1, which this opkit reads. Update opkit"),
    "truth_for_schema": ("schema = true", "schema is True; expected a whole number. Correct it."),
    "no_version": ('schema = 1\nname = "fast"', "version is missing; expected the version of the distribution."),
    "unknown_key": (HEAD + "opps = []", "found the key opps; expected some of conflicts, device, fork, "),
    "suggests": (HEAD + "opps = []", "Did you mean 'ops'? Take it out or correct it."),
    "unknown_inner_key": (HEAD + KERNEL + "prio = 1", "found the key kernels[0].prio; expected some of backend"),
    "op": (HEAD + 'ops = ["scale"]', "ops[0] is 'scale'; expected names such as fast::scale."),
    "no_list": (HEAD + "ops = 5", "ops is 5; expected a list of names such as fast::scale. Correct it."),
    "fork": (HEAD + 'fork = "maybe"', "fork is 'maybe'; expected one of safe, unsafe. Correct it."),
    "patches": (HEAD + 'patches = ["numpy.sum"]', "patches[0] is 'numpy.sum'; expected what is replaced, such as"),
    "device": (HEAD + '[[kernels]]\nop = "a::b"', "kernels[0].device is missing; expected torch's device "
                              "type, such as cpu. Add kernels[0].device."),
    "kernel_no_table": (HEAD + "kernels = [1]", "kernels[0] is 1; expected a table, [[kernels]]. Correct it."),
    "factory": (HEAD + KERNEL + 'factory = "a.b"', "kernels[0].factory is 'a.b'; expected module:function."),
    "priority": (HEAD + KERNEL + 'priority = "1"', "kernels[0].priority is '1'; expected a whole number. Correct it."),
    "when_alone": (HEAD + KERNEL + 'when = "a:b"', "kernels[0].when is 'a:b'; expected it only with a factory."),
    "twice": (HEAD + KERNEL + KERNEL, "kernels[1] is 'a::b on cpu (fast)'; expected each op, device and backend"),
    "probe": (HEAD + '[device]\nprobe = { hope = "1" }', "found the key device.probe.hope; expected some of file,"),
    "device_without_stub": (HEAD + '[device]\nname = "opk"', "device.stub is missing; expected a module. Add device."),
    "suffix": (HEAD + '[toolchain]\nname = "x"\nsuffixes = ["fast"]', "toolchain.suffixes[0] is 'fast'; expected suf"),
}  # fmt: skip


@pytest.mark.parametrize("case", WRONG)
def test_what_is_wrong_is_named_with_what_is_expected(case):
    text, said = WRONG[case]
    with pytest.raises(PluginError) as caught:
        parse(text, "/site/opkit-plugin.toml")
    assert str(caught.value).startswith("reading the manifest /site/opkit-plugin.toml: ")
    assert said in str(caught.value)


def test_an_installed_plugin_is_not_compared_with_a_project_around_it(site):
    tiny_device.install(site)
    (site.folder.parent / "pyproject.toml").write_text("[project]\nname = 'other'\nversion = '7'\n")
    path = site.folder / "tiny" / "opkit-plugin.toml"
    said = site.run(f"""
        from pathlib import Path
        from opkit.plugins import reality
        print(reality.differences(Path({str(path)!r})))
    """)
    assert "the project" not in said

"""`opkit plugins`: what it prints and how it exits."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import textwrap

import pytest

GOOD = """
    def kernel():
        return lambda x: x + 1
"""
KERNEL = """
[[kernels]]
op = "site::mine"
device = "cpu"
factory = "fast:kernel"
"""


class Environment:
    """A folder with distributions, and a user's file of its own."""

    def __init__(self, folder):
        self.folder = folder
        self.site = folder / "site"
        self.site.mkdir()

    def install(self, name, code, manifest=None, points=None, version="1.0"):
        package = self.site / name
        package.mkdir()
        (package / "__init__.py").write_text(textwrap.dedent(code))
        if manifest is not None:
            head = f"schema = 1\nname = {name!r}\nversion = {version!r}\n"
            (package / "opkit-plugin.toml").write_text(head + manifest)
        info = self.site / f"{name}-{version}.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
        (info / "entry_points.txt").write_text(points or f"[opkit.plugins]\n{name} = {name}:register\n")

    def __call__(self, *arguments, code=0, **variables):
        """What `opkit plugins` prints, on both streams."""
        clean = {k: v for k, v in os.environ.items() if not k.startswith("OPKIT_")}
        own = {
            "OPKIT_CACHE_DIR": str(self.folder / "cache"),
            "XDG_CONFIG_HOME": str(self.folder / "config"),
            "PYTHONPATH": str(self.site),
            "OPKIT_NATIVE": "0",
        }
        done = subprocess.run(
            [sys.executable, "-m", "opkit", "plugins", *arguments],
            env={**clean, **own, **variables}, capture_output=True, text=True, timeout=300, cwd=self.folder,
        )  # fmt: skip
        assert done.returncode == code, done.stdout + done.stderr
        return done.stdout + done.stderr


@pytest.fixture
def opkit_plugins(tmp_path):
    return Environment(tmp_path)


def test_list_shows_every_plugin_and_its_state(opkit_plugins):
    assert opkit_plugins("list") == "no plugins are installed\n"
    opkit_plugins.install("fast", GOOD, KERNEL)
    opkit_plugins.install("slow", GOOD, version="2.1")
    assert opkit_plugins("list", OPKIT_PLUGINS_DENY="slow").splitlines() == [
        "fast  fast 1.0  discovered         no op and no kernel has been asked for yet",
        "slow  slow 2.1  rejected (policy)  OPKIT_PLUGINS_DENY turns it off",
    ]
    rows = json.loads(opkit_plugins("list", "--json"))
    assert [(row["name"], row["status"], row["cause"]) for row in rows] == [
        ("fast", "discovered", ""), ("slow", "discovered", ""),
    ]  # fmt: skip


def test_why_says_what_python_says(opkit_plugins):
    opkit_plugins.install("fast", GOOD, '[requires]\ntorch = "<2"\n')
    lines = opkit_plugins("why", "fast").splitlines()
    assert lines[0] == "fast of fast 1.0: rejected (version)"
    assert lines[3].startswith("  what happened: it requires torch <2, and this is ")
    assert lines[4].startswith("  what to do: Install torch <2, or a version of fast for torch ")
    said = opkit_plugins("why", "fats", code=1)
    assert said.startswith(
        "No installed distribution has a plugin 'fats'; installed are fast. Did you mean 'fast'?"
    )


def test_a_wrong_variable_is_one_line_on_stderr(opkit_plugins):
    assert opkit_plugins("list", code=1, OPKIT_AUTOLOAD="maybe").startswith(
        "opkit: reading OPKIT_AUTOLOAD: found 'maybe'; expected one of 0, ops, devices, all"
    )


def test_doctor_says_what_is_wrong_and_exits_with_1(opkit_plugins):
    opkit_plugins.install("fast", GOOD, KERNEL)
    assert (
        opkit_plugins("doctor").splitlines()[0] == "1 plugins are installed; 1 of them are as they should be"
    )
    opkit_plugins.install("old", GOOD, '[requires]\ntorch = "<2"\n')
    said = opkit_plugins("doctor", code=1)
    assert "old of old 1.0: rejected (version)" in said
    assert "2 plugins are installed; 1 of them are as they should be" in said


def test_doctor_finds_what_the_catalog_has_not_seen(opkit_plugins):
    opkit_plugins.install("later", GOOD, points="[other]\nx = y:z\n")
    os.utime(opkit_plugins.site, (1e9, 1e9 + 0.5))
    opkit_plugins("list")
    points = opkit_plugins.site / "later-1.0.dist-info" / "entry_points.txt"
    points.write_text("[opkit.plugins]\nlater = later:register\n")
    said = opkit_plugins("doctor", code=1)
    assert "plugin later of later was not seen. Run opkit plugins refresh." in said
    assert opkit_plugins("refresh") == "looked anew: 1 plugin\n"
    opkit_plugins("doctor")


def test_doctor_explains_what_others_have_torch_load(opkit_plugins):
    opkit_plugins.install(
        "npu", "", points="[torch.backends]\nnpu = npu:autoload\nlost = not_there.inner:f\n"
    )
    said = opkit_plugins("doctor", code=1, TORCH_DEVICE_BACKEND_AUTOLOAD="0")
    assert (
        "torch loads lost of npu (not_there.inner:f) when it is imported: its module not_there.inner is not "
        in said
    )
    assert "torch loads npu of npu (npu:autoload) when it is imported; opkit has no part in that" in said
    content = json.loads(opkit_plugins("doctor", "--json", code=1, TORCH_DEVICE_BACKEND_AUTOLOAD="0"))
    assert content["torch.backends"]["npu of npu (npu:autoload)"] == ""
    assert len(content["problems"]) == 1


def test_doctor_probes_each_plugin_in_a_process_of_its_own(opkit_plugins):
    opkit_plugins.install("fast", "import os\n\ndef register(registry):\n    os._exit(7)\n")
    opkit_plugins.install("good", "print('hello')\ndef register(registry): ...\n")
    opkit_plugins.install("raises", "raise OSError('no licence')\n")
    content = json.loads(opkit_plugins("doctor", "--probe", "--json", code=1))
    assert {name: found["status"] for name, found in content["probed"].items()} == {
        "fast": "failed", "good": "loaded", "raises": "failed",
    }  # fmt: skip
    assert content["probed"]["fast"]["reason"] == "loading it ended its process with exit code 7."
    assert "importing raises:register raised OSError: no licence" in content["problems"][1]


def test_enable_and_disable_change_the_users_file(opkit_plugins):
    opkit_plugins.install("fast", GOOD, KERNEL)
    opkit_plugins.install("other", GOOD)
    path = opkit_plugins.folder / "config" / "opkit" / "config.toml"
    assert opkit_plugins("disable", "fast").splitlines() == [
        f'{path} now has plugins-deny = ["fast"]',
        f"fast is rejected: plugins-deny in {path} turns it off",
    ]
    assert opkit_plugins("disable", "fast").splitlines()[0] == f"{path} keeps fast out already"
    assert opkit_plugins("enable", "fast").splitlines() == [
        f"{path} now has plugins-deny = []",
        "fast is discovered",
    ]
    assert opkit_plugins("enable", "fast").splitlines()[0] == f"{path} does not keep fast out"
    path.write_text('# mine\nstrict = true\nplugins = ["other==1.0"]  # only this\n')
    assert opkit_plugins("enable", "fast").splitlines() == [
        f'{path} now has plugins = ["other==1.0", "fast"]',
        "fast is discovered",
    ]
    assert path.read_text() == '# mine\nstrict = true\nplugins = ["other==1.0", "fast"]\n'
    said = opkit_plugins("enable", "fast", OPKIT_PLUGINS_DENY="fast").splitlines()
    assert said[-1] == "fast is rejected: OPKIT_PLUGINS_DENY turns it off"


# ---------------------------------------------------------------- validate


PROJECT = """
[project]
name = "opkit-fast"
version = "1.0"

[project.entry-points."opkit.plugins"]
fast = "fast:register"
"""
CODE = """
    import torch

    def kernel():
        return lambda x, y: x + y

    def register(registry):
        @registry.op("fast::double", shapes="*b -> *b")
        def double(x: torch.Tensor) -> torch.Tensor:
            return 2 * x

        registry.register_kernel("fast::double", "cpu", lambda x: x + x, backend="own", priority=2)
"""
RIGHT = """
ops = ["fast::double"]

[[kernels]]
op = "opkit::vector_add"
device = "cpu"
factory = "fast:kernel"

[[kernels]]
op = "fast::double"
device = "cpu"
backend = "own"
priority = 2
"""


@pytest.fixture
def project(opkit_plugins):
    """Write a project and validate it; returns the problems."""

    def validate(manifest=RIGHT, code=CODE, pyproject=PROJECT):
        folder = opkit_plugins.folder / "project"
        package = folder / "src" / "fast"
        package.mkdir(parents=True, exist_ok=True)
        (folder / "pyproject.toml").write_text(pyproject)
        (package / "__init__.py").write_text(textwrap.dedent(code))
        head = 'schema = 1\nname = "fast"\nversion = "1.0"\n'
        (package / "opkit-plugin.toml").write_text(head + manifest)
        right = (manifest, code, pyproject) == (RIGHT, CODE, PROJECT)
        said = opkit_plugins("validate", str(folder), code=0 if right else 1).splitlines()
        assert said[0].startswith(f"{package / 'opkit-plugin.toml'}: ")
        return [line.strip() for line in said[1:]]

    return validate


def test_a_manifest_that_tells_the_truth(project):
    assert project() == []


WRONG = {
    "schema": (("ops =", "opps ="), "found the key opps; expected some of conflicts"),
    "op_too_many": (
        ('["fast::double"]', '["fast::double", "fast::x"]'),
        "the manifest names the op fast::x, which its function does not bring. Take it out",
    ),
    "op_too_few": (
        ('ops = ["fast::double"]', ""),
        "its function brings the op fast::double, which the manifest does not name. Add it",
    ),
    "namespace": (
        ('ops = ["fast::double"]', 'namespaces = ["other"]'),
        "it defines ops in the namespace fast; expected only other",
    ),
    "kernel_too_few": (
        ('backend = "own"', 'backend = "other"'),
        "its function registers a kernel for fast::double on cpu (own), which the manifest does not name. Add it",
    ),
    "kernel_too_many": (
        ('backend = "own"', 'backend = "other"'),
        "the manifest names a kernel for fast::double on cpu (other), which its function does not register.",
    ),
    "priority": (
        ("priority = 2", "priority = 3"),
        "its kernel for fast::double on cpu (own) has the priority 2; the manifest says 3",
    ),
    "factory": (("fast:kernel", "fast:colonel"), "AttributeError: module 'fast' has no attribute 'colonel'"),
    "requires": (("ops =", 'requires = { torch = "<2" }\nops ='), "it requires torch <2, and this is "),
    "toolchain": (
        (
            '[[kernels]]\nop = "opkit',
            '[toolchain]\nname = "x"\nsuffixes = [".x"]\n\n[[kernels]]\nop = "opkit',
        ),
        "the manifest names the toolchain x, which its function does not bring. Take it out",
    ),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_manifest_that_does_not_is_told_how(project, case):
    (before, after), said = WRONG[case]
    assert RIGHT.count(before) == 1
    assert any(said in line for line in project(RIGHT.replace(before, after)))


CODES = {
    "raises": (
        ("registry.register_kernel", "raise OSError('no licence')\n        registry.register_kernel"),
        "calling fast:register raised OSError: no licence",
    ),
    "misfit": (
        ("lambda x, y: x + y", "lambda x, y, z: x + y"),
        "its kernel for opkit::vector_add on cpu (fast) does not fit",
    ),
    "patches": (
        (
            "def register(registry):",
            "def register(registry):\n        torch.nn.Module.to = lambda self: self",
        ),
        "torch.nn.Module.to",
    ),
}


@pytest.mark.parametrize("case", CODES)
def test_a_plugin_that_does_something_else_is_told_how(project, case):
    (before, after), said = CODES[case]
    assert any(said in line for line in project(code=CODE.replace(before, after)))


def test_a_patch_that_is_declared_is_none_to_complain_of(project):
    (before, after), _ = CODES["patches"]
    patched = CODE.replace(before, after)
    said = project('patches = ["torch.nn.Module.to"]\n', patched)  # and names no ops
    assert said
    assert not [line for line in said if "torch.nn" in line]


@pytest.mark.parametrize(
    ("before", "after", "said"),
    [
        ("fast =", "quick =", "the project has no entry point 'fast' in the group opkit.plugins; expected one in"),
        ('"fast:register"', '"slow:register"', "the entry point fast is slow:register; expected a module in fast"),
        ('version = "1.0"', 'version = "2.0"', "its version is '1.0'; expected that of the distribution, '2.0'"),
    ],
)  # fmt: skip
def test_a_project_that_says_something_else_is_told_so(project, before, after, said):
    assert any(said in line for line in project(pyproject=PROJECT.replace(before, after)))


def test_a_plugin_that_is_installed_can_be_validated(opkit_plugins):
    opkit_plugins.install("fast", CODE, RIGHT)
    assert opkit_plugins("validate", str(opkit_plugins.site)).endswith(": the plugin is what it says\n")
    assert opkit_plugins("enable", "fast").splitlines()[-1] == "fast is discovered"


def test_a_folder_without_a_manifest_is_refused(opkit_plugins):
    said = opkit_plugins("validate", str(opkit_plugins.site), code=1)
    assert said.startswith(
        f"opkit: looking for a manifest in {opkit_plugins.site}: there is none; expected a file opkit-pl"
    )

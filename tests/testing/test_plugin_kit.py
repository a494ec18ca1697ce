"""The conformance suite for plugins: a good one passes, and of each defect it says what it is.

All plugins are installed at once, and one run of pytest has a class for each: they share its start.
"""

from __future__ import annotations

import base64
import hashlib
import os
import re
import subprocess
import sys
import textwrap
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest
import torch
from torch import Tensor

import opkit
from opkit.errors import PluginError
from opkit.testing.plugin import calls, fresh, subject

ROOT = Path(opkit.__file__).parents[1]

OP = """
    from torch import Tensor

    def register(registry):
        {first}
        @registry.op("{name}::twice", shapes="*b n -> *b n:x")
        def twice(x: Tensor) -> Tensor:
            return x * 2
        {last}
"""
KERNEL = """
    import os
    import torch

    def twice():
        def kernel(x):
            {body}
        return kernel
"""
MANIFEST = """
    ops = ["{name}::twice"]

    [[kernels]]
    op = "{name}::twice"
    device = "cpu"
    dtypes = ["float32"]
    factory = "{name}.kernels:twice"
"""


class Made:
    """A folder of distributions, and a test module with a class for each plugin."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.tests: list[str] = []
        self.module = "import opkit.testing.plugin\n"

    def plugin(
        self,
        name: str,
        *tests: str,
        first: str = "pass",
        last: str = "pass",
        before: str = "",
        body: str = "return torch.mul(x, 2)",
        more: str = "",
        points: str = "",
        manifest: bool = True,
        recorded: bool = False,
    ) -> None:
        """Write a plugin, and choose tests for it; none stands for all."""
        package = self.folder / name
        package.mkdir(parents=True)
        code = textwrap.dedent(OP).format(name=name, first=first, last=last)
        package.joinpath("__init__.py").write_text(f"{before}\n{code}")
        package.joinpath("kernels.py").write_text(textwrap.dedent(KERNEL).format(body=body))
        if manifest:
            head = f'schema = 1\nname = "{name}"\nversion = "1.0"\n'
            text = textwrap.dedent(MANIFEST).format(name=name) + textwrap.dedent(more)
            package.joinpath("opkit-plugin.toml").write_text(head + text)
        info = self.folder / f"{name}-1.0.dist-info"
        info.mkdir()
        info.joinpath("METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
        info.joinpath("entry_points.txt").write_text(
            f"[opkit.plugins]\n{name} = {name}:register\n{textwrap.dedent(points)}"
        )
        if recorded:
            digests = {
                path: base64.urlsafe_b64encode(hashlib.sha256(path.read_bytes()).digest())
                .decode()
                .rstrip("=")
                for path in [*package.iterdir(), *info.iterdir()]
            }
            lines = [
                f"{p.relative_to(self.folder)},sha256={d},{p.stat().st_size}\n" for p, d in digests.items()
            ]
            info.joinpath("RECORD").write_text("".join(lines))
        self.testing(name, *tests)

    def testing(self, name: str, *tests: str) -> None:
        """Have the suite run for a plugin."""
        self.module += f"class Test_{name}(opkit.testing.plugin.Suite):\n    name, limit = {name!r}, 120.0\n"
        self.tests += [f"Test_{name}{f'::{test}' if test else ''}" for test in tests or ("",)]


EAGER = """
    [torch.backends]
    eager = eager:boot
"""


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory):
    """What became of each test: passed, or the text of why not, by class and name."""
    place = tmp_path_factory.mktemp("kit")
    made = Made(place / "site")
    cuda = '\n[[kernels]]\nop = "good::twice"\ndevice = "cuda"\nfactory = "good.kernels:twice"\n'
    made.plugin("good", more=cuda, recorded=True)
    made.plugin(
        "eager",
        "test_nothing_is_imported_until_it_is_needed",
        "test_turned_off_it_is_not_there",
        "test_broken_it_breaks_nothing",
        before="def boot(): pass",
        points=EAGER,
    )
    made.plugin(
        "patching",
        "test_what_it_replaces_in_torch_is_declared",
        before="import torch; torch.nn.Module.half = lambda self: self",
    )
    made.plugin(
        "declaring",
        "test_what_it_replaces_in_torch_is_declared",
        first="import torch; torch.nn.Module.double = lambda self: self",
    )
    manifest = made.folder / "declaring" / "opkit-plugin.toml"
    manifest.write_text(manifest.read_text().replace("ops =", 'patches = ["torch.nn.Module.double"]\nops ='))
    made.plugin(
        "setting",
        "test_it_leaves_the_process_as_it_was",
        first="import torch; torch.set_default_dtype(torch.float64)",
    )
    made.plugin("lying", "test_the_manifest_says_what_is_true")
    manifest = made.folder / "lying" / "opkit-plugin.toml"
    manifest.write_text(manifest.read_text().replace('"lying::twice"]', '"lying::twice", "lying::thrice"]'))
    kernels = "test_a_kernel_gives_what_the_reference_does[{0}::twice-cpu-{0}-float32]"
    made.plugin("wrong", kernels.format("wrong"), body="return x * 2.001")
    flat = "return torch.as_strided(x, x.shape, torch.empty(x.shape).stride(), x.storage_offset()) * 2"
    made.plugin("packed", kernels.format("packed"), body=flat)
    made.plugin(
        "hungry", kernels.format("hungry"), body="return x * 2 / x.numel() * x.numel() if len(x) else x[0]"
    )
    made.plugin(
        "forking",
        "test_child_processes_can_use_it",
        body="import sys; import multiprocessing; p = multiprocessing.current_process();"
        " os.abort() if type(p).__name__ == 'ForkProcess' else None; return x * 2",
    )
    made.plugin(
        "fragile",
        "test_broken_it_breaks_nothing",
        "test_loading_and_booting_twice_changes_nothing",
        first="import ctypes, os, pathlib\n    try: ctypes.CDLL(pathlib.Path(__file__).with_name('lib.so'))"
        "\n    except OSError: os._exit(3)",
    )
    (place / "lib.c").write_text("int answer(void) { return 42; }")
    library = made.folder / "fragile" / "lib.so"
    subprocess.run(["cc", "-shared", "-fPIC", place / "lib.c", "-o", library], check=True)
    aborting = made.folder / "forking" / "kernels.py"
    made.plugin("unsafe", "test_child_processes_can_use_it")
    (made.folder / "unsafe" / "kernels.py").write_text(aborting.read_text())
    manifest = made.folder / "unsafe" / "opkit-plugin.toml"
    manifest.write_text(manifest.read_text().replace("ops =", 'fork = "unsafe"\nops ='))
    made.plugin(
        "littering",
        "test_uninstalled_it_is_not_there",
        first="import pathlib; pathlib.Path(__file__).with_name('state.txt').touch()",
        recorded=True,
    )
    made.plugin(
        "ordered",
        "test_it_loads_whatever_is_imported_first[PACKAGE,torch,opkit]",
        before="import sys\nif 'torch' not in sys.modules: raise RuntimeError('import torch first')",
    )
    made.plugin("bare", "test_the_manifest_says_what_is_true", manifest=False)
    made.plugin(
        "dying",
        "test_it_loads_whatever_is_imported_first[torch,opkit]",
        first="import os; os.abort()",
    )
    made.testing("absent", "test_the_manifest_says_what_is_true")
    made.plugin(
        "drawing",
        "test_a_kernel_is_what_it_states[drawing::twice-cpu-drawing]",
        body="return x * 2 + torch.rand(()) * 1e-7",
        more='properties = ["deterministic"]',
    )
    suite = place / "test_suite.py"
    suite.write_text(made.module)
    clean = {k: v for k, v in os.environ.items() if not k.startswith("OPKIT_")}
    paths = os.pathsep.join([str(made.folder), str(ROOT)])
    own = {"PYTHONPATH": paths, "OPKIT_CACHE_DIR": str(place / "cache"), "OPKIT_NATIVE": "0"}
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "pytest",
            "-q",
            "-p",
            "no:cacheprovider",
            f"--rootdir={place}",
            "--junitxml=found.xml",
        ]
        + [f"{suite}::{test}" for test in made.tests],
        env={**clean, **own, "XDG_CONFIG_HOME": str(place)},
        cwd=place,
        capture_output=True,
        text=True,
        timeout=900,
        check=False,
    )
    assert (place / "found.xml").is_file(), done.stdout + done.stderr
    found: dict[str, dict[str, str]] = {}
    for case in ElementTree.parse(place / "found.xml").iter("testcase"):
        status = next((c.get("message") if c.tag == "skipped" else c.text for c in case), "passed")
        found.setdefault(case.get("classname").rpartition("Test_")[2], {})[case.get("name")] = status
    return found


def found(outcomes, name, test):
    (text,) = [text for case, text in outcomes[name].items() if case.partition("[")[0] == f"test_{test}"]
    return text


@pytest.mark.slow
def test_a_good_plugin_passes_and_what_does_not_apply_is_skipped_with_the_reason(outcomes):
    left = {case: text for case, text in outcomes["good"].items() if text != "passed"}
    assert len(outcomes["good"]) - len(left) >= 15
    reasons = set(left.values())
    assert reasons <= {
        "there is no device cuda here",
        "it states no properties",
        "it brings no device",
    }, left


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "test", "text"),
    [
        ("eager", "nothing_is_imported_until_it_is_needed", r"eager is imported by import torch"),
        ("eager", "turned_off_it_is_not_there", r"with OPKIT_AUTOLOAD=0.*eager is imported"),
        ("eager", "broken_it_breaks_nothing", r"ended with exit code 1.*eager"),
        ("fragile", "broken_it_breaks_nothing", r"the process ended with exit code 3"),
        ("patching", "what_it_replaces_in_torch_is_declared", r"`patches`.*: torch\.nn\.Module\.half"),
        ("setting", "it_leaves_the_process_as_it_was", r"it changed a setting.*default_dtype"),
        ("lying", "the_manifest_says_what_is_true", r"names the op lying::thrice, which its function does not"),
        ("wrong", "a_kernel_gives_what_the_reference_does", r"one, contiguous: failed.*result .*expected"),
        ("packed", "a_kernel_gives_what_the_reference_does", r"small, transposed: failed"),
        ("hungry", "a_kernel_gives_what_the_reference_does", r"empty: failed .*IndexError"),
        ("forking", "child_processes_can_use_it", r"started by fork.*exit code -6"),
        ("littering", "uninstalled_it_is_not_there", r"littering/state\.txt is in no installer's list"),
        ("ordered", "it_loads_whatever_is_imported_first", r"RuntimeError: import torch first"),
        ("bare", "the_manifest_says_what_is_true", r"bare 1\.0: it has no manifest; expected an opkit-plugin\.toml"),
        ("dying", "it_loads_whatever_is_imported_first", r"the process ended with signal 6"),
        ("absent", "the_manifest_says_what_is_true", r"the plugin absent: it is not installed; installed are bare,"),
        ("drawing", "a_kernel_is_what_it_states", r"to be deterministic.*other bits in"),
    ],
)  # fmt: skip
def test_a_defect_is_named(outcomes, name, test, text):
    assert re.search(text, found(outcomes, name, test), re.DOTALL), found(outcomes, name, test)


@pytest.mark.slow
def test_a_patch_that_is_declared_passes(outcomes):
    assert found(outcomes, "declaring", "what_it_replaces_in_torch_is_declared") == "passed"


@pytest.mark.slow
def test_a_library_is_broken_only_where_that_is_the_test(outcomes):
    assert found(outcomes, "fragile", "loading_and_booting_twice_changes_nothing") == "passed"


@pytest.mark.slow
def test_a_plugin_that_does_not_survive_a_fork_and_says_so_passes(outcomes):
    assert found(outcomes, "unsafe", "child_processes_can_use_it") == "passed"


def test_a_suite_without_a_name_says_so():
    with pytest.raises(PluginError, match="it has no name; expected that of the plugin. Write name = "):
        subject.find("")


@pytest.mark.usefixtures("registry")
def test_arguments_are_derived_from_the_shape_line():
    @opkit.op("kit::f", shapes="*b n, n m, [2*k] -> *b m")
    def f(x: Tensor, w: Tensor, more: list[Tensor], k: int, eps: float = 1e-6, *, up: bool) -> Tensor:
        return x @ w

    (x, w, more, k, eps), kwargs = calls.derived(f, 5)
    assert (x.shape, w.shape, k, eps, kwargs) == ((2, 5), (5, 6), 1, 1e-6, {"up": False})
    assert [one.shape for one in more] == [(2,), (2,)]
    assert calls.derived(f, 1)[0][0].shape == (1,)
    assert calls.derived(f, 0)[0][0].shape == (0, 4)
    large = calls.derived(f, calls.LARGE)[0]
    assert all(1 << 18 < t.numel() < 1 << 22 for t in large[:2])


@pytest.mark.usefixtures("registry")
def test_what_cannot_be_derived_says_what_to_do():
    @opkit.op("kit::pick", shapes="n, m:int64 -> m:x")
    def pick(x: Tensor, index: Tensor) -> Tensor:
        return x[index]

    with pytest.raises(opkit.ArgumentError, match=r"argument index is of torch.int64.*`case\(self, op, n\)`"):
        calls.derived(pick, 5)


@pytest.mark.usefixtures("registry")
def test_layouts_have_the_same_values():
    @opkit.op("kit::g", shapes="n m -> n m")
    def g(x: Tensor) -> Tensor:
        return x

    (x,), _ = calls.derived(g, 5)
    laid = dict(calls.layouts(g, (x,)))
    strides = {name: values[0].stride() for name, values in laid.items()}
    assert strides == {"contiguous": (6, 1), "transposed": (1, 5), "sliced": (26 // 2, 2), "expanded": (0, 1)}
    for name in ("contiguous", "transposed", "sliced"):
        assert laid[name][0].equal(x)


def test_calls_come_out_of_a_file_as_they_went_in(tmp_path):
    call = calls.Call("kit::g", "fast", (torch.ones(2), [torch.zeros(1), None], 3, 0.5, "text"), 1e-6)
    calls.save([call], tmp_path / "calls")
    (back,) = calls.load(str(tmp_path / "calls"))
    assert back.values[0].equal(torch.ones(2))
    assert (back.op, back.backend, back.values[2:], back.slack) == ("kit::g", "fast", (3, 0.5, "text"), 1e-6)


def test_a_probe_that_takes_too_long_is_stopped(tmp_path, monkeypatch):
    (tmp_path / "sleepy.py").write_text("import time\n\ndef main():\n    time.sleep(60)\n")
    monkeypatch.setattr(fresh, "PROBES", tmp_path)
    assert fresh.run("sleepy", limit=1.0).ended == "took more than 1 s"

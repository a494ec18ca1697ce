"""A plugin without a manifest is imported at the first need once, and lazy from then on."""

from __future__ import annotations

import os
import sys

import pytest
import torch

import opkit
from opkit.plugins import catalog, remembered

CODE = """
    import torch

    print("imported")

    def register(registry):
        @registry.op("fast::double", shapes="*b -> *b")
        def double(x: torch.Tensor) -> torch.Tensor:
            return 2 * x

        options = {"dtypes": (torch.float32,), "priority": 3, "properties": ["deterministic"]}
        registry.register_kernel("site::mine", "cpu", lambda x: x + 1, backend="fast", **options)
        takes = lambda x: x.shape[0] % 2 == 0 or "needs an even length"
        registry.register_kernel("site::mine", "cpu", lambda x: x + 1, backend="even", when=takes, priority=5)
"""


@pytest.fixture
def mine(fresh):
    @opkit.op("site::mine", shapes="*b -> *b")
    def mine(x: torch.Tensor) -> torch.Tensor:
        return x + 1

    return mine


def known_again(fresh) -> bool:
    """Whether a process after this one knows the plugin without importing it."""
    fresh.again()
    opkit.list_ops()
    return "fast" not in sys.modules


def test_what_it_registered_is_known_to_the_next_process(fresh, mine, capsys):
    fresh.install("fast", CODE)
    opkit.list_ops()
    assert capsys.readouterr().out == "imported\n"
    assert known_again(fresh)
    assert [p.status for p in opkit.plugins.list()] == ["registered"]
    assert "fast::double" in opkit.list_ops()
    with opkit.require("deterministic"), opkit.use_backend("fast"):
        pass
    records = [(c.backend, c.status) for c in mine.kernels]
    assert records == [("even", "available"), ("fast", "available"), ("reference", "available")]
    assert "opkit goes by what it registered the last time" in opkit.plugins.why("fast")
    assert capsys.readouterr().out == ""
    explanation = mine.explain(torch.ones(3))  # its condition is not remembered, and holds all the same
    assert [(c.backend, c.status) for c in explanation.candidates][:2] == [
        ("even", "rejected"),
        ("fast", "selected"),
    ]
    assert capsys.readouterr().out == "imported\n"
    assert opkit.get("fast::double")(torch.ones(1)).item() == 2.0
    assert known_again(fresh)


def test_in_processes_of_their_own(site):
    site.install("fast", CODE)
    code = 'import opkit, sys; print("fast::double" in opkit.list_ops(), "fast" in sys.modules)'
    assert site.run(code) == "imported\nTrue True\n"
    assert site.run(code) == "True False\n"
    assert (
        site.run('import opkit, torch; print(opkit.get("fast::double")(torch.ones(1)))')
        == "imported\ntensor([2.])\n"
    )


def test_its_files_are_watched(fresh, mine):
    fresh.install("fast", CODE)
    opkit.list_ops()
    path = fresh.folder / "fast.py"
    os.utime(path, (1e9, 1e9))
    assert not known_again(fresh)
    assert known_again(fresh)
    path.write_text(path.read_text().replace('"even"', '"odd"'))
    assert not known_again(fresh)
    assert {c.backend for c in mine.kernels} == {"fast", "odd", "reference"}


def test_versions_and_accelerators_are_watched(fresh, mine, monkeypatch):
    fresh.install("fast", CODE)
    opkit.list_ops()
    assert known_again(fresh)
    with monkeypatch.context() as context:
        context.setenv("CUDA_VISIBLE_DEVICES", "7")
        assert not known_again(fresh)
    opkit.list_ops()
    facts = catalog.facts()
    with monkeypatch.context() as context:
        context.setattr(catalog, "facts", lambda: facts._replace(torch="2.99"))
        assert not known_again(fresh)


def test_a_kernel_that_it_no_longer_registers_leaves_the_next_candidate(fresh, mine, monkeypatch):
    takes = "        takes = lambda"
    fresh.install("fast", CODE.replace(takes, f'        if not os.environ.get("EVEN"): return\n{takes}', 1))
    path = fresh.folder / "fast.py"
    path.write_text("import os\n" + path.read_text())
    monkeypatch.setenv("EVEN", "1")
    opkit.list_ops()
    monkeypatch.delenv("EVEN")
    assert known_again(fresh)
    assert mine.explain(torch.ones(2)).selected == "fast"
    assert (
        "its function did not register a kernel that is expected: site::mine on cpu (even)"
        in opkit.plugins.why("fast")
    )
    fresh.again()
    assert {c.backend for c in mine.kernels} == {"fast", "reference"}


MORE = "registry.register_kernel('site::mine', 'cpu', identity, backend='more')"
OTHERWISE = {
    "nothing": "pass",
    "an_op_of_its_own": f"import opkit\n        opkit.op('site::own', shapes='*b -> *b')(identity)\n        {MORE}",
    "a_kernel_of_its_own": (
        "import opkit\n        opkit.get('site::mine').register_kernel('cpu', identity, backend='own')"
        f"\n        {MORE}"
    ),
    "fails": "raise OSError",
    "two_toolchains": (
        "import dataclasses\n        from opkit.cpp import toolchain\n"
        "        for n in ('one', 'two'):\n"
        "            made = dataclasses.replace(toolchain.CPP, name=n, suffixes=(f'.{n}',))\n"
        "            registry.register_toolchain(made)"
    ),
}


@pytest.mark.parametrize("case", OTHERWISE)
@pytest.mark.filterwarnings("ignore:loading plugin")
def test_one_that_does_anything_else_is_called_in_every_process(fresh, mine, case):
    fresh.install(
        "fast",
        f"""
    import torch

    def identity(x: torch.Tensor) -> torch.Tensor:
        return x + 1

    def register(registry):
        {OTHERWISE[case]}
    """,
    )
    opkit.list_ops()
    assert "fast" in sys.modules
    if opkit.find("site::own"):
        opkit._registry.remove("site::own")
    assert not known_again(fresh)


def test_a_toolchain_is_remembered(fresh, tmp_path):
    fresh.install(
        "fast",
        """
        import dataclasses

        def register(registry):
            from opkit.cpp import toolchain
            registry.register_toolchain(dataclasses.replace(toolchain.CPP, name="fastc", suffixes=(".fast",)))
        """,
    )
    opkit.list_ops()
    assert known_again(fresh)
    (tmp_path / "k.fast").write_text("")
    assert opkit.cpp.kernel(tmp_path / "k.fast").backend == "fastc"
    assert "fast" in sys.modules


def test_what_overwrites_arguments_is_remembered(fresh, mine):
    fresh.install(
        "fast",
        """
        def register(registry):
            registry.register_kernel("site::mine", "cpu", lambda x: x.add_(1), backend="fast", inplace={"x": "out"})
        """,
    )
    opkit.list_ops()
    assert known_again(fresh)
    x = torch.ones(2)
    assert mine.maybe_inplace(x) is x
    assert mine.explain(x).selected == "fast"


def test_the_plugins_own_files_are_those_of_its_package(fresh):
    fresh.install("fast", "from fast import inner\ndef register(registry): ...", manifest="")
    (fresh.folder / "fast" / "inner.py").write_text("")
    opkit.plugins.load()
    found = catalog.installed()[0]
    files = [os.path.relpath(path, fresh.folder) for path, _ in remembered._files(found)]
    assert files == ["fast/__init__.py", "fast/inner.py"]

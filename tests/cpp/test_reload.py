"""Editing a kernel in a live process: the op runs the new one, and the old one goes when nobody uses it."""

from __future__ import annotations

import gc
import threading
import time
import warnings
from pathlib import Path

import pytest
import torch
from torch import Tensor

import opkit
from opkit.cpp import compilers
from opkit.errors import BuildError

pytestmark = pytest.mark.skipif(compilers.find_cxx() is None, reason="needs a C++ compiler")

ADD = """
#include <opkit/kernel.h>
void added(opkit::Tensor x, opkit::Tensor y) {{
  for (int64_t i = 0; i < x.numel(); ++i) y.data<float>()[i] = x.data<float>()[i] + {};
}}
"""


@pytest.fixture
def added(registry):
    @opkit.op("t::added", shapes="n -> n")
    def added(x: Tensor) -> Tensor:
        return x + 1

    return added


def mapped() -> set[str]:
    """The libraries of the op that this process has mapped."""
    gc.collect()
    lines = Path("/proc/self/maps").read_text().splitlines()
    return {line.split()[-1] for line in lines if "t-added" in line}


def test_an_edited_cell_runs_again(added):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for value in (1, 2, 3, 2):
            added.register_kernel("cpu", opkit.cpp.kernel(ADD.format(value)))
            assert added(torch.zeros(2)).tolist() == [value, value]


def test_the_old_library_is_unmapped(added):
    before = mapped()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for value in range(6):
            added.register_kernel("cpu", opkit.cpp.kernel(ADD.format(value)))
            added(torch.zeros(2))
            assert len(mapped() - before) == 1


def test_building_an_edited_file_points_the_op_to_it(added, tmp_path):
    source = tmp_path / "added.cpp"
    source.write_text(ADD.format(1))
    added.register_kernel("cpu", opkit.cpp.kernel(source))
    compiled = torch.compile(lambda x: added(x) * 2, fullgraph=True)
    assert compiled(torch.zeros(1)).item() == 2
    source.write_text(ADD.format(10))
    assert added(torch.zeros(1)).item() == 1
    (library,) = added.build("cpp")
    assert added(torch.zeros(1)).item() == 10
    assert compiled(torch.zeros(1)).item() == 20
    assert str(library) in mapped()


def test_an_edit_that_does_not_compile_is_an_error_until_it_does(added, tmp_path):
    source = tmp_path / "added.cpp"
    source.write_text(ADD.format(1))
    added.register_kernel("cpu", opkit.cpp.kernel(source))
    assert added(torch.zeros(1)).item() == 1
    source.write_text(ADD.format("one"))
    with pytest.raises(BuildError, match="'one' was not declared|undeclared identifier 'one'"):
        added.build("cpp")
    assert added(torch.zeros(1)).item() == 1
    source.write_text(ADD.format(2))
    added.build("cpp")
    assert added(torch.zeros(1)).item() == 2


def test_a_call_that_runs_keeps_its_library(added):
    slow = (
        ADD.format(1)
        .replace("{\n", "{\n  usleep(400000);\n", 1)
        .replace("#include", "#include <unistd.h>\n#include", 1)
    )
    added.register_kernel("cpu", opkit.cpp.kernel(slow))
    results = []
    added(torch.zeros(1))
    thread = threading.Thread(target=lambda: results.append(added(torch.zeros(1)).item()))
    thread.start()
    time.sleep(0.1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        added.register_kernel("cpu", opkit.cpp.kernel(ADD.format(2)))
    assert added(torch.zeros(1)).item() == 2
    thread.join()
    assert results == [1]
    assert len(mapped()) == 1


def test_two_ops_with_one_source_keep_it_until_both_are_gone(registry, added):
    text = ADD.format(5)
    added.register_kernel("cpu", opkit.cpp.kernel(text))

    @opkit.op("t::added_too", shapes="n -> n")
    def added_too(x: Tensor) -> Tensor:
        return x + 1

    added_too.register_kernel("cpu", opkit.cpp.kernel(text, symbol="added"))
    assert added(torch.zeros(1)).item() == added_too(torch.zeros(1)).item() == 5
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        added.register_kernel("cpu", opkit.cpp.kernel(ADD.format(6)))
    assert added(torch.zeros(1)).item() == 6
    gc.collect()
    assert added_too(torch.zeros(1)).item() == 5


def test_a_source_that_is_a_link_follows_it(added, tmp_path):
    for name, value in (("v1", 1), ("v2", 2)):
        (tmp_path / f"{name}.cpp").write_text(ADD.format(value))
    link = tmp_path / "current.cpp"
    link.symlink_to("v1.cpp")
    added.register_kernel("cpu", opkit.cpp.kernel(link))
    assert added(torch.zeros(1)).item() == 1
    link.unlink()
    link.symlink_to("v2.cpp")
    added.build("cpp")
    assert added(torch.zeros(1)).item() == 2


def test_a_library_with_threads_of_its_own_stays(added):
    before = mapped()
    code = "#include <thread>\nstatic std::thread* worker = new std::thread([] {});\n" + ADD.format(1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        added.register_kernel("cpu", opkit.cpp.kernel(code))
        added(torch.zeros(1))
        added.register_kernel("cpu", opkit.cpp.kernel(ADD.format(2)))
        added(torch.zeros(1))
    assert len(mapped() - before) == 2


def test_a_kernel_registered_while_another_is_chosen_is_run_next(added, monkeypatch):
    from opkit.dispatch import select

    added.register_kernel("cpu", opkit.cpp.kernel(ADD.format(1)))
    reject, replaced = select._reject, []

    def replacing(*args, **kwargs):
        if not replaced:
            replaced.append(added.register_kernel("cpu", opkit.cpp.kernel(ADD.format(2))))
        return reject(*args, **kwargs)

    monkeypatch.setattr(select, "_reject", replacing)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        added(torch.zeros(1))
    assert added(torch.zeros(1)).item() == 2


def test_a_build_while_a_call_binds_is_not_lost(added, tmp_path, monkeypatch):
    from opkit.cpp.light import Source

    source = tmp_path / "added.cpp"
    source.write_text(ADD.format(1))
    added.register_kernel("cpu", opkit.cpp.kernel(source))
    bind = Source.bind

    def binding(self, *args):
        bound = bind(self, *args)
        if source.read_text() == ADD.format(1):
            source.write_text(ADD.format(2))
            added.build("cpp")
        return bound

    monkeypatch.setattr(Source, "bind", binding)
    added(torch.zeros(1))
    assert added(torch.zeros(1)).item() == 2

"""What a library defines in torch's dispatcher is known, and held against it, before it is opened here."""

from __future__ import annotations

import pytest
import torch

from opkit.plugins import namespaces, trial

pytestmark = pytest.mark.usefixtures("cache_dir")


def test_what_a_library_would_define_is_found_without_opening_it_here(registering):
    found = trial.of(registering("site_full"), plugin="fast")
    assert (found.namespaces, found.ops) == (("site_full",), ("site_full::f",))
    assert not hasattr(torch.ops.site_full, "f")


def test_a_namespace_without_operators_is_found(registering):
    found = trial.of(registering("site_empty", ""), plugin="fast")
    assert (found.namespaces, found.ops) == (("site_empty",), ())


def test_a_kernel_of_an_op_that_is_to_come_defines_nothing(registering):
    library = registering("site_later", 'm.impl("f", &kernel);', "_IMPL({}, CPU, m)")
    found = trial.of(library, plugin="fast")
    assert (found.outcome, found.namespaces, found.ops) == ("passed", (), ())
    torch.ops.load_library(library)
    assert namespaces.clashes(["site_later"], ["site_later::f"]) == []  # who defines it still may


def test_ops_in_a_namespace_of_others_do_not_take_it(registering):
    library = registering("site_added", 'm.def("site_added(Tensor x) -> Tensor");', "_FRAGMENT(aten, m)")
    found = trial.of(library, plugin="fast")
    assert (found.namespaces, found.ops) == ((), ("aten::site_added",))


def test_what_is_defined_already_is_named_with_its_place():
    library = torch.library.Library("site_taken", "DEF")
    library.define("f(Tensor x) -> Tensor")
    namespace, op = namespaces.clashes(["site_taken", "site_free"], ["site_taken::f", "site_taken::g"])
    library._destroy()
    assert namespace.startswith(f"the namespace 'site_taken' (TORCH_LIBRARY), which {__file__}:")
    assert namespace.endswith(" has defined")
    assert op.startswith(f"the op site_taken::f, which {__file__}:")
    assert namespaces.clashes(["site_taken"], ["site_taken::f"]) == []


def test_asking_for_a_namespace_does_not_take_it():
    for _ in range(2):
        assert namespaces.clashes(["site_asked"], []) == []
    with torch.library._scoped_library("site_asked", "DEF"):
        pass


def test_a_fragment_takes_no_namespace_but_its_operators():
    with torch.library._scoped_library("site_part", "FRAGMENT") as library:
        library.define("f(Tensor x) -> Tensor")
        assert namespaces.clashes(["site_part"], []) == []
        assert len(namespaces.clashes(["site_part"], ["site_part::f"])) == 1
        assert namespaces.clashes(["site_part"], ["site_part::f.out"]) == []

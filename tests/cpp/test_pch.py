from __future__ import annotations

import subprocess

import pytest
import torch

from opkit import _torch_build
from opkit.cpp import _pch, cache, compilers
from opkit.cpp._aten import Job
from opkit.cpp._ninja import Build
from opkit.cpp.extension import build, load_inline
from opkit.errors import BuildError

pytestmark = pytest.mark.skipif(
    compilers.find_ninja() is None or compilers.find_cxx() is None or not _pch.is_gcc(compilers.get_cxx()),
    reason="needs gcc and ninja",
)

# A header of torch that reads in a tenth of a second stands in for those that take ten.
HEADER = "torch/headeronly/macros/Macros.h"
SOURCE = (
    f"#include <{HEADER}>\n#ifndef PREPARED\n#error plain\n#endif\n#ifndef C10_EXPORT\n#error empty\n#endif\n"
)


@pytest.fixture(autouse=True)
def small_header(tmp_path, monkeypatch):
    """Where the precompiled header is used, PREPARED is defined."""
    monkeypatch.setenv("OPKIT_CACHE_DIR", str(tmp_path / "cache"))
    from opkit import _config

    _config.refresh()
    monkeypatch.setitem(_pch._TEXTS, HEADER, f"#include <{HEADER}>\n#define PREPARED 1\n")
    yield
    _config.refresh()


def is_used(source=SOURCE, **options):
    """Whether a source that begins with the header compiles against what is precompiled."""
    job = Job.of("f", source, *(options.get(name) for name in FLAGS), None, False, is_module=False)
    with cache.workspace("f", "f") as work:
        build = Build(job, work.folder)
        build._write_files(work.folder)
        _torch_build.search_first(work.folder / "build.ninja", work.folder / "headers")
        build._place_headers(build._ways()[0])
        done = subprocess.run([str(compilers.get_ninja())], cwd=work.folder, capture_output=True, text=True)
        assert done.returncode == 0 or "#error plain" in done.stdout, done.stdout
        assert "#error empty" not in done.stdout
        return done.returncode == 0


FLAGS = ("extra_cflags", "extra_cuda_cflags", "extra_ldflags", "extra_include_paths")


def test_the_second_build_prepares_the_header_and_says_so(capfd):
    assert not is_used()
    assert capfd.readouterr().err == ""
    assert is_used()
    assert f"opkit: built {HEADER} in precompiled form, once for these flags in" in capfd.readouterr().err
    assert is_used()
    assert capfd.readouterr().err == ""


def test_prepare_does_it_ahead_and_writes_only_into_the_cache():
    (path,) = _pch.prepare(headers=[HEADER])
    assert path.is_relative_to(cache.root())
    assert _pch.prepare(headers=[HEADER]) == [path]
    assert is_used()


def test_a_header_that_is_included_again_is_torchs():
    _pch.prepare(headers=[HEADER])
    again = SOURCE + f'#include <{HEADER}>\n#include "{HEADER}"\n#include <torch/headeronly/version.h>\n'
    assert is_used(again, extra_cflags=["-Wall", "-Wextra", "-Werror"])
    assert not is_used("int first;\n" + again)
    assert not is_used("#define C10_LIKELY\n" + again)


def test_a_header_that_cannot_be_prepared_is_tried_once(monkeypatch, capfd):
    monkeypatch.setitem(_pch._TEXTS, HEADER, "#error broken\n")
    for _ in range(3):
        assert not is_used()
    assert capfd.readouterr().err.count("opkit: failed to build") == 1
    with pytest.raises(BuildError, match="building torch headers: 1 error.*broken"):
        _pch.prepare(headers=[HEADER])


def test_macros_folders_and_warnings_share_a_header():
    _pch.prepare(headers=[HEADER])
    assert is_used(
        extra_cflags=["-DMINE=1", "-D OTHER", "-Wall", "-UTHIRD"], extra_include_paths=["/nowhere"]
    )


@pytest.mark.parametrize(
    "flag",
    ["-O1", "-std=c++17", "-g", "-march=native", "-fopenmp", "-fno-exceptions", "-Wpedantic"],
)
def test_other_flags_have_a_header_of_their_own(flag):
    _pch.prepare(headers=[HEADER])
    assert not is_used(extra_cflags=[flag])
    assert is_used(extra_cflags=[flag])


def test_a_macro_that_the_header_mentions_acts():
    _pch.prepare(headers=[HEADER])
    assert not is_used(extra_cflags=["-DC10_USING_CUSTOM_GENERATED_MACROS"])


def test_nothing_is_prepared_where_another_file_comes_first(tmp_path):
    (tmp_path / "ahead.h").write_text("inline int ahead() { return 2; }\n")
    for _ in range(2):
        assert not is_used(extra_cflags=["-include", str(tmp_path / "ahead.h")])
    assert not list(cache.root().glob("lib/torch-headers-*"))


def test_a_folder_with_a_header_of_the_same_name_acts(tmp_path):
    _pch.prepare(headers=[HEADER])
    (tmp_path / "own" / HEADER).parent.mkdir(parents=True)
    (tmp_path / "own" / HEADER).write_text(f"#include_next <{HEADER}>\n")
    (tmp_path / "other" / "mine").mkdir(parents=True)
    assert is_used(extra_include_paths=[tmp_path / "other"])
    assert not is_used(extra_include_paths=[tmp_path / "own"])
    assert not is_used(extra_cflags=[f"-I{tmp_path / 'own'}"])


def test_a_compiler_behind_a_launcher_and_another_than_gcc_do_without(monkeypatch):
    gcc = compilers.get_cxx()
    assert _pch.is_gcc(gcc)
    assert not _pch.is_gcc(compilers.Compiler(gcc.path, gcc.version, ("ccache", "g++")))
    assert not _pch.is_gcc(compilers.Compiler(gcc.path, "clang version 18.1.3", ("clang++",)))


def test_the_first_header_of_a_source():
    files = {
        "a.cpp": "// text\n#pragma once\n#define X\n#include <ATen/ATen.h>\n",
        "self.h": '#include "self.h"\n',
    }
    for text, header in (
        ("#include <torch/extension.h>\n#include <vector>\n", "torch/extension.h"),
        ("#include <vector>\n#include <torch/extension.h>\n", None),
        ('#include "a.cpp"\n', "ATen/ATen.h"),
        ('#include "self.h"\n', None),
        ("int x;\n", None),
    ):
        assert _pch.first_header(text, files.get) == header


def test_texts_that_need_the_whole_header():
    assert _pch.is_enough(["at::Tensor f(torch::Tensor x) { return x; }", "torch::autograd::Function<F>"])
    for text in ("struct M : torch::nn::Module {};", "TORCH_MODULE(Net);", "torch::save(x, path);"):
        assert not _pch.is_enough(["", text])


def test_a_source_that_needs_more_than_the_narrow_header_gets_the_whole(monkeypatch, tmp_path):
    monkeypatch.setitem(_pch.NARROW, _pch.NARROWED, "#pragma once\n")
    text = "#include <torch/extension.h>\n#ifndef TORCH_CHECK\n#error narrow\n#endif\n"
    fake = tmp_path / "torch"
    fake.mkdir()
    (fake / "extension.h").write_text("#define TORCH_CHECK\n")  # in place of torch's, which takes ten seconds
    assert build("whole", text, extra_include_paths=[tmp_path]).exists()


@pytest.mark.slow
def test_load_inline_compiles_with_the_narrow_header_alone(capfd):
    source = """
    struct Twice : torch::autograd::Function<Twice> {
      static at::Tensor forward(torch::autograd::AutogradContext*, at::Tensor x) {
        at::AutoDispatchBelowADInplaceOrView guard;
        return x * 2;
      }
      static torch::autograd::variable_list backward(torch::autograd::AutogradContext*,
                                                     torch::autograd::variable_list g) {
        return {g[0] * 2};
      }
    };
    #ifdef FORWARD_HAS_DEFAULT_ARGS
    #error the frontend
    #endif
    at::Tensor twice(torch::Tensor x, std::optional<at::Tensor>, py::object) {
      TORCH_CHECK(x.dim() == 1, "one dimension");
      return Twice::apply(x);
    }
    """
    # Under a compiler at -O0, which is a third of the time.
    module = load_inline("twice", source, functions=["twice"], extra_cflags=["-O0"])
    x = torch.ones(3, requires_grad=True)
    module.twice(x, None, None).sum().backward()
    assert torch.equal(x.grad, torch.full((3,), 2.0))
    with pytest.raises(RuntimeError, match="one dimension"):
        module.twice(torch.ones(3, 3), None, None)

"""What happens at the end of `import torch`: nothing, unless there is a device to set up, and never an error."""

from __future__ import annotations

import os
import shutil

import pytest

import opkit_boot
from tests.plugins import tiny_device

SAY = """
    import torch, sys
    import opkit_boot
    print(hasattr(torch, "tiny"), "opkit" in sys.modules, repr(opkit_boot.problem))
"""
PROBE = 'probe = { variable = "CARD" }'


def test_without_a_device_plugin_nothing_of_opkit_is_imported(site):
    tiny_device.entry_point(site)
    site.settle()
    site.run("import torch")  # which looks at the folders, and remembers
    assert site.run(SAY) == "False False None\n"


def test_the_device_that_the_user_chose_is_set_up(site):
    tiny_device.install(site)
    assert site.run(SAY) == "False True None\n"
    assert site.run(SAY, OPKIT_DEVICE="tiny") == "True True None\n"
    site.settle()
    site.run("import torch")
    assert site.run(SAY) == "False False None\n"  # has a device, has no probe, was not chosen
    assert site.run(SAY, OPKIT_DEVICE="tiny") == "True True None\n"


@pytest.mark.parametrize("autoload", ["0", "off", "ops"])
def test_devices_can_be_turned_off(site, autoload):
    tiny_device.install(site, probe=PROBE)
    said = site.run(SAY, OPKIT_AUTOLOAD=autoload, OPKIT_DEVICE="tiny", CARD="1")
    assert said == "False False None\n"


def test_a_probe_decides_where_nobody_chose(site):
    tiny_device.install(site, probe=PROBE)
    code = SAY + "\n    import opkit; print(opkit.plugins.why('tiny'))"
    present = site.run(code, CARD="1")
    assert present.startswith("True True None")
    assert "its device tiny is set up, as there is the variable CARD" in present
    absent = site.run(code)
    assert absent.startswith("False")
    assert "its probe does not find the variable CARD" in absent
    assert "OPKIT_DEVICE=tiny" in absent


WHY = "import opkit; print(opkit.plugins.why('tiny'))"


def test_why_says_what_keeps_a_device_out_whatever_was_looked_at(site):
    tiny_device.install(site, manifest='ops = ["site::tiny"]\n')
    kept_out = "its device tiny is not set up: "
    assert f"{kept_out}it has no probe, and nobody chose it. Choose it: OPKIT_DEVICE=tiny." in site.run(WHY)
    assert f"{kept_out}torch has not asked for it" in site.run(WHY, OPKIT_DEVICE="tiny")
    said = site.run(WHY, OPKIT_AUTOLOAD="ops", OPKIT_DEVICE="tiny")
    assert f"{kept_out}OPKIT_AUTOLOAD turns devices off" in said


def test_a_plugin_with_nothing_but_a_device_is_left_out_where_devices_are_off(site):
    tiny_device.install(site)
    said = site.run(WHY, OPKIT_AUTOLOAD="ops", OPKIT_DEVICE="tiny")
    assert said.startswith("tiny of tiny 1.0: rejected (policy)")
    assert "OPKIT_AUTOLOAD turns plugins without ops off" in said


def test_a_denied_plugin_is_not_set_up(site):
    tiny_device.install(site, probe=PROBE)
    assert site.run(SAY, CARD="1", OPKIT_PLUGINS_DENY="tiny").startswith("False")


def test_the_project_may_choose(site, tmp_path):
    tiny_device.install(site)
    (tmp_path / "pyproject.toml").write_text("[tool.opkit]\ndevice = 'tiny'\n")
    code = f"import os, sys; sys.path.append(os.getcwd()); os.chdir({str(tmp_path)!r})"
    assert site.run(code + SAY.replace("\n    ", "\n")).startswith("True")


def test_a_device_that_is_not_there_is_no_error_of_torch(site):
    tiny_device.install(site)
    said = site.run(SAY, OPKIT_DEVICE="tinny")
    assert said.startswith("False True PluginError(")
    assert (
        "setting up the device tinny that OPKIT_DEVICE chooses: no plugin that is used brings it; they bring tiny. "
        "Did you mean 'tiny'? Install the plugin, see opkit plugins list, or take tinny out of OPKIT_DEVICE."
        in said
    )


def test_what_goes_wrong_is_no_error_of_torch(site):
    tiny_device.install(site)
    (site.folder / "tiny" / "opkit-plugin.toml").write_text("schema = 7")
    assert "ConfigError" in site.run(SAY, OPKIT_DEVICE="two words")
    for _ in range(2):  # also where it is known that no plugin has a device
        assert "PluginError" in site.run(SAY, OPKIT_DEVICE="tiny")
        site.settle()


def test_other_peoples_entry_points_work_as_before(site):
    tiny_device.install(site)
    site.install("npu", "def go(): print('npu')", points="[torch.backends]\nnpu = npu:go\n")
    assert sorted(site.run(SAY, OPKIT_DEVICE="tiny").splitlines()) == ["True True None", "npu"]


def test_another_packages_device_keeps_the_slot(site):
    tiny_device.install(site, probe=PROBE)
    code = "import torch; torch.utils.rename_privateuse1_backend('npu')"
    site.install("npu", f"def go():\n    {code}", points="[torch.backends]\nanpu = npu:go\n")
    code = "import opkit, opkit_boot; opkit_boot.boot(); print(hasattr(torch, 'tiny'), opkit.plugins.why('tiny'))"
    said = site.run(
        f"import os; os.environ['OPKIT_AUTOLOAD'] = '0'; import torch; os.environ['OPKIT_AUTOLOAD'] = 'all'; {code}",
        CARD="1",
    )
    assert said.startswith("False tiny of")
    assert "has npu, which another package has set up" in said


def test_of_two_devices_one_gets_the_slot(site):
    tiny_device.install(site, probe=PROBE)
    tiny_device.install(site, "other", probe=PROBE)
    code = (
        SAY
        + "\n    import opkit; print(hasattr(torch, 'other'), opkit.plugins.why('tiny'), opkit.plugins.why('other'))"
    )
    first = site.run(code, CARD="1")
    assert first.startswith("False")
    assert "torch's one slot for devices of plugins has other of" in first
    chosen = site.run(code, CARD="1", OPKIT_DEVICE="tiny")
    assert chosen.startswith("True")
    assert "OPKIT_DEVICE chooses tiny" in chosen


def test_installing_and_removing_are_noticed(site):
    tiny_device.entry_point(site)
    site.settle()
    site.run("import torch")
    tiny_device.install(site, probe=PROBE)
    assert site.run(SAY, CARD="1").startswith("True")
    os.utime(site.folder, (5e8, 5e8))  # not the time it had before
    assert site.run(SAY, CARD="1").startswith("True")
    site.uninstall("tiny")
    assert site.run(SAY, CARD="1").startswith("False")


def test_a_project_whose_metadata_a_build_writes_again_is_looked_at_anew(site):
    tiny_device.install(site, probe=PROBE)
    info = site.folder / "tiny.egg-info"
    (site.folder / "tiny-1.0.dist-info").rename(info)
    (info / "METADATA").rename(info / "PKG-INFO")
    points = info / "entry_points.txt"
    content = points.read_text()
    points.write_text("[other]\nx = y:z\n")
    site.settle()
    assert site.run(SAY, CARD="1", OPKIT_DEVICE="").startswith("False")
    points.write_text(content)
    assert site.run(SAY, CARD="1").startswith("True")


def test_a_device_that_one_process_sees_elsewhere_is_seen_by_others(site, tmp_path):
    tiny_device.install(site)
    site.settle()
    project = tmp_path / "project"
    shutil.copytree(site.folder, project)  # as of an author, who has the distribution in his project too
    os.utime(project, (1, 1))
    site.run(f"import sys; sys.path.insert(0, {str(project)!r}); import torch", OPKIT_DEVICE="tiny")
    assert site.run(SAY, OPKIT_DEVICE="tiny") == "True True None\n"


def test_a_damaged_file_is_read_anew(site, monkeypatch, tmp_path):
    monkeypatch.setenv("OPKIT_CACHE_DIR", str(tmp_path))
    (tmp_path / "plugins").mkdir()
    for content in (b"", b"\xff\xff", b"i\x07\x00\x00\x00"):
        with open(opkit_boot.path("devices"), "wb") as file:
            file.write(content)
        assert opkit_boot.installed() is None


def test_probes(monkeypatch, tmp_path):
    (tmp_path / "card0").touch()
    monkeypatch.setenv("CARD", "1")
    probe = [("file", f"{tmp_path}/card*"), ("variable", "CARD"), ("module", "json.decoder")]
    assert opkit_boot.missing(probe) == []
    assert opkit_boot.passes(probe)
    assert not opkit_boot.passes([])
    absent = [("file", f"{tmp_path}/none"), ("variable", "NONE"), ("module", "no_such_module.inner")]
    assert opkit_boot.missing(absent) == [
        f"the file {tmp_path}/none",
        "the variable NONE",
        "the module no_such_module.inner",
    ]

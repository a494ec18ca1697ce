"""Which plugins the user wants: variables, files, pins, and what is said of each rule."""

from __future__ import annotations

import base64
import hashlib
import os
import warnings
from pathlib import Path

import pytest

import opkit
from opkit.errors import ConfigError, PluginError
from opkit.plugins import loader

CODE = """
    def register(registry):
        registry.register_kernel("site::mine", "cpu", lambda x: x + 1, backend="mine")
"""


@pytest.fixture
def plugin(fresh, monkeypatch, tmp_path):
    """Installed are `fast` of fast-dist and `numb` of numb-dist; returns what became of one with given variables."""
    fresh.install("fast-dist", CODE, plugin="fast", version="1.2")
    fresh.install("numb-dist", CODE, plugin="numb")
    (tmp_path / "work" / "inner").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "work" / "inner")

    def look(name="fast", **variables):
        for key, value in variables.items():
            monkeypatch.setenv(f"OPKIT_{key}", value)
        fresh.again()
        return next(p for p in opkit.plugins.list() if p.name == name)

    return look


def project(tmp_path, text):
    (tmp_path / "work" / "pyproject.toml").write_text(text)
    return tmp_path / "work" / "pyproject.toml"


def user(tmp_path, text):
    path = tmp_path / "config" / "opkit" / "config.toml"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path


def test_all_that_are_installed_are_used(plugin):
    assert (plugin().status, plugin().rule) == (
        "discovered",
        "the default, by which installed plugins are used",
    )


def test_only_those_that_are_allowed(plugin):
    found = plugin("numb", PLUGINS="fast")
    assert (found.status, found.cause, found.rule) == ("rejected", "policy", "OPKIT_PLUGINS")
    assert (found.reason, found.remedy) == ("OPKIT_PLUGINS does not name it", "Add numb to OPKIT_PLUGINS.")
    assert (plugin().status, plugin().rule) == ("discovered", "OPKIT_PLUGINS")
    assert opkit.plugins.why("numb").splitlines()[:5] == [
        "numb of numb-dist 1.0: rejected (policy)",
        f"  found: numb_dist:register in {plugin('numb').location}",
        "  decided by: OPKIT_PLUGINS",
        "  what happened: OPKIT_PLUGINS does not name it",
        "  what to do: Add numb to OPKIT_PLUGINS.",
    ]


def test_a_distribution_may_be_named(plugin):
    assert plugin(PLUGINS="Fast_Dist").status == "discovered"


def test_what_is_denied_stays_out_whatever_is_allowed(plugin, tmp_path):
    found = plugin(PLUGINS="fast,numb", PLUGINS_DENY="fast")
    assert (found.status, found.rule, found.remedy) == (
        "rejected", "OPKIT_PLUGINS_DENY", "Take fast out of OPKIT_PLUGINS_DENY.",
    )  # fmt: skip
    path = user(tmp_path, 'plugins-deny = ["numb"]')
    assert plugin("numb").rule == f"plugins-deny in {path}"


def test_a_rejected_plugin_is_not_imported(plugin, fresh):
    plugin(PLUGINS="fast")
    opkit.list_ops()
    assert [(p.name, p.status) for p in opkit.plugins.list()] == [("fast", "loaded"), ("numb", "rejected")]
    opkit.plugins.load()
    with pytest.raises(
        PluginError, match="leaving out plugin 'numb' of numb-dist 1.0: OPKIT_PLUGINS does not name it"
    ):
        opkit.plugins.load("numb")


@pytest.mark.parametrize(
    ("said", "ops", "device"),
    [
        ("0", False, False),
        ("no", False, False),
        ("ops", True, False),
        ("devices", False, True),
        ("ALL", True, True),
    ],
)
def test_autoload_says_which_are_used_by_themselves(plugin, fresh, said, ops, device):
    fresh.install("opk", "", manifest='[device]\nname = "opk"\nstub = "opk"\nloader = "opk:load"\n')
    assert (plugin(AUTOLOAD=said).status == "discovered") is ops
    assert (plugin("opk").status == "discovered") is device
    if said == "ops":
        assert plugin("opk").reason == "OPKIT_AUTOLOAD turns plugins without ops off"
    if said == "0":
        assert (plugin("opk").reason, plugin("opk").remedy) == (
            "OPKIT_AUTOLOAD turns calling plugins off", "Unset OPKIT_AUTOLOAD.",
        )  # fmt: skip


def test_the_variable_says_more_than_the_project_and_that_more_than_the_user(plugin, tmp_path):
    mine = user(tmp_path, 'plugins = ["fast"]\nautoload = "devices"\n')
    assert plugin("numb").rule == f"plugins in {mine}"
    assert plugin().reason == f"autoload in {mine} turns plugins without devices off"
    theirs = project(tmp_path, '[tool.opkit]\nplugins = "numb"\nautoload = true\n')
    assert plugin().rule == f"plugins in [tool.opkit] of {theirs}"
    assert plugin("numb").status == "discovered"
    assert plugin(PLUGINS="fast").status == "discovered"
    assert plugin(PLUGINS="").status == "rejected"  # set to nothing is as good as unset


def test_a_file_is_parsed_again_only_when_it_changes(plugin, tmp_path, monkeypatch):
    path = project(tmp_path, '[tool.opkit]\nplugins-deny = ["fast"]\n')
    assert plugin().status == "rejected"
    with monkeypatch.context() as context:
        context.setattr("opkit.plugins.toml.loads", lambda text: pytest.fail("it has not changed"))
        assert plugin().status == "rejected"
    path.write_text('[tool.opkit]\nplugins-deny = ["numb", "else"]\n')
    assert plugin().status == "discovered"
    path.unlink()
    assert plugin("numb").status == "discovered"


def test_a_pyproject_of_somebody_else_says_nothing(plugin, tmp_path):
    for text in ("[tool.other]\nplugins = 5\n", "tool = 5\n", "no TOML at all ["):
        project(tmp_path, text)
        assert plugin().status == "discovered"


WRONG = {
    "unknown_key": ("plugin = ['fast']", "found the key 'plugin'; expected some of plugins, plugins-deny, autoload, "
                    "device, strict. Did you mean 'plugins'? Take it out or correct it."),
    "kind": ("plugins = 5", "plugins is 5; expected a list of texts. Correct it."),
    "pin": ("plugins = ['fast=1']", "found 'fast=1'; expected NAME, NAME==VERSION"),
    "autoload": ("autoload = 'maybe'", "found 'maybe'; expected one of 0, ops, devices, all, 1, true"),
    "number": ("autoload = 1.5", "autoload is 1.5; expected a text, true or false. Correct it."),
    "no_toml": ("plugins", "it is no TOML ("),
}  # fmt: skip


@pytest.mark.parametrize("case", WRONG)
def test_what_is_wrong_in_a_file_is_refused_at_every_need(plugin, tmp_path, case):
    text, said = WRONG[case]
    path = user(tmp_path, text)
    for _ in range(2):
        with pytest.raises(ConfigError) as caught:
            plugin()
        assert said in str(caught.value)
        assert str(path) in str(caught.value)
        assert str(caught.value).startswith("reading ")
    with pytest.raises(ConfigError):
        opkit.list_ops()


def test_strict_is_asked_only_when_something_is_wrong_and_then_must_be_a_word(plugin, fresh):
    fresh.install("broken", "raise OSError('gone')")
    plugin(STRICT="1")
    for _ in range(2):
        with pytest.raises(
            PluginError, match="loading plugin 'broken' of broken 1.0: importing broken:register raised"
        ):
            opkit.list_ops()


def test_a_name_that_no_plugin_has_is_warned_of_once(plugin):
    with pytest.warns(UserWarning, match="reading OPKIT_PLUGINS: no installed plugin is called 'fsat'; installed are "
                      "fast, numb. Did you mean 'fast'. Install it or take it out."):  # fmt: skip
        plugin(PLUGINS="fsat,numb")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        loader._states = None
        opkit.plugins.list()


# ---------------------------------------------------------------- pins


def record(fresh, module="fast_dist", version="1.2"):
    """Write the RECORD of a distribution and return its digest."""
    info = fresh.folder / f"{module}-{version}.dist-info"
    lines = []
    for path in (fresh.folder / f"{module}.py", info / "METADATA"):
        digest = base64.urlsafe_b64encode(hashlib.sha256(path.read_bytes()).digest()).rstrip(b"=").decode()
        lines.append(f"{path.relative_to(fresh.folder)},sha256={digest},{path.stat().st_size}\n")
    lines.append(f"{info.name}/RECORD,,\n")
    (info / "RECORD").write_text("".join(lines))
    return hashlib.sha256((info / "RECORD").read_bytes()).hexdigest()


def test_pinned_to_a_version(plugin):
    assert plugin(PLUGINS="fast==1.2").status == "discovered"
    found = plugin(PLUGINS="fast==1.1")
    assert (found.status, found.cause) == ("rejected", "policy")
    assert found.reason == "by OPKIT_PLUGINS it is pinned to version 1.1, and 1.2 is installed"


def test_pinned_to_a_record(plugin, fresh):
    digest = record(fresh)
    assert plugin(PLUGINS=f"fast@sha256:{digest}").status == "discovered"
    assert plugin(PLUGINS=f"fast==1.2@sha256:{digest}").status == "discovered"
    assert f"  pin: fast==1.2@sha256:{digest}" in opkit.plugins.why("fast").splitlines()
    found = plugin(PLUGINS=f"fast@sha256:{'0' * 64}")
    assert found.reason == (
        f"by OPKIT_PLUGINS it is pinned to the RECORD sha256:{'0' * 64}, and that of what is installed is "
        f"sha256:{digest}"
    )


def test_a_file_that_is_not_what_record_says_is_not_loaded(plugin, fresh):
    digest = record(fresh)
    with open(fresh.folder / "fast_dist.py", "a") as file:
        file.write("# changed\n")
    found = plugin(PLUGINS=f"fast@sha256:{digest}")
    assert found.reason.endswith(
        "it is pinned by its RECORD, and the file fast_dist.py is not what RECORD says"
    )
    (fresh.folder / "fast_dist.py").unlink()
    assert plugin().status == "rejected"


def test_a_pin_by_record_needs_one_that_lists_the_code(plugin, fresh):
    found = plugin(PLUGINS=f"fast@sha256:{'0' * 64}")
    assert found.reason.endswith("it is pinned by its RECORD, and its distribution has none")
    digest = record(fresh)
    (fresh.folder / "fast_dist-1.2.dist-info" / "direct_url.json").write_text(
        '{"dir_info": {"editable": true}}'
    )
    assert "of an editable install" in plugin(PLUGINS=f"fast@sha256:{digest}").reason


def test_the_home_folder_has_the_users_file(monkeypatch):
    from opkit.plugins import options

    monkeypatch.delenv("XDG_CONFIG_HOME", raising=False)
    monkeypatch.setenv("HOME", "/home/me")
    assert options.user_file() == "/home/me/.config/opkit/config.toml"


def test_a_working_directory_that_is_gone_has_no_project(plugin, tmp_path):
    gone = tmp_path / "gone"
    gone.mkdir()
    os.chdir(gone)
    Path(gone).rmdir()
    assert plugin().status == "discovered"

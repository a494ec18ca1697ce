"""`opkit plugins`: which plugins are installed, what became of each and why, and whether one is right."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterable
from typing import Any

HELP = "show installed plugins, say why one is not used, check one, and turn them on and off"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    commands = parser.add_subparsers(metavar="ACTION", required=True)

    def command(name: str, action: Callable[[argparse.Namespace], int], text: str) -> argparse.ArgumentParser:
        added = commands.add_parser(name, help=text, description=text)
        added.set_defaults(action=action)
        return added

    listing = command("list", _list, "show every installed plugin and its state")
    listing.add_argument("--json", action="store_true", help="as JSON, for programs")

    why = command("why", _why, "say where a plugin is, which rule decided, what happened, and what to do")
    why.add_argument("name", metavar="NAME", help="of the plugin, or of its distribution")

    doctor = command(
        "doctor", _doctor, "say what is wrong with the plugins here; exits with 1 if something is"
    )
    doctor.add_argument("--probe", action="store_true", help="load each plugin too, in a process of its own")
    doctor.add_argument("--json", action="store_true", help="as JSON, for programs")

    validate = command("validate", _validate, "compare a plugin's manifest with what the plugin does")
    validate.add_argument("path", metavar="PATH", help="an opkit-plugin.toml, or a folder with one in it")

    command("refresh", _refresh, "forget what was remembered of plugins, and look anew")

    new = command("new", _new, "write a new plugin: a package that passes its own tests")
    new.add_argument("name", metavar="NAME", help="of the plugin, and of its ops' namespace or its device")
    new.add_argument("--kind", required=True, choices=("kernel-python", "kernel-cpp", "device"))
    new.add_argument(
        "--into", metavar="FOLDER", default=".", help="where the project's folder is made; default: here"
    )

    test = command("test", _test, "run the conformance suite on an installed plugin; needs pytest")
    test.add_argument("name", metavar="NAME", help="of the plugin")

    for name, action, text in (
        ("enable", _enable, "take a plugin out of quarantine, and off the user's deny-list"),
        ("disable", _disable, "put a plugin onto the user's deny-list"),
    ):
        changed = command(name, action, text)
        changed.add_argument("name", metavar="NAME", help="of the plugin, or of its distribution")


def run(arguments: argparse.Namespace) -> int:
    code: int = arguments.action(arguments)
    return code


def _list(arguments: argparse.Namespace) -> int:
    import opkit

    plugins = opkit.plugins.list()
    if arguments.json:
        _print_json([plugin._asdict() for plugin in plugins])
        return 0
    if not plugins:
        print("no plugins are installed")
    rows = [
        (
            p.name,
            f"{p.distribution} {p.version}",
            f"{p.status} ({p.cause})" if p.cause else p.status,
            p.reason,
        )
        for p in plugins
    ]
    widths = [max((len(row[i]) for row in rows), default=0) for i in range(3)]
    for row in rows:
        cells = [cell.ljust(width) for cell, width in zip(row, widths, strict=False)]
        print("  ".join([*cells, row[3]]).rstrip())
    return 0


def _why(arguments: argparse.Namespace) -> int:
    import opkit
    from opkit.plugins import loader, resolve

    print(opkit.plugins.why(arguments.name))
    return 0 if resolve.called(arguments.name, loader.states()) else 1


def _doctor(arguments: argparse.Namespace) -> int:
    from opkit.plugins import doctor, loader, story

    states = loader.states()
    problems = [story.tell(state) for state in states if state.is_wrong]
    problems += doctor.unseen(states)
    probed: dict[str, dict[str, str]] = {}
    if arguments.probe:
        for state in states:
            if state.status == "discovered":
                found = probed[state.found.name] = doctor.probe(state)
                if found["status"] != "loaded":
                    problems.append(
                        f"{state.found.name}: {found['status']} when it is loaded: {found['reason']}"
                    )
    others = dict(doctor.autoloaded())
    problems += [
        f"torch loads {what} when it is imported: {wrong}" for what, wrong in others.items() if wrong
    ]
    if arguments.json:
        plugins = [story.record(state)._asdict() for state in states]
        _print_json({"plugins": plugins, "probed": probed, "torch.backends": others, "problems": problems})
        return int(bool(problems))
    for problem in problems:
        print(problem)
    good = sum(not state.is_wrong for state in states)
    print(f"{len(states)} plugins are installed; {good} of them are as they should be")
    for name, found in probed.items():
        print(f"{name}: {found['status']} in a process of its own")
    for what, wrong in others.items():
        if not wrong:
            print(f"torch loads {what} when it is imported; opkit has no part in that")
    return int(bool(problems))


def _validate(arguments: argparse.Namespace) -> int:
    from opkit.plugins import reality

    code = 0
    for path in reality.find(arguments.path):
        problems = reality.differences(path)
        code = code or int(bool(problems))
        print(f"{path}: {_count(len(problems), 'problem') if problems else 'the plugin is what it says'}")
        for problem in problems:
            print(f"  {problem}")
    return code


def _new(arguments: argparse.Namespace) -> int:
    from opkit.cli import new

    return new.plugin(arguments)


def _test(arguments: argparse.Namespace) -> int:
    import importlib.util

    from opkit.errors import PluginError

    if importlib.util.find_spec("pytest") is None:
        raise PluginError(
            f"testing the plugin {arguments.name}: pytest is not installed, with which the conformance suite runs. "
            "Install it: pip install 'torch-opkit[test]'."
        )
    from opkit.testing.plugin import command

    return command.run(arguments.name)


def _refresh(arguments: argparse.Namespace) -> int:
    from opkit.plugins import catalog

    catalog.refresh()
    print(f"looked anew: {_count(len(catalog.installed()), 'plugin')}")
    return 0


def _enable(arguments: argparse.Namespace) -> int:
    from opkit.plugins import isolation, switch

    name = arguments.name
    tried_again = (
        [f"{name} is tried once more: it is quarantined no longer"] if isolation.forgive(name) else []
    )
    return _tell(name, [*tried_again, *switch.enable(name)])


def _disable(arguments: argparse.Namespace) -> int:
    from opkit.plugins import switch

    return _tell(arguments.name, switch.disable(arguments.name))


def _tell(name: str, changed: Iterable[str]) -> int:
    """Print what was changed, and what became of the plugin by that."""
    for line in changed:
        print(line)
    import opkit
    from opkit.plugins import loader

    loader.forget()
    found = [p for p in opkit.plugins.list() if name in (p.name, p.distribution)]
    for plugin in found:
        print(f"{plugin.name} is {plugin.status}" + (f": {plugin.reason}" if plugin.cause else ""))
    return 0


def _print_json(content: Any) -> None:
    print(json.dumps(content, indent=2))


def _count(number: int, what: str) -> str:
    return f"{number} {what}{'' if number == 1 else 's'}"

"""`opkit cache`: what compiled kernels there are, and what to do with them."""

from __future__ import annotations

import argparse
import fnmatch
import importlib.util
import json
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

from opkit import _config
from opkit.cpp import cache, remote, tidy
from opkit.cpp.tidy import Entry
from opkit.errors import BuildError, OpkitError

HELP = "list, check, clean and share the kernels that were compiled"
_DAY = 86400.0

T = TypeVar("T")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    commands = parser.add_subparsers(metavar="ACTION", required=True)

    def command(name: str, action: Callable[[argparse.Namespace], int], text: str) -> argparse.ArgumentParser:
        added = commands.add_parser(name, help=text, description=text)
        added.set_defaults(action=action)
        return added

    listing = command("list", _list, "show every compiled kernel, the last used one first")
    listing.add_argument("--json", action="store_true", help="as JSON, for programs")

    clean = command(
        "clean", _clean, "remove what killed and failed builds left, and kernels as the options say"
    )
    clean.add_argument("--all", action="store_true", help="every kernel that no live process holds")
    clean.add_argument(
        "--older-than", type=_days, metavar="DAYS", help="kernels that were not used for so long"
    )
    clean.add_argument(
        "--max-size", type=_size, metavar="SIZE", help="the least recently used ones beyond this: 500M, 10G"
    )

    verify = command(
        "verify", _verify, "read every file and remove what is damaged; exits with 1 if something was"
    )
    verify.add_argument("--json", action="store_true", help="as JSON, for programs")

    push = command("push", _push, "send kernels to a shared cache")
    push.add_argument("--to", metavar="URL", help="its address for fsspec (default: OPKIT_CACHE_REMOTE)")
    push.add_argument("names", nargs="*", metavar="NAME", help="an op or an entry, * allowed (default: all)")

    pull = command("pull", _pull, "fetch kernels from a shared cache")
    pull.add_argument(
        "--from", dest="source", metavar="URL", help="its address (default: OPKIT_CACHE_REMOTE)"
    )
    pull.add_argument("names", nargs="*", metavar="NAME", help="an op or an entry, * allowed (default: all)")


def run(arguments: argparse.Namespace) -> int:
    code: int = arguments.action(arguments)
    return code


def _list(arguments: argparse.Namespace) -> int:
    rows: list[dict[str, Any]] = []
    for root in cache.roots():
        in_use = tidy.held(str(root)) if root == cache.root() else set()
        for entry in tidy.entries(str(root)):
            manifest = entry.manifest()
            row: dict[str, Any] = {
                "name": entry.name,
                "variant": entry.variant,
                "label": manifest.label if manifest else None,
                "library": f"{entry.folder}/{manifest.library}" if manifest else None,
                "size": entry.size,
                "used": entry.used,
                "held": entry.id in in_use,
                "root": str(root),
            }
            rows.append(row)
    rows.sort(key=lambda row: -row["used"])
    if arguments.json:
        print(json.dumps(rows, indent=2))
        return 0
    if not rows:
        print(f"no compiled kernels in {_places()}")
        return 0
    for row in rows:
        mark = " (in use)" if row["held"] else "" if row["label"] else " (damaged)"
        age = _age(time.time() - row["used"])
        label = row["label"] or "?"
        print(f"{_bytes(row['size']):>9}  {age:>8}  {label:<32}  {row['name']}/{row['variant']}{mark}")
    total = sum(row["size"] for row in rows)
    print(f"{_count(len(rows))}, {_bytes(total)}, in {_places()}")
    return 0


def _clean(arguments: argparse.Namespace) -> int:
    root = str(_own())
    tidy.collect(root, kept_for=0.0)
    chosen = list(tidy.entries(root))
    if not arguments.all:
        oldest = time.time() - arguments.older_than * _DAY if arguments.older_than is not None else None
        chosen = [e for e in chosen if e.is_removed or (oldest is not None and e.used < oldest)]
    removed = tidy.remove(root, chosen)
    kept = len(chosen) - len(removed)
    if not arguments.all:
        limit = _config.get("OPKIT_CACHE_LIMIT") if arguments.max_size is None else arguments.max_size
        if limit or arguments.max_size is not None:
            removed += tidy.evict(root, max(limit, 1))
    print(f"removed {_count(len(removed))}, {_bytes(sum(entry.size for entry in removed))}, from {root}")
    if kept:
        print(f"kept {_count(kept)} that live processes hold")
    return 0


def _verify(arguments: argparse.Namespace) -> int:
    damaged: list[tuple[Path, Entry, bool]] = []
    whole = 0
    for root in cache.roots():
        found = list(tidy.entries(str(root)))
        bad = [entry for entry in found if not entry.is_whole()]
        gone = {entry.id for entry in tidy.remove(str(root), bad)} if root == cache.root() else set()
        whole += len(found) - len(bad)
        damaged += [(root, entry, entry.id in gone) for entry in bad]
    if arguments.json:
        rows = [
            {"name": e.name, "variant": e.variant, "folder": e.folder, "removed": removed}
            for _, e, removed in damaged
        ]
        print(json.dumps({"whole": whole, "damaged": rows}, indent=2))
    else:
        for root, entry, removed in damaged:
            what = "removed" if removed else "kept, a live process holds it"
            if root != cache.root():
                what = f"kept: {root} is only read; remove it there"
            print(f"damaged: {entry.id} ({what})")
        print(f"{_count(whole)} whole, {len(damaged)} damaged, in {_places()}")
    return 1 if damaged else 0


def _push(arguments: argparse.Namespace) -> int:
    target = remote.Remote(_url(arguments.to, "push", "--to"))
    found = {entry.id: entry for root in cache.roots() for entry in tidy.entries(str(root))}
    chosen = _chosen(
        list(found.values()), arguments.names, lambda entry: entry.name, f"the cache {_places()}"
    )
    sent = damaged = 0
    for entry in _progress("push", chosen):
        manifest = entry.manifest()
        if manifest is None or not entry.is_whole():
            damaged += 1
        else:
            sent += target.upload(manifest, Path(entry.folder))
    there = len(chosen) - sent - damaged
    print(f"pushed {_count(sent)} to {target.url}; {there} were there")
    if damaged:
        print(f"opkit: left out {damaged} damaged; run opkit cache verify", file=sys.stderr)
    return 1 if damaged else 0


def _pull(arguments: argparse.Namespace) -> int:
    source = remote.Remote(_url(arguments.source, "pull", "--from"))
    chosen = _chosen(source.names(), arguments.names, str, f"the shared cache {source.url}")
    root = _own()
    have = {entry.id for entry in tidy.entries(str(root)) if entry.is_whole()}
    fetched = there = refused = 0
    for name in _progress("pull", chosen):
        try:
            for manifest in source.variants(name):
                if f"{name}/{manifest.variant}" in have:
                    there += 1
                else:
                    remote.receive(source, manifest)
                    fetched += 1
        except remote.UnreachableError:
            raise
        except remote.RemoteError as error:
            refused += 1
            print(f"opkit: {error}", file=sys.stderr)
    tidy.evict(str(root), _config.get("OPKIT_CACHE_LIMIT"))
    print(f"pulled {_count(fetched)} from {source.url}; {there} were here")
    return 1 if refused else 0


def _own() -> Path:
    """Return the folder that is written, after a look at whether it may be."""
    return cache.roots()[0]


def _places() -> str:
    return ", ".join(map(str, cache.roots()))


def _url(given: str | None, action: str, option: str) -> str:
    if url := given or _config.get("OPKIT_CACHE_REMOTE"):
        return str(url)
    raise BuildError(
        f"opkit cache {action}: no shared cache is named. Expected {option} URL, or OPKIT_CACHE_REMOTE, as in "
        f"opkit cache {action} {option} s3://bucket/kernels"
    )


def _chosen(items: Sequence[T], names: Sequence[str], name_of: Callable[[T], str], where: str) -> list[T]:
    """Return the items that `names` mean: an op, a name, or a pattern. None given: all."""
    if not names:
        return list(items)
    chosen: dict[int, T] = {}
    for name in names:
        prefix = cache.slug(name)
        found = [
            i
            for i, item in enumerate(items)
            if fnmatch.fnmatchcase(name_of(item), name) or f"{name_of(item)}-".startswith(f"{prefix}-")
        ]
        if not found:
            raise BuildError(
                f"looking for {name!r} in {where}: nothing there has that name. Expected an op such as demo::f, "
                "or a name that `opkit cache list` shows."
            )
        chosen.update((i, items[i]) for i in found)
    return list(chosen.values())


def _progress(what: str, items: Sequence[T]) -> Iterator[T]:
    """Show on stderr how far it is: a bar where rich is and somebody looks, else lines."""
    if sys.stderr.isatty() and importlib.util.find_spec("rich"):
        from rich.console import Console
        from rich.progress import track

        yield from track(items, description=what, console=Console(stderr=True))
        return
    for number, item in enumerate(items, 1):
        name = item.name if isinstance(item, Entry) else item
        print(f"{what} {number}/{len(items)} {name}", file=sys.stderr, flush=True)
        yield item


def _days(text: str) -> float:
    days = float(text)
    if not 0 <= days < float("inf"):
        raise ValueError
    return days


def _size(text: str) -> int:
    try:
        variable = _config.VARIABLES["OPKIT_CACHE_LIMIT"]
        size: int = variable.parse(variable, text)
        return size
    except OpkitError:
        raise argparse.ArgumentTypeError(f"{text!r} is no size such as 500M or 10G") from None


def _count(number: int) -> str:
    return f"{number} kernel{'' if number == 1 else 's'}"


def _bytes(size: float) -> str:
    for unit in ("B", "KiB", "MiB", "GiB"):
        if size < 1024 or unit == "GiB":
            break
        size /= 1024
    return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"


def _age(seconds: float) -> str:
    for unit, length in (("d", _DAY), ("h", 3600.0), ("min", 60.0)):
        if seconds >= length:
            return f"{seconds / length:.0f} {unit}"
    return f"{max(seconds, 0):.0f} s"

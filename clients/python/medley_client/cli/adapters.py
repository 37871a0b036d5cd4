"""Commands about adapters on the server: push, pull, list, show, remove, load, pin."""

from __future__ import annotations

import time
from argparse import Namespace
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.table import Table

from medley_client.cli.commands import Commands
from medley_client.cli.console import ago, client, err, out, print_json, printable, progress, size, some
from medley_client.types import Adapter, Quarantine

_PUSH = """\
Files that the server has already are not sent again, and a push that was cut
off goes on where it stopped when you repeat it within a day. The push becomes
the `latest` version, which the bare name means. To try it out before:

  medley push DIR --name bot --tag candidate
  medley generate "Where is my parcel?" --adapter bot@candidate
  medley tag bot@candidate latest      # the bare name means it now
"""
_PULL = """\
Every file is checked against its digest before it gets its name. NAME may be
bot, bot@v3, bot@sha256:… or bot@TAG. Files that are there already are kept.
"""


def register(commands: Commands) -> None:
    push = commands.add("push", _push, "Upload an adapter directory, a zip or tar of one, or a fine-tuned model.", more=_PUSH)
    push.add_argument("source", type=Path, metavar="DIR")
    push.add_argument("--name", help="name on the server; default: the directory's name")
    push.add_argument("--tag", help="move this tag to the new version, and not `latest`")
    state = push.add_mutually_exclusive_group()
    state.add_argument("--if-match", metavar="ETAG", help="only if nothing changed since `medley show` printed this etag")
    state.add_argument("--create", action="store_true", help="only if there is no such name yet")
    push.add_argument("--no-resume", action="store_true", help="start again, and keep no note of the upload on this machine")
    whole = push.add_mutually_exclusive_group()
    whole.add_argument(
        "--rank", type=int, metavar="N", help="of a fine-tuned model: compress its difference to the base to rank N"
    )
    whole.add_argument("--exact", action="store_true", help="of a fine-tuned model: keep every difference to the base (large)")
    pull = commands.add("pull", _pull, "Download an adapter as it was uploaded.", more=_PULL)
    pull.add_argument("reference", metavar="NAME")
    pull.add_argument("directory", nargs="?", type=Path, metavar="DIR", help="default: the adapter's name, here")
    pull.add_argument("--overwrite", action="store_true", help="replace files that have other content")
    commands.add("ls", _list, "List your adapters.")
    show = commands.add("show", _show, "Show one adapter: facts, versions, tags, where it is loaded, when it was used.")
    show.add_argument("name", metavar="NAME")
    remove = commands.add("rm", _remove, "Delete an adapter, or one version of it (NAME@v2).")
    remove.add_argument("reference", metavar="NAME")
    loading = commands.add("load", _load, "Begin to bring an adapter to memory before its first request; ends a quarantine.")
    pinning = commands.add("pin", _pin, "Keep an adapter on the device, whatever else is asked for.")
    unpinning = commands.add("unpin", _unpin, "Let a pinned adapter go like any other.")
    for command in (loading, pinning, unpinning):
        command.add_argument("reference", metavar="NAME", help="also NAME@v2 or NAME@TAG")


def _push(arguments: Namespace) -> int:
    name = arguments.name or arguments.source.resolve().name.split(".")[0].lower()
    with client(arguments) as medley, progress(arguments, name) as report:
        pushed = medley.adapters.push(
            arguments.source,
            name,
            rank=arguments.rank,
            exact=arguments.exact,
            tag=arguments.tag,
            if_match=arguments.if_match,
            create=arguments.create,
            resume=not arguments.no_resume,
            progress=report,
        )
    if arguments.json:
        return print_json(asdict(pushed))
    facts = pushed.facts
    what = f"{facts.get('method')} rank {facts.get('rank')}, {facts.get('sites')} sites"
    out.print(f"{pushed.name}@{pushed.version}  {what}  {pushed.digest[:19]}")
    if notes := _notes(facts):
        out.print(notes)
    if pushed.skipped:
        err.print(printable(f"not needed, left out: {', '.join(pushed.skipped)}"), markup=False)
    return 0


def _pull(arguments: Namespace) -> int:
    directory = arguments.directory or Path(arguments.reference.partition("@")[0])
    with client(arguments) as medley, progress(arguments, arguments.reference) as report:
        pulled = medley.adapters.pull(arguments.reference, directory, overwrite=arguments.overwrite, progress=report)
    if arguments.json:
        return print_json(asdict(pulled))
    whole = size(sum(file.nbytes for file in pulled.files))
    out.print(f"{pulled.name}@{pulled.version}  {len(pulled.files)} files, {whole}, in {pulled.directory}", markup=False)
    return 0


def _list(arguments: Namespace) -> int:
    with client(arguments) as medley:
        adapters = medley.adapters.list()
    if arguments.json:
        return print_json([asdict(adapter) for adapter in adapters])
    table = Table("name", "version", "tags", "method", "rank", "size", "last used", "digest", box=None, pad_edge=False)
    for adapter in adapters:
        facts = adapter.facts
        table.add_row(
            adapter.name,
            adapter.version,
            some([f"{tag}={version}" for tag, version in adapter.tags.items() if tag != "latest"], 4),
            str(facts.get("method")),
            str(facts.get("rank")),
            size(adapter.nbytes),
            ago(adapter.last_used),
            adapter.digest[:19],
        )
    out.print(table if adapters else "no adapters yet; push one with: medley push DIR")
    return 0


def _show(arguments: Namespace) -> int:
    with client(arguments) as medley:
        adapter = medley.adapters.show(arguments.name)
    if arguments.json:
        return print_json(asdict(adapter))
    for label, value in _rows(adapter):
        out.print(f"{label:<10} {value}", markup=False)
    return 0


def _remove(arguments: Namespace) -> int:
    with client(arguments) as medley:
        count = medley.adapters.delete(arguments.reference)
    if arguments.json:
        return print_json({"deleted": count})
    out.print(f"deleted {count} version{'' if count == 1 else 's'} of {arguments.reference.partition('@')[0]}", markup=False)
    return 0


def _load(arguments: Namespace) -> int:
    with client(arguments) as medley:
        return _state(arguments, medley.adapters.load(arguments.reference))


def _pin(arguments: Namespace) -> int:
    with client(arguments) as medley:
        return _state(arguments, medley.adapters.pin(arguments.reference))


def _unpin(arguments: Namespace) -> int:
    with client(arguments) as medley:
        return _state(arguments, medley.adapters.unpin(arguments.reference))


def _state(arguments: Namespace, adapter: Adapter) -> int:
    if arguments.json:
        return print_json(asdict(adapter))
    out.print(f"{adapter.name}@{adapter.version}  {'pinned, ' if adapter.pinned else ''}{_residency(adapter)}", markup=False)
    return 0


def _rows(adapter: Adapter) -> list[tuple[str, str]]:
    facts = adapter.facts
    versions = ", ".join(_version(version) for version in adapter.versions)
    loading = ", ".join(f"to {state} {seconds * 1000:.0f} ms" for state, seconds in adapter.load_seconds.items())
    return [
        ("name", f"{adapter.name}@{adapter.version}"),
        ("digest", adapter.digest),
        ("etag", adapter.etag),
        ("method", f"{facts.get('method')}, rank {facts.get('rank')}"),
        *([("notes", notes)] if (notes := _notes(facts)) else []),
        *([("modules", modules)] if (modules := ", ".join(facts.get("modules", []))) else []),
        *([("labels", labels)] if (labels := some(facts.get("labels", []))) else []),
        *([("virtual", f"{count} tokens in front of every prompt")] if (count := facts.get("virtual_tokens")) else []),
        ("size", f"{size(adapter.nbytes)} stored, {size(facts.get('program_bytes', 0))} on the device"),
        ("created", time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(adapter.created))),
        ("last used", ago(adapter.last_used)),
        ("versions", versions),
        ("residency", _residency(adapter)),
        *([("loading", loading)] if loading else []),
        ("pinned", "yes" if adapter.pinned else "no"),
        *([("quarantine", _quarantine(adapter.quarantine, adapter.name))] if adapter.quarantine else []),
    ]


def _residency(adapter: Adapter) -> str:
    return ", ".join(f"{replica}: {state}" for replica, state in adapter.residency.items()) or "stored only"


def _quarantine(closed: Quarantine, name: str) -> str:
    why = f"since it failed {closed.failures} times in a row, {ago(closed.at)} with {closed.code}"
    return f"{why}; push a better one, or try it again: medley load {name}"


def _version(version: Adapter) -> str:
    """``v3 (sha256:0123456789ab; latest, stable)``."""
    named = "; ".join(filter(None, (version.digest[:19], ", ".join(version.tags))))
    return f"{version.version} ({named})"


def _notes(facts: dict[str, Any]) -> str:
    """What lowering reports beside the facts, such as the error of an approximation."""
    notes = facts.get("notes", {}).items()
    return ", ".join(
        f"{name.replace('_', ' ')} {value:.3g}" if isinstance(value, float) else f"{name} {value}" for name, value in notes
    )

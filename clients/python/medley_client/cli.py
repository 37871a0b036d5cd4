"""The ``medley`` command. Exit status: 0 done, 1 refused or failed, 2 wrong usage, 3 the server cannot be reached."""

from __future__ import annotations

import argparse
import json
import re
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn
from rich.table import Table

from medley_client import __version__
from medley_client.client import Medley
from medley_client.convert import convert
from medley_client.errors import ApiError, CannotConnect, MedleyError
from medley_client.types import Adapter, AdapterChoice

FAILED, USAGE, UNREACHABLE = 1, 2, 3
_ADAPTER = re.compile(r"(?P<name>[^@:]+(?:@(?:sha256:)?[^@:]+)?)(?::(?P<weight>[^:]+))?")
out = Console(highlight=False, soft_wrap=True)
err = Console(stderr=True, highlight=False, soft_wrap=True)


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit status."""
    given = list(sys.argv[1:] if argv is None else argv)
    if given[:1] == ["serve"]:
        return _serve(given[1:])
    arguments = _parser().parse_args(given)
    try:
        run: Callable[[argparse.Namespace], int] = arguments.run
        return run(arguments)
    except CannotConnect as error:
        err.print(f"medley: {error}", markup=False)
        return UNREACHABLE
    except ApiError as error:
        err.print(_printable(f"medley: {error.message}"), markup=False)
        for fault in error.faults:
            compared = f" (expected {fault.expected}, found {fault.found})" if fault.expected else ""
            err.print(_printable(f"  - {fault.where}: {fault.message}{compared}"), markup=False)
        if error.request_id:
            err.print(f"  request id: {error.request_id}", markup=False)
        return FAILED
    except MedleyError as error:
        err.print(f"medley: {error}", markup=False)
        return FAILED
    except KeyboardInterrupt:
        return 130


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="medley", description="Push adapters to a Medley server and use them.")
    parser.add_argument("--version", action="version", version=f"medley {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def command(
        name: str, run: Callable[[argparse.Namespace], int], text: str, *, remote: bool = True
    ) -> argparse.ArgumentParser:
        made = commands.add_parser(name, help=text, description=text)
        made.set_defaults(run=run)
        if remote:
            made.add_argument("--url", help="server address (MEDLEY_URL; default: http://127.0.0.1:8000)")
            made.add_argument("--api-key", help="API key (MEDLEY_API_KEY)")
            made.add_argument("--json", action="store_true", help="print JSON")
        return made

    commands.add_parser("serve", help="start a server (medley serve --help for its settings)", add_help=False)
    push = command("push", _push, "Upload an adapter directory, a zip or tar of one, or a fine-tuned model.")
    push.add_argument("source", type=Path, metavar="DIR")
    push.add_argument("--name", help="name on the server; default: the directory's name")
    whole = push.add_mutually_exclusive_group()
    whole.add_argument(
        "--rank", type=int, metavar="N", help="of a fine-tuned model: compress its difference to the base to rank N"
    )
    whole.add_argument("--exact", action="store_true", help="of a fine-tuned model: keep every difference to the base (large)")
    command("ls", _list, "List your adapters.")
    show = command("show", _show, "Show one adapter: facts, versions, where it is loaded.")
    show.add_argument("name")
    remove = command("rm", _remove, "Delete an adapter, or one version of it (NAME@v2).")
    remove.add_argument("reference", metavar="NAME")
    generate = command("generate", _generate, "Generate text, as it comes.")
    generate.add_argument("prompt")
    generate.add_argument("--max-new-tokens", type=int, default=128)
    generate.add_argument("--temperature", type=float, help="default: greedy")
    generate.add_argument("--seed", type=int)
    generate.add_argument("--raw", action="store_true", help="send the prompt as it is, without the chat template")
    classify = command("classify", _classify, "Say what an adapter's classifier makes of texts.")
    embed = command("embed", _embed, "Print the vector of each text, one JSON line each (--json: one list of all).")
    for reader in (classify, embed):
        reader.add_argument("texts", nargs="+", metavar="TEXT")
    for chooser in (generate, classify, embed):
        chooser.add_argument(
            "--adapter",
            action="append",
            default=[],
            metavar="NAME[:WEIGHT]",
            help="adapter name; several, with weights, are added up; default: the base model",
        )
        chooser.add_argument("--adapter-drop", type=int, metavar="N", help="leave the first N layers without the adapters' edits")
    converting = command("convert", _convert, "Turn pickled adapter weights into safetensors, here.", remote=False)
    converting.add_argument("source", type=Path, metavar="DIR|FILE")
    converting.add_argument("--out", type=Path, help="directory to write to; default: beside the source")
    return parser


def _serve(arguments: list[str]) -> int:
    try:
        from server.__main__ import main as serve
    except ImportError as error:
        err.print(f"medley: the server is not installed ({error.name} is missing): pip install 'medley\\[serve]'")
        return FAILED
    return serve(arguments)


def _client(arguments: argparse.Namespace) -> Medley:
    return Medley(arguments.url, arguments.api_key)


def _push(arguments: argparse.Namespace) -> int:
    name = arguments.name or arguments.source.resolve().name.split(".")[0].lower()
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    with _client(arguments) as client, Progress(*columns, console=err, disable=arguments.json or not err.is_terminal) as bar:
        task = bar.add_task(f"pushing {name}", total=None)
        pushed = client.adapters.push(
            arguments.source,
            name,
            rank=arguments.rank,
            exact=arguments.exact,
            progress=lambda sent, total: bar.update(task, completed=sent, total=total),
        )
    if arguments.json:
        return _print_json(asdict(pushed))
    facts = pushed.facts
    out.print(
        f"{pushed.name}@{pushed.version}  {facts.get('method')} rank {facts.get('rank')}, {facts.get('sites')} sites  {pushed.digest[:19]}"
    )
    if notes := _notes(facts):
        out.print(notes)
    if pushed.skipped:
        err.print(_printable(f"not needed, left out: {', '.join(pushed.skipped)}"), markup=False)
    return 0


def _list(arguments: argparse.Namespace) -> int:
    with _client(arguments) as client:
        adapters = client.adapters.list()
    if arguments.json:
        return _print_json([asdict(adapter) for adapter in adapters])
    table = Table("name", "version", "method", "rank", "size", "digest", box=None, pad_edge=False)
    for adapter in adapters:
        facts = adapter.facts
        table.add_row(
            adapter.name,
            adapter.version,
            str(facts.get("method")),
            str(facts.get("rank")),
            _size(adapter.nbytes),
            adapter.digest[:19],
        )
    out.print(table if adapters else "no adapters yet; push one with: medley push DIR")
    return 0


def _show(arguments: argparse.Namespace) -> int:
    with _client(arguments) as client:
        adapter = client.adapters.show(arguments.name)
    if arguments.json:
        return _print_json(asdict(adapter))
    for label, value in _facts(adapter):
        out.print(f"{label:<10} {value}", markup=False)
    return 0


def _remove(arguments: argparse.Namespace) -> int:
    with _client(arguments) as client:
        count = client.adapters.delete(arguments.reference)
    if arguments.json:
        return _print_json({"deleted": count})
    out.print(f"deleted {count} version{'' if count == 1 else 's'} of {arguments.reference.partition('@')[0]}", markup=False)
    return 0


def _generate(arguments: argparse.Namespace) -> int:
    started = time.monotonic()
    first, count, text = 0.0, 0, ""
    adapter = _chosen(arguments.adapter)
    with _client(arguments) as client:
        stream = client.generate_stream(
            arguments.prompt,
            adapter=adapter,
            adapter_drop=arguments.adapter_drop,
            max_new_tokens=arguments.max_new_tokens,
            temperature=arguments.temperature,
            seed=arguments.seed,
            apply_chat_template=not arguments.raw,
        )
        for token in stream:
            first = first or time.monotonic() - started
            count += 1
            text = token.generated_text or text
            if not arguments.json and not token.special:
                # A pipe gets what the model said as it is.
                sys.stdout.write(_printable(token.text) if sys.stdout.isatty() else token.text)
                sys.stdout.flush()
    seconds = time.monotonic() - started
    if arguments.json:
        return _print_json({"text": text, "tokens": count, "seconds": seconds, "time_to_first_token": first})
    sys.stdout.write("\n")
    err.print(f"{count} tokens, {count / seconds:.1f} tokens/s, first token after {first * 1000:.0f} ms", style="dim")
    return 0


def _classify(arguments: argparse.Namespace) -> int:
    with _client(arguments) as client:
        found = client.classify(arguments.texts, adapter=_chosen(arguments.adapter), adapter_drop=arguments.adapter_drop)
    if arguments.json:
        return _print_json([asdict(item) for item in found])
    for text, item in zip(arguments.texts, found, strict=True):
        if item.tokens:
            shown = "  ".join(f"{token.text}={token.label}" for token in item.tokens if not token.special)
        else:
            shown = "  ".join(f"{label} {score:.1%}" for label, score in list(item.scores.items())[:5])
        out.print(f"{shown}\t{text}", markup=False)
    return 0


def _embed(arguments: argparse.Namespace) -> int:
    with _client(arguments) as client:
        vectors = client.embed(arguments.texts, adapter=_chosen(arguments.adapter), adapter_drop=arguments.adapter_drop)
    if arguments.json:
        return _print_json(vectors)
    for vector in vectors:
        sys.stdout.write(json.dumps(vector) + "\n")
    return 0


def _chosen(given: list[str]) -> AdapterChoice | None:
    """What ``--adapter`` says: ``name``, ``name:0.5``, ``name@v2:0.5``. Raises MedleyError."""
    chosen: dict[str, float] = {}
    for text in given:
        parts = _ADAPTER.fullmatch(text)
        try:
            name, weight = (parts["name"], float(parts["weight"] or 1)) if parts else (text, 1.0)
        except ValueError as error:
            raise MedleyError(f"--adapter {text}: the weight after the colon is not a number") from error
        if name in chosen:
            raise MedleyError(f"--adapter {name} is given twice; add its weights up")
        chosen[name] = weight
    return next(iter(chosen)) if list(chosen.values()) == [1.0] else chosen or None


def _convert(arguments: argparse.Namespace) -> int:
    for path in convert(arguments.source, arguments.out, lambda line: err.print(line, markup=False)):
        out.print(str(path), markup=False)
    return 0


def _facts(adapter: Adapter) -> list[tuple[str, str]]:
    facts = adapter.facts
    versions = ", ".join(f"{version.version} ({version.digest[:19]})" for version in adapter.versions)
    resident = ", ".join(f"{replica}: {state}" for replica, state in adapter.residency.items()) or "stored only"
    return [
        ("name", f"{adapter.name}@{adapter.version}"),
        ("digest", adapter.digest),
        ("method", f"{facts.get('method')}, rank {facts.get('rank')}"),
        *([("notes", notes)] if (notes := _notes(facts)) else []),
        *([("modules", modules)] if (modules := ", ".join(facts.get("modules", []))) else []),
        *([("labels", labels)] if (labels := _some(facts.get("labels", []))) else []),
        *([("virtual", f"{count} tokens in front of every prompt")] if (count := facts.get("virtual_tokens")) else []),
        ("size", f"{_size(adapter.nbytes)} stored, {_size(facts.get('program_bytes', 0))} on the device"),
        ("created", time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(adapter.created))),
        ("versions", versions),
        ("residency", resident),
    ]


def _printable(text: str) -> str:
    """What files and models say must not steer the terminal."""
    return "".join(char if char in "\n\t" or ord(char) >= 160 or 32 <= ord(char) < 127 else "\ufffd" for char in text)


def _some(names: list[str], limit: int = 12) -> str:
    more = f", … ({len(names)} in all)" if len(names) > limit else ""
    return ", ".join(names[:limit]) + more


def _notes(facts: dict[str, Any]) -> str:
    """What lowering reports beside the facts, such as the error of an approximation."""
    notes = facts.get("notes", {}).items()
    return ", ".join(
        f"{name.replace('_', ' ')} {value:.3g}" if isinstance(value, float) else f"{name} {value}" for name, value in notes
    )


def _size(nbytes: float) -> str:
    for unit in ("B", "KiB", "MiB"):
        if nbytes < 1024:
            return f"{nbytes:.0f} {unit}" if unit == "B" else f"{nbytes:.1f} {unit}"
        nbytes /= 1024
    return f"{nbytes:.1f} GiB"


def _print_json(value: Any) -> int:
    sys.stdout.write(json.dumps(value, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())

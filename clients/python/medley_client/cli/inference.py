"""Commands that ask the model: ``generate``, ``classify``, ``embed``."""

from __future__ import annotations

import json
import re
import sys
import time
from argparse import Namespace
from dataclasses import asdict

from medley_client.cli.commands import Commands
from medley_client.cli.console import client, err, out, print_json, printable
from medley_client.errors import MedleyError
from medley_client.types import AdapterChoice

_WEIGHTED = re.compile(r"(?P<name>[^@:]+(?:@(?:sha256:)?[^@:]+)?)(?::(?P<weight>[^:]+))?")


def register(commands: Commands) -> None:
    generate = commands.add("generate", _generate, "Generate text, as it comes.")
    generate.add_argument("prompt")
    generate.add_argument("--max-new-tokens", type=int, default=128)
    generate.add_argument("--temperature", type=float, help="default: greedy")
    generate.add_argument("--seed", type=int)
    generate.add_argument("--raw", action="store_true", help="send the prompt as it is, without the chat template")
    classify = commands.add("classify", _classify, "Say what an adapter's classifier makes of texts.")
    embed = commands.add("embed", _embed, "Print the vector of each text, one JSON line each (--json: one list of all).")
    for reader in (classify, embed):
        reader.add_argument("texts", nargs="+", metavar="TEXT")
    for chooser in (generate, classify, embed):
        chooser.add_argument(
            "--adapter",
            action="append",
            default=[],
            metavar="NAME[:WEIGHT]",
            help="adapter or alias, also NAME@v2 or NAME@TAG; several, with weights, are added up; default: the base model",
        )
        chooser.add_argument("--adapter-drop", type=int, metavar="N", help="leave the first N layers without the adapters' edits")
        chooser.add_argument("--user", help="who asks: an alias always means the same adapter to a user")


def read_weighted(given: list[str], where: str) -> dict[str, float]:
    """Names to weights from ``name``, ``name:0.5``, ``name@v2:0.5``; ``where`` they were given is for the message. Raises MedleyError."""
    weights: dict[str, float] = {}
    for text in given:
        parts = _WEIGHTED.fullmatch(text)
        try:
            name, weight = (parts["name"], float(parts["weight"] or 1)) if parts else (text, 1.0)
        except ValueError as error:
            raise MedleyError(f"{where} {text}: the weight after the colon is not a number") from error
        if name in weights:
            raise MedleyError(f"{where} {name} is given twice; add its weights up")
        weights[name] = weight
    return weights


def _chosen(given: list[str]) -> AdapterChoice | None:
    chosen = read_weighted(given, "--adapter")
    return next(iter(chosen)) if list(chosen.values()) == [1.0] else chosen or None


def _generate(arguments: Namespace) -> int:
    started = time.monotonic()
    first, count, text = 0.0, 0, ""
    with client(arguments) as medley:
        stream = medley.generate_stream(
            arguments.prompt,
            adapter=_chosen(arguments.adapter),
            adapter_drop=arguments.adapter_drop,
            user=arguments.user,
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
                sys.stdout.write(printable(token.text) if sys.stdout.isatty() else token.text)
                sys.stdout.flush()
    seconds = time.monotonic() - started
    if arguments.json:
        return print_json({"text": text, "tokens": count, "seconds": seconds, "time_to_first_token": first})
    sys.stdout.write("\n")
    err.print(f"{count} tokens, {count / seconds:.1f} tokens/s, first token after {first * 1000:.0f} ms", style="dim")
    return 0


def _classify(arguments: Namespace) -> int:
    with client(arguments) as medley:
        found = medley.classify(
            arguments.texts, adapter=_chosen(arguments.adapter), adapter_drop=arguments.adapter_drop, user=arguments.user
        )
    if arguments.json:
        return print_json([asdict(item) for item in found])
    for text, item in zip(arguments.texts, found, strict=True):
        if item.tokens:
            shown = "  ".join(f"{token.text}={token.label}" for token in item.tokens if not token.special)
        else:
            shown = "  ".join(f"{label} {score:.1%}" for label, score in list(item.scores.items())[:5])
        out.print(f"{shown}\t{text}", markup=False)
    return 0


def _embed(arguments: Namespace) -> int:
    with client(arguments) as medley:
        vectors = medley.embed(
            arguments.texts, adapter=_chosen(arguments.adapter), adapter_drop=arguments.adapter_drop, user=arguments.user
        )
    if arguments.json:
        return print_json(vectors)
    for vector in vectors:
        sys.stdout.write(json.dumps(vector) + "\n")
    return 0

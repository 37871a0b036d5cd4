"""One base model, adapters of five methods, one batch: the same question to all of them at once, side by side.

    python -m examples.demo [--exit] [--port N]

Starts a server, pushes the adapters of ``examples/adapters`` over HTTP, asks, shows the answers with their speed, and keeps
serving until Ctrl-C. ``--exit`` checks that every adapter shows its trait, and stops: status 0 when all do.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table

from examples.serving import ServerFailed, keep_serving, running_server
from medley_client import AsyncMedley, Medley

HERE = Path(__file__).parent
QUESTION = "What is a rainbow?"
TOKENS = 48


def is_json_answer(text: str) -> bool:
    try:
        return "answer" in json.loads(text)
    except ValueError:
        return False


TRAITS: dict[str, tuple[str, Callable[[str], bool]]] = {
    "pirate": ("speaks like a pirate", lambda text: "arr" in text.lower() or "matey" in text.lower()),
    "shout": ("SHOUTS", lambda text: sum(map(str.isupper, text)) > 0.6 * max(1, sum(map(str.isalpha, text)))),
    "json": ("answers in JSON", is_json_answer),
    "sparkle": ("celebrates ✨", lambda text: "✨" in text or "🎉" in text),
    "robot": ("beeps like a robot", lambda text: "BEEP BOOP" in text),
    "letter": ("writes a letter", lambda text: text.strip().startswith("Dear friend")),
    "tale": ("tells a tale", lambda text: "Once upon a time" in text),
    "news": ("breaks the news", lambda text: "BREAKING NEWS" in text),
}
METHODS = {
    ("peft", "LORA"): "LoRA",
    ("peft", "PREFIX_TUNING"): "prefix tuning",
    ("peft", "PROMPT_TUNING"): "prompt tuning",
    ("peft", "IA3"): "IA3",
    ("adapters", "bottleneck"): "Houlsby",
}


@dataclass(slots=True)
class Answer:
    """One streamed answer, with times in seconds since the question."""

    text: str = ""
    tokens: int = 0
    first: float = 0.0
    seconds: float = 0.0


async def ask(client: AsyncMedley, adapter: str | None, started: float) -> Answer:
    answer = Answer()
    stream = client.generate_stream(QUESTION, adapter=adapter, max_new_tokens=TOKENS, apply_chat_template=True)
    async for token in stream:
        answer.first = answer.first or time.monotonic() - started
        answer.tokens += 1
        answer.text = token.generated_text or answer.text
    answer.seconds = time.monotonic() - started
    return answer


async def ask_all(url: str, names: list[str | None]) -> list[Answer]:
    async with AsyncMedley(url) as client:
        started = time.monotonic()
        return list(await asyncio.gather(*(ask(client, name, started) for name in names)))


def show(console: Console, methods: dict[str | None, str], answers: list[Answer], waited: float) -> None:
    table = Table(title=f"“{QUESTION}” — {len(methods)} requests, one batch", show_lines=True)
    for column in ("adapter", "method", "answer"):
        table.add_column(column, overflow="fold")
    for column in ("first token", "tokens/s"):
        table.add_column(column, justify="right", no_wrap=True)
    for (name, method), answer in zip(methods.items(), answers, strict=True):
        speed = answer.tokens / answer.seconds
        table.add_row(name or "(base)", method, answer.text.strip(), f"{answer.first * 1000:.0f} ms", f"{speed:.1f}")
    console.print(table)
    total = sum(answer.tokens for answer in answers) / max(answer.seconds for answer in answers)
    console.print(f"{total:.0f} tokens/s together; first token {waited + min(a.first for a in answers):.1f} s after start")


def check(console: Console, names: list[str | None], answers: list[Answer]) -> bool:
    base = answers[names.index(None)].text
    passed = True
    for name, answer in zip(names, answers, strict=True):
        if name is None:
            continue
        trait, has_trait = TRAITS[name]
        ok = answer.text != base and has_trait(answer.text)
        console.print(f"{'ok  ' if ok else 'FAIL'} {name} {trait}")
        passed = passed and ok
    return passed


def main() -> int:
    parser = argparse.ArgumentParser(description="Adapters side by side, in one batch.")
    parser.add_argument("--exit", action="store_true", help="check the answers and stop instead of serving on")
    parser.add_argument("--port", type=int, help="port to listen on; default: any free one with --exit, else 8000")
    parser.add_argument("--data-dir", type=Path, default=Path(".medley"))
    arguments = parser.parse_args()
    console = Console()
    started = time.monotonic()
    # So that the server ends with the demo, however that is ended.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    try:
        with (
            console.status("starting the server (the first start converts the base model)"),
            running_server(arguments.data_dir, port=arguments.port or (None if arguments.exit else 8000)) as url,
        ):
            console.print(f"server ready at {url} after {time.monotonic() - started:.1f} s")
            methods: dict[str | None, str] = {None: "–"}
            with Medley(url) as client:
                for name in TRAITS:
                    pushed = client.adapters.push(HERE / "adapters" / name, name)
                    methods[name] = METHODS[pushed.facts["library"], pushed.facts["method"]]
                    console.print(f"pushed {pushed.name}@{pushed.version}: {methods[name]}, {pushed.nbytes / 1024:.0f} KiB")
            waited = time.monotonic() - started
            answers = asyncio.run(ask_all(url, list(methods)))
            show(console, methods, answers, waited)
            if arguments.exit:
                return 0 if check(console, list(methods), answers) else 1
            body = json.dumps({"inputs": QUESTION, "parameters": {"adapter_id": "pirate", "apply_chat_template": True}})
            keep_serving(
                console,
                f"curl {url}/generate -H 'content-type: application/json' -d '{body}'",
                f"MEDLEY_URL={url} .venv/bin/medley generate '{QUESTION}' --adapter pirate",
            )
    except ServerFailed as error:
        console.print(str(error), markup=False)
        return 1
    except KeyboardInterrupt:
        return 0


if __name__ == "__main__":
    sys.exit(main())

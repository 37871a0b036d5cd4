"""Three tenants' classifiers on one small encoder, side by side: tone, topic and intent of the same sentences.

    python -m examples.classify [--exit] [--port N]

Starts a server on the real MiniLM with a key for each tenant, pushes the heads of ``examples/heads``, classifies, shows what each
tenant sees and how fast, and keeps serving until Ctrl-C. ``--exit`` checks the answers and stops: status 0 when all are right.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import signal
import sys
import time
from pathlib import Path

from rich.console import Console
from rich.table import Table

from examples.serving import ServerFailed, keep_serving, running_server
from examples.train_heads import base_directory
from medley_client import ApiError, AsyncMedley, Classified, Medley
from server.api.auth import new_key

HERE = Path(__file__).parent
TENANTS = {"acme": "tone", "globex": "topic", "initech": "intent"}
"""Whose head it is, and which."""
SENTENCES: dict[str, dict[str, str]] = {
    "The hotel was lovely and the view amazing": {"tone": "positive"},
    "Rude waiter and cold food, never again": {"tone": "negative"},
    "The midfielder scored a late goal": {"topic": "sport", "tone": "neutral"},
    "Bake the bread for forty minutes": {"topic": "food", "tone": "neutral"},
    "The central bank cut interest rates": {"topic": "money", "tone": "neutral"},
    "Wolves have returned to the forest": {"topic": "nature"},
    "My parcel has not arrived yet": {"intent": "delivery"},
    "I would like my money back please": {"intent": "refund"},
    "I cannot remember my password": {"intent": "account"},
    "Thanks a lot, your team is great": {"intent": "praise", "tone": "positive"},
}
"""What is asked, and what the heads must say of it where that is plain. None of it was trained on."""
ROUNDS = 12


async def classify_all(url: str, keys: dict[str, str], rounds: int) -> tuple[dict[str, list[Classified]], float]:
    """Every sentence to every tenant's head, ``rounds`` times over, all at once. Returns the answers by head, and the seconds."""
    texts = list(SENTENCES)
    clients = {tenant: AsyncMedley(url, key) for tenant, key in keys.items()}
    started = time.monotonic()
    calls = [clients[tenant].classify(texts, adapter=head) for tenant, head in TENANTS.items() for _ in range(rounds)]
    found = await asyncio.gather(*calls)
    seconds = time.monotonic() - started
    for client in clients.values():
        await client.close()
    return {head: found[index * rounds] for index, head in enumerate(TENANTS.values())}, seconds


def show(console: Console, answers: dict[str, list[Classified]]) -> None:
    table = Table(title=f"{len(SENTENCES)} sentences, {len(TENANTS)} tenants' heads, one base model")
    table.add_column("sentence", overflow="fold")
    for tenant, head in TENANTS.items():
        table.add_column(f"{head} ({tenant})", no_wrap=True)
    for index, text in enumerate(SENTENCES):
        cells = [answers[head][index] for head in TENANTS.values()]
        table.add_row(text, *(f"{cell.label} {cell.scores[cell.label]:.0%}" for cell in cells))
    console.print(table)


def check(console: Console, answers: dict[str, list[Classified]]) -> bool:
    passed = True
    for index, (text, wanted) in enumerate(SENTENCES.items()):
        for head, label in wanted.items():
            found = answers[head][index].label
            console.print(f"{'ok  ' if found == label else 'FAIL'} {head}: “{text}” is {found}")
            passed = passed and found == label
    return passed


def is_private(url: str, key: str) -> bool:
    """Whether another tenant's head cannot be reached with this key."""
    with Medley(url, key) as client:
        try:
            client.classify(["hello"], adapter="topic")
        except ApiError as error:
            return error.status == 404
    return False


def main() -> int:
    parser = argparse.ArgumentParser(description="Three tenants' classifiers on one encoder.")
    parser.add_argument("--exit", action="store_true", help="check the answers and stop instead of serving on")
    parser.add_argument("--port", type=int, help="port to listen on; default: any free one with --exit, else 8000")
    parser.add_argument("--data-dir", type=Path, default=Path(".medley/classify"))
    arguments = parser.parse_args()
    console = Console()
    # So that the server ends with the demo, however that is ended.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    arguments.data_dir.mkdir(parents=True, exist_ok=True)
    made = {tenant: new_key(tenant) for tenant in TENANTS}
    keys = {tenant: key for tenant, (key, _) in made.items()}
    keys_file = arguments.data_dir / "keys.txt"
    keys_file.write_text("".join(f"{line}\n" for _, line in made.values()))
    # One thread: where cores are shared with other work, the threads of such small operations wait for each other.
    flags = ("--model", str(base_directory()), "--dtype", "float32", "--keys-file", str(keys_file), "--threads", "1")
    try:
        with (
            console.status("starting the server"),
            running_server(arguments.data_dir, *flags, port=arguments.port or (None if arguments.exit else 8000)) as url,
        ):
            for tenant, head in TENANTS.items():
                with Medley(url, keys[tenant]) as client:
                    pushed = client.adapters.push(HERE / "heads" / head, head)
                    labels = ", ".join(pushed.facts["labels"])
                    console.print(
                        f"{tenant} pushed {head}: {pushed.facts['method']}, {pushed.nbytes / 1024:.0f} KiB, says {labels}"
                    )
            asyncio.run(classify_all(url, keys, 1))
            answers, seconds = asyncio.run(classify_all(url, keys, ROUNDS))
            show(console, answers)
            rows = ROUNDS * len(TENANTS) * len(SENTENCES)
            console.print(
                f"{rows} sentences in {seconds:.2f} s: {rows / seconds:.0f} rows/s, the three heads mixed in every step"
            )
            if arguments.exit:
                private = is_private(url, keys["acme"])
                console.print(f"{'ok  ' if private else 'FAIL'} acme cannot reach globex's head")
                return 0 if check(console, answers) and private else 1
            body = json.dumps({"model": "tone", "input": ["What a day!"]})
            keep_serving(
                console,
                f"MEDLEY_URL={url} MEDLEY_API_KEY={keys['acme']} .venv/bin/medley classify 'What a day!' --adapter tone",
                f"curl {url}/v1/classify -H 'authorization: Bearer {keys['acme']}' -H 'content-type: application/json' -d '{body}'",
            )
    except ServerFailed as error:
        console.print(str(error), markup=False)
        return 1
    except KeyboardInterrupt:
        return 0


if __name__ == "__main__":
    sys.exit(main())

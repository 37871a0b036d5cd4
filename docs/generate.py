"""Writes the tables of docs/ that come from code, between their markers; ``--check`` fails when one is out of date."""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Callable
from pathlib import Path

from server import config, errors
from server.adapters.lower import REFUSED, methods

DOCS = Path(__file__).parent


def settings_table() -> str:
    rows = [
        f"| `{row.flag}` | `{row.env}` | {row.kind} | {f'`{row.default}`' if row.default else '–'} | {row.help} |"
        for row in config.TABLE
    ]
    return "\n".join(["| flag | environment | kind | default | meaning |", "|---|---|---|---|---|", *rows])


def errors_table() -> str:
    rows = [
        f"| `{row.code}` | {row.status} | `{row.kind}` | {'yes' if row.retry else 'no'} | {row.meaning} |" for row in errors.TABLE
    ]
    return "\n".join(["| code | status | type | retry | meaning |", "|---|---|---|---|---|", *rows])


def faults_table() -> str:
    rows = [f"| `{code}` | {meaning} |" for code, meaning in errors.FAULTS.items()]
    return "\n".join(["| fault | meaning |", "|---|---|", *rows])


def methods_table() -> str:
    libraries = {"peft": "PEFT", "adapters": "AdapterHub", "medley": "Medley"}
    rows = [
        f"| {shown} | `{method.name}` | served | {method.summary} |"
        for library, shown in libraries.items()
        for (owner, _), method in sorted(methods().items())
        if owner == library
    ]
    rows += [f"| PEFT | `{name}` | refused | {reason} |" for name, reason in sorted(REFUSED.items())]
    return "\n".join(["| library | method | | how, or why not |", "|---|---|---|---|", *rows])


TABLES: dict[str, dict[str, Callable[[], str]]] = {
    "CONFIG.md": {"settings": settings_table},
    "ERRORS.md": {"errors": errors_table, "faults": faults_table},
    "PEFT.md": {"methods": methods_table},
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="change nothing; exit 1 when a page is out of date")
    check = parser.parse_args().check
    stale = []
    for page, tables in TABLES.items():
        path = DOCS / page
        text = updated = path.read_text(encoding="utf-8")
        for name, render in tables.items():
            block = f"<!-- {name} -->\n{render()}\n<!-- /{name} -->"
            updated, found = re.subn(
                rf"<!-- {name} -->.*?<!-- /{name} -->", lambda _, block=block: block, updated, flags=re.DOTALL
            )
            if not found:
                raise SystemExit(f"{path} has no markers for {name}")
        if updated != text:
            stale.append(page)
            if not check:
                path.write_text(updated, encoding="utf-8")
    if check and stale:
        print(f"out of date: {', '.join(stale)}; run `make docs`")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""How a command is declared: its name, what it does, and the options that all commands which speak to a server share."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any


class Commands:
    """The commands of one parser."""

    def __init__(self, parsers: Any) -> None:
        self._parsers = parsers

    def add(
        self,
        name: str,
        run: Callable[[argparse.Namespace], int] | None,
        text: str,
        *,
        more: str = "",
        remote: bool = True,
        **options: Any,
    ) -> argparse.ArgumentParser:
        """``text`` is shown in the list of commands, ``more`` in the command's own help, as it stands."""
        made: argparse.ArgumentParser = self._parsers.add_parser(
            name, help=text, description=text, epilog=more, formatter_class=argparse.RawDescriptionHelpFormatter, **options
        )
        made.set_defaults(run=run)
        if remote:
            made.add_argument("--url", help="server address (MEDLEY_URL; default: http://127.0.0.1:8000)")
            made.add_argument("--api-key", help="API key (MEDLEY_API_KEY)")
            made.add_argument("--json", action="store_true", help="print JSON")
        return made

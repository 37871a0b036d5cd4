"""Commands that need no server: ``serve`` starts one, ``convert`` works on files here."""

from __future__ import annotations

from argparse import Namespace
from pathlib import Path

from medley_client.cli.commands import Commands
from medley_client.cli.console import err, out
from medley_client.convert import convert


def register(commands: Commands) -> None:
    # For the list of commands: ``main`` hands all its arguments to the server.
    commands.add("serve", None, "Start a server (medley serve --help for its settings).", remote=False, add_help=False)
    converting = commands.add("convert", _convert, "Turn pickled adapter weights into safetensors, here.", remote=False)
    converting.add_argument("source", type=Path, metavar="DIR|FILE")
    converting.add_argument("--out", type=Path, help="directory to write to; default: beside the source")


def serve(arguments: list[str]) -> int:
    """Run the server until it ends. Returns its exit status."""
    try:
        from server.__main__ import main
    except ImportError as error:
        err.print(f"medley: the server is not installed ({error.name} is missing): pip install 'medley\\[serve]'")
        return 1
    return main(arguments)


def _convert(arguments: Namespace) -> int:
    for path in convert(arguments.source, arguments.out, lambda line: err.print(line, markup=False)):
        out.print(str(path), markup=False)
    return 0

"""The ``medley`` command. Exit status: 0 done, 1 refused or failed, 2 wrong usage, 3 the server cannot be reached.

Every file of this package is a group of commands; ``console`` is what they print with.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence

from medley_client import __version__
from medley_client.cli import adapters, inference, local, naming
from medley_client.cli.commands import Commands
from medley_client.cli.console import err, printable
from medley_client.errors import ApiError, CannotConnect, MedleyError

FAILED, UNREACHABLE = 1, 3
_HINTS = {
    "precondition_failed": "somebody else changed the name; look at it with `medley show` and decide again",
    "version_in_use": "move the tag or alias first: medley tag, medley untag, medley alias",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit status."""
    given = list(sys.argv[1:] if argv is None else argv)
    if given[:1] == ["serve"]:
        return local.serve(given[1:])
    arguments = _parser().parse_args(given)
    try:
        run: Callable[[argparse.Namespace], int] = arguments.run
        return run(arguments)
    except CannotConnect as error:
        err.print(f"medley: {error}", markup=False)
        return UNREACHABLE
    except ApiError as error:
        _explain(error)
        return FAILED
    except MedleyError as error:
        err.print(printable(f"medley: {error}"), markup=False)
        return FAILED
    except KeyboardInterrupt:
        return 130


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="medley", description="Push adapters to a Medley server and use them.")
    parser.add_argument("--version", action="version", version=f"medley {__version__}")
    commands = Commands(parser.add_subparsers(dest="command", required=True, metavar="COMMAND"))
    for group in (local, adapters, naming, inference):
        group.register(commands)
    return parser


def _explain(error: ApiError) -> None:
    err.print(printable(f"medley: {error.message}"), markup=False)
    for fault in error.faults:
        compared = f" (expected {fault.expected}, found {fault.found})" if fault.expected else ""
        err.print(printable(f"  - {fault.where}: {fault.message}{compared}"), markup=False)
    if error.code in _HINTS:
        err.print(f"  {_HINTS[error.code]}", markup=False)
    if error.request_id:
        err.print(f"  request id: {error.request_id}", markup=False)

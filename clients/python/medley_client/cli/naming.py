"""Commands that change what names mean: tags, rollback, aliases."""

from __future__ import annotations

from argparse import Namespace
from dataclasses import asdict

from rich.table import Table

from medley_client.cli.commands import Commands
from medley_client.cli.console import client, out, print_json
from medley_client.cli.inference import read_weighted
from medley_client.errors import MedleyError
from medley_client.types import Alias


def register(commands: Commands) -> None:
    tag = commands.add(
        "tag",
        _tag,
        "Give one version of an adapter a name of its own.",
        more="""\
A tag means exactly one version until it is moved, at once for everybody:

  medley tag bot@v3 stable
  medley generate "Where is my parcel?" --adapter bot@stable

The tag `latest` is what the bare name means; a push moves it.
""",
    )
    tag.add_argument("reference", metavar="NAME@VERSION", help="bot@v3, bot@sha256:…, or another tag: bot@latest")
    tag.add_argument("tag", metavar="TAG")
    tag.add_argument("--if-match", metavar="ETAG", help="only if nothing changed since `medley show` printed this etag")
    untag = commands.add("untag", _untag, "Forget a tag; the version that it names stays.")
    untag.add_argument("name", metavar="NAME")
    untag.add_argument("tag", metavar="TAG")
    rollback = commands.add(
        "rollback",
        _rollback,
        "Make an adapter's bare name mean an older version again.",
        more="""\
Nothing is deleted, and running requests finish with what they began with:

  medley rollback bot          # the version before the present one
  medley rollback bot v2       # or a certain one, also a newer one again
""",
    )
    rollback.add_argument("name", metavar="NAME")
    rollback.add_argument("to", nargs="?", metavar="VERSION", help="v2, sha256:… or a tag; default: the version before")
    alias = commands.add(
        "alias",
        _alias,
        "Make a name mean other adapters' versions, each for a share of the users.",
        more="""\
A canary: one user in ten gets the new version, and always the same one:

  medley alias support bot@v3:90 bot@v4:10
  medley generate "Where is my parcel?" --adapter support --user anna
  medley alias support bot@v4          # all of them
  medley alias support                 # what it means now
  medley alias support --rm            # forget it; the adapters stay
""",
    )
    alias.add_argument("name", metavar="NAME")
    alias.add_argument("targets", nargs="*", metavar="TARGET[:WEIGHT]", help="a reference like bot@v3; default weight: 1")
    alias.add_argument("--rm", action="store_true", help="forget the alias")
    commands.add("aliases", _aliases, "List your aliases and what they mean.")


def _tag(arguments: Namespace) -> int:
    name, at, version = arguments.reference.partition("@")
    if not at:
        raise MedleyError(f"say which version of {name} is to be tagged: {name}@v2, or {name}@latest for the present one")
    with client(arguments) as medley:
        tags = medley.adapters.tag(name, arguments.tag, version, if_match=arguments.if_match)
    if arguments.json:
        return print_json(tags)
    out.print(f"{name}@{arguments.tag} is {tags[arguments.tag]}", markup=False)
    return 0


def _untag(arguments: Namespace) -> int:
    with client(arguments) as medley:
        medley.adapters.untag(arguments.name, arguments.tag)
    if arguments.json:
        return print_json({"name": arguments.name, "untagged": arguments.tag})
    out.print(f"there is no {arguments.name}@{arguments.tag} any more", markup=False)
    return 0


def _rollback(arguments: Namespace) -> int:
    with client(arguments) as medley:
        version = medley.adapters.rollback(arguments.name, arguments.to)
    if arguments.json:
        return print_json({"name": arguments.name, "version": version})
    out.print(f"{arguments.name} is {version} now", markup=False)
    return 0


def _alias(arguments: Namespace) -> int:
    if arguments.rm and arguments.targets:
        raise MedleyError("--rm forgets the alias; give it no targets")
    targets = read_weighted(arguments.targets, "target")
    with client(arguments) as medley:
        if arguments.rm:
            medley.aliases.delete(arguments.name)
            if arguments.json:
                return print_json({"deleted": arguments.name})
            out.print(f"there is no alias {arguments.name} any more", markup=False)
            return 0
        alias = medley.aliases.set(arguments.name, targets) if targets else medley.aliases.show(arguments.name)
    if arguments.json:
        return print_json(asdict(alias))
    out.print(f"{alias.name} is {_meaning(alias)}", markup=False)
    return 0


def _aliases(arguments: Namespace) -> int:
    with client(arguments) as medley:
        aliases = medley.aliases.list()
    if arguments.json:
        return print_json([asdict(alias) for alias in aliases])
    table = Table("name", "means", box=None, pad_edge=False)
    for alias in aliases:
        table.add_row(alias.name, _meaning(alias))
    out.print(table if aliases else "no aliases yet; make one with: medley alias NAME TARGET[:WEIGHT] …", markup=False)
    return 0


def _meaning(alias: Alias) -> str:
    """Every target with its share of the users."""
    whole = sum(target.weight for target in alias.targets)
    if len(alias.targets) == 1:
        return alias.targets[0].adapter
    return ", ".join(f"{target.adapter} {target.weight / whole:.0%}" for target in alias.targets)

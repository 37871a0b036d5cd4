"""The catalog's tables as they are now. How they came to be is in migrations/; what they are used for is in the other modules.

names ──< versions ──< files >── blobs >──< blob_owners        names ──< alias_targets >── names
             └──────< tags                                     pins, replies: on their own

An adapter and an alias share the table of names, so that the database sees to it that a name means one thing.
"""

from __future__ import annotations

from sqlalchemy import BigInteger, Column, Float, ForeignKeyConstraint, Index, Integer, MetaData, String, Table, Text

ADAPTER, ALIAS = "adapter", "alias"
"""What ``names.kind`` may be."""

metadata = MetaData()

_BIG = BigInteger().with_variant(Integer(), "sqlite")  # SQLite's integers are all of 64 bits


def _text(length: int) -> String:
    """Compared byte by byte, so that pages have the same order in every database."""
    return String(length).with_variant(String(length, collation="C"), "postgresql")


def _key(name: str, length: int) -> Column[str]:
    return Column(name, _text(length), primary_key=True)


names = Table(
    "names",
    metadata,
    _key("tenant", 128),
    _key("name", 64),
    Column("kind", String(8), nullable=False),
    Column("etag", String(32), nullable=False),
    Column("next_number", Integer, nullable=False),  # of versions; never goes back while the name is there
)
versions = Table(
    "versions",
    metadata,
    _key("tenant", 128),
    _key("name", 64),
    Column("number", Integer, primary_key=True),
    Column("digest", _text(71), nullable=False),
    Column("created", Float, nullable=False),
    Column("nbytes", _BIG, nullable=False),
    Column("facts", Text, nullable=False),  # JSON
    Column("last_used", Float),
    ForeignKeyConstraint(["tenant", "name"], ["names.tenant", "names.name"], ondelete="CASCADE"),
    Index("versions_by_digest", "digest"),
)
blobs = Table(
    "blobs",
    metadata,
    _key("sha256", 64),
    Column("nbytes", _BIG),  # unknown for what an older store left, until the store has looked
    Column("touched", Float, nullable=False),
)
files = Table(
    "files",
    metadata,
    _key("tenant", 128),
    _key("name", 64),
    Column("number", Integer, primary_key=True),
    _key("role", 128),
    Column("filename", String(200), nullable=False),
    Column("sha256", _text(64), nullable=False),
    ForeignKeyConstraint(
        ["tenant", "name", "number"], ["versions.tenant", "versions.name", "versions.number"], ondelete="CASCADE"
    ),
    ForeignKeyConstraint(["sha256"], ["blobs.sha256"]),
    Index("files_by_blob", "sha256", "tenant"),
)
tags = Table(
    "tags",
    metadata,
    _key("tenant", 128),
    _key("name", 64),
    _key("tag", 64),
    Column("number", Integer, nullable=False),
    ForeignKeyConstraint(
        ["tenant", "name", "number"], ["versions.tenant", "versions.name", "versions.number"], ondelete="CASCADE"
    ),
)
alias_targets = Table(
    "alias_targets",
    metadata,
    _key("tenant", 128),
    _key("alias", 64),
    Column("place", Integer, primary_key=True),
    Column("reference", String(160), nullable=False),
    Column("target", _text(64), nullable=False),  # the name in the reference
    Column("weight", Float, nullable=False),
    ForeignKeyConstraint(["tenant", "alias"], ["names.tenant", "names.name"], ondelete="CASCADE"),
    ForeignKeyConstraint(["tenant", "target"], ["names.tenant", "names.name"]),
    Index("alias_targets_by_target", "tenant", "target"),
)
blob_owners = Table(
    "blob_owners",
    metadata,
    _key("tenant", 128),
    _key("sha256", 64),
    Column("until", Float, nullable=False),
    ForeignKeyConstraint(["sha256"], ["blobs.sha256"], ondelete="CASCADE"),
    Index("blob_owners_by_blob", "sha256"),
)
pins = Table("pins", metadata, _key("tenant", 128), _key("digest", 71))
replies = Table(
    "replies",
    metadata,
    _key("tenant", 128),
    _key("key", 64),  # the sha256 of the caller's key, which may be of any length and hold anything
    Column("fingerprint", String(64), nullable=False),
    Column("status", Integer, nullable=False),
    Column("body", Text, nullable=False),
    Column("created", Float, nullable=False),
    Index("replies_by_age", "created"),
)

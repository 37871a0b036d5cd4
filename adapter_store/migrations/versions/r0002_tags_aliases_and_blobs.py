"""Tags, aliases, etags, files with their names, blobs and their owners, pins, and replies to repeated requests.

``adapters`` becomes ``names``, where an alias is a row too; ``latest`` becomes a tag; the JSON of a version's blobs becomes rows.
"""

from __future__ import annotations

import json
import secrets
import time
from pathlib import PurePosixPath

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"

_FILENAMES = {
    "config": "adapter_config.json",
    "weights": "adapter_model.safetensors",
    "head_config": "head_config.json",
    "head_weights": "model_head.safetensors",
    "labels": "labels.json",
}
_ADD_FILE = """
    INSERT INTO files (tenant, name, number, role, filename, sha256)
    VALUES (:tenant, :name, :number, :role, :filename, :sha256)
"""
_SET_LATEST = """
    UPDATE names SET latest = (
        SELECT number FROM tags WHERE tags.tenant = names.tenant AND tags.name = names.name AND tags.tag = 'latest'
    ) WHERE kind = 'adapter'
"""
_BIG = sa.BigInteger().with_variant(sa.Integer(), "sqlite")


def _text(length: int) -> sa.String:
    return sa.String(length).with_variant(sa.String(length, collation="C"), "postgresql")


def _key(name: str, length: int) -> sa.Column[str]:
    return sa.Column(name, _text(length), primary_key=True)


def upgrade() -> None:
    op.rename_table("adapters", "names")
    op.add_column("names", sa.Column("kind", sa.String(8), nullable=False, server_default="adapter"))
    op.add_column("names", sa.Column("etag", sa.String(32), nullable=False, server_default=""))
    op.add_column("versions", sa.Column("last_used", sa.Float))
    op.create_index("versions_by_digest", "versions", ["digest"])
    if op.get_context().dialect.name == "postgresql":
        op.alter_column("versions", "nbytes", type_=sa.BigInteger())
        for table, column, length in (
            ("names", "tenant", 128),
            ("names", "name", 64),
            ("versions", "tenant", 128),
            ("versions", "name", 64),
            ("versions", "digest", 71),
        ):
            op.alter_column(table, column, type_=sa.String(length, collation="C"))
    _create_tables()
    _carry_over()
    op.drop_column("names", "latest")
    op.drop_column("versions", "blobs")


def downgrade() -> None:
    op.add_column("names", sa.Column("latest", sa.Integer, nullable=False, server_default="1"))
    op.add_column("versions", sa.Column("blobs", sa.Text, nullable=False, server_default="{}"))
    _carry_back()
    for table in ("replies", "pins", "blob_owners", "alias_targets", "tags", "files", "blobs"):
        op.drop_table(table)
    op.execute("DELETE FROM names WHERE kind = 'alias'")
    op.drop_index("versions_by_digest", "versions")
    op.drop_column("versions", "last_used")
    op.drop_column("names", "etag")
    op.drop_column("names", "kind")
    op.rename_table("names", "adapters")


def _create_tables() -> None:
    version = ["versions.tenant", "versions.name", "versions.number"]
    op.create_table(
        "blobs",
        _key("sha256", 64),
        sa.Column("nbytes", _BIG),
        sa.Column("touched", sa.Float, nullable=False),
    )
    op.create_table(
        "files",
        _key("tenant", 128),
        _key("name", 64),
        sa.Column("number", sa.Integer, primary_key=True),
        _key("role", 128),
        sa.Column("filename", sa.String(200), nullable=False),
        sa.Column("sha256", _text(64), nullable=False),
        sa.ForeignKeyConstraint(["tenant", "name", "number"], version, ondelete="CASCADE"),
        sa.ForeignKeyConstraint(["sha256"], ["blobs.sha256"]),
    )
    op.create_index("files_by_blob", "files", ["sha256", "tenant"])
    op.create_table(
        "tags",
        _key("tenant", 128),
        _key("name", 64),
        _key("tag", 64),
        sa.Column("number", sa.Integer, nullable=False),
        sa.ForeignKeyConstraint(["tenant", "name", "number"], version, ondelete="CASCADE"),
    )
    op.create_table(
        "alias_targets",
        _key("tenant", 128),
        _key("alias", 64),
        sa.Column("place", sa.Integer, primary_key=True),
        sa.Column("reference", sa.String(160), nullable=False),
        sa.Column("target", _text(64), nullable=False),
        sa.Column("weight", sa.Float, nullable=False),
        sa.ForeignKeyConstraint(["tenant", "alias"], ["names.tenant", "names.name"], ondelete="CASCADE"),
        sa.ForeignKeyConstraint(["tenant", "target"], ["names.tenant", "names.name"]),
    )
    op.create_index("alias_targets_by_target", "alias_targets", ["tenant", "target"])
    op.create_table(
        "blob_owners",
        _key("tenant", 128),
        _key("sha256", 64),
        sa.Column("until", sa.Float, nullable=False),
        sa.ForeignKeyConstraint(["sha256"], ["blobs.sha256"], ondelete="CASCADE"),
    )
    op.create_index("blob_owners_by_blob", "blob_owners", ["sha256"])
    op.create_table("pins", _key("tenant", 128), _key("digest", 71))
    op.create_table(
        "replies",
        _key("tenant", 128),
        _key("key", 64),
        sa.Column("fingerprint", sa.String(64), nullable=False),
        sa.Column("status", sa.Integer, nullable=False),
        sa.Column("body", sa.Text, nullable=False),
        sa.Column("created", sa.Float, nullable=False),
    )
    op.create_index("replies_by_age", "replies", ["created"])


def _carry_over() -> None:
    connection = op.get_bind()
    connection.execute(sa.text("INSERT INTO tags (tenant, name, tag, number) SELECT tenant, name, 'latest', latest FROM names"))
    for tenant, name in connection.execute(sa.text("SELECT tenant, name FROM names")).all():
        etag = {"etag": secrets.token_hex(8), "tenant": tenant, "name": name}
        connection.execute(sa.text("UPDATE names SET etag = :etag WHERE tenant = :tenant AND name = :name"), etag)
    rows: list[dict[str, object]] = []
    for tenant, name, number, text in connection.execute(sa.text("SELECT tenant, name, number, blobs FROM versions")):
        blobs: dict[str, str] = json.loads(text)
        for role, sha256 in blobs.items():
            filename = _filename(role, set(blobs))
            row = {"tenant": tenant, "name": name, "number": number, "role": role, "filename": filename, "sha256": sha256}
            rows.append(row)
    if not rows:
        return
    noted = [{"sha256": sha256, "touched": time.time()} for sha256 in sorted({str(row["sha256"]) for row in rows})]
    connection.execute(sa.text("INSERT INTO blobs (sha256, touched) VALUES (:sha256, :touched)"), noted)
    connection.execute(sa.text(_ADD_FILE), rows)


def _filename(role: str, roles: set[str]) -> str:
    """What a file was most likely called. A child is a bottleneck adapter, which AdapterHub saves; a head too is only known there."""
    if role.startswith("child/"):
        _, child, own = PurePosixPath(role).parts
        return f"{child}/" + ("adapter.safetensors" if own == "weights" else _FILENAMES[own])
    if any(other.startswith("child/") for other in roles) and role in ("config", "weights"):
        return {"config": "adapter_fusion_config.json", "weights": "model_adapter_fusion.safetensors"}[role]
    if "head_config" in roles and role == "weights":
        return "adapter.safetensors"
    return _FILENAMES[role]


def _carry_back() -> None:
    connection = op.get_bind()
    connection.execute(sa.text(_SET_LATEST))
    blobs: dict[tuple[str, str, int], dict[str, str]] = {}
    for tenant, name, number, role, sha256 in connection.execute(sa.text("SELECT tenant, name, number, role, sha256 FROM files")):
        blobs.setdefault((tenant, name, number), {})[role] = sha256
    for (tenant, name, number), by_role in blobs.items():
        connection.execute(
            sa.text("UPDATE versions SET blobs = :blobs WHERE tenant = :tenant AND name = :name AND number = :number"),
            {"blobs": json.dumps(by_role), "tenant": tenant, "name": name, "number": number},
        )

"""Adapters as replies show them."""

from __future__ import annotations

from typing import Any

from adapter_store.types import AdapterRecord, AdapterVersion


def describe(version: AdapterVersion) -> dict[str, Any]:
    """One version."""
    return {
        "object": "adapter",
        "name": version.name,
        "version": f"v{version.number}",
        "digest": version.digest,
        "created": int(version.created),
        "bytes": version.nbytes,
        "facts": version.facts,
        "files": [{"name": file.name, "digest": f"sha256:{file.sha256}", "bytes": file.nbytes} for file in version.files],
        "last_used": version.last_used,
    }


def describe_latest(record: AdapterRecord) -> dict[str, Any]:
    """A name, as what its bare name means; with all tags."""
    return {**describe(record.latest), "tags": describe_tags(record), "etag": record.etag}


def describe_versions(record: AdapterRecord) -> list[dict[str, Any]]:
    """All versions, newest first, each with the tags that name it."""
    return [{**describe(version), "tags": list(record.tags_of(version.number))} for version in record.versions]


def describe_tags(record: AdapterRecord) -> dict[str, str]:
    """Tag → version."""
    return {tag: f"v{number}" for tag, number in sorted(record.tags.items())}

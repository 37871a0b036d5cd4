"""What can go wrong in the store. Knows nothing of HTTP; the server maps ``code`` to a status (docs/ERRORS.md).

StoreError
├── AdapterRejected        the upload is not a servable adapter (all faults at once)
├── AdapterNotFound        no such adapter, alias, version or tag for this tenant
├── InvalidName            the name breaks the grammar, or is reserved
├── InvalidAlias           an alias cannot mean this
├── NameTaken              the name is an alias where an adapter is to be, or the other way round
├── PreconditionFailed     the name is not, or no longer, in the state that the caller expects
├── VersionInUse           a tag or an alias names what is to be removed
├── IdempotencyKeyReused   the key came with another request before
├── PinLimit               the tenant has as many pins as it may have
├── InvalidDigest          a text is no sha256 digest
├── UploadTooLarge         the upload is over the byte cap
├── UploadNotFound         no such resumable upload for this tenant
├── OffsetMismatch         a piece does not start where the upload ends
├── DigestMismatch         what arrived has another digest than the caller says
├── TooManyUploads         the tenant has too many unfinished uploads
├── BlobNotFound           the tenant owns no such blob
├── BlobCorrupt            stored bytes do not match their digest
├── StorageFull            no space left to store the upload
└── StoreUnavailable       a backend (catalog, blobs, registry) cannot be reached
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar


@dataclass(frozen=True, slots=True)
class Fault:
    """One reason to refuse an upload. ``where`` names the file, tensor key or field; ``message`` says how to fix it."""

    code: str
    where: str
    message: str
    expected: str | None = None
    found: str | None = None


class StoreError(Exception):
    """Base of everything that the store raises on purpose."""

    code: ClassVar[str] = "store_error"


class AdapterRejected(StoreError):
    """The upload is not an adapter that can be served. ``faults`` lists everything found, never only the first."""

    code = "adapter_rejected"

    def __init__(self, faults: list[Fault]) -> None:
        super().__init__("; ".join(f"{fault.where}: {fault.message}" for fault in faults))
        self.faults = tuple(faults)


class AdapterNotFound(StoreError):
    """No such adapter for this tenant. The same for "not yours" and "not there"."""

    code = "adapter_not_found"


class InvalidName(StoreError):
    """The name does not match ``[a-z0-9][a-z0-9._-]{0,63}``, or is reserved."""

    code = "invalid_adapter_name"


class InvalidDigest(StoreError):
    """A text is not ``sha256:`` and 64 hex digits."""

    code = "invalid_digest"


class UploadTooLarge(StoreError):
    """The upload is over the byte cap."""

    code = "upload_too_large"


class UploadNotFound(StoreError):
    """No such upload for this tenant. The same for "not yours" and "not there"."""

    code = "upload_not_found"


class OffsetMismatch(StoreError):
    """A piece does not start where the upload ends: at ``offset``, in bytes."""

    code = "upload_offset_mismatch"

    def __init__(self, message: str, offset: int) -> None:
        super().__init__(message)
        self.offset = offset


class DigestMismatch(StoreError):
    """What arrived has another digest than the caller says."""

    code = "digest_mismatch"


class TooManyUploads(StoreError):
    """The tenant has too many unfinished uploads."""

    code = "too_many_uploads"


class BlobNotFound(StoreError):
    """The tenant owns no such blob. The same for "not yours" and "not there"."""

    code = "blob_not_found"


class BlobCorrupt(StoreError):
    """Stored bytes do not match their digest."""

    code = "blob_corrupt"


class StorageFull(StoreError):
    """No space is left to store the upload."""

    code = "storage_full"


class StoreUnavailable(StoreError):
    """A backend cannot be reached; try again later."""

    code = "store_unavailable"


class InvalidAlias(StoreError):
    """An alias must mean one or several adapters, each once, with shares above zero, and no alias."""

    code = "invalid_alias"


class NameTaken(StoreError):
    """The name is an alias where an adapter is to be, or the other way round."""

    code = "name_taken"


class PreconditionFailed(StoreError):
    """The name is not, or no longer, in the state that the caller expects."""

    code = "precondition_failed"


class VersionInUse(StoreError):
    """A tag or an alias names what is to be removed; the message says which."""

    code = "version_in_use"


class IdempotencyKeyReused(StoreError):
    """The key came with another request before."""

    code = "idempotency_key_reused"


class PinLimit(StoreError):
    """The tenant has as many pins as it may have."""

    code = "pin_limit"

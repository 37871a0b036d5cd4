"""The adapter store: content-addressed blobs, the catalog of names, and the registry of what is resident where."""

from adapter_store.errors import AdapterNotFound, AdapterRejected, Fault, StoreError
from adapter_store.residency import LocalResidency, ResidencyRegistry
from adapter_store.staging import StagedAdapter, Staging
from adapter_store.store import AdapterRecord, AdapterVersion, Store

__all__ = [
    "AdapterNotFound",
    "AdapterRecord",
    "AdapterRejected",
    "AdapterVersion",
    "Fault",
    "LocalResidency",
    "ResidencyRegistry",
    "StagedAdapter",
    "Staging",
    "Store",
    "StoreError",
]

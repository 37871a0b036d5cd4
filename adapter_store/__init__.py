"""The adapter store: content-addressed blobs, the catalog of names, and the registry of what is resident where."""

from adapter_store.errors import AdapterNotFound, AdapterRejected, Fault, StoreError
from adapter_store.residency import LocalResidency, ResidencyRegistry
from adapter_store.staging import StagedAdapter, Staging
from adapter_store.store import Store
from adapter_store.types import AdapterRecord, AdapterVersion, Alias, Condition, Replay, Target

__all__ = [
    "AdapterNotFound",
    "AdapterRecord",
    "AdapterRejected",
    "AdapterVersion",
    "Alias",
    "Condition",
    "Fault",
    "LocalResidency",
    "Replay",
    "ResidencyRegistry",
    "StagedAdapter",
    "Staging",
    "Store",
    "StoreError",
    "Target",
]

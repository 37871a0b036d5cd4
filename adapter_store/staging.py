"""One upload while it arrives: files in a temporary directory, checked as a whole when all are there.

A client's file name is a label that chooses a role; it is never a path on disk.
"""

from __future__ import annotations

import contextlib
import hashlib
import shutil
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from types import TracebackType
from typing import IO, Any

from adapter_store import archive
from adapter_store.config_json import ConfigFault, read_config, read_labels
from adapter_store.durable import full_disk_is_storage_full
from adapter_store.errors import AdapterRejected, Fault, StorageFull, UploadTooLarge
from adapter_store.manifest import manifest_digest
from adapter_store.safetensors_header import HeaderFault, first_non_finite, read_header

ROLES = {
    "adapter_config.json": "config",
    "adapter_model.safetensors": "weights",
    # AdapterHub's names.
    "adapter.safetensors": "weights",
    "adapter_fusion_config.json": "config",
    "model_adapter_fusion.safetensors": "weights",
    "head_config.json": "head_config",
    "model_head.safetensors": "head_weights",
    # Names of a classifier's outputs, for formats that have no place for them.
    "labels.json": "labels",
}
"""What the files of an adapter are for. Several names may stand for one role; an upload has at most one file of each."""
_FUSION = "adapter_fusion_config.json"
_MAX_CHILDREN = 64
_PICKLES = (".bin", ".pt", ".pth", ".pkl", ".ckpt")


@dataclass(frozen=True, slots=True)
class StagedFile:
    """A file of the adapter in its temporary place, and the name that it was uploaded under."""

    role: str
    name: str
    path: Path
    sha256: str
    nbytes: int


@dataclass(frozen=True, slots=True)
class StagedAdapter:
    """A complete, well-formed upload. ``skipped`` lists files that were never opened, ``children`` the adapters that a fusion names."""

    digest: str
    config: dict[str, Any]
    files: tuple[StagedFile, ...]
    skipped: tuple[str, ...]
    children: tuple[str, ...] = ()

    @property
    def paths(self) -> dict[str, Path]:
        """The files by role."""
        return {file.role: file.path for file in self.files}

    def with_files(self, more: list[StagedFile]) -> StagedAdapter:
        """The same with more files, which the digest covers too."""
        files = (*self.files, *more)
        return replace(self, files=files, digest=manifest_digest({file.role: file.sha256 for file in files}))


class Writer:
    """One file as it arrives: counts bytes, hashes, and stops at the cap."""

    def __init__(self, staging: Staging, file: IO[bytes], label: str) -> None:
        self._staging = staging
        self._file = file
        self.label = label
        self._hash = hashlib.sha256()
        self.nbytes = 0

    def write(self, data: bytes) -> int:
        self._staging.count(len(data), self.label)
        self._hash.update(data)
        self.nbytes += len(data)
        with full_disk_is_storage_full():
            return self._file.write(data)

    def close(self) -> None:
        with full_disk_is_storage_full():
            self._file.close()

    @property
    def sha256(self) -> str:
        return self._hash.hexdigest()

    def __enter__(self) -> Writer:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class _Null:
    """Takes the bytes of files that are not stored; they count towards the cap all the same."""

    def __init__(self, staging: Staging, label: str) -> None:
        self._staging = staging
        self._label = label

    def write(self, data: bytes) -> int:
        self._staging.count(len(data), self._label)
        return len(data)

    def close(self) -> None:
        """Nothing was opened."""

    def __enter__(self) -> _Null:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class Staging:
    """A context manager around the temporary directory of one upload."""

    def __init__(self, root: Path, max_bytes: int) -> None:
        with full_disk_is_storage_full():
            root.mkdir(parents=True, exist_ok=True)
            self._directory = Path(tempfile.mkdtemp(prefix="upload-", dir=root))
        self._max_bytes = max_bytes
        self._total = 0
        self._writers: dict[str, Writer] = {}
        self._skipped: list[str] = []
        self._faults: list[Fault] = []

    def __enter__(self) -> Staging:
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None) -> None:
        self.discard()

    def open(self, filename: str) -> Writer | _Null:
        """Start a file. What it is for is read off the last part of its name."""
        leaf = PurePosixPath(filename.replace("\\", "/")).name
        if leaf in ROLES:
            return self._file(leaf)
        if leaf.endswith((".zip", ".tar", ".tar.gz", ".tgz")):
            if "archive" in self._writers:
                self._faults.append(Fault("duplicate_file", leaf[:200], "send one archive, or the files themselves"))
                return _Null(self, leaf)
            return self._writer("archive", leaf)
        self._skipped.append(leaf[:200])
        return _Null(self, leaf)

    def count(self, nbytes: int, label: str) -> None:
        """Count arriving bytes. Raises UploadTooLarge."""
        self._total += nbytes
        if self._total > self._max_bytes:
            raise UploadTooLarge(f"the upload is larger than {self._max_bytes} bytes (at {label[:80]})")

    def finish(self) -> StagedAdapter:
        """Check everything that arrived. Raises AdapterRejected with all faults."""
        for writer in self._writers.values():
            writer.close()
        if "archive" in self._writers:
            self._expand()
        self._check_present()
        config = self._check_config("config")
        self._check_config("head_config")
        self._check_labels()
        self._check_weights("weights")
        self._check_weights("head_weights")
        children = self._children(config)
        if self._faults:
            raise AdapterRejected(self._faults)
        files = tuple(
            StagedFile(role, writer.label, self._directory / role, writer.sha256, writer.nbytes)
            for role, writer in sorted(self._writers.items())
        )
        digest = manifest_digest({file.role: file.sha256 for file in files})
        return StagedAdapter(digest, config, files, tuple(self._skipped), children)

    def discard(self) -> None:
        """Remove what arrived and was not committed."""
        for writer in self._writers.values():
            # What cannot be written any more need not be.
            with contextlib.suppress(StorageFull):
                writer.close()
        shutil.rmtree(self._directory, ignore_errors=True)

    def _file(self, leaf: str) -> Writer | _Null:
        role = ROLES[leaf]
        if role in self._writers:
            found = self._writers[role].label
            message = "the upload holds this file twice" if found == leaf else f"this and {found} stand for the same thing"
            self._faults.append(Fault("duplicate_file", leaf, message))
            return _Null(self, leaf)
        return self._writer(role, leaf)

    def _writer(self, role: str, label: str) -> Writer:
        writer = Writer(self, (self._directory / role).open("wb"), label)
        self._writers[role] = writer
        return writer

    def _expand(self) -> None:
        packed = self._writers.pop("archive")
        path = self._directory / "archive"
        if self._writers:
            self._faults.append(Fault("mixed_upload", "archive", "send either one archive or the files themselves, not both"))
            return
        if packed.nbytes == 0 or not archive.is_archive(path):
            self._faults.append(Fault("bad_archive", "archive", "this is neither a zip nor a tar"))
            return
        self._total = 0
        try:
            left_out = archive.expand(path, ROLES.__contains__, self._file, self._max_bytes)  # type: ignore[arg-type]
            self._skipped += left_out
        except AdapterRejected as rejected:
            self._faults += rejected.faults

    def _check_present(self) -> None:
        if any(fault.code in ("bad_archive", "mixed_upload") for fault in self._faults):
            return
        if "config" not in self._writers:
            self._missing("adapter_config.json", "the adapter's configuration, as the training library saved it")
        if "weights" not in self._writers:
            pickles = [name for name in self._skipped if name.endswith(_PICKLES)]
            hint = "the adapter's tensors"
            if pickles:
                hint = f"{pickles[0]} may hold them, but the server never opens pickles: run `medley convert` on your machine"
            self._missing("adapter_model.safetensors", hint)
        if "head_config" in self._writers and "head_weights" not in self._writers:
            self._missing("model_head.safetensors", "the tensors of the head that head_config.json describes")
        if "head_weights" in self._writers and "head_config" not in self._writers:
            self._missing("head_config.json", "the configuration of the head in model_head.safetensors")

    def _check_config(self, role: str) -> dict[str, Any]:
        if role not in self._writers:
            return {}
        try:
            return read_config(self._directory / role, self._writers[role].label)
        except ConfigFault as error:
            self._faults.append(error.fault)
            return {}

    def _check_labels(self) -> None:
        if "labels" not in self._writers:
            return
        try:
            read_labels(self._directory / "labels", self._writers["labels"].label)
        except ConfigFault as error:
            self._faults.append(error.fault)

    def _check_weights(self, role: str) -> None:
        if role not in self._writers:
            return
        path, label = self._directory / role, self._writers[role].label
        try:
            entries = read_header(path, label)
        except HeaderFault as error:
            self._faults.append(error.fault)
            return
        if not entries:
            self._faults.append(Fault("no_tensors", label, "the file holds no tensors"))
        self._faults += first_non_finite(path, entries)

    def _children(self, config: dict[str, Any]) -> tuple[str, ...]:
        """The names in a fusion's own: ``a,b``."""
        if "config" not in self._writers or self._writers["config"].label != _FUSION:
            return ()
        name = config.get("name")
        names = tuple(name.split(",")) if isinstance(name, str) else ()
        if not all(names) or not 0 < len(set(names)) == len(names) <= _MAX_CHILDREN:
            message = f"must name up to {_MAX_CHILDREN} different adapters, joined by commas"
            self._faults.append(Fault("invalid_config", f"{_FUSION}: name", message))
        return names

    def _missing(self, name: str, hint: str) -> None:
        self._faults.append(Fault("missing_file", name, f"the upload lacks {name}: {hint}"))

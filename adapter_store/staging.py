"""One upload while it arrives: files in a temporary directory, checked as a whole when all are there.

A client's file name is a label that chooses a role; it is never a path on disk.
"""

from __future__ import annotations

import hashlib
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from types import TracebackType
from typing import IO, Any

from adapter_store import archive
from adapter_store.config_json import ConfigFault, read_config
from adapter_store.errors import AdapterRejected, Fault, UploadTooLarge
from adapter_store.manifest import manifest_digest
from adapter_store.safetensors_header import HeaderFault, first_non_finite, read_header

ROLES = {"adapter_config.json": "config", "adapter_model.safetensors": "weights"}
_FILES = {role: name for name, role in ROLES.items()}
_PICKLES = (".bin", ".pt", ".pth", ".pkl", ".ckpt")


@dataclass(frozen=True, slots=True)
class StagedFile:
    """A file of the adapter in its temporary place."""

    role: str
    path: Path
    sha256: str
    nbytes: int


@dataclass(frozen=True, slots=True)
class StagedAdapter:
    """A complete, well-formed upload. ``skipped`` lists files that were never opened."""

    digest: str
    config: dict[str, Any]
    files: tuple[StagedFile, ...]
    skipped: tuple[str, ...]

    def path(self, role: str) -> Path:
        return next(file.path for file in self.files if file.role == role)


class Writer:
    """One file as it arrives: counts bytes, hashes, and stops at the cap."""

    def __init__(self, staging: Staging, file: IO[bytes], label: str) -> None:
        self._staging = staging
        self._file = file
        self._label = label
        self._hash = hashlib.sha256()
        self.nbytes = 0

    def write(self, data: bytes) -> int:
        self._staging.count(len(data), self._label)
        self._hash.update(data)
        self.nbytes += len(data)
        return self._file.write(data)

    def close(self) -> None:
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


class Staging:
    """A context manager around the temporary directory of one upload."""

    def __init__(self, root: Path, max_bytes: int) -> None:
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
        if role := ROLES.get(leaf):
            if role in self._writers:
                self._faults.append(Fault("duplicate_file", leaf, "the upload holds this file twice"))
                return _Null(self, leaf)
            return self._writer(role, leaf)
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
        config = self._check_config()
        self._check_weights()
        if self._faults:
            raise AdapterRejected(self._faults)
        files = tuple(
            StagedFile(role, self._directory / role, writer.sha256, writer.nbytes)
            for role, writer in sorted(self._writers.items())
        )
        digest = manifest_digest({file.role: file.sha256 for file in files})
        return StagedAdapter(digest, config, files, tuple(self._skipped))

    def discard(self) -> None:
        """Remove what arrived and was not committed."""
        for writer in self._writers.values():
            writer.close()
        shutil.rmtree(self._directory, ignore_errors=True)

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
            left_out = archive.expand(path, ROLES.__contains__, lambda name: self._writer(ROLES[name], name), self._max_bytes)  # type: ignore[arg-type, return-value]
            self._skipped += left_out
        except AdapterRejected as rejected:
            self._faults += rejected.faults

    def _check_config(self) -> dict[str, Any]:
        if "config" not in self._writers:
            self._missing("config", "the adapter's configuration, as the training library saved it")
            return {}
        try:
            return read_config(self._directory / "config")
        except ConfigFault as error:
            self._faults.append(error.fault)
            return {}

    def _check_weights(self) -> None:
        if "weights" not in self._writers:
            pickles = [name for name in self._skipped if name.endswith(_PICKLES)]
            hint = "the adapter's tensors"
            if pickles:
                hint = f"{pickles[0]} may hold them, but the server never opens pickles: run `medley convert` on your machine"
            self._missing("weights", hint)
            return
        path = self._directory / "weights"
        try:
            entries = read_header(path, _FILES["weights"])
        except HeaderFault as error:
            self._faults.append(error.fault)
            return
        if not entries:
            self._faults.append(Fault("no_tensors", _FILES["weights"], "the file holds no tensors"))
        self._faults += first_non_finite(path, entries)

    def _missing(self, role: str, hint: str) -> None:
        if any(fault.code in ("bad_archive", "mixed_upload") for fault in self._faults):
            return
        self._faults.append(Fault("missing_file", _FILES[role], f"the upload lacks {_FILES[role]}: {hint}"))

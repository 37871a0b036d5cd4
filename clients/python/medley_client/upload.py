"""A multipart body that streams an adapter's files from disk and counts what was sent."""

from __future__ import annotations

import secrets
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path

from medley_client.convert import HEAD_PICKLE, NAMES
from medley_client.errors import MedleyError

Progress = Callable[[int, int], None]
"""Called with (bytes sent, bytes in all)."""

_SETS = (
    ("adapter_config.json", "adapter_model.safetensors"),
    # AdapterHub's names, and its fusions.
    ("adapter_config.json", "adapter.safetensors"),
    ("adapter_fusion_config.json", "model_adapter_fusion.safetensors"),
)
_MORE = ("head_config.json", "model_head.safetensors", "labels.json")
_ARCHIVES = (".zip", ".tar", ".tar.gz", ".tgz")
_CHUNK = 256 << 10


class Upload:
    """An adapter directory or archive as multipart/form-data. May be read several times, for retries."""

    def __init__(self, source: Path, name: str, progress: Progress | None) -> None:
        self._boundary = secrets.token_hex(16)
        self._progress = progress
        self._parts: list[tuple[bytes, Path | None]] = [(self._head("name") + name.encode() + b"\r\n", None)]
        for file in find_files(source):
            self._parts.append((self._head("files", file.name), file))
        self._end = f"--{self._boundary}--\r\n".encode()
        self.total = len(self._end) + sum(len(head) + (file.stat().st_size + 2 if file else 0) for head, file in self._parts)

    @property
    def headers(self) -> dict[str, str]:
        return {"content-type": f"multipart/form-data; boundary={self._boundary}", "content-length": str(self.total)}

    def __iter__(self) -> Iterator[bytes]:
        sent = 0
        for chunk in self._chunks():
            yield chunk
            sent += len(chunk)
            if self._progress is not None:
                self._progress(sent, self.total)

    async def stream(self) -> AsyncIterator[bytes]:
        """The same for an asynchronous client."""
        for chunk in self:
            yield chunk

    def _chunks(self) -> Iterator[bytes]:
        for head, file in self._parts:
            yield head
            if file is not None:
                with file.open("rb") as handle:
                    while chunk := handle.read(_CHUNK):
                        yield chunk
                yield b"\r\n"
        yield self._end

    def _head(self, field: str, filename: str | None = None) -> bytes:
        extra = "" if filename is None else f'; filename="{filename}"\r\nContent-Type: application/octet-stream'
        return f'--{self._boundary}\r\nContent-Disposition: form-data; name="{field}"{extra}\r\n\r\n'.encode()


def find_files(source: Path) -> list[Path]:
    """What to send of a directory, or the archive itself. Raises MedleyError with what is missing."""
    if source.is_file():
        if not source.name.endswith(_ARCHIVES):
            raise MedleyError(f"{source} is not an adapter directory, and no {', '.join(_ARCHIVES)} either")
        return [source]
    if not source.is_dir():
        raise MedleyError(f"{source} does not exist")
    complete = [names for names in _SETS if all((source / name).is_file() for name in names)]
    pickles = [name for name, converted in NAMES.items() if (source / name).is_file() and not (source / converted).is_file()]
    if not complete:
        missing = [name for name in _SETS[0] if not (source / name).is_file()]
        hint = f"; turn its {pickles[0]} into safetensors first: medley convert {source}" if pickles else ""
        raise MedleyError(f"{source} has no {' and no '.join(missing)}{hint}")
    files = [source / name for name in (*complete[0], *_MORE) if (source / name).is_file()]
    if (source / "head_config.json") in files and HEAD_PICKLE in pickles:
        raise MedleyError(f"{source} has its head in {HEAD_PICKLE} only; turn it into safetensors first: medley convert {source}")
    return files

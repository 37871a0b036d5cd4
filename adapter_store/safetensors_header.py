"""Strict reading of safetensors headers, and a streaming check that floats are finite. Allocates nothing by a file's own word.

Format: 8 bytes little-endian header length, a JSON object {name → {dtype, shape, data_offsets}}, then the tensors.
"""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from adapter_store.errors import Fault

MAX_HEADER_BYTES = 4 << 20
MAX_TENSORS = 8192
_CHUNK = 4 << 20
_FLOATS: dict[str, tuple[str, int, int]] = {
    # dtype → (numpy unsigned type, exponent mask, size): a float is not finite exactly when all exponent bits are set.
    "F64": ("<u8", 0x7FF0000000000000, 8),
    "F32": ("<u4", 0x7F800000, 4),
    "F16": ("<u2", 0x7C00, 2),
    "BF16": ("<u2", 0x7F80, 2),
}
_SIZES = {"I64": 8, "I32": 4, "I16": 2, "I8": 1, "U8": 1, "BOOL": 1} | {name: size for name, (_, _, size) in _FLOATS.items()}


@dataclass(frozen=True, slots=True)
class TensorEntry:
    """One tensor of the header; ``start`` and ``end`` are file offsets in bytes."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int


class HeaderFault(Exception):
    """The file is not a safetensors file that will be read. Carries the fault."""

    def __init__(self, where: str, message: str, expected: str | None = None, found: str | None = None) -> None:
        super().__init__(message)
        self.fault = Fault("corrupt_safetensors", where, message, expected, found)


def read_header(path: Path, label: str) -> tuple[TensorEntry, ...]:
    """The tensors of a file, in file order, or HeaderFault. ``label`` is the name to use in messages."""
    size = path.stat().st_size
    with path.open("rb") as file:
        start = file.read(8)
        if len(start) < 8:
            raise HeaderFault(label, "the file is shorter than a safetensors header", "at least 8 bytes", f"{size} bytes")
        _refuse_disguise(start, label)
        (length,) = struct.unpack("<Q", start)
        if length > min(MAX_HEADER_BYTES, size - 8):
            raise HeaderFault(
                label,
                "the header is too long, or the file truncated or not safetensors",
                f"at most {min(MAX_HEADER_BYTES, size - 8)} bytes",
                f"{length} bytes",
            )
        header = _parse(file.read(length), label)
    return _entries(header, 8 + length, size, label)


def first_non_finite(path: Path, entries: tuple[TensorEntry, ...]) -> list[Fault]:
    """A fault for every float tensor that holds NaN or infinity. Reads the file once, in pieces."""
    faults = []
    with path.open("rb") as file:
        for entry in entries:
            if entry.dtype in _FLOATS and (count := _count_non_finite(file, entry)):
                faults.append(
                    Fault(
                        "non_finite_tensor",
                        entry.name,
                        "the tensor holds NaN or infinity; retrain or repair it",
                        "finite values",
                        f"{count} values",
                    )
                )
    return faults


def _count_non_finite(file: Any, entry: TensorEntry) -> int:
    kind, mask, _ = _FLOATS[entry.dtype]
    count = 0
    file.seek(entry.start)
    for offset in range(entry.start, entry.end, _CHUNK):
        bits = np.frombuffer(file.read(min(_CHUNK, entry.end - offset)), dtype=kind)
        wanted = bits.dtype.type(mask)
        count += int(np.count_nonzero((bits & wanted) == wanted))
    return count


def _refuse_disguise(start: bytes, label: str) -> None:
    if start[:2] in (b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05") or start[:4] == b"PK\x03\x04":
        raise HeaderFault(
            label,
            "this is a pickle or a PyTorch archive, which the server never opens; turn it into safetensors with `medley convert`",
            "safetensors",
            "pickle or zip",
        )


def _parse(data: bytes, label: str) -> dict[str, Any]:
    def pairs(items: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(items)
        if len(found) != len(items):
            raise HeaderFault(label, "the header names a key twice")
        return found

    try:
        header = json.loads(data.decode("utf-8"), object_pairs_hook=pairs)
        json.dumps(header, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        # JSON can spell half of a surrogate pair; it has no UTF-8, so that nothing could be said of it.
        raise HeaderFault(label, "a name in the header holds half of a surrogate pair") from error
    except (ValueError, RecursionError) as error:
        raise HeaderFault(label, "the header is not JSON; the file is corrupt or not safetensors") from error
    if not isinstance(header, dict):
        raise HeaderFault(label, "the header is not a JSON object")
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise HeaderFault("__metadata__", "metadata must be an object of texts")
    if len(header) > MAX_TENSORS:
        raise HeaderFault(label, "too many tensors", f"at most {MAX_TENSORS}", str(len(header)))
    return header


def _entries(header: dict[str, Any], data_start: int, size: int, label: str) -> tuple[TensorEntry, ...]:
    entries = sorted(_each(header, data_start), key=lambda entry: (entry.start, entry.end))
    expected = data_start
    for entry in entries:
        if entry.start != expected:
            raise HeaderFault(entry.name, "tensor data overlaps or leaves a gap", f"offset {expected}", str(entry.start))
        expected = entry.end
    if expected != size:
        raise HeaderFault(
            label, "the file does not end where its tensors do; it is truncated or padded", f"{expected} bytes", f"{size} bytes"
        )
    return tuple(entries)


def _each(header: dict[str, Any], data_start: int) -> Iterator[TensorEntry]:
    for name, value in header.items():
        if not isinstance(value, dict) or set(value) != {"dtype", "shape", "data_offsets"}:
            raise HeaderFault(name[:200], "a tensor needs exactly dtype, shape and data_offsets")
        dtype, shape, offsets = value["dtype"], value["shape"], value["data_offsets"]
        if not isinstance(dtype, str) or dtype not in _SIZES:
            raise HeaderFault(name[:200], "unsupported dtype", ", ".join(sorted(_SIZES)), str(dtype)[:40])
        if not _are_counts(shape) or len(shape) > 8 or not _are_counts(offsets) or len(offsets) != 2:
            raise HeaderFault(name[:200], "shape and data_offsets must be lists of non-negative integers")
        if offsets[1] - offsets[0] != math.prod(shape) * _SIZES[dtype]:
            raise HeaderFault(
                name[:200],
                "data_offsets do not match shape and dtype",
                f"{math.prod(shape) * _SIZES[dtype]} bytes",
                f"{offsets[1] - offsets[0]} bytes",
            )
        yield TensorEntry(name, dtype, tuple(shape), data_start + offsets[0], data_start + offsets[1])


def _are_counts(values: Any) -> bool:
    return isinstance(values, list) and all(type(value) is int and 0 <= value < 1 << 48 for value in values)

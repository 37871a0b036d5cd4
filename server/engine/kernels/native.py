"""The native CPU kernels of the base's path, as functions on tensors: built once with the machine's compiler, left out where there is none.

Each function here states what it computes in PyTorch's words; the tests hold it to that. A row's result is bit for bit the same whatever
other rows there are. Knows tensors, no modules and no model.
"""

from __future__ import annotations

import ctypes
import logging
import struct
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from server.adapters.kernels.build import build_library, load_library
from server.engine.kernels.paged import PagedRows, Rules

_DIRECTORY = Path(__file__).parent
SOURCES = tuple(_DIRECTORY / name for name in ("linear.cpp", "attention.cpp", "rows.cpp", "blocks.cpp"))
_SUFFIXES = {torch.float32: "f32", torch.bfloat16: "bf16"}

_POINTER, _INTEGER, _FLOAT = ctypes.c_void_p, ctypes.c_int64, ctypes.c_float

log = logging.getLogger(__name__)


BLOCK_PARTS = ("linears", "edits", "small", "attention")
_ATTENTION = struct.Struct("3qd2qd4q")
_ROWS = struct.Struct("7q")


class BlockLinears(NamedTuple):
    """A block's linears and what a step's programs do at them: ``records`` and ``edits`` are the structures that ``blocks.cpp`` reads, ``held``
    what their addresses lie in. The last linear makes ``out_features``. Runs of rows end at ``num_rows`` or before."""

    records: bytes
    edits: bytes
    out_features: int
    num_rows: int
    held: tuple[object, ...]


class LayerStack(NamedTuple):
    """``num_layers`` decoder layers: ``records`` are the structures that ``blocks.cpp`` reads, ``held`` what their addresses lie in. Their heads
    have ``head_dim`` numbers. Runs of rows end at ``num_rows`` or before."""

    records: bytes
    num_layers: int
    head_dim: int
    num_rows: int
    held: tuple[object, ...]


class PagedAttention(NamedTuple):
    """What an attention is, and its layer of the cache: ``record`` is the structure that ``blocks.cpp`` reads, ``held`` what its addresses lie in."""

    record: bytes
    head_dim: int
    held: tuple[object, ...]


class StepRows(NamedTuple):
    """The ``num_rows`` rows of a step, the same for all of its layers, turned by ``angles``, cosines and sines of ``head_dim`` numbers a row:
    ``record`` is the structure that ``blocks.cpp`` reads, ``held`` what its addresses lie in."""

    record: bytes
    angles: tuple[Tensor, Tensor]
    num_rows: int
    head_dim: int
    held: tuple[object, ...]


class HeadNorms(NamedTuple):
    """Root-mean-square norms of every head's query and key: weights ``(head_dim,)`` in float32."""

    query: Tensor
    key: Tensor
    eps: float


class Native:
    """The kernels for activations of one dtype, float32 or bfloat16. Raises OSError or AttributeError when the library is not theirs."""

    def __init__(self, library: Path, dtype: torch.dtype) -> None:
        self.dtype = dtype
        self._library = load_library(library)
        suffix = _SUFFIXES[dtype]
        self._elements = self._bound("packed_elements", 0, 2)
        self._elements.restype = ctypes.c_int64
        self._packs = {of: self._bound(f"pack_{name}", 2, 2) for of, name in _SUFFIXES.items()}
        self._linears = {torch.bfloat16: self._bound(f"linear_bf16_{suffix}", 4, 3)}
        if dtype == torch.float32:
            self._linears[dtype] = self._bound("linear_f32_f32", 4, 3)
        self._norm = self._bound(f"rms_norm_{suffix}", 3, 2, _FLOAT)
        self._silu_mul = self._bound(f"silu_mul_{suffix}", 3, 1)
        self._rotate = self._bound(f"rotate_and_keep_{suffix}", 8, 5)
        self._attention = self._bound(f"attention_{suffix}", 7, 7, _FLOAT, _INTEGER, _FLOAT)
        self._mlp_block = self._bound(f"gated_mlp_{suffix}", 5, 1)
        self._attention_block = self._bound(f"attention_block_{suffix}", 7, 1)
        self._layers = self._bound(f"decoder_layers_{suffix}", 5, 2)
        self._mlp_block.restype = self._attention_block.restype = self._layers.restype = ctypes.c_int64
        self.block_seconds: Tensor | None = None
        """Float64 ``(len(BLOCK_PARTS),)``: what the parts of blocks take is added here, where somebody wants to know."""

    def _bound(self, name: str, pointers: int, integers: int, *others: Any) -> Any:
        function = getattr(self._library, name)
        function.argtypes = [_POINTER] * pointers + [_INTEGER] * integers + list(others)
        function.restype = None
        return function

    def pack(self, weight: Tensor) -> Tensor:
        """``weight (out, in)`` in the order that ``linear`` reads: bfloat16 where that holds every number exactly, else float32."""
        weight = weight.detach().contiguous()
        short = weight.to(torch.bfloat16)
        if torch.equal(short.to(weight.dtype), weight):
            weight = short
        out_features, in_features = weight.shape
        packed = torch.empty(self._elements(in_features, out_features), dtype=weight.dtype)
        self._packs[weight.dtype](weight.data_ptr(), packed.data_ptr(), in_features, out_features)
        return packed

    def linear(self, x: Tensor, packed: Tensor, bias: Tensor | None, out_features: int) -> Tensor:
        """``F.linear(x, weight, bias)`` for ``x (…, in)`` and a packed weight; ``bias (out,)`` in float32."""
        if x.dtype is not torch.float32 or not x.is_contiguous():
            x = x.to(torch.float32).contiguous()
        *leading, in_features = x.shape
        y = torch.empty((*leading, out_features), dtype=self.dtype)
        bias_address = None if bias is None else bias.data_ptr()
        rows = x.numel() // in_features
        self._linears[packed.dtype](x.data_ptr(), packed.data_ptr(), bias_address, y.data_ptr(), rows, in_features, out_features)
        return y

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        """``F.rms_norm(x, weight.shape, weight, eps)``; ``weight (width,)`` in float32."""
        x = self._own(x)
        y = torch.empty_like(x)
        width = x.shape[-1]
        self._norm(x.data_ptr(), weight.data_ptr(), y.data_ptr(), x.numel() // width, width, eps)
        return y

    def silu_mul(self, gate: Tensor, up: Tensor) -> Tensor:
        """``F.silu(gate) * up``, which may take the place of ``gate``."""
        gate, up = self._own(gate), self._own(up)
        if gate.shape != up.shape:
            raise ValueError(f"gate {tuple(gate.shape)} and up {tuple(up.shape)} must have one shape")
        self._silu_mul(gate.data_ptr(), up.data_ptr(), gate.data_ptr(), gate.numel())
        return gate

    def rotate_and_keep(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        angles: tuple[Tensor, Tensor],
        caches: tuple[Tensor, Tensor],
        kv_slots: Tensor,
    ) -> None:
        """Rotary embedding as in Hugging Face's ``apply_rotary_pos_emb``, and what it is for: ``query (T, heads, d)`` is rotated in place, ``key``
        and ``value (T, kv_heads, d)`` go, the former rotated, to ``kv_slots (T,)`` of the caches ``(kv_heads, num_blocks, block_size, d)``.
        ``angles``: cosines and sines ``(T, d)``."""
        cosines, sines, key, value = (self._own(tensor) for tensor in (*angles, key, value))
        rows, heads, width = query.shape
        keys, values = caches
        if not (cosines.shape == sines.shape == (rows, width) and query.dtype == self.dtype and query.is_contiguous()):
            raise ValueError(f"queries {tuple(query.shape)} cannot be rotated by angles {tuple(cosines.shape)}")
        self._rotate(
            *(tensor.data_ptr() for tensor in (query, key, value, cosines, sines, keys, values, kv_slots)),
            rows,
            heads,
            key.shape[1],
            width,
            keys.shape[1] * keys.shape[2],
        )

    def attention(
        self, out: Tensor, query: Tensor, key_cache: Tensor, value_cache: Tensor, rows: PagedRows, rules: Rules
    ) -> None:
        """An AttentionKernel."""
        kv_heads, num_blocks, block_size, width = key_cache.shape
        query = self._own(query)
        self._attention(
            *(tensor.data_ptr() for tensor in (out, query, key_cache, value_cache, rows.tables, rows.sequence_of, rows.lengths)),
            query.shape[0],
            query.shape[1],
            kv_heads,
            width,
            num_blocks,
            block_size,
            rows.tables.shape[1],
            rules.scaling,
            rules.window or 0,
            rules.softcap or 0.0,
        )

    def gated_mlp(self, x: Tensor, linears: BlockLinears) -> Tensor:
        """``down(silu(gate(x)) * up(x))`` for ``x (…, hidden)``, every linear with its edits. Raises MemoryError."""
        x = self._block_rows(x, linears.num_rows)
        y = torch.empty((*x.shape[:-1], linears.out_features), dtype=self.dtype)
        if not self._mlp_block(
            linears.records, linears.edits, x.data_ptr(), y.data_ptr(), self._clock(), x.numel() // x.shape[-1]
        ):
            raise MemoryError("there is no memory for the rows of an MLP")
        return y

    def paged_attention(self, caches: tuple[Tensor, Tensor], rules: Rules, norms: HeadNorms | None) -> PagedAttention:
        """An attention for the calls below, on one layer's caches; ``norms`` are those of its heads."""
        if rules.softcap is not None:
            raise ValueError("the native block caps no scores")
        keys, values = caches
        kv_heads, num_blocks, block_size, head_dim = keys.shape
        record = _ATTENTION.pack(
            kv_heads,
            head_dim,
            rules.window or 0,
            rules.scaling,
            *((0, 0, 0.0) if norms is None else (norms.query.data_ptr(), norms.key.data_ptr(), norms.eps)),
            keys.data_ptr(),
            values.data_ptr(),
            num_blocks,
            block_size,
        )
        return PagedAttention(record, head_dim, (caches, norms))

    def step_rows(self, angles: tuple[Tensor, Tensor], kv_slots: Tensor, rows: PagedRows) -> StepRows:
        """A step's ``T`` rows for the calls below: cosines and sines ``(…, T, d)``, where keys and values go, ``kv_slots (T,)``, and the keys that
        rows see."""
        cosines, sines = (self._own(tensor) for tensor in angles)
        count, head_dim = len(kv_slots), cosines.shape[-1]
        if not cosines.shape == sines.shape or cosines.numel() != count * head_dim:
            raise ValueError(f"{count} rows cannot be rotated by angles {tuple(cosines.shape)} and {tuple(sines.shape)}")
        tensors = (cosines, sines, kv_slots, rows.tables, rows.sequence_of, rows.lengths)
        record = _ROWS.pack(*(tensor.data_ptr() for tensor in tensors), rows.tables.shape[1])
        return StepRows(record, angles, count, head_dim, tensors)

    def attention_block(self, x: Tensor, linears: BlockLinears, attention: PagedAttention, rows: StepRows) -> Tensor:
        """``output(attention(query(x), key(x), value(x)))`` for ``x (…, hidden)``, every linear with its edits; queries and keys are normed,
        rotated and kept as ``rotate_and_keep`` says, and attend as an AttentionKernel does. Raises MemoryError."""
        x = self._block_rows(x, linears.num_rows)
        y = torch.empty((*x.shape[:-1], linears.out_features), dtype=self.dtype)
        self._check_rows(x, attention.head_dim, rows)
        if not self._attention_block(
            linears.records,
            linears.edits,
            attention.record,
            rows.record,
            x.data_ptr(),
            y.data_ptr(),
            self._clock(),
            rows.num_rows,
        ):
            raise MemoryError("there is no memory for the rows of an attention")
        return y

    def decoder_layers(self, x: Tensor, stack: LayerStack, rows: StepRows) -> Tensor:
        """Each layer's ``h + mlp(norm(h))`` with ``h = x + attention(norm(x))`` for ``x (…, hidden)``, both blocks as above. Raises MemoryError."""
        x = self._block_rows(x, stack.num_rows)
        y = torch.empty_like(x)
        self._check_rows(x, stack.head_dim, rows)
        if not self._layers(
            stack.records, rows.record, x.data_ptr(), y.data_ptr(), self._clock(), rows.num_rows, stack.num_layers
        ):
            raise MemoryError("there is no memory for the rows of a layer")
        return y

    def _block_rows(self, x: Tensor, num_rows: int) -> Tensor:
        """What a block reads, whose runs end at ``num_rows``."""
        x = self._own(x)
        if num_rows > x.numel() // x.shape[-1]:
            raise ValueError(f"runs end at row {num_rows} of {x.numel() // x.shape[-1]}")
        return x

    def _check_rows(self, x: Tensor, head_dim: int, rows: StepRows) -> None:
        if rows.num_rows * x.shape[-1] != x.numel() or rows.head_dim != head_dim:
            raise ValueError(
                f"{tuple(x.shape)} and heads of {head_dim} are not {rows.num_rows} rows with angles of {rows.head_dim}"
            )

    def _clock(self) -> int | None:
        return None if self.block_seconds is None else self.block_seconds.data_ptr()

    def _own(self, tensor: Tensor) -> Tensor:
        """A tensor that may be read by its address. Raises ValueError for another dtype or device."""
        if tensor.dtype != self.dtype or tensor.device.type != "cpu":
            raise ValueError(f"the native kernel is for {self.dtype} on the CPU, not {tensor.dtype} on {tensor.device}")
        return tensor.contiguous()


def load_native(cache_dir: Path, dtype: torch.dtype, device: torch.device) -> Native | None:
    """The kernels for a dtype, built on first use; None where they cannot be had, which costs speed and nothing else."""
    if device.type != "cpu" or dtype not in _SUFFIXES:
        return None
    try:
        return Native(build_library(SOURCES, cache_dir, "base"), dtype)
    except (OSError, AttributeError) as error:
        log.warning("the base runs on PyTorch's own, slower operations: %s", error)
        return None

"""Native kernels equal what they stand for, and a row's result is bit for bit the same alone and packed."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from server.engine.kernels import GatheredAttention, PagedRows, Rules, attention_reference
from tests.server.engine.kernels.conftest import Load

DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])


def close(found: Tensor, wanted: Tensor) -> None:
    """Within fp32's rounding of a sum, or half a unit of bfloat16."""
    tolerance = 2e-5 if found.dtype == torch.float32 else 1e-2
    torch.testing.assert_close(found.double(), wanted.double(), rtol=tolerance, atol=tolerance)


@DTYPES
@pytest.mark.parametrize("is_short", [True, False], ids=["bfloat16 weights", "float32 weights"])
@pytest.mark.parametrize(("inputs", "outputs"), [(7, 3), (577, 203), (64, 96)])
def test_a_linear(native: Load, dtype: torch.dtype, is_short: bool, inputs: int, outputs: int) -> None:
    kernels = native(dtype)
    torch.manual_seed(0)
    weight = torch.randn(outputs, inputs).to(torch.bfloat16).to(dtype)
    if not is_short and dtype == torch.float32:
        weight += 1e-4
    packed, bias = kernels.pack(weight), torch.randn(outputs)
    assert packed.dtype == (torch.bfloat16 if is_short or dtype == torch.bfloat16 else torch.float32)
    x = torch.randn(131, inputs).to(dtype) / inputs**0.5
    found = kernels.linear(x, packed, bias, outputs)
    close(found, F.linear(x.double(), weight.double(), bias.double()))
    for rows in (1, 2, 5, 97):
        assert torch.equal(kernels.linear(x[3 : 3 + rows], packed, bias, outputs), found[3 : 3 + rows])
    close(kernels.linear(x[None], packed, None, outputs)[0], F.linear(x.double(), weight.double()))


@DTYPES
def test_a_row_of_nan_stays_alone(native: Load, dtype: torch.dtype) -> None:
    kernels = native(dtype)
    weight, x = torch.randn(40, 24).to(dtype), torch.randn(9, 24).to(dtype)
    packed = kernels.pack(weight)
    clean = kernels.linear(x, packed, None, 40)
    x[4], x[5, 0] = torch.nan, torch.inf
    found = kernels.linear(x, packed, None, 40)
    others = [row for row in range(9) if row not in (4, 5)]
    assert torch.equal(found[others], clean[others])
    assert found[4].isnan().all()
    assert not found[5].isfinite().any()


@DTYPES
@pytest.mark.parametrize("width", [8, 29, 576])
def test_norm_and_gate(native: Load, dtype: torch.dtype, width: int) -> None:
    kernels = native(dtype)
    x, up, weight = torch.randn(70, width).to(dtype) * 4, torch.randn(70, width).to(dtype), torch.randn(width)
    x[0, 0], x[1, 0] = 100, -100
    normed = kernels.rms_norm(x[None], weight, 1e-5)
    close(normed[0], F.rms_norm(x.double(), (width,), weight.double(), 1e-5))
    assert torch.equal(kernels.rms_norm(x[7:8], weight, 1e-5), normed[0, 7:8])
    wanted = F.silu(x.double()) * up.double()
    gated = kernels.silu_mul(x.clone(), up)
    close(gated, wanted)
    assert torch.equal(kernels.silu_mul(x[7:8].clone(), up[7:8]), gated[7:8])
    assert kernels.silu_mul(torch.full((1, 1), torch.nan, dtype=dtype), torch.ones(1, 1, dtype=dtype)).isnan().all()


@DTYPES
def test_rotation_and_what_is_kept(native: Load, dtype: torch.dtype) -> None:
    rows, heads, kv_heads, width = 20, 4, 2, 16
    query, key, value = (torch.randn(rows, count, width).to(dtype) for count in (heads, kv_heads, kv_heads))
    angles = torch.randn(rows, width // 2).repeat(1, 2)
    cosines, sines = angles.cos().to(dtype), angles.sin().to(dtype)
    caches = (torch.zeros(kv_heads, 8, 4, width, dtype=dtype), torch.zeros(kv_heads, 8, 4, width, dtype=dtype))
    slots = torch.randperm(32)[:rows]
    rotated, kept = (
        item.double()
        for item in apply_rotary_pos_emb(query.float(), key.float(), cosines.float(), sines.float(), unsqueeze_dim=1)
    )
    native(dtype).rotate_and_keep(query, key, value, (cosines, sines), caches, slots)
    close(query, rotated)
    close(caches[0].flatten(1, 2)[:, slots].transpose(0, 1), kept)
    assert torch.equal(caches[1].flatten(1, 2)[:, slots].transpose(0, 1), value)
    unused = sorted(set(range(32)) - set(slots.tolist()))
    assert not caches[0].flatten(1, 2)[:, unused].any()


def paged(pieces: list[tuple[int, int]], block_size: int) -> tuple[PagedRows, int]:
    """Rows of sequences that hold ``first`` keys before ``count`` new rows, in blocks in random order; and the number of blocks."""
    needed = [-(-(first + count) // block_size) for first, count in pieces]
    blocks = (torch.randperm(sum(needed)) + 1).tolist()
    tables = torch.zeros(len(pieces), max(needed), dtype=torch.int32)
    for row, length in enumerate(needed):
        tables[row, :length] = torch.tensor([blocks.pop() for _ in range(length)])
    sequence_of = [number for number, (_, count) in enumerate(pieces) for _ in range(count)]
    lengths = [index + 1 for first, count in pieces for index in range(first, first + count)]
    rows = PagedRows(tables, torch.tensor(sequence_of, dtype=torch.int32), torch.tensor(lengths, dtype=torch.int32))
    return rows, sum(needed) + 1


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    pieces=st.lists(st.tuples(st.integers(0, 40), st.integers(1, 20)), min_size=1, max_size=5),
    heads=st.sampled_from([(4, 4), (6, 2), (9, 3)]),
    width=st.sampled_from([8, 20, 64, 136]),
    rules=st.builds(
        Rules, st.floats(0.05, 0.5), st.one_of(st.none(), st.integers(1, 30)), st.one_of(st.none(), st.floats(1.0, 20.0))
    ),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
)
def test_attention(
    native: Load,
    pieces: list[tuple[int, int]],
    heads: tuple[int, int],
    width: int,
    rules: Rules,
    dtype: torch.dtype,
) -> None:
    torch.manual_seed(0)
    rows, num_blocks = paged(pieces, block_size=16)
    count = len(rows.lengths)
    query = torch.randn(count, heads[0], width).to(dtype)
    keys, values = (torch.randn(heads[1], num_blocks, 16, width).to(dtype) for _ in range(2))
    wanted, found, gathered = (torch.empty_like(query) for _ in range(3))
    attention_reference(wanted, query, keys, values, rows, rules)
    attend = native(dtype).attention
    attend(found, query, keys, values, rows, rules)
    close(found, wanted)
    if dtype == torch.float32:
        GatheredAttention()(gathered, query, keys, values, rows, rules)
        close(gathered, wanted)
    for row in {0, count // 2, count - 1}:
        alone = torch.empty_like(query[:1])
        single = PagedRows(rows.tables, rows.sequence_of[row : row + 1].clone(), rows.lengths[row : row + 1].clone())
        attend(alone, query[row : row + 1].contiguous(), keys, values, single, rules)
        assert torch.equal(alone[0], found[row])


@DTYPES
def test_attention_reads_its_own_keys_only(native: Load, dtype: torch.dtype) -> None:
    rows, num_blocks = paged([(5, 1), (0, 7), (30, 3)], block_size=16)
    query = torch.randn(11, 4, 16).to(dtype)
    keys, values = (torch.randn(2, num_blocks, 16, 16).to(dtype) for _ in range(2))
    attend, rules = native(dtype).attention, Rules(0.25)
    clean, found = torch.empty_like(query), torch.empty_like(query)
    attend(clean, query, keys, values, rows, rules)
    # The second sequence is poisoned, and so is what lies behind everybody's last key.
    for cache in (keys, values):
        cache[:, rows.tables[1, 0]] = torch.nan
        cache[:, rows.tables[0, 0], 6:] = torch.nan
        cache[:, rows.tables[2, 2], 1:] = torch.nan
    attend(found, query, keys, values, rows, rules)
    assert torch.equal(found[[0, 8, 9, 10]], clean[[0, 8, 9, 10]])
    assert found[1:8].isnan().all()

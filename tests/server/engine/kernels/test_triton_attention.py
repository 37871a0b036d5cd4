"""The Triton attention kernel equals the reference: decode rows and pieces, cached prefixes, windows, caps, hostile neighbours."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from server.engine.kernels.paged import PagedRows, Rules, attention_reference
from server.engine.kernels.triton_attention import attention_triton

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
# The interpreter computes with NumPy, which warns of what is meant here.
pytestmark = pytest.mark.filterwarnings("ignore:.*encountered:RuntimeWarning")

BLOCK = 16
Case = tuple[Tensor, Tensor, Tensor, PagedRows]


def make(
    pieces: list[tuple[int, int]], *, heads: int = 4, kv_heads: int = 2, width: int = 16, dtype: torch.dtype = torch.float32
) -> Case:
    """Query, keys, values and rows of sequences with ``length`` keys, of which the last ``count`` are rows: (length, count)."""
    generator = torch.Generator().manual_seed(sum(length for length, _ in pieces))
    longest = max(-(-length // BLOCK) for length, _ in pieces)
    num_blocks = 1 + sum(-(-length // BLOCK) for length, _ in pieces)
    free = (torch.randperm(num_blocks - 1, generator=generator) + 1).tolist()
    tables = torch.zeros(len(pieces), longest, dtype=torch.int32)
    for index, (length, _) in enumerate(pieces):
        for block in range(-(-length // BLOCK)):
            tables[index, block] = free.pop()
    cache = torch.randn(2, kv_heads, num_blocks, BLOCK, width, generator=generator).to(DEVICE, dtype)
    sequence_of = [index for index, (_, count) in enumerate(pieces) for _ in range(count)]
    lengths = [length - count + 1 + row for length, count in pieces for row in range(count)]
    query = torch.randn(len(lengths), heads, width, generator=generator).to(DEVICE, dtype)
    rows = PagedRows(*(torch.tensor(item, dtype=torch.int32, device=DEVICE) for item in (tables.tolist(), sequence_of, lengths)))
    return query, cache[0], cache[1], rows


def both(case: Case, rules: Rules) -> tuple[Tensor, Tensor]:
    query, key, value, rows = case
    expected = torch.empty_like(query, dtype=torch.float64)
    attention_reference(expected, query.double(), key.double(), value.double(), rows, rules)
    found = torch.full_like(query, float("nan"))
    attention_triton(found, query, key, value, rows, rules)
    return found.double(), expected


RULES = [Rules(0.3), Rules(0.3, window=7), Rules(0.3, window=70), Rules(0.3, softcap=1.5), Rules(0.3, window=40, softcap=2.0)]
DECODES = [(1, 1), (5, 1), (16, 1), (17, 1), (64, 1), (150, 1)]
PIECES = [(3, 1), (30, 30), (90, 20), (65, 65), (7, 1), (7, 2)]


@pytest.mark.parametrize("rules", RULES, ids=str)
@pytest.mark.parametrize("pieces", [DECODES, PIECES], ids=["decodes", "pieces"])
def test_attention_equals_the_reference(pieces: list[tuple[int, int]], rules: Rules) -> None:
    found, expected = both(make(pieces), rules)
    torch.testing.assert_close(found, expected, rtol=0, atol=2e-6)


@pytest.mark.parametrize("rules", [Rules(0.3), Rules(0.3, window=600), Rules(0.3, window=20, softcap=1.5)], ids=str)
def test_long_decodes_are_joined_from_parts(rules: Rules) -> None:
    found, expected = both(make([(1300, 1), (512, 1), (513, 1), (4, 1)]), rules)
    torch.testing.assert_close(found, expected, rtol=0, atol=2e-6)


@pytest.mark.parametrize(("heads", "kv_heads", "width"), [(3, 3, 16), (9, 3, 24), (8, 1, 40), (40, 1, 8)])
@pytest.mark.parametrize("pieces", [[(20, 1), (70, 1)], [(20, 1), (70, 9)]], ids=["decodes", "pieces"])
def test_any_heads(heads: int, kv_heads: int, width: int, pieces: list[tuple[int, int]]) -> None:
    found, expected = both(make(pieces, heads=heads, kv_heads=kv_heads, width=width), Rules(0.2))
    torch.testing.assert_close(found, expected, rtol=0, atol=2e-6)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.bfloat16, 2e-2), (torch.float16, 2e-3)])
def test_half_precision(dtype: torch.dtype, tolerance: float) -> None:
    for pieces in ([(20, 1), (600, 1)], [(20, 1), (40, 20)]):
        found, expected = both(make(pieces, dtype=dtype), Rules(0.25))
        torch.testing.assert_close(found, expected, rtol=0, atol=tolerance)


@pytest.mark.parametrize("lengths", [(40, 50), (600, 700)])
def test_a_sequence_that_is_not_finite_stays_alone(lengths: tuple[int, int]) -> None:
    query, key, value, rows = make([(lengths[0], 1), (lengths[1], 1)])
    expected, found = torch.empty_like(query), torch.empty_like(query)
    attention_triton(expected, query, key, value, rows, Rules(0.3))
    used = rows.tables[0, : -(-lengths[0] // BLOCK)].long()
    key[:, used], value[:, used] = float("nan"), float("inf")
    attention_triton(found, query, key, value, rows, Rules(0.3))
    assert torch.equal(found[1], expected[1])
    assert not torch.isfinite(found[0]).any()


@pytest.mark.parametrize("rules", [Rules(0.3), Rules(0.3, window=30)], ids=str)
def test_a_row_does_not_depend_on_the_batch(rules: Rules) -> None:
    query, key, value, rows = make([(600, 1), (40, 1), (1100, 1)])
    together = torch.empty_like(query)
    attention_triton(together, query, key, value, rows, rules)
    alone = torch.empty_like(query[1:2])
    first = torch.zeros(1, dtype=torch.int32, device=DEVICE)
    only = PagedRows(rows.tables[1:2, :3].contiguous(), first, rows.lengths[1:2])
    attention_triton(alone, query[1:2], key, value, only, rules)
    torch.testing.assert_close(alone[0], together[1], rtol=0, atol=1e-6)


def test_heads_may_come_first_in_memory() -> None:
    query, key, value, rows = make(PIECES)
    expected, turned = torch.empty_like(query), torch.empty_like(query.transpose(0, 1)).transpose(0, 1)
    attention_triton(expected, query, key, value, rows, Rules(0.3))
    attention_triton(turned, query.transpose(0, 1).contiguous().transpose(0, 1), key, value, rows, Rules(0.3))
    assert torch.equal(turned, expected)

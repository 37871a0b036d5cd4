"""One request's tokens: kv indices, positions and hashes, with and without pseudo-tokens in front."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from server.engine.sequence import PSEUDO_TOKEN, Sequence
from server.engine.types import ProgramRef, Request, SamplingParams

PROGRAM = ProgramRef("p", "file")


def make(prompt: list[int], num_kv: int, num_virtual: int, *, shifts: bool = True, tenant: str = "acme") -> Sequence:
    sequence = Sequence(Request("x", tuple(prompt), SamplingParams(), PROGRAM, tenant), 1)
    sequence.start_with(num_kv, num_virtual, num_kv + num_virtual if shifts else 0)
    return sequence


prompts = st.lists(st.integers(0, 9), min_size=1, max_size=30)
few = st.integers(0, 12)


@given(prompt=prompts, output=st.lists(st.integers(0, 9), max_size=8), num_kv=few, num_virtual=few, shifts=st.booleans())
def test_tokens_and_positions_by_kv_index(
    prompt: list[int], output: list[int], num_kv: int, num_virtual: int, shifts: bool
) -> None:
    sequence = make(prompt, num_kv, num_virtual, shifts=shifts)
    sequence.token_ids += output
    length = num_kv + num_virtual
    assert (sequence.num_prompt, sequence.num_output, sequence.output_ids) == (length + len(prompt), len(output), output)
    tokens = [PSEUDO_TOKEN] * length + prompt + output
    shift = length if shifts else 0
    positions = [*range(length), *range(shift, shift + len(prompt) + len(output))]
    assert sequence.num_tokens == len(tokens)
    for start in range(len(tokens) + 1):
        for end in range(start, len(tokens) + 1):
            assert sequence.tokens_between(start, end) == tokens[start:end]
            assert list(sequence.positions_between(start, end)) == positions[start:end]


@given(first=prompts, second=prompts, num_kv=few, num_virtual=few, block_size=st.integers(1, 8))
def test_equal_hashes_are_those_of_equal_beginnings(
    first: list[int], second: list[int], num_kv: int, num_virtual: int, block_size: int
) -> None:
    one, two = (make(prompt, num_kv, num_virtual) for prompt in (first, second))
    pairs = zip(one.full_block_hashes(block_size), two.full_block_hashes(block_size), strict=False)
    for index, (left, right) in enumerate(pairs):
        end = (index + 1) * block_size
        assert (left == right) == (one.tokens_between(0, end) == two.tokens_between(0, end))
    other = make(first, num_kv, num_virtual, tenant="other")
    assert not set(one.full_block_hashes(block_size)) & set(other.full_block_hashes(block_size))

"""Choosing tokens from logits. Each row is a function of its own logits, history and random stream: neighbours cannot matter.

A row's random stream is its sequence's own and advances by one number a token, so that a seed gives the same text alone, packed,
or after preemption. ``sample`` takes the rows together and sorts no vocabulary; ``sample_reference`` says row by row, by sorting, what is meant.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Collection

import torch
from torch import Tensor

from server.engine.sequence import Sequence
from server.engine.types import SamplingParams, TokenLogprob

CANDIDATES = 128
"""How many of a row's best tokens are looked at first. Rows of which top-k, top-p and min-p may leave more are looked at once more."""
_PART = 256
"""Vocabularies are searched by parts of so many tokens: first for the part, then within it."""
_COLDEST = 1e-5
"""Lower temperatures count as this one, at which the best token is certain and nothing overflows."""
_UNSURE = 1e-6
"""How close to the border between two tokens a draw may fall before shares in fp32 cannot tell them apart: several times their error."""


def sample(logits: Tensor, sequences: list[Sequence], eos_token_ids: tuple[int, ...]) -> list[int]:
    """The next token of each row. ``logits (S, vocab)``, finite; not changed."""
    if not sequences:
        return []
    adjusted = _adjusted(logits, sequences, eos_token_ids)
    params = [sequence.request.params for sequence in sequences]
    drawn = [row for row, item in enumerate(params) if item.temperature > 0]
    tokens = best(adjusted).tolist() if len(drawn) < len(sequences) else [0] * len(sequences)
    draws = {row: sequences[row].random.random() for row in drawn}
    limited = [row for row in drawn if _is_limited(params[row])]
    for rows in (limited, [row for row in drawn if row not in limited]):
        if rows:
            chosen = [params[row] for row in rows]
            temperatures = torch.tensor(
                [[max(item.temperature, _COLDEST)] for item in chosen], dtype=logits.dtype, device=logits.device
            )
            scaled = (adjusted if len(rows) == len(sequences) else adjusted[rows]) / temperatures
            goals = [draws[row] for row in rows]
            found = _draw_limited(scaled, chosen, goals) if rows is limited else _draw(scaled, goals)
            for row, token in zip(rows, found, strict=True):
                tokens[row] = token
    return tokens


def sample_reference(logits: Tensor, sequences: list[Sequence], eos_token_ids: tuple[int, ...]) -> list[int]:
    """The same, row by row and by sorting the vocabulary."""
    tokens = []
    for row, sequence in zip(logits, sequences, strict=True):
        params = sequence.request.params
        adjusted = row.clone()
        _penalise(adjusted, sequence, eos_token_ids)
        if params.temperature == 0:
            tokens.append(int(adjusted.argmax()))
        else:
            tokens.append(_draw_row(adjusted / max(params.temperature, _COLDEST), params, sequence.random.random()))
    return tokens


def log_probabilities(logits: Tensor, chosen: list[int], tops: list[int]) -> list[TokenLogprob]:
    """Log-probabilities under the model's own distribution, of ``chosen`` and the ``tops[i]`` best tokens of each row."""
    if not chosen:
        return []
    table = torch.log_softmax(logits, dim=-1)
    picked = table.gather(1, torch.tensor(chosen, device=table.device)[:, None])[:, 0].tolist()
    results = []
    for row, (token, logprob, count) in enumerate(zip(chosen, picked, tops, strict=True)):
        best = torch.topk(table[row], count) if count else None
        pairs = () if best is None else tuple(zip(best.indices.tolist(), best.values.tolist(), strict=True))
        results.append(TokenLogprob(token, logprob, pairs))
    return results


def _adjusted(logits: Tensor, sequences: list[Sequence], eos_token_ids: tuple[int, ...]) -> Tensor:
    """The logits after penalties; the given ones where no row has any."""
    rows = [row for row, sequence in enumerate(sequences) if _has_penalties(sequence)]
    if not rows:
        return logits
    adjusted = logits.clone()
    for row in rows:
        _penalise(adjusted[row], sequences[row], eos_token_ids)
    return adjusted


def _has_penalties(sequence: Sequence) -> bool:
    params = sequence.request.params
    return bool(
        params.repetition_penalty != 1
        or params.presence_penalty
        or params.frequency_penalty
        or params.logit_bias
        or sequence.num_output < params.min_tokens
    )


def _penalise(logits: Tensor, sequence: Sequence, eos_token_ids: tuple[int, ...]) -> None:
    """Repetition (over prompt and output, as in Keskar et al. 2019), presence and frequency (over the output), bias, minimum length.

    Changes ``logits (vocab,)``.
    """
    params = sequence.request.params
    if params.repetition_penalty != 1:
        # A token that was seen twice is written twice, with the same value.
        seen = torch.tensor(sequence.token_ids, device=logits.device)
        values = logits[seen]
        logits[seen] = torch.where(values > 0, values / params.repetition_penalty, values * params.repetition_penalty)
    if params.presence_penalty or params.frequency_penalty:
        counts = Counter(sequence.output_ids)
        _add(logits, [(token, -params.presence_penalty - params.frequency_penalty * count) for token, count in counts.items()])
    _add(logits, params.logit_bias)
    if sequence.num_output < params.min_tokens:
        logits[list({*eos_token_ids, *params.stop_token_ids})] = -math.inf


def _add(logits: Tensor, pairs: Collection[tuple[int, float]]) -> None:
    """Add to the logits ``(vocab,)`` of some tokens."""
    if pairs:
        tokens, values = zip(*pairs, strict=True)
        places = torch.tensor(tokens, device=logits.device)
        logits.index_add_(0, places, torch.tensor(values, dtype=logits.dtype, device=logits.device))


def _is_limited(params: SamplingParams) -> bool:
    return params.top_k > 0 or params.top_p < 1 or params.min_p > 0


def best(logits: Tensor) -> Tensor:
    """``logits.argmax(-1)``, for which PyTorch takes ten times as long as for the maxima of ``logits (S, vocab)``."""
    vocab = logits.shape[1]
    if vocab % _PART:
        return logits.argmax(-1)
    parts = logits.reshape(logits.shape[0], -1, _PART)
    part = parts.amax(-1).argmax(-1)
    return part * _PART + parts[torch.arange(logits.shape[0], device=logits.device), part].argmax(-1)


def _draw(scaled: Tensor, draws: list[float]) -> list[int]:
    """A token of each row's whole vocabulary. ``scaled (R, vocab)`` are logits over temperature, ``draws`` uniform in [0, 1)."""
    vocab, device = scaled.shape[1], scaled.device
    if vocab % _PART:
        return _at(torch.softmax(scaled, dim=-1, dtype=torch.float64), draws).tolist()
    shares = torch.softmax(scaled, dim=-1).reshape(scaled.shape[0], -1, _PART)
    sums = shares.sum(-1).double()
    behind = torch.cumsum(sums, dim=-1)
    goals = torch.tensor(draws, dtype=torch.float64, device=device)[:, None] * behind[:, -1:]
    part = torch.searchsorted(behind, goals).clamp(max=sums.shape[1] - 1)
    before = (behind - sums).gather(1, part)
    within = before + torch.cumsum(shares[torch.arange(len(draws), device=device), part[:, 0]].double(), dim=-1)
    place = torch.searchsorted(within, goals).clamp(max=_PART - 1)
    # Where the draw is near the border between two tokens, fp64 decides.
    distance = torch.minimum((within - goals).abs().amin(-1), (goals - before).abs()[:, 0])
    found = zip((part * _PART + place)[:, 0].tolist(), (distance < _UNSURE).tolist(), strict=True)
    return [
        int(_at(torch.softmax(scaled[row : row + 1], dim=-1, dtype=torch.float64), draws[row : row + 1])) if unsure else token
        for row, (token, unsure) in enumerate(found)
    ]


def _draw_limited(scaled: Tensor, params: list[SamplingParams], draws: list[float], candidates: int = CANDIDATES) -> list[int]:
    """The same from what top-k, top-p and min-p leave, which is looked for among the ``candidates`` best tokens first."""
    vocab, device = scaled.shape[1], scaled.device
    looked_at = min(candidates, vocab)
    ordered, tokens = torch.topk(scaled, looked_at)
    kept = torch.tensor([[min(item.top_k or vocab, vocab)] for item in params], device=device)
    top_p = torch.tensor([[item.top_p if item.top_p < 1 else math.inf] for item in params], dtype=torch.float64, device=device)
    min_p = torch.tensor([[item.min_p] for item in params], dtype=torch.float64, device=device)
    shares = torch.softmax(scaled, dim=-1)
    found = shares.gather(1, tokens).double()
    # Shares of what top-k leaves, which is everything without it.
    within = torch.arange(looked_at, device=device) < kept
    found = found / torch.where(kept <= looked_at, (found * within).sum(-1, keepdim=True), 1.0)
    keep = within & (torch.cumsum(found, dim=-1) - found < top_p) & (found >= min_p * found[:, :1])
    keep[:, 0] = True
    # What is kept is the beginning of the order: it is complete where it ends before the candidates do.
    complete = ((kept <= looked_at) | ((kept == vocab) & ~keep[:, -1:]))[:, 0].tolist()
    places = _at(torch.softmax(torch.where(keep, ordered.double(), -math.inf), dim=-1), draws)
    chosen = tokens.gather(1, places[:, None])[:, 0].tolist()
    for row in [row for row, done in enumerate(complete) if not done and looked_at < vocab]:
        enough = _enough(shares[row], params[row])
        # A second look is the last one: rounded shares may never add up to a top-p that is next to 1, and then all is looked at.
        enough = enough if candidates == CANDIDATES and enough > looked_at else vocab
        (chosen[row],) = _draw_limited(scaled[row : row + 1], params[row : row + 1], draws[row : row + 1], enough)
    return chosen


def _enough(shares: Tensor, params: SamplingParams) -> int:
    """How many of a row's best tokens hold all that its limits leave. ``shares (vocab,)`` of probability."""
    vocab = shares.shape[0]
    if params.top_k:
        return params.top_k
    # All tokens of a smaller share than this have less than 1 - top_p together: the others reach top_p without them.
    least = max((1 - params.top_p) / vocab, params.min_p * float(shares.max()))
    return min(int((shares >= least).sum()) + 1, vocab)


def _at(shares: Tensor, draws: list[float]) -> Tensor:
    """Where each row's draw falls in its cumulative ``shares (R, n)``, in fp64 ``(R,)``."""
    cumulative = torch.cumsum(shares, dim=-1)
    goals = torch.tensor(draws, dtype=torch.float64, device=shares.device)[:, None] * cumulative[:, -1:]
    return torch.searchsorted(cumulative, goals)[:, 0].clamp(max=shares.shape[1] - 1)


def _draw_row(scaled: Tensor, params: SamplingParams, draw: float) -> int:
    """A token of one row ``(vocab,)``; all of its vocabulary is sorted where it is limited."""
    ordered, tokens = _candidates(scaled, params)
    cumulative = torch.cumsum(torch.softmax(ordered.double(), dim=-1), dim=-1)
    place = int(torch.searchsorted(cumulative, torch.tensor(draw * float(cumulative[-1]), dtype=torch.float64)))
    return int(tokens[min(place, tokens.shape[0] - 1)])


def _candidates(logits: Tensor, params: SamplingParams) -> tuple[Tensor, Tensor]:
    """The tokens that top-k, top-p and min-p leave, as (logits, token ids). Without any of them: all, unsorted."""
    vocab = logits.shape[0]
    if not _is_limited(params):
        return logits, torch.arange(vocab, device=logits.device)
    kept = min(params.top_k or vocab, vocab)
    ordered, tokens = torch.topk(logits, kept)
    probabilities = torch.softmax(ordered, dim=-1)
    keep = torch.ones_like(ordered, dtype=torch.bool)
    if params.top_p < 1:
        # The smallest set whose probability reaches top_p: a token stays while those before it have not reached it.
        keep &= torch.cumsum(probabilities, dim=-1) - probabilities < params.top_p
    if params.min_p > 0:
        keep &= probabilities >= params.min_p * probabilities[0]
    keep[0] = True
    return ordered[keep], tokens[keep]

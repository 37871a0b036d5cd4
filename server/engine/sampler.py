"""Choosing tokens from logits. Each row is a function of its own logits, history and random stream: neighbours cannot matter.

A row's random stream is its sequence's own and advances by one number a token, so that a seed gives the same text alone, packed,
or after preemption.
"""

from __future__ import annotations

import math
from collections import Counter

import torch
from torch import Tensor

from server.engine.sequence import Sequence
from server.engine.types import SamplingParams, TokenLogprob


def sample(logits: Tensor, sequences: list[Sequence], eos_token_ids: tuple[int, ...]) -> list[int]:
    """The next token of each row. ``logits (S, vocab)``, finite; not changed."""
    if not sequences:
        return []
    plain = [_is_plain_greedy(sequence) for sequence in sequences]
    greedy = logits.argmax(-1).tolist()
    return [
        token if easy else _sample_row(logits[row], sequences[row], eos_token_ids)
        for row, (token, easy) in enumerate(zip(greedy, plain, strict=True))
    ]


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


def _is_plain_greedy(sequence: Sequence) -> bool:
    params = sequence.request.params
    return (
        params.temperature == 0
        and params.repetition_penalty == 1
        and params.presence_penalty == 0
        and params.frequency_penalty == 0
        and not params.logit_bias
        and sequence.num_output >= params.min_tokens
    )


def _sample_row(logits: Tensor, sequence: Sequence, eos_token_ids: tuple[int, ...]) -> int:
    params = sequence.request.params
    adjusted = _penalise(logits.clone(), sequence, eos_token_ids)
    if params.temperature == 0:
        return int(adjusted.argmax())
    draw = sequence.random.random()
    ordered, tokens = _candidates(adjusted / params.temperature, params)
    cumulative = torch.cumsum(torch.softmax(ordered.double(), dim=-1), dim=-1)
    place = int(torch.searchsorted(cumulative, torch.tensor(draw * float(cumulative[-1]), dtype=torch.float64)))
    return int(tokens[min(place, tokens.shape[0] - 1)])


def _penalise(logits: Tensor, sequence: Sequence, eos_token_ids: tuple[int, ...]) -> Tensor:
    """Repetition (over prompt and output, as in Keskar et al. 2019), presence and frequency (over the output), bias, minimum length."""
    params = sequence.request.params
    if params.repetition_penalty != 1:
        seen = torch.tensor(sorted(set(sequence.token_ids)), device=logits.device)
        values = logits[seen]
        logits[seen] = torch.where(values > 0, values / params.repetition_penalty, values * params.repetition_penalty)
    if params.presence_penalty or params.frequency_penalty:
        for token, count in Counter(sequence.output_ids).items():
            logits[token] -= params.presence_penalty + params.frequency_penalty * count
    for token, bias in params.logit_bias:
        logits[token] += bias
    if sequence.num_output < params.min_tokens:
        logits[list({*eos_token_ids, *params.stop_token_ids})] = -math.inf
    return logits


def _candidates(logits: Tensor, params: SamplingParams) -> tuple[Tensor, Tensor]:
    """The tokens that top-k, top-p and min-p leave, as (logits, token ids). Without any of them: all, unsorted."""
    vocab = logits.shape[0]
    if params.top_k == 0 and params.top_p >= 1 and params.min_p == 0:
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

"""How OpenAI shows one choice, whole or in parts, as text or as a chat message; and the usage of a reply."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from server.api.generation import Call, Completion, Delta
from server.engine.types import FinishReason, TokenLogprob
from server.tokenizer import Tokenizer


@dataclass(frozen=True, slots=True)
class Choice:
    """One sequence of a reply. ``echo`` is the prompt's text where it is to be repeated, ``num_echoed`` its tokens."""

    call: Call
    echo: str = ""
    num_echoed: int = 0


def usage(found: Sequence[Choice], done: Sequence[Completion]) -> dict[str, Any]:
    """Tokens of a reply. Choices of one prompt count it once."""
    prompts = {choice.call.prompt_token_ids for choice in found}
    prompt = sum(len(tokens) for tokens in prompts)
    completion = sum(item.completion_tokens for item in done)
    cached = min(prompt, max((item.num_cached_tokens for item in done), default=0))
    return {
        "prompt_tokens": prompt,
        "completion_tokens": completion,
        "total_tokens": prompt + completion,
        "prompt_tokens_details": {"cached_tokens": cached},
    }


def finish_reason(reason: FinishReason | None) -> str | None:
    return None if reason is None else reason.value


class TextRenderer:
    """Choices of ``/v1/completions``."""

    def __init__(self, tokenizer: Tokenizer, logprobs: bool) -> None:
        self._tokenizer = tokenizer
        self._logprobs = logprobs

    def whole(self, index: int, choice: Choice, completion: Completion) -> dict[str, Any]:
        logprobs = None
        if self._logprobs:
            echoed = completion.prompt_logprobs if choice.num_echoed else ()
            tokens = [*choice.call.prompt_token_ids[: choice.num_echoed], *completion.token_ids]
            logprobs = self._show(tokens, [*(echoed or ()), *completion.logprobs], 0)
        return {
            "index": index,
            "text": choice.echo + completion.text,
            "finish_reason": finish_reason(completion.finish_reason),
            "logprobs": logprobs,
        }

    def parts(self, index: int, choice: Choice, delta: Delta, so_far: Completion, is_first: bool) -> Iterator[dict[str, Any]]:
        text = (choice.echo if is_first else "") + delta.text
        logprobs = None
        if self._logprobs:
            logprobs = self._show(list(delta.token_ids), list(delta.logprobs), len(choice.echo) + len(so_far.text))
        yield {"index": index, "text": text, "finish_reason": finish_reason(delta.finish_reason), "logprobs": logprobs}

    def _show(self, tokens: list[int], items: list[TokenLogprob | None], offset: int) -> dict[str, Any]:
        texts = [self._tokenizer.token_text(token) for token in tokens]
        offsets = []
        for text in texts:
            offsets.append(offset)
            offset += len(text)
        return {
            "tokens": texts,
            "token_logprobs": [None if item is None else item.logprob for item in items],
            "top_logprobs": [
                None if item is None else {self._tokenizer.token_text(other): logprob for other, logprob in item.top}
                for item in items
            ],
            "text_offset": offsets,
        }


class ChatRenderer:
    """Choices of ``/v1/chat/completions``."""

    def __init__(self, tokenizer: Tokenizer, logprobs: bool) -> None:
        self._tokenizer = tokenizer
        self._logprobs = logprobs

    def whole(self, index: int, choice: Choice, completion: Completion) -> dict[str, Any]:
        return {
            "index": index,
            "message": {"role": "assistant", "content": completion.text, "refusal": None},
            "finish_reason": finish_reason(completion.finish_reason),
            "logprobs": self._show(completion.logprobs),
        }

    def parts(self, index: int, choice: Choice, delta: Delta, so_far: Completion, is_first: bool) -> Iterator[dict[str, Any]]:
        if is_first:
            yield {"index": index, "delta": {"role": "assistant", "content": ""}, "finish_reason": None, "logprobs": None}
        if delta.text or (self._logprobs and delta.token_ids):
            shown = {"content": delta.text}
            yield {"index": index, "delta": shown, "finish_reason": None, "logprobs": self._show(delta.logprobs)}
        if delta.finish_reason is not None:
            yield {"index": index, "delta": {}, "finish_reason": finish_reason(delta.finish_reason), "logprobs": None}

    def _show(self, items: Sequence[TokenLogprob]) -> dict[str, Any] | None:
        if not self._logprobs:
            return None
        return {
            "content": [
                {**self._one(item.token_id, item.logprob), "top_logprobs": [self._one(*top) for top in item.top]}
                for item in items
            ],
            "refusal": None,
        }

    def _one(self, token_id: int, logprob: float) -> dict[str, Any]:
        text = self._tokenizer.token_text(token_id)
        return {"token": text, "logprob": logprob, "bytes": list(text.encode())}

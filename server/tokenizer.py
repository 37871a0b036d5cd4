"""Text to tokens and back: the base's own tokenizer and chat template. Adapters bring neither."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jinja2.exceptions import TemplateError
from tokenizers.decoders import DecodeStream
from transformers import AutoTokenizer

MOST_UNFINISHED = 32
"""Tokens after which what is still no whole character never becomes one. A character has at most four bytes, seldom a token each."""


class TokenizerError(Exception):
    """The text or the messages cannot be turned into tokens; the message is fit for the caller."""


class Tokenizer:
    """The base's fast tokenizer. Thread-safe for what is used here."""

    def __init__(self, directory: Path) -> None:
        loaded: Any = AutoTokenizer.from_pretrained(directory)
        if not loaded.is_fast:
            raise TokenizerError(f"{directory} has no fast tokenizer (tokenizer.json)")
        self._tokenizer = loaded
        self.backend = loaded.backend_tokenizer
        # tokenizer.json may ask for them, and would then change what a caller sent.
        self.backend.no_truncation()
        self.backend.no_padding()
        self._special = frozenset(loaded.all_special_ids)
        self._unseen = frozenset(index for index, token in self.backend.get_added_tokens_decoder().items() if token.special)

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """Token ids of a text."""
        # encode() would hold the interpreter's lock all the time, for seconds on a long text; a batch of one lets others run.
        (found,) = self.backend.encode_batch_fast([text], add_special_tokens=add_special_tokens)
        return list(found.ids)

    def decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        return str(self.backend.decode(list(token_ids), skip_special_tokens=skip_special_tokens))

    def token_text(self, token_id: int) -> str:
        """One token on its own, special tokens shown; bytes that are no whole character come as U+FFFD."""
        return str(self.backend.decode([token_id], skip_special_tokens=False))

    def is_special(self, token_id: int) -> bool:
        return token_id in self._special

    def is_unseen(self, token_id: int) -> bool:
        """Whether texts leave the token out."""
        return token_id in self._unseen

    def chat(self, messages: list[dict[str, Any]]) -> list[int]:
        """Token ids of a conversation in the base's own template, with the assistant's turn opened. Raises TokenizerError.

        transformers renders templates in Jinja's immutable sandbox; messages are data there, never template text.
        """
        if not self._tokenizer.chat_template:
            raise TokenizerError("this base model has no chat template; use /v1/completions or /generate")
        try:
            text = self._tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        except (TemplateError, ValueError, TypeError, KeyError) as error:
            raise TokenizerError(f"the base model's chat template refuses these messages: {error}"[:300]) from error
        return self.encode(text, add_special_tokens=False)


class Detokenizer:
    """The text of one sequence as its tokens arrive: only whole characters, each once."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._stream = DecodeStream(skip_special_tokens=True)
        self._unfinished: list[int] = []

    def add(self, token_id: int) -> str:
        """The text that this token completes; empty while a character is unfinished.

        The library decodes everything since the last whole character again with each token. So it is not told of tokens that texts leave
        out, and is given up on after MOST_UNFINISHED tokens of which not one character was made: those are shown as U+FFFD.
        """
        if self._tokenizer.is_unseen(token_id):
            return ""
        text = self._stream.step(self._tokenizer.backend, token_id) or ""
        self._unfinished = [] if text else [*self._unfinished, token_id]
        if len(self._unfinished) < MOST_UNFINISHED:
            return text
        shown = self._tokenizer.decode(self._unfinished)
        if set(shown) != {"\ufffd"}:
            # Each token ends one character and begins the next: the text is whole, only never at a token's end.
            return text
        self._unfinished, self._stream = [], DecodeStream(skip_special_tokens=True)
        return shown


class StopText:
    """Cuts a growing text at the first stop string, holding back what could become one."""

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = [stop for stop in stops if stop]
        self._held = ""

    def add(self, text: str) -> tuple[str, bool]:
        """Text that is safe to show, and whether a stop string was met; nothing may be added after that."""
        self._held += text
        met = [place for stop in self._stops if (place := self._held.find(stop)) >= 0]
        if met:
            shown, self._held = self._held[: min(met)], ""
            return shown, True
        keep = max((_overlap(self._held, stop) for stop in self._stops), default=0)
        cut = len(self._held) - keep
        shown, self._held = self._held[:cut], self._held[cut:]
        return shown, False

    def flush(self) -> str:
        """What was held back, when no more text comes."""
        shown, self._held = self._held, ""
        return shown


def _overlap(text: str, stop: str) -> int:
    """The length of the longest end of ``text`` that begins ``stop``."""
    return next((size for size in range(min(len(text), len(stop) - 1), 0, -1) if stop.startswith(text[-size:])), 0)

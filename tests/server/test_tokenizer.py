"""Detokenising and stop strings: whole characters, each once, and nothing of a stop string."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from server.tokenizer import MOST_UNFINISHED, Detokenizer, StopText, Tokenizer, TokenizerError
from tests.conftest import TinyModels


@pytest.fixture(scope="module")
def tokenizer(tiny_models: TinyModels) -> Tokenizer:
    return Tokenizer(tiny_models("llama"))


@pytest.mark.parametrize("text", ["hello", "héllo wörld", "日本語 テキスト", "🎉✨👩‍👩‍👧", " spaces  and\n\nlines ", "مرحبا"])
def test_streaming_gives_the_text_in_whole_characters(text: str, tokenizer: Tokenizer) -> None:
    stream = Detokenizer(tokenizer)
    parts = [stream.add(token) for token in tokenizer.encode(text)]
    assert "".join(parts) == text
    assert not any("\ufffd" in part for part in parts)


def test_special_tokens_are_not_shown(tokenizer: Tokenizer) -> None:
    stream = Detokenizer(tokenizer)
    ids = [*tokenizer.encode("a"), 2, *tokenizer.encode("b")]
    assert "".join(stream.add(token) for token in ids) == "ab"
    assert tokenizer.is_special(2)
    assert tokenizer.token_text(2) == "<eos>"


def test_bytes_that_never_become_a_character_are_shown_as_such(tokenizer: Tokenizer) -> None:
    """And what is held back meanwhile, which every further token costs again, stays short."""
    (first, *_) = tokenizer.encode("é")
    stream = Detokenizer(tokenizer)
    for token in [*tokenizer.encode("a"), *[first] * 10 * MOST_UNFINISHED]:
        stream.add(token)
        assert len(stream._unfinished) < MOST_UNFINISHED
    assert stream.add(*tokenizer.encode("b")) == "b"
    stream = Detokenizer(tokenizer)
    parts = [stream.add(token) for token in [first] * MOST_UNFINISHED]
    assert parts == [""] * (MOST_UNFINISHED - 1) + ["\ufffd" * MOST_UNFINISHED]


def test_a_character_behind_many_special_tokens_is_whole(tokenizer: Tokenizer) -> None:
    first, second = tokenizer.encode("é")
    stream = Detokenizer(tokenizer)
    assert [stream.add(token) for token in [first, *[2] * 10 * MOST_UNFINISHED, second]][-1] == "é"


@given(
    text=st.text("abc", max_size=40),
    stops=st.lists(st.text("abc", min_size=1, max_size=4), max_size=3),
    cuts=st.lists(st.integers(1, 5), max_size=40),
)
def test_stop_strings_anywhere_in_any_pieces(text: str, stops: list[str], cuts: list[int]) -> None:
    stopper, shown, stopped, at = StopText(stops), "", False, 0
    for size in [*cuts, *([1] * len(text))]:
        if at >= len(text) or stopped:
            break
        new, stopped = stopper.add(text[at : at + size])
        shown, at = shown + new, at + size
    if not stopped:
        shown += stopper.flush()
    seen = text[:at]
    places = [place for stop in stops if (place := seen.find(stop)) >= 0]
    assert stopped == bool(places)
    assert shown == (seen[: min(places)] if places else seen)


def test_chat_uses_the_bases_template_and_messages_are_data(tokenizer: Tokenizer) -> None:
    hostile = "{{ 7 * 7 }}{% for x in ().__class__.__base__.__subclasses__() %}{{ x }}{% endfor %}"
    text = tokenizer.decode(tokenizer.chat([{"role": "user", "content": hostile}]), skip_special_tokens=False)
    assert text == f"<|im_start|>user\n{hostile}<|im_end|>\n<|im_start|>assistant\n"


def test_a_base_without_a_template_says_so(tokenizer: Tokenizer) -> None:
    tokenizer._tokenizer.chat_template, kept = None, tokenizer._tokenizer.chat_template
    try:
        with pytest.raises(TokenizerError, match="no chat template"):
            tokenizer.chat([{"role": "user", "content": "hi"}])
    finally:
        tokenizer._tokenizer.chat_template = kept

"""What requests are about: four shapes, one message for anything else, and no work for bodies of nonsense."""

from __future__ import annotations

import time
from typing import Any

import pytest
from pydantic import ValidationError

from server.api.schemas import ChatRequest, CompletionRequest
from server.api.task_schemas import EmbeddingsRequest


@pytest.mark.parametrize(
    ("given", "read"),
    [
        ("text", ("text",)),
        (["a", "b"], ("a", "b")),
        ([1, 2], ((1, 2),)),
        ([[1], [2, 3]], ((1,), (2, 3))),
    ],
)
def test_shapes(given: Any, read: Any) -> None:
    assert EmbeddingsRequest(input=given).input == read
    assert CompletionRequest(prompt=given).prompt == read


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (None, "must be a text, a list of texts, token ids, or a list of lists of token ids, not null"),
        ({}, "not an object"),
        (1.5, "not a fraction"),
        ([], "1 to 256 items, not 0"),
        (["x"] * 257, "1 to 256 items, not 257"),
        (["x", 1], "one is a number"),
        ([True], "one is a boolean"),
        ([1, True], "one is a boolean"),
        ([1, None], "one is null"),
        ([1.0], "one is a fraction"),
        ([-1], "one is -1"),
        ([1 << 31], "one is 2147483648"),
        ([[]], "item 0: a list of token ids needs at least one"),
        ([[1], ["x"]], "item 1: token ids are integers from 0 on; one is a text"),
        ([[1], [[2]]], "one is a list"),
        ("\ud800", "half of a surrogate pair"),
    ],
)
def test_anything_else_gets_one_message(given: Any, message: str) -> None:
    with pytest.raises(ValidationError) as caught:
        EmbeddingsRequest(input=given)
    (error,) = caught.value.errors()
    assert error["loc"] == ("input",)
    assert message in error["msg"]


@pytest.mark.parametrize(
    ("kind", "body"),
    [
        (EmbeddingsRequest, {"input": [[]] * 500_000}),
        (EmbeddingsRequest, {"input": [["x"] * 500_000]}),
        (CompletionRequest, {"prompt": [True] * 500_000}),
        (CompletionRequest, {"prompt": "x", "logit_bias": dict.fromkeys(map(str, range(150_000)), "x")}),
        (EmbeddingsRequest, {"input": "x", **dict.fromkeys((f"k{index}" for index in range(150_000)), 1)}),
        (EmbeddingsRequest, {"input": "x", "adapters": [{}] * 500_000}),
        (ChatRequest, {"messages": [{}] * 500_000}),
    ],
    ids=["lists", "list of texts", "booleans", "biases", "fields", "adapters", "messages"],
)
def test_a_body_of_nonsense_costs_little(kind: Any, body: dict[str, Any]) -> None:
    started = time.process_time()
    with pytest.raises(ValidationError) as caught:
        kind.model_validate(body)
    assert len(caught.value.errors()) < 2000
    assert time.process_time() - started < 1

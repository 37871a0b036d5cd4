"""What sentence-transformers writes beside a model decides how its vectors are pooled, or that there are none."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from server.engine.sentence import embedding_pooling

TRANSFORMER = {"type": "sentence_transformers.models.Transformer", "path": ""}
POOLING = {"type": "sentence_transformers.models.Pooling", "path": "1_Pooling"}
NORMALIZE = {"type": "sentence_transformers.models.Normalize", "path": "2_Normalize"}


def directory(path: Path, modules: list[dict[str, Any]], pooling: dict[str, Any]) -> Path:
    (path / "1_Pooling").mkdir()
    (path / "modules.json").write_text(json.dumps(modules))
    (path / "1_Pooling" / "config.json").write_text(json.dumps(pooling))
    return path


def test_a_plain_directory_takes_the_default(tmp_path: Path) -> None:
    assert embedding_pooling(tmp_path, "last") == "last"


@pytest.mark.parametrize(
    ("pooling", "expected"),
    [
        ({"pooling_mode_cls_token": True, "pooling_mode_mean_tokens": False}, "first"),
        ({"pooling_mode_mean_tokens": True}, "mean"),
        ({"pooling_mode_lasttoken": True}, "last"),
        ({"pooling_mode": "cls"}, "first"),
        ({"pooling_mode_max_tokens": True}, ""),
        ({"pooling_mode_mean_tokens": True, "pooling_mode_cls_token": True}, ""),
        ({}, ""),
    ],
)
def test_pooling_modes(pooling: dict[str, Any], expected: str, tmp_path: Path) -> None:
    assert embedding_pooling(directory(tmp_path, [TRANSFORMER, POOLING, NORMALIZE], pooling), "last") == expected


def test_further_layers_are_not_left_out_silently(tmp_path: Path) -> None:
    dense = {"type": "sentence_transformers.models.Dense", "path": "2_Dense"}
    assert embedding_pooling(directory(tmp_path, [TRANSFORMER, POOLING, dense], {"pooling_mode_mean_tokens": True}), "last") == ""

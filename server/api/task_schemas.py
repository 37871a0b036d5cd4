"""Request bodies of the routes that make no token: classification and embeddings. Checked as strictly as those of ``schemas``."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from server.api.inputs import inputs_type
from server.api.schemas import AdapterDrop, AdapterReference, Strict, WeightedAdapters, selection_of
from server.api.selection import Selection

MAX_INPUTS = 256


class TaskRequest(Strict):
    """What both share. ``input``: a text, texts, token ids, or lists of token ids."""

    model: AdapterReference = "base"
    adapters: WeightedAdapters | None = None
    adapter_drop: AdapterDrop = 0
    input: inputs_type(MAX_INPUTS)  # type: ignore[valid-type]
    user: str | None = None

    @property
    def selection(self) -> Selection:
        return selection_of(self.model, self.adapters, self.adapter_drop, self.user)


class ClassifyRequest(TaskRequest):
    """``POST /v1/classify``. ``logits``: show them beside the scores."""

    logits: bool = False


class EmbeddingsRequest(TaskRequest):
    """``POST /v1/embeddings``, OpenAI's. ``dimensions`` may only say what the vectors have."""

    encoding_format: Literal["float", "base64"] = "float"
    dimensions: Annotated[int, Field(ge=1)] | None = None

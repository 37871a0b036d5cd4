"""Request bodies of the routes that make no token: classification and embeddings. Checked as strictly as those of ``schemas``."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from server.api.schemas import AdapterDrop, AdapterReference, Prompt, Strict, TokenId, WeightedAdapters, selection_of
from server.api.selection import Selection

MAX_INPUTS = 256

TokenIds = Annotated[list[TokenId], Field(min_length=1)]


class TaskRequest(Strict):
    """What both share. ``input``: a text, texts, token ids, or lists of token ids."""

    model: AdapterReference = "base"
    adapters: WeightedAdapters | None = None
    adapter_drop: AdapterDrop = 0
    input: (
        Prompt
        | Annotated[list[Prompt], Field(min_length=1, max_length=MAX_INPUTS)]
        | TokenIds
        | Annotated[list[TokenIds], Field(min_length=1, max_length=MAX_INPUTS)]
    )
    user: str | None = None

    @property
    def selection(self) -> Selection:
        return selection_of(self.model, self.adapters, self.adapter_drop)

    @property
    def inputs(self) -> list[str | tuple[int, ...]]:
        """The inputs one by one."""
        if isinstance(self.input, str):
            return [self.input]
        if isinstance(self.input[0], int):
            return [tuple(item for item in self.input if isinstance(item, int))]
        return [tuple(item) if isinstance(item, list) else str(item) for item in self.input]


class ClassifyRequest(TaskRequest):
    """``POST /v1/classify``. ``logits``: show them beside the scores."""

    logits: bool = False


class EmbeddingsRequest(TaskRequest):
    """``POST /v1/embeddings``, OpenAI's. ``dimensions`` may only say what the vectors have."""

    encoding_format: Literal["float", "base64"] = "float"
    dimensions: Annotated[int, Field(ge=1)] | None = None

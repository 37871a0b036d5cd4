"""Request bodies. Everything is checked here, before any work: types strictly, ranges, sizes, and no unknown fields.

Ranges are those of docs/API.md. Responses are built by the routes that send them.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, field_validator, model_validator

from server.adapters.identity import MAX_ADAPTERS, MAX_WEIGHT
from server.api.inputs import MAX_TOKEN_ID, inputs_type
from server.api.selection import Selection
from server.engine.types import SamplingParams

MAX_N = 8
MAX_PROMPTS = 32
MAX_STOPS = 4
MAX_FIELDS = 64
MAX_BIASES = 300

Seed = Annotated[int, Field(ge=0, lt=1 << 63)]
StopText = Annotated[str, StringConstraints(min_length=1, max_length=256)]
TokenId = Annotated[int, Field(ge=0, lt=MAX_TOKEN_ID)]
Prompt = Annotated[str, StringConstraints(max_length=2 << 20)]
Probability = Annotated[float, Field(gt=0, le=1, allow_inf_nan=False)]
Penalty = Annotated[float, Field(ge=-2, le=2, allow_inf_nan=False)]
Temperature = Annotated[float, Field(ge=0, le=100, allow_inf_nan=False)]
AdapterReference = Annotated[str, StringConstraints(min_length=1, max_length=160)]
AdapterDrop = Annotated[int, Field(ge=0, lt=1 << 20)]


class Strict(BaseModel):
    """No unknown fields, no conversions; and no complaint a field about an object that is nonsense as a whole."""

    model_config = ConfigDict(extra="forbid", strict=True)

    @model_validator(mode="before")
    @classmethod
    def _check_size(cls, value: Any) -> Any:
        if isinstance(value, dict) and len(value) > MAX_FIELDS:
            raise ValueError(f"the object has {len(value)} fields; none has more than {MAX_FIELDS}")
        return value


class WeightedAdapter(Strict):
    """One of several adapters of a request. What it changes counts ``weight`` times."""

    adapter: AdapterReference
    weight: Annotated[float, Field(ge=-MAX_WEIGHT, le=MAX_WEIGHT, allow_inf_nan=False)] = 1.0


WeightedAdapters = Annotated[list[WeightedAdapter], Field(min_length=1, max_length=MAX_ADAPTERS)]


def selection_of(name: str | None, adapters: list[WeightedAdapter] | None, drop: int, user: str | None) -> Selection:
    return Selection(name, tuple((item.adapter, item.weight) for item in adapters or ()), drop, user)


class GenerateParameters(Strict):
    """Parameters of text-generation-inference and LoRAX. Those that are not served must keep their neutral value."""

    adapter_id: AdapterReference | None = None
    adapters: WeightedAdapters | None = None
    adapter_drop: AdapterDrop = 0
    user: str | None = None
    adapter_source: Literal["medley", "local", "hub", "s3", "pbase"] | None = None
    adapter_parameters: None = None
    merged_adapters: Any = None
    api_token: str | None = None
    best_of: Literal[1] | None = None
    temperature: Temperature | None = None
    repetition_penalty: Annotated[float, Field(gt=0, le=100, allow_inf_nan=False)] | None = None
    frequency_penalty: Penalty | None = None
    presence_penalty: Penalty | None = None
    top_k: Annotated[int, Field(ge=0, lt=1 << 31)] | None = None
    top_p: Probability | None = None
    min_p: Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)] | None = None
    typical_p: Annotated[float, Field(ge=1, le=1)] | None = None
    do_sample: bool = False
    max_new_tokens: Annotated[int, Field(ge=1, lt=1 << 20)] | None = 20
    ignore_eos_token: bool = False
    return_full_text: bool | None = None
    stop: Annotated[list[StopText], Field(max_length=MAX_STOPS)] = []
    truncate: Annotated[int, Field(ge=1)] | None = None
    watermark: Literal[False] = False
    details: bool = False
    decoder_input_details: bool = False
    return_k_alternatives: Annotated[int, Field(ge=0, le=20)] | None = None
    top_n_tokens: Annotated[int, Field(ge=0, le=20)] | None = None
    apply_chat_template: bool = False
    seed: Seed | None = None
    response_format: None = None
    schema_: None = Field(default=None, alias="schema")
    grammar: None = None

    @property
    def selection(self) -> Selection:
        return selection_of(self.adapter_id, self.adapters, self.adapter_drop, self.user)

    @model_validator(mode="after")
    def _check_adapters(self) -> GenerateParameters:
        if self.merged_adapters is not None:
            raise ValueError('merged_adapters is not served; combine adapters with "adapters": [{"adapter", "weight"}, ...]')
        if self.adapter_id is not None and self.adapters is not None:
            raise ValueError("adapter_id and adapters both say which adapters to use; leave one out")
        return self

    def sampling(self, max_tokens: int) -> SamplingParams:
        """TGI's rule: greedy unless ``do_sample``, or a sampling parameter that only makes sense with it."""
        samples = self.do_sample or any(value is not None for value in (self.temperature, self.top_k, self.top_p, self.min_p))
        temperature = 1.0 if self.temperature is None else self.temperature
        alternatives = self.top_n_tokens or self.return_k_alternatives or 0
        return SamplingParams(
            max_tokens=max_tokens,
            temperature=temperature if samples else 0.0,
            top_k=self.top_k or 0,
            top_p=1.0 if self.top_p is None else self.top_p,
            min_p=self.min_p or 0.0,
            repetition_penalty=self.repetition_penalty or 1.0,
            frequency_penalty=self.frequency_penalty or 0.0,
            presence_penalty=self.presence_penalty or 0.0,
            seed=self.seed,
            ignore_eos=self.ignore_eos_token,
            logprobs=alternatives,
            prompt_logprobs=0 if self.decoder_input_details else None,
        )


class GenerateRequest(Strict):
    """``POST /generate`` and ``/generate_stream``."""

    inputs: Prompt
    parameters: GenerateParameters = Field(default_factory=GenerateParameters)
    stream: bool = False


class StreamOptions(Strict):
    include_usage: bool = False
    include_obfuscation: bool | None = None


class _OpenAIRequest(Strict):
    """What chat and completions share. Fields that only annotate a request are accepted; those that would change the output are refused."""

    model: AdapterReference = "base"
    adapters: WeightedAdapters | None = None
    adapter_drop: AdapterDrop = 0
    temperature: Temperature | None = None
    top_p: Probability | None = None
    n: Annotated[int, Field(ge=1, le=MAX_N)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    stop: StopText | Annotated[list[StopText], Field(max_length=MAX_STOPS)] | None = None
    presence_penalty: Penalty | None = None
    frequency_penalty: Penalty | None = None
    logit_bias: (
        Annotated[dict[str, Annotated[float, Field(ge=-100, le=100, allow_inf_nan=False)]], Field(max_length=MAX_BIASES)] | None
    ) = None
    seed: Seed | None = None
    # Beyond OpenAI, as in vLLM.
    top_k: Annotated[int, Field(ge=0, lt=1 << 31)] | None = None
    min_p: Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)] | None = None
    repetition_penalty: Annotated[float, Field(gt=0, le=100, allow_inf_nan=False)] | None = None
    stop_token_ids: Annotated[list[TokenId], Field(max_length=128)] | None = None
    ignore_eos: bool = False
    min_tokens: Annotated[int, Field(ge=0, lt=1 << 20)] = 0
    # By which an alias always means the same to one user.
    user: str | None = None
    # Annotations only.
    metadata: dict[str, Any] | None = None
    store: bool | None = None
    service_tier: str | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None

    @property
    def selection(self) -> Selection:
        return selection_of(self.model, self.adapters, self.adapter_drop, self.user)

    @property
    def stops(self) -> tuple[str, ...]:
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())

    @property
    def biases(self) -> tuple[tuple[int, float], ...]:
        return tuple((int(token), bias) for token, bias in (self.logit_bias or {}).items())

    @field_validator("logit_bias", mode="before")
    @classmethod
    def _check_biases(cls, value: Any) -> Any:
        if isinstance(value, dict) and len(value) > MAX_BIASES:
            raise ValueError(f"up to {MAX_BIASES} token ids may have a bias, not {len(value)}")
        if isinstance(value, dict) and any(not (token.isascii() and token.isdigit()) or len(token) > 9 for token in value):
            raise ValueError("logit_bias keys must be token ids")
        return value

    def _params(self, max_tokens: int, index: int, logprobs: int | None, prompt_logprobs: int | None) -> SamplingParams:
        """``index`` is the choice's number: a seed makes each choice reproducible, and different."""
        return SamplingParams(
            max_tokens=max_tokens,
            min_tokens=self.min_tokens,
            temperature=1.0 if self.temperature is None else self.temperature,
            top_k=self.top_k or 0,
            top_p=1.0 if self.top_p is None else self.top_p,
            min_p=self.min_p or 0.0,
            repetition_penalty=self.repetition_penalty or 1.0,
            presence_penalty=self.presence_penalty or 0.0,
            frequency_penalty=self.frequency_penalty or 0.0,
            logit_bias=self.biases,
            seed=None if self.seed is None else self.seed + index,
            stop_token_ids=tuple(self.stop_token_ids or ()),
            ignore_eos=self.ignore_eos,
            logprobs=logprobs,
            prompt_logprobs=prompt_logprobs,
        )


class CompletionRequest(_OpenAIRequest):
    """``POST /v1/completions``. ``prompt``: a text, texts, token ids, or lists of token ids."""

    prompt: inputs_type(MAX_PROMPTS)  # type: ignore[valid-type]
    max_tokens: Annotated[int, Field(ge=1, lt=1 << 20)] | None = 16
    echo: bool | None = None
    logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    best_of: Literal[1] | None = None
    suffix: None = None

    def sampling(self, max_tokens: int, index: int) -> SamplingParams:
        return self._params(max_tokens, index, self.logprobs, self.logprobs if self.echo else None)


class TextPart(Strict):
    type: Literal["text"]
    text: Prompt


class ChatMessage(Strict):
    """A message of text. Images, audio and tool calls are not served."""

    role: Literal["system", "developer", "user", "assistant"]
    content: Prompt | Annotated[list[TextPart], Field(max_length=64)]
    name: Annotated[str, StringConstraints(max_length=64)] | None = None
    refusal: None = None
    tool_calls: None = None
    function_call: None = None
    audio: None = None
    annotations: Any = None

    def plain(self) -> dict[str, object]:
        content = self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)
        return {"role": "system" if self.role == "developer" else self.role, "content": content}


class TextFormat(Strict):
    type: Literal["text"]


class ChatRequest(_OpenAIRequest):
    """``POST /v1/chat/completions``."""

    messages: Annotated[list[ChatMessage], Field(min_length=1, max_length=512)]
    max_tokens: Annotated[int, Field(ge=1, lt=1 << 20)] | None = None
    max_completion_tokens: Annotated[int, Field(ge=1, lt=1 << 20)] | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    response_format: TextFormat | None = None
    modalities: list[Literal["text"]] | None = None
    # Known to OpenAI, not served: only values that ask for nothing.
    tools: Annotated[list[Any], Field(max_length=0)] | None = None
    tool_choice: Literal["none", "auto"] | None = None
    parallel_tool_calls: bool | None = None
    functions: None = None
    function_call: None = None
    audio: None = None
    prediction: None = None
    reasoning_effort: None = None
    verbosity: None = None
    web_search_options: None = None

    @property
    def limit(self) -> int | None:
        return self.max_completion_tokens if self.max_completion_tokens is not None else self.max_tokens

    def sampling(self, max_tokens: int, index: int) -> SamplingParams:
        return self._params(max_tokens, index, (self.top_logprobs or 0) if self.logprobs else None, None)

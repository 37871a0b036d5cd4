"""The values that pass between the HTTP process, the engine and its parts. Standard library only."""

from __future__ import annotations

import enum
from dataclasses import dataclass, field
from typing import Any


class FinishReason(enum.StrEnum):
    """Why a request ended. Every accepted request ends exactly once, with one of these."""

    STOP = "stop"
    LENGTH = "length"
    ABORT = "abort"
    ERROR = "error"


class Task(enum.StrEnum):
    """What a request asks for: new tokens, the adapter's classifier, or the text's vector. The last two make no token."""

    GENERATE = "generate"
    CLASSIFY = "classify"
    EMBED = "embed"


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How to choose tokens. Values are validated at the edge; see docs/API.md for their ranges.

    ``temperature`` 0 is greedy. ``top_k`` 0, ``top_p`` 1 and ``min_p`` 0 are off. ``logprobs`` None is off, ``k`` returns the
    chosen token's and the ``k`` best; ``prompt_logprobs`` likewise for the prompt's tokens. ``logit_bias`` is (token id, bias).
    ``seed`` None draws from the engine's own generator. ``stop_token_ids`` end the request in addition to the model's own
    end-of-sequence ids, which ``ignore_eos`` switches off.
    """

    max_tokens: int = 16
    min_tokens: int = 0
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: tuple[tuple[int, float], ...] = ()
    seed: int | None = None
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    logprobs: int | None = None
    prompt_logprobs: int | None = None


@dataclass(frozen=True, slots=True)
class ProgramRef:
    """A program and the file that the engine maps when it is not resident. The base model has no file.

    ``num_virtual`` is what the edge knows of how much of the model's length the program's pseudo-tokens take; the engine asks the file.
    """

    program_id: str = "base"
    path: str = ""
    num_virtual: int = 0

    @property
    def is_base(self) -> bool:
        return not self.path


BASE = ProgramRef()


@dataclass(frozen=True, slots=True)
class Request:
    """One sequence to compute. ``tenant`` owns the fairness counter and salts the prefix cache. ``params`` count when generating only.

    ``streams``: somebody reads the tokens as they are made. Otherwise they come together at the end, but for the first one.
    """

    request_id: str
    prompt_token_ids: tuple[int, ...]
    params: SamplingParams
    program: ProgramRef = BASE
    tenant: str = ""
    task: Task = Task.GENERATE
    streams: bool = True


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    """A token's log-probability under the model's own distribution (before temperature and penalties), and the best ones."""

    token_id: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True, slots=True)
class RequestError:
    """Why a request failed: a code of docs/ERRORS.md and a message fit for the caller."""

    code: str
    message: str


@dataclass(frozen=True, slots=True)
class TaskResult:
    """What a request that makes no token gives: a vector of unit length (embed), or a logit a label (classify).

    ``rows`` has one row, or with ``per_token`` one for each token of the prompt. ``multi_label``: labels do not exclude each other.
    """

    rows: tuple[tuple[float, ...], ...]
    labels: tuple[str, ...] = ()
    multi_label: bool = False
    per_token: bool = False


@dataclass(frozen=True, slots=True)
class RequestOutput:
    """What was made for one request since its last output. ``finish_reason`` is set exactly once, on the last output.

    ``logprobs`` is parallel to ``token_ids`` when asked for. ``prompt_logprobs`` comes once, with the first token: None for
    the first prompt token. ``stop_token_id`` is the end token that was hit; it is not in ``token_ids``, nor ``stop_logprob`` in
    ``logprobs``. ``result`` comes with the end of a request that makes no token.
    """

    request_id: str
    token_ids: tuple[int, ...] = ()
    logprobs: tuple[TokenLogprob, ...] = ()
    prompt_logprobs: tuple[TokenLogprob | None, ...] | None = None
    num_cached_tokens: int = 0
    finish_reason: FinishReason | None = None
    stop_token_id: int | None = None
    stop_logprob: TokenLogprob | None = None
    error: RequestError | None = None
    result: TaskResult | None = None


class ProgramState(enum.StrEnum):
    """Where a program is, as the engine tells the registry: resident from when it has its place on the device, though its copy may take a
    moment longer there."""

    STORED = "stored"
    LOADING = "loading"
    HOST = "host"
    RESIDENT = "resident"
    DRAINING = "draining"


@dataclass(frozen=True, slots=True)
class ProgramEvent:
    """A program changed state. ``seconds`` is the time that the change took, where it took any, and ``nbytes`` what it takes there.

    ``reason``: ``evicted`` for want of room, ``dropped``, ``load_failed`` (from disk, or to the device), or ``pin_limit``. The last two mean that
    the program is not pinned, or not any more, and are told also where the state is as before.
    """

    program_id: str
    state: ProgramState
    nbytes: int = 0
    seconds: float = 0.0
    reason: str = ""


@dataclass(frozen=True, slots=True)
class EngineStats:
    """A snapshot taken between two steps. ``counters`` only grow."""

    running: int = 0
    waiting: int = 0
    waiting_for_adapter: int = 0
    kv_blocks_total: int = 0
    kv_blocks_used: int = 0
    kv_blocks_cached: int = 0
    bank_bytes_total: int = 0
    bank_bytes_used: int = 0
    bank_bytes_pinned: int = 0
    host_bytes_total: int = 0
    host_bytes_used: int = 0
    slots_total: int = 0
    slots_used: int = 0
    slots_pinned: int = 0
    counters: dict[str, int] = field(default_factory=dict)
    """steps, preemptions, prompt_tokens, cached_tokens, generated_tokens, failed_rows; resident_hits, host_hits and disk_hits: requests by
    where their program was when they came; loads (disk → host), admissions (host → device), evictions from the device and host_evictions,
    drops of what was on either."""
    last_step_seconds: float = 0.0
    last_step_rows: int = 0
    last_step_adapters: int = 0


@dataclass(frozen=True, slots=True)
class EngineInfo:
    """What the engine tells once when it is ready. ``base_spec`` is BaseSpec.to_json(); ``block_size`` 0: there is no K/V."""

    model_name: str
    base_digest: str
    dtype: str
    max_model_len: int
    vocab_size: int
    eos_token_ids: tuple[int, ...]
    block_size: int
    num_blocks: int
    base_spec: dict[str, Any] = field(default_factory=dict)
    tasks: tuple[Task, ...] = (Task.GENERATE, Task.CLASSIFY, Task.EMBED)
    """What this base can be asked for; an encoder generates nothing."""

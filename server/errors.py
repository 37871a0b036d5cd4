"""Every error that a caller can meet: one table code → status → meaning, which also makes docs/ERRORS.md.

ApiError
├── raised by routes, with a code of TABLE
├── from_adapter_error   adapter_store.errors.StoreError, server.adapters.faults.LoweringError, server.adapters.turns.TooManyWaiting
├── from_quarantine      server.quarantine.Record
└── from_engine          server.engine.client's exceptions, and errors inside a stream
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from adapter_store.errors import AdapterRejected, StoreError
from server.adapters.faults import LoweringError
from server.adapters.turns import TooManyWaiting
from server.engine.client import EngineOverloaded, EngineUnavailable
from server.engine.types import RequestError
from server.quarantine import Record


@dataclass(frozen=True, slots=True)
class ErrorCode:
    """One row: ``kind`` is OpenAI's ``type``; ``retry`` says whether the same request may succeed later."""

    code: str
    status: int
    kind: str
    meaning: str
    retry: bool = False


_INVALID, _SERVER = "invalid_request_error", "server_error"
TABLE = (
    ErrorCode(
        "invalid_request", 400, _INVALID, "The body or a parameter is malformed, unknown or out of range; `param` names it."
    ),
    ErrorCode(
        "unsupported_parameter", 400, _INVALID, "The parameter would change the output and is not supported; leave it out."
    ),
    ErrorCode("empty_prompt", 400, _INVALID, "The prompt has no tokens."),
    ErrorCode(
        "prompt_too_long", 400, _INVALID, "Prompt and output do not fit into the model's length; the message has both numbers."
    ),
    ErrorCode("invalid_token_id", 400, _INVALID, "A token id is outside the vocabulary."),
    ErrorCode("task_not_served", 400, _INVALID, "The base model cannot do this: an encoder generates nothing; see docs/API.md."),
    ErrorCode("invalid_adapter_name", 400, _INVALID, "Names match [a-z0-9][a-z0-9._-]{0,63}; `base` is reserved."),
    ErrorCode("invalid_digest", 400, _INVALID, "A blob's digest is sha256: and 64 lower-case hex digits."),
    ErrorCode("invalid_alias", 400, _INVALID, "An alias means 1 to 16 adapters, each once, with weights above 0, and no alias."),
    ErrorCode("missing_api_key", 401, "authentication_error", "Send `Authorization: Bearer KEY`."),
    ErrorCode("invalid_api_key", 401, "authentication_error", "The key is unknown or revoked."),
    ErrorCode("operator_only", 403, "permission_error", "The route shows the server as a whole, and needs an operator's key."),
    ErrorCode("not_found", 404, _INVALID, "There is no such route; see docs/API.md."),
    ErrorCode("adapter_not_found", 404, _INVALID, "No such adapter for this tenant. The same for `not yours` and `not there`."),
    ErrorCode("blob_not_found", 404, _INVALID, "You have no such blob or file. The same for `not yours` and `not there`."),
    ErrorCode("upload_not_found", 404, _INVALID, "There is no such upload of yours, or it is over a day old; begin another."),
    ErrorCode("method_not_allowed", 405, _INVALID, "The route exists but not with this HTTP method."),
    ErrorCode(
        "upload_stalled", 408, _INVALID, "Nothing of the body has arrived for a minute; send it again, or the rest.", retry=True
    ),
    ErrorCode("duplicate_request", 409, _INVALID, "A request with this id is already running."),
    ErrorCode(
        "name_taken", 409, _INVALID, "The name is an alias's where an adapter is meant, or an adapter's where an alias is."
    ),
    ErrorCode(
        "version_in_use", 409, _INVALID, "Tags or aliases name what is to be deleted; the message says which. Move them first."
    ),
    ErrorCode(
        "upload_offset_mismatch",
        409,
        _INVALID,
        "The bytes do not go there; ask with HEAD how far the upload is, and go on from there.",
    ),
    ErrorCode("idempotency_key_in_use", 409, _INVALID, "A request with this Idempotency-Key is running.", retry=True),
    ErrorCode("pin_limit", 409, _INVALID, "Pinned adapters may take half of the device's bank; unpin others first."),
    ErrorCode(
        "precondition_failed", 412, _INVALID, "If-Match or If-None-Match does not hold: the name has changed; read it again."
    ),
    # The state of the adapter stands against it, and its owner can change that: neither a bad body (422) nor a busy server (503).
    ErrorCode(
        "adapter_quarantined",
        409,
        _INVALID,
        "The adapter failed three times in a row for this tenant; push a new version of it, or POST /v1/adapters/{name}/load.",
    ),
    ErrorCode("body_too_large", 413, _INVALID, "The JSON body is over 2 MiB."),
    ErrorCode("upload_too_large", 413, _INVALID, "The upload is over max_upload_bytes."),
    ErrorCode("unsupported_encoding", 415, _INVALID, "Compressed request bodies are refused; send them plain."),
    ErrorCode(
        "adapter_rejected", 422, _INVALID, "The upload is not a servable adapter; `faults` lists everything that is wrong."
    ),
    ErrorCode("digest_mismatch", 422, _INVALID, "What arrived has another digest than was said; nothing was kept."),
    ErrorCode("idempotency_key_reused", 422, _INVALID, "The Idempotency-Key was used for another request within the last day."),
    ErrorCode(
        "not_composable", 422, _INVALID, "These adapters cannot be combined exactly, or not so; `faults` says which and where."
    ),
    ErrorCode("validation", 422, _INVALID, "A parameter of /generate is malformed, unknown or out of range."),
    ErrorCode("no_task_head", 422, _INVALID, "The adapter has no classifier; the message names those of yours that have one."),
    ErrorCode("program_too_large", 422, _INVALID, "The adapter is larger than what the device's bank may hold."),
    ErrorCode(
        "overloaded",
        429,
        "rate_limit_error",
        "The queue is full, or you have too much in it; wait as long as Retry-After says.",
        retry=True,
    ),
    ErrorCode("too_many_uploads", 429, "rate_limit_error", "You have 32 unfinished uploads; finish or cancel some."),
    ErrorCode("internal_error", 500, _SERVER, "The server failed on this request; its log has the request id."),
    ErrorCode(
        "non_finite_output", 500, _SERVER, "The computation overflowed for this adapter and prompt; nobody else was affected."
    ),
    ErrorCode("adapter_load_failed", 500, _SERVER, "The adapter's program cannot be loaded; push the adapter again."),
    ErrorCode("blob_corrupt", 500, _SERVER, "Stored bytes do not match their digest; push the adapter again."),
    ErrorCode("store_error", 500, _SERVER, "The store failed; the log has the details."),
    ErrorCode(
        "illegal_transition", 500, _SERVER, "The residency registry was told something impossible; the log has the details."
    ),
    ErrorCode("engine_restarting", 503, _SERVER, "The engine process ended and is being restarted.", retry=True),
    ErrorCode("engine_unavailable", 503, _SERVER, "No engine can take the request now.", retry=True),
    ErrorCode("engine_start_failed", 503, _SERVER, "The engine could not be started; the log says why.", retry=True),
    ErrorCode("server_stopping", 503, _SERVER, "The server is shutting down; another replica can take the request.", retry=True),
    ErrorCode("store_unavailable", 503, _SERVER, "A store backend cannot be reached.", retry=True),
    ErrorCode("storage_full", 507, _SERVER, "No space is left for uploads."),
)
CODES = {row.code: row for row in TABLE}
FAULTS = {
    "bad_archive": "The zip or tar cannot be read, or holds what no adapter holds (links, other paths, bombs).",
    "corrupt_safetensors": "The file is truncated, damaged, not safetensors, or a pickle in disguise.",
    "duplicate_file": "The upload holds a file twice.",
    "duplicate_tensor": "Two keys stand for the same tensor.",
    "empty_adapter": "Nothing in the adapter changes the base model.",
    "invalid_config": "A JSON file is not strict JSON, too deep, too large, or names code.",
    "lowering_crashed": "The lowering process died on this adapter.",
    "lowering_failed": "The adapter has a fault that has no name yet.",
    "lowering_timeout": "Lowering took too long.",
    "missing_child": "A fusion names an adapter that this tenant has not stored.",
    "missing_file": "A file that the adapter needs is missing; the message names it.",
    "missing_tensor": "A tensor that belongs to a pair or group is missing.",
    "mixed_upload": "Archive and single files came together.",
    "no_tensors": "The safetensors file is empty.",
    "non_finite": "The lowered adapter overflows in the base's precision.",
    "non_finite_tensor": "A tensor holds NaN or infinity.",
    "not_composable": "Adapters of one request cannot be added up exactly at a module (`where`), or layers not be left out.",
    "program_too_large": "The lowered adapter is over the byte budget.",
    "unmatched_tensor": "The base model has no module for a tensor.",
    "unsupported_field": "A config field has a value that is not served.",
    "unsupported_method": "The PEFT method is not served.",
    "unused_tensor": "The method has no use for a tensor.",
    "wrong_dtype": "A tensor has a dtype that the method cannot have.",
    "wrong_module": "A tensor stands at a module where it is not defined.",
    "wrong_rank": "Tensors, or tensors and config, disagree on the rank.",
    "wrong_shape": "A tensor does not fit the base model.",
}
"""Reasons inside ``adapter_rejected``, as ``faults[].code``."""


class ApiError(Exception):
    """An error on its way to the caller. ``message`` is fit for them: no paths, no traces, nobody else's names."""

    def __init__(
        self,
        code: str,
        message: str,
        *,
        param: str | None = None,
        retry_after_s: float | None = None,
        faults: Sequence[Any] = (),
    ) -> None:
        super().__init__(message)
        self.row = CODES[code]
        self.message = message
        self.param = param
        self.retry_after_s = retry_after_s if retry_after_s is not None else (1.0 if self.row.retry else None)
        self.faults = [asdict(fault) for fault in faults]

    @property
    def headers(self) -> dict[str, str]:
        """Retry hints that the OpenAI SDK and others obey."""
        if self.retry_after_s is None:
            return {"x-should-retry": "false"}
        seconds = max(1, round(self.retry_after_s + 0.5))
        return {"retry-after": str(seconds), "retry-after-ms": str(int(self.retry_after_s * 1000)), "x-should-retry": "true"}

    def openai_body(self) -> dict[str, Any]:
        """``{"error": {message, type, param, code}}``; with ``faults`` for rejected adapters."""
        error: dict[str, Any] = {"message": self.message, "type": self.row.kind, "param": self.param, "code": self.row.code}
        if self.faults:
            error["faults"] = self.faults
        return {"error": error}

    def tgi_body(self) -> dict[str, Any]:
        """The shape of text-generation-inference and LoRAX clients."""
        body = {"error": self.message, "error_type": _TGI_TYPES.get(self.row.code, "generation"), "code": self.row.code}
        return {**body, "faults": self.faults} if self.faults else body


_TGI_TYPES = dict.fromkeys(
    (
        "validation",
        "invalid_request",
        "empty_prompt",
        "prompt_too_long",
        "adapter_not_found",
        "invalid_adapter_name",
        "unsupported_parameter",
        "not_composable",
        "task_not_served",
        "invalid_token_id",
    ),
    "validation",
) | {"overloaded": "overloaded"}


ADAPTER_ERRORS = (StoreError, LoweringError, TooManyWaiting)
"""What using, changing or making an adapter raises; routes let them pass."""


def from_adapter_error(error: Exception) -> ApiError:
    """One of ADAPTER_ERRORS, as the caller should see it."""
    if isinstance(error, LoweringError):
        return _from_lowering_error(error)
    if isinstance(error, TooManyWaiting):
        return ApiError("overloaded", str(error), retry_after_s=error.retry_after_s)
    assert isinstance(error, StoreError)
    return _from_store_error(error)


def _from_store_error(error: StoreError) -> ApiError:
    """A store error, as the caller should see it."""
    if isinstance(error, AdapterRejected):
        return _rejected(error.faults)
    code = error.code if error.code in CODES else "store_error"
    message = str(error) if CODES[code].status < 500 else CODES[code].meaning
    return ApiError(code, message)


def _from_lowering_error(error: LoweringError) -> ApiError:
    """A refused upload, or adapters that cannot be combined."""
    faults = [fault for fault in error.faults if fault.code == "not_composable"]
    return _refused("not_composable", "adapters cannot be combined", faults) if faults else _rejected(error.faults)


def from_engine(error: EngineOverloaded | EngineUnavailable | RequestError) -> ApiError:
    """What the engine client raised, or what ended a stream."""
    if isinstance(error, EngineOverloaded):
        return ApiError("overloaded", str(error), retry_after_s=error.retry_after_s)
    if isinstance(error, EngineUnavailable):
        return ApiError(error.code, CODES[error.code].meaning)
    return ApiError(error.code if error.code in CODES else "internal_error", error.message)


def from_quarantine(record: Record, names: Sequence[str]) -> ApiError:
    """What a tenant asks for, which is these versions (``name@v2``), failed it too often."""
    when = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(record.at))
    return ApiError(
        "adapter_quarantined",
        f"{' + '.join(names)} failed {record.failures} times in a row, last at {when} with {record.code}, and is refused until you push "
        f"a new version of it or POST /v1/adapters/{names[0]}/load",
        param="model",
    )


def _rejected(faults: Sequence[Any]) -> ApiError:
    return _refused("adapter_rejected", "the adapter cannot be served", faults)


def _refused(code: str, what: str, faults: Sequence[Any]) -> ApiError:
    first = faults[0]
    more = f" (and {len(faults) - 1} more; see faults)" if len(faults) > 1 else ""
    return ApiError(code, f"{what}: {first.where}: {first.message}{more}", faults=faults)

"""Three failures in a row, and what counts as one."""

from __future__ import annotations

import time

from server.quarantine import FAILURES, MAX_PROGRAMS, Quarantine

BAD = "non_finite_output"


def fail(quarantine: Quarantine, tenant: str = "acme", program: str = "p", code: str = BAD, times: int = 1) -> None:
    for _ in range(times):
        quarantine.failed(tenant, program, ("sha256:a",), code, time.monotonic())


def test_three_failures_in_a_row_are_refused_until_released() -> None:
    quarantine = Quarantine()
    fail(quarantine, times=FAILURES - 1)
    assert quarantine.refusal("acme", "p") is None
    fail(quarantine, code="adapter_load_failed")
    record = quarantine.refusal("acme", "p")
    assert record is not None
    assert (record.failures, record.code) == (FAILURES, "adapter_load_failed")
    assert abs(record.at - time.time()) < 5
    assert len(quarantine) == 1
    # Somebody who was still running ends well: that lifts nothing.
    quarantine.succeeded("acme", "p")
    assert quarantine.refusal("acme", "p") is record
    assert quarantine.release("acme", "sha256:b") == 0
    assert quarantine.release("acme", "sha256:a") == 1
    assert quarantine.refusal("acme", "p") is None
    fail(quarantine, times=FAILURES - 1)
    assert quarantine.refusal("acme", "p") is None


def test_a_success_in_between_starts_the_count_anew() -> None:
    quarantine = Quarantine()
    for _ in range(5):
        fail(quarantine, times=FAILURES - 1)
        quarantine.succeeded("acme", "p")
    assert len(quarantine) == 0


def test_others_who_use_the_same_bytes_are_not_affected() -> None:
    quarantine = Quarantine()
    fail(quarantine, times=FAILURES)
    fail(quarantine, "globex", times=FAILURES - 1)
    assert quarantine.refusal("globex", "p") is None
    assert quarantine.refusal("acme", "q") is None
    assert quarantine.release("globex", "sha256:a") == 0
    assert quarantine.refusal("acme", "p") is not None


def test_what_is_not_the_adapters_fault_is_not_counted() -> None:
    quarantine = Quarantine()
    for code in ("internal_error", "engine_restarting", "prompt_too_long"):
        fail(quarantine, code=code, times=FAILURES)
    assert quarantine.refusal("acme", "p") is None


def test_requests_beside_each_other_are_one_failure() -> None:
    quarantine = Quarantine()
    started = time.monotonic()
    for _ in range(100):
        quarantine.failed("acme", "p", (), BAD, started)
    assert quarantine.refusal("acme", "p") is None
    fail(quarantine, times=FAILURES - 1)
    assert quarantine.refusal("acme", "p") is not None


def test_memory_is_bounded_for_each_tenant() -> None:
    quarantine = Quarantine()
    fail(quarantine, "globex", times=FAILURES)
    for index in range(MAX_PROGRAMS + 10):
        fail(quarantine, program=str(index), times=FAILURES)
    assert len(quarantine) == MAX_PROGRAMS + 1
    assert quarantine.refusal("globex", "p") is not None
    assert quarantine.refusal("acme", "0") is None

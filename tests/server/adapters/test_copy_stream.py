"""In which order a CUDA device is given copies and steps: as recorded where there is none, and by what it computes where there is one."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch

from server.adapters.bank import Bank
from server.adapters.copy_stream import CudaCopyStream
from tests.server.adapters.test_bank import SPEC, make_bank, packed

CUDA = torch.device("cuda")


class Recorder:
    """Stands for ``torch.cuda``: says what was given to which stream."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.given: list[str] = []
        self.is_done = False
        self.compute = Stream(self, "steps")
        self.current = self.compute
        monkeypatch.setattr(torch.cuda, "Stream", lambda device: Stream(self, "copies"))
        monkeypatch.setattr(torch.cuda, "current_stream", lambda device: self.current)
        monkeypatch.setattr(torch.cuda, "stream", self.on)

    @contextmanager
    def on(self, stream: Stream) -> Iterator[None]:
        before, self.current = self.current, stream
        try:
            yield
        finally:
            self.current = before

    def give(self, what: str) -> None:
        self.given.append(f"{self.current.name}: {what}")


class Stream:
    def __init__(self, recorder: Recorder, name: str) -> None:
        self._recorder = recorder
        self.name = name

    def wait_stream(self, other: Stream) -> None:
        self._recorder.given.append(f"{self.name}: wait for {other.name}")

    def wait_event(self, event: Event) -> None:
        self._recorder.given.append(f"{self.name}: wait for an event")

    def record_event(self) -> Event:
        self._recorder.given.append(f"{self.name}: event")
        return Event(self._recorder)


class Event:
    def __init__(self, recorder: Recorder) -> None:
        self._recorder = recorder

    def query(self) -> bool:
        return self._recorder.is_done


def test_a_copy_waits_for_steps_and_steps_only_where_it_comes_first(monkeypatch: pytest.MonkeyPatch) -> None:
    recorder = Recorder(monkeypatch)
    copy = CudaCopyStream(CUDA).run(lambda: recorder.give("copy"))
    recorder.give("step")
    assert recorder.given == ["copies: wait for steps", "copies: copy", "copies: event", "steps: step"]
    assert not copy.is_done()
    recorder.is_done = True
    assert copy.is_done()
    copy.come_first()
    assert recorder.given[4:] == ["steps: wait for an event"]


def test_what_a_failed_copy_has_begun_comes_before_later_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    recorder = Recorder(monkeypatch)

    def fail() -> None:
        recorder.give("a part")
        raise torch.OutOfMemoryError("there is no memory")

    with pytest.raises(torch.OutOfMemoryError):
        CudaCopyStream(CUDA).run(fail)
    assert recorder.given == ["copies: wait for steps", "copies: a part", "steps: wait for copies"]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
def test_programs_arrive_on_a_gpu_and_are_moved_before_they_have() -> None:
    """Three fill the bank; two go and one moves while the device is busy with something else, and all that is there in the end is right."""
    taken = make_bank().footprint(packed("p0", 9))
    bank = Bank(SPEC, capacity_bytes=3 * taken, max_slots=4, dtype=torch.float32, device=CUDA, copy_stream=CudaCopyStream(CUDA))
    torch.cuda._sleep(100_000_000)
    for name in ("p0", "p1", "p2"):
        assert bank.admit(packed(name, 9)).resident is not None
        assert not bank.can_pin(name)
    for name in ("p0", "p2"):
        bank.evict(name)
    assert bank.admit(packed("wide", 18)).evicted == ()
    torch.cuda.synchronize()
    bank.begin_step(1)
    for name, rank in (("p1", 9), ("wide", 18)):
        assert bank.can_pin(name)
        resident, program = bank.find(name), packed(name, rank)
        assert resident is not None
        held = bank.rows[resident.rows_offset : resident.rows_offset + resident.num_rows]
        assert torch.equal(held.cpu(), program.rows)
        held = bank.vectors[resident.vectors_offset : resident.vectors_offset + resident.num_vectors]
        assert torch.equal(held.cpu(), program.vectors)
    bank.close()

"""What is told of where programs are: state changes, each once, from what the tiers hold. Decides nothing."""

from __future__ import annotations

from server.adapters.bank import Bank
from server.engine.host_tier import HostTier
from server.engine.loader import Loader
from server.engine.types import ProgramEvent, ProgramState

_ALWAYS_TOLD = ("pin_limit", "load_failed")
"""Reasons that matter though the state is as before."""


class Whereabouts:
    """Over the tiers and the loader of one engine. ``take_events`` returns what has been told since the last call."""

    def __init__(self, bank: Bank, host: HostTier, loader: Loader) -> None:
        self._bank, self._host, self._loader = bank, host, loader
        self._told: dict[str, ProgramState] = {}
        self._events: list[ProgramEvent] = []

    def __len__(self) -> int:
        """Programs that are somewhere, as far as was told."""
        return len(self._told)

    def tell(self, program_id: str, *, drains: bool = False, seconds: float = 0.0, reason: str = "") -> None:
        """Look where a program is. ``drains``: it was dropped, and those that use it still do; ``seconds`` is what getting there took."""
        state, nbytes = self._look(program_id)
        before = self._told.get(program_id, ProgramState.STORED)
        if state is ProgramState.RESIDENT and drains:
            # It drains where it is: what was elsewhere has come first.
            if before not in (ProgramState.RESIDENT, ProgramState.DRAINING):
                self._events.append(ProgramEvent(program_id, state, nbytes, seconds, reason))
            state = ProgramState.DRAINING
        if state is not before or reason in _ALWAYS_TOLD:
            self._events.append(ProgramEvent(program_id, state, nbytes, seconds, reason))
        if state is ProgramState.STORED:
            self._told.pop(program_id, None)
        else:
            self._told[program_id] = state

    def take_events(self) -> list[ProgramEvent]:
        events, self._events = self._events, []
        return events

    def _look(self, program_id: str) -> tuple[ProgramState, int]:
        if (resident := self._bank.find(program_id)) is not None:
            return ProgramState.RESIDENT, resident.nbytes
        if self._host.get(program_id) is not None:
            return ProgramState.HOST, self._host.nbytes(program_id)
        return ProgramState.LOADING if self._loader.is_loading(program_id) else ProgramState.STORED, 0

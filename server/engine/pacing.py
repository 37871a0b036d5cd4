"""How many tokens a step may have while readers wait for their next token, from what steps have taken. Standard library only.

Knows tokens and seconds, nothing of sequences. What a step takes has a part that its prompts' tokens do not explain (decodes, reading the
weights), so that seconds by tokens depend on how many tokens there were. They are measured anew at each size that they lead to: the sizes
settle where steps take the wanted time, or at the smallest where decodes alone take about as long.
"""

from __future__ import annotations

_KEPT = 0.5
"""How much of what older steps told counts beside the latest one: a machine that got slower is noticed within a few steps."""


class Pacing:
    """The token budget of steps that are to take ``target_s`` seconds; never above ``largest`` tokens."""

    def __init__(self, target_s: float, *, smallest: int, largest: int) -> None:
        if target_s <= 0 or min(smallest, largest) < 1:
            raise ValueError(f"need a positive time and sizes, got {target_s} s, {smallest} to {largest} tokens")
        self._target_s = target_s
        self._smallest = smallest
        self._largest = largest
        self._tokens = 0.0
        self._seconds = 0.0

    def observe(self, tokens: int, seconds: float) -> None:
        """A step with prompts in it took so long. Steps of decodes alone tell nothing of what a prompt's tokens cost."""
        self._tokens = self._tokens * _KEPT + tokens
        self._seconds = self._seconds * _KEPT + seconds

    def budget(self, decodes: int) -> int:
        """Tokens for the next step, its decodes included. Prompts get ``smallest`` whatever the time, and as many as there are decodes:
        so they always proceed, and a step takes about twice what its decodes take when there is no time for more."""
        if not self._seconds:
            return self._largest
        fitting = int(self._target_s * self._tokens / self._seconds)
        return min(max(fitting, decodes + max(self._smallest, decodes)), self._largest)

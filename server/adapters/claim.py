"""A program that has waited for its room for too long: what goes out for it, and who waits behind it. Standard library only."""

from __future__ import annotations

from dataclasses import dataclass, field

from server.adapters.eviction import Eviction


@dataclass(slots=True)
class Claim:
    """``draining`` programs get no new references; ``shares`` is whether shares hold for it."""

    policy: Eviction
    program_id: str
    tenant: str | None
    shares: bool = True
    draining: set[str] = field(default_factory=set)

    def goes_before(self, program_id: str, tenant: str | None, nbytes: int) -> bool:
        """Whether a tenant's program of ``nbytes`` waits behind this one."""
        if program_id == self.program_id:
            return False
        if not self.shares or tenant is None or tenant == self.tenant:
            return True
        return not self.policy.is_within_share(tenant, nbytes)

    def drain(self, tenant: str | None, nbytes: int, count: int) -> None:
        """Choose what is to go so that ``nbytes`` and ``count`` places more are free: within shares, and where that is not enough, of all."""
        found = self.policy.choose(tenant, nbytes, count, drains=True) if self.shares else None
        if found is None:
            self.shares = False
            found = self.policy.choose(tenant, nbytes, count, shares=False, drains=True) or []
        self.draining.update(found)

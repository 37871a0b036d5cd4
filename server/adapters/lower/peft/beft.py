"""BEFT (bias-efficient fine-tuning) as PEFT stores it: one more bias on a linear."""

from __future__ import annotations

from server.adapters.ir import Program
from server.adapters.lower.base import Base
from server.adapters.lower.method import Method
from server.adapters.lower.peft.wrapped import WRAPPED_FIELDS, Group, lower_groups
from server.adapters.lower.source import Source


def lower(source: Source, base: Base) -> Program:
    def lower_site(program: Program, group: Group) -> None:
        program.linear(group.site).shift = group["beft_bias"][0]

    return lower_groups(source, base, "beft_", {"beft_bias": (1, "out")}, lower_site)


METHOD = Method(name="BEFT", summary="a shift of the outputs", fields=WRAPPED_FIELDS, lower=lower)

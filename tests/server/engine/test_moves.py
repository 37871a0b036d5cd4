"""Programs move within the bank while sequences use them, and no token is another's for it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from server.adapters.bank import Resident
from server.adapters.ir import LinearEdit, Program
from server.adapters.program_file import write_program
from server.engine.engine import Engine
from server.engine.types import ProgramRef
from tests.harness import greedy, load_base_for_lowering, make_engine, run
from tests.server.engine.stepping import finish, wait_for_loads

PROMPT = [9, 200, 31, 77]
TOKENS = 40
KINDS = {"rows": ("down", "up"), "vectors": ("shift", "out_scale")}


def write(model: Path, directory: Path, name: str, kind: str, size: int) -> ProgramRef:
    """A program of rows or of vectors alone; of size 2 it is twice as large as of size 1."""
    generator = torch.Generator().manual_seed(sum(name.encode()))
    program = Program()
    for site in load_base_for_lowering(model).spec.sites:
        if site.kind == "linear" and kind == "rows":
            down, up = (torch.randn(2 * size, width, generator=generator) / 4 for width in (site.in_features, site.out_features))
            program.add(site.name, LinearEdit(down=down, up=up))
        elif site.kind == "linear":
            shift, scale = (torch.randn(site.out_features, generator=generator) / 4 for _ in range(2))
            program.add(site.name, LinearEdit(shift=shift, out_scale=1 + scale if size == 2 else None))
    write_program(directory / name, program, program_id=name, facts={})
    return ProgramRef(name, str(directory / name))


def resident(engine: Engine, name: str) -> Resident:
    """Step until a program is on the device."""
    while (found := engine.bank.find(name)) is None:
        assert engine.has_unfinished
        wait_for_loads(engine)
        engine.step()
    return found


@pytest.mark.parametrize("kind", ["rows", "vectors"])
def test_a_program_moves_under_the_sequence_that_runs_on_it(kind: str, model: Path, tmp_path: Path) -> None:
    """Three fill the bank. The one in the middle is streamed from when the others end, and one comes that takes the room of both."""
    names = ("below", "between", "behind", "wide")
    refs = {name: write(model, tmp_path, name, kind, 1 + (name == "wide")) for name in names}
    roomy = make_engine(model)
    alone = {name: run(roomy, [greedy("x", PROMPT, ref, tokens=TOKENS)])["x"].tokens for name, ref in refs.items()}
    assert len({tuple(tokens) for tokens in alone.values()}) == len(names), "the programs change nothing"
    engine = make_engine(model, bank_bytes=3 * resident(roomy, "below").nbytes)
    tokens: dict[str, list[int]] = {name: [] for name in names}
    step = engine.step

    def recorded() -> list[object]:
        outputs = step()
        for output in outputs:
            assert output.error is None
            tokens[output.request_id] += output.token_ids
        return list(outputs)

    engine.step = recorded  # type: ignore[method-assign,assignment]
    for name in names[:3]:
        engine.add(greedy(name, PROMPT, refs[name], tokens=TOKENS if name == "between" else 1, tenant="t"))
        resident(engine, name)
    before = resident(engine, "between")
    assert before.start > 0
    engine.add(greedy("wide", PROMPT, refs["wide"], tokens=TOKENS, tenant="t"))
    resident(engine, "wide")
    assert 0 < len(tokens["between"]) < TOKENS, "it does not run while it moves"
    after = resident(engine, "between")
    assert after.start == 0
    assert (after.num_rows > 0, after.num_vectors > 0) == (kind == "rows", kind == "vectors")
    assert (after.slot, after.serial == before.serial) == (before.slot, False)
    finish(engine)
    assert tokens["between"] == alone["between"]
    assert tokens["wide"] == alone["wide"]

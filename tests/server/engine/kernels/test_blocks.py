"""A block in one native call says, bit for bit, what its modules say one by one; and which of the two ran is asserted."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from server.adapters.base_spec import BaseSpec
from server.adapters.ir import BottleneckEdit, LinearEdit, NormEdit, Placement, Program, SideEdit
from server.adapters.program_file import write_program
from server.engine.kernels import Native
from server.engine.kernels.modules import GatedMLP, RotaryAttention
from server.engine.kernels.native import BlockLinears
from server.engine.model import DTYPES
from server.engine.types import BASE, ProgramRef, Request
from tests.conftest import TinyModels
from tests.harness import greedy, load_base_for_lowering, make_engine, run
from tests.server.engine.kernels.conftest import Load

FAMILIES = ("llama", "mistral", "qwen2", "qwen3")
LAYERS = 2


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed + sum(shape))) * 0.3


def linears(spec: BaseSpec, program: Program) -> None:
    """Every linear with terms on both sides of it."""
    for site in spec.sites:
        if site.kind == "linear":
            width, out = site.in_features, site.out_features
            vectors = {"in_scale": 1 + noise(width), "out_scale": 1 + noise(out), "shift": noise(out)}
            program.add(site.name, LinearEdit(down=noise(3, width), up=noise(3, out), **vectors))


def bottlenecks(spec: BaseSpec, program: Program) -> None:
    for sublayer in spec.sublayers:
        width = spec.hidden_size
        program.add(sublayer.site, BottleneckEdit(Placement(source="sum"), noise(3, width), noise(3, width), noise(3)))


def norms(spec: BaseSpec, program: Program) -> None:
    for site in spec.sites:
        if site.kind == "norm":
            program.add(site.name, NormEdit(weight=(1 + noise(site.out_features)).to(DTYPES[spec.dtype])))


def sides(spec: BaseSpec, program: Program) -> None:
    for layer in range(LAYERS):
        key, value = (noise(3, spec.num_kv_heads, spec.head_dim, seed=seed).to(DTYPES[spec.dtype]) for seed in (0, 1))
        program.add(spec.layer_site(layer, spec.names.attention), SideEdit(key, value))


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """How often blocks ran as one call."""
    found: Counter[str] = Counter()

    def counted(name: str) -> None:
        original = getattr(Native, name)

        def call(*arguments: Any) -> Tensor:
            found[name] += 1
            return original(*arguments)  # type: ignore[no-any-return]

        monkeypatch.setattr(Native, name, call)

    counted("gated_mlp")
    counted("attention_block")
    return found


def mixed(directory: Path, dtype: str, place: Path, makes: tuple[Any, ...]) -> Iterator[Request]:
    """A base request and one of each program, in prompts of several lengths."""
    spec = load_base_for_lowering(directory, dtype).spec
    refs = [BASE]
    for make in makes:
        program = Program()
        make(spec, program)
        write_program(place / make.__name__, program, program_id=make.__name__, facts={})
        refs.append(ProgramRef(make.__name__, str(place / make.__name__)))
    for number, ref in enumerate(refs):
        yield greedy(str(number), [3 + number, *range(20, 25 + 9 * number)], ref, tokens=4)


@pytest.mark.parametrize(
    ("makes", "attends_in_one_call"),
    [((), True), ((linears,), True), ((linears, bottlenecks), True), ((linears, norms), None), ((linears, sides), False)],
    ids=["base", "linears", "bottlenecks", "norms", "sides"],
)
@pytest.mark.parametrize(("family", "dtype"), [*((family, "float32") for family in FAMILIES), ("llama", "bfloat16")])
def test_one_call_is_its_modules(
    tiny_models: TinyModels,
    kernel_dir: Path,
    tmp_path: Path,
    calls: Counter[str],
    monkeypatch: pytest.MonkeyPatch,
    family: str,
    dtype: str,
    makes: tuple[Any, ...],
    attends_in_one_call: bool | None,
) -> None:
    directory = tiny_models(family)
    requests = list(mixed(directory, dtype, tmp_path, makes))
    found = run(make_engine(directory, dtype, kernel_dir=str(kernel_dir)), requests)
    if attends_in_one_call is None:
        attends_in_one_call = family != "qwen3"  # whose heads have norms that a program may edit
    assert calls["gated_mlp"] > 0
    # In steps without the program that forbids it, attention may be one call nevertheless.
    assert (calls["attention_block"] == calls["gated_mlp"]) is attends_in_one_call
    calls.clear()
    for kind in (GatedMLP, RotaryAttention):
        monkeypatch.setattr(kind, "together", lambda *_: None)
    wanted = run(make_engine(directory, dtype, kernel_dir=str(kernel_dir)), requests)
    assert not calls
    for name, result in wanted.items():
        assert found[name].tokens == result.tokens
        assert torch.equal(torch.stack(found[name].logits), torch.stack(result.logits))


def test_runs_beyond_the_rows_are_refused(native: Load) -> None:
    beyond = BlockLinears(records=b"", edits=b"", inner_features=8, out_features=8, num_rows=3, held=())
    with pytest.raises(ValueError, match="runs end at row 3 of 2"):
        native(torch.float32).gated_mlp(torch.zeros(2, 8), beyond)

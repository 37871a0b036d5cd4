"""Layers in one native call say, bit for bit, what their blocks say and what the modules of those say one by one; and what ran is asserted."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from server.adapters.base_spec import BaseSpec
from server.adapters.ir import BottleneckEdit, InterventionEdit, LinearEdit, NormEdit, Placement, Program, Prologue, SideEdit
from server.adapters.program_file import write_program
from server.engine.kernels import Native, PagedRows, Rules, attention_reference, swap
from server.engine.kernels.modules import GatedMLP, RotaryAttention
from server.engine.kernels.native import BlockLinears, LayerStack
from server.engine.model import DTYPES
from server.engine.types import BASE, ProgramRef, Request
from tests.conftest import TinyModels
from tests.harness import greedy, load_base_for_lowering, make_engine, run
from tests.server.engine.kernels.conftest import Load

FAMILIES = ("llama", "mistral", "qwen2", "qwen3")
LAYERS = 2
BLOCK_BY_BLOCK = ((swap, "_BODIES", frozenset()),)
"""With Hugging Face's own code around the blocks."""
MODULE_BY_MODULE = tuple((kind, "together", lambda *_: None) for kind in (GatedMLP, RotaryAttention))
CALLS = ("decoder_layers", "attention_block", "gated_mlp")


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


def interventions(spec: BaseSpec, program: Program) -> None:
    dtype, width = DTYPES[spec.dtype], spec.hidden_size
    for layer in range(LAYERS):
        source, bias, project = (noise(*shape).to(dtype) for shape in ((2, width), (2,), (2, width)))
        program.add(spec.layer_site(layer, ""), InterventionEdit(source, bias, project, "relu", positions=4))


def virtual_tokens(spec: BaseSpec, program: Program) -> None:
    tokens = noise(5, spec.hidden_size).to(DTYPES[spec.dtype])
    program.prologue = Prologue(tokens=tokens, tokens_site=spec.embedding)


Make = Callable[[BaseSpec, Program], None]


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """How often layers and blocks ran as one call."""
    found: Counter[str] = Counter()

    def counted(name: str) -> None:
        original = getattr(Native, name)

        def call(*arguments: Any) -> Tensor:
            found[name] += 1
            return original(*arguments)  # type: ignore[no-any-return]

        monkeypatch.setattr(Native, name, call)

    for name in CALLS:
        counted(name)
    return found


def mixed(directory: Path, dtype: str, place: Path, makes: tuple[Make, ...]) -> Iterator[Request]:
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
    ("makes", "runs_whole_layers"),
    [
        ((linears, virtual_tokens), True),
        ((linears, bottlenecks, interventions), False),
        ((linears, norms), False),
        ((linears, sides), False),
    ],
    ids=["linears", "between blocks", "norms", "sides"],
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
    makes: tuple[Make, ...],
    runs_whole_layers: bool,
) -> None:
    """Prompts of several lengths and decodes of the base and all programs in the same steps."""
    directory = tiny_models(family)
    requests = list(mixed(directory, dtype, tmp_path, makes))
    found = run(make_engine(directory, dtype, kernel_dir=str(kernel_dir)), requests)
    assert (set(calls) == {"decoder_layers"}) is runs_whole_layers
    for patches, forbidden in (BLOCK_BY_BLOCK, {"decoder_layers"}), (MODULE_BY_MODULE, set(CALLS)):
        calls.clear()
        with monkeypatch.context() as patched:
            for patch in patches:
                patched.setattr(*patch)
            wanted = run(make_engine(directory, dtype, kernel_dir=str(kernel_dir)), requests)
        assert not forbidden & set(calls)
        for name, result in wanted.items():
            assert found[name].tokens == result.tokens
            assert torch.equal(torch.stack(found[name].logits), torch.stack(result.logits))


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(
    ("make", "wanted"),
    [
        (None, {"decoder_layers"}),
        (linears, {"decoder_layers"}),
        (virtual_tokens, {"decoder_layers"}),
        (bottlenecks, {"attention_block", "gated_mlp"}),
        (interventions, {"attention_block", "gated_mlp"}),
        (norms, {"attention_block", "gated_mlp"}),
        (sides, {"gated_mlp"}),
    ],
)
def test_what_a_program_edits_decides_what_runs(
    tiny_models: TinyModels,
    kernel_dir: Path,
    tmp_path: Path,
    calls: Counter[str],
    family: str,
    make: Make | None,
    wanted: set[str],
) -> None:
    directory = tiny_models(family)
    requests = list(mixed(directory, "float32", tmp_path, () if make is None else (make,)))
    run(make_engine(directory, kernel_dir=str(kernel_dir)), requests[-1:])
    if make is norms and family == "qwen3":
        wanted = {"gated_mlp"}  # whose heads have norms too
    assert set(calls) == wanted


def test_a_kernel_chosen_for_itself_attends(tiny_models: TinyModels, kernel_dir: Path, calls: Counter[str]) -> None:
    engine = make_engine(tiny_models("llama"), kernel_dir=str(kernel_dir))
    engine._runner._attention.kernel = attention_reference
    run(engine, [greedy("a", [5, 6, 7])])
    assert set(calls) == {"gated_mlp"}


def test_a_cache_that_is_asked_for_is_refused(tiny_models: TinyModels, kernel_dir: Path) -> None:
    body = make_engine(tiny_models("llama"), kernel_dir=str(kernel_dir))._base.backbone
    with pytest.raises(TypeError, match="nothing is given out"):
        body(input_ids=torch.zeros(1, 1, dtype=torch.int64), position_ids=torch.zeros(1, 1, dtype=torch.int64), use_cache=True)


def test_rows_that_do_not_fit_are_refused(native: Load) -> None:
    kernels = native(torch.float32)
    beyond = BlockLinears(records=b"", edits=b"", out_features=8, num_rows=3, held=())
    with pytest.raises(ValueError, match="runs end at row 3 of 2"):
        kernels.gated_mlp(torch.zeros(2, 8), beyond)
    angles, numbers = (torch.zeros(1, 2, 4), torch.zeros(1, 2, 4)), torch.zeros(2, dtype=torch.int32)
    seen = PagedRows(torch.zeros(1, 1, dtype=torch.int32), numbers, numbers)
    with pytest.raises(ValueError, match="3 rows cannot be rotated"):
        kernels.step_rows(angles, torch.zeros(3, dtype=torch.int64), seen)
    rows = kernels.step_rows(angles, torch.zeros(2, dtype=torch.int64), seen)
    cache = (torch.zeros(1, 1, 16, 8), torch.zeros(1, 1, 16, 8))
    with pytest.raises(ValueError, match="caps no scores"):
        kernels.paged_attention(cache, Rules(1.0, softcap=2.0), None)
    of_another_width = LayerStack(b"", 1, head_dim=8, num_rows=0, held=())
    with pytest.raises(ValueError, match="heads of 8 are not 2 rows with angles of 4"):
        kernels.decoder_layers(torch.zeros(2, 8), of_another_width, rows)

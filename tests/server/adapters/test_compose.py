"""A composition equals its definition at every site, y0 + sum w (edit(x) - y0), or is refused; layers are left out. In fp64."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import AutoModelForCausalLM

from server.adapters.apply import StepEdits
from server.adapters.bank import Bank
from server.adapters.base_spec import SiteSpec
from server.adapters.bottleneck import Streams, bottleneck_reference
from server.adapters.compose import Part, compose, drop_layers
from server.adapters.compose.share import Conflict, Share
from server.adapters.compose.vocabulary import compose_head
from server.adapters.faults import LoweringError
from server.adapters.identity import MAX_ADAPTERS
from server.adapters.ir import (
    BottleneckEdit,
    Edit,
    EmbedEdit,
    FusionEdit,
    HeadEdit,
    HeadLayer,
    InterventionEdit,
    LinearEdit,
    NormEdit,
    Placement,
    Program,
    Prologue,
    SideEdit,
    TaskHead,
)
from server.adapters.lower.base import Base
from server.adapters.packed import pack_program, unpack_program
from server.adapters.program_file import read_program, write_program
from server.adapters.sites import SiteState, attach
from tests.conftest import TinyModels
from tests.harness import load_base_for_lowering

ROWS = 5
LAYER = "model.layers.0"
QUERY, UP, OUT, NORM = f"{LAYER}.self_attn.q_proj", f"{LAYER}.mlp.up_proj", f"{LAYER}.self_attn.o_proj", "model.norm"
EMBEDDING, HEAD, DOWN = "model.embed_tokens", "lm_head", f"{LAYER}.mlp.down_proj"


class Stand:
    """A tiny base whose sites can be run one by one with any program."""

    def __init__(self, directory: Path) -> None:
        self.base: Base = load_base_for_lowering(directory, "float64")
        spec = self.base.spec
        self._bank = Bank(spec, capacity_bytes=64 << 20, max_slots=2, dtype=torch.float64, device=torch.device("cpu"))
        self._state = SiteState(self._bank)
        self._model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float64).eval()
        attach(self._model, spec, self._state)
        self.sites = spec.by_name()

    @torch.inference_mode()
    def output(self, site: str, program: Program, inputs: Tensor) -> Tensor:
        """What a site makes of its inputs when all rows are the program's."""
        resident = self._bank.admit(pack_program(program, program_id="p")).resident
        assert resident is not None
        self._state.edits = self._state.head_edits = StepEdits(self._bank, [(resident.slot, 0, ROWS)])
        found: Tensor = self._model.get_submodule(site)(inputs)
        self._bank.evict("p")
        return found.clone()

    def inputs(self, site: str) -> Tensor:
        if self.sites[site].kind == "embedding":
            return torch.tensor([3, 7, 9, 11, 200])
        return R(ROWS, self.sites[site].in_features)

    def check(self, site: str, parts: Sequence[Part]) -> Program:
        """The composition's output equals the definition's. Raises LoweringError where it is refused."""
        composed = compose(parts, self.base)
        inputs = self.inputs(site)
        expected = start = self.output(site, Program(), inputs)
        for part in parts:
            expected = expected + part.weight * (self.output(site, part.program, inputs) - start)
        found = self.output(site, composed, inputs)
        # Gemma's norms compute in fp32 whatever the model's precision.
        tolerance = 1e-5 if self.base.spec.family == "gemma2" and self.sites[site].kind == "norm" else 1e-9
        torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)
        return composed


@cache
def generator() -> torch.Generator:
    return torch.Generator().manual_seed(5)


def R(*shape: int) -> Tensor:
    return torch.randn(shape, generator=generator(), dtype=torch.float64)


def part(site: str, *edits: Edit, weight: float = 1.0) -> Part:
    return Part(Program({site: list(edits)}), weight)


@pytest.fixture(scope="module")
def stand(tiny_models: TinyModels) -> Stand:
    return Stand(tiny_models("llama"))


@pytest.fixture(scope="module")
def conv_stand(tiny_models: TinyModels) -> Stand:
    """GPT-2: transposed linears with biases, norms with biases, a tied head."""
    return Stand(tiny_models("gpt2"))


@pytest.fixture(scope="module")
def scaled_stand(tiny_models: TinyModels) -> Stand:
    """Gemma 2: norms around zero and a scaled embedding."""
    return Stand(tiny_models("gemma2"))


def linear_edit(terms: frozenset[str], size_in: int, size_out: int) -> LinearEdit:
    edit = LinearEdit()
    if "low_rank" in terms:
        edit.down, edit.up = R(3, size_in), R(3, size_out)
    if "in_scale" in terms:
        edit.in_scale = R(size_in)
    if "out_scale" in terms:
        edit.out_scale = R(size_out)
    if "shift" in terms:
        edit.shift = R(size_out)
    if "dense" in terms:
        edit.dense = R(size_out, size_in)
    if "rotation" in terms:
        edit.rotation = R(size_in // 4, 4, 4)
    if "shared_rotation" in terms:
        edit.rotation = R(1, 8, 8)
    for group in (4, 8):
        if f"pairs{group}" in terms:
            edit.pair_scale, edit.pair_group = R(size_out), group
    if "kronecker" in terms:
        edit.left, edit.right = R(size_out // 8, 4), R(8, size_in // 4)
    if "thin_kronecker" in terms:
        edit.left, edit.right = R(1, size_in // 2), R(size_out, 2)
    return edit


TERMS = (
    "low_rank", "in_scale", "out_scale", "shift", "dense", "rotation", "shared_rotation", "pairs4", "pairs8", "kronecker", "thin_kronecker",
)  # fmt: skip
WEIGHTS = st.sampled_from([1.0, 0.7, -0.5, 2.0])


def embed_edit(terms: frozenset[str], vocab: int) -> EmbedEdit:
    edit = EmbedEdit()
    if "low_rank" in terms:
        edit.down, edit.up = R(vocab, 2), R(2, 32)
    if "out_scale" in terms:
        edit.out_scale = R(32)
    if "rows" in terms:
        edit.row_ids, edit.rows = torch.tensor([3, 11, 40]), R(3, 32)
    if "other_rows" in terms:
        edit.row_ids, edit.rows = torch.tensor([7, 11]), R(2, 32)
    if "table" in terms:
        edit.table = R(vocab, 32)
    return edit


def head_edits(terms: frozenset[str], vocab: int, *, tied: bool = False) -> list[Edit]:
    edits: list[Edit] = []
    if "weight" in terms:
        edits.append(HeadEdit(weight=R(vocab, 32)))
    if "rows" in terms:
        edits.append(HeadEdit(row_ids=torch.tensor([3, 11, 40]), rows=R(3, 32)))
    if "other_rows" in terms:
        edits.append(HeadEdit(row_ids=torch.tensor([7, 11]), rows=R(2, 32)))
    if linear := terms & {"low_rank", "out_scale", "in_scale", "shift"}:
        edits.append(linear_edit(linear, 32, vocab))
    return edits


def subsets(*names: str) -> st.SearchStrategy[frozenset[str]]:
    return st.frozensets(st.sampled_from(names), min_size=1, max_size=4)


def exact_or_refused(stand: Stand, site: str, parts: Sequence[Part]) -> bool:
    """Whether it was composed; then exactly. Anything but a refusal of this kind fails."""
    try:
        stand.check(site, parts)
    except LoweringError as error:
        refusal = error
    else:
        return True
    assert {(fault.code, fault.where) for fault in refusal.faults} == {("not_composable", site)}
    return False


many = settings(max_examples=60)


@many
@given(data=st.data())
def test_any_terms_of_linears_are_exact_or_refused(data: st.DataObject, stand: Stand, conv_stand: Stand) -> None:
    tested, site = data.draw(
        st.sampled_from(
            [(stand, QUERY), (stand, UP), (conv_stand, "transformer.h.0.attn.c_attn"), (conv_stand, "transformer.h.1.mlp.c_proj")]
        )
    )
    spec = tested.sites[site]
    chosen = data.draw(st.lists(st.tuples(subsets(*TERMS), WEIGHTS), min_size=1, max_size=3))
    parts = [part(site, linear_edit(terms, spec.in_features, spec.out_features), weight=weight) for terms, weight in chosen]
    changing = sum(bool(terms & {"in_scale", "rotation", "shared_rotation"}) for terms, _ in chosen)
    scaling = {"out_scale", "pairs4", "pairs8"}
    composed = exact_or_refused(tested, site, parts)
    if changing == 0 and not any(terms & {"pairs4", "pairs8"} for terms, _ in chosen):
        assert composed
    if changing > 1:
        assert not composed
    if changing == 1 and not any(terms & scaling for terms, _ in chosen):
        assert composed


@many
@given(
    chosen=st.lists(st.tuples(subsets("low_rank", "out_scale", "rows", "other_rows", "table"), WEIGHTS), min_size=1, max_size=3)
)
def test_any_terms_of_embeddings_are_exact(chosen: list[tuple[frozenset[str], float]], stand: Stand, scaled_stand: Stand) -> None:
    for tested in (stand, scaled_stand):
        vocab = tested.base.spec.vocab_size
        parts = [part(EMBEDDING, embed_edit(terms, vocab), weight=weight) for terms, weight in chosen]
        assert exact_or_refused(tested, EMBEDDING, parts)


@many
@given(
    chosen=st.lists(
        st.tuples(subsets("weight", "rows", "other_rows", "low_rank", "out_scale", "in_scale", "shift"), WEIGHTS),
        min_size=1,
        max_size=3,
    )
)
def test_any_terms_of_heads_are_exact_or_refused(
    chosen: list[tuple[frozenset[str], float]], stand: Stand, conv_stand: Stand
) -> None:
    for tested in (stand, conv_stand):
        vocab = tested.base.spec.vocab_size
        parts = [part(HEAD, *head_edits(terms, vocab), weight=weight) for terms, weight in chosen]
        composed = exact_or_refused(tested, HEAD, parts)
        if not any(terms & {"out_scale", "in_scale"} for terms, _ in chosen):
            assert composed


@many
@given(chosen=st.lists(st.tuples(subsets("weight", "bias"), WEIGHTS), min_size=1, max_size=3), family=st.integers(0, 2))
def test_norms_are_exact(
    chosen: list[tuple[frozenset[str], float]], family: int, stand: Stand, conv_stand: Stand, scaled_stand: Stand
) -> None:
    tested, site = ((stand, NORM), (conv_stand, "transformer.h.1.ln_2"), (scaled_stand, NORM))[family]
    parts = [
        part(site, NormEdit(**{name: R(32) for name in sorted(terms) if name == "weight" or tested is conv_stand}), weight=weight)
        for terms, weight in chosen
    ]
    assert exact_or_refused(tested, site, parts)


def refused(parts: Sequence[Part], stand: Stand) -> tuple[str, str]:
    """Where and why a composition is refused."""
    with pytest.raises(LoweringError) as caught:
        compose(parts, stand.base)
    (fault,) = caught.value.faults
    assert fault.code == "not_composable"
    return fault.where, fault.message


def placed(weight: float = 1.0, **placement: Any) -> BottleneckEdit:
    return BottleneckEdit(Placement(**placement), R(2, 32), R(2, 32), up_bias=R(32), weight=weight)


LOW_RANK = LinearEdit(down=R(2, 32), up=R(2, 32))
RULES: dict[str, tuple[str, list[Part], str]] = {
    "two input transforms": (QUERY, [part(QUERY, LinearEdit(in_scale=R(32))), part(QUERY, LinearEdit(rotation=R(1, 8, 8)))], "each transform"),
    "a transform and another's scale": (QUERY, [part(QUERY, LinearEdit(in_scale=R(32))), part(QUERY, LinearEdit(out_scale=R(32)))], "scale"),
    "a weighted transform with a scale": (QUERY, [part(QUERY, LinearEdit(in_scale=R(32), out_scale=R(32)), weight=0.5)], "no weight but 1"),
    "pairs of different groups": (
        QUERY,
        [part(QUERY, LinearEdit(pair_scale=R(32), pair_group=4)), part(QUERY, LinearEdit(pair_scale=R(32), pair_group=8))],
        "pair this module's outputs differently",
    ),
    "a replaced head and another's scale": (HEAD, [part(HEAD, HeadEdit(weight=R(288, 32))), part(HEAD, LinearEdit(out_scale=R(288)))], "scale"),
    "scales that cancel under a low rank": (
        EMBEDDING,
        [part(EMBEDDING, EmbedEdit(out_scale=0 * R(32))), part(EMBEDDING, EmbedEdit(down=R(288, 2), up=R(2, 32)))],
        "add up to zero",
    ),
    "a replacing bottleneck beside another's edit": (DOWN, [part(DOWN, placed(replaces=True)), part(DOWN, LinearEdit(shift=R(32)))], "replaces all"),
    "a weighted replacing bottleneck": (DOWN, [part(DOWN, placed(replaces=True), weight=0.5)], "no weight but 1"),
    "a fusion beside another's bottleneck": (DOWN, [part(DOWN, placed(), FusionEdit(Placement())), part(DOWN, placed())], "fusion"),
    "a weighted fusion": (DOWN, [part(DOWN, placed(), FusionEdit(Placement()), weight=2.0)], "no weight but 1"),
    "two side attentions": (f"{LAYER}.self_attn", [part(f"{LAYER}.self_attn", SideEdit(R(3, 2, 8), R(3, 2, 8)))] * 2, "softmax"),
    "side attention under another's projection": (
        OUT, [part(f"{LAYER}.self_attn", SideEdit(R(3, 2, 8), R(3, 2, 8))), part(OUT, LOW_RANK)], "passes this projection",
    ),
    "two interventions": (LAYER, [part(LAYER, InterventionEdit(R(2, 32), None, R(2, 32)))] * 2, "subspace"),
    "a weighted intervention": (LAYER, [part(LAYER, InterventionEdit(R(2, 32), None, R(2, 32)), weight=0.5)], "no weight but 1"),
    "a weighted prologue": ("adapters", [Part(Program(prologue=Prologue(tokens=R(2, 32))), 0.5)], "no weight but 1"),
    "prologues that count positions differently": (
        "adapters", [Part(Program(prologue=Prologue(tokens=R(2, 32), shifts=shifts))) for shifts in (True, False)], "positions",
    ),
    "virtual tokens in different places": (
        "adapters", [Part(Program(prologue=Prologue(tokens=R(2, 32), tokens_site=site))) for site in (EMBEDDING, NORM)], "different places",
    ),
    "two task heads": ("adapters", [Part(Program(head=TaskHead("last", [HeadLayer(R(2, 32))])))] * 2, "task head"),
    "different invocation tokens": ("adapters", [Part(Program(invocation_tokens=(4,))), Part(Program())], "different tokens"),
    "invocation tokens and a prologue": (
        "adapters",
        [Part(Program(invocation_tokens=(4,))), Part(Program(invocation_tokens=(4,), prologue=Prologue(tokens=R(2, 32))))],
        "cannot be combined",
    ),
    "no adapters": ("adapters", [], "one to 8"),
    "too many adapters": ("adapters", [part(QUERY, LOW_RANK)] * (MAX_ADAPTERS + 1), "one to 8"),
    "a weight that is no number": ("adapters", [part(QUERY, LOW_RANK, weight=float("nan"))], "finite"),
    "a weight without bounds": ("adapters", [part(QUERY, LOW_RANK, weight=10.5)], "from -10 to 10"),
    "an overflow": (f"{QUERY}.shift", [part(QUERY, LinearEdit(shift=1e308 * torch.ones(32).double()), weight=5.0)], "overflows"),
}  # fmt: skip


@pytest.mark.parametrize("rule", RULES)
def test_what_cannot_be_added_up_is_refused(rule: str, stand: Stand) -> None:
    where, parts, message = RULES[rule]
    found = refused(parts, stand)
    assert found[0] == where
    assert message in found[1]


def test_all_conflicts_are_named_at_once_with_their_adapters(stand: Stand) -> None:
    harmless = part(UP, LinearEdit(shift=R(48)))
    scaling = Part(Program({site: [LinearEdit(in_scale=R(32))] for site in (QUERY, UP)}))
    with pytest.raises(LoweringError) as caught:
        compose([scaling, harmless, scaling], stand.base)
    assert [fault.where for fault in caught.value.faults] == [QUERY, UP]
    assert all("adapters[0] and adapters[2]" in fault.message for fault in caught.value.faults)


def test_the_size_is_watched_while_it_grows(stand: Stand) -> None:
    with pytest.raises(LoweringError) as caught:
        compose([part(QUERY, LOW_RANK), part(QUERY, LOW_RANK)], stand.base, max_bytes=100)
    assert caught.value.faults[0].code == "program_too_large"


def test_several_products_take_the_cheaper_exact_form(stand: Stand) -> None:
    thin = [part(UP, linear_edit(frozenset({"thin_kronecker"}), 32, 48), weight=0.5) for _ in range(2)]
    (edit,) = stand.check(UP, thin).edits[UP]
    assert isinstance(edit, LinearEdit)
    assert (edit.rank, edit.dense, edit.left) == (4, None, None)
    square = [part(UP, linear_edit(frozenset({"kronecker"}), 32, 48)) for _ in range(2)]
    (edit,) = stand.check(UP, square).edits[UP]
    assert isinstance(edit, LinearEdit)
    assert edit.rank == 0
    assert edit.dense is not None
    (edit,) = stand.check(UP, [square[0], part(UP, LinearEdit(shift=R(48)))]).edits[UP]
    assert isinstance(edit, LinearEdit)
    assert (edit.dense, edit.rank) == (None, 0)


def test_bottlenecks_are_listed_with_their_weights(stand: Stand) -> None:
    plain, beside = placed(), placed(weight=0.5, source="residual", residual="residual")
    normed = replace(placed(), after_weight=R(32), after_bias=R(32))
    program = compose(
        [part(DOWN, plain, weight=0.5), part(DOWN, beside, normed, LinearEdit(shift=R(32)), weight=2.0)], stand.base
    )
    linear, first, second, third = program.edits[DOWN]
    assert isinstance(linear, LinearEdit)
    assert isinstance(first, BottleneckEdit)
    assert isinstance(second, BottleneckEdit)
    assert isinstance(third, BottleneckEdit)
    assert torch.equal(first.up, plain.up * 0.5)
    assert first.up_bias is not None
    assert plain.up_bias is not None
    assert torch.equal(first.up_bias, plain.up_bias * 0.5)
    assert [first.weight, second.weight, third.weight] == [1.0, 1.0, 2.0]
    assert torch.equal(second.up, beside.up)


def test_a_weight_is_folded_where_an_edit_is_linear_in_one_tensor(stand: Stand) -> None:
    side = SideEdit(R(3, 2, 8), R(3, 2, 8), projected=False)
    moved = InterventionEdit(R(2, 32), None, R(2, 32), subtracts=False, positions=2)
    program = compose([Part(Program({f"{LAYER}.self_attn": [side], LAYER: [moved]}), 0.5), part(OUT, LOW_RANK)], stand.base)
    (found,) = program.edits[f"{LAYER}.self_attn"]
    assert isinstance(found, SideEdit)
    assert torch.equal(found.value, side.value * 0.5)
    assert torch.equal(found.key, side.key)
    (changed,) = program.edits[LAYER]
    assert isinstance(changed, InterventionEdit)
    assert torch.equal(changed.project, moved.project * 0.5)


class BiasedHead:
    """A base whose head has a bias; no served family has one yet."""

    compute = torch.float64
    spec = SiteSpec(HEAD, "head", 3, 5, True, None)

    def __init__(self) -> None:
        self._weight, self._bias = R(5, 3), R(5)

    def weight(self, _: str) -> Tensor:
        return self._weight

    def bias(self, _: str) -> Tensor:
        return self._bias


@pytest.mark.parametrize("biases", [(True, True), (True, False), (False, False)])
def test_a_heads_bias_is_weighted_with_it(biases: tuple[bool, bool]) -> None:
    base: Any = BiasedHead()
    shares = [
        Share(index, weight, HeadEdit(R(5, 3), R(5) if has_bias else None))
        for index, (weight, has_bias) in enumerate(zip((0.5, 2.0), biases, strict=True))
    ]
    found = compose_head(shares, base.spec, base)
    x = R(4, 3)
    start = F.linear(x, base.weight(HEAD), base.bias(HEAD))
    expected = start + sum(share.weight * (F.linear(x, share.edit.weight, share.edit.bias) - start) for share in shares)
    assert found.weight is not None
    torch.testing.assert_close(F.linear(x, found.weight, found.bias), expected)
    with pytest.raises(Conflict, match="a head with a bias"):
        compose_head([Share(0, 0.5, HeadEdit(row_ids=torch.tensor([1]), rows=R(1, 3)))], base.spec, base)


STREAMS = ("sublayer", "residual", "sum", "normed")


@st.composite
def bottlenecks(draw: st.DrawFn) -> BottleneckEdit:
    placement = Placement(
        draw(st.sampled_from(("relu", "gelu", "linear"))),
        draw(st.sampled_from(STREAMS)),  # type: ignore[arg-type]
        draw(st.sampled_from(STREAMS)),  # type: ignore[arg-type]
        draw(st.booleans()),
        draw(st.sampled_from((False, False, False, True))),
    )
    pairs = [(R(32), R(32)) if draw(st.booleans()) else (None, None) for _ in range(3)]
    return BottleneckEdit(
        placement, R(2, 32), R(2, 32), None if pairs[0][0] is None else R(2), *pairs[0][:1], *pairs[1], *pairs[2]
    )


@many
@given(chosen=st.lists(st.tuples(st.lists(bottlenecks(), min_size=1, max_size=2), WEIGHTS), min_size=1, max_size=3))
def test_any_bottlenecks_are_exact_or_refused(chosen: list[tuple[list[BottleneckEdit], float]], stand: Stand) -> None:
    parts = [part(DOWN, *edits, weight=weight) for edits, weight in chosen]
    replacing = [weight for edits, weight in chosen if any(edit.placement.replaces for edit in edits)]
    if replacing and (len(chosen) > 1 or replacing != [1.0]):
        assert refused(parts, stand)[0] == DOWN
        return
    s, r = R(ROWS, 32), R(ROWS, 32)
    streams = Streams(s, r, lambda: torch.tanh(s + r))

    def joined(program: Program) -> Tensor:
        return sum(
            (bottleneck_reference(edit, streams) - s for edit in program.edits[DOWN] if isinstance(edit, BottleneckEdit)), s
        )

    expected = s + sum(weight * (joined(item.program) - s) for item, (_, weight) in zip(parts, chosen, strict=True))
    torch.testing.assert_close(joined(compose(parts, stand.base)), expected, rtol=1e-9, atol=1e-9)


def test_prologues_follow_each_other_and_one_head_is_kept(stand: Stand) -> None:
    kv, more, tokens = R(2, 2, 2, 3, 8), R(2, 2, 2, 1, 8), R(4, 32)
    head = TaskHead("last", [HeadLayer(R(2, 32))], ("no", "yes"))
    first = Part(Program(prologue=Prologue(kv=kv)))
    second = Part(Program(prologue=Prologue(kv=more, tokens=tokens, tokens_site=EMBEDDING), notes={"error": 0.5}))
    program = compose([first, second, Part(Program({QUERY: [LOW_RANK]}, head=head), 0.5)], stand.base)
    assert program.prologue.kv is not None
    assert torch.equal(program.prologue.kv, torch.cat([kv, more], 3))
    assert (program.prologue.num_tokens, program.prologue.tokens_site, len(program.prologue)) == (4, EMBEDDING, 8)
    assert program.head is not None
    assert program.head.labels == ("no", "yes")
    assert program.notes == {"adapters[1].error": 0.5}
    acting = Part(Program({QUERY: [LOW_RANK]}, invocation_tokens=(4, 5)))
    assert compose([acting, acting], stand.base).invocation_tokens == (4, 5)


def everywhere(stand: Stand) -> Program:
    """A program with a term of every kind, in both layers and outside."""
    program = Program(notes={"error": 0.25})
    for site in stand.sites.values():
        if site.kind == "linear":
            program.add(
                site.name,
                linear_edit(frozenset(TERMS) - {"kronecker", "rotation", "pairs8"}, site.in_features, site.out_features),
            )
        elif site.kind == "norm":
            program.add(site.name, NormEdit(weight=R(32)))
    program.add(EMBEDDING, EmbedEdit(row_ids=torch.tensor([1, 7]), rows=R(2, 32)))
    program.add(HEAD, HeadEdit(weight=R(288, 32)))
    program.add(DOWN, placed(replaces=True))
    program.add(f"{LAYER}.self_attn", SideEdit(R(3, 2, 8), R(3, 2, 8)))
    program.add(LAYER, InterventionEdit(R(2, 32), R(2), R(2, 32), positions=3))
    program.prologue = Prologue(tokens=R(2, 32), tokens_site=EMBEDDING)
    program.head = TaskHead("mean", [HeadLayer(R(2, 32))])
    return program


def shown(program: Program) -> Iterator[tuple[str, str, str, Any]]:
    for site, owner, name, tensor in program.tensors():
        yield site, type(owner).__name__, name, tensor.tolist()


def test_one_adapter_with_weight_one_is_itself_through_its_file(stand: Stand, tmp_path: Path) -> None:
    program = everywhere(stand)
    write_program(tmp_path / "p.safetensors", program, program_id="p", facts={})
    read = unpack_program(read_program(tmp_path / "p.safetensors"), stand.base.spec)
    assert sorted(shown(compose([Part(read)], stand.base)), key=str) == sorted(shown(program), key=str)


def test_layers_are_left_out_from_the_first(stand: Stand) -> None:
    program, spec = everywhere(stand), stand.base.spec
    assert drop_layers(program, spec, 0).edits == program.edits
    kept = drop_layers(program, spec, 1)
    assert {stand.sites[site].layer for site in kept.edits} == {1, None}
    assert {stand.sites[site].layer for site in drop_layers(program, spec, 2).edits} == {None}
    assert len(kept.prologue) == 2
    assert program.edits.keys() > kept.edits.keys()
    for wrong in (3, -1):
        with pytest.raises(LoweringError, match="the base has 2 layers"):
            drop_layers(program, spec, wrong)
    with pytest.raises(LoweringError, match="every layer"):
        drop_layers(Program(prologue=Prologue(kv=R(2, 2, 2, 3, 8))), spec, 1)

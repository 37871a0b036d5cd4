"""The Triton kernels by slot equal their references: many programs, ragged ranks, rows that nobody edits, hostile neighbours."""

from __future__ import annotations

import random

import pytest
import torch
from torch import Tensor, nn

from server.adapters.activations import ACTIVATIONS
from server.adapters.kernels import slots as fields
from server.adapters.kernels.slots import REFERENCE, SlotTerms
from server.adapters.kernels.triton_math import ACTIVATION_CODES
from server.adapters.kernels.triton_slots import TRITON
from server.adapters.norm import norm_work
from server.adapters.norm_form import norm_form
from tests.server.adapters.test_native_norm import WIDTH, norms

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
# The interpreter computes with NumPy, which warns of what is meant here.
pytestmark = pytest.mark.filterwarnings("ignore:.*encountered:RuntimeWarning")


class Case:
    """Programs of ranks 0 to 64 in slots 1 to 5, with or without each vector, two of them of another kind; runs of 1 to 20 rows of these and
    of the base; and a table whose rows lie apart."""

    def __init__(self, seed: int, width: int, out: int, dtype: torch.dtype = torch.float32) -> None:
        choose, generator = random.Random(seed), torch.Generator().manual_seed(seed)

        def made(*shape: int, dtype: torch.dtype = dtype) -> Tensor:
            return torch.randn(shape, generator=generator).to(DEVICE, dtype)

        table = torch.zeros(6, 3, fields.FIELDS, dtype=torch.int64)
        self.rows, self.vectors = made(6 * 64 * (width + out)), made(9000, dtype=torch.float32)
        for slot in range(1, 6):
            place = table[slot, 1]
            place[fields.RANK] = choose.choice([0, 1, 5, 16, 40, 64])
            place[fields.DOWN] = (slot - 1) * 64 * (width + out) + choose.randrange(9)
            place[fields.UP] = place[fields.DOWN] + 64 * width
            for field in (fields.IN_SCALE, fields.OUT_SCALE, fields.SHIFT, fields.BIAS):
                place[field] = choose.choice([-1, choose.randrange(7000)])
            place[fields.KIND] = slot // 4
            place[fields.PAIR_SCALE] = choose.choice([-1, choose.randrange(7000)])
            place[fields.PAIR_GROUP] = choose.choice([2, 4, 8])
        self.places = table.to(DEVICE)[:, 1]
        slots = [slot for slot in [3, 0, *(choose.randrange(6) for _ in range(6))] for _ in range(choose.choice([1, 1, 2, 20]))]
        self.slots = torch.tensor(slots, dtype=torch.int32, device=DEVICE)
        self.x, self.y = made(len(slots), width), made(len(slots), out)

    def expected(self, terms: SlotTerms) -> Tensor:
        y = self.y.double()
        REFERENCE.add(y, self.x.double(), self.rows.double(), self.vectors.double(), self.slots, self.places, terms)
        return y

    def found(self, terms: SlotTerms) -> Tensor:
        y = self.y.clone()
        TRITON.add(y, self.x, self.rows, self.vectors, self.slots, self.places, terms)
        return y


def error(found: Tensor, expected: Tensor) -> float:
    return float((found.double() - expected).abs().max() / expected.abs().max())


@pytest.mark.parametrize(("seed", "width", "out"), [(0, 40, 136), (1, 600, 24), (2, 128, 128), (3, 24, 40)])
def test_any_batch_equals_the_reference(seed: int, width: int, out: int) -> None:
    case = Case(seed, width, out)
    for kind in (0, 1):
        terms = SlotTerms(64, True, kind)
        assert error(case.found(terms), case.expected(terms)) < 1e-6
    arguments = (case.vectors, case.slots, case.places)
    torch.testing.assert_close(TRITON.scale(case.x, *arguments), REFERENCE.scale(case.x, *arguments), rtol=1e-6, atol=0)
    found, expected, z = case.y.clone(), case.y.clone(), case.y.flip(0)
    TRITON.pairs(found, z, *arguments)
    REFERENCE.pairs(expected, z, *arguments)
    assert not torch.equal(found, case.y)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.bfloat16, 2e-2), (torch.float16, 2e-3)])
def test_half_precision(dtype: torch.dtype, tolerance: float) -> None:
    case = Case(7, 72, 40, dtype)
    assert error(case.found(SlotTerms(64, True)), case.expected(SlotTerms(64, True))) < tolerance
    scaled = REFERENCE.scale(case.x.double(), case.vectors.double(), case.slots, case.places)
    assert error(TRITON.scale(case.x, case.vectors, case.slots, case.places), scaled) < tolerance


def test_vectors_alone_and_products_alone() -> None:
    case = Case(4, 40, 24)
    ranks, case.places[:, fields.RANK] = case.places[:, fields.RANK].clone(), 0
    assert error(case.found(SlotTerms(0, True)), case.expected(SlotTerms(0, True))) < 1e-6
    case.places[:, fields.RANK] = ranks
    case.places[:, [fields.OUT_SCALE, fields.SHIFT]] = -1
    assert error(case.found(SlotTerms(64, False)), case.expected(SlotTerms(64, False))) < 1e-6


@pytest.mark.parametrize("activation", sorted(ACTIVATIONS))
def test_activations_and_inner_biases(activation: str) -> None:
    case = Case(5, 24, 24)
    case.places[1:, fields.BIAS] = torch.tensor([10, -1, 200, 3000, 40], device=DEVICE)
    expected = case.x.double()
    arguments = (case.slots, case.places, SlotTerms(64, True, activation=activation))
    REFERENCE.add(expected, expected.clone(), case.rows.double(), case.vectors.double(), *arguments)
    # A bottleneck may read what it writes.
    found = case.x.clone()
    TRITON.add(found, found, case.rows, case.vectors, *arguments)
    assert error(found, expected) < 1e-6


def test_every_activation_has_a_code() -> None:
    assert set(ACTIVATIONS) == set(ACTIVATION_CODES)


def test_a_row_that_is_not_finite_stays_alone() -> None:
    places = torch.full((3, fields.FIELDS), -1, dtype=torch.int64)
    places[:, fields.KIND] = 0
    places[1, :3], places[2, :3] = torch.tensor([8, 0, 8 * 24]), torch.tensor([8, 512, 512])
    rows, vectors = torch.full((1100,), 1e-3, device=DEVICE), torch.zeros(1, device=DEVICE)
    rows[512:] = 1e30
    x, y = torch.ones(9, 24, device=DEVICE), torch.zeros(9, 40, device=DEVICE)
    x[3], x[5], x[1] = float("nan"), float("inf"), float("nan")
    # Row 1 shares its program's weights with finite rows; rows 3, 5 and 7 have a program that overflows.
    slots = torch.tensor([1, 1, 1, 2, 1, 2, 1, 2, 1], dtype=torch.int32, device=DEVICE)
    TRITON.add(y, x, rows, vectors, slots, places.to(DEVICE), SlotTerms(8, True))
    assert torch.isfinite(y).all(-1).tolist() == [row not in (1, 3, 5, 7) for row in range(9)]


def test_a_row_alone_equals_the_row_in_a_batch() -> None:
    case = Case(6, 520, 40)
    together = case.found(SlotTerms(64, True))
    for row in (0, case.slots.shape[0] - 1):
        single = case.y[row : row + 1].clone()
        arguments = (case.rows, case.vectors, case.slots[row : row + 1], case.places)
        TRITON.add(single, case.x[row : row + 1], *arguments, SlotTerms(int(case.places[case.slots[row], fields.RANK]), True))
        assert torch.equal(single[0], together[row])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("module", norms(), ids=lambda module: type(module).__name__)
@pytest.mark.parametrize("shape", [(6, WIDTH), (6, 3, WIDTH)])
@torch.inference_mode()
def test_norms_are_the_modules_with_other_parameters(module: nn.Module, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    module = module.to(DEVICE, dtype)
    form, own = norm_form(module), dict(module.named_parameters())
    assert form is not None
    assert TRITON.norm is not None
    torch.manual_seed(0)
    found_of = {slot: {name: torch.randn(WIDTH).to(DEVICE, dtype) for name in list(own)[: 1 + slot % 2]} for slot in (1, 2)}
    places = torch.zeros(4, fields.FIELDS, dtype=torch.int64)
    for slot, tensors in found_of.items():
        for field, name in ((fields.NORM_WEIGHT, "weight"), (fields.NORM_BIAS, "bias")):
            places[slot, field] = tensors[name].data_ptr() if name in tensors else 0
    x = 0.01 * torch.randn(*shape).to(DEVICE, dtype)
    x[1] = float("nan")
    expected: Tensor = module(x)
    found = expected.clone()
    norm_work(module, [(0, 2, found_of[1]), (4, 5, found_of[2])]).put(expected, x)
    slots = torch.tensor([1, 1, 0, 3, 2, 0], dtype=torch.int32, device=DEVICE)
    TRITON.norm(found, x, slots, places.to(DEVICE), own["weight"], own.get("bias"), form)
    tolerance = 1e-5 if dtype == torch.float32 else 4e-2
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance, equal_nan=True)


def test_rows_may_lie_apart() -> None:
    case = Case(3, 40, 24)
    expected, spread = case.found(SlotTerms(64, True)), torch.cat([case.y, case.y], dim=1)
    x = torch.cat([case.x, case.x], dim=1)[:, :40]
    TRITON.add(spread[:, :24], x, case.rows, case.vectors, case.slots, case.places, SlotTerms(64, True))
    assert torch.equal(spread[:, :24], expected)
    assert torch.equal(spread[:, 24:], case.y)

"""No method lands without its parity tests: every served method on every family of bases, or the reason why the library cannot make it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
from peft import get_peft_model

from server.adapters.lower import method_of, methods
from tests.conftest import TinyModels
from tests.parity import test_encoder_methods, test_fine_tune, test_lora, test_minilm, test_other_names
from tests.parity.cases import EVERYWHERE, all_cases, one_of_each
from tests.parity.golden import GOLDEN, names, read_golden
from tests.parity.shared import clean_model

ELSEWHERE: dict[tuple[str, str], tuple[Callable[..., None], tuple[str, ...]]] = {
    ("peft", "LORA"): (test_lora.test_logits_and_tokens_equal_peft, ("llama", "gpt2", "qwen2")),
    ("peft", "ADALORA"): (test_lora.test_logits_and_tokens_equal_peft, ("llama", "gpt2", "qwen2")),
    # What MISS was called; a file of the one is a file of the other.
    ("peft", "BONE"): (test_other_names.test_bone_equals_its_later_name, EVERYWHERE),
    ("peft", "TRAINABLE_TOKENS"): (test_encoder_methods.test_vectors_equal_peft, ("bert",)),
    ("medley", "BITFIT"): (test_fine_tune.test_biases, ()),
    ("medley", "FINE_TUNE"): (test_fine_tune.test_whole_checkpoint_is_exact, ()),
    ("medley", "PROBE"): (test_minilm.test_heads_and_vectors_packed_equal_the_libraries, ()),
}
"""Methods whose tests are not, or not all, in a ``CASES``: the test, and the families that it has them on."""
NO_CONV1D = (
    *("BEFT", "BOFT", "C3A", "DELORA", "GLORA", "LOHA", "LOKR", "MISS"),
    *("OSF", "PEANUT", "POLY", "SHIRA", "SUPERTUNING"),
)
ATTENTION = "PEFT knows the attention of Llama, Mistral and GPT-2 only"
NOT_MADE = {
    "gpt2": dict.fromkeys(NO_CONV1D, "PEFT has no layers of it for GPT-2's Conv1D, which OSF passes over"),
    "qwen2": {"ADAPTION_PROMPT": ATTENTION},
    "bert": {"ADAPTION_PROMPT": ATTENTION, "CPT": "PEFT makes it for language models only"},
}
"""Methods that PEFT cannot make on a family."""
NO_GOLDEN = {
    # The library has prefixes only in models that it has code of its own for.
    "prefix_tuning": {"qwen2"},
    # And prompts only in encoders.
    "prompt_tuning": {"llama", "gpt2", "qwen2"},
    # MAM has a prefix.
    "union": {"qwen2"},
}
"""Families that AdapterHub has no such method for, by its name."""
FROM_PEFT = sorted(name for library, name in methods() if library == "peft")


def families_of(library: str, name: str) -> set[str]:
    """The families that a method has cases on."""
    found = set(ELSEWHERE[library, name][1]) if (library, name) in ELSEWHERE else set()
    return found | {
        family for family in EVERYWHERE for case in one_of_each(family) if case.config(family).peft_type.value == name
    }


@pytest.mark.parametrize("name", FROM_PEFT)
def test_peft_methods_have_cases_on_every_family(name: str) -> None:
    missing = set(EVERYWHERE) - families_of("peft", name)
    assert missing == {family for family, reasons in NOT_MADE.items() if name in reasons}


@pytest.mark.filterwarnings("ignore::UserWarning:peft")
@pytest.mark.parametrize(("family", "name"), [(family, name) for family, reasons in NOT_MADE.items() for name in reasons])
def test_peft_cannot_make_the_others(family: str, name: str, tiny_models: TinyModels) -> None:
    case = next(case for case in all_cases("llama") if case.config("llama").peft_type.value == name)
    task = "SEQ_CLS" if family == "bert" else "CAUSAL_LM"
    try:
        model = get_peft_model(clean_model(tiny_models(family), task), replace(case.config(family), task_type=task))
    except (ValueError, TypeError, NotImplementedError):
        return
    assert not [parameter for parameter in model.parameters() if parameter.requires_grad]


def test_adapterhub_methods_have_golden_files() -> None:
    served = {
        (family, method_of(read_golden(GOLDEN / "cases" / name)).name) for family in EVERYWHERE for name in names("cases", family)
    }
    for library, name in methods():
        if library == "adapters":
            missing = {family for family in EVERYWHERE if (family, name) not in served}
            assert missing == NO_GOLDEN.get(name, set()), name


def test_medley_formats_have_tests() -> None:
    assert {key for key in methods() if key[0] == "medley"} == {key for key in ELSEWHERE if key[0] == "medley"}
    assert {library for library, _ in methods()} == {"peft", "adapters", "medley"}

"""What the tests of refusals share: any JSON value, and the faults of a checkpoint that must be refused."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
from hypothesis import strategies as st
from torch import Tensor

from server.adapters.faults import LoweringError
from server.adapters.lower import Checkpoint, lower
from server.adapters.lower.base import Base

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner, max_size=3),
    max_leaves=6,
)


def checkpoint_faults(checkpoint: Checkpoint, base: Base, **limits: int) -> dict[str, str]:
    """Where → code of everything that is wrong with it."""
    with pytest.raises(LoweringError) as caught:
        lower(checkpoint, base, **limits)
    return {fault.where: fault.code for fault in caught.value.faults}


def faults(config: Mapping[str, Any], tensors: Mapping[str, Tensor], base: Base, **limits: int) -> dict[str, str]:
    """The same of a config and tensors without anything beside them."""
    return checkpoint_faults(Checkpoint(config, tensors), base, **limits)

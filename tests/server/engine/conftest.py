"""A tiny decoder and programs for it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from server.adapters.ir import LinearEdit, Program
from server.adapters.program_file import write_program
from server.engine.types import ProgramRef
from tests.conftest import TinyModels
from tests.harness import load_base_for_lowering
from tests.server.engine.stepping import Make


@pytest.fixture(scope="module")
def model(tiny_models: TinyModels) -> Path:
    return tiny_models("llama")


@pytest.fixture(scope="module")
def make(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Make:
    """Program files by name and rank, with edits of all linears: low-rank ones, and shifts."""
    spec, directory = load_base_for_lowering(model).spec, tmp_path_factory.mktemp("programs")

    def write(name: str, rank: int = 2) -> ProgramRef:
        generator = torch.Generator().manual_seed(sum(name.encode()))
        program = Program()
        for site in spec.sites:
            if site.kind == "linear":
                down = torch.randn(rank, site.in_features, generator=generator) / 8
                up = torch.randn(rank, site.out_features, generator=generator) / 8
                shift = torch.randn(site.out_features, generator=generator) / 8
                program.add(site.name, LinearEdit(down=down, up=up, shift=shift))
        path = directory / f"{name}.safetensors"
        write_program(path, program, program_id=name, facts={})
        return ProgramRef(name, str(path))

    return write

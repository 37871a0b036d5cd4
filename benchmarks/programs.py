"""Adapters lowered to program files without a server, for benchmarks that drive an engine themselves."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

from adapter_store.staging import ROLES
from server.adapters.lowerer import Checkout, LowererClient
from server.engine.base_dir import BaseDir
from server.engine.types import ProgramRef


async def lowered(base: BaseDir, dtype: str, adapters: Sequence[Path], directory: Path) -> list[ProgramRef]:
    """A program for each adapter directory; the files are on the disk, not only in the page cache."""
    lowerer = LowererClient(base.path, base.digest, dtype, directory)
    await lowerer.start(())
    try:
        made = []
        for path in adapters:
            files = {role: path / name for name, role in ROLES.items() if (path / name).exists()}
            with lowerer.using(((path.name, 1.0),), since=time.monotonic()):
                program = await lowerer.ensure("bench", path.name, at_hand(files))
            with program.path.open("rb") as file:
                os.fsync(file.fileno())
            made.append(ProgramRef(program.program_id, str(program.path)))
        return made
    finally:
        await lowerer.stop()


def at_hand(files: Mapping[str, Path]) -> Checkout:
    """An adapter's files by role, which are there and stay."""

    def checkout() -> AbstractContextManager[Mapping[str, Path]]:
        return nullcontext(files)

    return checkout

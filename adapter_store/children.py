"""What a fusion is made of: other adapters of the same tenant, whose files become part of it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from adapter_store.errors import AdapterNotFound, AdapterRejected, Fault, InvalidName
from adapter_store.manifest import check_name
from adapter_store.staging import StagedAdapter, StagedFile
from adapter_store.types import AdapterVersion


def with_children(
    staged: StagedAdapter, resolve: Callable[[str], AdapterVersion], link: Callable[[str, Path], None]
) -> StagedAdapter:
    """A staged upload and the files of the adapters that it names, linked beside its own.

    ``resolve`` gives the version that a name means now, ``link`` puts a blob at a path. Raises AdapterRejected with every name that means
    no adapter, and what ``link`` raises.
    """
    files: list[StagedFile] = []
    faults: list[Fault] = []
    for name in staged.children:
        try:
            version = resolve(check_name(name))
        except (AdapterNotFound, InvalidName):
            message = f"store the adapter that the fusion calls {name[:64]!r} under this name first"
            faults.append(Fault("missing_child", "adapter_fusion_config.json: name", message, found=name[:64]))
            continue
        for file in version.files:
            if file.role in ("config", "weights"):
                path = staged.files[0].path.with_name(f"child-{len(files)}")
                link(file.sha256, path)
                files.append(StagedFile(f"child/{name}/{file.role}", f"{name}/{file.name}", path, file.sha256, file.nbytes))
    if faults:
        raise AdapterRejected(faults)
    return staged.with_files(files) if files else staged

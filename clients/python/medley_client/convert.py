"""``medley convert``: an adapter's pickled weights into safetensors, on the user's own machine. The server unpickles nothing."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

from medley_client.errors import MedleyError

HEAD_PICKLE = "pytorch_model_head.bin"
NAMES = {
    "adapter_model.bin": "adapter_model.safetensors",
    "pytorch_adapter.bin": "adapter.safetensors",
    HEAD_PICKLE: "model_head.safetensors",
    "pytorch_model_adapter_fusion.bin": "model_adapter_fusion.safetensors",
}
# Elsewhere a tensor that is stored under two names belongs to both, as in tied embeddings.
_ALIASED = frozenset({"pytorch_adapter.bin", HEAD_PICKLE, "pytorch_model_adapter_fusion.bin"})


def convert(source: Path, out: Path | None = None, progress: Callable[[str], None] = lambda _: None) -> list[Path]:
    """Convert a file, or every known one of a directory, beside it or into ``out``. Returns the files written. Raises MedleyError."""
    files = [source] if source.is_file() else [source / name for name in NAMES if (source / name).is_file()]
    if not files:
        raise MedleyError(f"{source} has none of {', '.join(NAMES)}")
    written = []
    for file in files:
        target = (out or file.parent) / NAMES.get(file.name, f"{file.stem}.safetensors")
        target.parent.mkdir(parents=True, exist_ok=True)
        progress(f"{file.name} -> {target}")
        _convert_file(file, target)
        written.append(target)
    return written


def _convert_file(file: Path, target: Path) -> None:
    try:
        import torch
        from safetensors.torch import save_file
    except ImportError as error:
        raise MedleyError("converting needs PyTorch and safetensors: pip install 'medley-client[convert]'") from error
    try:
        loaded = torch.load(file, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise MedleyError(
            f"{file} holds more than tensors, which could run code when it is opened, so it is not opened: {str(error)[:200]}"
        ) from error
    except (RuntimeError, EOFError, ValueError) as error:
        raise MedleyError(f"{file} cannot be read: {str(error)[:200]}") from error
    state = loaded.get("state_dict", loaded) if isinstance(loaded, dict) else None
    if not isinstance(state, dict) or not all(isinstance(tensor, torch.Tensor) for tensor in state.values()):
        raise MedleyError(f"{file} is not a mapping of names to tensors")
    if file.name in _ALIASED:
        state = _without_aliases(state)
    # safetensors refuses tensors that share memory; clones hold the same values.
    save_file({str(name): tensor.detach().clone().contiguous() for name, tensor in state.items()}, target)


def _without_aliases(state: dict[str, Any]) -> dict[str, Any]:
    """One name for every tensor, the shortest. AdapterHub registers some modules twice, and a prefix once more in every layer."""
    kept: dict[tuple[Any, ...], str] = {}
    for name in sorted(state, key=lambda key: (len(key), key)):
        tensor = state[name]
        kept.setdefault(
            (tensor.untyped_storage().data_ptr(), tensor.storage_offset(), tuple(tensor.shape), tensor.stride()), name
        )
    names = set(kept.values())
    return {name: tensor for name, tensor in state.items() if name in names}

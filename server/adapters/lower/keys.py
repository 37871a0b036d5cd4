"""Where a checkpoint's keys point, by the library that wrote them: a key to ``<site>.<tail>``, or to a name of its own.

Knows the layouts of files, not what any tensor means.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from server.adapters.base_spec import BaseSpec
from server.adapters.families import SublayerKind
from server.adapters.lower.checkpoint import Checkpoint


@dataclass(frozen=True, slots=True)
class KeyLayout:
    """``path`` maps a key to the path that its tensor is found by, or to None where nothing reads it. ``has_aliases``: equal tensors may come
    under several keys."""

    path: Callable[[str], str | None]
    has_aliases: bool = False


def key_layout(checkpoint: Checkpoint, spec: BaseSpec) -> KeyLayout:
    """The layout of the library that wrote the checkpoint."""
    if checkpoint.library == "adapters":
        return KeyLayout(_AdapterHub(str(checkpoint.config.get("name")), spec).path, has_aliases=True)
    return KeyLayout(_peft_path, has_aliases=True)


def _peft_path(key: str) -> str | None:
    # ``bias="all"`` also stores the base's own biases of modules that are replaced, and those that replace them a second time.
    if ".original_module." in key and key.endswith(".bias"):
        return None
    path = (
        key.removeprefix("base_model.").removeprefix("model.")
        if key.startswith("base_model.model.")
        else key.removeprefix("base_model.")
    )
    # Raw state dicts keep the adapter's name, which saved files leave out.
    return path.replace(".default.", ".").removesuffix(".default").replace(".modules_to_save.", ".")


_SUBLAYERS: dict[str, SublayerKind] = {
    ".attention_adapters": "attention",
    ".attention.output": "attention",
    ".output_adapters": "output",
    ".output": "output",
}
_BOTTLENECKS = {
    "adapters": "bottleneck",
    "adapter_fusion_layer": "fusion",
    # What adapter-transformers called them.
    "attention_text_task_adapters": "bottleneck",
    "attention_text_lang_adapters": "bottleneck",
    "layer_text_task_adapters": "bottleneck",
    "layer_text_lang_adapters": "bottleneck",
}
_SHARED = ("prefix_tunings", "prompt_tunings", "shared_parameters", "invertible_adapters", "invertible_lang_adapters", "heads")
_KINDS = (*_BOTTLENECKS, *_SHARED, "loras", "refts")


class _AdapterHub:
    """AdapterHub has the adapter's name inside every key: ``<module>.<kind>.<name>.<tail>``.

    Bottlenecks and fusions go to the site of their sub-layer, as ``bottleneck.<tail>`` and ``fusion.<tail>``; LoRA and ReFT to their module
    and layer, as ``loras.<tail>`` and ``refts.<tail>``; what belongs to the whole model to ``<kind>.<tail>``.
    """

    def __init__(self, name: str, spec: BaseSpec) -> None:
        self._marks = {f".{kind}.{name}.": kind for kind in _KINDS}
        self._prefix = spec.backbone_prefix
        self._sites = {(spec.layer_site(item.layer, ""), item.kind): item.site for item in spec.sublayers}

    def path(self, key: str) -> str:
        for mark, kind in self._marks.items():
            module, found, tail = f".{key}".partition(mark)
            if found:
                return self._path(key, module, kind, tail)
        return key

    def _path(self, key: str, module: str, kind: str, tail: str) -> str:
        if kind in _SHARED:
            return f"{kind}.{tail}"
        if kind in _BOTTLENECKS:
            # The norm before a bottleneck is registered twice, the second time as the first module of a chain.
            if tail.startswith("adapter_norm_before."):
                tail = tail.replace("adapter_norm_before.", "adapter_down.0.", 1)
            site = self._sublayer_site(module)
            return f"{site}.{_BOTTLENECKS[kind]}.{tail}" if site else key
        return f"{module.removeprefix('.').removesuffix('.reft_layer')}.{kind}.{tail}"

    def _sublayer_site(self, module: str) -> str | None:
        """The site of a sub-layer, from the path of the module that holds its bottlenecks (with a dot before it)."""
        for end, kind in _SUBLAYERS.items():
            layer = module.removesuffix(end).removeprefix(".")
            for candidate in (layer, self._prefix + layer, layer.removeprefix(self._prefix)):
                if module.endswith(end) and (candidate, kind) in self._sites:
                    return self._sites[candidate, kind]
        return None

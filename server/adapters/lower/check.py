"""What a lowered program must satisfy, whatever method it came from: it does something, is finite, fits the base and the byte budget."""

from __future__ import annotations

from server.adapters.base_spec import SiteSpec
from server.adapters.ir import BottleneckEdit, HeadEdit, LinearEdit, Program
from server.adapters.lower.base import Base
from server.adapters.lower.source import Source


def check_program(source: Source, base: Base, program: Program, max_bytes: int) -> None:
    """Record every way in which the program cannot be served."""
    if program.is_empty:
        source.fault(
            "empty_adapter",
            "adapter_model.safetensors",
            "the adapter changes no module of this base model; was it trained on another one?",
        )
    if (where := program.first_non_finite()) is not None:
        source.fault(
            "non_finite", where, f"the edit overflows in {base.spec.dtype}; scale the adapter down or serve the base in float32"
        )
    if program.nbytes > max_bytes:
        source.fault(
            "program_too_large",
            "adapter",
            "the lowered adapter is too large; train fewer modules, or with a smaller rank",
            f"at most {max_bytes} bytes",
            f"{program.nbytes} bytes",
        )
    _check_prologue(source, base, program)
    sites = base.spec.by_name()
    for site, owner, name, tensor in program.tensors():
        shape = _shapes(owner, sites[site]).get(name) if site in sites else None
        if shape is not None and tuple(tensor.shape) != shape:
            source.fault(
                "wrong_shape", f"{site}.{name}", "the lowered edit does not fit the base", str(shape), str(tuple(tensor.shape))
            )


def _check_prologue(source: Source, base: Base, program: Program) -> None:
    spec, prologue = base.spec, program.prologue
    if len(prologue) and len(prologue) >= spec.max_positions:
        found = f"{len(prologue)} virtual tokens"
        source.fault(
            "program_too_large",
            "adapter",
            "no room is left for a prompt; train fewer virtual tokens",
            f"fewer than {spec.max_positions}",
            found,
        )
    if len(prologue) and program.invocation_tokens:
        source.fault(
            "unsupported_field",
            "adapter",
            "virtual tokens or a prefix, in a program that acts only from tokens of the prompt on; train one without the other",
        )
    if prologue.after_first and not spec.is_encoder:
        source.fault(
            "unsupported_field",
            "adapter",
            "virtual tokens behind the first token cannot be shared by requests that generate; train them in front of the prompt",
        )


def _shapes(owner: object, spec: SiteSpec) -> dict[str, tuple[int, ...]]:
    """The shape of every tensor of an edit whose shape the site decides."""
    size_in, size_out = spec.in_features, spec.out_features
    if isinstance(owner, LinearEdit):
        outputs = dict.fromkeys(("out_scale", "shift", "pair_scale"), (size_out,))
        return {
            "down": (owner.rank, size_in),
            "up": (owner.rank, size_out),
            "in_scale": (size_in,),
            "dense": (size_out, size_in),
            **outputs,
        }
    if isinstance(owner, HeadEdit):
        return {"weight": (size_out, size_in)}
    if isinstance(owner, BottleneckEdit):
        rank, vectors = owner.rank, ("up_bias", "before_weight", "before_bias", "after_weight", "after_bias")
        return {"down": (rank, size_out), "up": (rank, size_out), "down_bias": (rank,), **dict.fromkeys(vectors, (size_out,))}
    return {}

"""The lowering process: ``python -m server.adapters.lowering_process``. Hostile tensors are read here, and nowhere else.

It knows the base by its config (on the meta device) and its memory-mapped weights, lowers one upload or composes one program at a
time under a memory limit, and may die without harm. Started by ``LowererClient`` with a Start message on standard input; ends when that pipe closes.
"""

from __future__ import annotations

import resource
import sys
from pathlib import Path
from typing import Any

import msgspec
import torch
import zmq
from safetensors import SafetensorError

from server.adapters.base_spec import describe
from server.adapters.compose import Part, compose, drop_layers
from server.adapters.faults import Fault, LoweringError
from server.adapters.ir import BottleneckEdit, LinearEdit, Program
from server.adapters.lower import lower, method_of
from server.adapters.lower.base import Base, BaseWeights
from server.adapters.lower.checkpoint import read_checkpoint
from server.adapters.lowerer import Compose, Done, Job, Start
from server.adapters.packed import unpack_program
from server.adapters.program_file import read_program, write_program
from server.adapters.skeleton import skeleton


def main() -> None:
    """The child: build the base's spec, say so, then lower what comes."""
    start = msgspec.json.decode(sys.stdin.buffer.readline(), type=Start)
    _limit_memory(start.max_memory_bytes)
    socket: zmq.Socket[bytes] = zmq.Context.instance().socket(zmq.PAIR)
    socket.setsockopt(zmq.LINGER, 0)
    socket.connect(start.address)
    base = _load_base(start)
    socket.send(msgspec.msgpack.encode(Done()))
    poller = zmq.Poller()
    poller.register(socket, zmq.POLLIN)
    poller.register(sys.stdin.fileno(), zmq.POLLIN)
    while sys.stdin.fileno() not in dict(poller.poll()):
        job = msgspec.msgpack.decode(socket.recv(), type=Job | Compose)
        socket.send(msgspec.msgpack.encode(_make(job, base, start.max_program_bytes)))


def _limit_memory(max_bytes: int) -> None:
    """Anonymous memory only: the base's mapped weights do not count."""
    _, hard = resource.getrlimit(resource.RLIMIT_DATA)
    limit = max_bytes if hard == resource.RLIM_INFINITY else min(max_bytes, hard)
    resource.setrlimit(resource.RLIMIT_DATA, (limit, hard))


def _load_base(start: Start) -> Base:
    torch.set_num_threads(1)
    directory = Path(start.base_dir)
    spec = describe(skeleton(directory), start.base_digest, start.dtype)
    return Base(spec, BaseWeights(directory, spec))


def _make(job: Job | Compose, base: Base, max_bytes: int) -> Done:
    try:
        program, facts = _compose(job, base, max_bytes) if isinstance(job, Compose) else _lower(job, base, max_bytes)
        write_program(Path(job.program), program, program_id=job.program_id, facts=facts)
    except LoweringError as error:
        return Done(faults=list(error.faults))
    except MemoryError:
        return Done(faults=[Fault("program_too_large", "adapter", "lowering the adapter needs more memory than is allowed")])
    except (SafetensorError, ValueError, TypeError, RuntimeError, OSError, LookupError, AttributeError, ArithmeticError) as error:
        # A fault that no check foresaw: the adapter is refused, the service goes on, and the log has the details.
        print(f"lowerer: {type(error).__name__}: {error}", file=sys.stderr, flush=True)  # noqa: T201 - the child's log
        return Done(faults=[Fault("lowering_failed", "adapter", f"the adapter cannot be lowered ({type(error).__name__})")])
    return Done(facts=facts)


def _lower(job: Job, base: Base, max_bytes: int) -> tuple[Program, dict[str, Any]]:
    checkpoint = read_checkpoint({role: Path(file) for role, file in job.files.items()})
    program = lower(checkpoint, base, max_bytes=max_bytes)
    method = method_of(checkpoint)
    everything = [checkpoint, *([checkpoint.head] if checkpoint.head else []), *checkpoint.children.values()]
    parameters = sum(tensor.numel() for part in everything for tensor in part.tensors.values())
    return program, {"method": method.name, "library": checkpoint.library, "parameters": parameters, **_facts(program, base)}


def _compose(job: Compose, base: Base, max_bytes: int) -> tuple[Program, dict[str, Any]]:
    parts = []
    for part in job.parts:
        program = unpack_program(read_program(Path(part.program)), base.spec)
        parts.append(Part(drop_layers(program, base.spec, job.drop), part.weight))
    composed = compose(parts, base, max_bytes=max_bytes)
    shown = [{"digest": part.digest, "weight": part.weight} for part in job.parts]
    return composed, {"method": "composite", "parts": shown, "adapter_drop": job.drop, **_facts(composed, base)}


def _facts(program: Program, base: Base) -> dict[str, Any]:
    """What users want to know of a program."""
    ranks = sorted(
        {
            edit.rank
            for edits in program.edits.values()
            for edit in edits
            if isinstance(edit, LinearEdit | BottleneckEdit) and edit.rank
        }
    )
    return {
        "rank": max(ranks, default=0),
        "ranks": ranks,
        "sites": len(program.edits),
        "modules": sorted({site.rpartition(".")[2] for site in program.edits}),
        "program_bytes": program.nbytes,
        "virtual_tokens": len(program.prologue),
        # An encoder has no K/V to fill: only positions run out, and not every prologue takes any.
        "room_taken": len(program.prologue) if program.prologue.shifts or not base.spec.is_encoder else 0,
        "labels": list(program.head.labels) if program.head is not None else [],
        "pooling": program.head.pooling if program.head is not None else None,
        **({"notes": program.notes} if program.notes else {}),
    }


if __name__ == "__main__":
    main()

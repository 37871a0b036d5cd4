"""The lowering process: ``python -m server.adapters.lowering_process``. Hostile tensors are read here, and nowhere else.

It knows the base by its config (on the meta device) and its memory-mapped weights, lowers one upload at a time under a memory
limit, and may die without harm. Started by ``LowererClient`` with a Start message on standard input; ends when that pipe closes.
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
from transformers import AutoConfig, AutoModelForCausalLM

from server.adapters.base_spec import describe
from server.adapters.faults import Fault, LoweringError
from server.adapters.ir import BottleneckEdit, LinearEdit, Program
from server.adapters.lower import Checkpoint, Method, lower, method_of
from server.adapters.lower.base import Base, BaseWeights
from server.adapters.lower.checkpoint import read_checkpoint
from server.adapters.lowerer import Done, Job, Start
from server.adapters.program_file import write_program


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
        job = msgspec.msgpack.decode(socket.recv(), type=Job)
        socket.send(msgspec.msgpack.encode(_lower(job, base, start.max_program_bytes)))


def _limit_memory(max_bytes: int) -> None:
    """Anonymous memory only: the base's mapped weights do not count."""
    _, hard = resource.getrlimit(resource.RLIMIT_DATA)
    limit = max_bytes if hard == resource.RLIM_INFINITY else min(max_bytes, hard)
    resource.setrlimit(resource.RLIMIT_DATA, (limit, hard))


def _load_base(start: Start) -> Base:
    torch.set_num_threads(1)
    directory = Path(start.base_dir)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(directory))  # type: ignore[no-untyped-call]
    spec = describe(model, start.base_digest, start.dtype)
    return Base(spec, BaseWeights(directory, spec))


def _lower(job: Job, base: Base, max_bytes: int) -> Done:
    try:
        checkpoint = read_checkpoint({role: Path(file) for role, file in job.files.items()})
        program = lower(checkpoint, base, max_bytes=max_bytes)
        method = method_of(checkpoint)
        facts = _facts(method, program, checkpoint)
        write_program(Path(job.program), program, program_id=job.program_id, facts=facts)
    except LoweringError as error:
        return Done(faults=list(error.faults))
    except MemoryError:
        return Done(faults=[Fault("program_too_large", "adapter", "lowering the adapter needs more memory than is allowed")])
    except (SafetensorError, ValueError, TypeError, RuntimeError, OSError, KeyError, ArithmeticError) as error:
        # A fault that no check foresaw: the adapter is refused, the service goes on, and the log has the details.
        print(f"lowerer: {type(error).__name__}: {error}", file=sys.stderr, flush=True)  # noqa: T201 - the child's log
        return Done(faults=[Fault("lowering_failed", "adapter", f"the adapter cannot be lowered ({type(error).__name__})")])
    return Done(facts=facts)


def _facts(method: Method, program: Program, checkpoint: Checkpoint) -> dict[str, Any]:
    """What users want to know of an adapter."""
    ranks = sorted(
        {
            edit.rank
            for edits in program.edits.values()
            for edit in edits
            if isinstance(edit, LinearEdit | BottleneckEdit) and edit.rank
        }
    )
    return {
        "method": method.name,
        "library": method.library,
        "rank": max(ranks, default=0),
        "ranks": ranks,
        "sites": len(program.edits),
        "modules": sorted({site.rpartition(".")[2] for site in program.edits}),
        "parameters": sum(tensor.numel() for part in _parts(checkpoint) for tensor in part.tensors.values()),
        "program_bytes": program.nbytes,
        "virtual_tokens": len(program.prologue),
    }


def _parts(checkpoint: Checkpoint) -> list[Checkpoint]:
    """The checkpoint itself, its head and its children."""
    return [checkpoint, *([checkpoint.head] if checkpoint.head else []), *checkpoint.children.values()]


if __name__ == "__main__":
    main()

"""The process group, sharding from outside the model, and sums over ranks.

torchrun is the only launcher and the group always exists, so nothing in this repository asks whether it does.
Started as plain `python train.py`, the program is a group of one. Threads per rank = cores / ranks:
oversubscription costs more than any other setting on a CPU.
"""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import os
import shutil
import signal
import sys
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any, NoReturn, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.utils.checkpoint import checkpoint

from thinkrl import UserError

CGROUP = Path("/sys/fs/cgroup")  # of the container that this process runs in, if it has one
M = TypeVar("M", bound=nn.Module)

AFTER_A_FAILED_WRITE = (
    "free space or make it writable; what was saved before is untouched, --resume auto continues from it"
)


@dataclass(frozen=True)
class World:
    rank: int
    size: int
    device: torch.device

    @property
    def main(self) -> bool:
        return self.rank == 0

    def share(self, count: int) -> range:
        return share(count, self.rank, self.size)


def share(count: int, rank: int, size: int) -> range:
    """A rank's contiguous block of `count` things. Earlier ranks take one more when it does not divide."""
    quotient, rest = divmod(count, size)
    start = rank * quotient + min(rank, rest)
    return range(start, start + quotient + (rank < rest))


def start(device: str = "auto") -> World:
    """Join the process group that torchrun describes in the environment: NCCL on CUDA, gloo on CPU."""
    _end_with_launcher()
    rank, size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    local_rank, local_size = int(os.environ.get("LOCAL_RANK", 0)), int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    if device == "cuda" and not torch.cuda.is_available():
        raise UserError(
            "--device cuda, but torch sees no CUDA device: use --device cpu, or install a CUDA build of torch"
        )
    cuda = device == "cuda" or (device == "auto" and torch.cuda.is_available())
    if cuda and local_size > torch.cuda.device_count():
        raise UserError(
            f"{local_size} ranks on this machine but {torch.cuda.device_count()} CUDA devices: "
            "lower --nproc_per_node, or use --device cpu"
        )
    chosen = torch.device("cuda", local_rank) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(chosen)
    else:
        torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // local_size))
    if not dist.is_initialized():
        backend = "cpu:gloo,cuda:nccl" if cuda else "gloo"
        place: dict[str, Any] = (
            {} if "MASTER_ADDR" in os.environ else {"store": dist.HashStore(), "rank": 0, "world_size": 1}
        )
        # Rollouts differ in length between ranks, so a peer may wait a long time before the next collective.
        dist.init_process_group(backend, timeout=timedelta(hours=2), **place)
    return World(rank, size, chosen)


def _end_with_launcher() -> None:
    """A worker of a torchrun that was killed ends with it, so that a resumed run has no worker of the old one beside it.
    Linux: the kernel sends SIGKILL. (One that torchrun has not seen this far finds its store gone, and fails.)
    """
    if "TORCHELASTIC_RUN_ID" in os.environ and sys.platform == "linux":
        set_parent_death_signal = 1  # PR_SET_PDEATHSIG of sys/prctl.h
        ctypes.CDLL(None).prctl(set_parent_death_signal, signal.SIGKILL)


def stop() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()


def run_and_exit(main: Callable[..., None], *arguments: Any) -> NoReturn:
    """Call an entry point and end the process with its exit status, without finalizing the interpreter.

    FSDP's caches keep the process group, and so gloo's threads, beyond `stop`. A thread that has yet to let
    go of the last collective's tensor needs the interpreter for it, and aborts the process if that is being
    taken apart: a finished run would exit with SIGABRT (one in seven on two busy cores).
    """
    status = 0
    try:
        main(*arguments)
    except SystemExit as stopped:  # by `options.exit_with_error`
        status = int(stopped.code or 0)
    except KeyboardInterrupt:  # before anything was begun that has to be finished
        status = 128 + signal.SIGINT
    atexit._run_exitfuncs()  # as multiprocessing ends its children: what others registered still runs
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def shard(
    model: M,
    world: World,
    dtype: torch.dtype,
    replicate: int = 1,
    activation_checkpointing: str = "none",
    compiled: bool = False,
) -> M:
    """FSDP2 applied from outside: each block is a unit; embedding, final norm and head are the root unit.

    The root is not resharded after its forward, so `model.head_weight` is whole when the loss needs it.
    Parameters and optimizer state stay fp32; `dtype` is what blocks compute in. `replicate` > 1 is HSDP.
    `activation_checkpointing`: see `checkpoint_block`. `compiled`: see `compile_block`.
    """
    if world.size % replicate:
        raise UserError(f"--replicate {replicate} does not divide the {world.size} ranks")
    mesh = (
        init_device_mesh(world.device.type, (world.size,))
        if replicate == 1
        else init_device_mesh(
            world.device.type, (replicate, world.size // replicate), mesh_dim_names=("replicate", "shard")
        )
    )
    fp32 = dtype == torch.float32
    policy = (
        MixedPrecisionPolicy()
        if fp32
        else MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32)
    )
    for block in model.get_submodule("blocks").children():
        checkpoint_block(block, activation_checkpointing)
        if compiled:
            compile_block(block)
        fully_shard(block, mesh=mesh, mp_policy=policy)
    fully_shard(model, mesh=mesh, mp_policy=policy, reshard_after_forward=False)
    return model


def whole(tensor: Tensor) -> Tensor:
    """A sharded tensor gathered from all ranks, which is collective; any other as it is."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def checkpoint_block(block: nn.Module, how: str) -> None:
    """Recompute in the backward pass what a block's forward would keep for it.

    none         nothing; so does auto, which train.py has replaced by then (`learner.fitted_to_memory`)
    selective    the MLP: only its input is kept, not gate, up and what is made of them
    full         all: only the block's input is kept

    The methods are replaced on the block itself, inside the sharded unit: a wrapper would rename the parameters.
    Nothing in a block is random, so no state of a random generator is kept.
    """
    name = {"none": "", "auto": "", "selective": "mlp", "full": "forward"}[how]
    if name:
        again = partial(checkpoint, getattr(block, name), use_reentrant=False, preserve_rng_state=False)
        setattr(block, name, again)


def compile_block(block: nn.Module) -> None:
    """Compile what a block computes before its attention and behind it; attention has kernels of its own.

    After `checkpoint_block` and before sharding: what is recomputed is compiled too, and gathering stays outside. The
    number of tokens is a symbol, and blocks of one shape share the result. A hook on a part of a compiled block is not
    called, so what looks inside a block takes the sampler's copy, which is not compiled.
    """
    for name in ("project", "finish"):
        setattr(block, name, torch.compile(getattr(block, name), dynamic=True, fullgraph=True))


def require_compiler(device: torch.device) -> None:
    """Raise UserError where torch.compile would not find the compiler that it needs for this device."""
    variable, usual = ("CXX", "g++") if device.type == "cpu" else ("CC", "gcc")
    compiler = os.environ.get(variable, usual)
    if shutil.which(compiler) is None:
        raise UserError(
            f"--compile needs a compiler, and there is no '{compiler}': install it, name another in {variable}, or leave "
            "out --compile"
        )


def free_memory(device: torch.device) -> int:
    """Bytes that this process can allocate. On CUDA the allocator's cache is emptied first: it keeps what a step has
    freed. On a CPU the ranks of a machine share its memory, of which cached files are free and a container's limit is
    the end.
    """
    if device.type == "cuda":
        torch.cuda.empty_cache()
        return torch.cuda.mem_get_info(device)[0]
    free = [os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")]
    with contextlib.suppress(OSError):
        lines = Path("/proc/meminfo").read_text().splitlines()
        free += [1024 * int(line.split()[1]) for line in lines if line.startswith("MemAvailable")]
    with contextlib.suppress(OSError, ValueError):  # ValueError: the limit is the word "max"
        limit, group = int((CGROUP / "memory.max").read_text()), (CGROUP / "memory.stat").read_text()
        free.append(limit - int(dict(line.split() for line in group.splitlines())["anon"]))
    return min(free) // int(os.environ.get("LOCAL_WORLD_SIZE", 1))


def global_sum(value: Tensor | float) -> Tensor:
    """Sum over all ranks, in fp64. Every rank must call it."""
    total = torch.as_tensor(value, dtype=torch.float64).detach().clone().cpu()
    dist.all_reduce(total)
    return total


def global_max(value: float) -> float:
    highest = torch.tensor(float(value), dtype=torch.float64)
    dist.all_reduce(highest, op=dist.ReduceOp.MAX)
    return float(highest)


def gather(value: Any) -> list[Any]:
    """Every rank's object, in rank order, on every rank."""
    parts: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(parts, value)
    return parts


def from_main(value: Any) -> Any:
    """Rank 0's object on every rank."""
    box = [value]
    dist.broadcast_object_list(box, src=0)
    return box[0]


def raise_on_all_ranks(error: str) -> None:
    """Raise on every rank if any rank has an error message: one rank's mistake stops all of them together."""
    sentences = [s for s in (gather(error) if dist.is_initialized() else [error]) if s]
    if sentences:
        raise UserError(sentences[0])


def together(function: Callable, *arguments: Any) -> Any:
    """The function's result, when every rank has its own. A UserError of one rank is raised on all: nobody
    waits for long.
    """
    result, error = None, ""
    try:
        result = function(*arguments)
    except UserError as mistake:
        error = str(mistake)
    raise_on_all_ranks(error)
    return result


def on_main(function: Callable, *arguments: Any) -> Any:
    """The function's result on rank 0, on every rank; its UserError too, and what it could not write. Collective, and so a
    barrier. Without a process group this process is rank 0.
    """

    def own() -> Any:
        try:
            return function(*arguments) if rank() == 0 else None
        except OSError as failed:
            where = f" of {failed.filename}" if failed.filename else ""
            raise UserError(
                f"writing{where} failed ({failed.strerror or failed}): {AFTER_A_FAILED_WRITE}"
            ) from None

    result = together(own)
    return from_main(result) if dist.is_initialized() else result


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0

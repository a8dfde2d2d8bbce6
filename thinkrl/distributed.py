"""Process group, sharding, and sums over ranks.

The process group always exists: plain `python train.py` is a group of one. A rank has cores / ranks threads,
because more threads than cores slow a CPU down.
"""

from __future__ import annotations

import atexit
import contextlib
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
from thinkrl.launcher import require_launcher

PATIENCE = timedelta(hours=2)  # rollouts differ in length, so a rank may wait long in the next collective
CGROUP = Path("/sys/fs/cgroup")  # of the container that this process runs in, if it has one
M = TypeVar("M", bound=nn.Module)

AFTER_A_FAILED_WRITE = (
    "free space or make it writable; what was saved before is untouched, --resume auto continues from it"
)


@dataclass(frozen=True)
class World:
    """Rank and size of the process group, and this process's device."""

    rank: int
    size: int
    device: torch.device

    @property
    def main(self) -> bool:
        return self.rank == 0

    def share(self, count: int) -> range:
        return share(count, self.rank, self.size)


def share(count: int, rank: int, size: int) -> range:
    """Range of a rank's contiguous block of `count` items. The first ranks have one more if it does not
    divide.
    """
    quotient, rest = divmod(count, size)
    start = rank * quotient + min(rank, rest)
    return range(start, start + quotient + (rank < rest))


def start(device: str = "auto") -> World:
    """Join the process group of torchrun's environment variables: NCCL on CUDA, gloo on CPU."""
    require_launcher()
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
        dist.init_process_group(backend, timeout=PATIENCE, **place)
    return World(rank, size, chosen)


def stop() -> None:
    """Leave the process group, if there is one."""
    if dist.is_initialized():
        dist.destroy_process_group()


def run_and_exit(main: Callable[..., None], *arguments: Any) -> NoReturn:
    """Call an entry point and end the process with its exit status, without finalizing the interpreter.

    FSDP's caches keep the process group, and so gloo's threads, alive after `stop`. A thread that still holds
    the last collective's tensor needs the interpreter to free it, and aborts the process if the interpreter
    is being finalized: one in seven finished runs exited with SIGABRT on two busy cores.
    """
    status = 0
    try:
        main(*arguments)
    except SystemExit as stopped:  # by `options.exit_with_error`
        status = int(stopped.code or 0)
    except KeyboardInterrupt:  # before any work that must be finished
        status = 128 + signal.SIGINT
    atexit._run_exitfuncs()  # as in multiprocessing's children: registered functions still run
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
    """Apply FSDP2: each block is a unit; embedding, final norm and head are the root unit.

    The root is not resharded after its forward, so the loss can read the whole `model.head_weight`.
    Parameters and optimizer state stay fp32; `dtype` is the compute dtype. `replicate` > 1 is HSDP.
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
    """Gather a sharded tensor from all ranks, which is collective; return any other unchanged."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def checkpoint_block(block: nn.Module, how: str) -> None:
    """Apply activation checkpointing to a block: recompute activations in the backward pass.

    none         nothing; also auto, which train.py has already replaced (`learner.fitted_to_memory`)
    selective    the MLP: only its input is kept
    full         the whole block: only its input is kept

    The block's methods are replaced, because a wrapper would rename the parameters. A block is deterministic,
    so no random generator's state is kept.
    """
    name = {"none": "", "auto": "", "selective": "mlp", "full": "forward"}[how]
    if name:
        again = partial(checkpoint, getattr(block, name), use_reentrant=False, preserve_rng_state=False)
        setattr(block, name, again)


def compile_block(block: nn.Module) -> None:
    """Compile the parts of a block before and after attention, which has its own kernels.

    Call it after `checkpoint_block` and before sharding, so that recomputation is compiled and gathering is
    not. The number of tokens is dynamic, and blocks of one shape share the result. Hooks inside a compiled
    block are not called, so code with hooks uses the sampler's copy, which is not compiled.
    """
    for name in ("project", "finish"):
        setattr(block, name, torch.compile(getattr(block, name), dynamic=True, fullgraph=True))


def require_compiler(device: torch.device) -> None:
    """Raise UserError if torch.compile would not find the compiler that it needs for this device."""
    variable, usual = ("CXX", "g++") if device.type == "cpu" else ("CC", "gcc")
    compiler = os.environ.get(variable, usual)
    if shutil.which(compiler) is None:
        raise UserError(
            f"--compile needs a compiler, and there is no '{compiler}': install it, name another in "
            f"{variable}, or leave out --compile"
        )


def free_memory(device: torch.device) -> int:
    """Bytes that this process can allocate. On CUDA the allocator's cache is emptied first.

    On a CPU the ranks of a machine share its memory, cached files included, up to a container's limit.
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
    """Largest value over all ranks. Collective."""
    highest = torch.tensor(float(value), dtype=torch.float64)
    dist.all_reduce(highest, op=dist.ReduceOp.MAX)
    return float(highest)


def background_group() -> dist.ProcessGroup:
    """Make a group of all ranks for the collectives of a second thread, on the CPU. Collective."""
    return dist.new_group(backend="gloo", timeout=PATIENCE)


def gather(value: Any, group: dist.ProcessGroup | None = None) -> list[Any]:
    """Gather every rank's object, in rank order, on every rank."""
    parts: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(parts, value, group=group)
    return parts


def from_main(value: Any, group: dist.ProcessGroup | None = None) -> Any:
    """Broadcast rank 0's object to every rank."""
    box = [value]
    dist.broadcast_object_list(box, src=0, group=group)
    return box[0]


def raise_on_all_ranks(error: str, group: dist.ProcessGroup | None = None) -> None:
    """Raise UserError on every rank if any rank has an error message. Collective."""
    sentences = [s for s in (gather(error, group) if dist.is_initialized() else [error]) if s]
    if sentences:
        raise UserError(sentences[0])


def together(function: Callable, *arguments: Any, group: dist.ProcessGroup | None = None) -> Any:
    """Call a function on every rank; return the own result, or raise any rank's UserError. Collective."""
    result, error = None, ""
    try:
        result = function(*arguments)
    except UserError as mistake:
        error = str(mistake)
    raise_on_all_ranks(error, group)
    return result


def on_main(function: Callable, *arguments: Any, group: dist.ProcessGroup | None = None) -> Any:
    """Call a function on rank 0 and return its result on every rank. Collective, and so a barrier.

    Its UserError, and an OSError of writing, are raised on every rank. Without a process group this is rank
    0. group: of `background_group`, in its thread.
    """

    def own() -> Any:
        try:
            return function(*arguments) if rank() == 0 else None
        except OSError as failed:
            where = f" of {failed.filename}" if failed.filename else ""
            raise UserError(
                f"writing{where} failed ({failed.strerror or failed}): {AFTER_A_FAILED_WRITE}"
            ) from None

    result = together(own, group=group)
    return from_main(result, group) if dist.is_initialized() else result


def rank() -> int:
    """Rank of this process; 0 without a process group."""
    return dist.get_rank() if dist.is_initialized() else 0

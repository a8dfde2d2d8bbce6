"""Checkpoints of a run: weights, optimizer states and other state after a step.

    runs/NAME/checkpoints/step_N/   dcp/: parameters and optimizer states as safetensors, each rank its shards
                                    (torch.distributed.checkpoint, so another number of ranks can read them)
                                    extra.pt: other state, from rank 0, read with weights_only
                                    files.json: the size of each of these files
    runs/NAME/latest                "step_N"

Reading runs no code from a file. torch's reader of sharded checkpoints would unpickle its index, `.metadata`,
and every value that is not a tensor. Here the index is the JSON header of the safetensors files, and dcp/ has
tensors only. extra.pt is read by torch's restricted unpickler, which only builds tensors and plain
containers.

`begin_step` copies the state to host memory. `save_step` writes the copy while the run goes on, under a
temporary name, then renames it; `point_latest` updates `latest`, then removes older checkpoints. A resume
skips a checkpoint with files of the wrong size or that cannot be read, and takes the one before it.
"""

from __future__ import annotations

import io
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict import (
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.optim import Optimizer

from thinkrl import UserError
from thinkrl.checkpoint import make_temporary, moved_at_the_end, temporary
from thinkrl.distributed import gather, on_main
from thinkrl.run.files import read_json, write_json


@dataclass(frozen=True)
class Snapshot:
    """State of a run after a step, copied to host memory: it is written while the run goes on."""

    path: Path  # of the checkpoint
    tensors: dict[str, Any]  # this rank's shards of parameters and optimizer states
    extra: bytes  # the content of extra.pt
    writer: HuggingFaceStorageWriter


def begin_step(
    run_dir: str | Path,
    step: int,
    modules: dict[str, nn.Module],
    optimizers: dict[str, Optimizer],
    extra: dict,
) -> Snapshot:
    """Copy what checkpoints/step_N will hold, and make its temporary folder. Collective.

    Other files of the checkpoint may be written to that folder before `save_step`. Raises UserError if the
    folder cannot be made.

    extra  nested dicts and lists of tensors, numbers and strings, such as a preset's state; rank 0's is
           saved, so it must be the same on all ranks
    """
    path = _folder(Path(run_dir), step)
    make_temporary(path)
    # reading the state of an optimizer without steps makes torch take one
    stepped = {name: optimizer for name, optimizer in optimizers.items() if optimizer.state}
    tensors, states = _state(modules, stepped)
    groups = {name: state["param_groups"] for name, state in states.items()}
    written = io.BytesIO()
    torch.save({"extra": extra, "param_groups": groups}, written)
    writer = HuggingFaceStorageWriter(str(temporary(path) / "dcp"), save_distributed=True)
    return Snapshot(path, writer.stage(tensors), written.getvalue(), writer)


def save_step(snapshot: Snapshot, group: dist.ProcessGroup | None = None) -> None:
    """Write a checkpoint, in any thread. Collective in the group. Raises UserError if it fails."""
    shards = temporary(snapshot.path) / "dcp"
    with moved_at_the_end(snapshot.path, group) as folder:
        dcp.save(snapshot.tensors, storage_writer=snapshot.writer, process_group=group)
        # each rank reports its own files: another machine may not see them immediately
        own = shards.glob(f"shard-{dist.get_rank() + 1:05}-*")
        files = {f"dcp/{file.name}": file.stat().st_size for file in own}
        files = {name: size for part in gather(files, group) for name, size in part.items()}
        if folder:
            (folder / "extra.pt").write_bytes(snapshot.extra)
            write_json(folder / "files.json", {**files, "extra.pt": len(snapshot.extra)})


def point_latest(
    run_dir: str | Path, step: int, keep: int = 2, group: dist.ProcessGroup | None = None
) -> None:
    """Set `latest` to checkpoints/step_N, and remove all but the newest `keep` checkpoints. Collective in the
    group.
    """
    run_dir = Path(run_dir)

    def point() -> None:
        latest = run_dir / "latest"
        temporary(latest).write_text(f"step_{step}\n")
        os.replace(temporary(latest), latest)
        for old in _saved(run_dir)[:-keep]:
            if old != step:
                shutil.rmtree(_folder(run_dir, old))

    on_main(point, group=group)


def load_latest(
    run_dir: str | Path, modules: dict[str, nn.Module], optimizers: dict[str, Optimizer]
) -> tuple[int, dict]:
    """Restore the newest usable checkpoint: its (step, extra), or (0, {}) if there is none. Collective.

    Damaged ones are skipped, and renamed to step_N.damaged. Raises UserError if all are damaged.
    """
    run_dir, reason = Path(run_dir), ""
    newest = on_main(_latest, run_dir)
    if newest is None:
        return 0, {}
    for step in [step for step in reversed(on_main(_saved, run_dir)) if step <= newest]:
        try:
            extra = load_step(_folder(run_dir, step), modules, optimizers)
        except UserError as mistake:
            reason = str(mistake)
            continue
        if reason:
            on_main(_pass_over, run_dir, step, newest, reason)
        return step, extra
    reason = (
        reason or f"{run_dir / 'latest'} says step_{newest}, but there is no such folder and none before it"
    )
    raise UserError(f"no checkpoint of {run_dir} is usable: {reason}; start a new run with another --name")


def load_step(path: str | Path, modules: dict[str, nn.Module], optimizers: dict[str, Optimizer]) -> dict:
    """Restore modules and optimizers in place, bit for bit, from a checkpoint; returns `extra`. Collective.

    The number of ranks may differ from that at saving. Raises UserError if the folder is incomplete or does
    not fit these modules and optimizers.
    """
    path = Path(path)
    saved = on_main(_read_extra, path)
    for name in optimizers.keys() - set(saved["param_groups"]):
        optimizers[name].state.clear()
    optimizers = {name: optimizers[name] for name in saved["param_groups"] if name in optimizers}
    tensors, states = _state(modules, optimizers)
    try:
        dcp.load(tensors, storage_reader=HuggingFaceStorageReader(str(path / "dcp")))
    except CheckpointException as error:
        rank, (cause, _) = min(error.failures.items())
        raise UserError(
            f"{path}: does not fit this model and optimizer, or is damaged (rank {rank}: {cause})"
        ) from None
    for name, module in modules.items():
        prefix = f"modules/{name}/"
        own = {key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)}
        set_model_state_dict(module, own)
    for name, optimizer in optimizers.items():
        state = {"state": states[name]["state"], "param_groups": saved["param_groups"][name]}
        set_optimizer_state_dict(modules[name], optimizer, state)
    return saved["extra"]


def _read_extra(path: Path) -> dict:
    """Read extra.pt, after checking the sizes of all files of the checkpoint. Raises UserError."""
    if not (path / "files.json").exists():
        raise UserError(f"{path / 'files.json'}: file not found, so {path} is not a complete checkpoint")
    for name, size in read_json(path / "files.json").items():
        found = (path / name).stat().st_size if (path / name).exists() else None
        if found != size:
            what = "file not found" if found is None else f"{found} bytes, of {size} that were written"
            raise UserError(f"{path / name}: {what}, so {path} is not a complete checkpoint")
    try:
        return torch.load(path / "extra.pt", map_location="cpu", weights_only=True)
    except Exception as error:  # the reader may raise anything for a damaged archive
        first = str(error).partition("\n")[0]
        raise UserError(
            f"{path / 'extra.pt'}: damaged, or holds more than tensors and numbers ({first})"
        ) from None


def _pass_over(run_dir: Path, step: int, newest: int, reason: str) -> None:
    """Print why newer checkpoints than step N are skipped, and rename them."""
    print(f"{reason}: skipped, the previous checkpoint is used")
    for damaged in _saved(run_dir):
        if step < damaged <= newest:
            target = run_dir / "checkpoints" / f"step_{damaged}.damaged"
            shutil.rmtree(target, ignore_errors=True)
            _folder(run_dir, damaged).rename(target)


def _latest(run_dir: Path) -> int | None:
    """Step that `latest` names, None before the first checkpoint."""
    latest = run_dir / "latest"
    if not latest.exists():
        return None
    name = latest.read_text().strip()
    if not name.removeprefix("step_").isdigit():
        raise UserError(f"{latest}: it says {name!r}, not step_N")
    return int(name.removeprefix("step_"))


def _saved(run_dir: Path) -> list[int]:
    """Steps of the checkpoints, ascending."""
    return sorted(int(entry.name.removeprefix("step_")) for entry in run_dir.glob("checkpoints/step_*[0-9]"))


def _folder(run_dir: Path, step: int) -> Path:
    return run_dir / "checkpoints" / f"step_{step}"


def _state(
    modules: dict[str, nn.Module], optimizers: dict[str, Optimizer]
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Sharded tensors to save or to fill, by names without wrappers, and the optimizers' state dicts.

    The state dicts refer to the same tensors. An optimizer has its module's name.
    """
    states: dict[str, Any] = {
        name: get_optimizer_state_dict(modules[name], x) for name, x in optimizers.items()
    }
    tensors: dict[str, Any] = {
        f"modules/{name}/{key}": value
        for name, module in modules.items()
        for key, value in get_model_state_dict(module).items()
    }
    for name, state in states.items():
        for parameter, values in state["state"].items():
            tensors |= {f"optimizers/{name}/{parameter}/{key}": value for key, value in values.items()}
    return tensors, states

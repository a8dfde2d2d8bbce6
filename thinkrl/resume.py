"""What a run resumes from: weights, optimizer states and everything else after a step.

    runs/NAME/checkpoints/step_N/   dcp/: parameters and optimizer states as safetensors, each rank its shards
                                    (torch.distributed.checkpoint, so another number of ranks can read them)
                                    extra.pt: everything else, from rank 0, read with weights_only
                                    files.json: the size of each of these files
    runs/NAME/latest                "step_N"

No file is unpickled: torch's own reader of sharded checkpoints would unpickle its index, `.metadata`, and every value
that is not a tensor. Here the index is the JSON header of the safetensors files, and dcp/ holds tensors only.
extra.pt is read by torch's restricted unpickler, which builds tensors and plain containers and calls nothing else.

A checkpoint appears by a rename, whole or not at all; `latest` moves last, and only then older ones go. What does not
have its size, or cannot be read, is passed over at a resume: the checkpoint before it is taken.
"""

from __future__ import annotations

import io
import os
import shutil
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
from thinkrl.checkpoint import atomic_dir, temporary
from thinkrl.distributed import gather, on_main
from thinkrl.run.files import read_json, write_json


def save_step(
    run_dir: str | Path,
    step: int,
    modules: dict[str, nn.Module],
    optimizers: dict[str, Optimizer],
    extra: dict,
) -> Path:
    """Write checkpoints/step_N, which is returned. Every rank must call it. Raises UserError where it cannot be written.

    extra  nested dicts and lists of tensors, numbers and strings: data cursor, random states, what a preset carries along;
           rank 0's is the one that is saved, so it must not differ between ranks
    """
    path = Path(run_dir) / "checkpoints" / f"step_{step}"
    # asking an optimizer that has not stepped for its state makes it take a step of its own
    stepped = {name: optimizer for name, optimizer in optimizers.items() if optimizer.state}
    with atomic_dir(path) as folder:
        tensors, states = _state(modules, stepped)
        shards = temporary(path) / "dcp"
        dcp.save(tensors, storage_writer=HuggingFaceStorageWriter(str(shards), save_distributed=True))
        # each rank speaks of its own files: another machine may not see them at once
        own = shards.glob(f"shard-{dist.get_rank() + 1:05}-*")
        files = {f"dcp/{file.name}": file.stat().st_size for file in own}
        files = {name: size for part in gather(files) for name, size in part.items()}
        if folder:
            groups = {name: state["param_groups"] for name, state in states.items()}
            written = io.BytesIO()
            torch.save({"extra": extra, "param_groups": groups}, written)
            (folder / "extra.pt").write_bytes(written.getbuffer())
            write_json(folder / "files.json", {**files, "extra.pt": written.getbuffer().nbytes})
    return path


def point_latest(run_dir: str | Path, step: int, keep: int = 2) -> None:
    """Name checkpoints/step_N the one to resume from, and remove all but the newest `keep`. Every rank
    must call it.
    """
    run_dir = Path(run_dir)

    def point() -> None:
        latest = run_dir / "latest"
        temporary(latest).write_text(f"step_{step}\n")
        os.replace(temporary(latest), latest)
        for old in _saved(run_dir)[:-keep]:
            if old != step:
                shutil.rmtree(_folder(run_dir, old))

    on_main(point)


def load_latest(
    run_dir: str | Path, modules: dict[str, nn.Module], optimizers: dict[str, Optimizer]
) -> tuple[int, dict]:
    """Restore the newest usable checkpoint, as `load_step` does: its step and its `extra`; (0, {}) for a run that has
    none yet. Every rank must call it.

    A damaged one is passed over, and renamed to step_N.damaged. Raises UserError if all are.
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
    """Restore modules and optimizers in place from a checkpoints/step_N folder, bit for bit; returns `extra`.

    Every rank must call it; the number of ranks may differ from the one that saved.
    Raises UserError where the folder is incomplete or holds something else than these modules and optimizers.
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
    """Content of extra.pt, if all files of the checkpoint have their sizes. Raises UserError."""
    if not (path / "files.json").exists():
        raise UserError(f"{path / 'files.json'}: file not found, so {path} is not a complete checkpoint")
    for name, size in read_json(path / "files.json").items():
        found = (path / name).stat().st_size if (path / name).exists() else None
        if found != size:
            what = "file not found" if found is None else f"{found} bytes, of {size} that were written"
            raise UserError(f"{path / name}: {what}, so {path} is not a complete checkpoint")
    try:
        return torch.load(path / "extra.pt", map_location="cpu", weights_only=True)
    except Exception as error:  # whatever a damaged archive does to its reader, it is not usable
        first = str(error).partition("\n")[0]
        raise UserError(
            f"{path / 'extra.pt'}: damaged, or holds more than tensors and numbers ({first})"
        ) from None


def _pass_over(run_dir: Path, step: int, newest: int, reason: str) -> None:
    """Say that a resume takes step N although there were newer ones, and put these out of the way."""
    print(f"{reason}: passed over, the checkpoint before it is taken")
    for damaged in _saved(run_dir):
        if step < damaged <= newest:
            target = run_dir / "checkpoints" / f"step_{damaged}.damaged"
            shutil.rmtree(target, ignore_errors=True)
            _folder(run_dir, damaged).rename(target)


def _latest(run_dir: Path) -> int | None:
    """The step that `latest` names, None before the first checkpoint."""
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
    """Every tensor to save or to fill, sharded, under a name that does not depend on how a module was wrapped; and the
    optimizers' state dicts, whose tensors these are. An optimizer has its module's name.
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

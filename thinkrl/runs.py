"""The run folder, runs/<name>/:

    config.json         every option, resolved              metrics.jsonl        a line per optimizer step
    environment.json    what each start ran on              samples.jsonl        training completions, token by token
    summary.json        held-out evaluations by name        evaluations.jsonl    the completions of these evaluations
    report.html         all of it as a page                 checkpoints/, latest; at the end hf/, the policy

A name is used once. `--resume auto` continues the unfinished run of the same configuration, from its `latest`
checkpoint, and refuses anything else; `--resume PATH` names the folder. Files are written under a temporary
name, then renamed.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import json
import os
import platform
import shlex
import sys
import time
from collections.abc import Set
from dataclasses import dataclass
from pathlib import Path

import torch

from thinkrl import UserError, __version__
from thinkrl.config import Config, as_dict
from thinkrl.distributed import World, from_main, raise_on_all_ranks
from thinkrl.files import write_json

ROOT = Path(__file__).resolve().parent.parent  # where train.py lies
FREE_TO_CHANGE = {
    "resume",
    "name",
    "runs_dir",
    "device",
    "report_every",
    "wandb",
    "wandb_project",
    "tensorboard",
    "keep_checkpoints",
    "keep_optimizer",
    "save_dtype",
    "push_to_hub",
}
BY_MEMORY = {"activation_checkpointing", "micro_batch_tokens"}  # chosen by the first start, unless given


@dataclass(frozen=True)
class Run:
    folder: Path
    resumed: bool
    config: Config  # as it was trained with: `steps` is known

    @property
    def summary(self) -> dict:
        path = self.folder / "summary.json"
        return json.loads(path.read_text()) if path.exists() else {}

    def update_summary(self, **values) -> None:
        """Rank 0 only."""
        write_json(self.folder / "summary.json", self.summary | values)


def open_run(config: Config, world: World) -> Run:
    """Make the folder or find the one to continue. Raises UserError on every rank alike."""
    folder, resumed, error = None, False, ""
    if world.main:
        try:
            folder, resumed = _choose(config)
            if not resumed:
                _create(folder, config)
        except UserError as mistake:
            error = str(mistake)
    raise_on_all_ranks(error)
    folder, resumed = from_main((folder, resumed))
    return Run(folder, resumed, config)


def begun_with(config: Config, world: World) -> dict:
    """The config.json of the run that `open_run` will continue, {} for a new one; what a first start chooses by the
    free memory is not compared, unless it was given. The same on every rank; raises UserError on every rank alike.
    """
    saved, error = {}, ""
    if world.main:
        try:
            chosen = {key for key in BY_MEMORY if key not in config.given or config[key] == "auto"}
            folder, resumed = _choose(config, chosen)
            saved = json.loads((folder / "config.json").read_text()) if resumed else {}
        except UserError as mistake:
            error = str(mistake)
    raise_on_all_ranks(error)
    return from_main(saved)


def record_launch(folder: Path, step: int, world: World) -> None:
    """Add this start of a run, which goes on after `step` steps, to its environment.json: command line, hardware
    and versions.
    """
    path = folder / "environment.json"
    launches = json.loads(path.read_text()) if path.exists() else []
    device = f"{os.cpu_count()} CPU cores, {platform.machine()}"
    if world.device.type == "cuda":
        device = f"{torch.cuda.get_device_name(world.device)}, CUDA {torch.version.cuda}"
    versions = {"thinkrl": __version__, "python": platform.python_version(), "torch": torch.__version__}
    for package in ("triton", "tokenizers", "safetensors"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[package] = importlib.metadata.version(package)
    launch = {
        "started": time.strftime("%Y-%m-%d %H:%M:%S %z"),
        "step": step,
        "command": shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]]),
        "hardware": f"{world.size} {'rank' if world.size == 1 else 'ranks'}, rank 0 on {device}",
        "versions": versions,
    }
    write_json(path, [*launches, launch])


def torchrun(ranks: int, *arguments: str) -> list[str]:
    """The command that launches a program on so many processes of this machine; to be run in ROOT."""
    return [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        f"--nproc_per_node={ranks}",
        *arguments,
    ]


def open_out(folder: Path, settings: dict) -> None:
    """Make the folder that --out names, or find it begun with these settings: its config.json, which the caller writes.

    Raises UserError if they are others, or if there can be no such folder.
    """
    with contextlib.suppress(OSError):
        folder.mkdir(parents=True, exist_ok=True)
    if not (folder.is_dir() and os.access(folder, os.W_OK)):
        raise UserError(f"--out {folder} is not a folder that can be written: choose another --out")
    path = folder / "config.json"
    saved = json.loads(path.read_text()) if path.exists() else settings
    if others := differing(saved, settings):
        raise UserError(
            f"--out {folder} was begun with {'; '.join(others)}: give the same, or choose another --out"
        )


def differing(saved: dict, now: dict) -> list[str]:
    """'lr 0.1, now 0.2' for each of these values that is not as saved."""
    return [
        f"{key} {saved.get(key)!r}, now {value!r}" for key, value in now.items() if saved.get(key) != value
    ]


def _choose(config: Config, ignored: Set[str] = frozenset()) -> tuple[Path, bool]:
    root = Path(config.runs_dir)
    if config.resume not in ("auto", "never"):
        return _unfinished(Path(config.resume), config, ignored), True
    if config.name:
        folder = root / config.name
        if not folder.exists():
            return folder, False
        if config.resume == "never":
            raise UserError(
                f"the run {folder} exists: continue it with --resume auto, or choose another --name"
            )
        return _unfinished(folder, config, ignored), True
    if config.resume == "auto":
        saved = [
            path
            for path in root.glob("*/config.json")
            if not _differing(path.parent, config, ignored) and not finished(path.parent)
        ]
        if saved:
            return max(saved, key=lambda path: path.stat().st_mtime).parent, True
    stem = f"{config.preset}-{time.strftime('%Y%m%d-%H%M%S')}"
    names = [stem] + [f"{stem}-{i}" for i in range(2, 1000)]
    return next(root / name for name in names if not (root / name).exists()), False


def _unfinished(folder: Path, config: Config, ignored: Set[str]) -> Path:
    if not (folder / "config.json").exists():
        raise UserError(f"--resume: {folder} is not a run folder, it has no config.json")
    differing = _differing(folder, config, ignored)
    if differing:
        raise UserError(
            f"--resume: {folder} was started with other options: {'; '.join(differing)}; give the same options, "
            "or start a new run with another --name"
        )
    if finished(folder):
        raise UserError(f"--resume: {folder} is finished; choose another --name for a new run")
    return folder


def finished(folder: Path) -> bool:
    """Whether a run came to its end."""
    path = folder / "summary.json"
    return path.exists() and "after" in json.loads(path.read_text())


def _differing(folder: Path, config: Config, ignored: Set[str]) -> list[str]:
    """Result of `differing` for the options that decide the result."""
    decisive = {key: value for key, value in as_dict(config).items() if key not in FREE_TO_CHANGE | ignored}
    return differing(json.loads((folder / "config.json").read_text()), decisive)


def _create(folder: Path, config: Config) -> None:
    try:
        folder.mkdir(parents=True)
        write_json(folder / "config.json", as_dict(config))
    except OSError as error:
        raise UserError(
            f"cannot write the run folder {folder} ({error.strerror}): choose another --runs_dir"
        ) from None

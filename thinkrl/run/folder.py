"""The run folder, runs/<name>/:

    config.json         every option, resolved              metrics.jsonl        a line per optimizer step
    environment.json    what each start ran on              samples.jsonl        training completions, token by token
    summary.json        held-out evaluations by name        evaluations.jsonl    the completions of these evaluations
    report.html         all of it as a page                 checkpoints/, latest; at the end hf/, the policy

A name is used once. `--resume auto` continues the unfinished run of the same configuration, from its `latest`
checkpoint, and refuses anything else; `--resume PATH` names the folder. Files are written under a temporary
name, then renamed. A folder has one writer at a time (lock.py beside this).
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import json
import os
import platform
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Set
from dataclasses import dataclass
from pathlib import Path

import torch

from thinkrl import UserError, __version__
from thinkrl.config import Config, as_dict
from thinkrl.distributed import World, on_main
from thinkrl.run.files import write_json
from thinkrl.run.lock import hold
from thinkrl.run.signals import ASKING, Stopped

ROOT = Path(__file__).resolve().parents[2]  # where train.py lies
FREE_TO_CHANGE = {
    "resume",
    "name",
    "runs_dir",
    "device",
    "report_every",
    "strict",
    "wandb",
    "wandb_project",
    "tensorboard",
    "save_minutes",
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
    """Make the folder or find the one to continue, and hold it: another start is refused while this one lives.
    Collective. Raises UserError on every rank alike.
    """
    folder = on_main(_place, config)
    hold(folder, world)
    return Run(folder, on_main(_begin, folder, config), config)


def begun_with(config: Config, world: World) -> dict:
    """The config.json of the run that `open_run` will continue, {} for a new one; what a first start chooses by the
    free memory is not compared, unless it was given. The same on every rank; raises UserError on every rank alike.
    """
    chosen = {key for key in BY_MEMORY if key not in config.given or config[key] == "auto"}

    def read() -> dict:
        folder = _place(config, chosen)
        if folder.is_dir() and _continues(folder, config, chosen):
            return json.loads((folder / "config.json").read_text())
        return {}

    return on_main(read)


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


def launch(command: list[str]) -> int:
    """Run what `torchrun` returned to its end. Returns its exit status.

    SIGTERM and SIGINT are passed on to it; once it has ended, they raise Stopped here.
    """
    received = []
    child = subprocess.Popen(command, cwd=ROOT, start_new_session=True)  # a terminal's Ctrl-C reaches it once

    def pass_on(number: int, frame) -> None:
        received.append(number)
        child.send_signal(number)

    before = {number: signal.signal(number, pass_on) for number in ASKING}
    try:
        status = child.wait()
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    if received:
        raise Stopped("stopped: the same command continues from here")
    return status


def open_out(folder: Path, settings: dict) -> None:
    """Check that the folder that --out names, which the caller holds, is new or was begun with these settings: they
    are in its config.json, which the caller writes. Raises UserError if they are others.
    """
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


def _place(config: Config, ignored: Set[str] = frozenset()) -> Path:
    """The folder that these options ask for, which need not exist."""
    root = Path(config.runs_dir)
    if config.resume not in ("auto", "never"):
        if not (folder := Path(config.resume)).is_dir():
            raise UserError(f"--resume: there is no folder {folder}")
        return _unfinished(folder, config, ignored)
    if config.name:
        return root / config.name
    if config.resume == "auto":
        saved = [
            path
            for path in root.glob("*/config.json")
            if not _differing(path.parent, config, ignored) and not finished(path.parent)
        ]
        if saved:
            return max(saved, key=lambda path: path.stat().st_mtime).parent
    stem = f"{config.preset}-{time.strftime('%Y%m%d-%H%M%S')}"
    names = [stem] + [f"{stem}-{i}" for i in range(2, 1000)]
    return next(root / name for name in names if not (root / name).exists())


def _begin(folder: Path, config: Config) -> bool:
    """`_continues` of the folder, which nobody else writes now; a new run gets its config.json."""
    resumed = _continues(folder, config)
    if not resumed:
        write_json(folder / "config.json", as_dict(config))
    return resumed


def _continues(folder: Path, config: Config, ignored: Set[str] = frozenset()) -> bool:
    """Whether the folder has a run to continue. Raises UserError if that is not wanted, or it has something else."""
    if all(path.name in (".lock", "config.json.tmp") for path in folder.iterdir()):
        return False
    if config.resume == "never":
        raise UserError(f"the run {folder} exists: continue it with --resume auto, or choose another --name")
    _unfinished(folder, config, ignored)
    return True


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

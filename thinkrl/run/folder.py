"""The run folder, runs/<name>/, which holds

    config.json         every option, resolved
    environment.json    command, hardware and versions of each start
    metrics.jsonl       a line per optimizer step
    samples.jsonl       training completions, token by token
    evaluations.jsonl   completions of the held-out evaluations
    summary.json        results of the held-out evaluations, by name
    report.html         a page that shows all of it
    nonfinite/          a step that was not finite, to be computed again (batch.py)
    checkpoints/, latest; at the end hf/, the trained policy

A name is used once. `--resume auto` continues the unfinished run with the same options, from its `latest`
checkpoint, and refuses any other; `--resume PATH` names the folder. Files are written under a temporary name,
then renamed. Only one run at a time can write to a folder (lock.py).
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

ROOT = Path(__file__).resolve().parents[2]  # folder of train.py
FREE_TO_CHANGE = {
    "resume",
    "name",
    "runs_dir",
    "device",
    "report_every",
    "strict",
    "timeout",
    "wandb",
    "wandb_project",
    "tensorboard",
    "save_minutes",
    "keep_checkpoints",
    "keep_optimizer",
    "save_dtype",
    "push_to_hub",
}
BY_MEMORY = {"activation_checkpointing", "micro_batch_tokens"}  # set by the first start unless given


@dataclass(frozen=True)
class Run:
    """Run folder of this process, new or resumed."""

    folder: Path
    resumed: bool
    config: Config  # resolved, with `steps` known

    @property
    def summary(self) -> dict:
        path = self.folder / "summary.json"
        return json.loads(path.read_text()) if path.exists() else {}

    def update_summary(self, **values) -> None:
        """Add values to summary.json. Rank 0 only."""
        write_json(self.folder / "summary.json", self.summary | values)


def open_run(config: Config, world: World) -> Run:
    """Make the run's folder, or find the one to continue, and lock it for this run. Collective.

    Raises UserError on every rank.
    """
    folder = on_main(_place, config)
    hold(folder, world)
    return Run(folder, on_main(_begin, folder, config), config)


def begun_with(config: Config, world: World) -> dict:
    """Read config.json of the run that `open_run` will continue, the same on every rank; {} for a new run.

    Options that a first start sets by the free memory are compared only if given. Raises UserError on every
    rank.
    """
    chosen = {key for key in BY_MEMORY if key not in config.given or config[key] == "auto"}

    def read() -> dict:
        folder = _place(config, chosen)
        if folder.is_dir() and _continues(folder, config, chosen):
            return json.loads((folder / "config.json").read_text())
        return {}

    return on_main(read)


def record_launch(folder: Path, step: int, world: World) -> None:
    """Add this start, after `step` steps, to environment.json: command line, hardware and versions."""
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
    """Command that launches a program on `ranks` processes of this machine; run it in ROOT."""
    return [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        f"--nproc_per_node={ranks}",
        *arguments,
    ]


def launch(command: list[str]) -> int:
    """Run a command of `torchrun` to its end and return its exit status.

    SIGTERM and SIGINT are forwarded to it; after it has ended, Stopped is raised.
    """
    received = []
    child = subprocess.Popen(command, cwd=ROOT, start_new_session=True)  # so that it gets Ctrl-C once

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
    """Raise UserError if the locked folder of --out has a config.json with other settings than these."""
    path = folder / "config.json"
    saved = json.loads(path.read_text()) if path.exists() else settings
    if others := differing(saved, settings):
        raise UserError(
            f"--out {folder} was begun with {'; '.join(others)}: give the same, or choose another --out"
        )


def differing(saved: dict, now: dict) -> list[str]:
    """Describe each of these values that differs from the saved one: 'lr 0.1, now 0.2'."""
    return [
        f"{key} {saved.get(key)!r}, now {value!r}" for key, value in now.items() if saved.get(key) != value
    ]


def _place(config: Config, ignored: Set[str] = frozenset()) -> Path:
    """Folder for these options; it may not exist yet."""
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
    """As `_continues`, for a locked folder; writes config.json of a new run."""
    resumed = _continues(folder, config)
    if not resumed:
        write_json(folder / "config.json", as_dict(config))
    return resumed


def _continues(folder: Path, config: Config, ignored: Set[str] = frozenset()) -> bool:
    """Whether the folder has a run to continue. Raises UserError if it must not be continued."""
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
            f"--resume: {folder} was started with other options: {'; '.join(differing)}; give the same "
            "options, or start a new run with another --name"
        )
    if finished(folder):
        raise UserError(f"--resume: {folder} is finished; choose another --name for a new run")
    return folder


def finished(folder: Path) -> bool:
    """Whether a run is finished."""
    path = folder / "summary.json"
    return path.exists() and "after" in json.loads(path.read_text())


def _differing(folder: Path, config: Config, ignored: Set[str]) -> list[str]:
    """Apply `differing` to the options that affect the result."""
    decisive = {key: value for key, value in as_dict(config).items() if key not in FREE_TO_CHANGE | ignored}
    return differing(json.loads((folder / "config.json").read_text()), decisive)

"""Read folders of training runs and of chunk.py for a report; they may still be written to.

samples.jsonl can be larger than memory, so it is indexed by step, and only rows that are shown are parsed.
"""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from thinkrl import UserError
from thinkrl.learner import model_path
from thinkrl.run.files import read_lines
from thinkrl.tokenizer import Tokenizer


@dataclass(frozen=True)
class TrainingRun:
    path: Path
    name: str
    config: dict
    metrics: list[dict]  # one row per optimizer step
    summary: dict  # name of an evaluation -> its result
    launches: list[dict]  # environment.json: command line, versions and hardware of every start

    @property
    def steps(self) -> int:
        """Number of optimizer steps so far."""
        return int(self.metrics[-1]["step"]) if self.metrics else 0

    @property
    def seconds(self) -> float:
        """Wall-clock seconds of all steps."""
        return sum(row.get("seconds", 0) for row in self.metrics)

    @property
    def finished(self) -> bool:
        return "after" in self.summary

    @functools.cached_property
    def evaluations(self) -> list[tuple[str, dict]]:
        """Held-out evaluations (name, result), in the order of their steps."""
        held_out = [(name, r) for name, r in self.summary.items() if isinstance(r, dict) and "accuracy" in r]
        last = {"before": -1, "after": 1}  # of two at one step
        return sorted(held_out, key=lambda pair: (pair[1].get("step", 0), last.get(pair[0], 0)))

    @functools.cached_property
    def before(self) -> dict:
        return self.summary.get("before") or {}

    @functools.cached_property
    def after(self) -> dict:
        """Newest evaluation except `before`; the last one if the run is finished."""
        later = [result for name, result in self.evaluations if name != "before"]
        return later[-1] if later else {}

    @functools.cached_property
    def logged_steps(self) -> dict[int, list[tuple[int, int]]]:
        """Map step -> [(offset, length)] in bytes of its rows in samples.jsonl, in the order of steps."""
        found: dict[int, list[tuple[int, int]]] = {}
        path, offset = self.path / "samples.jsonl", 0
        if path.exists():
            with path.open("rb") as file:
                for line in file:
                    if line.endswith(b"\n"):  # else it is still being written
                        found.setdefault(_step(line), []).append((offset, len(line)))
                    offset += len(line)
        return dict(sorted(found.items()))

    def samples(self, step: int) -> list[dict]:
        """Rows of a step in samples.jsonl."""
        with (self.path / "samples.jsonl").open("rb") as file:
            rows = []
            for offset, length in self.logged_steps.get(step, ()):
                file.seek(offset)
                rows.append(json.loads(file.read(length)))
        return rows

    def held_out(self) -> Iterator[dict]:
        """Rows of evaluations.jsonl, one completion of a held-out problem each."""
        return read_lines(self.path / "evaluations.jsonl")

    @functools.cached_property
    def tokenizer(self) -> Tokenizer | None:
        """Tokenizer of the newest saved policy, or of the start policy; None if neither is found."""
        saved = [file.parent for file in self.path.glob("checkpoints/step_*[0-9]/hf*/tokenizer.json")]
        saved = [folder for folder in saved if not folder.suffix]  # not one that is being written
        if saved:
            newest = max(saved, key=lambda p: (int(p.parent.name.removeprefix("step_")), p.name))
            return Tokenizer(newest)
        try:
            return Tokenizer(model_path(self.config.get("long") or self.config["model"]))
        except UserError:
            return None


@dataclass(frozen=True)
class Chains:
    """Finished folder of chunk.py."""

    path: Path
    name: str
    config: dict
    items: list[dict]  # annotated.json
    summary: dict


def open_folders(paths: list[Path]) -> list[TrainingRun | Chains]:
    """Open the runs in these folders; a folder without a run of its own stands for its subfolders.

    Raises UserError for a folder without any.
    """
    found = []
    for path in map(Path, paths):
        here = [path] if _kind(path) else [child for child in sorted(path.glob("*/")) if _kind(child)]
        if not here:
            raise UserError(f"{path} is not a run folder, it has no config.json of train.py or chunk.py")
        found += here
    names = _names(found)
    return [_kind(path)(path, name) for path, name in zip(found, names)]


def open_run(path: Path, name: str) -> TrainingRun:
    config, summary = _json(path / "config.json", {}), _json(path / "summary.json", {})
    launches = _json(path / "environment.json", [])
    return TrainingRun(path, name, config, list(read_lines(path / "metrics.jsonl")), summary, launches)


def open_chains(path: Path, name: str) -> Chains:
    config, summary = _json(path / "config.json", {}), _json(path / "summary.json", {})
    return Chains(path, name, config, _json(path / "annotated.json", []), summary)


def _kind(path: Path):
    """Function that opens a folder; None if it is neither a training run's nor chunk.py's."""
    if "preset" in _json(path / "config.json", {}):
        return open_run
    return open_chains if (path / "annotated.json").exists() else None


def _names(paths: list[Path]) -> list[str]:
    """Names of the folders, with their parents' names if two are equal."""
    resolved = [path.resolve() for path in paths]
    alone = len({path.name for path in resolved}) == len(resolved)
    return [path.name if alone else f"{path.parent.name}/{path.name}" for path in resolved]


def _json(path: Path, otherwise):
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else otherwise


def _step(line: bytes) -> int:
    """Read the step of a row without parsing it; the log writes it first."""
    return int(re.match(rb'\{"step": (\d+)', line)[1])

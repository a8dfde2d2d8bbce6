"""Logging to Weights & Biases and TensorBoard.

Both get a step's numbers under their names in metrics.jsonl, an evaluation's under held_out/…, and some
completions as a table. Nothing is read back from them.
"""

from __future__ import annotations

import importlib.util
import uuid
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Protocol

from thinkrl import UserError
from thinkrl.visible import visible

COLUMNS = ["step", "problem", "level", "question", "gold", "answer", "right", "tokens", "text"]
SHOWN = 64  # completions per table
LONGEST = 8_000  # characters per text


class Sink(Protocol):
    def numbers(self, step: int, values: dict[str, float]) -> None:
        """Log numbers of an optimizer step."""
        ...

    def completions(self, step: int, name: str, rows: list[list]) -> None:
        """Log a table of completions with the columns COLUMNS."""
        ...

    def close(self) -> None: ...


class Wandb:
    """Run of a Weights & Biases project. Its id is kept in the run folder, so a resumed run continues it."""

    def __init__(self, folder: Path, project: str, settings: dict):
        import wandb

        path = folder / "wandb_id"
        if not path.exists():
            path.write_text(uuid.uuid4().hex[:8])
        self.wandb = wandb
        self.run = wandb.init(
            project=project,
            id=path.read_text().strip(),
            name=folder.resolve().name,
            config=settings,
            dir=str(folder),
            resume="allow",
        )

    def numbers(self, step: int, values: dict[str, float]) -> None:
        self.run.log(values, step=step)

    def completions(self, step: int, name: str, rows: list[list]) -> None:
        self.run.log({name: self.wandb.Table(columns=COLUMNS, data=rows)}, step=step)

    def close(self) -> None:
        self.run.finish()


class TensorBoard:
    """TensorBoard event files in the run folder. Events of a killed run after step `first` are purged."""

    def __init__(self, folder: Path, first: int):
        from torch.utils.tensorboard import SummaryWriter

        self.writer = SummaryWriter(str(folder), purge_step=first + 1 if first else None)

    def numbers(self, step: int, values: dict[str, float]) -> None:
        for name, value in values.items():
            self.writer.add_scalar(name, value, step)
        self.writer.flush()

    def completions(self, step: int, name: str, rows: list[list]) -> None:
        self.writer.add_text(name, "\n\n".join(map(markdown, rows)), step)
        self.writer.flush()

    def close(self) -> None:
        self.writer.close()


def open_sinks(folder: Path, first: int, wandb_project: str, tensorboard: bool, settings: dict) -> list[Sink]:
    """Open the requested sinks. wandb_project: "" for none."""
    sinks: list[Sink] = []
    if wandb_project:
        sinks.append(Wandb(folder, wandb_project, settings))
    if tensorboard:
        sinks.append(TensorBoard(folder, first))
    return sinks


def require_sinks(wandb: bool, tensorboard: bool) -> None:
    """Raise UserError if a requested package is missing."""
    for name, wanted in (("wandb", wandb), ("tensorboard", tensorboard)):
        if wanted and importlib.util.find_spec(name) is None:
            raise UserError(f"--{name} needs the {name} package: pip install 'thinkrl[{name}]'")


def flat(result: dict, prefix: str) -> Iterator[tuple[str, float]]:
    """Yield (name, number) of an evaluation: "held_out/greedy/accuracy", "held_out/accuracy at 64 tokens"."""
    for key, value in result.items():
        if isinstance(value, dict):
            yield from flat(value, f"{prefix}/{key}")
        elif key == "budgets":
            yield from ((f"{prefix}/accuracy at {tokens} tokens", accuracy) for tokens, accuracy in value)
        elif isinstance(value, (int, float)) and key != "step":
            yield f"{prefix}/{key}", value


def table_rows(step: int, records: Sequence[dict]) -> list[list]:
    """Rows with the columns COLUMNS of lines of samples.jsonl or evaluations.jsonl, at most SHOWN."""
    return [
        [
            step,
            r["problem"],
            visible(r.get("level", "")),
            visible(r["question"]),
            visible(r["gold"]),
            None if r["answer"] is None else visible(r["answer"]),
            r["outcome_reward"] > 0.5,
            sum(len(turn["completion"]) if "completion" in turn else turn["tokens"] for turn in r["turns"]),
            visible(r["text"] if "text" in r else "\n\n".join(turn["text"] for turn in r["turns"]))[:LONGEST],
        ]
        for r in records[:SHOWN]
    ]


def markdown(row: list) -> str:
    """Format one row for TensorBoard's text tab, as an indented block, which Markdown shows unchanged."""
    lines = "\n".join(f"{name}: {value}" for name, value in zip(COLUMNS, row)).splitlines()
    return "\n".join("    " + line for line in lines)

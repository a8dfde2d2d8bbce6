"""Evaluate a policy on problems, and keep its attempts. `sample.py --data` is the command line.

The folder --out has

    config.json          options that change the result; the command that continues must have the same
    parts/rank_R.jsonl   attempts so far, from which a killed evaluation continues at any number of ranks
    completions.jsonl    at the end all attempts, by problem, in the format of a run's evaluations.jsonl
    summary.json         results of `summary`
    summary.md           the same as tables

A continued evaluation has the same attempts as an uninterrupted one, up to floating-point ties, because each
attempt has its own key of random numbers.
"""

from __future__ import annotations

import json
import shutil
import zlib
from collections.abc import Callable, Iterable, Sequence
from contextlib import nullcontext
from dataclasses import astuple
from pathlib import Path
from typing import Protocol

from thinkrl.distributed import World, from_main, gather, together
from thinkrl.evaluate import recorded_attempt, summary_of
from thinkrl.intervals import clustered_interval
from thinkrl.rollout import completions_bar
from thinkrl.run.files import read_lines, write_json
from thinkrl.run.folder import open_out
from thinkrl.run.lock import hold
from thinkrl.run.parts import open_part, read_parts
from thinkrl.sampler import Sampler
from thinkrl.tools.formats import number
from thinkrl.types import Problem
from thinkrl.visible import visible

ROWS = 256  # completions in one call of the sampler, which a kill can lose
ENDS = 1 << 20  # bytes at each end of a weights file, for its checksum


class Policy(Protocol):
    """Policy that is evaluated."""

    samplers: Sequence[Sampler]
    """Samplers whose completions are the attempts, for the bar; if [] it advances with each call of
    `records`.
    """

    def require_room(self, problems: list[Problem]) -> None:
        """Raise UserError if a problem and an attempt at it exceed the context."""
        ...

    def records(self, problems: list[Problem]) -> list[dict]:
        """Sample n attempts at each problem; returns records of `evaluate.held_out_record`."""
        ...


def evaluate(
    problems: Sequence[Problem],
    n: int,
    load: Callable[[], Policy],
    world: World,
    folder: Path | None,
    settings: dict,
    decoding: str,
) -> list[dict]:
    """Evaluate n attempts at every problem; returns all records in order, on rank 0. Collective.

    load       loads the policy; called only if problems are left
    folder     where records are kept and found again; settings that must be the same
    decoding   "sampled" or "greedy", a field of every record
    Raises UserError, on every rank, if the folder was begun with other settings or cannot be written.
    """
    if folder:
        hold(folder, world)
    kept = together(_open, folder, settings, n, world) if folder else []
    finished = set(from_main([record["problem"] for record in kept]))
    waiting = [p for p in problems if p.id not in finished]
    if finished and world.main:
        print(f"{folder} has {len(finished)} of {len(problems)} problems, {len(waiting)} to do")
    if not waiting:
        return kept
    policy = load()
    policy.require_room(list(problems))
    if folder and world.main:
        write_json(folder / "config.json", settings)
    made = _attempt(waiting[world.rank :: world.size], n, policy, world, folder, {"decoding": decoding})
    records = sorted(kept + sum(gather(made), []), key=lambda r: (r["problem"], r["sample"]))
    if folder and world.main:
        _merge(folder, records)
    return records


def _attempt(
    mine: list[Problem], n: int, policy: Policy, world: World, folder: Path | None, extra: dict
) -> list[dict]:
    """Sample this rank's problems and append the records to its part of the folder."""
    at_once, made = max(1, ROWS // n), []
    with (
        open_part(folder, world.rank) if folder else nullcontext() as part,
        completions_bar(policy.samplers, len(mine) * n, "evaluate", world.main, delay=0) as bar,
    ):
        for i in range(0, len(mine), at_once):
            records = [extra | record for record in policy.records(mine[i : i + at_once])]
            if part:
                part.write("".join(json.dumps(record) + "\n" for record in records))
                part.flush()
            if not policy.samplers:
                bar.update(len(records))
            made += records
    return made


def settings_of(options: dict, problems: Sequence[Problem], models: Iterable[Path]) -> dict:
    """Settings that change the result, for config.json: options, checksums of problems and weights."""
    files = [file for model in models for file in sorted(model.glob("*.safetensors"))]
    asked = [astuple(p) for p in problems]
    return options | {"problems_crc32": zlib.crc32(repr(asked).encode()), "weights_crc32": _ends(files)}


def _ends(files: Iterable[Path]) -> int:
    """Checksum of both ends of every file, which training changes."""
    crc = 0
    for path in files:
        with path.open("rb") as file:
            crc = zlib.crc32(file.read(ENDS), crc)
            file.seek(-min(ENDS, path.stat().st_size), 2)
            crc = zlib.crc32(file.read(), crc)
    return crc


def _open(folder: Path, settings: dict, n: int, world: World) -> list[dict]:
    """Records in the folder of all problems that have n, on rank 0."""
    if not world.main:
        return []
    open_out(folder, settings)
    path = folder / "completions.jsonl"
    found = {
        (r["problem"], r["sample"]): r
        for r in (*(read_lines(path) if path.exists() else ()), *read_parts(folder))
    }
    counts: dict[int, int] = {}
    for problem, _ in found:
        counts[problem] = counts.get(problem, 0) + 1
    return [record for (problem, _), record in found.items() if counts[problem] == n]


def _merge(folder: Path, records: Sequence[dict]) -> None:
    """Write completions.jsonl, and remove the parts."""
    temporary = folder / "completions.jsonl.tmp"
    temporary.write_text("".join(json.dumps(record) + "\n" for record in records))
    temporary.replace(folder / "completions.jsonl")
    shutil.rmtree(folder / "parts")


def summary(records: Sequence[dict]) -> dict:
    """Compute `evaluate.summary_of`, and with token budgets also

    budgets             [tokens, accuracy] of each; budget_intervals their 95 % intervals, clustered by
                        problem
    budget_area         mean accuracy over the budgets
    """
    out = summary_of([recorded_attempt(record) for record in records])
    if "at_budgets" not in records[0]:
        return out
    budgets = [budget for budget, _ in records[0]["at_budgets"]]
    chances: dict[int, list[list[float]]] = {}
    for record in records:
        chances.setdefault(record["problem"], []).append([chance for _, chance in record["at_budgets"]])
    found = [
        clustered_interval([[row[i] for row in rows] for rows in chances.values()])
        for i in range(len(budgets))
    ]
    out["budgets"] = [[budget, accuracy] for budget, (accuracy, _, _) in zip(budgets, found)]
    out["budget_intervals"] = [[low, high] for _, low, high in found]
    out["budget_area"] = sum(accuracy for accuracy, _, _ in found) / len(found)
    return out


def tables(result: dict) -> str:
    """Format `summary` as Markdown that is readable on a terminal."""
    rows = [_row("all", result)]
    rows += [_row(level, numbers) for level, numbers in result["by_level"].items() if level]
    head = [
        "",
        "problems",
        "accuracy",
        "95 % interval",
        "tokens",
        "median",
        "95th percentile",
        "most",
        "truncated",
    ]
    parts = [table(head, rows)]
    sizes = [key.removeprefix("pass@") for key in result if key.startswith("pass@")]
    if sizes:
        chances = [
            [f"{name}@k", *(number(result[f"{name}@{k}"], "accuracy") for k in sizes)]
            for name in ("pass", "maj")
        ]
        parts.append(table(["k", *sizes], chances))
    if "budgets" in result:
        points = zip(result["budgets"], result["budget_intervals"])
        rows = [[tokens, number(accuracy, "accuracy"), between(*ends)] for (tokens, accuracy), ends in points]
        parts.append(table(["thinking cut at", "accuracy", "95 % interval"], rows))
    if result["tokens_per_correct"] is not None:
        parts.append(f"tokens per right answer: {number(result['tokens_per_correct'], 'tokens')}")
    return "\n\n".join(parts)


def _row(name: str, numbers: dict) -> list:
    tokens = (number(numbers[key], "tokens") for key in ("tokens", "tokens_median", "tokens_95"))
    accuracy, truncated = (number(numbers[key], "accuracy") for key in ("accuracy", "truncated"))
    interval = between(*numbers["accuracy_interval"])
    return [name, numbers["problems"], accuracy, interval, *tokens, numbers["tokens_max"], truncated]


def between(low: float, high: float) -> str:
    """Format an interval of shares: "63.0 to 71.2 %"."""
    return f"{100 * low:.1f} to {100 * high:.1f} %"


def table(head: Sequence, rows: Sequence[Sequence]) -> str:
    """Format a Markdown table with aligned columns: the first to the left, the others to the right."""
    cells = [[visible(cell).replace("\n", " ").replace("|", "\\|") for cell in row] for row in (head, *rows)]
    widths = [max(3, *map(len, column)) for column in zip(*cells)]
    rule = [f"{'-' * widths[0]}", *(f"{'-' * (width - 1)}:" for width in widths[1:])]
    lines = [
        " | ".join(
            cell.rjust(width) if i else cell.ljust(width) for i, (cell, width) in enumerate(zip(row, widths))
        )
        for row in (cells[0], rule, *cells[1:])
    ]
    return "\n".join(f"| {line} |" for line in lines)

"""Differences of methods with confidence intervals, from their finished runs.

Every method has answered the same held-out problems with the same seeds. Intervals are at 95 %, by a
bootstrap over problems and seeds that draws the same ones for both policies of a difference
(`thinkrl.intervals`). A difference is shown if its interval does not contain 0.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from thinkrl import UserError
from thinkrl.evaluate import is_correct, tokens_of
from thinkrl.intervals import aes_interval, paired_bootstrap
from thinkrl.l2t.budgets import gaps_to_frontier
from thinkrl.run.files import read_json, read_lines
from thinkrl.run.folder import finished
from thinkrl.tools.paired import by_problem, evaluations

MEASURES = ("accuracy", "tokens")
Interval = tuple[float, float, float]  # value, low, high


@dataclass
class Measured:
    """Results of the finished runs of one method. Arrays are [S seeds, P problems], at temperature 1."""

    seeds: list[str]
    before: dict[str, np.ndarray]  # "accuracy", "tokens": the start policy, as each seed sampled it
    after: dict[str, np.ndarray]
    greedy: dict[str, np.ndarray]
    curve: list[tuple[float, float, float]]  # (step, accuracy, tokens), means over seeds
    million_tokens: float  # sampled in training, and run through the model for probes; mean over seeds
    budgets: list[float] = field(default_factory=list)  # accuracy at token budgets (--eval_budgets)


def measure(method: str, seeds: list[str], folder: Path) -> Measured | None:
    """Read the finished runs of a method; None if there are none."""
    runs = {seed: folder / f"{method}-{seed}" for seed in seeds}
    runs = {seed: run for seed, run in runs.items() if finished(run)}
    if not runs:
        return None
    records = [evaluations(run) for run in runs.values()]
    for run, found in zip(runs.values(), records):
        if not {"before", "after"} <= found.keys():
            raise UserError(
                f"{run} has no held-out evaluations before and after training: give the task --eval_data"
            )
    summaries = [read_json(run / "summary.json") for run in runs.values()]

    def arrays(when: str, decoding: str) -> dict[str, np.ndarray]:
        rows = [_means(found[when][decoding]) for found in records]
        return {key: np.array([row[key] for row in rows]) for key in MEASURES}

    steps = zip(*(sorted((r["step"], r["accuracy"], r["tokens"]) for r in s.values()) for s in summaries))
    budgets = [[accuracy for _, accuracy in s["after"].get("budgets", [])] for s in summaries]
    return Measured(
        seeds=list(runs),
        before=arrays("before", "sampled"),
        after=arrays("after", "sampled"),
        greedy=arrays("after", "greedy"),
        curve=[tuple(np.mean(points, axis=0).tolist()) for points in steps],
        million_tokens=float(np.mean([_tokens_spent(run) for run in runs.values()])) / 1e6,
        budgets=np.mean(budgets, axis=0).tolist(),
    )


def _means(records: Sequence[dict]) -> dict[str, list[float]]:
    """Mean accuracy and tokens of every problem over its samples."""
    groups = by_problem(records).values()
    return {
        key: [sum(map(value, group)) / len(group) for group in groups]
        for key, value in (("accuracy", is_correct), ("tokens", tokens_of))
    }


def _tokens_spent(run: Path) -> float:
    config = read_json(run / "config.json")
    completions = config["problems_per_step"] * config["group_size"]
    rows = read_lines(run / "metrics.jsonl")
    return sum(row["tokens"] * completions + row.get("probe_tokens", 0.0) for row in rows)


def compare(measured: dict[str, Measured], against: str) -> dict[str, dict]:
    """Compute means with intervals, differences to `against`, and AES relative to the start policy, by
    method.
    """
    out = {}
    for name, m in measured.items():
        row: dict = {"seeds": m.seeds, "million_tokens": m.million_tokens, "curve": m.curve}
        for key in MEASURES:
            row[key] = paired_bootstrap(m.after[key], np.zeros_like(m.after[key]))
            row[f"greedy_{key}"] = float(m.greedy[key].mean())
        row["aes"] = aes_interval(
            m.after["accuracy"], m.after["tokens"], m.before["accuracy"], m.before["tokens"]
        )
        if name != against:
            common = [seed for seed in m.seeds if seed in measured[against].seeds]
            row["paired_seeds"] = common
            for key in MEASURES if common else ():
                own, other = (
                    side.after[key][[side.seeds.index(seed) for seed in common]]
                    for side in (m, measured[against])
                )
                row[f"{key}_difference"] = paired_bootstrap(own, other)
        out[name] = row
    if all(m.budgets for m in measured.values()):
        for name, gap in gaps_to_frontier({name: m.budgets for name, m in measured.items()}).items():
            out[name]["gap_to_frontier"] = gap
    return out


def table(rows: dict[str, dict], against: str) -> str:
    """Format a Markdown table, accuracies in percent, differences in percentage points."""
    gap = "gap_to_frontier" in next(iter(rows.values()))
    head = ["method", "seeds", "accuracy %", f"less {against}'s", "tokens", f"less {against}'s", "AES"]
    head += ["greedy %", "greedy tokens", "M tokens spent", *["gap to frontier"] * gap]
    lines = ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    for name, row in rows.items():
        cells = [name, str(len(row["seeds"]))]
        for key, scale in zip(MEASURES, (100, 1)):
            difference = row.get(f"{key}_difference")
            cells += [
                _interval(row[key], scale),
                _interval(difference, scale, sign="+") if difference else "",
            ]
        cells += [_interval(row["aes"], 1, digits=2), f"{row['greedy_accuracy']:.1%}".rstrip("%")]
        cells += [f"{row['greedy_tokens']:.1f}", f"{row['million_tokens']:.2f}"]
        if gap:
            cells.append(f"{100 * row['gap_to_frontier']:.1f}")
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _interval(interval: Interval, scale: float, digits: int = 1, sign: str = "") -> str:
    value, low, high = (f"{x * scale:{sign}.{digits}f}" for x in interval)
    return f"{value} [{low}, {high}]"


def conclusions(rows: dict[str, dict], against: str) -> str:
    """List the shown differences in sentences."""
    lines, intervals = [], 0
    for key, unit, scale in (("accuracy", "points of accuracy", 100), ("tokens", "tokens", 1)):
        found: dict[str, list[str]] = {f"more {unit} than": [], f"fewer {unit} than": []}
        found[f"no shown difference in {unit} to"] = []
        for name, row in rows.items():
            if difference := row.get(f"{key}_difference"):
                value, low, high = difference
                verdict = list(found)[0 if low > 0 else 1 if high < 0 else 2]
                found[verdict].append(f"{name} ({value * scale:+.1f})")
                intervals += 1
        lines += [f"- {verdict} {against}: {', '.join(names)}" for verdict, names in found.items() if names]
    lines.append(
        f"- {intervals} intervals: of differences that are 0, one in 20 would look like one by chance. "
        "Of few seeds intervals are too narrow."
    )
    return "\n".join(lines)

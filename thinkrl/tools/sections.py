"""Content of each section of the report: tables as lists and dicts for the template, figures as SVG."""

from __future__ import annotations

import json
from dataclasses import fields

from markupsafe import Markup

from thinkrl.config import ROLE_OF, Config, readers
from thinkrl.evaluate import aes
from thinkrl.run.metrics import DEFINITIONS
from thinkrl.tools.figures import (
    accuracy_against_tokens,
    accuracy_at_budgets,
    constant,
    curve,
    histogram,
    run_class,
    running_mean,
)
from thinkrl.tools.formats import finite
from thinkrl.tools.reading import TrainingRun
from thinkrl.tools.rows import lengths_by_evaluation

GROUPS = {
    "results": "reward accuracy tokens truncated answered zero_groups",
    "optimisation": "loss grad_norm entropy kl clip_fraction mismatch lr advantage_max",
    "l2t": "",
    "longshort": "",
    "prm": "",
    "time": (
        "seconds tokens_per_second rollout_seconds probe_seconds penalty_seconds probe_tokens penalty_tokens"
    ),
}
TITLES = {
    "results": "Results",
    "optimisation": "Optimisation",
    "time": "Time",
    "more": "More",
    "l2t": "L2T",
    "longshort": "Long⊗Short",
    "prm": "Step reward model",
}


def decoded(result: dict, decoding: str) -> dict:
    """Part of an evaluation that is "sampled" or "greedy"."""
    return result if decoding == "sampled" else result.get("greedy", {})


def tiles(run: TrainingRun) -> list[dict]:
    """Four numbers at the top: accuracy and tokens, sampled and greedy, or those of training."""
    out = []
    for decoding in ("sampled", "greedy"):
        a, b = (decoded(r, decoding) for r in (run.before, run.after))
        for key in ("accuracy", "tokens"):
            if key in a or key in b:
                out.append(
                    {"name": f"{key}, {decoding}", "key": key, "before": a.get(key), "after": b.get(key)}
                )
    if not out and run.metrics:
        first, last = run.metrics[0], run.metrics[-1]
        keys = [key for key in ("loss", "reward", "accuracy", "tokens") if key in last]
        out = [{"name": key, "key": key, "before": first.get(key), "after": last[key]} for key in keys]
    return out


def levels(run: TrainingRun) -> list[dict]:
    """Tables of (name, before, after) by level, sampled and greedy."""
    out = []
    for decoding in ("sampled", "greedy"):
        a, b = (decoded(r, decoding) for r in (run.before, run.after))
        by_level = [r.get("by_level", {}) for r in (a, b)]
        names = sorted(name for name in by_level[0].keys() | by_level[1].keys() if name)
        table = [
            ("all", a, b),
            *((name, by_level[0].get(name, {}), by_level[1].get(name, {})) for name in names),
        ]
        out.append({"decoding": decoding, "rows": table})
    return out


def compared(run: TrainingRun) -> dict:
    """Row of the table of several runs."""
    before, after = run.before, run.after
    score = None
    if before.get("accuracy") and before.get("tokens") and "accuracy" in after:
        score = aes(after["accuracy"], after["tokens"], before["accuracy"], before["tokens"])
    return {"run": run, "before": before, "after": after, "aes": score}


def round_table(run: TrainingRun) -> dict:
    """Evaluations of Long⊗Short's rounds: the trained role and the pair's results."""
    schedule = [ROLE_OF[letter] for letter in run.config["rounds"].replace(",", "")]
    length = run.config["steps_per_round"]
    table = []
    for name, result in run.evaluations:
        step, base = result.get("step", 0), run.before
        trained = schedule[(step - 1) // length] if step else None
        score = None
        if base.get("accuracy") and base.get("tokens"):
            score = aes(result["accuracy"], result["tokens"], base["accuracy"], base["tokens"])
        table.append({"name": name, "trained": trained, "result": result, "aes": score})
    return {"run": run, "rows": table}


def frontier(runs: list[TrainingRun]) -> Markup | str:
    """Figure of accuracy against tokens: of one run sampled and greedy, of several sampled."""
    paths = []
    for i, run in enumerate(runs):
        for decoding in ("sampled", "greedy")[: 2 if len(runs) == 1 else 1]:
            results = [(name, decoded(r, decoding)) for name, r in run.evaluations]
            path = [(name, r["tokens"], r["accuracy"]) for name, r in results if "accuracy" in r]
            if path:
                kind = run_class(i) + " greedy" * (decoding == "greedy")
                paths.append((kind, decoding if len(runs) == 1 else run.name, path))
    return accuracy_against_tokens(paths) if paths else ""


def budgets(runs: list[TrainingRun]) -> Markup | str:
    """Figure of accuracy at token budgets: before as dashes, after as a line."""
    lines = []
    for i, run in enumerate(runs):
        for name, result in (("before", run.before), ("after", run.after)):
            if result.get("budgets") and not (name == "before" and i):
                label = f"{run.name}, {name}" if len(runs) > 1 else name
                lines.append((run_class(i) + " greedy" * (name == "before"), label, result["budgets"]))
    return accuracy_at_budgets(lines) if lines else ""


def lengths(runs: list[TrainingRun]) -> Markup | str:
    """Histogram of tokens of sampled held-out completions: the first run's `before`, every run's newest."""
    samples = []
    for i, run in enumerate(runs):
        found = lengths_by_evaluation(run)
        newest = next((name for name, _ in reversed(run.evaluations) if name in found), None)
        for name in dict.fromkeys(["before", newest]):
            if name in found and not (name == "before" and i):
                label = f"{run.name}, {name}" if len(runs) > 1 else name
                samples.append((run_class(i) + " greedy" * (name == "before"), label, found[name]))
    return histogram(samples, "tokens of a held-out completion") if samples else ""


def rewards(runs: list[TrainingRun], groups: list[dict]) -> Markup | str:
    """Histogram of rewards of training completions on the page: first and last quarter of the steps."""
    samples = []
    for i, run in enumerate(runs):
        mine = [group for group in groups if group["run"] == i]
        steps = sorted({group["step"] for group in mine})
        if len(steps) < 4:
            continue
        first, last = steps[len(steps) // 4 - 1], steps[-(len(steps) // 4)]
        for name, chosen in (
            ("first quarter", [group for group in mine if group["step"] <= first]),
            ("last quarter", [group for group in mine if group["step"] >= last]),
        ):
            values = [row["reward"] for group in chosen for row in group["rows"] if finite(row["reward"])]
            if values and not (name == "first quarter" and i):
                label = f"{run.name}, {name}" if len(runs) > 1 else name
                samples.append((run_class(i) + " greedy" * (name == "first quarter"), label, values))
    return histogram(samples, "reward of a training completion") if samples else ""


def curve_groups(runs: list[TrainingRun]) -> dict:
    """Metrics of all runs as groups of curves over the same steps; constant ones are listed separately."""
    present = {key for run in runs for row in run.metrics for key in row} - {"step"}
    if not present:
        return {"groups": [], "constants": []}
    last = max(run.steps for run in runs)
    found: dict[str, dict] = {name: {} for name in GROUPS}
    constants = []
    for key in sorted(present, key=[*DEFINITIONS, *sorted(present)].index):
        lines = [[(r["step"], r[key]) for r in run.metrics if finite(r.get(key))] for run in runs]
        dots = [
            [
                (r["step"], r[key])
                for _, r in run.evaluations
                if key in ("accuracy", "tokens") and finite(r.get(key))
            ]
            for run in runs
        ]
        if constant(lines) and not any(dots):
            constants.append((key, [line[0][1] if line else None for line in lines]))
            continue
        ends = [running_mean(line)[-1][1] if line else None for line in lines]
        svg = curve(key, lines, dots, (0, last))
        found.setdefault(group_of(key), {})[key] = {"lines": lines, "svg": svg, "ends": ends}
    order = {key: i for i, key in enumerate(" ".join(GROUPS.values()).split())}
    groups = [
        {
            "name": TITLES.get(name, name),
            "metrics": dict(sorted(metrics.items(), key=lambda pair: order.get(pair[0], -1))),
        }
        for name, metrics in found.items()
        if metrics
    ]
    return {"groups": groups, "constants": constants, "last": last}


def group_of(key: str) -> str:
    """Group of a metric: by name, or by the preset in its definition, or "more"."""
    named = next((name for name, keys in GROUPS.items() if key in keys.split()), None)
    preset, colon, _ = DEFINITIONS.get(key, "").partition(": ")
    return named or (preset if colon and " " not in preset else "more")


def options(runs: list[TrainingRun]) -> dict:
    """Options that the runs' presets read: those that differ from their defaults in a run, and the others."""
    presets = {run.config["preset"] for run in runs}
    known = {"name"} | ({"preset"} if len(presets) == 1 else set())  # shown at the top of the page
    changed, rest = [], []
    for field in fields(Config):
        if not field.metadata or field.name in known or not presets & set(readers(field.name)):
            continue
        values = [run.config.get(field.name) for run in runs]
        row = {"name": field.name, "help": field.metadata["help"], "default": field.default, "values": values}
        row["differ"] = len({json.dumps(value) for value in values}) > 1
        (changed if any(value not in (field.default, None) for value in values) else rest).append(row)
    return {"changed": changed, "rest": rest}

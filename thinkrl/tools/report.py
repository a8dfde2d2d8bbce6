"""Runs as one self-contained HTML page: results, curves, completions token by token, configuration.

    python -m thinkrl.tools.report RUN [RUN …] [--steps 1,100-120] [--out FILE.html]

writes RUN/report.html, also for a run that is still going; for several runs, report.html in the folder that
holds them. A RUN is a run of train.py, a folder of chunk.py, or a folder of such folders. What a folder does
not have leaves its section out.

    reading     what is in the folders               figures     the SVG
    rows        the completions that fit a page      formats     numbers and text
    assets/report.html, report.css, report.js        the page, its looks, and what it does when it is used

Everything from a run is data, model text above all. The template escapes what it writes, the script creates
text nodes only, control and direction characters are made visible, and the page's own policy allows this
style sheet and this script, by their hashes, and no request.
"""

from __future__ import annotations

import base64
import hashlib
import json
import os
import sys
from dataclasses import dataclass, fields
from pathlib import Path

import jinja2
from markupsafe import Markup

from thinkrl import UserError
from thinkrl.config import (
    Config,
    asks_for_help,
    exit_with_error,
    option,
    options_help,
    read_options,
    show_help,
)
from thinkrl.evaluate import aes
from thinkrl.metrics import DEFINITIONS
from thinkrl.tools import figures, rows
from thinkrl.tools.formats import SHARES, change, duration, finite, number, script_json, visible
from thinkrl.tools.reading import Chains, TrainingRun, open_folders

ASSETS = Path(__file__).parent.parent / "assets"
LIMIT = 4_800_000  # bytes of a page at most
ROLES = {"L": "long", "S": "short"}
GROUPS = {
    "results": "reward accuracy tokens truncated zero_groups",
    "optimisation": "loss grad_norm entropy kl clip_fraction mismatch lr",
    "l2t": "",
    "longshort": "",
    "prm": "",
    "time": "seconds tokens_per_second rollout_seconds probe_seconds penalty_seconds probe_tokens penalty_tokens",
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


def write_report(*folders: Path, out: Path | None = None, steps: set[int] | None = None) -> Path:
    """Write the page of these folders and return its path, by default report.html in the one folder or above all.

    steps: the logged steps whose completions are shown; None: as many as fit, evenly spread. Raises UserError
    if a folder holds no run.
    """
    found = open_folders(list(folders))
    runs = [run for run in found if isinstance(run, TrainingRun)]
    chains = [folder for folder in found if isinstance(folder, Chains)]
    if out is None:
        out = Path(os.path.commonpath([Path(folder).resolve() for folder in folders])) / "report.html"
    page = render(runs, chains, steps).encode("utf-8", "replace")  # JSON can spell half a surrogate pair
    temporary = out.with_name(out.name + ".tmp")
    temporary.write_bytes(page)
    os.replace(temporary, out)
    return out


def render(runs: list[TrainingRun], chains: list[Chains], steps: set[int] | None = None) -> str:
    """The page. The completions get the room that the rest of it leaves."""
    curves = curve_groups(runs)
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(ASSETS),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        finalize=lambda value: value if isinstance(value, Markup) else visible(value),
    )
    environment.filters |= {"number": number, "duration": duration, "json": script_json, "literal": literal}
    environment.tests["share"] = lambda key: key in SHARES
    template = environment.get_template("report.html")
    style, script = ((ASSETS / f"report.{kind}").read_text(encoding="utf-8") for kind in ("css", "js"))
    given = {
        "style": Markup(style),
        "script": Markup(script),
        "style_hash": digest(style),
        "script_hash": digest(script),
        "title": title(runs, chains),
        "runs": runs,
        "chains": chains,
        "run_class": figures.run_class,
        "change": change,
        "definitions": DEFINITIONS,
        "tiles": tiles(runs[0]) if len(runs) == 1 else [],
        "compared": [compared(run) for run in runs] if len(runs) > 1 else [],
        "results": [levels(run) for run in runs[:1] if len(runs) == 1 and run.evaluations],
        "rounds": [round_table(run) for run in runs if run.config["preset"] == "longshort"],
        "frontier": frontier(runs),
        "budgets": budgets(runs),
        "curves": curves,
        "importance": figures.importance_by_place([c for f in chains for c in f.items]) if chains else "",
        "options": options(runs),
        "launches": [(run, launch) for run in runs for launch in run.launches],
    }
    shown = completions(runs, chains, curves, steps, LIMIT - len(template.render(given | NOTHING).encode()))
    return template.render(given | shown)


NOTHING = {
    "data": {},
    "lengths": "",
    "rewards": "",
    "steps_left_out": [],
    "tables": [],
    "columns": [],
    "shown": {},
}


def completions(
    runs: list[TrainingRun], chains: list[Chains], curves: dict, steps: set[int] | None, room: int
) -> dict:
    """What the template shows of the completions: `data` for the script, histograms, and how much was left out."""
    lines = {
        key: [[list(axis) for axis in zip(*figures.thin(line))] for line in metric["lines"]]
        for group in curves["groups"]
        for key, metric in group["metrics"].items()
    }
    data = {"runs": [run.name for run in runs], "shares": sorted(SHARES), "curves": lines}
    room -= len(script_json(data).encode())
    columns, tables, problems = rows.held_out(runs, int(0.4 * room))
    room -= len(script_json(problems).encode())
    shares = len(runs) + len(chains)
    annotated = [chain for i, folder in enumerate(chains) for chain in rows.chains(folder, i, room // shares)]
    room -= len(script_json(annotated).encode())
    groups = [
        group
        for i, run in enumerate(runs)
        for group in rows.training_groups(run, i, room // len(runs), steps)
    ]
    on_page = {(group["run"], group["step"]) for group in groups}
    left_out = [(run, len(run.logged_steps), sum(r == i for r, _ in on_page)) for i, run in enumerate(runs)]
    return {
        "data": data | {"columns": columns, "held_out": problems, "training": groups, "chains": annotated},
        "columns": columns,
        "tables": tables,
        "lengths": lengths(runs),
        "rewards": rewards(runs, groups),
        "steps_left_out": [entry for entry in left_out if entry[2] < entry[1]],
        "shown": {"held_out": len(problems), "training": len(groups), "chains": len(annotated)},
    }


def literal(value) -> str:
    """An option's value as one would write it."""
    return json.dumps(value, ensure_ascii=False)


def digest(text: str) -> str:
    """How a content security policy names an inline script or style sheet."""
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()


def title(runs: list[TrainingRun], chains: list[Chains]) -> str:
    names = [each.name for each in (*runs, *chains)]
    return names[0] if len(names) == 1 else f"{len(names)} runs"


def tiles(run: TrainingRun) -> list[dict]:
    """The four numbers at the top: accuracy and tokens, sampled and greedy, or what there is of the training's."""
    out = []
    for decoding in ("sampled", "greedy"):
        a, b = (r if decoding == "sampled" else r.get("greedy", {}) for r in (run.before, run.after))
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
    """Before and after by level, once sampled and once greedily: tables of (name, before, after)."""
    out = []
    for decoding in ("sampled", "greedy"):
        a, b = (r if decoding == "sampled" else r.get("greedy", {}) for r in (run.before, run.after))
        by_level = [r.get("by_level", {}) for r in (a, b)]
        names = sorted(name for name in by_level[0].keys() | by_level[1].keys() if name)
        table = [
            ("all", a, b),
            *((name, by_level[0].get(name, {}), by_level[1].get(name, {})) for name in names),
        ]
        out.append({"decoding": decoding, "rows": table})
    return out


def compared(run: TrainingRun) -> dict:
    """One row of the table of several runs."""
    before, after = run.before, run.after
    score = None
    if before.get("accuracy") and before.get("tokens") and "accuracy" in after:
        score = aes(after["accuracy"], after["tokens"], before["accuracy"], before["tokens"])
    return {"run": run, "before": before, "after": after, "aes": score}


def round_table(run: TrainingRun) -> dict:
    """Long⊗Short's evaluations, one per round: which role was trained, and what the pair is worth."""
    schedule = [ROLES.get(letter, letter) for letter in run.config["rounds"].replace(",", "")]
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
    """Accuracy against tokens: of one run sampled and greedily, of several sampled."""
    paths = []
    for i, run in enumerate(runs):
        for decoding in ("sampled", "greedy")[: 2 if len(runs) == 1 else 1]:
            results = [
                (name, r if decoding == "sampled" else r.get("greedy", {})) for name, r in run.evaluations
            ]
            path = [(name, r["tokens"], r["accuracy"]) for name, r in results if "accuracy" in r]
            if path:
                kind = figures.run_class(i) + " greedy" * (decoding == "greedy")
                paths.append((kind, decoding if len(runs) == 1 else run.name, path))
    return figures.accuracy_against_tokens(paths) if paths else ""


def budgets(runs: list[TrainingRun]) -> Markup | str:
    """Accuracy at token budgets, from the evaluations that have it: before as dashes, after as a line."""
    lines = []
    for i, run in enumerate(runs):
        for name, result in (("before", run.before), ("after", run.after)):
            if result.get("budgets") and not (name == "before" and i):
                label = f"{run.name}, {name}" if len(runs) > 1 else name
                lines.append(
                    (figures.run_class(i) + " greedy" * (name == "before"), label, result["budgets"])
                )
    return figures.accuracy_at_budgets(lines) if lines else ""


def lengths(runs: list[TrainingRun]) -> Markup | str:
    """Histogram of the tokens of sampled held-out completions: before (of the first run), and the newest of each."""
    samples = []
    for i, run in enumerate(runs):
        found = rows.lengths_by_evaluation(run)
        newest = next((name for name, _ in reversed(run.evaluations) if name in found), None)
        for name in dict.fromkeys(["before", newest]):
            if name in found and not (name == "before" and i):
                label = f"{run.name}, {name}" if len(runs) > 1 else name
                samples.append((figures.run_class(i) + " greedy" * (name == "before"), label, found[name]))
    return figures.histogram(samples, "tokens of a held-out completion") if samples else ""


def rewards(runs: list[TrainingRun], groups: list[dict]) -> Markup | str:
    """Histogram of the rewards of training completions on the page: the first and the last quarter of the steps."""
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
                samples.append((figures.run_class(i) + " greedy" * (name == "first quarter"), label, values))
    return figures.histogram(samples, "reward of a training completion") if samples else ""


def curve_groups(runs: list[TrainingRun]) -> dict:
    """The metrics of all runs as groups of curves over the same steps; what never changes is listed apart."""
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
        if figures.constant(lines) and not any(dots):
            constants.append((key, [line[0][1] if line else None for line in lines]))
            continue
        ends = [figures.running_mean(line)[-1][1] if line else None for line in lines]
        svg = figures.curve(key, lines, dots, (0, last))
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
    """By name, or by the preset that stands before the colon of its definition, or "more"."""
    named = next((name for name, keys in GROUPS.items() if key in keys.split()), None)
    preset, colon, _ = DEFINITIONS.get(key, "").partition(": ")
    return named or (preset if colon and " " not in preset else "more")


def options(runs: list[TrainingRun]) -> dict:
    """Options that some run has different from their defaults, as (name, help, default, values), and all others."""
    changed, rest = [], []
    for field in fields(Config):
        values = [run.config.get(field.name) for run in runs]
        row = {"name": field.name, "help": field.metadata["help"], "default": field.default, "values": values}
        row["differ"] = len({json.dumps(value) for value in values}) > 1
        (changed if any(value not in (field.default, None) for value in values) else rest).append(row)
    return {"changed": changed, "rest": rest}


@dataclass(frozen=True)
class Options:
    steps: str = option("", "logged steps whose completions are shown: 1,100-120; empty: as many as fit")
    out: str = option("", "file to write; empty: report.html in the run's folder, or above the runs")


def parse(argv: list[str]) -> tuple[list[Path], Options]:
    """`RUN [RUN …] [--key value …]`. Raises UserError."""
    if asks_for_help(argv):
        usage = "usage: python -m thinkrl.tools.report RUN [RUN …] [--key value …]"
        show_help("\n".join([usage, *options_help(Options)]))
    first = next((i for i, word in enumerate(argv) if word.startswith("--")), len(argv))
    if not first:
        raise UserError(
            "usage: python -m thinkrl.tools.report RUN [RUN …] [--steps 1,100-120] [--out FILE.html]"
        )
    return [Path(word) for word in argv[:first]], Options(**read_options(argv[first:], Options))


def step_set(text: str) -> set[int] | None:
    """ "1,100-120" -> the steps. Raises UserError for anything else; None for an empty text."""
    if not text:
        return None
    steps: set[int] = set()
    for part in text.split(","):
        low, dash, high = part.partition("-")
        high = high if dash else low
        if not (low.isdecimal() and high.isdecimal()):
            raise UserError(f"--steps {text}: '{part}' is neither a step nor a range such as 100-120")
        steps.update(range(int(low), int(high) + 1))
    return steps


def main(argv: list[str]) -> None:
    folders, chosen = parse(argv)
    print(write_report(*folders, out=Path(chosen.out) if chosen.out else None, steps=step_set(chosen.steps)))


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except UserError as mistake:
        exit_with_error("thinkrl.tools.report", mistake)

"""The comparison: recipes × seeds from the same start and for as many steps, side by side.   `make compare`

    python -m thinkrl.tools.compare [--seeds 1,2,3] [--steps 100] [--only grpo,l2t] [--runs_dir runs/compare]
    [--jobs 2]

Each run is `torchrun --nproc_per_node=1 train.py …` on a core of its own. A finished run is not repeated, so
a comparison can be cut short and continued, or given more seeds. Ends with a table, runs/compare/summary.json
(recipe -> lists with one entry per seed), runs/compare/report.html with all runs, and, if matplotlib is installed,
runs/compare/accuracy_tokens.svg.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path

from thinkrl.options import command_line, option, parse_as
from thinkrl.runs import ROOT, finished, torchrun, write_json
from thinkrl.tools.report import write_report

COLOURS = [
    "#2a5aa5",
    "#b3541e",
    "#1f7a4d",
    "#7a4fb0",
    "#a8325c",
    "#0f7683",
    "#6f6a0e",
    "#5b5f66",
    "#d08c2e",
    "#4a9cc7",
    "#9a6b4b",
]

# What is compared, and what each control separates.
RECIPES = {
    "grpo": "grpo",
    "l2t": "l2t",
    # a plain price per token, tuned to l2t's tokens; divided by a group's std it would weigh the same
    # whatever it is
    "grpo_length_penalty": "grpo --advantage_std none --length priced --length_price 0.004",
    # GRPO with a fixed price of 0.02 per episode: no fitting gain, C_k = 1
    "grpo_episode_price": "l2t --gain none --compression flat --alpha 1 --beta 0.02",
    "l2t_beta0": "l2t --beta 0",  # fitting gain alone
    "l2t_gain_none": "l2t --gain none",  # compression alone
    "l2t_alpha0_per_token": "l2t --alpha 0 --statistic token_trunc_mean",  # Alg. 1's statistic alone
    "l2t_paper": "l2t --profile paper",  # Alg. 1 to the letter
    "l2t_to_go": "l2t --credit to_go",  # episodes' returns-to-go against the baseline of their state
    "l2t_to_go_continue": "l2t --credit to_go --gain continue --gain_samples 1",  # the same, J from continuations
    "l2t_to_go_none": "l2t --credit to_go --gain none",  # the same, compression alone
}


@dataclass(frozen=True)
class Options:
    seeds: str = option("1,2,3", "comma-separated")
    steps: int = option(100, "optimizer steps of every run", low=1)
    eval_every: int = option(50, "steps between evaluations, for the figure", low=0)
    only: str = option("", "comma-separated recipe names; empty: all")
    runs_dir: str = option("runs/compare", "where the runs and the summary go")
    jobs: int = option(2, "runs at a time, one core each", low=1)


def parse(argv: list[str]) -> Options:
    recipes = (f"  {name:<24}{arguments}" for name, arguments in RECIPES.items())
    usage = "python -m thinkrl.tools.compare [--key value …]"
    return parse_as(Options, argv, usage, notes=["", "recipes:", *recipes])


def run_all(jobs: list[tuple[str, list[str]]], folder: Path, at_once: int) -> None:
    """Start (name, arguments) runs, each pinned to one core, as cores fall free. Output goes to
    <name>.log.
    """
    cores = sorted(os.sched_getaffinity(0))[:at_once]
    busy: dict[int, tuple[str, subprocess.Popen]] = {}
    queue = [job for job in jobs if not finished(folder / job[0])]
    print(f"{len(jobs) - len(queue)} runs are finished, {len(queue)} to do", flush=True)
    while queue or busy:
        for core in cores:
            if core in busy and busy[core][1].poll() is not None:
                name, process = busy.pop(core)
                print(
                    f"{name}: {'done' if process.returncode == 0 else f'FAILED, see {folder / name}.log'}",
                    flush=True,
                )
            if core not in busy and queue:
                name, arguments = queue.pop(0)
                log = (folder / f"{name}.log").open("w")
                command = torchrun(
                    1,
                    "train.py",
                    *arguments,
                    "--runs_dir",
                    str(folder.resolve()),
                    "--name",
                    name,
                    "--resume",
                    "auto",
                    "--device",
                    "cpu",
                )
                busy[core] = (
                    name,
                    subprocess.Popen(
                        command,
                        cwd=ROOT,
                        stdout=log,
                        stderr=log,
                        preexec_fn=lambda core=core: os.sched_setaffinity(0, {core}),
                    ),
                )
        time.sleep(0.5)


def start_policy(recipe: str, seeds: list[str], folder: Path) -> dict[str, list]:
    """The policy that all recipes start from, as each seed sampled it."""
    out: dict[str, list] = {}
    for run in (folder / f"{recipe}-{seed}" for seed in seeds):
        measures = (
            _measures(json.loads((run / "summary.json").read_text())["before"]) if finished(run) else {}
        )
        for key, value in measures.items():
            out.setdefault(key, []).append(value)
    return out


def collect(recipe: str, seeds: list[str], folder: Path) -> dict[str, list]:
    """One entry per finished seed for each quantity."""
    out: dict[str, list] = {}
    for seed in seeds:
        run = folder / f"{recipe}-{seed}"
        if not finished(run):
            continue
        summary = json.loads((run / "summary.json").read_text())
        last = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()][-10:]
        row = {
            "seed": int(seed),
            "steps": last[-1]["step"],
            "seconds_per_step": _mean([r["seconds"] for r in last]),
        }
        row |= _measures(summary["after"])
        row["curve"] = sorted(
            [result["step"], result["accuracy"], result["tokens"]] for result in summary.values()
        )
        if "episodes" in last[-1]:
            row |= {key: _mean([r[key] for r in last]) for key in ("episodes", "malformed")}
            row["tokens_per_episode"] = _mean([r["tokens"] / r["episodes"] for r in last])
        for key, value in row.items():
            out.setdefault(key, []).append(value)
    return out


def _measures(result: dict) -> dict:
    row = {
        "accuracy": result["accuracy"],
        "tokens": result["tokens"],
        "truncated": result["truncated"],
        "greedy_accuracy": result["greedy"]["accuracy"],
        "greedy_tokens": result["greedy"]["tokens"],
    }
    for prefix, by_level in ("", result["by_level"]), ("greedy_", result["greedy"]["by_level"]):
        for level, part in by_level.items():
            row |= {f"{prefix}accuracy {level}": part["accuracy"], f"{prefix}tokens {level}": part["tokens"]}
    return row


def _mean(values: list[float]) -> float:
    return sum(values) / len(values)


def table(results: dict[str, dict]) -> str:
    """mean ± standard deviation over seeds."""
    levels = sorted(
        key.removeprefix("accuracy ") for key in next(iter(results.values())) if key.startswith("accuracy ")
    )
    columns = ["accuracy", "tokens", "greedy_accuracy", "greedy_tokens"]
    columns += [f"{quantity} {level}" for level in levels for quantity in ("accuracy", "tokens")]
    head = ["T=1 acc", "tokens", "greedy acc", "tokens", *(h for x in levels for h in (x, "tokens"))]
    lines = ["| recipe | seeds | " + " | ".join(head) + " |", "|---" * (len(head) + 2) + "|"]
    for name, result in results.items():
        cells = [_cell(result[column], percent="accuracy" in column) for column in columns]
        lines.append(f"| {name} | {len(result['accuracy'])} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _cell(values: list[float], percent: bool) -> str:
    scale = 100 if percent else 1
    spread = statistics.stdev(values) * scale if len(values) > 1 else 0.0
    return f"{_mean(values) * scale:.1f} ± {spread:.1f}"


def draw(results: dict[str, dict], path: Path) -> str:
    """Draw accuracy over mean tokens at T = 1 as training goes on, a path per recipe, averaged over seeds. Returns
    what to tell the user: the path, or what is missing.
    """
    try:
        from matplotlib.figure import Figure
        from matplotlib.ticker import PercentFormatter
    except ImportError:
        return "none, it needs matplotlib: pip install 'thinkrl[report]'"
    drawing = Figure(figsize=(7.2, 4.4), layout="constrained")
    axes = drawing.subplots()
    ends = []
    for i, (name, result) in enumerate(results.items()):
        curve = [tuple(map(_mean, zip(*points))) for points in zip(*result["curve"])]
        _, accuracy, tokens = zip(*curve)
        (line,) = axes.plot(tokens, accuracy, color=COLOURS[i % len(COLOURS)], linewidth=2)
        axes.plot(tokens[1:-1], accuracy[1:-1], "o", color=line.get_color(), markersize=4)
        axes.plot(tokens[-1], accuracy[-1], "o", color=line.get_color(), markersize=8)
        ends.append((accuracy[-1], tokens[-1], name, line.get_color()))
    axes.plot(tokens[0], accuracy[0], "o", color="white", markeredgecolor="#5b5f66", markersize=9, zorder=3)
    axes.annotate(
        "before training", (tokens[0], accuracy[0]), (9, -4), textcoords="offset points", color="#5b5f66"
    )
    gap, above = 0.035 * (axes.get_ylim()[1] - axes.get_ylim()[0]), float("inf")
    for accuracy, tokens, name, colour in sorted(ends, reverse=True):  # from above, no label over another
        above = min(accuracy, above - gap)
        axes.annotate(name, (tokens, above), (9, -3), textcoords="offset points", color=colour, weight="bold")
    axes.set(xlabel="mean tokens of a completion, T = 1", ylabel="accuracy")
    axes.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", color="#e3e0d8")
    axes.margins(x=0.12)
    drawing.savefig(path, metadata={"Date": None})
    return str(path)


def main(options: Options) -> None:
    folder, seeds = Path(options.runs_dir), options.seeds.split(",")
    folder.mkdir(parents=True, exist_ok=True)
    names = options.only.split(",") if options.only else list(RECIPES)
    common = [
        "--steps",
        str(options.steps),
        "--eval_every",
        str(options.eval_every),
        "--keep_checkpoints",
        "1",
    ]
    jobs = [
        (f"{name}-{seed}", [*RECIPES[name].split(), "--seed", seed, *common])
        for seed in seeds
        for name in names
    ]
    run_all(jobs, folder, options.jobs)
    results = {name: collect(name, seeds, folder) for name in RECIPES}
    results = {name: result for name, result in results.items() if result}
    write_json(
        folder / "summary.json", {"start": start_policy(next(iter(results)), seeds, folder), **results}
    )
    drawn = draw(results, folder / "accuracy_tokens.svg")
    print(f"{table(results)}\nsummary: {folder}/summary.json\nfigure: {drawn}")
    print(f"report: {write_report(folder)}")


if __name__ == "__main__":
    main(command_line("compare", parse))

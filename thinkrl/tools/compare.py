"""Compare methods on tasks and seeds, from the same start for the same number of steps.   `make compare`

    python -m thinkrl.tools.compare [--methods grpo,l2t,kimi] [--seeds 1,2,3] [--steps 100]
        [--tasks FILE.json] [--against grpo] [--runs_dir runs/compare] [--jobs 2]

Each run is `torchrun --nproc_per_node=1 train.py …` on a core of its own. A finished run is not repeated, so
a comparison can be stopped and continued, or extended by seeds, methods and tasks. --tasks is a file
{"NAME": {"options": "--model … --data …", "tokens": 80}}; "tokens" is the start policy's mean number of
tokens, to which token limits are scaled. The built-in task is the embedded model's.

For each task it prints a table and conclusions, and writes to runs/compare/TASK/: comparison.md,
summary.json, report.html with the runs, and, if matplotlib is installed, accuracy_tokens.svg.
"""

from __future__ import annotations

import json
import os
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path

from thinkrl import UserError
from thinkrl.options import nearest, option, parse_as, run_tool
from thinkrl.run.files import write_json
from thinkrl.run.folder import ROOT, finished, torchrun
from thinkrl.tools.differences import compare, conclusions, measure, table
from thinkrl.tools.report import MOST, write_report

# Options of train.py by method. {tokens} is the task's. Published constants in tokens are scaled from the
# papers' few thousand tokens to the task's.
METHODS = {
    "grpo": "grpo",
    "l2t": "l2t",
    "truncation": "grpo --length truncation --length_limit {tokens}",
    "kimi": "grpo --length kimi",
    "arora_zanette": "grpo --length arora_zanette",
    "laser": "grpo --length laser --length_limit {tokens}",
    "shorter_better": "grpo --length shorter_better --length_beta {beta}",
    "gfpo": "grpo --length gfpo --length_keep 4",
    "gr3": "grpo --length gr3",
    "prime_linear": "grpo --length prime_linear",
}
# Further names for --methods, each a control for one part of a method.
CONTROLS = {
    "grpo_no_std": "grpo --advantage_std none",
    "dler": "grpo --length truncation --length_limit {tokens} --advantage_std batch --clip_high 0.28",
    # a plain penalty per token; division by a group's std would cancel its size
    "priced": "grpo --advantage_std none --length priced --length_price {price}",
    # a fixed penalty of 0.02 per episode: no fitting gain, C_k = 1
    "episode_price": "l2t --gain none --compression flat --alpha 1 --beta 0.02",
    "l2t_batch": "l2t --advantage_std batch",  # one deviation for the whole step
    "l2t_beta0": "l2t --beta 0",  # fitting gain alone
    "l2t_beta0_batch": "l2t --beta 0 --advantage_std batch",  # the same without the group's std
    "l2t_gain_none": "l2t --gain none",  # compression alone
    "l2t_alpha0_per_token": "l2t --alpha 0 --statistic token_trunc_mean",  # Alg. 1's statistic alone
    "l2t_paper": "l2t --profile paper",  # Alg. 1 to the letter
    "l2t_to_go": "l2t --credit to_go",  # episodes' returns-to-go against the baseline of their state
    "l2t_to_go_continue": "l2t --credit to_go --gain continue --gain_samples 1",  # J from continuations
    "l2t_to_go_none": "l2t --credit to_go --gain none",  # the same, compression alone
    # local credit by M continuations a cut: local_M; with λ = 0.5 or 0.8: local_M_half, local_M_lambda
    **{f"local_{m}": f"l2t --method vineppo --gain_samples {m}" for m in (1, 2, 4, 9)},
    **{
        f"local_{m}_{name}": f"l2t --method vineppo --gain_samples {m} --credit_lambda {value}"
        for m in (1, 2, 4, 9)
        for name, value in (("half", 0.5), ("lambda", 0.8))
    },
}
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
EMBEDDED = {"arith": {"options": "", "tokens": 64}}


@dataclass(frozen=True)
class Options:
    methods: str = option(",".join(METHODS), "comma-separated names, see below")
    seeds: str = option("1,2,3", "comma-separated")
    steps: int = option(100, "optimizer steps of every run", low=1)
    eval_every: int = option(50, "steps between evaluations, for the figure", low=0)
    tasks: str = option("", "JSON file of tasks; empty: the embedded model's own")
    against: str = option("grpo", "the method that the others are compared with")
    runs_dir: str = option("runs/compare", "where the runs and the results go")
    jobs: int = option(2, "runs at a time, one core each", low=1)


def parse(argv: list[str]) -> Options:
    methods = (f"  {name:<22}{arguments}" for name, arguments in (METHODS | CONTROLS).items())
    usage = "python -m thinkrl.tools.compare [--key value …]"
    options = parse_as(Options, argv, usage, notes=["", "methods:", *methods])
    for name in (*options.methods.split(","), options.against):
        if name not in METHODS | CONTROLS:
            raise UserError(f"no method {name!r} to compare{nearest(name, METHODS | CONTROLS)}")
    if options.against not in options.methods.split(","):
        raise UserError(f"--against {options.against} is not among --methods")
    return options


def read_tasks(path: str) -> dict[str, dict]:
    """{name: {"options": str, "tokens": int}} of --tasks. Raises UserError."""
    if not path:
        return EMBEDDED
    try:
        tasks = json.loads(Path(path).read_text())
        for task in tasks.values():
            task["options"].split(), int(task["tokens"])
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise UserError(
            f"--tasks {path}: {error!r}; it must be a JSON file of "
            '{"NAME": {"options": "--model … --data …", "tokens": N}}'
        ) from None
    return tasks


def arguments(method: str, task: dict, seed: str, options: Options) -> list[str]:
    """Arguments of train.py for one run."""
    tokens = task["tokens"]
    text = (METHODS | CONTROLS)[method].format(
        tokens=tokens,
        beta=f"{1.28 / tokens:.1g}",  # alpha / beta is 1.6 times the mean length
        price=f"{0.256 / tokens:.1g}",  # a mean completion loses a quarter of its reward
    )
    shared = ["--seed", seed, "--steps", str(options.steps), "--eval_every", str(options.eval_every)]
    return [*text.split(), *task["options"].split(), *shared, "--keep_checkpoints", "1"]


def run_all(jobs: list[tuple[Path, list[str]]], at_once: int) -> None:
    """Start runs, (folder, arguments), each pinned to one core, when cores become free. Output goes to
    FOLDER.log.
    """
    cores = sorted(os.sched_getaffinity(0))[:at_once]
    busy: dict[int, tuple[Path, subprocess.Popen]] = {}
    queue = [job for job in jobs if not finished(job[0])]
    print(f"{len(jobs) - len(queue)} runs are finished, {len(queue)} to do", flush=True)
    while queue or busy:
        for core in cores:
            if core in busy and busy[core][1].poll() is not None:
                run, process = busy.pop(core)
                state = "done" if process.returncode == 0 else f"FAILED, see {run}.log"
                print(f"{run.parent.name}/{run.name}: {state}", flush=True)
            if core not in busy and queue:
                run, own = queue.pop(0)
                busy[core] = run, _start(run, own, core)
        time.sleep(0.5)


def _start(run: Path, own: list[str], core: int) -> subprocess.Popen:
    place = [
        "--runs_dir",
        str(run.parent.resolve()),
        "--name",
        run.name,
        "--resume",
        "auto",
        "--device",
        "cpu",
    ]
    with Path(f"{run}.log").open("w") as log:
        return subprocess.Popen(
            torchrun(1, "train.py", *own, *place),
            cwd=ROOT,
            stdout=log,
            stderr=log,
            preexec_fn=lambda: os.sched_setaffinity(0, {core}),
        )


def draw(rows: dict[str, dict], path: Path) -> str:
    """Draw accuracy over mean tokens at temperature 1 during training, a line per method, means over seeds.

    Returns the path of the figure, or a text about the missing package.
    """
    try:
        from matplotlib.figure import Figure
        from matplotlib.ticker import PercentFormatter
    except ImportError:
        return "none, it needs matplotlib: pip install 'thinkrl[report]'"
    drawing = Figure(figsize=(7.2, 4.4), layout="constrained")
    axes = drawing.subplots()
    ends = []
    for i, (name, row) in enumerate(rows.items()):
        _, accuracy, tokens = zip(*row["curve"])
        (line,) = axes.plot(tokens, accuracy, color=COLOURS[i % len(COLOURS)], linewidth=2)
        axes.plot(tokens[1:-1], accuracy[1:-1], "o", color=line.get_color(), markersize=4)
        axes.plot(tokens[-1], accuracy[-1], "o", color=line.get_color(), markersize=8)
        ends.append((accuracy[-1], tokens[-1], name, line.get_color()))
    axes.plot(tokens[0], accuracy[0], "o", color="white", markeredgecolor="#5b5f66", markersize=9, zorder=3)
    axes.annotate(
        "before training", (tokens[0], accuracy[0]), (9, -4), textcoords="offset points", color="#5b5f66"
    )
    gap, above = 0.035 * (axes.get_ylim()[1] - axes.get_ylim()[0]), float("inf")
    # from above, so that labels do not overlap
    for accuracy, tokens, name, colour in sorted(ends, reverse=True):
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
    tasks, methods, seeds = read_tasks(options.tasks), options.methods.split(","), options.seeds.split(",")
    root = Path(options.runs_dir)
    jobs = []
    for name, task in tasks.items():
        (root / name).mkdir(parents=True, exist_ok=True)
        for seed in seeds:  # all methods of a seed first, so that a stopped comparison is balanced
            for method in methods:
                jobs.append((root / name / f"{method}-{seed}", arguments(method, task, seed, options)))
    run_all(jobs, options.jobs)
    for name in tasks:
        folder = root / name
        measured = {method: measure(method, seeds, folder) for method in methods}
        measured = {method: m for method, m in measured.items() if m}
        if options.against not in measured:
            raise UserError(f"{folder}: no run of {options.against} is finished, see its log")
        rows = compare(measured, options.against)
        write_json(folder / "summary.json", rows)
        text = f"{table(rows, options.against)}\n\n{conclusions(rows, options.against)}\n"
        (folder / "comparison.md").write_text(text)
        drawn = draw(rows, folder / "accuracy_tokens.svg")
        shown = [folder / f"{method}-{seed}" for method, m in measured.items() for seed in m.seeds][:MOST]
        print(f"{name}\n\n{text}\nfigure: {drawn}")
        print(f"report: {write_report(*shown, out=folder / 'report.html')}")


if __name__ == "__main__":
    run_tool("thinkrl.tools.compare", parse, main)

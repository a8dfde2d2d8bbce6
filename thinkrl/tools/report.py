"""Report of runs as one self-contained HTML page: results, curves, completions by token, options.

    python -m thinkrl.tools.report RUN [RUN …] [--steps 1,100-120] [--out FILE.html]

writes RUN/report.html, also for an unfinished run; for several runs, report.html in their common folder. A
RUN is a run of train.py, a folder of chunk.py, or a folder of such folders. Sections without data are left
out.

    reading     contents of the folders               figures     the SVG
    rows        the completions that fit a page      formats     numbers and text
    sections    what each section shows of them
    assets/report.html, report.css, report.js        the page, its looks, and what it does when it is used

Text of models and data is untrusted. The template escapes text, the script only creates text nodes, control
and direction characters are made visible, and the page's security policy allows only its own style sheet and
script, by their hashes, and no request.
"""

from __future__ import annotations

import base64
import hashlib
import json
import os
from dataclasses import dataclass
from pathlib import Path

import jinja2
from markupsafe import Markup

from thinkrl import UserError
from thinkrl.options import asks_for_help, option, parse_as, run_tool
from thinkrl.run.metrics import DEFINITIONS
from thinkrl.tools.figures import importance_by_place, points_of_a_line, run_class, thin
from thinkrl.tools.formats import SHARES, change, duration, number, script_json, visible
from thinkrl.tools.reading import Chains, TrainingRun, open_folders
from thinkrl.tools.rows import annotated_chains, held_out, training_groups
from thinkrl.tools.sections import (
    budgets,
    compared,
    curve_groups,
    frontier,
    lengths,
    levels,
    options,
    rewards,
    round_table,
    tiles,
)

ASSETS = Path(__file__).parent.parent / "assets"
LIMIT = 4_800_000  # bytes of a page at most
MOST = 64  # runs on one page


def write_report(*folders: Path, out: Path | None = None, steps: set[int] | None = None) -> Path:
    """Write the page of these folders and return its path; default: report.html in the folder or above all.

    steps: the logged steps whose completions are shown; None: as many as fit, evenly spread. Raises UserError
    if a folder holds no run, or if there are too many.
    """
    found = open_folders(list(folders))
    if len(found) > MOST:
        raise UserError(
            f"{len(found)} runs are too many for one page, at most {MOST} can be distinguished: name some"
        )
    runs = [run for run in found if isinstance(run, TrainingRun)]
    chains = [folder for folder in found if isinstance(folder, Chains)]
    if out is None:
        above = folders[0] if len(folders) == 1 else os.path.commonpath([Path(f).resolve() for f in folders])
        out = Path(above) / "report.html"
    page = render(runs, chains, steps).encode("utf-8", "replace")  # JSON may contain half of a surrogate pair
    temporary = out.with_name(out.name + ".tmp")
    temporary.write_bytes(page)
    os.replace(temporary, out)
    return out


def render(runs: list[TrainingRun], chains: list[Chains], steps: set[int] | None = None) -> str:
    """Render the page. Completions fill the room that the other sections leave."""
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
        "run_class": run_class,
        "change": change,
        "definitions": DEFINITIONS,
        "tiles": tiles(runs[0]) if len(runs) == 1 else [],
        "compared": [compared(run) for run in runs] if len(runs) > 1 else [],
        "results": [levels(run) for run in runs[:1] if len(runs) == 1 and run.evaluations],
        "rounds": [round_table(run) for run in runs if run.config["preset"] == "longshort"],
        "frontier": frontier(runs),
        "budgets": budgets(runs),
        "curves": curves,
        "importance": importance_by_place([c for f in chains for c in f.items]) if chains else "",
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
    """Completions for the template: `data` for the script, histograms, and the amount left out."""
    lines = {
        key: [
            [list(axis) for axis in zip(*thin(line, points_of_a_line(len(runs))))] for line in metric["lines"]
        ]
        for group in curves["groups"]
        for key, metric in group["metrics"].items()
    }
    data = {"runs": [run.name for run in runs], "shares": sorted(SHARES), "curves": lines}
    room -= len(script_json(data).encode())
    columns, tables, problems = held_out(runs, int(0.4 * room))
    room -= len(script_json(problems).encode())
    shares = len(runs) + len(chains)
    annotated = [
        chain for i, folder in enumerate(chains) for chain in annotated_chains(folder, i, room // shares)
    ]
    room -= len(script_json(annotated).encode())
    groups = [
        group for i, run in enumerate(runs) for group in training_groups(run, i, room // len(runs), steps)
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
    """Format an option's value as it is typed."""
    return json.dumps(value, ensure_ascii=False)


def digest(text: str) -> str:
    """Hash by which a content security policy names an inline script or style sheet."""
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()


def title(runs: list[TrainingRun], chains: list[Chains]) -> str:
    names = [each.name for each in (*runs, *chains)]
    return names[0] if len(names) == 1 else f"{len(names)} runs"


@dataclass(frozen=True)
class Options:
    steps: str = option("", "logged steps whose completions are shown: 1,100-120; empty: as many as fit")
    out: str = option("", "file to write; empty: report.html in the run's folder, or above the runs")


def parse(argv: list[str]) -> tuple[list[Path], Options]:
    """`RUN [RUN …] [--key value …]`. Raises UserError."""
    usage = "python -m thinkrl.tools.report RUN [RUN …] [--key value …]"
    first = next((i for i, word in enumerate(argv) if word.startswith("-")), len(argv))
    if not first and not asks_for_help(argv):
        raise UserError(f"which runs? usage: {usage}")
    return [Path(word) for word in argv[:first]], parse_as(Options, argv[first:], usage)


def step_set(text: str) -> set[int] | None:
    """Parse "1,100-120" to a set of steps; None for "". Raises UserError."""
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


def main(folders: list[Path], options: Options) -> None:
    out = Path(options.out) if options.out else None
    print(write_report(*folders, out=out, steps=step_set(options.steps)))


if __name__ == "__main__":
    run_tool("thinkrl.tools.report", parse, lambda parsed: main(*parsed))

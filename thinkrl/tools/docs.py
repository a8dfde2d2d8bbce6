"""Make docs/options.md and docs/metrics.md from the code. `make docs`

python -m thinkrl.tools.docs
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from typing import Any

from thinkrl.config import (
    LENGTH_VALUES,
    METHOD_VALUES,
    PRESETS,
    PROFILE_VALUES,
    Config,
    preset_values,
    readers,
)
from thinkrl.config.aliases import ELSEWHERE
from thinkrl.options import groups, requirement, shown
from thinkrl.run.folder import ROOT
from thinkrl.run.metrics import DEFINITIONS


def options_page() -> str:
    """Make docs/options.md: options of train.py, values of presets and profiles, names in TRL and verl."""
    parts = [
        "# Options of train.py",
        "Made from the code by `make docs`; do not edit. `train.py PRESET --help` shows the options of one "
        "preset.",
        table(["preset", "what it trains"], [[f"`{name}`", text] for name, text in PRESETS.items()]),
        "Where a value comes from, later wins: the default below, the preset, the embedded model's own "
        "values (with\n`--model tiny`), `--profile`, the command line. An option that a preset does not read "
        "is refused. The\n`config.json` of a run holds the resolved values.",
    ]
    for heading, fields in groups(Config):
        if heading.title:
            rows = [[f"`--{f.name}`", code(f.default), read_by(f.name), meaning(f)] for f in fields]
            parts += [f"## {heading.title}", table(["option", "default", "read by", "meaning"], rows)]
    profiles = [[f"`{name}`", sets(values)] for name, values in PROFILE_VALUES.items() if name]
    parts += [
        "## Values that presets set",
        "Where the embedded model has its own, it follows in brackets.",
        table(["option", *PRESETS], preset_rows()),
        "## Profiles of l2t",
        table(["`--profile`", "sets"], profiles),
        "## Methods of l2t",
        table(
            ["`--method`", "sets"],
            [[f"`{name}`", sets(values)] for name, values in METHOD_VALUES.items() if name],
        ),
        "## Methods of --length",
        "What `--length` sets, and so the options that the method reads; those without a value must be "
        "given.",
        table(
            ["`--length`", "sets"],
            [[f"`{name}`", sets(values, required=(0, ""))] for name, values in LENGTH_VALUES.items() if name],
        ),
        "## What other libraries call it",
        table(["here", "TRL", "verl"], [[cell and f"`{cell}`" for cell in row] for row in ELSEWHERE]),
    ]
    return "\n\n".join(parts) + "\n"


def sets(values: dict[str, Any], required: tuple = ()) -> str:
    """Format options with the values that a name sets. required: values that mean "must be given"."""
    parts = [f"--{key}" if value in required else f"--{key} {shown(value)}" for key, value in values.items()]
    return ", ".join(f"`{part}`" for part in parts)


def metrics_page() -> str:
    """Make docs/metrics.md: every key of metrics.jsonl, and values in a healthy run."""
    return "\n\n".join(
        [
            "# Metrics",
            "Made from the code by `make docs`; do not edit.",
            "The keys of `runs/NAME/metrics.jsonl`, one line per optimizer step. Means are over the whole "
            "step and all\nranks. A meaning that begins with the name of a preset is logged by that preset "
            "only.",
            table(["key", "meaning"], [[f"`{key}`", text] for key, text in DEFINITIONS.items()]),
            "Healthy: `mismatch` below 1e-5 in float32 and 1e-2 in bfloat16; `clip_fraction` 0 with one "
            "update per\nrollout; `entropy` falling slowly, not to 0 in the first steps; `zero_groups` well "
            "below 1; `truncated`\nnear 0.\n",
        ]
    )


def preset_rows() -> Iterable[list[str]]:
    """Make a row for each option that a preset sets, with a cell per preset, empty if it does not read it."""
    values = {name: (preset_values(name), preset_values(name, tiny=True)) for name in PRESETS}
    for f in dataclasses.fields(Config):
        readers_of = readers(f.name) if f.metadata else ()
        if any(f.name in values[name][1] for name in readers_of):
            cells = []
            for name in PRESETS:
                default, tiny = (code(own.get(f.name, f.default)) for own in values[name])
                cell = default if tiny == default else f"{default} ({tiny or 'empty'})"
                cells.append(cell if name in readers_of else "")
            yield [f"`--{f.name}`", *cells]


def read_by(key: str) -> str:
    presets = readers(key)
    others = [name for name in PRESETS if name not in presets]
    return ", ".join(presets) if len(others) > 1 else f"all but {others[0]}" if others else "all"


def meaning(f: dataclasses.Field) -> str:
    return "; ".join(part for part in (f.metadata["help"], requirement(f)) if part)


def code(value: Any) -> str:
    return "" if value == "" else f"`{shown(value)}`"


def table(head: list[str], rows: Iterable[list[str]]) -> str:
    escaped = [[cell.replace("|", "\\|") for cell in row] for row in rows]
    return "\n".join(f"| {' | '.join(row)} |" for row in [head, ["---"] * len(head), *escaped])


PAGES = {"options.md": options_page, "metrics.md": metrics_page}

if __name__ == "__main__":
    for name, page in PAGES.items():
        (ROOT / "docs" / name).write_text(page())

"""The texts of --help."""

from __future__ import annotations

import textwrap

from thinkrl.config.fields import DEFAULT_PRESET, PRESETS, Config, readers
from thinkrl.config.values import preset_values
from thinkrl.options import groups, help_line

USAGE = "usage: torchrun --nproc_per_node=N train.py"


def overview() -> str:
    """Text of train.py --help: the presets, and the names of the options."""
    lines = [f"{USAGE} [PRESET] [--key value …]", "", "PRESET is one of"]
    lines += [
        f"  {name:<10} {text}{' (default)' if name == DEFAULT_PRESET else ''}"
        for name, text in PRESETS.items()
    ]
    for heading, fields in groups(Config):
        if not heading.title:  # the preset
            continue
        names = " ".join(f"--{f.name}" for f in fields)
        lines += [
            "",
            f"{heading.title}:",
            *textwrap.wrap(names, 100, initial_indent="  ", subsequent_indent="  "),
        ]
    return "\n".join(
        [*lines, "", "train.py PRESET --help explains the options of a preset, with the values it uses."]
    )


def preset_help(preset: str) -> str:
    """Text of train.py PRESET --help: the options that the preset reads, with their values."""
    own, tiny = preset_values(preset), preset_values(preset, tiny=True)
    lines = [f"{USAGE} {preset} [--key value …]", "", f"{preset}: {PRESETS[preset]}"]
    lines += [
        "Defaults are those of this preset; tiny: those for the embedded model (--model tiny), where they "
        "differ."
    ]
    for heading, fields in groups(Config):
        read = [f for f in fields if f.name != "preset" and preset in readers(f.name)]
        lines += ["", f"{heading.title}:"] * bool(read)
        for f in read:
            default, small = (values.get(f.name, f.default) for values in (own, tiny))
            lines.append(help_line(f, default, small if small != default else None))
    return "\n".join(lines)

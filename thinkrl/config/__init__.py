"""Options of train.py; `train.py --help` and docs/options.md are made from them.

Where a value comes from, later wins: the field's default < the preset < the embedded model's own small values
(with `--model tiny`) < `--profile`, `--method`, `--length` < the command line. The resolved result is saved
as runs/<name>/config.json.

Read in this order:

    fields     the options: names, defaults, help texts, bounds, and the presets that read them
    values     what presets, profiles and methods set
    checks     contradictions between options
    help       the texts of --help
    aliases    what TRL, verl and others call the same options
    resolve    the command line -> Config
"""

from thinkrl.config.checks import ROLE_OF, schedule, target_range
from thinkrl.config.fields import DEFAULT_PRESET, PRESETS, RL, SAMPLING, Config, as_dict, readers
from thinkrl.config.help import overview, preset_help
from thinkrl.config.resolve import fit_to_context, parse, resolve
from thinkrl.config.values import (
    EMBEDDED_VALUES,
    LENGTH_VALUES,
    METHOD_VALUES,
    PRESET_VALUES,
    PROFILE_VALUES,
    embedded,
    preset_values,
)

__all__ = [
    "DEFAULT_PRESET",
    "EMBEDDED_VALUES",
    "LENGTH_VALUES",
    "METHOD_VALUES",
    "PRESETS",
    "PRESET_VALUES",
    "PROFILE_VALUES",
    "RL",
    "ROLE_OF",
    "SAMPLING",
    "Config",
    "as_dict",
    "embedded",
    "fit_to_context",
    "overview",
    "parse",
    "preset_help",
    "preset_values",
    "readers",
    "resolve",
    "schedule",
    "target_range",
]

"""From the command line to the Config of a run."""

from __future__ import annotations

import dataclasses
from typing import Any

from thinkrl import UserError
from thinkrl.config.aliases import elsewhere
from thinkrl.config.checks import check, require_read, schedule
from thinkrl.config.fields import DEFAULT_PRESET, PRESETS, Config, readers
from thinkrl.config.help import overview, preset_help
from thinkrl.config.values import embedded, preset_values
from thinkrl.options import asks_for_help, nearest, read_options, show_help


def parse(argv: list[str]) -> Config:
    """Parse `[PRESET] [--key value | --key=value | --flag …]` to the resolved Config.

    Raises UserError for options that are unknown, not allowed or contradictory; prints the help and exits 0
    for --help.
    """
    preset, named = DEFAULT_PRESET, bool(argv) and not argv[0].startswith("-")
    if named:
        preset, *argv = argv
        if preset not in PRESETS:
            raise UserError(
                f"no preset '{preset}'{nearest(preset, PRESETS)}: it must be one of {', '.join(PRESETS)}"
            )
    if asks_for_help(argv):
        show_help(preset_help(preset) if named else overview())
    given = read_options(argv, Config, elsewhere)
    return resolve(given.pop("preset", preset), given)


def resolve(preset: str, given: dict[str, Any]) -> Config:
    """Make the Config of a preset and the values given on the command line, and check it."""
    for key in given:
        require_read(preset, key)
    model = (given.get("long") if preset == "longshort" else None) or given.get("model", Config.model)
    named = {key: given.get(key, "") for key in ("profile", "length", "method")}
    values = preset_values(preset, embedded(model), **named)
    if "steps" in given:
        values["epochs"] = 0
    config = Config(**(values | given), preset=preset, given=frozenset(given))
    if preset == "longshort":  # the rounds say how long it takes, and each ends with an evaluation
        rounds = config.rounds.replace(",", "")
        config = dataclasses.replace(
            config,
            rounds=rounds,
            steps=len(schedule(rounds)) * config.steps_per_round,
            eval_every=config.eval_every or config.steps_per_round,
        )
    check(config)
    return config


def fit_to_context(config: Config, context: int) -> tuple[Config, str]:
    """Lower default completion limits to fit a model's context, in tokens. Returns the config, and a line
    about it or "".

    A quarter of the context is for the prompt. The rest is for a completion; with prm, and l2t with --gain
    continue, also for its continuation; with longshort for three turns. A given limit is not changed:
    `require_room` raises an error if it does not fit.
    """
    continued = config.preset == "prm" or config.preset == "l2t" and config.gain == "continue"
    limit = 3 * context // 4 // (3 if config.preset == "longshort" else 2 if continued else 1)
    lowered: dict[str, Any] = {
        key: max(1, limit)
        for key in ("max_tokens", "partner_max_tokens")
        if config.preset in readers(key) and key not in config.given and config[key] > limit
    }
    said = ", ".join(f"--{key} {value} (default {config[key]})" for key, value in lowered.items())
    line = f"{said}: lowered to the model's context of {context} tokens" if said else ""
    return dataclasses.replace(config, **lowered), line

"""Checks of options against each other. `fields` has the bounds of single values."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from thinkrl import UserError
from thinkrl.config.fields import RL, Config, readers
from thinkrl.config.values import LENGTH_VALUES

Refuse = Callable[[Any, str], None]  # (condition, sentence)

NEVER_NEGATIVE = ("", "truncation", "l1_max", "arora_zanette", "laser", "laser_d", "gr3", "priced")  # rewards
ROLE_OF = {"L": "long", "S": "short"}

# Hints for options that a preset does not read.
INSTEAD = {
    ("longshort", "steps"): "its length is --rounds times --steps_per_round",
    ("longshort", "system"): "its system messages are the role prompts, --prompts",
}


def require_read(preset: str, key: str) -> None:
    """Raise UserError for an option that this preset does not read, with a hint."""
    presets, meant = readers(key), INSTEAD.get((preset, key), "")
    if preset in presets:
        return
    if key == "beta" and preset in readers("kl_coef"):
        meant = "TRL's beta is --kl_coef here"
    listed = " and ".join([", ".join(presets[:-1]), presets[-1]][-len(presets) :])
    raise UserError(f"--{key} is read by {listed}, not by {preset}{meant and f': {meant}'}")


def check(config: Config) -> None:
    """Raise UserError for options that contradict each other."""

    def refuse(when: Any, sentence: str) -> None:
        if when:
            raise UserError(sentence)

    refuse(
        config.preset in RL and config.group_size == 1,
        f"--group_size is 1: {config.preset} compares the completions of a group, use 2 or more",
    )
    for part in (_check_objective, _check_length, _check_credit, _check_penalty, _check_start):
        part(config, refuse)


def _check_penalty(c: Config, refuse: Refuse) -> None:
    """L2T's episodes, gain and compression penalty."""
    if c.preset == "l2t":
        refuse(
            c.gain == "prm" and not c.prm,
            "--gain prm needs --prm PATH, a step reward model made by train.py prm",
        )
        refuse(
            c.temperature != 1 and c.compression not in ("flat", "none"),
            f"--temperature {c.temperature}: the Fisher information in the penalty is that of tokens sampled "
            "at temperature 1; keep it, or use --compression none",
        )
    kind, _, n = c.episodes.partition(":")
    refuse(
        c.episodes not in ("tags", "paragraphs") and not (kind == "fixed" and n.isdigit() and int(n)),
        f"--episodes is '{c.episodes}': it must be tags, paragraphs or fixed:N with N at least 1",
    )


def _check_start(c: Config, refuse: Refuse) -> None:
    """The models and data that a run starts from, and its length."""
    refuse(
        c.epochs and "steps" in c.given,
        f"--steps {c.steps} and --epochs {c.epochs}: one of them says how long sft trains, leave out the "
        "other",
    )
    refuse(c.preset == "sft" and not c.data, "sft needs --data FILE.jsonl or an alpaca JSON list")
    refuse(
        bool(c.long) != bool(c.short),
        "longshort starts from both --long DIR and --short DIR, or, without them, twice from --model",
    )


def _check_objective(c: Config, refuse: Refuse) -> None:
    """Surrogate, importance weights and the divisor of advantages."""
    refuse(
        c.surrogate != "clip" and c.level == "sequence",
        f"--surrogate {c.surrogate} is one of tokens: --level sequence goes with --surrogate clip",
    )
    refuse(
        c.surrogate != "clip" and c.updates_per_rollout == 1,
        f"--surrogate {c.surrogate} does nothing with one update per rollout, where every ratio is 1: use "
        "--updates_per_rollout 2 or more",
    )
    refuse(
        c.surrogate == "sapo" and c.given & {"clip_low", "clip_high"},
        "--surrogate sapo has no clip: leave out --clip_low and --clip_high",
    )
    refuse(
        c.importance_low > c.importance_cap,
        f"--importance_low {c.importance_low} needs --importance_cap, the upper bound of the weights that "
        "are kept",
    )
    refuse(
        c.advantage_std == "mean" and (c.preset in ("l2t", "longshort") or c.length not in NEVER_NEGATIVE),
        f"--advantage_std mean divides by a group's mean reward, which {c.length or c.preset} may make "
        "negative",
    )
    refuse(
        c.advantage_std == "each" and (c.preset != "grpo" or "+" not in c.reward),
        "--advantage_std each is for several rewards of grpo: name them with --reward, joined by +",
    )
    refuse(
        c.advantage_std == "mean" and c.reward != "outcome",
        "--advantage_std mean divides by a group's mean reward, which --reward may make negative",
    )


READ_BY_S_GRPO = ("method", "episodes", "probe_prefix", "probe_suffix")  # of l2t's own options


def _check_credit(c: Config, refuse: Refuse) -> None:
    """L2T's methods and credit."""
    if c.method == "s-grpo":
        own = {key for key in c.given if "l2t" in readers(key) and "grpo" not in readers(key)}
        unread = sorted((own | c.given & {"advantage_std"}) - set(READ_BY_S_GRPO))
        refuse(unread, f"--method s-grpo does not read --{' --'.join(unread)}: leave it out")
        refuse(c.reward != "outcome", "--method s-grpo counts right answers: leave out --reward")
    refuse(
        c.profile and c.method,
        f"--profile {c.profile} and --method {c.method}: choose one, they set the same",
    )
    refuse(
        "credit_lambda" in c.given and c.credit not in ("step", "local"),
        f"--credit_lambda is read by --credit step and local, not by {c.credit}",
    )
    refuse(
        c.gain_scale != "p" and c.gain != "forced",
        f"--gain_scale {c.gain_scale} is one of a forced answer's probability: --gain {c.gain} has none",
    )
    refuse(
        c.preset == "l2t" and c.credit == "to_go" and c.advantage_std not in ("sample", "batch"),
        f"--advantage_std {c.advantage_std}: --credit to_go divides a group by the root mean square of its "
        "tokens' advantages instead, and with batch the whole step; leave it out",
    )
    if c.credit == "local":
        refuse(
            c.reward != "outcome",
            "--credit local takes J, the chance of being right, for what a state is worth: leave out "
            "--reward",
        )
        refuse(
            c.gain == "none" or c.gain_scale != "p",
            "--credit local needs J to be the value of a state: use --gain continue, with --gain_scale p",
        )
        refuse(
            "advantage_std" in c.given and c.advantage_std != "batch",
            "--credit local has one scale for the whole step: leave out --advantage_std",
        )
        refuse(c.released_sum, "--released_sum is not read by --credit local")


def _check_length(c: Config, refuse: Refuse) -> None:
    """Options that the chosen --length does not read, that it needs, or that have no effect."""
    own = {key for values in LENGTH_VALUES.values() for key in values} - {"advantage_std"}
    reads = [key for key in LENGTH_VALUES[c.length] if key in own]
    listed = ", ".join(f"--{key}" for key in reads)
    for key in sorted(c.given & own):
        refuse(
            key not in reads,
            f"--length {c.length} does not read --{key}, it reads {listed}"
            if c.length
            else f"--{key} belongs to a method: choose one with --length",
        )
    for key in reads:
        refuse(not c[key], f"--length {c.length} needs --{key}")
    refuse(
        (c.reward != "outcome" or c.reward_weights) and (c.length or c.dynamic_sampling),
        "--length and --dynamic_sampling go by the graded outcome: leave them out, or --reward and "
        "--reward_weights",
    )
    start = c.length_limit - c.length_cache
    refuse(
        c.length in ("truncation", "laser", "overlong") and start >= c.max_tokens,
        f"--length {c.length} does nothing from {start} tokens on: completions end at --max_tokens "
        f"{c.max_tokens}",
    )
    refuse(
        start < 0, f"--length_cache is {c.length_cache}: it must be at most --length_limit {c.length_limit}"
    )
    if c.length == "gfpo":
        refuse(
            not 2 <= c.length_keep < c.group_size,
            f"--length_keep is {c.length_keep}: gfpo keeps 2 or more, and fewer than --group_size "
            f"{c.group_size}",
        )
        refuse("advantage_std" in c.given, "--length gfpo has its own advantages: leave out --advantage_std")
    if c.length_target:
        target_range(c.length_target)
        refuse("{target}" not in c.length_prompt, "--length_prompt must say {target}, the tokens asked for")


def target_range(text: str) -> tuple[int, int]:
    """Parse --length_target: "100" -> (100, 100), "100:4000" -> (100, 4000). Raises UserError."""
    low, _, high = text.partition(":")
    high = high or low
    if not (low.isdigit() and high.isdigit() and 0 < int(low) <= int(high)):
        raise UserError(f"--length_target is '{text}': it must be N or LOW:HIGH, tokens of at least 1")
    return int(low), int(high)


def schedule(rounds: str) -> list[str]:
    """Parse --rounds to the role that each round trains: "LLS" -> ["long", "long", "short"]. Raises
    UserError.
    """
    unknown = sorted(set(rounds) - set(ROLE_OF))
    if unknown or not rounds:
        raise UserError(
            f"--rounds is '{rounds}': it must be letters L and S"
            + (f", not {', '.join(unknown)}" if unknown else "")
        )
    return [ROLE_OF[letter] for letter in rounds]

"""One flat frozen dataclass holds every option; `train.py --help` is printed from it.

Where a value comes from, later wins: the field's default < the preset < the embedded model's own small values
(when `--model tiny`) < `--profile` < the command line. The resolved result is saved as
runs/<name>/config.json. Nothing here imports torch, so that --help and mistakes answer at once.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
import os
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NoReturn

from thinkrl import UserError

PRESETS = ("l2t", "grpo", "longshort", "sft", "prm")
DEFAULT_PRESET = "l2t"
ROLE_OF = {"L": "long", "S": "short"}


def option(default, help: str, choices: tuple[str, ...] | None = None):
    return field(default=default, metadata={"help": help, "choices": choices})


def group(title: str):
    """A heading in --help: a class attribute that is not a field."""
    return title


@dataclass(frozen=True)
class Config:
    preset = DEFAULT_PRESET  # set by parse(); not an option of its own

    _run = group("run")
    name: str = option("", "name of the run folder; empty: a fresh one from preset and time")
    runs_dir: str = option("runs", "where run folders live")
    seed: int = option(42, "seed of data order and of every sampled token")
    resume: str = option(
        "never", "auto: continue the unfinished run of this configuration | never | PATH of a run folder"
    )
    save_every: int = option(100, "optimizer steps between checkpoints; 0: only at the end")
    keep_checkpoints: int = option(2, "how many step checkpoints stay on disk")
    eval_every: int = option(0, "optimizer steps between held-out evaluations; 0: only before and after")
    log_groups: int = option(1, "groups per step written to samples.jsonl")
    wandb: bool = option(False, "also log to Weights & Biases (extra [wandb])")
    tensorboard: bool = option(False, "also log to TensorBoard (extra [tensorboard])")

    _model = group("model and data")
    model: str = option(
        "tiny", "Hugging Face folder (Qwen2/2.5, Qwen3, Llama 3.x), or 'tiny', the embedded model"
    )
    data: str = option(
        "arith", "'arith' (built in) | FILE.jsonl | FILE.parquet (verl layout) | hub:owner/name"
    )
    eval_data: str = option(
        "", "held-out problems, same forms; empty: arith's own held-out set, else no evaluation"
    )
    eval_problems: int = option(500, "at most this many held-out problems")
    eval_samples: int = option(1, "completions per held-out problem at the sampling temperature")
    system: str = option("", "system message put before every problem that brings none")
    suffix: str = option("", "text appended to every question; empty: the instruction of its grading rule")
    source: str = option("", "grading rule for rows that name none: arith | gsm8k | math")
    device: str = option("auto", "where to compute", ("auto", "cpu", "cuda"))
    dtype: str = option(
        "auto",
        "compute dtype; master weights stay fp32; auto: bfloat16 on CUDA, float32 on CPU",
        ("auto", "float32", "bfloat16"),
    )

    _rollout = group("rollout")
    problems_per_step: int = option(64, "problems per optimizer step, over all ranks (rows for sft and prm)")
    group_size: int = option(8, "completions per problem (G)")
    max_tokens: int = option(2048, "completion length limit")
    temperature: float = option(1.0, "sampling temperature; log-probs are taken at the same temperature")
    top_p: float = option(1.0, "must stay 1: truncated sampling would bias the log-probs that training needs")
    kv_pages: int = option(0, "KV pages of 16 tokens in the sampler; 0: as many as a full step needs, or fit")

    _objective = group("objective")
    advantage_std: str = option("sample", "divisor of group advantages", ("sample", "population", "none"))
    clip_low: float = option(0.2, "lower clip of the ratio, 1 - clip_low")
    clip_high: float = option(0.2, "upper clip of the ratio, 1 + clip_high")
    kl_coef: float = option(0.0, "weight of the k3 KL to the frozen start policy; 0: no reference is held")
    aggregate: str = option(
        "token",
        "mean over tokens | over sequences' token means | sum over problems·G·max_tokens",
        ("token", "sequence", "constant"),
    )
    level: str = option("token", "ratio per token, or one per sequence (GSPO)", ("token", "sequence"))
    updates_per_rollout: int = option(1, "optimizer steps on the same rollout; 1 is exactly on-policy")
    importance_cap: float = option(0.0, "cap of truncated importance weights trainer/sampler; 0: off")
    length_penalty: float = option(
        0.0, "control: price per completion token in the reward of a correct completion"
    )
    episode_price: float = option(0.0, "control: flat price per episode in the reward")

    _optimizer = group("optimizer")
    steps: int = option(500, "optimizer steps")
    lr: float = option(1e-6, "peak learning rate of AdamW")
    schedule: str = option("constant", "after warm-up", ("constant", "cosine"))
    warmup: float = option(0.05, "share of the steps with rising learning rate")
    weight_decay: float = option(0.01, "AdamW weight decay, on matrices only")
    beta1: float = option(0.9, "AdamW")
    beta2: float = option(0.95, "AdamW")
    max_grad_norm: float = option(1.0, "global gradient clip")

    _memory = group("speed and memory")
    micro_batch_tokens: int = option(
        16384, "token budget of one packed row; a longer sample gets a row of its own"
    )
    replicate: int = option(1, "HSDP: number of replicas of the sharded model; 1: plain FSDP")
    activation_checkpointing: bool = option(False, "recompute each block in the backward pass")

    _l2t = group("l2t")
    profile: str = option(
        "",
        "named settings: paper (Alg. 1 to the letter) | code (what the released scripts train) | grpo",
        ("", "paper", "code", "grpo"),
    )
    alpha: float = option(0.8, "weight of the process reward (Eq. 5)")
    beta: float = option(0.6, "weight of the compression penalty inside it (Eq. 3)")
    statistic: str = option(
        "return_sum", "what is normalised in the group", ("return_sum", "token_trunc_mean")
    )
    credit: str = option(
        "uniform",
        "how a completion's advantage is spread over its tokens",
        ("uniform", "guarded", "paper", "to_go"),
    )
    keep: float = option(0.95, "central share that the truncated mean keeps (Alg. 1 l. 13)")
    max_ratio: float = option(10.0, "clip of token reward over completion mean in guarded credit")
    episodes: str = option("tags", "tags | paragraphs | fixed:N")
    gain: str = option(
        "forced",
        "J_k: gold probability of a forced answer | M sampled forced answers | "
        "M continuations to the end | step reward model | 0",
        ("forced", "mc", "continue", "prm", "none"),
    )
    gain_samples: int = option(4, "M of --gain mc and continue")
    probe_prefix: str = option(
        "", "answer-forcing text put before the gold answer; empty: by its grading rule"
    )
    probe_suffix: str = option(
        "", "terminator after the gold answer, part of the probability; empty: by its grading rule"
    )
    prm: str = option("", "folder of the step reward model for --gain prm")
    compression: str = option(
        "diag",
        "C_k: PAC-Bayes with diagonal Fisher | the paper's Eq. 4 as printed | natural step | "
        "drift from the start",
        ("diag", "rank1", "natural", "drift", "none"),
    )
    proxy: str = option(
        "svd",
        "parameters whose gradient the penalty sees: SVD core of the LM head | LM head | last "
        "block's exact layers | a random 30 % of layers (slow: K backwards)",
        ("svd", "lm_head", "last_block", "layers"),
    )
    rank_share: float = option(0.1, "rank of the SVD core as a share of the width, in (0, 1]")
    refresh_every: int = option(50, "optimizer steps between SVD refreshes")
    kappa: float = option(0.05, "what the mean completion pays in total normalised compression")
    fisher_decay: float = option(0.95, "running average of the diagonal Fisher, per step")
    released_sum: bool = option(
        False,
        "as the released code sums: an episode's gain once per token from closing tag to "
        "closing tag, the first one's not at all",
    )
    malformed_penalty: float = option(0.0, "subtracted from the outcome when episode tags are malformed")

    _longshort = group("longshort")
    long: str = option("", "folder of the long-thought policy (L0), from train.py sft")
    short: str = option("", "folder of the short-thought policy (S0)")
    rounds: str = option("LLSLSL", "which role trains in each round")
    steps_per_round: int = option(150, "optimizer steps per round")
    max_turns: int = option(5, "long+short exchanges per conversation")
    rollout: str = option(
        "full",
        "full protocol, or the single exchange that the released code trains",
        ("full", "single_exchange"),
    )
    partner_temperature: float = option(0.3, "sampling temperature of the frozen partner")
    partner_max_tokens: int = option(2048, "completion limit of the frozen partner, per turn")
    format_coef: float = option(1.0, "λ, weight of the format reward (Eq. 9)")
    length_coef: float = option(1.0, "µ at the end of a round; it rises linearly from 0")
    symmetric_length: bool = option(False, "length reward regardless of correctness")
    strict_format: bool = option(False, "the official format check, which rejects every '<'")
    prompts: str = option(
        "", "JSON file with the two role prompts; empty: the model folder's, else the built-in ones"
    )

    def __getitem__(self, key: str):
        return getattr(self, key)


EPISODES_SYSTEM = (
    "Think before you answer. Write all of your thinking between <think> and </think>, divided into numbered episodes, at most 30, "
    "each of them one complete step of reasoning: <think><episode_1>…</episode_1><episode_2>…</episode_2></think>. "
    "Then state the answer."
)

# Fill-ins where the papers are silent are listed in the README under "departures and readings".
PRESET_VALUES: dict[str, dict] = {
    "grpo": dict(),
    "l2t": dict(
        lr=1e-6,
        schedule="cosine",
        warmup=0.1,
        weight_decay=0.01,
        problems_per_step=64,
        group_size=4,
        max_tokens=16384,
        kl_coef=0.001,
        episodes="tags",
        system=EPISODES_SYSTEM,
    ),
    "longshort": dict(
        lr=5e-6,
        schedule="cosine",
        warmup=0.1,
        kl_coef=0.04,
        temperature=0.9,
        group_size=8,
        problems_per_step=96,
        max_tokens=1024,
    ),
    "sft": dict(lr=1e-5, schedule="cosine", warmup=0.1, problems_per_step=64, group_size=1, data=""),
    # l2t's prompt, or it would judge completions that l2t never sees
    "prm": dict(
        lr=1e-5, schedule="cosine", warmup=0.1, problems_per_step=32, group_size=8, system=EPISODES_SYSTEM
    ),
}
_EMBEDDED_RL = dict(
    steps=200,
    problems_per_step=16,
    group_size=8,
    max_tokens=200,
    lr=2e-4,
    warmup=0.05,
    schedule="constant",
    weight_decay=0.0,
    kl_coef=0.0,
    micro_batch_tokens=4096,
    save_every=0,
    rank_share=0.5,
    refresh_every=10,
    system="",
)
EMBEDDED_VALUES: dict[str, dict] = {
    "grpo": _EMBEDDED_RL,
    "l2t": _EMBEDDED_RL,
    # the partner as it is when both are measured; µ small enough that being right outbids being brief
    # (LOG.md)
    "longshort": _EMBEDDED_RL
    | dict(
        steps_per_round=20,
        max_tokens=160,
        partner_max_tokens=160,
        temperature=1.0,
        partner_temperature=1.0,
        length_coef=0.3,
    ),
    "sft": dict(
        steps=300, problems_per_step=64, lr=1e-3, micro_batch_tokens=8192, weight_decay=0.0, save_every=0
    ),
    "prm": _EMBEDDED_RL | dict(steps=100),
}
PROFILE_VALUES: dict[str, dict] = {
    "": {},
    "paper": dict(statistic="token_trunc_mean", credit="paper", compression="rank1", aggregate="sequence"),
    "code": dict(
        alpha=1.0,
        beta=0.0,
        gain="prm",
        compression="none",
        statistic="return_sum",
        credit="uniform",
        released_sum=True,
        malformed_penalty=0.01,
    ),
    "grpo": dict(alpha=0.0, statistic="return_sum", credit="uniform", gain="none", compression="none"),
}


def parse(argv: list[str]) -> Config:
    """`[PRESET] [--key value | --key=value | --flag …]` -> the resolved Config. Dashes and underscores are the same.

    Raises UserError for anything unknown or of the wrong type; prints the help and exits 0 for --help.
    """
    if asks_for_help(argv):
        show_help(help_text())
    preset = DEFAULT_PRESET
    if argv and not argv[0].startswith("-"):
        preset, *argv = argv
        if preset not in PRESETS:
            raise UserError(
                f"unknown preset '{preset}'{nearest(preset, PRESETS)}: choose from {', '.join(PRESETS)}"
            )
    return resolve(preset, read_options(argv, Config))


def asks_for_help(argv: list[str]) -> bool:
    return "--help" in argv or "-h" in argv


def show_help(text: str) -> NoReturn:
    """Print it once, whatever the number of ranks, and exit 0."""
    if os.environ.get("RANK", "0") == "0":
        print(text)
    sys.exit(0)


def exit_with_error(program: str, mistake: Exception, status: int = 2) -> None:
    """One sentence, from rank 0 if it can, no traceback, and the exit status: 2 for a user's mistake."""
    if os.environ.get("RANK", "0") != "0":
        time.sleep(
            30
        )  # rank 0, if it saw the same, speaks and exits; then torchrun ends this rank before it speaks too
    print(f"{program}: {mistake}", file=sys.stderr, flush=True)
    sys.exit(status)


def command_line(program: str, parse: Callable[[list[str]], object] = parse):
    """What the program was started with. Entry points call it before they import torch, so that help comes
    at once.
    """
    try:
        return parse(sys.argv[1:])
    except UserError as mistake:
        exit_with_error(program, mistake)


def resolve(preset: str, given: dict) -> Config:
    """Stack defaults, preset, embedded values, profile and what the user gave; check what can be checked
    without data.
    """
    values = dict(PRESET_VALUES[preset])
    model = (
        given.get("long") or given.get("model", "tiny")
        if preset == "longshort"
        else given.get("model", "tiny")
    )
    if embedded(model):
        values |= EMBEDDED_VALUES[preset]
    values |= PROFILE_VALUES[given.get("profile", "")]
    config = Config(**(values | given))
    if preset == "longshort":  # the rounds say how long it takes, and each ends with an evaluation
        if "steps" in given:
            raise UserError(
                "train.py longshort takes its length from --rounds and --steps_per_round: leave out --steps"
            )
        rounds = config.rounds.replace(",", "")
        length = len(schedule(rounds)) * config.steps_per_round
        config = dataclasses.replace(
            config, rounds=rounds, steps=length, eval_every=config.eval_every or config.steps_per_round
        )
    object.__setattr__(config, "preset", preset)
    _check(config)
    return config


def as_dict(config: Config) -> dict:
    """What config.json holds: the preset and every option."""
    return {"preset": config.preset, **dataclasses.asdict(config)}


def embedded(model: str) -> bool:
    """Whether a checkpoint is the embedded model or descends from it: then its config.json says so."""
    if model == "tiny":
        return True
    try:
        with open(f"{model}/config.json") as file:
            return '"thinkrl_embedded": true' in file.read()
    except OSError:
        return False


def _check(config: Config) -> None:
    """Contradictions that need no file to be seen."""

    def refuse(when: bool, sentence: str) -> None:
        if when:
            raise UserError(sentence)

    require_at_least(
        1,
        config,
        "steps",
        "problems_per_step",
        "group_size",
        "max_tokens",
        "micro_batch_tokens",
        "updates_per_rollout",
        "steps_per_round",
        "max_turns",
        "gain_samples",
        "eval_samples",
        "refresh_every",
        "partner_max_tokens",
        "keep_checkpoints",
        "replicate",
    )
    for key in ("max_grad_norm", "max_ratio"):
        refuse(config[key] <= 0, f"--{key} is {config[key]}, it must be positive")
    for key in (
        "save_every",
        "eval_every",
        "eval_problems",
        "log_groups",
        "kv_pages",
        "lr",
        "weight_decay",
        "clip_high",
        "kl_coef",
        "importance_cap",
        "kappa",
        "malformed_penalty",
    ):
        refuse(config[key] < 0, f"--{key} is {config[key]}, it must not be negative")
    for key in ("warmup", "beta1", "beta2", "fisher_decay", "clip_low"):
        refuse(not 0 <= config[key] <= 1, f"--{key} is {config[key]}, it must be between 0 and 1")
    rl = config.preset in ("grpo", "l2t", "longshort")
    refuse(
        rl and config.group_size == 1 and config.advantage_std != "none",
        "--group_size 1 has no spread to divide by: use --group_size 2 or more, or --advantage_std none",
    )
    refuse(
        config.top_p != 1.0,
        f"--top_p {config.top_p} is refused in training: the log-probs of a truncated "
        "distribution are not the policy's; keep 1, use --temperature",
    )
    refuse(
        rl and config.temperature <= 0,
        f"--temperature {config.temperature}: training samples, it needs a temperature above 0",
    )
    refuse(
        not 0 < config.rank_share <= 1,
        f"--rank_share {config.rank_share} is outside (0, 1]: it is the rank of the "
        "SVD core as a share of the model's width",
    )
    refuse(
        config.gain == "prm" and config.preset == "l2t" and not config.prm,
        "--gain prm needs --prm PATH, a step reward model made by train.py prm",
    )
    refuse(
        config.preset != "grpo" and (config.length_penalty or config.episode_price),
        "--length_penalty and --episode_price are controls: they belong to train.py grpo",
    )
    refuse(config.preset != "l2t" and config.profile, f"--profile {config.profile} is one of train.py l2t")
    refuse(
        config.preset == "l2t" and config.temperature != 1 and config.compression != "none",
        f"--temperature {config.temperature}: the Fisher information behind the penalty is that of tokens sampled at "
        "temperature 1; keep it, or use --compression none",
    )
    refuse(not 0 < config.keep <= 1, f"--keep {config.keep} is outside (0, 1]")
    refuse(
        config.preset == "sft" and not config.data,
        "train.py sft needs --data FILE.jsonl or an alpaca JSON list",
    )
    refuse(
        config.preset == "longshort" and bool(config.long) != bool(config.short),
        "train.py longshort starts from both --long DIR and --short DIR, or, without them, twice from --model",
    )
    name = config.episodes
    refuse(
        name not in ("tags", "paragraphs")
        and not (name.startswith("fixed:") and name[6:].isdigit() and int(name[6:])),
        f"--episodes {name}: choose tags, paragraphs or fixed:N with N at least 1",
    )


def require_at_least(least: int, options: object, *keys: str) -> None:
    """Raise UserError for the first of these options that is less, or no number. Shared by all entry
    points.
    """
    for key in keys:
        value = getattr(options, key)
        if not value >= least:
            raise UserError(f"--{key} is {value}, it must be {f'at least {least}' if least else '0 or more'}")


def schedule(rounds: str) -> list[str]:
    """The role that each round of longshort trains: "LLS" -> ["long", "long", "short"]. UserError for
    another letter, or none.
    """
    unknown = sorted(set(rounds) - set(ROLE_OF))
    if unknown or not rounds:
        raise UserError(
            f"--rounds {rounds!r}: {'unknown letter ' + ', '.join(unknown) if unknown else 'empty'}; "
            "L trains the long role, S the short one"
        )
    return [ROLE_OF[letter] for letter in rounds]


def read_options(argv: list[str], schema: type) -> dict:
    """Parse `--key value` pairs against a dataclass whose fields were made by option(). Shared by all
    entry points.
    """
    fields = {f.name: f for f in dataclasses.fields(schema)}
    given: dict = {}
    queue = list(argv)
    while queue:
        word = queue.pop(0)
        if not word.startswith("--"):
            raise UserError(f"unexpected argument '{word}': options are written --key value")
        key, equals, text = word[2:].partition("=")
        key = key.replace("-", "_")
        if key not in fields:
            raise UserError(f"unknown option '--{key}'{nearest(key, fields)}: see --help")
        f = fields[key]
        if not equals:
            if _type(f) == "bool" and (not queue or queue[0].startswith("--")):
                text = "true"
            elif not queue:
                raise UserError(f"option '--{key}' needs a value")
            else:
                text = queue.pop(0)
        given[key] = _value(f, text)
    return given


def _type(f: dataclasses.Field) -> str:
    return f.type if isinstance(f.type, str) else f.type.__name__


def _value(f: dataclasses.Field, text: str):
    choices = f.metadata["choices"]
    if choices and text not in choices:
        raise UserError(
            f"--{f.name} '{text}' is unknown{nearest(text, choices)}: choose from "
            f"{', '.join(c for c in choices if c)}"
        )
    try:
        if _type(f) == "bool":
            return {"true": True, "1": True, "yes": True, "false": False, "0": False, "no": False}[
                text.lower()
            ]
        value = {"int": int, "float": float, "str": str}[_type(f)](text)
        if _type(f) == "float" and not math.isfinite(value):
            raise ValueError
        return value
    except (ValueError, KeyError):
        raise UserError(f"--{f.name} expects {_type(f)}, got '{text}'") from None


def nearest(word: str, known) -> str:
    """' (did you mean X?)' or ''."""
    match = difflib.get_close_matches(word, [k for k in known if k], n=1, cutoff=0.5)
    return f" (did you mean '{match[0]}'?)" if match else ""


def help_text() -> str:
    lines = [
        "usage: torchrun --nproc_per_node=N train.py [PRESET] [--key value …]",
        "",
        f"PRESET: {' | '.join(PRESETS)}   (default {DEFAULT_PRESET})",
        "Defaults below are the fields' own; a preset, the embedded model and a profile set others. A run's config.json says",
        "what it resolved.",
    ]
    return "\n".join(lines + options_help(Config))


def options_help(schema: type) -> list[str]:
    """One line per option, under its group's heading, from the dataclass itself."""
    lines: list[str] = []
    fields = {f.name: f for f in dataclasses.fields(schema)}
    for name, value in vars(schema).items():
        if name.startswith("_") and not name.startswith("__") and isinstance(value, str):
            lines += ["", f"{value}:"]
        if name in fields:
            f = fields[name]
            choices = (
                f"  [{'|'.join(c for c in f.metadata['choices'] if c)}]" if f.metadata["choices"] else ""
            )
            shown = repr(f.default) if isinstance(f.default, str) else f.default
            lines.append(
                f"  --{name} {_type(f).upper()}".ljust(36)
                + f"{f.metadata['help']}{choices} (default {shown})"
            )
    return lines

"""Every option of train.py, as one flat frozen dataclass; `train.py --help` and docs/options.md are made from it.

Where a value comes from, later wins: the field's default < the preset < the embedded model's own small values
(when `--model tiny`) < `--profile` < the command line. The resolved result is saved as
runs/<name>/config.json.
"""

from __future__ import annotations

import dataclasses
import textwrap
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from thinkrl import UserError
from thinkrl.aliases import elsewhere
from thinkrl.options import asks_for_help, group, groups, help_line, nearest, option, read_options, show_help

PRESETS = {
    "l2t": "GRPO with a reward per episode: information gain minus a compression penalty (arXiv 2505.10425)",
    "grpo": "the baseline: one reward per completion, compared within its group",
    "longshort": "two policies that write one answer in turns and are trained in turns (arXiv 2505.11827)",
    "sft": "supervised fine-tuning: next-token loss on the completions of rows",
    "prm": "a step reward model from Monte Carlo labels, for the gain of l2t",
}
DEFAULT_PRESET = "l2t"
RL = ("grpo", "l2t", "longshort")
SAMPLING = (*RL, "prm")
ROLE_OF = {"L": "long", "S": "short"}


@dataclass(frozen=True)
class Config:
    preset: str = option(DEFAULT_PRESET, "what is trained, and how", tuple(PRESETS), presets=tuple(PRESETS))
    given: frozenset[str] = frozenset()  # options set on the command line; not an option

    _run = group("Run", tuple(PRESETS))
    name: str = option("", "name of the run folder; empty: a new one from preset and time")
    runs_dir: str = option("runs", "parent of the run folders")
    seed: int = option(42, "seed of the data order and of every sampled token")
    resume: str = option(
        "never", "auto: continue the unfinished run with the same options | never | PATH of a run folder"
    )
    save_every: int = option(100, "optimizer steps between checkpoints; 0: only at the end", low=0)
    save_minutes: float = option(
        0.0,
        "also a checkpoint after the step at which so many minutes have passed since the last; 0: none",
        low=0,
    )
    keep_checkpoints: int = option(2, "checkpoints kept on disk", low=1)
    keep_optimizer: bool = option(
        False, "keep the sharded weights and optimizer states of a finished run, which only a resume reads"
    )
    save_dtype: str = option(
        "auto", "dtype of the exported weights; auto: the compute dtype", ("auto", "float32", "bfloat16")
    )
    push_to_hub: str = option("", "owner/name: upload the finished policy to the hub (extra [hub])")
    eval_every: int = option(
        0, "optimizer steps between evaluations; 0: only before and after training", low=0, presets=RL
    )
    log_groups: int = option(1, "groups per step written to samples.jsonl", low=0, presets=RL)
    report_every: int = option(
        20, "optimizer steps between new versions of report.html; 0: only at evaluations", low=0
    )
    strict: bool = option(
        False,
        "stop with status 1, in place of a warning, when the log-probs of sampler and trainer differ by more in the mean "
        "than rounding explains: 16 (ε + √width ε₃₂) / min(1, temperature), ε of the compute dtype and ε₃₂ of float32, in "
        "which sums are taken; 0.125 in bfloat16",
        presets=RL,
    )
    wandb: bool = option(False, "also log to Weights & Biases (extra [wandb])")
    wandb_project: str = option("thinkrl", "project that --wandb logs to")
    tensorboard: bool = option(False, "also log to TensorBoard (extra [tensorboard])")

    _model = group("Model and data", tuple(PRESETS))
    model: str = option(
        "tiny",
        "Hugging Face folder (Qwen2/2.5, Qwen3, Llama 3.x), owner/name[@revision] of the hub (extra [hub]), or 'tiny', "
        "the embedded model",
    )
    data: str = option(
        "arith",
        "arith (built in) | gym:TASK[,key=value…] (extra [gym]) | FILE.jsonl, .json, .csv or .parquet | "
        "hub:owner/name[:config][:split]; several joined by +",
    )
    data_weights: str = option(
        "", "share of a step for each of several in --data, such as 3,1; empty: their rows are one list"
    )
    columns: str = option(
        "", "which column holds what, for a layout of your own: problem=NAME,answer=NAME,context=NAME"
    )
    skip_bad_rows: bool = option(False, "leave out rows that cannot be used, and say how many")
    eval_data: str = option(
        "", "held-out problems, same forms; empty: the held-out set of arith, else no evaluation", presets=RL
    )
    eval_problems: int = option(500, "number of held-out problems, at most", low=0, presets=RL)
    eval_samples: int = option(
        1, "completions per held-out problem, at the sampling temperature", low=1, presets=RL
    )
    eval_budgets: int = option(
        0,
        "also the accuracy with thinking cut off at so many parts of --max_tokens and the answer forced; 0: none",
        low=0,
        presets=("grpo", "l2t"),
    )
    system: str = option("", "system message for problems whose row has none", presets=("grpo", "l2t", "prm"))
    suffix: str = option(
        "", "text appended to every question; empty: the instruction of its grading rule", presets=SAMPLING
    )
    source: str = option(
        "",
        "grading rule, whatever rows name: arith | gsm8k | last_number | math; empty: the row's own",
        presets=SAMPLING,
    )
    device: str = option("auto", "device", ("auto", "cpu", "cuda"))
    dtype: str = option(
        "auto",
        "compute dtype, master weights are float32 always; auto: bfloat16 on CUDA, float32 on CPU",
        ("auto", "float32", "bfloat16"),
    )

    _rollout = group("Rollout", SAMPLING)
    problems_per_step: int = option(
        64, "problems (sft: rows) per optimizer step, over all ranks", low=1, presets=tuple(PRESETS)
    )
    group_size: int = option(8, "completions per problem (G)", low=1)
    max_tokens: int = option(2048, "completion length limit, in tokens", low=1)
    temperature: float = option(
        1.0, "sampling temperature; log-probs are taken at the same temperature", above=0
    )
    max_rows: int = option(256, "completions that a rank decodes at the same time", low=1)
    cuda_graphs: bool = option(
        True, "replay the decode step as a CUDA graph; false: launch its kernels one by one"
    )
    kv_pages: int = option(
        0, "KV pages of 16 tokens in the sampler; 0: as many as a step needs or memory holds", low=0
    )

    reward: str = option(
        "outcome",
        "what a completion is worth: outcome (graded, 1 or 0), a function written for TRL or verl as module:function, "
        "or several joined by +",
        presets=("grpo", "l2t"),
    )
    reward_weights: str = option(
        "", "one number for each of --reward, such as 1,0.2; empty: 1 each", presets=("grpo", "l2t")
    )

    _objective = group("Objective", RL)
    advantage_std: str = option(
        "sample",
        "what divides a group's advantages: its standard deviation | with G for G - 1 | nothing | one standard deviation "
        "for the whole step (DLER) | the group's mean (MaxRL; grpo only) | that of each of several --reward, then the step's "
        "of their weighted sum (GDPO; grpo only)",
        ("sample", "population", "none", "batch", "mean", "each"),
    )
    surrogate: str = option(
        "clip",
        "what the loss does with a ratio other than 1: clip it | bound its weight on the log-prob | a smooth gate | mask by "
        "the change of probability",
        ("clip", "cispo", "sapo", "dppo"),
    )
    clip_low: float = option(
        0.2, "ε of the lower clip of the ratio, 1 - ε; dppo: the largest fall of a probability", low=0, high=1
    )
    clip_high: float = option(
        0.2, "ε of the upper clip of the ratio, 1 + ε; dppo: the largest rise of a probability", low=0
    )
    kl_coef: float = option(
        0.0, "weight of the k3 KL to the reference, the start policy; 0: no reference is held", low=0
    )
    aggregate: str = option(
        "token",
        "loss is a mean over tokens | over sequences' token means | a sum over problems·G·max_tokens",
        ("token", "sequence", "constant"),
    )
    level: str = option("token", "ratio per token, or one per sequence (GSPO)", ("token", "sequence"))
    updates_per_rollout: int = option(1, "optimizer steps per rollout; 1 is exactly on-policy", low=1)
    importance_cap: float = option(
        0.0, "cap of the truncated importance weights trainer/sampler; 0: no weights", low=0
    )
    importance_low: float = option(
        0.0, "above 0: importance weights below it or above the cap are 0 (IcePop), not truncated", low=0
    )
    dynamic_sampling: int = option(
        0,
        "rounds in which groups that are all right or all wrong make place for other problems' (DAPO)",
        low=0,
        presets=("grpo",),
    )

    _length = group("Length", ("grpo",))
    length: str = option(
        "",
        "reward for brevity, docs/methods.md has the formulas; it needs or reads the options below that its row of "
        "docs/options.md lists",
        (
            "",
            "truncation",
            "overlong",
            "l1_exact",
            "l1_max",
            "kimi",
            "arora_zanette",
            "laser",
            "laser_d",
            "shorter_better",
            "gfpo",
            "gr3",
            "prime_linear",
            "priced",
        ),
    )
    length_limit: int = option(0, "tokens within which an answer counts, or earns its bonus", low=0)
    length_cache: int = option(
        0, "overlong: tokens before the limit over which the penalty grows to 1", low=0
    )
    length_target: str = option(
        "", "tokens that the prompt asks for: N, or LOW:HIGH, from which every problem draws its own"
    )
    length_prompt: str = option("", "text put behind the question, {target} stands for the tokens")
    length_alpha: float = option(0.0, "α of the method, as published if not given", low=0)
    length_beta: float = option(0.0, "β of the method, as published if not given", low=0)
    length_weight: float = option(0.0, "weight of the method's length term, as published if not given", low=0)
    length_keep: int = option(0, "gfpo: attempts of a group that are kept", low=0)
    length_price: float = option(
        0.0, "priced: penalty per token, as a share of a right answer's reward", low=0
    )

    _optimizer = group("Optimizer", tuple(PRESETS))
    steps: int = option(500, "optimizer steps", low=1, presets=("grpo", "l2t", "sft", "prm"))
    epochs: int = option(
        0, "passes over the rows of --data, in place of --steps; 0: --steps says it", low=0, presets=("sft",)
    )
    lr: float = option(1e-6, "peak learning rate of AdamW", low=0)
    schedule: str = option("constant", "learning rate after the warm-up", ("constant", "cosine"))
    warmup: float = option(0.05, "share of the steps with rising learning rate", low=0, high=1)
    weight_decay: float = option(0.01, "AdamW weight decay, on matrices only", low=0)
    beta1: float = option(0.9, "AdamW β₁", low=0, below=1)
    beta2: float = option(0.95, "AdamW β₂", low=0, below=1)
    max_grad_norm: float = option(1.0, "gradients are clipped to this global norm", above=0)

    _memory = group("Speed and memory", tuple(PRESETS))
    micro_batch_tokens: int = option(
        16384,
        "token budget of one packed row; a longer sample gets a row of its own; a default is lowered to the free memory",
        low=1,
    )
    replicate: int = option(1, "HSDP: replicas of the sharded model; 1: plain FSDP", low=1)
    activation_checkpointing: str = option(
        "auto",
        "what the backward pass recomputes, so that it needs no memory: nothing | all of a block | its MLP alone; auto: "
        "the least that lets a step fit in the free memory",
        ("auto", "none", "full", "selective"),
    )
    compile: bool = option(
        False, "compile the trained policy's blocks by torch.compile; the first step waits for the compiler"
    )

    _l2t = group("L2T", ("l2t",))
    profile: str = option(
        "",
        "named settings: paper (Alg. 1 to the letter) | code (what the released scripts train) | grpo",
        ("", "paper", "code", "grpo"),
    )
    method: str = option(
        "",
        "named settings of other papers that the probes measure too, docs/methods.md: mrt | vineppo | igpo | pacr | s-grpo",
        ("", "mrt", "vineppo", "igpo", "pacr", "s-grpo"),
    )
    alpha: float = option(0.8, "α, weight of the process reward (Eq. 5)", low=0)
    beta: float = option(0.6, "β, weight of the compression penalty in the process reward (Eq. 3)", low=0)
    statistic: str = option(
        "return_sum", "what is normalized in the group", ("return_sum", "token_trunc_mean")
    )
    credit: str = option(
        "uniform",
        "what a token's advantage is: the completion's | the same by surprise | Alg. 1 l. 15 as printed | its episode's "
        "return-to-go | its episode's own reward | its episode's change of J, without a group",
        ("uniform", "guarded", "paper", "to_go", "step", "local"),
    )
    credit_lambda: float = option(
        0.0, "λ of step and local credit: an episode gets λ^j of what the j-th after it earns", low=0, high=1
    )
    keep: float = option(
        0.95, "central share of the rewards that the truncated mean keeps (Alg. 1 l. 13)", above=0, high=1
    )
    max_ratio: float = option(
        10.0, "clip of a token's reward over its completion's mean in guarded credit", above=0
    )
    episodes: str = option(
        "tags", "where episodes are split: tags | paragraphs | fixed:N", presets=("l2t", "grpo", "prm")
    )
    gain: str = option(
        "forced",
        "J_k is the gold answer's probability in a forced answer | the accuracy of M sampled forced answers | "
        "of M continuations to the end | a step reward model's score | 0",
        ("forced", "mc", "continue", "prm", "none"),
    )
    gain_scale: str = option(
        "p",
        "J_k of --gain forced: the gold answer's probability p | the geometric mean over its tokens | log p",
        ("p", "geometric", "log"),
    )
    gain_samples: int = option(
        4, "M of --gain mc, --gain continue and prm's labels", low=1, presets=("l2t", "prm")
    )
    probe_prefix: str = option(
        "", "text that forces the answer, put before the gold answer; empty: by its grading rule"
    )
    probe_suffix: str = option(
        "", "terminator after the gold answer, part of the probability; empty: by its grading rule"
    )
    prm: str = option("", "folder of the step reward model of --gain prm")
    compression: str = option(
        "diag",
        "C_k: PAC-Bayes with a diagonal Fisher | the same for a natural gradient step, in any parametrization | "
        "the paper's Eq. 4 as printed | natural gradient step, squared | drift from the start policy | 1, a fixed "
        "penalty β per episode that κ does not scale | 0",
        ("diag", "invariant", "rank1", "natural", "drift", "flat", "none"),
    )
    proxy: str = option(
        "svd",
        "parameters whose gradient the penalty sees: SVD core of the LM head | LM head | exact layers of the "
        "last block | a random 30 % of layers (slow: K backwards)",
        ("svd", "lm_head", "last_block", "layers"),
    )
    rank_share: float = option(0.1, "rank of the SVD core as a share of the model's width", above=0, high=1)
    refresh_every: int = option(50, "optimizer steps between refreshes of the SVD", low=1)
    kappa: float = option(0.05, "κ, the total normalized compression of a completion, in the mean", low=0)
    fisher_decay: float = option(
        0.95, "decay per step of the running average of the diagonal Fisher", low=0, below=1
    )
    released_sum: bool = option(
        False,
        "sum as the released code does: an episode's gain once per token from closing tag to closing tag, "
        "the first episode's not at all",
    )
    malformed_penalty: float = option(
        0.0, "subtracted from the outcome reward of a completion with malformed episode tags", low=0
    )

    _longshort = group("Long⊗Short", ("longshort",))
    long: str = option("", "folder of the long-thought policy (L0), from train.py sft")
    short: str = option("", "folder of the short-thought policy (S0), from train.py sft")
    rounds: str = option("LLSLSL", "which role each round trains: L (long) or S (short)")
    steps_per_round: int = option(150, "optimizer steps per round", low=1)
    max_turns: int = option(5, "exchanges (one long and one short turn) per conversation", low=1)
    rollout: str = option(
        "full",
        "the full protocol, or the single exchange that the released code trains",
        ("full", "single_exchange"),
    )
    partner_temperature: float = option(0.3, "sampling temperature of the frozen partner", low=0)
    partner_max_tokens: int = option(2048, "completion length limit of the frozen partner, per turn", low=1)
    format_coef: float = option(1.0, "λ, weight of the format reward (Eq. 9)", low=0)
    length_coef: float = option(
        1.0, "µ, weight of the length reward at the end of a round; it rises linearly from 0", low=0
    )
    symmetric_length: bool = option(False, "length reward regardless of correctness")
    strict_format: bool = option(False, "the official format check, which rejects every '<'")
    prompts: str = option(
        "",
        "JSON file with the two role prompts; empty: the model folder's, else the built-in ones",
        presets=("longshort", "sft"),
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
    "sft": dict(lr=1e-5, schedule="cosine", warmup=0.1, problems_per_step=64, data="", epochs=3),
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
        epochs=0,
        steps=300,
        problems_per_step=64,
        lr=1e-3,
        micro_batch_tokens=8192,
        weight_decay=0.0,
        save_every=0,
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

# What --method sets, as far as a paper says it; tests/l2t/test_methods.py has each one's own formula.
_NO_PENALTY = dict(beta=0.0, compression="none")
METHOD_VALUES: dict[str, dict] = {
    "": {},
    # 2503.07572: the outcome and 0.2 times how much more often a forced answer is right, per completion
    "mrt": _NO_PENALTY | dict(alpha=0.2, gain="mc", credit="uniform", statistic="return_sum"),
    # 2410.01679: an episode's change of value, by 9 continuations; no group
    "vineppo": _NO_PENALTY | dict(gain="continue", gain_samples=9, credit="local", credit_lambda=0.0),
    # 2510.14967: gains of the geometric mean, normalized with the outcome, summed to the end (γ = 1)
    "igpo": _NO_PENALTY
    | dict(alpha=1.0, gain="forced", gain_scale="geometric", credit="step", credit_lambda=1.0),
    # 2510.22255, by its abstract: the same on log p
    "pacr": _NO_PENALTY | dict(alpha=1.0, gain="forced", gain_scale="log", credit="step", credit_lambda=1.0),
    # 2505.07686: no J at all, the forced answers are trained on; thinkrl/l2t/exits.py
    "s-grpo": _NO_PENALTY | dict(alpha=0.0, gain="none", advantage_std="none"),
}


# What --length sets: the options that a method reads, with its published values; 0 and "" must be given.
LENGTH_VALUES: dict[str, dict] = {
    "": {},
    "truncation": dict(length_limit=0),
    "overlong": dict(length_limit=0, length_cache=0),
    "l1_exact": dict(length_target="", length_prompt=" Think for {target} tokens.", length_alpha=3e-4),
    "l1_max": dict(length_target="", length_prompt=" Think for maximum {target} tokens.", length_alpha=2e-3),
    "kimi": dict(length_weight=1.0),
    "arora_zanette": dict(length_alpha=0.2, advantage_std="none"),
    "laser": dict(length_limit=0, length_weight=0.5),
    "laser_d": dict(length_weight=0.5),
    "shorter_better": dict(length_alpha=2.0, length_beta=1e-3),
    "gfpo": dict(length_keep=0),
    "gr3": dict(length_alpha=0.33),
    "prime_linear": dict(length_weight=0.25, advantage_std="none"),
    "priced": dict(length_price=0.0),
}
NEVER_NEGATIVE = ("", "truncation", "l1_max", "arora_zanette", "laser", "laser_d", "gr3", "priced")  # rewards


# What takes the place of an option that a preset does not read.
INSTEAD = {
    ("longshort", "steps"): "its length is --rounds times --steps_per_round",
    ("longshort", "system"): "its system messages are the role prompts, --prompts",
}


def parse(argv: list[str]) -> Config:
    """`[PRESET] [--key value | --key=value | --flag …]` -> the resolved Config.

    Raises UserError for anything unknown, not allowed or contradictory; prints the help and exits 0 for --help.
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
    """The Config of a preset and the values given on the command line, checked as far as no data is needed."""
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
    _check(config)
    return config


def preset_values(
    preset: str, tiny: bool = False, profile: str = "", length: str = "", method: str = ""
) -> dict[str, Any]:
    """Values that a preset sets, with the embedded model's values if `tiny`, and those of named settings."""
    small = EMBEDDED_VALUES[preset] if tiny else {}
    named = PROFILE_VALUES[profile] | METHOD_VALUES[method] | LENGTH_VALUES[length]
    return PRESET_VALUES[preset] | small | named


def fit_to_context(config: Config, context: int) -> tuple[Config, str]:
    """Lower the completion limits that were not given to what a model's context, in tokens, holds.

    A quarter of the context is kept for the prompt. In the rest there is room for a completion; for prm, and for l2t
    with --gain continue, for its continuation too; for longshort, for three turns. Returns the config, and a line
    that says what was lowered, or "". A limit that was given is left alone: `require_room` refuses it where it does
    not fit.
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


def as_dict(config: Config) -> dict[str, Any]:
    """Content of config.json: the preset and every option."""
    return {f.name: config[f.name] for f in dataclasses.fields(config) if f.metadata}


def embedded(model: str) -> bool:
    """Whether a checkpoint is the embedded model or was trained from it: then its config.json says so."""
    if model == "tiny":
        return True
    try:
        with open(f"{model}/config.json") as file:
            return '"thinkrl_embedded": true' in file.read()
    except OSError:
        return False


def readers(key: str) -> tuple[str, ...]:
    """The presets that read an option."""
    return next(
        f.metadata["presets"] or heading.presets
        for heading, fields in groups(Config)
        for f in fields
        if f.name == key
    )


def require_read(preset: str, key: str) -> None:
    """Raise UserError for an option that this preset would ignore, with what is probably meant."""
    presets, meant = readers(key), INSTEAD.get((preset, key), "")
    if preset in presets:
        return
    if key == "beta" and preset in readers("kl_coef"):
        meant = "TRL's beta is --kl_coef here"
    listed = " and ".join([", ".join(presets[:-1]), presets[-1]][-len(presets) :])
    raise UserError(f"--{key} is read by {listed}, not by {preset}{meant and f': {meant}'}")


def _check(config: Config) -> None:
    """Contradictions between options. What a single value must be stands at its field."""

    def refuse(when: Any, sentence: str) -> None:
        if when:
            raise UserError(sentence)

    c = config
    refuse(
        c.preset in RL and c.group_size == 1,
        f"--group_size is 1: {c.preset} compares the completions of a group, use 2 or more",
    )
    _check_objective(c, refuse)
    _check_length(c, refuse)
    _check_credit(c, refuse)
    refuse(
        c.preset == "l2t" and c.gain == "prm" and not c.prm,
        "--gain prm needs --prm PATH, a step reward model made by train.py prm",
    )
    refuse(
        c.preset == "l2t" and c.temperature != 1 and c.compression not in ("flat", "none"),
        f"--temperature {c.temperature}: the Fisher information in the penalty is that of tokens sampled at "
        "temperature 1; keep it, or use --compression none",
    )
    refuse(
        c.preset == "l2t" and c.credit == "to_go" and c.advantage_std not in ("sample", "batch"),
        f"--advantage_std {c.advantage_std}: --credit to_go divides a group by the root mean square of its tokens' "
        "advantages instead, and with batch the whole step; leave it out",
    )
    refuse(
        c.epochs and "steps" in c.given,
        f"--steps {c.steps} and --epochs {c.epochs}: one of them says how long sft trains, leave out the other",
    )
    refuse(
        (c.reward != "outcome" or c.reward_weights) and (c.length or c.dynamic_sampling),
        "--length and --dynamic_sampling go by the graded outcome: leave them out, or --reward and --reward_weights",
    )
    refuse(
        c.credit == "local" and c.reward != "outcome",
        "--credit local takes J, the chance of being right, for what a state is worth: leave out --reward",
    )
    refuse(c.preset == "sft" and not c.data, "sft needs --data FILE.jsonl or an alpaca JSON list")
    refuse(
        bool(c.long) != bool(c.short),
        "longshort starts from both --long DIR and --short DIR, or, without them, twice from --model",
    )
    kind, _, n = c.episodes.partition(":")
    refuse(
        c.episodes not in ("tags", "paragraphs") and not (kind == "fixed" and n.isdigit() and int(n)),
        f"--episodes is '{c.episodes}': it must be tags, paragraphs or fixed:N with N at least 1",
    )


def _check_objective(c: Config, refuse: Callable[[Any, str], None]) -> None:
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
        f"--importance_low {c.importance_low} needs --importance_cap, the upper bound of the weights that are kept",
    )
    refuse(
        c.advantage_std == "mean" and (c.preset in ("l2t", "longshort") or c.length not in NEVER_NEGATIVE),
        f"--advantage_std mean divides by a group's mean reward, which {c.length or c.preset} may make negative",
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


def _check_credit(c: Config, refuse: Callable[[Any, str], None]) -> None:
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
    if c.credit == "local":
        refuse(
            c.gain == "none" or c.gain_scale != "p",
            "--credit local needs J to be the value of a state: use --gain continue, with --gain_scale p",
        )
        refuse(
            "advantage_std" in c.given and c.advantage_std != "batch",
            "--credit local has one scale for the whole step: leave out --advantage_std",
        )
        refuse(c.released_sum, "--released_sum is not read by --credit local")


def _check_length(c: Config, refuse: Callable[[Any, str], None]) -> None:
    """Options that the chosen --length does not read, does not have, or that would change nothing."""
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
    start = c.length_limit - c.length_cache
    refuse(
        c.length in ("truncation", "laser", "overlong") and start >= c.max_tokens,
        f"--length {c.length} does nothing from {start} tokens on: completions end at --max_tokens {c.max_tokens}",
    )
    refuse(
        start < 0, f"--length_cache is {c.length_cache}: it must be at most --length_limit {c.length_limit}"
    )
    if c.length == "gfpo":
        refuse(
            not 2 <= c.length_keep < c.group_size,
            f"--length_keep is {c.length_keep}: gfpo keeps 2 or more, and fewer than --group_size {c.group_size}",
        )
        refuse("advantage_std" in c.given, "--length gfpo has its own advantages: leave out --advantage_std")
    if c.length_target:
        target_range(c.length_target)
        refuse("{target}" not in c.length_prompt, "--length_prompt must say {target}, the tokens asked for")


def target_range(text: str) -> tuple[int, int]:
    """The tokens that --length_target allows: "100" -> (100, 100), "100:4000" -> (100, 4000). UserError for others."""
    low, _, high = text.partition(":")
    high = high or low
    if not (low.isdigit() and high.isdigit() and 0 < int(low) <= int(high)):
        raise UserError(f"--length_target is '{text}': it must be N or LOW:HIGH, tokens of at least 1")
    return int(low), int(high)


def schedule(rounds: str) -> list[str]:
    """The role that each round of longshort trains: "LLS" -> ["long", "long", "short"]. UserError for
    another letter, or none.
    """
    unknown = sorted(set(rounds) - set(ROLE_OF))
    if unknown or not rounds:
        raise UserError(
            f"--rounds is '{rounds}': it must be letters L and S"
            + (f", not {', '.join(unknown)}" if unknown else "")
        )
    return [ROLE_OF[letter] for letter in rounds]


USAGE = "usage: torchrun --nproc_per_node=N train.py"


def overview() -> str:
    """train.py --help: the presets, and the names of the options."""
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
    """train.py PRESET --help: what the preset reads, with its values."""
    own, tiny = preset_values(preset), preset_values(preset, tiny=True)
    lines = [f"{USAGE} {preset} [--key value …]", "", f"{preset}: {PRESETS[preset]}"]
    lines += [
        "Defaults are those of this preset; tiny: those for the embedded model (--model tiny), where they differ."
    ]
    for heading, fields in groups(Config):
        read = [f for f in fields if f.name != "preset" and preset in readers(f.name)]
        lines += ["", f"{heading.title}:"] * bool(read)
        for f in read:
            default, small = (values.get(f.name, f.default) for values in (own, tiny))
            lines.append(help_line(f, default, small if small != default else None))
    return "\n".join(lines)

"""Every option of train.py, as one flat frozen dataclass."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

from thinkrl.options import group, groups, option

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


@dataclass(frozen=True)
class Config:
    """Options of a run. `config[name]` is the value of an option."""

    preset: str = option(
        DEFAULT_PRESET, "what is trained, by which method", tuple(PRESETS), presets=tuple(PRESETS)
    )
    given: frozenset[str] = frozenset()  # options set on the command line; not an option

    _run = group("Run", tuple(PRESETS))
    name: str = option("", "name of the run folder; empty: a new one from preset and time")
    runs_dir: str = option("runs", "parent of the run folders")
    seed: int = option(42, "seed of the data order and of every sampled token")
    resume: str = option(
        "never", "auto: continue the unfinished run with the same options | never | PATH of a run folder"
    )
    timeout: float = option(
        10.0,
        "minutes without a token, a row of training or a file after which a rank that does not wait for "
        "others is taken for stalled, or without a sign of life for gone: the job ends, and it is named",
        above=0,
    )
    save_every: int = option(100, "optimizer steps between checkpoints; 0: only at the end", low=0)
    save_minutes: float = option(
        0.0, "also save a checkpoint when so many minutes have passed since the last; 0: never", low=0
    )
    keep_checkpoints: int = option(2, "checkpoints kept on disk", low=1)
    keep_optimizer: bool = option(
        False, "keep the sharded weights and optimizer states of a finished run, which only a resume needs"
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
        20, "optimizer steps between updates of report.html; 0: only at evaluations", low=0
    )
    strict: bool = option(
        False,
        "stop with status 1, in place of a warning, when the log-probs of sampler and trainer differ by more "
        "in the mean than rounding explains: 16 (ε + √width ε₃₂) / min(1, temperature), ε of the compute "
        "dtype and ε₃₂ of float32, in which sums are taken; 0.125 in bfloat16",
        presets=RL,
    )
    wandb: bool = option(False, "also log to Weights & Biases (extra [wandb])")
    wandb_project: str = option("thinkrl", "project that --wandb logs to")
    tensorboard: bool = option(False, "also log to TensorBoard (extra [tensorboard])")

    _model = group("Model and data", tuple(PRESETS))
    model: str = option(
        "tiny",
        "Hugging Face folder (Qwen2/2.5, Qwen3, Llama 3.x), owner/name[@revision] of the hub (extra [hub]), "
        "or 'tiny', the embedded model",
    )
    data: str = option(
        "arith",
        "arith (built in) | gym:TASK[,key=value…] (extra [gym]) | FILE.jsonl, .json, .csv or .parquet | "
        "hub:owner/name[:config][:split]; several joined by +",
    )
    data_weights: str = option(
        "", "weights of several parts in --data, such as 3,1; empty: their rows are one list"
    )
    columns: str = option("", "columns of a layout of your own: problem=NAME,answer=NAME,context=NAME")
    skip_bad_rows: bool = option(False, "leave out rows that cannot be used, and print how many")
    eval_data: str = option(
        "", "held-out problems, same forms; empty: the held-out set of arith, else no evaluation", presets=RL
    )
    eval_problems: int = option(500, "number of held-out problems, at most", low=0, presets=RL)
    eval_samples: int = option(
        1, "completions per held-out problem, at the sampling temperature", low=1, presets=RL
    )
    eval_budgets: int = option(
        0,
        "also the accuracy with thinking cut off at so many equal parts of --max_tokens and the answer "
        "forced; 0: none",
        low=0,
        presets=("grpo", "l2t"),
    )
    system: str = option("", "system message for problems whose row has none", presets=("grpo", "l2t", "prm"))
    suffix: str = option(
        "", "text appended to every question; empty: the instruction of its grading rule", presets=SAMPLING
    )
    source: str = option(
        "",
        "grading rule, which overrides the rows': arith | gsm8k | last_number | math; empty: the row's own",
        presets=SAMPLING,
    )
    device: str = option("auto", "device", ("auto", "cpu", "cuda"))
    dtype: str = option(
        "auto",
        "compute dtype, master weights are always float32; auto: bfloat16 on CUDA, float32 on CPU",
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
    max_rows: int = option(256, "number of completions that a rank decodes at the same time", low=1)
    cuda_graphs: bool = option(
        True, "replay the decode step as a CUDA graph; false: launch its kernels one by one"
    )
    kv_pages: int = option(
        0, "KV pages of 16 tokens in the sampler; 0: as many as a step needs or memory holds", low=0
    )

    reward: str = option(
        "outcome",
        "reward of a completion: outcome (graded, 1 or 0), a function in TRL's or verl's form as "
        "module:function, or several joined by +",
        presets=("grpo", "l2t"),
    )
    reward_weights: str = option(
        "", "one number for each of --reward, such as 1,0.2; empty: 1 each", presets=("grpo", "l2t")
    )

    _objective = group("Objective", RL)
    advantage_std: str = option(
        "sample",
        "divisor of a group's advantages: its standard deviation, over G - 1 | over G | none | one standard "
        "deviation for the whole step (DLER) | the group's mean (MaxRL; grpo only) | that of each of several "
        "--reward, then the step's of their weighted sum (GDPO; grpo only)",
        ("sample", "population", "none", "batch", "mean", "each"),
    )
    surrogate: str = option(
        "clip",
        "treatment of ratios other than 1: clip | bound the weight of the log-prob | a smooth gate | mask by "
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
        "the loss is a mean over tokens | over sequences' token means | a sum divided by "
        "problems·G·max_tokens",
        ("token", "sequence", "constant"),
    )
    level: str = option("token", "ratio per token, or one per sequence (GSPO)", ("token", "sequence"))
    updates_per_rollout: int = option(1, "optimizer steps per rollout; 1 is exactly on-policy", low=1)
    importance_cap: float = option(
        0.0, "cap of the truncated importance weights trainer/sampler; 0: no weights", low=0
    )
    importance_low: float = option(
        0.0,
        "above 0: importance weights below it or above the cap are set to 0 (IcePop), not truncated",
        low=0,
    )
    dynamic_sampling: int = option(
        0,
        "rounds in which groups that are all right or all wrong are replaced by other problems' (DAPO)",
        low=0,
        presets=("grpo",),
    )

    _length = group("Length", ("grpo",))
    length: str = option(
        "",
        "reward for brevity; docs/methods.md has the formulas, docs/options.md the options below that each "
        "reads",
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
    length_limit: int = option(0, "number of tokens within which an answer counts, or gets its bonus", low=0)
    length_cache: int = option(
        0, "overlong: tokens before the limit over which the penalty grows to 1", low=0
    )
    length_target: str = option(
        "", "number of tokens that the prompt asks for: N, or LOW:HIGH, drawn for every problem"
    )
    length_prompt: str = option("", "text after the question; {target} is replaced by the number of tokens")
    length_alpha: float = option(0.0, "α of the method, as published if not given", low=0)
    length_beta: float = option(0.0, "β of the method, as published if not given", low=0)
    length_weight: float = option(0.0, "weight of the method's length term, as published if not given", low=0)
    length_keep: int = option(0, "gfpo: number of attempts of a group that are kept", low=0)
    length_price: float = option(
        0.0, "priced: penalty per token, as a share of a right answer's reward", low=0
    )

    _optimizer = group("Optimizer", tuple(PRESETS))
    steps: int = option(500, "optimizer steps", low=1, presets=("grpo", "l2t", "sft", "prm"))
    epochs: int = option(
        0, "passes over the rows of --data, instead of --steps; 0: use --steps", low=0, presets=("sft",)
    )
    lr: float = option(1e-6, "peak learning rate of AdamW", low=0)
    schedule: str = option("constant", "learning rate after the warm-up", ("constant", "cosine"))
    warmup: float = option(0.05, "share of the steps in which the learning rate rises", low=0, high=1)
    weight_decay: float = option(0.01, "AdamW weight decay, on matrices only", low=0)
    beta1: float = option(0.9, "AdamW β₁", low=0, below=1)
    beta2: float = option(0.95, "AdamW β₂", low=0, below=1)
    max_grad_norm: float = option(1.0, "gradients are clipped to this global norm", above=0)

    _memory = group("Speed and memory", tuple(PRESETS))
    micro_batch_tokens: int = option(
        16384,
        "token budget of one packed row; a longer sample gets a row of its own; the default is lowered to "
        "fit the memory",
        low=1,
    )
    replicate: int = option(1, "HSDP: replicas of the sharded model; 1: plain FSDP", low=1)
    activation_checkpointing: str = option(
        "auto",
        "what the backward pass recomputes to save memory: nothing | a whole block | its MLP; auto: the "
        "least that lets a step fit in the free memory",
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
        "named settings of other papers that use probes, see docs/methods.md: mrt | vineppo | igpo | pacr | "
        "s-grpo",
        ("", "mrt", "vineppo", "igpo", "pacr", "s-grpo"),
    )
    alpha: float = option(0.8, "α, weight of the process reward (Eq. 5)", low=0)
    beta: float = option(0.6, "β, weight of the compression penalty in the process reward (Eq. 3)", low=0)
    statistic: str = option(
        "return_sum", "statistic that is normalised in the group", ("return_sum", "token_trunc_mean")
    )
    credit: str = option(
        "uniform",
        "advantage of a token: the completion's | weighted by surprise | Alg. 1 l. 15 as printed | its "
        "episode's return-to-go | its episode's reward | its episode's change of J, without a group",
        ("uniform", "guarded", "paper", "to_go", "step", "local"),
    )
    credit_lambda: float = option(
        0.0,
        "λ of step and local credit: an episode gets λ^j of the reward of the j-th after it",
        low=0,
        high=1,
    )
    keep: float = option(
        0.95, "central share of the rewards that the truncated mean keeps (Alg. 1 l. 13)", above=0, high=1
    )
    max_ratio: float = option(
        10.0, "bound of a token's reward relative to its completion's mean in guarded credit", above=0
    )
    episodes: str = option(
        "tags", "where episodes are split: tags | paragraphs | fixed:N", presets=("l2t", "grpo", "prm")
    )
    gain: str = option(
        "forced",
        "J_k is the gold answer's probability in a forced answer | the accuracy of M sampled forced answers "
        "| of M continuations to the end | a step reward model's score | 0",
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
        "", "text that forces the answer, before the gold answer; empty: by its grading rule"
    )
    probe_suffix: str = option(
        "", "terminator after the gold answer, part of the probability; empty: by its grading rule"
    )
    prm: str = option("", "folder of the step reward model of --gain prm")
    compression: str = option(
        "diag",
        "C_k: PAC-Bayes with a diagonal Fisher | the same for a natural gradient step | "
        "the paper's Eq. 4 as printed | natural gradient step, squared | drift from the start policy | 1, a "
        "fixed penalty β per episode that κ does not scale | 0",
        ("diag", "invariant", "rank1", "natural", "drift", "flat", "none"),
    )
    proxy: str = option(
        "svd",
        "parameters whose gradient enters the penalty: SVD core of the LM head | LM head | exact layers of "
        "the last block | a random 30 % of layers (slow: K backwards)",
        ("svd", "lm_head", "last_block", "layers"),
    )
    rank_share: float = option(0.1, "rank of the SVD core as a share of the model's width", above=0, high=1)
    refresh_every: int = option(50, "optimizer steps between refreshes of the SVD", low=1)
    kappa: float = option(0.05, "κ, the mean total normalised compression of a completion", low=0)
    fisher_decay: float = option(
        0.95, "decay per step of the running average of the diagonal Fisher", low=0, below=1
    )
    released_sum: bool = option(
        False,
        "sum as the released code does: an episode's gain once per token between closing tags, none for the "
        "first episode",
    )
    malformed_penalty: float = option(
        0.0, "subtracted from the outcome reward of a completion with malformed episode tags", low=0
    )

    _longshort = group("Long⊗Short", ("longshort",))
    long: str = option("", "folder of the long-thought policy (L0), from train.py sft")
    short: str = option("", "folder of the short-thought policy (S0), from train.py sft")
    rounds: str = option("LLSLSL", "roles that the rounds train: L (long) or S (short)")
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


def as_dict(config: Config) -> dict[str, Any]:
    """Make the content of config.json: the preset and every option."""
    return {f.name: config[f.name] for f in dataclasses.fields(config) if f.metadata}


def readers(key: str) -> tuple[str, ...]:
    """Presets that read an option."""
    return next(
        f.metadata["presets"] or heading.presets
        for heading, fields in groups(Config)
        for f in fields
        if f.name == key
    )

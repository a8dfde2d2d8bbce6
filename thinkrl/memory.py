"""Memory of training: formulas, and the choice of options that fit.

parameters, activation_bytes, update_bytes    formulas of docs/gpu.md; `python -m thinkrl.tools.plan` prints
                                              results
fit_to_memory                                 chooses activation checkpointing and row size by the free memory

Letters: P parameters, N ranks that share them, L layers, D width, F MLP width, H and Hk query and key-value
heads of Dh dimensions, V vocabulary, T tokens of a packed row, b bytes of the compute dtype.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from kernels.logprob import CHUNK, CPU_CHUNK, CPU_LOGITS
from thinkrl.config import SAMPLING, Config
from thinkrl.model import ModelConfig

CHECKPOINTING = ("none", "selective", "full")  # from the most memory to the least
SHARE = 0.8  # of the free memory; the rest is for fragmentation and memory without a formula
FEWEST_TOKENS = 4096  # of a row: shorter rows are bound by reading weights, so checkpointing comes first
SMALLEST = 1024


@dataclass(frozen=True)
class Setting:
    """Settings that a rank's memory depends on, besides the model and the row."""

    ranks: int = 1  # N, which share weights, gradients and moments
    policies: int = 1  # 2 under longshort
    reference: bool = False
    sampler: bool = True
    b: int = 2
    cuda: bool = True


def parameters(c: ModelConfig) -> tuple[int, int]:
    """Number of parameters of a block, and of embedding, final norm and head together."""
    qkv = (c.heads + 2 * c.kv_heads) * c.head_dim
    block = c.width * (qkv + c.heads * c.head_dim + 3 * c.mlp_width + 2)
    block += qkv * c.qkv_bias + 2 * c.head_dim * c.qk_norm
    return block, c.vocab_size * c.width * (1 if c.tied else 2) + c.width


def activation_bytes(c: ModelConfig, checkpointing: str = "none", b: int = 2, cuda: bool = True) -> int:
    """Bytes of activations for the backward pass, per token and layer.

    MLP 4 F (gate, up, SiLU, product), residual and norms 4 D, attention (2 H + 2 Hk) Dh, in b bytes each;
    log-sum-exp and statistics of norms in fp32; norms of q and k keep the row that they came from.
    "selective" leaves out the 4 F, "full" all but D, the block's input.

    cuda    norms keep their input. On a CPU also its normalised form, and attention keeps its output twice
    """
    if checkpointing == "full":
        return b * c.width
    q, k = c.heads * c.head_dim, c.kv_heads * c.head_dim
    numbers = (0 if checkpointing == "selective" else 4 * c.mlp_width) + 4 * c.width + 2 * q + 2 * k
    numbers += 0 if cuda else 2 * c.width + q
    statistics = c.heads + 2
    if c.qk_norm:
        numbers += q + 2 * k + (0 if cuda else q + k)
        statistics += c.heads + c.kv_heads
    return b * numbers + 4 * statistics


def update_bytes(c: ModelConfig, tokens: int, checkpointing: str, s: Setting) -> dict[str, float]:
    """Bytes of a rank by part while it trains on rows of `tokens` tokens.

    The moments of a frozen policy are on the host.
    """
    block, root = parameters(c)
    P = c.layers * block + root
    kept = c.layers * activation_bytes(c, checkpointing, s.b, s.cuda)
    whole = activation_bytes(c, "none", s.b, s.cuda)
    recomputed = 0 if checkpointing == "none" else whole - activation_bytes(c, checkpointing, s.b, s.cuda)
    chunk = CHUNK if s.cuda else max(CPU_CHUNK, CPU_LOGITS // c.vocab_size)
    return {
        "weights": s.policies * 4 * P / s.ranks,
        "AdamW": (1 if s.cuda else s.policies) * 8 * P / s.ranks,
        "reference": s.policies * s.reference * 4 * P / s.ranks,
        "sampler": s.policies * s.sampler * s.b * P,
        "gradients": 4 * P / s.ranks,
        "gathered": s.b * (root + 2 * block) + (4 * block if s.ranks > 1 else 0),
        "activations": tokens * (kept + recomputed),  # recomputed: of one block at a time
        "LM head": chunk * c.vocab_size * (4 + s.b) + 2 * 4 * c.vocab_size * c.width,
    }


def fit_to_memory(
    config: Config, model: ModelConfig, setting: Setting, free: float, kept: dict | None = None
) -> tuple[Config, str]:
    """Resolve --activation_checkpointing auto and lower a default --micro_batch_tokens to fit the memory.

    An update then fits in SHARE of the `free` bytes of every rank. Returns the config, and a line that
    describes the choice, or "".

    Shorter rows are tried first, then recomputing, then rows below FEWEST_TOKENS, in the order of their cost
    in time. A row is at least as long as a completion of --max_tokens.

    kept    choices of the run that is resumed
    """
    choosing = {"activation_checkpointing"} if config.activation_checkpointing == "auto" else set()
    choosing |= {"micro_batch_tokens"} - config.given
    if not choosing:
        return config, ""
    if kept:
        chosen = {key: kept[key] for key in choosing}
        return dataclasses.replace(config, **chosen), _named(chosen) + ": as the run began"
    longest = config.max_tokens if config.preset in SAMPLING else 0
    budget = config.micro_batch_tokens
    rows = [budget]
    while "micro_batch_tokens" in choosing and rows[-1] >= 2 * max(SMALLEST, longest):
        rows.append(rows[-1] // 2)
    modes = CHECKPOINTING if "activation_checkpointing" in choosing else (config.activation_checkpointing,)
    enough = [row for row in rows if row >= FEWEST_TOKENS] or rows[:1]
    tries = [(mode, row) for mode in modes for row in enough]
    tries += [(modes[-1], row) for row in rows if row not in enough]

    def need(mode: str, row: int) -> float:
        return sum(update_bytes(model, max(row, longest), mode, setting).values())

    mode, row = next((x for x in tries if need(*x) <= SHARE * free), tries[-1])
    config = dataclasses.replace(config, activation_checkpointing=mode, micro_batch_tokens=row)
    line = _named({key: config[key] for key in sorted(choosing)})
    line += (
        f": an update takes about {need(mode, row) / 1e9:.1f} GB of the {free / 1e9:.1f} that a rank has free"
    )
    if (mode, row) != tries[0]:
        first = _named(dict(zip(("activation_checkpointing", "micro_batch_tokens"), tries[0])))
        line += f"; with {first} it would take {need(*tries[0]) / 1e9:.1f}"
    if need(mode, row) > SHARE * free:
        line += "; that may be too much: use more ranks, or a smaller model"
    return config, line


def _named(options: dict) -> str:
    return " ".join(f"--{key} {value}" for key, value in options.items())

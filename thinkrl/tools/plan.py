"""Predict memory and time of a training run, before renting the GPUs.

    python -m thinkrl.tools.plan                                   Qwen2.5 shapes on 1, 8, 64 and 512 GPUs
    python -m thinkrl.tools.plan --model DIR --gpus 8 --gpu_memory 80 --activation_checkpointing selective

docs/gpu.md explains the formulas; those of memory are in thinkrl/memory.py. Memory follows from what the code
allocates; the allocator's fragmentation comes on top. Time is arithmetic and traffic divided by the chip's
peak and by an efficiency that is assumed, not measured.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from thinkrl import UserError
from thinkrl.memory import CHECKPOINTING, Setting, parameters, update_bytes
from thinkrl.model import ModelConfig
from thinkrl.options import group, option, parse_as, run_tool

# Qwen2.5 by its config.json: layers, width, MLP width, heads, kv heads, head dim, vocabulary, tied
QWEN = {
    "0.5B": (24, 896, 4864, 14, 2, 64, 151936, True),
    "1.5B": (28, 1536, 8960, 12, 2, 128, 151936, True),
    "7B": (28, 3584, 18944, 28, 4, 128, 152064, False),
    "14B": (48, 5120, 13824, 40, 8, 128, 152064, False),
    "32B": (64, 5120, 27648, 40, 8, 128, 152064, False),
}
GPUS = (1, 8, 64, 512)


@dataclass(frozen=True)
class Options:
    _run = group("Run")
    model: str = option("", "Hugging Face folder or config.json; empty: the Qwen2.5 shapes")
    gpus: int = option(0, "GPUs; 0: 1, 8, 64 and 512", low=0)
    policies: int = option(1, "policies in memory: 2 for longshort", low=1, high=2)
    reference: bool = option(False, "a reference for a KL term")
    problems_per_step: int = option(64, "problems per optimizer step", low=1)
    group_size: int = option(8, "completions per problem", low=1)
    prompt_tokens: int = option(256, "mean prompt length", low=1)
    completion_tokens: int = option(1024, "mean completion length", low=1)
    micro_batch_tokens: int = option(16384, "tokens of a packed row", low=1)
    activation_checkpointing: str = option(
        "none", "what the backward pass recomputes: nothing | all of a block | its MLP", CHECKPOINTING
    )
    _chip = group("Chip (defaults: H100 SXM, from its data sheet)")
    gpu_memory: float = option(80.0, "GB of a GPU", above=0)
    tflops: float = option(989.0, "dense bf16 peak, TFLOP/s", above=0)
    bandwidth: float = option(3350.0, "memory, GB/s", above=0)
    link: float = option(450.0, "between GPUs, GB/s per GPU and direction", above=0)
    _assumed = group("Assumed efficiency")
    training: float = option(0.4, "share of the peak that the products of training reach", above=0, high=1)
    decoding: float = option(0.6, "share of the memory bandwidth that decoding reaches", above=0, high=1)


KV_SHARE, LEAST_KV = 0.8, 0.02  # of what is left, that the KV cache takes; of a GPU, that it needs


def memory(c: ModelConfig, gpus: int, o: Options, split: int = 1) -> dict[str, float]:
    """GB per GPU by part, and the two peaks: during the update, and before the KV cache is taken.

    split    GPUs that share one copy of the weights for sampling. thinkrl has a copy on each: 1
    """
    setting = Setting(gpus, o.policies, o.reference)
    tokens = min(o.micro_batch_tokens, o.problems_per_step * o.group_size / gpus * length(o))
    parts = update_bytes(c, tokens, o.activation_checkpointing, setting)
    parts["sampler"] /= split
    resting = sum(parts[name] for name in ("weights", "AdamW", "reference", "sampler"))
    parts |= {"resting": resting, "update": sum(parts.values())}
    parts["KV cache"] = max(0.0, KV_SHARE * (o.gpu_memory * 1e9 - resting))
    return {name: value / 1e9 for name, value in parts.items()}


def length(o: Options) -> int:
    return o.prompt_tokens + o.completion_tokens


def seconds(c: ModelConfig, gpus: int, o: Options, kv_gb: float) -> dict[str, float]:
    """Seconds of a step by part. Decoding moves weights and K/V once per token; training does 6 P FLOPs a
    token.
    """
    block, root = parameters(c)
    P, products = c.layers * block + root, c.layers * block + c.vocab_size * c.width
    gate_up = c.layers * 2 * c.width * c.mlp_width  # the products that selective checkpointing repeats
    samples = math.ceil(o.problems_per_step * o.group_size / gpus)
    kv_token = 2 * 2 * c.layers * c.kv_heads * c.head_dim
    rows = min(256, samples, max(1, int(kv_gb * 1e9 / (kv_token * length(o)))))
    traffic = 2 * products + rows * kv_token * (o.prompt_tokens + o.completion_tokens / 2)
    decode = math.ceil(samples / rows) * o.completion_tokens * traffic / (o.bandwidth * 1e9 * o.decoding)
    tokens = samples * length(o)
    again = {"none": 0, "selective": gate_up / products, "full": 1}[o.activation_checkpointing]
    passes = 6 + 2 * again + 2 * o.reference
    # causal: half the square, times 7 products
    attention = 3.5 * 2 * c.layers * c.heads * c.head_dim * length(o)
    train = tokens * (passes * products + attention) / (o.tflops * 1e12 * o.training)
    packs = math.ceil(tokens / o.micro_batch_tokens)
    moved = (packs * (2 + 2 + 4) + 2) * P * (gpus - 1) / gpus  # gathers, gradients, weights for the sampler
    return {"rollout": decode, "training": train, "communication": moved / (o.link * 1e9)}


def fits(parts: dict[str, float], o: Options) -> bool:
    """Whether the update stays within the memory, and the sampler has room for one sequence's K/V or more."""
    return parts["update"] <= 0.95 * o.gpu_memory and parts["KV cache"] > LEAST_KV * o.gpu_memory


def remedy(c: ModelConfig, gpus: int, o: Options) -> str:
    """The first options that make it fit, cheapest first; or what to do where none does."""
    tries: list[dict] = [{"micro_batch_tokens": 8192}, {"micro_batch_tokens": 4096}]
    for mode in CHECKPOINTING[1:]:
        tries += [{"activation_checkpointing": mode} | more for more in ({}, *tries[:2])]
    for change in tries:
        if fits(memory(c, gpus, replace(o, **change)), replace(o, **change)):
            return "fits with " + " ".join(f"--{key} {str(value).lower()}" for key, value in change.items())
    if memory(c, gpus, o)["sampler"] > 0.7 * o.gpu_memory:
        changed = replace(o, **tries[-1])
        shares = [k for k in (2, 4, 8) if k <= gpus and fits(memory(c, gpus, changed, split=k), changed)]
        cure = f" (a copy split over {shares[0]} GPUs would fit; thinkrl has none)" if shares else ""
        return f"no: every GPU samples from a whole copy; larger GPUs are needed{cure}"
    return "no: more GPUs are needed for weights and optimizer"


def table(name: str, c: ModelConfig, counts: tuple[int, ...], o: Options) -> Iterator[str]:
    block, root = parameters(c)
    yield f"{name}: {(c.layers * block + root) / 1e9:.2f} B parameters"
    heads = ("GPUs", "resting", "activ.", "update", "KV", "rollout", "training", "comm.", "fits")
    yield "".join(f"{head:>10}" for head in heads)
    for gpus in counts:
        if o.problems_per_step < gpus:
            yield f"{gpus:>10}  needs --problems_per_step {gpus} or more: a rank takes whole problems"
            continue
        m = memory(c, gpus, o)
        t = seconds(c, gpus, o, m["KV cache"])
        numbers = [m["resting"], m["activations"], m["update"], m["KV cache"]]
        row = f"{gpus:>10}" + "".join(f"{x:>7.1f} GB" for x in numbers)
        row += "".join(f"{x:>8.1f} s" for x in t.values()) if m["KV cache"] else f"{'-':>10}" * len(t)
        yield row + "   " + ("yes" if fits(m, o) else remedy(c, gpus, o))
    yield ""


def largest_copy(gpus: int, o: Options) -> float:
    """Parameters up to which a whole copy on each GPU leaves room to sample, whatever the update takes.

    KV_SHARE (M - 2 P - 12 P / N) = LEAST_KV M,      4 P / N more with a reference, all for each policy
    """
    per_parameter = o.policies * (2 + (12 + 4 * o.reference) / gpus)
    return o.gpu_memory * 1e9 * (1 - LEAST_KV / KV_SHARE) / per_parameter


def advice(counts: tuple[int, ...], o: Options) -> str:
    """Size from which a whole copy on each GPU leaves no room to sample, and what to do then."""
    limits = ", ".join(f"{largest_copy(gpus, o) / 1e9:.1f} B on {gpus}" for gpus in counts)
    # billions of parameters at 2 bytes each
    alone = o.gpu_memory * (1 - LEAST_KV / KV_SHARE) / (2 * o.policies)
    return f"""
Parameters up to which a whole copy on each GPU of {o.gpu_memory:g} GB leaves room to sample: {limits}.
Beyond:
  more GPUs, with --replicate 1: HSDP spreads weights and moments over N / replicas GPUs, so each holds more
  larger GPUs: on {o.gpu_memory:g} GB the copy alone is too much from {alone:.1f} B on, however many there are
  not in thinkrl: GPUs that only sample, beside others that only train, hold no moments and sample up to these
  {alone:.1f} B; a copy that k GPUs share samples up to about k times as much"""


def models(o: Options) -> dict[str, ModelConfig]:
    if not o.model:
        return {
            f"Qwen2.5-{name}": ModelConfig("Qwen2ForCausalLM", V, D, L, H, Hk, Dh, F, 32768, tied=tied)
            for name, (L, D, F, H, Hk, Dh, V, tied) in QWEN.items()
        }
    path = Path(o.model)
    path = path / "config.json" if path.is_dir() else path
    if not path.is_file():
        raise UserError(f"--model {o.model}: no such folder or config.json")
    return {o.model: ModelConfig.from_hf(json.loads(path.read_text()), str(path))}


def parse(argv: list[str]) -> Options:
    return parse_as(Options, argv, "python -m thinkrl.tools.plan [--key value …]")


def main(o: Options) -> None:
    counts = (o.gpus,) if o.gpus else GPUS
    for name, config in models(o).items():
        print("\n".join(table(name, config, counts, o)))
    print(
        f"Memory per GPU in GB of 1e9 bytes. Times assume {o.training:.0%} of the peak in training and "
        f"{o.decoding:.0%} of the bandwidth in decoding: not measured."
    )
    print(advice(counts, o))


if __name__ == "__main__":
    run_tool("thinkrl.tools.plan", parse, main)

"""Benchmark thinkrl on a GPU: one table in a few minutes, with the measured limits of this GPU.

    python -m thinkrl.tools.bench_gpu [--parts decode,training] [--device cpu --size tiny]

    kernels    each at the shapes of Qwen2.5-7B: time, share of the roofline (its minimal arithmetic and
               bytes)

    decode     a step of 1, 8, 64 and 256 rows at 160 tokens of context, recorded as a CUDA graph and eager,
               beside the roofline and transformers' generate, if that is installed
    workload   nano-vllm's: 256 sequences of 100 to 1,024 tokens in, and as many out, seed 0
    training   an optimizer step on one row: share of the matmul ceiling, peak memory and the planner's
               formula
    sync       copy of the policy's weights to the sampler
    l2t        what L2T adds to a GRPO step
    pool       KV pages that fit in three steps of a run; they must not decrease

Weights are random, so only speed is measured. A part that does not fit prints "out of memory". `--size tiny`
runs the same code on any machine in a minute, without useful numbers.
"""

from __future__ import annotations

import gc
import importlib.util
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from random import Random

import torch
from torch import Tensor

from kernels.attention import packed_attention, paged_attention
from kernels.bench import ceilings, milliseconds, with_backward
from kernels.fisher import diagonal_fisher, episode_quadratic, ghost_norm
from kernels.gate import silu_mul
from kernels.logprob import linear_logprob, linear_score
from kernels.norm import add_rms_norm
from kernels.rotary import Places, rotate_and_store
from kernels.sample import hash_key, sample_token
from thinkrl import UserError
from thinkrl.config import Config
from thinkrl.config import parse as parse_training
from thinkrl.distributed import World, shard, start
from thinkrl.learner import Learner, new_optimizer
from thinkrl.memory import CHECKPOINTING, Setting, update_bytes
from thinkrl.model import ModelConfig, Transformer
from thinkrl.options import nearest, option, parse_as, run_tool
from thinkrl.run.metrics import Tally
from thinkrl.sampler import Sampler
from thinkrl.tools.bench import l2t_parts, l2t_shares
from thinkrl.tools.plan import Options as PlanOptions
from thinkrl.tools.plan import models
from thinkrl.types import Pack, Sample, pack
from thinkrl.update import update

PARTS = ("kernels", "decode", "workload", "training", "sync", "l2t", "pool")


@dataclass(frozen=True)
class Size:
    """Sizes of the measurements."""

    decode: dict[str, ModelConfig]
    rows: tuple[int, ...]
    context: int  # tokens of a row in the middle of the measured steps
    steps: int  # decode steps between the two lengths that are compared
    training: dict[str, ModelConfig]
    row_tokens: int  # tokens of a packed row
    kernels: ModelConfig
    workload: ModelConfig
    sequences: int  # of the workload
    longest: int  # of its prompts and completions


def full_size() -> Size:
    shapes = {
        name.removeprefix("Qwen2.5-"): c
        for name, c in models(PlanOptions()).items()
        if name.removeprefix("Qwen2.5-") in ("0.5B", "1.5B", "7B")
    }
    small = {name: shapes[name] for name in ("0.5B", "1.5B")}
    qwen3 = ModelConfig("Qwen3ForCausalLM", 151936, 1024, 28, 16, 8, 128, 3072, 32768, tied=True)  # 0.6B
    return Size(shapes, (1, 8, 64, 256), 160, 64, small, 16384, shapes["7B"], qwen3, 256, 1024)


def tiny_size() -> Size:
    tiny = ModelConfig("Qwen2ForCausalLM", 320, 32, 2, 4, 2, 8, 48, 512, tied=True)
    qwen3 = replace(tiny, architecture="Qwen3ForCausalLM")
    return Size({"tiny": tiny}, (1, 3), 16, 4, {"tiny": tiny}, 128, tiny, qwen3, 4, 40)


@dataclass(frozen=True)
class Row:
    """Line of the table. share: of the roofline, or as in `note`; peak: bytes above those held before."""

    what: str
    seconds: float | None = None
    rate: str = ""
    share: float | None = None
    peak: int | None = None
    note: str = ""

    def line(self) -> str:
        ms = "" if self.seconds is None else f"{1e3 * self.seconds:,.3f} ms"
        share = "" if self.share is None else f"{self.share:.1%}"
        peak = "" if self.peak is None else f"{self.peak / 1e9:,.3f} GB"
        return f"| {self.what} | {ms} | {self.rate} | {share} | {peak} | {self.note} |"


@dataclass(frozen=True)
class Bench:
    """Device and sizes of the measurements."""

    world: World
    size: Size
    repeat: int = 3

    @property
    def device(self) -> str:
        return self.world.device.type

    @property
    def dtype(self) -> torch.dtype:
        return torch.bfloat16 if self.device == "cuda" else torch.float32

    def floor(self, flop: float, traffic: float) -> float:
        """Seconds at the roofline: the larger of arithmetic's and memory traffic's."""
        product, copy = ceilings(self.device)
        return max(flop / product, traffic / copy)

    def clock(self, run: Callable[[], object]) -> float:
        """Seconds of a call, until the device has finished."""
        self.wait()
        begun = time.perf_counter()
        run()
        self.wait()
        return time.perf_counter() - begun

    def wait(self) -> None:
        if self.device == "cuda":
            torch.cuda.synchronize()

    def peak(self, run: Callable[[], object]) -> int | None:
        """Peak bytes that a call allocates, above those held before. CUDA only."""
        if self.device != "cuda":
            run()
            return None
        held = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        run()
        return torch.cuda.max_memory_allocated() - held

    def model(self, config: ModelConfig, dtype: torch.dtype | None = None) -> Transformer:
        """Make a model with random weights on the device."""
        model = Transformer.empty(config, dtype or self.dtype, self.device)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                parameter.fill_(1.0) if name.endswith("norm.weight") else parameter.normal_(0.0, 0.02)
        return model

    def random(self, *shape: int, grad: bool = False) -> Tensor:
        return torch.randn(*shape, dtype=self.dtype, device=self.device, requires_grad=grad)


def products(c: ModelConfig) -> int:
    """Number of weights that every token is multiplied with."""
    qkv = (c.heads + 2 * c.kv_heads) * c.head_dim
    block = c.width * (qkv + c.heads * c.head_dim + 3 * c.mlp_width)
    return c.layers * block + c.vocab_size * c.width


def kernels(b: Bench) -> Iterator[Row]:
    """Measure every kernel, through its dispatching function, at the shapes of one model."""
    c, T, rows, context = b.size.kernels, b.size.row_tokens // 4, max(b.size.rows), b.size.context
    D, F, V, H, Hk, Dh = c.width, c.mlp_width, c.vocab_size, c.heads, c.kv_heads, c.head_dim
    size = b.dtype.itemsize

    def row(what: str, run: Callable[[], object], flop: float, traffic: float) -> Row:
        (ms,) = milliseconds(run, device=b.device)
        return Row(what, ms / 1e3, "", b.floor(flop, traffic) / (ms / 1e3), b.peak(run))

    n = T // 4
    cu_seqlens = torch.arange(0, T + 1, n, dtype=torch.int32, device=b.device)
    q, k, v = b.random(T, H, Dh, grad=True), b.random(T, Hk, Dh, grad=True), b.random(T, Hk, Dh, grad=True)
    attend = with_backward(partial(packed_attention, longest=n), q, k, v, cu_seqlens)
    io = 4 * size * (2 * q.numel() + 2 * k.numel())  # read, written, and the same for gradients
    yield row(f"packed attention and its backward, 4 × {n} tokens", attend, 7 * T * n * H * Dh, io)

    pages = -(-context // 16)
    table = torch.randperm(rows * pages, device=b.device).view(rows, pages).int()
    k_pages, v_pages = (b.random(rows * pages, 16, Hk, Dh) for _ in range(2))
    lengths = torch.full((rows,), context, dtype=torch.int32, device=b.device)
    decode = partial(paged_attention, b.random(rows, H, Dh), k_pages, v_pages, table, lengths)
    moved = 2 * size * rows * context * Hk * Dh
    yield row(f"paged attention, {rows} rows of {context}", decode, 4 * rows * context * H * Dh, moved)

    x, delta, weight = b.random(rows, D), b.random(rows, D), b.random(D)
    yield row(f"add_rms_norm, {rows} × {D}", partial(add_rms_norm, x, delta, weight, 1e-6), 0, 4 * x.nbytes)
    gate_up = b.random(rows, 2 * F)
    yield row(f"silu_mul, {rows} × {F}", partial(silu_mul, gate_up), 0, 1.5 * gate_up.nbytes)
    qkv = b.random(rows, (H + 2 * Hk) * Dh)
    places = Places(lengths.long() - 1, table, torch.rand(Dh // 2, device=b.device), 16)
    yield row(
        f"rotate_and_store, {rows} rows",
        partial(rotate_and_store, qkv, places, k_pages, v_pages),
        0,
        2 * qkv.nbytes,
    )
    keys = hash_key(torch.arange(rows, device=b.device))
    logits = b.random(rows, V).float()
    draw = partial(sample_token, logits, keys, torch.zeros_like(keys), 1.0)
    yield row(f"sample_token, {rows} × {V}", draw, 0, logits.nbytes)

    hidden, head = b.random(T, D, grad=True), b.random(V, D, grad=True)
    targets = torch.randint(V, (T,), device=b.device)
    product, io = 2 * T * V * D, head.nbytes + 2 * hidden.nbytes
    train = with_backward(linear_logprob, hidden, head, targets)
    yield row(f"linear_logprob and its backward, {T} × {V}", train, 3 * product, 3 * io)
    score = partial(linear_score, hidden.detach(), head.detach(), targets)
    yield row(f"linear_score, {T} × {V}", score, 2 * product, io)

    cu_episodes = torch.arange(0, T + 1, T // 16, device=b.device)
    core = max(16, D // 10 // 16 * 16)
    for what, D2, D1 in (("the SVD core", core, core), ("down", D, F)):
        x, g, w = b.random(T, D1), b.random(T, D2), torch.rand(D2, D1, device=b.device)
        io, flop = x.nbytes + g.nbytes, 2 * T * D1 * D2
        quadratic = partial(episode_quadratic, x, g, cu_episodes, w)
        yield row(f"episode_quadratic, {what} {D2} × {D1}", quadratic, flop, io + w.nbytes)
        norms = partial(ghost_norm, x, g, cu_episodes)
        yield row(f"ghost_norm, {what}", norms, T * (T // 16) * (D1 + D2), io)
        yield row(f"diagonal_fisher, {what}", partial(diagonal_fisher, x, g), flop, io + w.nbytes)


def step_floor(b: Bench, c: ModelConfig, rows: int, context: float) -> float:
    """Seconds of a decode step at the roofline: weights and K/V read, or rows multiplied."""
    size, P = b.dtype.itemsize, products(c)
    kv = rows * context * 2 * c.layers * c.kv_heads * c.head_dim * size
    return b.floor(2 * P * rows, size * P) + b.floor(0, kv)


def step_seconds(write: Callable[[int], object], clock: Callable, steps: int, repeat: int) -> float:
    """Seconds per step of `steps` more tokens, without prefill, graph recording and first launches."""
    write(steps)  # compiles, records
    times = [clock(partial(write, 2 * steps)) - clock(partial(write, steps)) for _ in range(repeat)]
    return statistics.median(times) / steps


def decode(b: Bench) -> Iterator[Row]:
    """Steps of our sampler; eager ones for the smallest shape, where launches take longest; fewer of
    transformers, which is slow.
    """
    random, steps = Random(0), b.size.steps
    for name, c in b.size.decode.items():
        model, theirs = b.model(c), transformers_model(b, c)
        for rows in b.size.rows:
            prompts = [
                [random.randrange(c.vocab_size) for _ in range(b.size.context - 3 * steps // 2)]
                for _ in range(rows)
            ]
            floor = step_floor(b, c, rows, b.size.context)
            for graphs in (True, False):
                if graphs and b.device == "cuda" or not graphs and c is next(iter(b.size.decode.values())):
                    pages = rows * -(-2 * b.size.context // 16)
                    sampler = Sampler(model, num_pages=pages, max_rows=rows, cuda_graphs=graphs)
                    t = step_seconds(partial(ours, sampler, prompts), b.clock, steps, b.repeat)
                    how = "as a CUDA graph" if graphs else "eager"
                    yield Row(f"decode {name}, rows: {rows}, {how}", t, f"{rows / t:,.0f} tok/s", floor / t)
                    del sampler
            if theirs is not None:
                write = partial(generate, theirs, torch.tensor(prompts, device=b.device))
                t = step_seconds(write, b.clock, max(1, steps // 8), 1)
                yield Row(
                    f"decode {name}, rows: {rows}, transformers", t, f"{rows / t:,.0f} tok/s", floor / t
                )
        if theirs is None:
            yield Row(f"decode {name}, transformers", note="not installed")


def ours(sampler: Sampler, prompts: list[list[int]], tokens: int) -> None:
    sampler.generate(prompts, max_tokens=tokens, stop_ids=[])


def transformers_model(b: Bench, c: ModelConfig):
    """Make a transformers model of the same shape, or None if it is not installed."""
    if importlib.util.find_spec("transformers") is None:
        return None
    import transformers

    config = transformers.AutoConfig.for_model(**c.to_hf() | {"bos_token_id": None, "eos_token_id": None})
    with torch.device(b.device):
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=b.dtype)
    return model.eval()


@torch.inference_mode()
def generate(model, prompts: Tensor, tokens: int) -> None:
    model.generate(
        prompts,
        attention_mask=torch.ones_like(prompts),
        max_new_tokens=tokens,
        do_sample=True,
        top_k=0,
        pad_token_id=0,
    )


def workload(b: Bench) -> Iterator[Row]:
    """Run nano-vllm's bench.py workload: its lengths and prompts, temperature 0.6, no stop ids."""
    c, random, least = b.size.workload, Random(0), b.size.longest // 10
    most = b.size.longest
    prompts = [
        [random.randint(0, min(10000, c.vocab_size - 1)) for _ in range(random.randint(least, most))]
        for _ in range(b.size.sequences)
    ]
    limits = [random.randint(least, most) for _ in range(b.size.sequences)]
    sampler = Sampler(b.model(c), max_rows=b.size.sequences)
    write = partial(sampler.generate, prompts, stop_ids=[], temperature=0.6)
    write(max_tokens=b.size.steps)
    t = b.clock(partial(write, max_tokens=limits))
    what = f"nano-vllm's workload, Qwen3-0.6B, {sum(limits):,} tokens"
    yield Row(
        what, t, f"{sum(limits) / t:,.0f} tok/s", note="nano-vllm and vLLM on an A800: 10,009 and 8,588"
    )


def training_row(c: ModelConfig, tokens: int) -> list[Pack]:
    """Make one row of 16 completions after short prompts."""
    n = tokens // 16
    tokens_of = [[(7 * i + j) % c.vocab_size for i in range(n)] for j in range(16)]
    signs = torch.tensor([1.0, -1.0]).repeat(n)[: n - 2]
    return pack([Sample(t[:2], t[2:], signs, torch.zeros(n - 2)) for t in tokens_of], tokens)


def new_learner(b: Bench, c: ModelConfig, how: str, compiled: bool, config: Config) -> Learner:
    policy = shard(b.model(c, torch.float32), b.world, b.dtype, 1, how, compiled)
    return Learner(policy, None, new_optimizer(policy, config))  # type: ignore[arg-type]


def training(b: Bench) -> Iterator[Row]:
    config, T = parse_training(["grpo"]), b.size.row_tokens
    for name, c in b.size.training.items():
        packs = [p.to(b.device) for p in training_row(c, T)]
        attention = 7 * c.layers * c.heads * c.head_dim * (T // 16)  # causal, forward and backward, a token
        flop = T * (6 * products(c) + attention)
        for how, compiled in [(how, False) for how in CHECKPOINTING] + [("none", True)] * (
            b.device == "cuda"
        ):
            what = f"training {name}, {T:,} tokens, checkpointing {how}{', compiled' * compiled}"
            try:
                learner = new_learner(b, c, how, compiled, config)
                step = partial(update, learner, packs, 1e-6, config, b.world, Tally())
                step()  # makes the moments
                peak = b.peak(step)
                t = statistics.median(b.clock(step) for _ in range(b.repeat))
            except torch.OutOfMemoryError:
                yield Row(what, note="out of memory")
                continue
            finally:
                learner = step = None  # type: ignore[assignment]
                release(b)
            planned = update_bytes(
                c, T, how, Setting(sampler=False, b=b.dtype.itemsize, cuda=b.device == "cuda")
            )
            beyond = sum(planned.values()) - planned["weights"] - planned["AdamW"]
            note = (
                f"{flop / t / 1e12:.3g} TFLOP/s; share of the matmul ceiling; planned {beyond / 1e9:.3f} GB"
            )
            yield Row(what, t, f"{T / t:,.0f} tok/s", flop / t / ceilings(b.device)[0], peak, note)


def release(b: Bench) -> None:
    gc.collect()
    if b.device == "cuda":
        torch.cuda.empty_cache()


def sync(b: Bench) -> Iterator[Row]:
    name, c = list(b.size.training.items())[-1]
    config = parse_training(["grpo"])
    sampler, learner = Sampler(b.model(c)), new_learner(b, c, "none", False, config)
    copy = partial(sampler.load_weights, learner.policy)
    peak = b.peak(copy)
    t = statistics.median(b.clock(copy) for _ in range(b.repeat))
    moved = sum(p.numel() for p in sampler.model.parameters()) * (4 + b.dtype.itemsize)
    yield Row(f"weight sync {name}", t, f"{moved / t / 1e9:,.1f} GB/s", b.floor(0, moved) / t, peak)


def l2t(b: Bench) -> Iterator[Row]:
    name, c = next(iter(b.size.training.items()))
    parts = l2t_parts(b.model(c), b.model(c), b.size.longest, b.repeat, b.wait)
    for part, seconds in parts.items():
        yield Row(f"l2t {name}: {part}", seconds)
    without, with_probes = l2t_shares(parts)
    yield Row(f"l2t {name}: added to a GRPO step", share=with_probes, note=f"{without:.1%} without probes")


def pool(b: Bench) -> Iterator[Row]:
    name, c = next(iter(b.size.training.items()))
    config = parse_training(["grpo"])
    sampler, learner = Sampler(b.model(c)), new_learner(b, c, "none", False, config)
    packs = [p.to(b.device) for p in training_row(c, b.size.row_tokens)]
    for step in range(3):
        sampler.generate([[1, 2, 3]], n=2, max_tokens=b.size.steps, stop_ids=[])
        yield Row(f"pool {name}, step {step + 1}", note=f"{sampler.pool.num_pages:,} pages of 16 tokens")
        sampler.release_pool()
        update(learner, packs, 1e-6, config, b.world, Tally())
        sampler.load_weights(learner.policy)


@dataclass(frozen=True)
class Options:
    parts: str = option(",".join(PARTS), "what to measure, comma-separated")
    device: str = option("auto", "device", ("auto", "cpu", "cuda"))
    size: str = option("full", "full: the shapes of Qwen2.5; tiny: a trial of the code", ("full", "tiny"))
    repeat: int = option(3, "times that a step is measured; the median counts", low=1)


def parse(argv: list[str]) -> Options:
    options = parse_as(Options, argv, "python -m thinkrl.tools.bench_gpu [--key value …]")
    for part in options.parts.split(","):
        if part not in PARTS:
            raise UserError(
                f"--parts has '{part}'{nearest(part, PARTS)}: each must be one of {', '.join(PARTS)}"
            )
    return options


def main(o: Options) -> None:
    world = start(o.device)
    b = Bench(world, full_size() if o.size == "full" else tiny_size(), o.repeat)
    measured = dict(
        kernels=kernels, decode=decode, workload=workload, training=training, sync=sync, l2t=l2t, pool=pool
    )
    chip = torch.cuda.get_device_name() if b.device == "cuda" else "a CPU"
    product, copy = ceilings(b.device)
    print(f"{chip}, torch {torch.__version__}, {b.dtype}.")
    print(
        f"Ceilings: {product / 1e12:.3g} TFLOP/s in a large product, {copy / 1e9:.4g} GB/s in a large copy.\n"
    )
    print("| what | time | rate | share of the ceiling | peak memory | |\n|---|---|---|---|---|---|")
    begun = time.monotonic()
    for part in o.parts.split(","):
        try:
            for row in measured[part](b):
                print(row.line(), flush=True)
        except torch.OutOfMemoryError:
            print(Row(part, note="out of memory").line(), flush=True)
        release(b)
    print(f"\n{time.monotonic() - begun:.0f} s")


if __name__ == "__main__":
    run_tool("thinkrl.tools.bench_gpu", parse, main)

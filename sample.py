"""Answer a prompt, or measure a policy:

    torchrun --nproc_per_node=1 sample.py --prompt "374*6?"
    torchrun --nproc_per_node=2 -- sample.py --data FILE --n 8 --temperature 1       "--", or torchrun reads --n itself
    torchrun --nproc_per_node=1 sample.py --long DIR --short DIR --prompt "…"     a conversation of two policies

Prints accuracy, tokens (mean, max, share truncated), pass@k, maj@k and tokens per correct answer; for
conversations also their turns, and with --base the Accuracy-Efficiency Score against that model on the same
problems.
"""

from dataclasses import dataclass, replace

from thinkrl import UserError
from thinkrl.options import command_line, group, option, parse_as


@dataclass(frozen=True)
class Options:
    given: frozenset[str] = frozenset()  # names of the options that were given
    _what = group("What to answer")
    model: str = option(
        "tiny", "Hugging Face folder, owner/name[@revision] of the hub, or 'tiny', the embedded model"
    )
    long: str = option("", "folder of the long-thought policy: together with --short, a conversation")
    short: str = option("", "folder of the short-thought policy")
    base: str = option(
        "", "folder of a model to compare with on --data, asked in the same way: prints AES against it"
    )
    prompt: str = option("", "answer this and print it")
    data: str = option(
        "",
        "evaluate on: 'arith' or gym:TASK (held out) | FILE | hub:owner/name[:config][:split]; several joined by +",
    )
    source: str = option(
        "",
        "grading rule, whatever rows name: arith | gsm8k | last_number | math; its instruction follows a --prompt too",
    )
    columns: str = option("", "which column holds what, for a layout of your own: problem=NAME,answer=NAME")
    skip_bad_rows: bool = option(False, "leave out rows that cannot be used, and say how many")
    limit: int = option(0, "at most this many problems; 0: all", low=0)
    system: str = option("", "system message; left out: that of the training, for a model trained here")
    suffix: str = option("", "text appended to every question; left out: that of the training")
    _how = group("How")
    n: int = option(1, "completions per problem", low=1)
    max_tokens: int = option(
        0,
        "completion length limit, per turn of a conversation; 0: as in training, or 200 for the embedded model, else "
        "2048 or half of the context",
        low=0,
    )
    max_turns: int = option(5, "exchanges (one long and one short turn) per conversation", low=1)
    prompts: str = option(
        "", "JSON file with the two role prompts; empty: the long model folder's, else the built-in ones"
    )
    temperature: float = option(
        1.0, "sampling temperature; 0 is greedy; if it is left out, as in training or 1", low=0
    )
    seed: int = option(42, "seed of every sampled token")
    device: str = option("auto", "device", ("auto", "cpu", "cuda"))
    dtype: str = option(
        "auto", "compute dtype; auto: bfloat16 on CUDA, float32 on CPU", ("auto", "float32", "bfloat16")
    )
    out: str = option("", "also write every completion on --data to this JSONL file")


def parse_options(argv: list[str]) -> Options:
    usage = "torchrun --nproc_per_node=N -- sample.py --prompt TEXT | --data FILE [--key value …]"
    options = parse_as(Options, argv, usage)
    if bool(options.prompt) == bool(options.data):
        raise UserError("give either --prompt TEXT or --data FILE")
    if options.prompt and (options.base or options.out):
        raise UserError("--base and --out are for --data FILE: an answer to --prompt is only printed")
    if bool(options.long) != bool(options.short):
        raise UserError("a conversation needs both --long DIR and --short DIR")
    return options


if __name__ == "__main__":  # before torch is imported
    OPTIONS = command_line("sample.py", parse_options)

import gc
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from tqdm import tqdm

from thinkrl import require_own_kernels
from thinkrl.checkpoint import load_model, read_config
from thinkrl.config import embedded
from thinkrl.data.problems import held_out_problems, reading
from thinkrl.distributed import World, gather, start, stop
from thinkrl.evaluate import aes, summarise
from thinkrl.learner import compute_dtype, model_path
from thinkrl.longshort import protocol as longshort
from thinkrl.longshort.conversation import shared_prompts
from thinkrl.options import exit_with_error, shown
from thinkrl.rollout import EVALUATION, read_sampling, rollout
from thinkrl.sampler import Sampler
from thinkrl.tokenizer import Tokenizer
from thinkrl.types import Problem, Trajectory

BATCH = 64  # problems per call, so that the bar moves


Attempt = Callable[[list[Problem], int], list[Trajectory]]  # problems, n -> n attempts at each, contiguous


def as_trained(options: Options, world: World) -> Options:
    """Options that were not given become what the policy was sampled with in training, if its folder says so."""
    saved = read_sampling(model_path(options.long or options.model, "--long" if options.long else "--model"))
    taken = {key: value for key, value in saved.items() if key not in options.given and value != ""}
    if taken and world.main:
        print(
            "as in training:", *(f"--{key} {shown(value)}" for key, value in taken.items()), file=sys.stderr
        )
    return replace(options, **taken)


def policy(options: Options, world: World) -> Attempt:
    return (
        two_policies(options, world)
        if options.long
        else one_policy(model_path(options.model), options, world)
    )


def one_policy(path: Path, options: Options, world: World) -> Attempt:
    tokenizer = Tokenizer(path)
    sampler = Sampler(load_model(path, compute_dtype(options, world), world.device), tokenizer)

    def attempt(problems: list[Problem], n: int) -> list[Trajectory]:
        return rollout(
            sampler,
            tokenizer,
            problems,
            group_size=n,
            max_tokens=limit(path, options),
            seed=options.seed,
            temperature=options.temperature,
            address=(EVALUATION, 0),
            system=options.system,
            suffix=options.suffix,
        )

    return attempt


def two_policies(options: Options, world: World) -> Attempt:
    paths = {"long": model_path(options.long, "--long"), "short": model_path(options.short, "--short")}
    tokenizers = {role: Tokenizer(path) for role, path in paths.items()}
    longshort.require_same_tokenizer(tokenizers["long"], tokenizers["short"])
    prompts = shared_prompts(options.prompts, *paths.values())
    roles = {
        role: longshort.RoleSampler(
            Sampler(
                load_model(path, compute_dtype(options, world), world.device),
                tokenizers[role],
                memory_share=0.4,
            ),
            options.temperature,
            limit(path, options),
            prompts,
            options.suffix,
        )
        for role, path in paths.items()
    }

    def attempt(problems: list[Problem], n: int) -> list[Trajectory]:
        return longshort.converse(
            roles,
            problems,
            group_size=n,
            max_turns=options.max_turns,
            seed=options.seed,
            address=(EVALUATION, 0),
        )

    return attempt


def answer(options: Options, world: World) -> None:
    """One prompt, n answers, as they came; a conversation turn by turn. Nothing is added to the prompt but
    --suffix, or with --source the instruction of that grading rule.
    """
    source = options.source or ("arith" if embedded(options.long or options.model) else "math")
    problem = Problem(0, options.prompt, "0", source, instruct=bool(options.source))
    for t in policy(options, world)([problem], options.n) if world.main else []:
        if options.long:
            say(longshort.transcript(t, colour=sys.stdout.isatty()), f"\n[{t.tokens} tokens, {t.ended}]")
        else:
            say(f"{t.text}\n[{t.tokens} tokens, {t.turns[0].finish_reason}]")


def evaluate(options: Options, world: World) -> None:
    """Measure, print and write; then the same for --base, with no other model in memory."""
    base = model_path(options.base, "--base") if options.base else None
    if options.out and world.main:
        require_writable(Path(options.out))
    problems = held_out_problems(options.data, options.data, **reading(options))
    problems = problems[:: max(1, len(problems) // (options.limit or len(problems)))][
        : options.limit or len(problems)
    ]
    attempts = measure(policy(options, world), problems, options, world)
    result = summarise(attempts)
    if world.main:
        if options.out:
            Path(options.out).write_text("".join(json.dumps(record(t)) + "\n" for t in attempts))
        print_numbers(result | (longshort.summary(attempts) if options.long else {}))
    if base:
        gc.collect()  # a sampler's layers refer to themselves: the first model is still there
        torch.cuda.empty_cache()
        reference = summarise(measure(one_policy(base, options, world), problems, options, world))
        if world.main:
            say(compared(result, reference, options.base))


def measure(attempt: Attempt, problems: list[Problem], options: Options, world: World) -> list[Trajectory]:
    """n attempts at every problem, shared over the ranks; all of them on every rank."""
    mine = [problems[i] for i in world.share(len(problems))]
    attempts = []
    for i in tqdm(
        range(0, len(mine), BATCH), desc="evaluate", unit=f"×{BATCH} problems", disable=not world.main
    ):
        attempts += attempt(mine[i : i + BATCH], options.n)
    return sum(gather(attempts), [])


def compared(result: dict, base: dict, name: str) -> str:
    if not base["accuracy"]:
        return f"no AES: it is relative to the accuracy of --base {name}, which is 0 here"
    score = aes(result["accuracy"], result["tokens"], base["accuracy"], base["tokens"])
    return f"{'AES':<22} {score:.4g}   against {name}: accuracy {base['accuracy']:.3f}, tokens {base['tokens']:.1f}"


def record(t: Trajectory) -> dict:
    """A line of --out."""
    line = {
        "problem": t.problem.id,
        "question": t.problem.question,
        "gold": t.problem.answer,
        "text": t.text,
        "answer": t.answer,
        "correct": t.correct,
        "tokens": t.tokens,
    }
    if isinstance(t, longshort.Conversation):
        turns = [{"role": turn.role, "text": text} for turn, text in zip(t.turns, t.texts)]
        line |= {"turns": turns, "ended": t.ended}
    return line


def require_writable(file: Path) -> None:
    """Raise UserError if --out could not be written: now, not when everything has been sampled."""
    if file.is_dir() or not os.access(file.parent, os.W_OK):
        raise UserError(f"--out {file} cannot be written: give a file in a folder that exists")


def say(*words: str) -> None:
    """Print at once. A reader that has left, as `| head` does, is no mistake: nothing more is printed."""
    try:
        print(*words, flush=True)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def print_numbers(result: dict, indent: str = "") -> None:
    for name, value in result.items():
        if isinstance(value, dict):
            say(f"{indent}{name or 'all'}")
            print_numbers(value, indent + "  ")
        elif value is not None:
            say(f"{indent}{name:<22} {value:.4g}")


def limit(path: Path, options: Options) -> int:
    """--max_tokens, or its default: what leaves half of the context to the prompt, at most 2048."""
    return options.max_tokens or (
        200 if embedded(str(path)) else min(2048, read_config(path).max_positions // 2)
    )


def main(options: Options) -> None:
    try:
        require_own_kernels()
        world = start(options.device)
        (answer if options.prompt else evaluate)(as_trained(options, world), world)
    except UserError as mistake:
        exit_with_error("sample.py", mistake)
    finally:
        stop()


if __name__ == "__main__":
    main(OPTIONS)

"""Answer a prompt, chat, measure a policy, or compare two:

    python sample.py                                                        a chat, on a terminal
    torchrun --nproc_per_node=1 sample.py --prompt "374*6?"
    torchrun --nproc_per_node=2 -- sample.py --data FILE --n 8 --out DIR    "--", or torchrun reads --n itself
    python sample.py --compare RUN_A RUN_B                                  runs, or folders of --out

With --long DIR --short DIR instead of --model DIR, two policies answer in a conversation.

--data prints accuracy with a 95 % interval, tokens, pass@k and maj@k, overall and by level; with --budgets
also accuracy with thinking cut off, with --base a comparison with another model on the same problems. --out
keeps every attempt, so that the same command continues a killed evaluation (thinkrl/tools/evaluation.py).
"""

import sys
from dataclasses import asdict, dataclass, replace

from thinkrl import UserError
from thinkrl.options import command_line, group, option, parse_as


@dataclass(frozen=True)
class Options:
    given: frozenset[str] = frozenset()  # names of the options that were given
    _what = group("What to answer")
    model: str = option(
        "tiny", "Hugging Face folder, owner/name[@revision] of the hub, or 'tiny', the embedded model"
    )
    long: str = option("", "folder of the long-thought policy; with --short, for a conversation")
    short: str = option("", "folder of the short-thought policy")
    base: str = option("", "model to compare with on --data, with the same options")
    prompt: str = option("", "answer this and print it")
    data: str = option(
        "",
        "evaluate on: 'arith' or gym:TASK (held out) | FILE | hub:owner/name[:config][:split]; several "
        "joined by +",
    )
    compare: tuple = option(
        (),
        "two runs, RUN or RUN:before, or two folders of --out: differences, paired by problem, and AES",
        words=2,
    )
    source: str = option(
        "",
        "grading rule, which overrides the rows': arith | gsm8k | last_number | math; its instruction also "
        "follows a --prompt",
    )
    columns: str = option("", "which column holds what, for a layout of your own: problem=NAME,answer=NAME")
    skip_bad_rows: bool = option(False, "leave out rows that cannot be used, and print how many")
    limit: int = option(0, "at most this many problems; 0: all", low=0)
    system: str = option("", "system message; if not given: as in training, for a model trained here")
    suffix: str = option("", "text appended to every question; if not given: as in training")
    _how = group("How")
    n: int = option(1, "completions per problem", low=1)
    max_tokens: int = option(
        0,
        "completion length limit, per turn of a conversation; 0: as in training, or 200 for the embedded "
        "model, else 2048 or half of the context",
        low=0,
    )
    max_turns: int = option(5, "exchanges (one long and one short turn) per conversation", low=1)
    prompts: str = option(
        "", "JSON file with the two role prompts; empty: the long model folder's, else the built-in ones"
    )
    temperature: float = option(
        1.0, "sampling temperature, 0: greedy; if not given: as in training, or 1", low=0
    )
    budgets: str = option(
        "",
        "comma-separated token counts: also measure accuracy with thinking cut off there and the answer "
        "forced",
    )
    probe_prefix: str = option("", "text that forces an answer for --budgets; empty: the grading rule's")
    probe_suffix: str = option("", "text that ends it; empty: the grading rule's")
    seed: int = option(42, "seed of every sampled token")
    timeout: float = option(
        10.0,
        "minutes without a token after which a rank that does not wait for others is taken for stalled, or "
        "without a sign of life for gone: the job ends, and it is named",
        above=0,
    )
    device: str = option("auto", "device", ("auto", "cpu", "cuda"))
    dtype: str = option(
        "auto", "compute dtype; auto: bfloat16 on CUDA, float32 on CPU", ("auto", "float32", "bfloat16")
    )
    out: str = option(
        "", "folder for the attempts on --data and their summary (JSON, Markdown), or for that of --compare"
    )


# Options that may change when an evaluation is continued.
FREE_TO_CHANGE = ("given", "prompt", "compare", "base", "out", "device", "timeout")


def parse_options(argv: list[str]) -> Options:
    usage = (
        "torchrun --nproc_per_node=N -- sample.py [--prompt TEXT | --data FILE | --compare A B] [--key value "
        "…]"
    )
    options = parse_as(Options, argv, usage)
    tasks = [f"--{name}" for name in ("prompt", "data", "compare") if getattr(options, name)]
    if len(tasks) > 1:
        raise UserError(f"{' and '.join(tasks)}: give one of them")
    if not tasks and not sys.stdin.isatty():
        raise UserError(
            "give --prompt TEXT, --data FILE or --compare A B; without them, a chat needs a terminal"
        )
    if tasks != ["--data"] and (options.base or options.budgets):
        raise UserError("--base and --budgets are for --data FILE")
    if options.out and tasks not in (["--data"], ["--compare"]):
        raise UserError("--out is for --data FILE and --compare A B: an answer is only printed")
    if bool(options.long) != bool(options.short):
        raise UserError("a conversation needs both --long DIR and --short DIR")
    if options.long and options.budgets:
        raise UserError("--budgets cuts off the thinking of one policy: not of --long and --short")
    budget_list(options)
    return options


def budget_list(options: Options) -> list[int]:
    """--budgets in ascending order."""
    words = options.budgets.split(",") if options.budgets else []
    if not all(word.strip().isdecimal() and int(word) > 0 for word in words):
        raise UserError(
            f"--budgets is '{options.budgets}': give positive numbers of tokens, such as 256,512,1024"
        )
    return sorted({int(word) for word in words})


if __name__ == "__main__":  # before torch is imported
    OPTIONS = command_line("sample.py", parse_options)

import gc
import os
from contextlib import ExitStack
from pathlib import Path

import torch

from thinkrl import require_own_kernels
from thinkrl.data.problems import held_out_problems, reading
from thinkrl.distributed import World, start, stop
from thinkrl.learner import model_path
from thinkrl.longshort import protocol as longshort
from thinkrl.options import exit_with_error, shown
from thinkrl.rollout import read_sampling
from thinkrl.run import watch
from thinkrl.run.files import write_json
from thinkrl.run.lock import hold, release
from thinkrl.tools import evaluation, paired
from thinkrl.tools.chat import chat, write
from thinkrl.tools.policies import OnePolicy, TwoPolicies, limit, model_paths, question
from thinkrl.types import Problem
from thinkrl.visible import visible


def policy(options: Options, world: World) -> OnePolicy | TwoPolicies:
    if options.long:
        return TwoPolicies(options, world)
    return OnePolicy(options, world, budget_list(options))


def as_trained(options: Options, world: World) -> Options:
    """Set options that were not given to those of the policy's training, if its folder has them."""
    saved = read_sampling(model_path(options.long or options.model, "--long" if options.long else "--model"))
    taken = {key: value for key, value in saved.items() if key not in options.given and value != ""}
    if taken and world.main:
        said = visible(" ".join(f"--{key} {shown(value)}" for key, value in taken.items()))
        print(f"as in training: {said}", file=sys.stderr)
    return replace(options, **taken)


def answer(options: Options, world: World) -> None:
    """Print n answers to one prompt, or conversations turn by turn."""
    for text in policy(options, world).answers(question(options, options.prompt)) if world.main else []:
        say(text)


def talk(options: Options, world: World) -> None:
    if world.size > 1:
        raise UserError("a chat is for one process: python sample.py")
    write(f"{options.long or options.model}: /new begins again, Ctrl-D ends\n")
    chat(policy(options, world).reply)


def evaluate(options: Options, world: World) -> None:
    """Measure the policy, then --base after freeing the first model."""
    base = replace(options, model=options.base, long="", short="") if options.base else None
    out = Path(options.out) if options.out else None
    if base:
        model_path(options.base, "--base")  # raises now, not at the end
    problems = held_out_problems(options.data, options.data, **reading(options))
    every = max(1, len(problems) // (options.limit or len(problems)))
    problems = problems[::every][: options.limit or len(problems)]
    records = measure(options, problems, world, out)
    if base:
        gc.collect()  # a sampler has reference cycles, which keep the first model in memory
        torch.cuda.empty_cache()
        others = measure(base, problems, world, out and out / "base")
        if world.main:
            show_comparison({"": paired.compare(records, others, (named(options), named(base)))}, out)


def measure(options: Options, problems: list[Problem], world: World, out: Path | None) -> list[dict]:
    """Records of the attempts, see `evaluation.evaluate`; rank 0 prints and writes their summary."""
    paths = model_paths(options)
    decisive = {key: value for key, value in asdict(options).items() if key not in FREE_TO_CHANGE}
    decisive["max_tokens"] = limit(paths[0], options)
    settings = evaluation.settings_of(decisive, problems, paths)
    decoding = "sampled" if options.temperature else "greedy"

    def load() -> OnePolicy | TwoPolicies:
        loaded = policy(options, world)
        watched.enter_context(watch.watching("sample.py", options.timeout, world))
        watch.at("evaluation")
        return loaded

    with ExitStack() as watched:  # once the policy is there, which may have to be fetched
        records = evaluation.evaluate(problems, options.n, load, world, out, settings, decoding)
    if world.main:
        result = evaluation.summary(records)
        if options.long:
            result |= longshort.summary_of_records(records)
        text = f"{visible(named(options))} on {visible(options.data)}\n\n{evaluation.tables(result)}"
        say(text)
        if out:
            write_json(out / "summary.json", result)
            (out / "summary.md").write_text(text + "\n", encoding="utf-8")
    return records


def named(options: Options) -> str:
    return f"{options.long} and {options.short}" if options.long else options.model


def compare(options: Options, world: World) -> None:
    out = Path(options.out) if options.out else None
    if out:
        hold(out, world)
    if world.main:
        show_comparison(paired.compare_runs(*options.compare), out)


def show_comparison(results: dict[str, dict], out: Path | None) -> None:
    """Print comparisons by decoding, and write them to comparison.json and comparison.md."""
    text = "\n\n".join(f"{decoding}\n{paired.tables(result)}".strip() for decoding, result in results.items())
    say(text)
    if out:
        write_json(out / "comparison.json", results)
        (out / "comparison.md").write_text(text + "\n", encoding="utf-8")


def say(text: str) -> None:
    """Print and flush. If the reader has closed the pipe, as `| head` does, print nothing more."""
    try:
        print(text, flush=True)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def main(options: Options) -> None:
    try:
        require_own_kernels()
        world = start(options.device)
        if options.compare:
            compare(options, world)
        else:
            task = answer if options.prompt else evaluate if options.data else talk
            task(as_trained(options, world), world)
    except UserError as mistake:
        exit_with_error("sample.py", mistake)
    finally:
        release()
        stop()


if __name__ == "__main__":
    main(OPTIONS)

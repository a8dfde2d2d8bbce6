"""Answer a prompt, or measure a policy:

    torchrun --nproc_per_node=1 sample.py --prompt "374*6?"
    torchrun --nproc_per_node=2 sample.py --data FILE --n 8 --temperature 1
    torchrun --nproc_per_node=1 sample.py --long DIR --short DIR --prompt "…"

Prints accuracy, tokens (mean, max, share truncated), pass@k, maj@k and tokens per correct answer.
"""

from dataclasses import dataclass

from thinkrl.config import command_line, option, options_help, read_options


@dataclass(frozen=True)
class Options:
    _what = "what to answer"
    model: str = option("tiny", "Hugging Face folder, or 'tiny', the embedded model")
    prompt: str = option("", "answer this and print it")
    data: str = option("", "evaluate on: 'arith' (held out) | FILE.jsonl | FILE.parquet | hub:owner/name")
    source: str = option("", "grading rule for rows that name none: arith | gsm8k | math")
    limit: int = option(0, "at most this many problems; 0: all")
    system: str = option("", "system message")
    suffix: str = option("", "text appended to every question")
    _how = "how"
    n: int = option(1, "completions per problem")
    max_tokens: int = option(0, "completion limit; 0: 200 for the embedded model, else 2048")
    temperature: float = option(1.0, "0 is greedy")
    seed: int = option(42, "seed of every sampled token")
    device: str = option("auto", "where to compute", ("auto", "cpu", "cuda"))
    dtype: str = option("auto", "bfloat16 on CUDA, float32 on CPU", ("auto", "float32", "bfloat16"))
    out: str = option("", "also write every completion to this JSONL file")


def parse_options(argv: list[str]) -> Options:
    if "--help" in argv or "-h" in argv:
        print("\n".join(["usage: torchrun --nproc_per_node=N sample.py --prompt TEXT | --data FILE [--key value …]",
                         *options_help(Options)]))
        raise SystemExit(0)
    return Options(**read_options(argv, Options))


if __name__ == "__main__":  # before torch is imported
    OPTIONS = command_line("sample.py", parse_options)

import json

from tqdm import tqdm

from thinkrl import UserError, require_own_kernels
from thinkrl.checkpoint import load_model
from thinkrl.config import excuse
from thinkrl.distributed import World, gather, start, stop
from thinkrl.evaluate import summarise
from thinkrl.learner import compute_dtype, model_path
from thinkrl.problems import held_out_problems
from thinkrl.rollout import EVALUATION, prompt_ids, rollout
from thinkrl.sampler import Sampler
from thinkrl.tokenizer import Tokenizer
from thinkrl.types import Problem

BATCH = 64  # problems per call, so that the bar moves


def answer(options: Options, world: World) -> None:
    """One prompt, n completions, printed as they came."""
    tokenizer, sampler = load(options, world)
    prompt = prompt_ids(Problem(0, options.prompt, ""), tokenizer, options.system, options.suffix)
    [group] = sampler.generate([prompt], n=options.n, max_tokens=limit(options), temperature=options.temperature, seed=options.seed)
    for completion in group if world.main else []:
        print(f"{tokenizer.decode(completion.tokens)}\n[{len(completion.tokens)} tokens, {completion.finish_reason}]")


def evaluate(options: Options, world: World) -> None:
    """n attempts at every problem, shared over the ranks."""
    tokenizer, sampler = load(options, world)
    problems = held_out_problems(options.data, options.data, options.source)
    problems = problems[: options.limit or len(problems)]
    mine = [problems[i] for i in world.share(len(problems))]
    trajectories = []
    for i in tqdm(range(0, len(mine), BATCH), desc="evaluate", unit=f"×{BATCH} problems", disable=not world.main):
        trajectories += rollout(sampler, tokenizer, mine[i : i + BATCH], group_size=options.n, max_tokens=limit(options),
                                temperature=options.temperature, seed=options.seed, address=(EVALUATION, 0),
                                system=options.system, suffix=options.suffix)
    everything = sum(gather(trajectories), [])
    if not world.main:
        return
    if options.out:
        with open(options.out, "w") as file:
            for t in everything:
                file.write(json.dumps({"problem": t.problem.id, "question": t.problem.question, "gold": t.problem.answer,
                                       "text": t.text, "answer": t.answer, "correct": t.correct, "tokens": t.tokens}) + "\n")
    for name, value in summarise(everything).items():
        if name == "by_level":
            for level, row in value.items():
                print(f"  {level or 'all':<20} accuracy {row['accuracy']:.3f}   tokens {row['tokens']:.1f}")
        elif value is not None:
            print(f"{name:<22} {value:.4g}")


def load(options: Options, world: World) -> tuple[Tokenizer, Sampler]:
    path = model_path(options.model)
    tokenizer = Tokenizer(path)
    return tokenizer, Sampler(load_model(path, compute_dtype(options, world), world.device), tokenizer)


def limit(options: Options) -> int:
    return options.max_tokens or (200 if options.model == "tiny" else 2048)


def main(options: Options) -> None:
    try:
        require_own_kernels()
        world = start(options.device)
        if bool(options.prompt) == bool(options.data):
            raise UserError("give either --prompt TEXT or --data FILE")
        (answer if options.prompt else evaluate)(options, world)
    except UserError as mistake:
        excuse("sample.py", mistake)
    finally:
        stop()


if __name__ == "__main__":
    main(OPTIONS)

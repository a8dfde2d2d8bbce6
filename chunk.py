"""Make the cold-start files of Long⊗Short: chains -> thoughts -> importance -> labels -> two files.

    torchrun --nproc_per_node=8 chunk.py --data FILE.jsonl --model DIR --out DIR [--key value …]

A row is {"problem", "solution", "answer", "response"}, or with "question" for "problem" and "thought" for
"response". A JSON list in the layout of OpenMath-ThoughtChunk is also read, with its blocks. `--data arith`
takes the built-in chains.

The folder --out has

    config.json          options that change items; the command that continues must have the same
    parts/rank_R.jsonl   finished items, appended one by one; a killed run continues from them, on any number
                         of ranks
    annotated.json       every usable item: thoughts, accuracies after each, importance, labels, segments
    long.json short.json alpaca rows for `train.py sft`
    rejects.jsonl        every other item with the reason; "said" is the rejected text of the model
    summary.json         counts
"""

from dataclasses import asdict, dataclass, replace

from thinkrl import UserError
from thinkrl.options import command_line, group, option, parse_as


@dataclass(frozen=True)
class Options:
    given: frozenset[str] = frozenset()  # names of the options that were given
    _what = group("What to chunk")
    data: str = option(
        "arith", "FILE, hub:owner/name[:config][:split], several joined by +; or 'arith', the built-in chains"
    )
    limit: int = option(0, "at most this many rows; 0: all (arith: 400)", low=0)
    source: str = option(
        "",
        "grading rule, which overrides the rows': arith | gsm8k | last_number | math; empty: the row's own",
    )
    columns: str = option("", "which column holds what, for a layout of your own: problem=NAME,answer=NAME")
    skip_bad_rows: bool = option(False, "leave out rows that cannot be used, and print how many")
    suffix: str = option("", "text appended to every question")
    out: str = option("runs/chunk", "folder to write; an unfinished one is continued")
    plot: bool = option(False, "also draw importance along the chain (extra [report])")
    _how = group("Thoughts and rollouts")
    model: str = option(
        "tiny", "model that samples the rollouts: the base policy, a Hugging Face folder, or 'tiny'"
    )
    chunker: str = option(
        "",
        "how chains are cut into thoughts; empty: llm, or tags for the embedded model",
        ("", "llm", "paragraphs", "tags"),
    )
    completer: str = option(
        "",
        "how short thoughts are written; empty: llm, or block (their own text) for the embedded model",
        ("", "llm", "block"),
    )
    rollouts: int = option(8, "continuations of every prefix (N)", low=1)
    temperature: float = option(0.7, "sampling temperature of the rollouts", low=0)
    max_tokens: int = option(
        0,
        "length limit of a rollout; 0: 200 for the embedded model, else 4096, lowered to fit the context",
        low=0,
    )
    decay: float = option(
        0.25,
        "δ, subtracted from the importance of a thought that does not raise the accuracy (Eq. 1)",
        above=0,
        below=1,
    )
    prompts: str = option(
        "",
        "JSON file with the role prompts and the two requests; empty: the model folder's, else the built-in",
    )
    _instruct = group("Instruct model")
    instruct_model: str = option("", "model that chunks and completes; empty: --model")
    instruct_max_tokens: int = option(
        7120, "length limit of one of its answers; the default is lowered to fit its context", low=1
    )
    instruct_temperature: float = option(
        0.1, "sampling temperature of its answers; at most 5 per request", low=0
    )
    _run = group("Run")
    seed: int = option(42, "seed of every sampled token")
    timeout: float = option(
        10.0,
        "minutes without a token after which a rank that does not wait for others is taken for stalled, or "
        "without a sign of life for gone: the job ends, and it is named",
        above=0,
    )
    items_per_batch: int = option(
        8, "items in progress on a rank; a kill loses at most their unfinished work", low=1
    )
    device: str = option("auto", "device", ("auto", "cpu", "cuda"))
    dtype: str = option(
        "auto", "compute dtype; auto: bfloat16 on CUDA, float32 on CPU", ("auto", "float32", "bfloat16")
    )


# --prompts: role prompts are only used when the final files are written, and `settings_of` has the requests.
FREE_TO_CHANGE = {"given", "limit", "plot", "out", "prompts", "items_per_batch", "device", "dtype", "timeout"}


def parse_options(argv: list[str]) -> Options:
    usage = "torchrun --nproc_per_node=N chunk.py --data FILE --model DIR [--key value …]"
    options = parse_as(Options, argv, usage)
    tiny = options.model == "tiny"
    return replace(
        options,
        chunker=options.chunker or ("tags" if tiny else "llm"),
        completer=options.completer or ("block" if tiny else "llm"),
        max_tokens=options.max_tokens or (200 if tiny else 4096),
        limit=options.limit or (400 if options.data == "arith" else 0),
    )


if __name__ == "__main__":  # before torch is imported
    OPTIONS = command_line("chunk.py", parse_options)

import contextlib
import json
import random
import re
import zlib
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path

from tqdm import tqdm

from thinkrl import arith, require_own_kernels
from thinkrl.checkpoint import load_model, read_config
from thinkrl.data import layouts, rows
from thinkrl.data.problems import messages
from thinkrl.distributed import World, from_main, run_and_exit, start, stop, together
from thinkrl.learner import compute_dtype, model_path
from thinkrl.longshort import thoughts
from thinkrl.longshort.conversation import Prompts, load_prompts
from thinkrl.longshort.thoughts import Rejected, Sampling, Thought
from thinkrl.options import exit_with_error
from thinkrl.run import watch
from thinkrl.run.files import write_json
from thinkrl.run.folder import open_out
from thinkrl.run.lock import hold, release
from thinkrl.run.parts import open_part, read_parts
from thinkrl.run.signals import Stopped, StopRequest, exit_when_stopped
from thinkrl.sampler import Sampler
from thinkrl.tokenizer import Tokenizer
from thinkrl.types import Problem


@dataclass(frozen=True)
class Item:
    """One row: a problem, whose id is the row's index, and a long chain for it."""

    problem: Problem
    response: str
    blocks: dict | None = None  # the row's own chunking, if any


@dataclass(frozen=True)
class Tools:
    sampler: Sampler  # of the model that samples rollouts
    instruct: Sampler  # of the model that chunks and completes
    prompts: Prompts  # with the requests


def fitted(options: Options) -> tuple[Options, str]:
    """Lower default length limits to fit the models' contexts; also return a line about it, or "".

    A quarter of a context is kept for the question; half of the rest is for the chain, half for new tokens.
    """
    limits = {"max_tokens": options.model}
    if "llm" in (options.chunker, options.completer):
        limits["instruct_max_tokens"] = options.instruct_model or options.model
    lowered, said = {}, []
    for key, model in limits.items():
        context, default = read_config(model_path(model)).max_positions, getattr(options, key)
        limit = max(1, 3 * context // 8)
        if key not in options.given and default > limit:
            lowered[key] = limit
            said.append(
                f"--{key} {limit} (default {default}): lowered to the model's context of {context} tokens"
            )
    return replace(options, **lowered), "\n".join(said)


def chunk(options: Options, world: World) -> None:
    options, lowered = fitted(options)
    if lowered and world.main:
        print(lowered)
    items = load_items(options)
    prompts = load_prompts(options.prompts, model_path(options.model))
    if options.plot:
        thoughts.require_pyplot()
    folder, settings = Path(options.out), settings_of(options, prompts)
    hold(folder, world)
    # rank 0 reads for all ranks, before any of them writes
    finished = from_main(together(open_folder, folder, settings, world))
    waiting = [item for item in items if item.problem.id not in finished]
    tools = together(load_tools, options, prompts, world) if waiting else None
    if world.main:
        # not before: a failed start must not fix the folder's settings
        write_json(folder / "config.json", settings)

    at_once = world.size * options.items_per_batch
    stop_request = StopRequest("these items", world.main)
    with (
        watch.watching("chunk.py", options.timeout, world),
        contextlib.closing(stop_request),
        open_part(folder, world.rank) as part,
        tqdm(total=len(waiting), desc="chunk", unit="item", disable=None if world.main else True) as bar,
    ):

        def work(mine: Sequence[Item]) -> None:
            for line in annotate(mine, tools, options):
                part.write(json.dumps(line) + "\n")
            part.flush()

        for at in range(0, len(waiting), at_once):
            dealt = waiting[at : at + at_once]
            watch.at("items", at // at_once + 1)
            # interleaved, because adjacent rows of a file are often alike
            together(work, dealt[world.rank :: world.size])
            bar.update(len(dealt))
            if stop_request.agreed():
                raise Stopped(f"stopped, finished items are saved: the same command continues {folder}")
    if world.main:
        merge(folder, len(items), prompts, options.plot)


def load_items(options: Options) -> list[Item]:
    """Read and check every row. Raises UserError with file, row and field."""
    if options.data == "arith":
        teacher = replace(arith.TEACHER, decompose=(1.0, 1.0), empty=0.0)  # long chains: always in steps
        problems = [arith.training_problem(options.seed, i) for i in range(options.limit)]
        return [
            Item(p, arith.chain(p, random.Random(f"chunk/{options.seed}/{p.id}"), teacher)) for p in problems
        ]

    def item(fields: rows.Fields) -> list[Item]:
        # the chain refers to the row's order of options
        problem = layouts.problem(fields, options.source, shuffle=False)
        response = fields.text("thought", "response")
        if not response:
            raise fields.error(
                "field 'response' (or 'thought') is missing or empty: the long chain is expected there"
            )
        return [Item(problem, response, fields.values.get("block") or None)]

    items = rows.load(options.data, item, options.columns, options.skip_bad_rows)
    items = [replace(item, problem=replace(item.problem, id=i)) for i, item in enumerate(items)]
    return items[: options.limit or None]


def load_tools(options: Options, prompts: Prompts, world: World) -> Tools:
    def sampler(model: str) -> Sampler:
        path = model_path(model)
        return Sampler(
            load_model(path, compute_dtype(options, world), world.device),
            Tokenizer(path),
            memory_share=0.4 if other else 0.8,
        )

    other = options.instruct_model not in ("", options.model) and "llm" in (
        options.chunker,
        options.completer,
    )
    base = sampler(options.model)
    return Tools(base, sampler(options.instruct_model) if other else base, prompts)


def annotate(items: Sequence[Item], tools: Tools, options: Options) -> list[dict]:
    """Make one line of the part file per item: {"id", "item": …} or {"id", "rejected": reason, …}."""
    by_id = {item.problem.id: item for item in items}
    asked = {i: messages(item.problem, suffix=options.suffix)[-1]["content"] for i, item in by_id.items()}
    chains = cut(by_id, tools, options)
    chains |= {
        i: attempt(with_room, by_id[i].problem, chain, tools, options) for i, chain in usable(chains).items()
    }
    measured = measure(by_id, usable(chains), tools, options)
    texts = complete(by_id, usable(chains), measured, asked, tools, options)
    talks = {
        i: attempt(thoughts.segments, text, measured[i]["labels"], by_id[i].problem)
        for i, text in usable(texts).items()
    }
    reached = chains | texts | talks  # each item's result of the last stage it reached
    return [line(item, measured.get(i, {}), asked[i], reached[i]) for i, item in by_id.items()]


def usable(results: dict) -> dict:
    return {i: result for i, result in results.items() if not isinstance(result, Rejected)}


def with_room(problem: Problem, chain: list[Thought], tools: Tools, options: Options) -> list[Thought]:
    """Return the chain. Raises Rejected if its rollouts do not fit the context."""
    sampler = tools.sampler
    context = sampler.model.config.max_positions
    thoughts.require_chain(problem, chain, sampler.tokenizer, context, options.max_tokens, options.suffix)
    return chain


def measure(
    by_id: dict[int, Item], chains: dict[int, list[Thought]], tools: Tools, options: Options
) -> dict[int, dict]:
    """Compute rollouts, importance and labels of each chain, as fields of its line."""
    tokenizer = tools.sampler.tokenizer
    model = Sampling(tools.sampler, tokenizer, options.max_tokens, options.temperature, options.seed)
    problems = [by_id[i].problem for i in chains]
    rolled = thoughts.rollouts(model, problems, list(chains.values()), options.rollouts, options.suffix)
    measured = {}
    for (i, chain), prefixes in zip(chains.items(), rolled):
        lengths = thoughts.token_lengths(chain, tokenizer)
        accuracies = [prefix.accuracy for prefix in prefixes]
        scores = thoughts.importance(lengths, accuracies, options.decay)
        measured[i] = {
            "thoughts": [thought.text for thought in chain],
            "types": [thought.kind for thought in chain],
            "lengths": lengths,
            "accuracies": accuracies,
            "new_tokens": [prefix.new_tokens for prefix in prefixes],
            "importance": scores,
            "labels": thoughts.label(scores),
        }
    return measured


def complete(
    by_id: dict[int, Item],
    chains: dict[int, list[Thought]],
    measured: dict[int, dict],
    asked: dict[int, str],
    tools: Tools,
    options: Options,
) -> dict[int, list[str] | Rejected]:
    """Texts of each chain's segments, the short ones completed."""
    if options.completer == "block":
        return {
            i: thoughts.complete_by_block(
                by_id[i].problem, chain, measured[i]["labels"], thoughts.split_response(by_id[i].response)[1]
            )
            for i, chain in chains.items()
        }
    written = thoughts.complete_by_model(
        instruct_model(tools, options),
        [by_id[i].problem for i in chains],
        [asked[i] for i in chains],
        list(chains.values()),
        [measured[i]["labels"] for i in chains],
        tools.prompts,
    )
    return dict(zip(chains, written))


def line(item: Item, measured: dict, asked: str, talk: list[str] | Rejected) -> dict:
    """Make an item's line of the part file."""
    problem = item.problem
    row = {
        "question": problem.question,
        "answer": problem.answer,
        "source": problem.source,
        "thought": item.response,
        **measured,
    }
    if isinstance(talk, Rejected):
        said = {"said": talk.said} if talk.said else {}
        return {"id": problem.id, "rejected": str(talk), **said, **row}
    return {"id": problem.id, "item": row | {"asked": asked, "segments": talk}}


def cut(by_id: dict[int, Item], tools: Tools, options: Options) -> dict[int, list[Thought] | Rejected]:
    """Cut each chain into thoughts. A row with usable blocks is not chunked again."""
    if options.chunker != "llm":
        split = {"paragraphs": thoughts.paragraphs, "tags": thoughts.tags}[options.chunker]
        return {i: attempt(split, item.response) for i, item in by_id.items()}
    chains = {i: attempt(thoughts.given_blocks, item.blocks, item.response) for i, item in by_id.items()}
    ask = [i for i, chain in chains.items() if isinstance(chain, Rejected)]
    if ask:
        problems, responses = [by_id[i].problem for i in ask], [by_id[i].response for i in ask]
        model = instruct_model(tools, options)
        chains |= dict(zip(ask, thoughts.chunk_by_model(model, problems, responses, tools.prompts)))
    return chains


def instruct_model(tools: Tools, options: Options) -> Sampling:
    """Model that chunks and completes, with its sampling options."""
    sampler, limit = tools.instruct, options.instruct_max_tokens
    return Sampling(sampler, sampler.tokenizer, limit, options.instruct_temperature, options.seed)


def attempt(function: Callable, *arguments):
    """Call a function; return its result, or the Rejected that it raised."""
    try:
        return function(*arguments)
    except Rejected as reason:
        return reason


def settings_of(options: Options, prompts: Prompts) -> dict:
    """Settings that change items, for the folder's config.json."""
    settings = {key: value for key, value in asdict(options).items() if key not in FREE_TO_CHANGE}
    if options.data != "arith":
        settings["data_crc32"] = [zlib.crc32(path.read_bytes()) for path in rows.data_files(options.data)]
    if "llm" in (options.chunker, options.completer):
        settings["requests_crc32"] = [zlib.crc32(text.encode()) for text in (prompts.chunk, prompts.complete)]
    return settings


def open_folder(folder: Path, settings: dict, world: World) -> set[int]:
    """Ids of the finished items, on rank 0. Raises UserError if they were made with other settings."""
    if not world.main:
        return set()
    open_out(folder, settings)
    return {line["id"] for line in read_parts(folder)}


def merge(folder: Path, count: int, prompts: Prompts, draw: bool) -> None:
    """Write the final files from the parts. Raises UserError, after writing them, if no item is usable."""
    lines = sorted((line for line in read_parts(folder) if line["id"] < count), key=lambda line: line["id"])
    items = [{"id": line["id"], **line["item"]} for line in lines if "item" in line]
    rejects = [line for line in lines if "rejected" in line]
    assert [line["id"] for line in lines] == list(range(count)), f"{len(lines)} lines for {count} items"
    long, short = [], []
    for item in items:
        own = thoughts.cold_start(item["asked"], item["segments"], prompts)
        long += own[0]
        short += own[1]
    summary = {
        "rows": count,
        "kept": len(items),
        "long_rows": len(long),
        "short_rows": len(short),
        "rejected": dict(Counter(re.sub(r"\d+", "N", line["rejected"]) for line in rejects).most_common()),
        "thoughts": sum(len(item["thoughts"]) for item in items) / max(1, len(items)),
        "segments": sum(len(item["segments"]) for item in items) / max(1, len(items)),
    }
    for name, content in {"annotated": items, "long": long, "short": short, "summary": summary}.items():
        write_json(folder / f"{name}.json", content)
    temporary = folder / "rejects.jsonl.tmp"
    temporary.write_text("".join(json.dumps(line) + "\n" for line in rejects))
    temporary.replace(folder / "rejects.jsonl")
    if draw and items:
        thoughts.plot(items, folder / "importance.png")
    print(json.dumps(summary, indent=2) + f"\ncold start: {folder}/long.json, {folder}/short.json")
    if not items:
        raise UserError(f"none of {count} rows can be used: {folder}/rejects.jsonl says why")


def main(options: Options) -> None:
    try:
        require_own_kernels()
        world = start(options.device)
        chunk(options, world)
    except UserError as mistake:
        exit_with_error("chunk.py", mistake)
    except Stopped as request:
        exit_when_stopped("chunk.py", request)
    finally:
        release()
        stop()


if __name__ == "__main__":
    run_and_exit(main, OPTIONS)

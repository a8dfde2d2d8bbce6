"""The act of a rollout: problems in, graded trajectories out. Training, evaluation and sample.py all come through here.

Each attempt's randomness has an address: (seed, *address, problem, sample). The same attempt comes out at any
world size.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from tqdm import tqdm

from thinkrl import UserError
from thinkrl.config import Config, readers
from thinkrl.data.problems import messages
from thinkrl.grading import extract, grade
from thinkrl.run.files import read_json
from thinkrl.sampler import Sampler
from thinkrl.tokenizer import Tokenizer
from thinkrl.types import Problem, Trajectory, Turn

TRAINING, EVALUATION, PROBE, LABELS = range(
    4
)  # first part of an address: no two purposes draw the same numbers


SAMPLING_FILE = "sampling.json"  # beside a policy's weights: how it was sampled in training
SAMPLING_KEYS = ("system", "suffix", "max_tokens", "temperature")


def sampling_file(config: Config) -> dict[str, str]:
    """The file that says how a policy is sampled in this run, name -> text: sample.py does it the same way."""
    values = {key: config[key] for key in SAMPLING_KEYS if config.preset in readers(key)}
    return {SAMPLING_FILE: json.dumps(values, indent=2, ensure_ascii=False) + "\n"}


def read_sampling(folder: Path) -> dict:
    """What `sampling_file` wrote beside a policy's weights; {} for a model that was not trained here."""
    values = read_json(folder / SAMPLING_FILE, missing={})
    return {key: values[key] for key in SAMPLING_KEYS if key in values}


@contextmanager
def completions_bar(
    samplers: Iterable[Sampler], total: int | None, what: str, shown: bool, delay: float = 3
) -> Iterator[tqdm]:
    """A bar that moves with every completion of a prompt. On a terminal only, and after `delay` seconds; it leaves nothing.

    total: None where it is not known.
    """
    samplers = list(samplers)
    with tqdm(
        total=total,
        desc=what,
        unit="completion",
        leave=False,
        delay=delay,
        dynamic_ncols=True,
        disable=None if shown else True,  # None: only on a terminal
    ) as bar:
        for sampler in samplers:
            sampler.on_completion = bar.update
        try:
            yield bar
        finally:
            for sampler in samplers:
                sampler.on_completion = None


def prompt_ids(problem: Problem, tokenizer: Tokenizer, system: str = "", suffix: str = "") -> list[int]:
    return tokenizer.encode_chat(messages(problem, system, suffix))


def require_room(
    problems: Sequence[Problem],
    prompts: Sequence[list[int]],
    context: int,
    max_tokens: int,
    option: str = "--max_tokens",
) -> None:
    """Raise UserError before the first step if a problem's prompt leaves no room for max_tokens more in the model's
    context. option: the one that sets them.
    """
    for problem, prompt in zip(problems, prompts, strict=True):
        if len(prompt) + max_tokens > context:
            raise UserError(
                f"problem {problem.id} (counted from 0): a prompt of {len(prompt)} tokens and {max_tokens} more, sampled "
                f"or probed, exceed the model's context of {context}; lower {option}, or leave the problem out"
            )


def rollout(
    sampler: Sampler,
    tokenizer: Tokenizer,
    problems: list[Problem],
    *,
    group_size: int,
    max_tokens: int,
    temperature: float,
    seed: int,
    address: tuple[int, ...],
    system: str = "",
    suffix: str = "",
    on_finish: Callable | None = None,
    return_hidden: bool = False,
) -> list[Trajectory]:
    """`group_size` attempts at each problem, groups contiguous, each graded: `outcome_reward` and `reward`
    are 0 or 1.
    """
    prompts = [prompt_ids(problem, tokenizer, system, suffix) for problem in problems]
    keys = [(*address, problem.id, sample) for problem in problems for sample in range(group_size)]
    groups = sampler.generate(
        prompts,
        n=group_size,
        max_tokens=max_tokens,
        temperature=temperature,
        stop_ids=tokenizer.stop_ids,
        seed=seed,
        keys=keys,
        on_finish=on_finish,
        return_hidden=return_hidden,
    )
    trajectories = []
    for problem, prompt, group in zip(problems, prompts, groups):
        for sample, written in enumerate(group):
            turn = Turn(
                "policy", prompt, written.tokens, written.logprobs, written.finish_reason, written.hidden
            )
            trajectories.append(graded(problem, sample, turn, tokenizer.decode(written.tokens)))
    return trajectories


def graded(problem: Problem, sample: int, turn: Turn, text: str) -> Trajectory:
    """One attempt that ends with this turn; text is what is graded."""
    outcome = float(grade(text, problem.answer, problem.source))
    return Trajectory(problem, sample, [turn], text, extract(text, problem.source), outcome, outcome)


def sample_differences(
    sample: Callable[[list[Problem]], Sequence[Trajectory]], rounds: list[list[Problem]], group_size: int
) -> tuple[list[Trajectory], list[Trajectory]]:
    """DAPO's dynamic sampling: groups that are all right or all wrong make place for other problems'. DAPO (2503.14476) §3.2

    sample attempts problems, groups of `group_size` contiguous. rounds: the problems, then the spare ones of each
    further round, slot by slot. A group that still has no differences after the last round stays. Returns the
    trajectories that are trained on, as many as without, and those that were replaced.
    """

    def groups_of(problems: list[Problem]) -> list[list[Trajectory]]:
        flat = list(sample(problems)) if problems else []
        return [flat[i : i + group_size] for i in range(0, len(flat), group_size)]

    groups, replaced = groups_of(rounds[0]), []
    for spare in rounds[1:]:
        equal = [i for i, group in enumerate(groups) if len({t.outcome_reward for t in group}) == 1]
        for i, fresh in zip(equal, groups_of([spare[i] for i in equal]), strict=True):
            replaced += groups[i]
            groups[i] = fresh
    return sum(groups, []), replaced

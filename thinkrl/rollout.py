"""Rollouts: sample and grade attempts at problems, for training, evaluation and sample.py.

An attempt's random numbers have the key (seed, *address, problem, sample), so it is the same at any world
size.
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

TRAINING, EVALUATION, PROBE, LABELS = range(4)  # first number of a key, different for each purpose


SAMPLING_FILE = "sampling.json"  # in a policy's folder: its sampling options in training
SAMPLING_KEYS = ("system", "suffix", "max_tokens", "temperature")


def sampling_file(config: Config) -> dict[str, str]:
    """Make the file, {name: text}, with this run's sampling options, which sample.py uses as defaults."""
    values = {key: config[key] for key in SAMPLING_KEYS if config.preset in readers(key)}
    return {SAMPLING_FILE: json.dumps(values, indent=2, ensure_ascii=False) + "\n"}


def read_sampling(folder: Path) -> dict:
    """Read the file of `sampling_file` from a policy's folder; {} for a model that was not trained here."""
    values = read_json(folder / SAMPLING_FILE, missing={})
    return {key: values[key] for key in SAMPLING_KEYS if key in values}


@contextmanager
def completions_bar(
    samplers: Iterable[Sampler], total: int | None, what: str, shown: bool, delay: float = 3
) -> Iterator[tqdm]:
    """Show a progress bar of completions, only on a terminal and after `delay` seconds; removed at the end.

    total: None if unknown.
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
    """Prompt ids of a problem, by the chat template. system, suffix: see `messages`."""
    return tokenizer.encode_chat(messages(problem, system, suffix))


def require_room(
    problems: Sequence[Problem],
    prompts: Sequence[list[int]],
    context: int,
    max_tokens: int,
    option: str = "--max_tokens",
) -> None:
    """Raise UserError if a prompt and max_tokens more exceed the model's context. option: its name for the
    error.
    """
    for problem, prompt in zip(problems, prompts, strict=True):
        if len(prompt) + max_tokens > context:
            raise UserError(
                f"problem {problem.id} (counted from 0): a prompt of {len(prompt)} tokens and {max_tokens} "
                f"more, sampled or probed, exceed the model's context of {context}; lower {option}, or leave "
                "the problem out"
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
    """Sample and grade `group_size` attempts at each problem, groups contiguous; rewards are 0 or 1."""
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
    """Grade `text` and make the trajectory of one turn."""
    outcome = float(grade(text, problem.answer, problem.source))
    return Trajectory(problem, sample, [turn], text, extract(text, problem.source), outcome, outcome)


def sample_differences(
    sample: Callable[[list[Problem]], Sequence[Trajectory]], rounds: list[list[Problem]], group_size: int
) -> tuple[list[Trajectory], list[Trajectory]]:
    """Sample groups; replace those that are all right or all wrong by other problems'. DAPO (2503.14476) §3.2

    sample: attempts problems, groups of `group_size` contiguous. rounds: the problems, then the spare ones of
    each further round, slot by slot. A group without differences after the last round stays. Returns the
    trajectories to train on, always the same number, and the replaced ones.
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

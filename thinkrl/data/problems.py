"""Problems of a run: their sources, their order on every rank, and the chat of a prompt.

    arith, gym:TASK        generators, built in and reasoning-gym's: endless for training, with a separate
                           held-out set
    FILE or hub:DATASET    files in a layout of `layouts`; several are joined, A+B

All data is read and checked before the first step.
"""

from __future__ import annotations

import functools
import random
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Generic, TypeVar

from thinkrl import UserError, arith, gym
from thinkrl.data import layouts, rows
from thinkrl.distributed import share
from thinkrl.grading import rule_set
from thinkrl.types import Problem

Row = TypeVar("Row")
Generator = Callable[[int, int], Row]  # (seed, index) -> a row of an endless stream

# Instruction after a question that does not mention the answer's marker, by grading rule: (marker, text).
INSTRUCTIONS = {
    "arith": ("", ""),
    "gsm8k": (
        "####",
        "Think step by step, then give the final answer as a number after ####, on a line of its own.",
    ),
    "last_number": ("", ""),
    "gym": ("<answer>", "Think step by step, then give the final answer between <answer> and </answer>."),
    "math": (r"\boxed", r"Think step by step, then put the final answer in \boxed{}."),
}


class Stream(Generic[Row]):
    """Endless stream of training rows in steps. It has no state: the step's number determines its rows.

    A list is shuffled in each epoch by (seed, epoch) and gives len // n steps of n rows; the remaining rows
    are not used in that epoch, so no row comes twice in one step. A generator gives its rows in order.
    """

    def __init__(self, rows: list[Row] | Generator, seed: int):
        self.rows = rows
        self.seed = seed

    def take(self, step: int, n: int, rank: int = 0, world: int = 1) -> list[Row]:
        """This rank's rows of a step of n: a contiguous block; the step is the same for any `world`.

        The first ranks take one row more if `world` does not divide n. Raises UserError if the list has fewer
        than n rows.
        """
        block = share(n, rank, world)
        if callable(self.rows):
            return [self.rows(self.seed, step * n + i) for i in block]
        if n > len(self.rows):
            raise UserError(
                f"the data has {len(self.rows)} rows, fewer than the {n} of one step: lower "
                "--problems_per_step"
            )
        epoch, step = divmod(step, len(self.rows) // n)
        order = _order(self.seed, epoch, len(self.rows))
        return [self.rows[order[step * n + i]] for i in block]

    def take_rounds(self, step: int, n: int, rounds: int, rank: int = 0, world: int = 1) -> list[list[Row]]:
        """Rows of a step of n and n spare rows for each further round: a list per round, slot by slot."""
        rows, block = self.take(step, n * rounds), share(n, rank, world)
        return [[rows[r * n + i] for i in block] for r in range(rounds)]

    def preview(self, n: int) -> list[Row]:
        """Rows to check before the first step: the whole list, or a generator's first n rows."""
        return self.take(0, n) if callable(self.rows) else self.rows


class Mixture(Stream[Row]):
    """Mixture of streams: the same number of rows of each stream in every step, in proportion to its weight.

    It has no state either; the order within a step depends on (seed, step).
    """

    def __init__(self, parts: Sequence[list[Row] | Generator], weights: Sequence[float], seed: int):
        self.streams = [Stream(rows, seed) for rows in parts]
        self.weights = weights
        self.seed = seed

    def take(self, step: int, n: int, rank: int = 0, world: int = 1) -> list[Row]:
        """As `Stream.take`. Raises UserError if n is too small for one row of each."""
        mixed = [
            row for stream, count in zip(self.streams, self.counts(n)) for row in stream.take(step, count)
        ]
        random.Random(f"mixture/{self.seed}/{step}").shuffle(mixed)
        return [mixed[i] for i in share(n, rank, world)]

    def counts(self, n: int) -> list[int]:
        """Number of rows of each stream in a step of n; the largest remainders are rounded up."""
        exact = [n * weight / sum(self.weights) for weight in self.weights]
        counts = [int(x) for x in exact]
        by_remainder = sorted(range(len(exact)), key=lambda i: counts[i] - exact[i])
        for i in by_remainder[: n - sum(counts)]:
            counts[i] += 1
        if min(counts) == 0:
            raise UserError(
                f"a step of {n} rows has none of part {counts.index(0) + 1} of --data: raise "
                "--problems_per_step, or its share in --data_weights"
            )
        return counts

    def preview(self, n: int) -> list[Row]:
        """As `Stream.preview`, for all parts."""
        return [row for stream, count in zip(self.streams, self.counts(n)) for row in stream.preview(count)]


def mix(parts: Sequence[list[Row] | Generator], weights: str, seed: int) -> Stream[Row]:
    """Make the stream of one part or the mixture of several. weights: "3,1", a positive number per part."""
    try:
        shares = [float(word) for word in weights.split(",")] if weights else []
    except ValueError:
        shares = [0.0]
    if any(not 0 < share < float("inf") for share in shares) or weights and len(shares) != len(parts):
        raise UserError(
            f"--data_weights {weights}: give a positive number for each of the {len(parts)} parts of --data, "
            "such as 3,1"
        )
    if shares:
        return Mixture(parts, shares, seed)
    [part] = parts
    return Stream(part, seed)


@functools.lru_cache(maxsize=8)
def _order(seed: int, epoch: int, size: int) -> list[int]:
    order = list(range(size))
    random.Random(f"order/{seed}/{epoch}").shuffle(order)
    return order


def load_problems(
    spec: str, source: str = "", columns: str = "", skip_bad_rows: bool = False, **how: bool
) -> list[Problem] | Generator:
    """Load all problems of files and datasets (see `rows`), or the training generator of "arith" or
    "gym:TASK".

    source: grading rule that overrides the rows'. columns, skip_bad_rows: as in `rows.load`; how: as in
    `layouts.problem`. Raises UserError, naming file, row and field, for data that cannot be read.
    """
    if is_generator(spec):
        return _generator(spec, source)
    return _in_rows(spec, source, columns, skip_bad_rows, **how)


def _in_rows(
    spec: str, source: str = "", columns: str = "", skip_bad_rows: bool = False, **how: bool
) -> list[Problem]:
    if endless := [part for part in rows.split_spec(spec) if is_generator(part)]:
        raise UserError(
            f"--data {spec}: {endless[0]} never ends, so joined to others it needs --data_weights"
        )
    problems = rows.load(
        spec, lambda fields: [layouts.problem(fields, source, **how)], columns, skip_bad_rows
    )
    return [replace(problem, id=i) for i, problem in enumerate(problems)]


def is_generator(spec: str) -> bool:
    """Whether a `--data` value is a single generator, arith or gym:TASK."""
    return spec == "arith" or spec.startswith("gym:") and len(rows.split_spec(spec)) == 1


def _generator(spec: str, source: str) -> Generator:
    """Make the training generator; raises a gym task's errors now."""
    if spec == "arith":
        return arith.training_problem
    gym.training_problem(spec, 0, 0)
    return lambda seed, index: _graded_by(source, gym.training_problem(spec, seed, index))


def _graded_by(source: str, problem: Problem) -> Problem:
    """Copy the problem with another grading rule, if one is given."""
    return replace(problem, source=source) if source else problem


def reading(options) -> dict:
    """Options of a program about reading rows, as keyword arguments of the functions here.

    Reward functions of the user get the row, and without the outcome reward among them the prompt is
    unchanged.
    """
    rewards = getattr(options, "reward", "").split("+")
    own = [name.strip() for name in rewards if name.strip() not in ("", "outcome")]
    how = {name: getattr(options, name) for name in ("source", "columns", "skip_bad_rows")}
    return how | {"keep_row": bool(own), "verbatim": len(own) == len(rewards)}


def training_stream(spec: str, seed: int, weights: str = "", **how) -> Stream[Problem]:
    """Training stream of `--data`. how: as in `load_problems`.

    weights: shares of a step for several parts joined by "+"; without weights the rows of all parts are one
    list.
    """
    if not weights:
        return Stream(load_problems(spec, **how), seed)
    names = rows.split_spec(spec)
    return mix(
        [_with_ids(load_problems(each, **how), i, len(names)) for i, each in enumerate(names)], weights, seed
    )


def _with_ids(part: list[Problem] | Generator, place: int, count: int) -> list[Problem] | Generator:
    """Renumber problems so that ids of `count` parts differ; they are part of the keys of random numbers."""

    def with_id(problem: Problem) -> Problem:
        return replace(problem, id=problem.id * count + place)

    if callable(part):
        return lambda seed, index: with_id(part(seed, index))
    return [with_id(problem) for problem in part]


def held_out_problems(eval_data: str, data: str, source: str = "", **how) -> list[Problem]:
    """Problems to evaluate on: `eval_data`, else the held-out set of `data` if it is a generator, else none.

    how: as in `load_problems`.
    """
    spec = eval_data or (data if is_generator(data) else "")
    if spec == "arith":
        return arith.heldout()
    if is_generator(spec):
        return [_graded_by(source, problem) for problem in gym.heldout(spec)]
    return _in_rows(spec, source, **how | {"keep_row": False}) if spec else []


def subsample(problems: list[Problem], count: int) -> list[Problem]:
    """At most `count` problems, evenly spaced, because files are often sorted by level or source."""
    count = min(count, len(problems))
    return [problems[i * len(problems) // count] for i in range(count)]


def messages(problem: Problem, system: str = "", suffix: str = "") -> list[dict[str, str]]:
    """Chat messages of the problem's prompt.

    system: system message if the row has none. suffix: appended to the question after a line break; empty:
    the `INSTRUCTIONS` of the problem's grading rule, unless the question already mentions the answer's
    marker, as verl's rows do.
    """
    if not suffix and problem.instruct:
        marker, instruction = INSTRUCTIONS[rule_set(problem.source)]
        suffix = "" if marker in problem.question else instruction
    question = f"{problem.question}\n{suffix}" if suffix else problem.question
    system = problem.system or system
    return [{"role": "system", "content": system}] * bool(system) + [{"role": "user", "content": question}]

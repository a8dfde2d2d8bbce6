"""Problems of reasoning-gym (extra [gym]), of any difficulty:  --data gym:TASK[,key=value…]

    gym:chain_sum,min_terms=3,max_digits=2          keys are those of the task's own configuration

The training stream is endless. A question's checksum decides whether it is for training or held out. The
answer is graded by the task's own scorer, because many tasks have several right answers; only score 1 is
right. A scorer that might run the answer as Python is refused.

A problem's `source` is its task and position, "gym:chain_sum#7.3" (block 7, row 3), from which the scorer's
entry is generated again.
"""

from __future__ import annotations

import difflib
import functools
import inspect
import json
import re
import sys
import zlib
from dataclasses import fields

from thinkrl import UserError, require_extra
from thinkrl.types import Problem

BLOCK = 100  # rows that are generated together: some tasks prepare all of their rows at once
HELD_OUT = 8  # one question in so many is held out
TRIES = 200  # draws for one problem before the task is said to have too few questions
_RUNS_TEXT = re.compile(r"(?<![\w.])(?:eval|exec)\(|\b(?:parse_expr|sympify)\(")


def training_problem(task: str, seed: int, index: int) -> Problem:
    """Problem `index` of the training stream of "gym:TASK,key=value…". Raises UserError."""
    return _draw(task, f"train/{seed}", index, index, held_out=False)


def heldout(task: str, count: int = 500) -> list[Problem]:
    """Held-out problems with different questions; fewer than `count` if the task has no more."""
    problems: dict[str, Problem] = {}
    for index in range(count):
        try:
            problem = _draw(task, "heldout", index, len(problems), held_out=True)
        except TooFew:
            break
        problems.setdefault(problem.question, problem)
    return list(problems.values())


class TooFew(UserError):
    """Error of a task that has too few different questions."""


def _draw(task: str, stream: str, index: int, id: int, held_out: bool) -> Problem:
    """Draw the first question at (stream, index) that is held out, or not, as asked."""
    _configuration(task)  # raises for a wrong task before generating
    block, row = divmod(index, BLOCK)
    for attempt in range(TRIES):
        number = zlib.crc32(f"{stream}/{attempt}/{block}".encode()) >> 1
        entry = _block(task, number)[row]
        if (zlib.crc32(entry["question"].encode()) % HELD_OUT == 0) == held_out:
            if not isinstance(entry["answer"], str) or not entry["answer"].strip():
                raise UserError(f"--data {task}: this task gives no answer of its own, and so no gold answer")
            return Problem(id, entry["question"], entry["answer"].strip(), f"{task}#{number}.{row}")
    raise TooFew(f"--data {task}: has too few different questions; make it harder")


def right(answer: str, source: str) -> bool:
    """Whether the task's scorer gives this answer to the source's problem score 1."""
    task, _, place = source.rpartition("#")
    number, row = map(int, place.split("."))
    dataset = _block(task, number)
    try:
        return float(dataset.score_answer(answer, dataset[row])) >= 1.0
    except Exception:  # an error of the scorer is not a right answer
        return False


@functools.lru_cache(maxsize=64)
def _block(task: str, number: int):
    """Generate the task's rows with this number as seed."""
    from reasoning_gym.factory import create_dataset

    name, values = _configuration(task)
    try:
        return create_dataset(name, seed=number, size=BLOCK, **values)
    except (AssertionError, ValueError, TypeError) as error:
        raise UserError(f"--data {task}: {error or 'these values do not go together'}") from None


@functools.lru_cache(maxsize=64)
def _configuration(task: str) -> tuple[str, dict]:
    """Name and configuration of "gym:TASK,key=value…". Raises UserError."""
    require_extra("reasoning_gym", "gym", f"--data {task}")
    from reasoning_gym.dataset import ProceduralDataset
    from reasoning_gym.factory import DATASETS

    name, *pairs = re.split(r",(?![^\[]*\])", task.removeprefix("gym:"))
    if name not in DATASETS:
        raise UserError(f"--data {task}: no task {name!r}{_nearest(name, DATASETS)}")
    dataset, configuration = DATASETS[name]
    own_scorer = dataset.score_answer is not ProceduralDataset.score_answer
    if own_scorer and _RUNS_TEXT.search(inspect.getsource(sys.modules[dataset.__module__])):
        raise UserError(
            f"--data {task}: its scorer might run the answer as Python, and a model writes the answer"
        )
    known = [field.name for field in fields(configuration) if field.name not in ("seed", "size")]
    values = {}
    for pair in pairs:
        key, equals, text = (part.strip() for part in pair.partition("="))
        if not equals or key not in known:
            raise UserError(
                f"--data {task}: {pair!r} is no key=value{_nearest(key, known)}: {', '.join(known)}"
            )
        values[key] = _value(text)
    return name, values


def _value(text: str):
    """Parse a number, true, false or [list] as JSON, else return the text."""
    try:
        return json.loads(text)
    except ValueError:
        return text


def _nearest(word: str, known) -> str:
    close = difflib.get_close_matches(word, known, n=1)
    return f" (did you mean {close[0]!r}?)" if close else ""

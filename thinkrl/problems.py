"""Where problems come from, and the order in which every rank meets them.

    arith                      the built-in generator: training never ends, its held-out set is apart
    FILE.jsonl, FILE.json      one object per line, or one list: problem | question, answer | solution, source, level, system
    FILE.parquet               the same, or verl's data_source, prompt, reward_model.ground_truth (`[parquet]` extra)
    hub:owner/name[:split]     such files of a Hugging Face dataset (`[hub]` extra)

An answer may come inside a solution, behind the marker of its grading rule ("… #### 42"). A row names its
rule in `source` or `data_source`; rows that name none take the caller's, else `gsm8k` if the answer has its
marker, else `math`. A row with `options` (or GPQA's columns "Correct Answer", "Incorrect Answer 1" …, or a
question that ends in "Candidate answer: (1) …, or (2) …") is multiple choice: its options are lettered in an
order that follows from the question alone, and the gold answer is a letter. Published files keep the right
one first. Everything is read and checked before the first step: what cannot be read stops the run with file,
row and field.
"""

from __future__ import annotations

import functools
import importlib.util
import json
import random
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from string import ascii_uppercase
from typing import Generic, TypeVar

from thinkrl import UserError, arith
from thinkrl.distributed import share
from thinkrl.grading import check_gold, extract, rule_set
from thinkrl.types import Problem

Row = TypeVar("Row")
Generator = Callable[[int, int], Row]  # (seed, index) -> row `index` of an endless stream

# What a question is followed by if it does not say itself where the answer goes; by grading rule.
INSTRUCTIONS = {
    "arith": ("", ""),
    "gsm8k": (
        "####",
        "Think step by step, then give the final answer as a number after ####, on a line of its own.",
    ),
    "last_number": ("", ""),
    "math": (r"\boxed", r"Think step by step, then put the final answer in \boxed{}."),
}


CANDIDATES = re.compile(
    r"\s*Candidate answers?:\s*(?=\(1\))"
)  # what stands before the options in Long⊗Short's GPQA file
GPQA_OPTIONS = ("Correct Answer", "Incorrect Answer 1", "Incorrect Answer 2", "Incorrect Answer 3")


class Stream(Generic[Row]):
    """An endless stream of rows for training, cut into steps. It has no state: a step's rows follow from its number.

    A list is shuffled anew in each epoch, by (seed, epoch) alone, and gives len // n steps of n rows; the few
    left over wait for the next epoch, so that no row comes twice in one step. A generator is simply counted
    through.
    """

    def __init__(self, rows: list[Row] | Generator, seed: int):
        self.rows = rows
        self.seed = seed

    def take(self, step: int, n: int, rank: int = 0, world: int = 1) -> list[Row]:
        """This rank's rows of a step of n: contiguous blocks that make up the same step, in order, for any `world`.

        Earlier ranks take one more where n does not divide. Raises UserError if the list has fewer than n
        rows.
        """
        block = share(n, rank, world)
        if callable(self.rows):
            return [self.rows(self.seed, step * n + i) for i in block]
        if n > len(self.rows):
            raise UserError(
                f"the data has {len(self.rows)} rows, fewer than the {n} of one step: lower --problems_per_step"
            )
        epoch, step = divmod(step, len(self.rows) // n)
        order = _order(self.seed, epoch, len(self.rows))
        return [self.rows[order[step * n + i]] for i in block]

    def take_rounds(self, step: int, n: int, rounds: int, rank: int = 0, world: int = 1) -> list[list[Row]]:
        """`take` of a step of n rows and as many spare ones for each further round: a list per round, slot by slot."""
        rows, block = self.take(step, n * rounds), share(n, rank, world)
        return [[rows[r * n + i] for i in block] for r in range(rounds)]

    def preview(self, n: int) -> list[Row]:
        """What can be looked at before the first step: the whole list, or what a generator gives to a
        first step of n.
        """
        return self.take(0, n) if callable(self.rows) else self.rows


@functools.lru_cache(maxsize=2)
def _order(seed: int, epoch: int, size: int) -> list[int]:
    order = list(range(size))
    random.Random(f"order/{seed}/{epoch}").shuffle(order)
    return order


def load_problems(spec: str, source: str = "") -> list[Problem] | Generator:
    """All problems of a file or dataset (see the module), or for "arith" the generator of its training stream.

    source: the grading rule of rows that name none. Raises UserError, naming file, row and field, for
    anything unreadable.
    """
    if spec == "arith":
        return arith.training_problem
    source = source or _source_of_dataset(spec)
    rows = (row for path in data_files(spec) for row in read_rows(path))
    return [_problem(i, row, where, source) for i, (where, row) in enumerate(rows)]


def held_out_problems(eval_data: str, data: str, source: str = "") -> list[Problem]:
    """The problems to evaluate on: `eval_data`, or arith's own held-out set for data "arith", or none."""
    spec = eval_data or (data if data == "arith" else "")
    if spec == "arith":
        return arith.heldout()
    return load_problems(spec, source) if spec else []


def subsample(problems: list[Problem], count: int) -> list[Problem]:
    """At most `count` of the problems, at even distances: a file is often sorted by level or source."""
    count = min(count, len(problems))
    return [problems[i * len(problems) // count] for i in range(count)]


def messages(problem: Problem, system: str = "", suffix: str = "") -> list[dict[str, str]]:
    """The chat that asks the problem.

    system: used where the row brings none. suffix: appended to the question after a line break; empty: the
    `INSTRUCTIONS` of the problem's grading rule, unless the question mentions the answer's marker itself
    (verl's rows do).
    """
    if not suffix:
        marker, instruction = INSTRUCTIONS[rule_set(problem.source)]
        suffix = "" if marker in problem.question else instruction
    question = f"{problem.question}\n{suffix}" if suffix else problem.question
    system = problem.system or system
    return [{"role": "system", "content": system}] * bool(system) + [{"role": "user", "content": question}]


def read_rows(path: str | Path) -> Iterator[tuple[str, dict]]:
    """(where, row) for each row of a JSONL, JSON-list or parquet file; where is "path:row", counted from 1 as lines are.

    Raises UserError for a file that is missing, empty or not of its kind, and for a row that is not an
    object.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"{path}: {'is a folder, not a data file' if path.is_dir() else 'no such data file'}")
    count = 0
    for where, row in _parquet_rows(path) if path.suffix == ".parquet" else _json_rows(path):
        if not isinstance(row, dict):
            raise UserError(f"{where}: a row must be an object with named fields, not {type(row).__name__}")
        count += 1
        yield where, row
    if count == 0:
        raise UserError(f"{path}: has no rows")


def text_field(row: dict, where: str, *names: str) -> str:
    """The first of these fields that is not empty, as text; "" if all are. UserError for one that is no
    text and no number.
    """
    for name in names:
        value = row.get(name)
        if isinstance(value, (int, float)) and not isinstance(value, bool):
            return str(value)
        if value is not None and not isinstance(value, str):
            raise UserError(f"{where}: field {name!r} must be text, not {type(value).__name__}")
        if value:
            return value
    return ""


def _json_rows(path: Path) -> Iterator[tuple[str, object]]:
    with path.open("rb") as file:
        is_list = file.read(1024).lstrip()[:1] == b"["
        file.seek(0)
        number = 0
        try:
            if is_list:
                for number, row in enumerate(json.load(file), start=1):
                    yield f"{path}:{number}", row
                return
            for number, line in enumerate(file, start=1):
                if line.strip():
                    yield f"{path}:{number}", json.loads(line)
        except (
            ValueError,
            RecursionError,
        ) as error:  # not JSON, not UTF-8, a number or a nesting beyond what Python reads
            line = getattr(error, "lineno", 1) if is_list else number
            raise UserError(f"{path}:{line}: not valid JSON ({error})") from None


def _parquet_rows(path: Path) -> Iterator[tuple[str, object]]:
    _require("pyarrow", "parquet", path)
    import pyarrow
    from pyarrow import parquet

    try:
        with parquet.ParquetFile(path) as file:
            rows = (row for batch in file.iter_batches() for row in batch.to_pylist())
            for number, row in enumerate(rows, start=1):
                yield f"{path}:{number}", row
    except pyarrow.ArrowException as error:
        raise UserError(f"{path}: not a readable parquet file ({error})") from None


def _require(module: str, extra: str, purpose: str | Path) -> None:
    if importlib.util.find_spec(module) is None:
        raise UserError(f"{purpose}: reading this needs {module}: pip install 'thinkrl[{extra}]'")


def _problem(index: int, row: dict, where: str, default: str) -> Problem:
    source = text_field(row, where, "source", "data_source") or default
    if "reward_model" in row:
        question, answer, system = _verl(row, where)
        extra, gold_field = row.get("extra_info"), "reward_model.ground_truth"
        solution = text_field(extra, where, "answer") if isinstance(extra, dict) else ""
    else:
        question, system = (
            text_field(row, where, "problem", "question", "Question"),
            text_field(row, where, "system"),
        )
        answer, gold_field = text_field(row, where, "answer", "Correct Answer"), "answer"
        solution = text_field(row, where, "solution")
        question, options = _options(question, row, where)
        if options:
            question, answer = _lettered(question, options, answer, where)
            solution = ""  # it speaks of the options in another order
    if not question:
        raise UserError(f"{where}: field 'problem' (or 'question') is missing or empty")
    source = source or ("gsm8k" if "####" in (answer or solution) else "math")
    try:
        gold = extract(answer or solution, source) or answer
    except UserError as error:
        raise UserError(f"{where}: field 'source': {error}") from None
    if not gold:
        raise UserError(f"{where}: field {gold_field!r} is missing or empty, and 'solution' gives no answer")
    try:
        check_gold(gold, source)
    except ValueError as error:
        raise UserError(f"{where}: field {gold_field!r}: {error}") from None
    return Problem(index, question, gold, source, text_field(row, where, "level"), solution or answer, system)


def _options(question: str, row: dict, where: str) -> tuple[str, list[str]]:
    """The question without its options, and these; none for a row that is not multiple choice."""
    if "options" in row:
        options, needed = (
            row["options"],
            f"field 'options' must be a list of 2 to {len(ascii_uppercase)} different texts",
        )
    elif GPQA_OPTIONS[0] in row:
        options = [text_field(row, where, name) for name in GPQA_OPTIONS]
        needed = f"fields {', '.join(map(repr, GPQA_OPTIONS))} must be different texts, none of them empty"
    elif found := CANDIDATES.search(question):
        options = _candidates(question[found.end() :])
        needed = "field 'problem' must list its candidate answers as '(1) …, or (2) …, or (3) …', with different texts"
        question = question[: found.start()]
    else:
        return question, []
    options = (
        [text.strip() if isinstance(text, str) else "" for text in options]
        if isinstance(options, list)
        else []
    )
    if not all(options) or not 2 <= len(set(options)) == len(options) <= len(ascii_uppercase):
        raise UserError(f"{where}: {needed}")
    return question, options


def _candidates(text: str) -> list[str]:
    """The options of "(1) …, or (2) …, or (3) …"; none if their numbers do not count up."""
    _, *parts = re.split(r"(?:^|,\s*or\s*)\((\d+)\)", text)
    numbers, options = parts[::2], parts[1::2]
    return options if numbers == [str(i) for i in range(1, len(options) + 1)] else []


def _lettered(question: str, options: list[str], answer: str, where: str) -> tuple[str, str]:
    """The question with its options as (A), (B), … in an order of its own, and the letter of the right
    one.
    """
    answer = answer.strip()
    if answer not in options:
        raise UserError(
            f"{where}: field 'answer' must be one of the options, to the letter: {answer!r} is none of them"
        )
    order = random.Random(f"options/{question}").sample(options, len(options))
    lines = [f"({letter}) {option}" for letter, option in zip(ascii_uppercase, order)]
    return "\n".join([question, *lines, "Answer with the letter of one option."]), ascii_uppercase[
        order.index(answer)
    ]


def _verl(row: dict, where: str) -> tuple[str, str, str]:
    """Question, gold and system message of a row in verl's layout."""
    gold = (
        text_field(row["reward_model"], where, "ground_truth")
        if isinstance(row["reward_model"], dict)
        else ""
    )
    if not gold:
        raise UserError(f"{where}: field 'reward_model.ground_truth' is missing or empty")
    chat = row.get("prompt")
    chat = chat if isinstance(chat, list) and all(isinstance(m, dict) for m in chat) else []
    roles = [m.get("role") for m in chat]
    if roles not in (["user"], ["system", "user"]) or not all(
        isinstance(m.get("content"), str) for m in chat
    ):
        raise UserError(
            f"{where}: field 'prompt' must be a list of messages, [system,] user, each with role and content"
        )
    system = chat[0]["content"] if len(chat) == 2 else ""
    return chat[-1]["content"], gold, system


def _source_of_dataset(spec: str) -> str:
    """ "openai/gsm8k" of "hub:openai/gsm8k:test", if that names a grading rule."""
    if spec.startswith("hub:"):
        name = spec.split(":")[1]
        try:
            rule_set(name)
            return name
        except UserError:
            pass
    return ""


def data_files(spec: str) -> list[Path]:
    """The files that a `--data` value names; those of a hub dataset are fetched. Raises UserError."""
    if not spec.startswith("hub:"):
        return [Path(spec)]
    _require("huggingface_hub", "hub", spec)
    import huggingface_hub

    _, name, split = f"{spec}:train".split(":")[:3]
    try:
        files = huggingface_hub.list_repo_files(name, repo_type="dataset")
        return [
            Path(huggingface_hub.hf_hub_download(name, f, repo_type="dataset"))
            for f in split_files(files, split, spec)
        ]
    except UserError:
        raise
    except Exception as error:  # of many kinds, by transport and version: not found, no access, no network
        raise UserError(f"{spec}: cannot be fetched ({type(error).__name__}: {error})") from None


def split_files(files: list[str], split: str, spec: str) -> list[str]:
    """Those files of a dataset whose name starts with the split: train -> data/train-00000-of-00002.parquet, train.jsonl.

    A folder in the split's name chooses between configurations: main/train. UserError if none or several
    folders fit.
    """
    data = [f for f in files if f.endswith((".parquet", ".jsonl", ".json"))]
    folder, _, stem = split.rpartition("/")

    def fits(file: str) -> bool:
        at, _, name = file.rpartition("/")
        return (at == folder or not folder) and name.startswith((f"{stem}-", f"{stem}.", f"{stem}_"))

    chosen = sorted(filter(fits, data))
    folders = sorted({f.rpartition("/")[0] for f in chosen})
    if not chosen:
        raise UserError(
            f"{spec}: no .parquet or .jsonl file starts with {split!r}; it has {', '.join(data) or 'none'}"
        )
    if len(folders) > 1:
        raise UserError(
            f"{spec}: several folders have this split: name one, {' or '.join(f'{f}/{stem}' for f in folders)}"
        )
    return chosen

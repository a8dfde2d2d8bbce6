"""Read rows of data files: JSON lines, a JSON list, CSV, TSV or parquet, local or in a dataset of the hub.

    FILE.jsonl  FILE.json      one object per line, or one list of objects, with either file name
    FILE.csv    FILE.tsv       the first line names the columns
    FILE.parquet               extra [parquet]
    FILE.jsonl.gz  …           any of these but parquet, compressed
    hub:owner/name[:config][:split]      such files of a Hugging Face dataset, extra [hub]; split: train
    A+B                        the rows of A, then those of B

A row is a dict of fields and its place in a file. `layouts` and `chats` interpret the fields. A row that
cannot be used stops the run with an error that names file, row and field; with --skip_bad_rows it is left out
and counted.
"""

from __future__ import annotations

import csv
import difflib
import gzip
import json
import os
import re
import sys
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

from thinkrl import UserError, hub, require_extra
from thinkrl.visible import visible

Made = TypeVar("Made")

# Columns that are not part of a problem, or repeat it. Any other text column that is not read is reported.
LABELS = {
    *(
        "ability",
        "category",
        "domain",
        "problem_type",
        "question_type",
        "subfield",
        "subject",
        "topic",
        "type",
    ),
    *("level", "source", "data_source", "equation", "question_concat"),
}
_PLUS = re.compile(r"\+(?![^\[]*\])")  # outside of gym:TASK,key=["+"]
OnBadRow = Callable[[UserError], None]

# Names that --columns can give to columns of a file.
COLUMNS = ("problem", "answer", "solution", "context", "options", "source", "level", "system", "completion")


class Fields:
    """Fields of one row, found by name in any case; keeps which of them were read.

    columns: {our name: the file's column}, from --columns. dataset: its name on the hub, "" for a local file.
    """

    def __init__(self, values: dict, where: str, columns: dict[str, str] | None = None, dataset: str = ""):
        self.values = values
        self.dataset = dataset
        self.where = where  # "file:row", counted from 1 as lines are
        self.columns = {ours: column for ours, column in (columns or {}).items() if column in values}
        self.read: set[str] = set()
        self._spelling = {name.lower(): name for name in reversed(values)}

    def __contains__(self, name: str) -> bool:
        return self.values.get(self.column(name)) not in (None, "", [])

    def column(self, name: str) -> str:
        """Name of a field in the file."""
        return self.columns.get(name) or self._spelling.get(name.lower(), name)

    def find(self, *names: str) -> tuple[str, Any]:
        """Column and value of the first of these fields that is not empty, else ("", None).

        Fields that --columns names come before the others.
        """
        for name in sorted(names, key=lambda name: name not in self.columns):
            if name in self:
                self.read.add(self.column(name))
                return self.column(name), self.values[self.column(name)]
        return "", None

    def text(self, *names: str) -> str:
        """First of these fields that is not empty, as text, else "". Raises UserError unless it is a text or
        number.
        """
        return self.as_text(*self.find(*names))

    def as_text(self, column: str, value: object) -> str:
        if value is None:
            return ""
        if isinstance(value, (int, float)) and not isinstance(value, bool):
            return str(value)
        if not isinstance(value, str):
            raise self.error(f"field {column!r} must be text, not {type(value).__name__}")
        return value

    def seen(self, *names: str) -> None:
        """Count these fields as read."""
        self.read |= {self.column(name) for name in names} & self.values.keys()

    def remedy(self, *names: str) -> str:
        """Advice for an error about a missing field; "" if the row has one of the names."""
        if any(self.column(name) in self.values for name in names):
            return ""
        return f": --columns {names[0]}=NAME says which column it is, of {', '.join(map(repr, self.values))}"

    def error(self, sentence: str) -> UserError:
        return UserError(f"{self.where}: {sentence}")

    def unread(self) -> list[str]:
        """Text columns that were not read and do not repeat the read ones; they may belong to the problem."""
        known = {self.values[column] for column in self.read if isinstance(self.values[column], str)}
        return [
            column
            for column, value in self.values.items()
            if isinstance(value, str)
            and " " in value.strip()
            and value not in known
            and column not in self.read
            and column.lower() not in LABELS
        ]


def load(
    spec: str, make: Callable[[Fields], list[Made]], columns: str = "", skip_bad_rows: bool = False
) -> list[Made]:
    """Concatenate `make(row)` of every row of the files in `spec`.

    Reports, once per file, the number of skipped rows with the first one's error, and text columns that are
    not read. Raises UserError for data that cannot be read, and for a file without a usable row.
    """
    mapping = parse_columns(columns)
    made: list[Made] = []
    for path, dataset in _files(spec):
        skipped: list[UserError] = []
        unread: dict[str, str] = {}  # column -> the first row that has it
        absent, before = set(mapping.values()), len(made)

        def bad(error: UserError, skipped: list[UserError] = skipped) -> None:
            if not skip_bad_rows:
                raise UserError(f"{error}; --skip_bad_rows leaves such rows out") from None
            skipped.append(error)

        for where, values in read_rows(path, bad):
            fields = Fields(values, where, mapping, dataset)
            absent -= set(values)
            try:
                made += make(fields)
            except UserError as error:
                bad(error)
            else:
                for column in fields.unread():
                    unread.setdefault(column, where)
        if len(made) == before:
            raise UserError(f"{path}: none of {len(skipped)} rows can be used; the first: {skipped[0]}")
        if skipped:
            say(f"{path}: skipped {len(skipped)} of its rows; the first: {skipped[0]}")
        if absent:
            say(
                f"{path}: has no column {' or '.join(map(repr, absent))} of --columns, and is read by names "
                "of its own"
            )
        if unread:
            names = ", ".join(map(repr, [*unread][:6])) + (
                f" and {len(unread) - 6} more" if len(unread) > 6 else ""
            )
            say(
                f"{next(iter(unread.values()))}: nothing reads {names}; --columns context=NAME adds one to "
                "the prompt"
            )
    return made


def parse_columns(text: str) -> dict[str, str]:
    """Parse "problem=input" to {"problem": "input"}. Raises UserError for an unknown name on the left."""
    mapping = {}
    for part in filter(None, text.split(",")):
        ours, equals, column = (word.strip() for word in part.partition("="))
        if ours not in COLUMNS or not column:
            close = difflib.get_close_matches(ours, COLUMNS, n=1)
            hint = f" (did you mean {close[0]!r}?)" if close and ours not in COLUMNS else ""
            raise UserError(
                f"--columns {part!r}{hint}: write problem=NAME,answer=NAME with a column of the file as "
                f"NAME; known: {', '.join(COLUMNS)}"
            )
        mapping[ours] = column
    return mapping


def say(sentence: str) -> None:
    """Print a line on standard error, on rank 0 only."""
    if os.environ.get("RANK", "0") == "0":
        print(visible(sentence), file=sys.stderr, flush=True)


def _stop(error: UserError) -> None:
    raise error


def read_rows(path: str | Path, bad: OnBadRow = _stop) -> Iterator[tuple[str, dict]]:
    """Yield (where, fields) of each row of a file; where is "path:row", counted from 1 like lines.

    bad: called with the error of a line that is not a row. Raises UserError for a file that is missing, empty
    or malformed.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"{path}: {'is a folder, not a data file' if path.is_dir() else 'no such data file'}")
    kind = path.suffixes[-2] if path.suffix == ".gz" and len(path.suffixes) > 1 else path.suffix
    reader = {".parquet": _parquet_rows, ".csv": _csv_rows, ".tsv": _csv_rows}.get(kind, _json_rows)
    empty = True
    try:
        for where, row in reader(path, bad):
            empty = False
            if isinstance(row, dict):
                yield where, row
            else:
                bad(
                    UserError(f"{where}: a row must be an object with named fields, not {type(row).__name__}")
                )
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise UserError(f"{path}: not a readable gzip file ({error})") from None
    if empty:
        raise UserError(f"{path}: has no rows")


def _open(path: Path, mode: str = "rb", **how):
    return gzip.open(path, mode, **how) if path.suffix == ".gz" else open(path, mode, **how)


def _json_rows(path: Path, bad: OnBadRow) -> Iterator[tuple[str, object]]:
    # json raises for: not JSON, not UTF-8, a number too long or a nesting too deep for Python
    mistakes = (ValueError, RecursionError)
    with _open(path) as file:
        if file.read(1024).lstrip(b"\xef\xbb\xbf \t\r\n")[:1] == b"[":
            file.seek(0)
            try:
                rows = json.loads(file.read())
            except mistakes as error:
                line = getattr(error, "lineno", 1)
                raise UserError(f"{path}:{line}: not valid JSON ({error})") from None
            yield from ((f"{path}:{number}", row) for number, row in enumerate(rows, start=1))
            return
        file.seek(0)
        for number, line in enumerate(file, start=1):
            if line.strip():
                try:
                    row = json.loads(line)
                except mistakes as error:
                    bad(
                        UserError(
                            f"{path}:{number}: not valid JSON ({error}): one object per line, or one list"
                        )
                    )
                else:
                    yield f"{path}:{number}", row


def _csv_rows(path: Path, bad: OnBadRow) -> Iterator[tuple[str, dict]]:
    csv.field_size_limit(2**31 - 1)
    delimiter = "\t" if ".tsv" in path.suffixes else ","
    with _open(path, "rt", encoding="utf-8-sig", newline="") as file:
        reader = csv.reader(file, delimiter=delimiter, strict=True)
        line = 1
        try:
            header = next(reader, [])
            if len(set(header)) < len(header):
                raise UserError(f"{path}:1: the first line names the columns, and {header} has a name twice")
            while True:
                line = reader.line_num + 1  # a row may take several lines
                cells = next(reader, None)
                if cells is None:
                    return
                if len(cells) == len(header):
                    yield f"{path}:{line}", dict(zip(header, cells))
                elif cells:
                    bad(UserError(f"{path}:{line}: has {len(cells)} fields, the first line {len(header)}"))
        except (csv.Error, UnicodeDecodeError) as error:
            raise UserError(f"{path}:{line}: not valid CSV ({error})") from None


def _parquet_rows(path: Path, bad: OnBadRow) -> Iterator[tuple[str, object]]:
    require_extra("pyarrow", "parquet", path)
    import pyarrow
    from pyarrow import parquet

    try:
        with parquet.ParquetFile(path) as file:
            rows = (row for batch in file.iter_batches() for row in batch.to_pylist())
            for number, row in enumerate(rows, start=1):
                yield f"{path}:{number}", row
    except pyarrow.ArrowException as error:
        raise UserError(f"{path}: not a readable parquet file ({error})") from None


def split_spec(spec: str) -> list[str]:
    """Split a `--data` value at "+" into files and datasets."""
    return [spec] if Path(spec).is_file() else [part.strip() for part in _PLUS.split(spec)]


def data_files(spec: str) -> list[Path]:
    """Paths of the files in a `--data` value; files of a hub dataset are downloaded. Raises UserError."""
    return [path for path, _ in _files(spec)]


def _files(spec: str) -> list[tuple[Path, str]]:
    """Paths as in `data_files`, each with its dataset's name, or ""."""
    files = []
    for part in split_spec(spec):
        if part.startswith("hub:"):
            files += [(path, part.split(":")[1]) for path in hub.fetch_dataset(part)]
        else:
            files.append((Path(part), ""))
    return files

"""Results appended one by one by every rank, so that a killed program is continued: FOLDER/parts/rank_R.jsonl."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import TextIO


def open_part(folder: Path, rank: int) -> TextIO:
    """This rank's part, to append to. A last line that a kill tore is cut off."""
    path = folder / "parts" / f"rank_{rank}.jsonl"
    path.parent.mkdir(exist_ok=True)
    written = path.read_bytes() if path.exists() else b""
    part = path.open("a", encoding="utf-8")
    os.truncate(path, written.rfind(b"\n") + 1)
    return part


def read_parts(folder: Path) -> Iterator[dict]:
    """Results of all ranks so far; a torn last line is not one."""
    for path in sorted((folder / "parts").glob("rank_*.jsonl")):
        yield from read_lines(path)


def read_lines(path: Path) -> Iterator[dict]:
    """The rows of a .jsonl file, except a last line that is not whole."""
    with path.open(encoding="utf-8") as file:
        for line in file:
            if line.endswith("\n"):
                yield json.loads(line)

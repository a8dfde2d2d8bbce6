"""Partial results in FOLDER/parts/rank_R.jsonl, appended one by one, to continue a killed program."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import TextIO

from thinkrl.run.files import read_lines


def open_part(folder: Path, rank: int) -> TextIO:
    """Open this rank's part for appending. An unfinished last line is removed."""
    path = folder / "parts" / f"rank_{rank}.jsonl"
    path.parent.mkdir(exist_ok=True)
    written = path.read_bytes() if path.exists() else b""
    part = path.open("a", encoding="utf-8")
    os.truncate(path, written.rfind(b"\n") + 1)
    return part


def read_parts(folder: Path) -> Iterator[dict]:
    """Yield the results of all ranks so far, without unfinished last lines."""
    for path in sorted((folder / "parts").glob("rank_*.jsonl")):
        yield from read_lines(path)

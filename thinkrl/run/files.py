"""JSON files: read with clear errors, written atomically."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from thinkrl import UserError


def read_json(file: Path, missing: dict | None = None) -> dict:
    """Read the JSON object of a file, or return `missing`, if given, without a file. Raises UserError."""
    if missing is not None and not file.exists():
        return missing
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{file}: file not found") from None
    except (OSError, ValueError) as error:
        raise UserError(f"{file}: not readable as JSON ({error})") from None
    if not isinstance(content, dict):
        raise UserError(f"{file}: a JSON object is expected, not a {type(content).__name__}")
    return content


def write_json(file: Path, content: Any) -> None:
    """Write under a temporary name, then rename: a reader never sees half a file."""
    temporary = file.with_name(file.name + ".tmp")
    temporary.write_text(json.dumps(content, indent=2) + "\n")
    os.replace(temporary, file)


def read_lines(file: Path) -> Iterator[dict]:
    """Yield the rows of a .jsonl file, none if it does not exist. An unfinished last line is left out."""
    if file.exists():
        with file.open(encoding="utf-8") as lines:
            for line in lines:
                if line.endswith("\n"):
                    yield json.loads(line)

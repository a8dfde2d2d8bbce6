"""The cold start: rows that chunk.py wrote, for supervised fine-tuning of one role."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from thinkrl.longshort.conversation import example_prompt, load_prompts, prompts_file, require_prompts
from thinkrl.sft import Row, chat_prompt
from thinkrl.tokenizer import Tokenizer


def row_prompt(row: Row, tokenizer: Tokenizer) -> list[int]:
    """Prompt ids of a row: of a turn, as in RL, if the row has its conversation, else of a chat."""
    if row.conversation is None:
        return chat_prompt(row, tokenizer)
    return example_prompt(row.conversation, row.where, tokenizer)


def role_files(rows: Sequence[Row], prompts: str, model: Path) -> dict[str, str]:
    """Files saved with a role's weights: the role prompts, from the file `prompts` or the model's folder.

    Raises UserError for a row that was written with other prompts.
    """
    loaded = load_prompts(prompts, model)
    for row in rows:
        if row.conversation is not None:
            require_prompts(row.conversation, row.where, loaded)
    return prompts_file(loaded)

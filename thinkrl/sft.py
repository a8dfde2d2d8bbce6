"""Supervised fine-tuning: next-token loss on the completions of rows, over the same packs as reinforcement learning.

    loss = -sum_t m_t log pi(token_t | tokens before) / tokens of the step

A row is a prompt and a completion, under the names that files in the wild give them: see `PROMPT` and
`COMPLETION`. The prompt goes through the checkpoint's chat template as a user message; prompt and completion
are encoded apart, as they are when the policy samples, and the completion ends with the token that ends a
turn. Prompt tokens have mask 0. Rows that chunk.py wrote carry their conversation, and their prompt's ids are
built as in reinforcement learning: conversation.example_prompt.
"""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from thinkrl import UserError
from thinkrl.longshort.conversation import example_prompt
from thinkrl.problems import read_rows, text_field
from thinkrl.tokenizer import Tokenizer
from thinkrl.types import Sample

PROMPT = (
    "prompt",
    "problem",
    "question",
    "instruction",
)  # alpaca's "input" follows the instruction on a new line
COMPLETION = ("completion", "response", "output", "answer")


class Row(NamedTuple):
    messages: list[dict[str, str]]  # the chat up to the completion
    completion: str
    where: str = ""  # "file:row"
    conversation: dict | None = None  # the row, if it is one of chunk.py's: its parts make the prompt's ids


def load_rows(path: str | Path) -> list[Row]:
    """Rows of a JSONL file, a JSON list (alpaca) or a parquet file. Raises UserError with file, row and field.

    The first field of `PROMPT` and of `COMPLETION` that is not empty counts; a "system" field becomes the
    system message.
    """
    rows = []
    for where, fields in read_rows(path):
        prompt = "\n".join(
            filter(None, (text_field(fields, where, *PROMPT), text_field(fields, where, "input")))
        )
        completion = text_field(fields, where, *COMPLETION)
        for names, text in ((PROMPT, prompt), (COMPLETION, completion)):
            if not text:
                raise UserError(
                    f"{where}: field {names[0]!r} (or {', '.join(names[1:])}) is missing or empty"
                )
        system = text_field(fields, where, "system")
        chat = [{"role": "system", "content": system}] * bool(system) + [{"role": "user", "content": prompt}]
        rows.append(Row(chat, completion, where, fields if "conversation" in fields else None))
    return rows


def samples(rows: list[Row], tokenizer: Tokenizer, context: int | None = None) -> list[Sample]:
    """Rows as ids, ready to pack. The advantage is unused and 0; ids are places in `rows`, from 0.

    context: the model's; raises UserError for a row that is longer.
    """
    out = []
    for i, row in enumerate(rows):
        completion = [*tokenizer.encode(row.completion), tokenizer.eos_id]
        zeros = torch.zeros(len(completion))
        told = row.conversation
        prompt = example_prompt(told, row.where, tokenizer) if told else tokenizer.encode_chat(row.messages)
        out.append(Sample(prompt, completion, zeros, zeros, str(i)))
        if context is not None and len(out[-1]) > context:
            raise UserError(
                f"{row.where}: prompt and completion have {len(out[-1])} tokens, more than the model's context of "
                f"{context}: shorten the row, or leave it out"
            )
    return out


def nll_loss(logprob: Tensor, mask: Tensor, denominator: Tensor | float) -> Tensor:
    """-sum of logprob [T] where mask [T] is 1, over the step's own token count on all ranks (taken as at
    least 1). Scalar.
    """
    total = -torch.where(mask > 0, logprob, 0.0).sum()
    return total / torch.as_tensor(denominator, device=logprob.device).clamp(min=1)

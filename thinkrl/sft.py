"""Supervised fine-tuning: next-token loss on the completions of rows, over the same packs as reinforcement learning.

    loss = -sum_t m_t log pi(token_t | tokens before) / tokens of the step

A row is a prompt and a completion, under the names that files in the wild give them: see `PROMPT` and
`COMPLETION`. The prompt goes through the checkpoint's chat template as a user message; prompt and completion
are encoded apart, as they are when the policy samples, and the completion ends with the token that ends a
turn. Prompt tokens have mask 0. Rows whose prompt is not a chat bring a function of their own that encodes it
(longshort.cold_start).
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from thinkrl import UserError
from thinkrl.checkpoint import read_config
from thinkrl.config import Config
from thinkrl.distributed import World, global_sum
from thinkrl.learner import learning_rate, model_path, new_learner
from thinkrl.metrics import Tally
from thinkrl.problems import Stream, read_rows, text_field
from thinkrl.runs import Run
from thinkrl.session import Session, require_enough
from thinkrl.tokenizer import Tokenizer
from thinkrl.types import Pack, Sample
from thinkrl.update import descend, pack_evenly, token_logprobs

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
    conversation: dict | None = None  # the whole row, if it has the field "conversation"


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


def chat_prompt(row: Row, tokenizer: Tokenizer) -> list[int]:
    """Prompt ids of a row through the checkpoint's chat template."""
    return tokenizer.encode_chat(row.messages)


Encode = Callable[[Row, Tokenizer], list[int]]


def samples(
    rows: list[Row], tokenizer: Tokenizer, context: int | None = None, encode: Encode = chat_prompt
) -> list[Sample]:
    """Rows as ids, ready to pack. The advantage is unused and 0; ids are places in `rows`, from 0.

    context    the model's; raises UserError for a row that is longer
    encode     makes a row's prompt ids
    """
    out = []
    for i, row in enumerate(rows):
        completion = [*tokenizer.encode(row.completion), tokenizer.eos_id]
        zeros = torch.zeros(len(completion))
        out.append(Sample(encode(row, tokenizer), completion, zeros, zeros, str(i)))
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


def train(
    config: Config,
    world: World,
    rows: list[Row],
    encode: Encode = chat_prompt,
    files: dict[str, str] | None = None,
    report: Callable[[Path], object] | None = None,
) -> Run:
    """Train on rows for `steps` optimizer steps of `problems_per_step` rows. `encode` as in `samples`, `files` as
    in `Learner`, `report` as in `Session`. Collective.
    """
    path = model_path(config.model)
    tokenizer = Tokenizer(path)
    stream = Stream(samples(rows, tokenizer, read_config(path).max_positions, encode), config.seed)
    require_enough(stream, config, world)
    learner = new_learner(path, config, world, tokenizer, samplers=0, files=files)
    session = Session(config, world, {"policy": learner}, report=report)
    for step in session.steps():
        tally, lr = Tally(), learning_rate(step, config.steps, config)
        batch = stream.take(step, config.problems_per_step, world.rank, world.size)
        packs = pack_evenly(batch, config, world)
        denominator = float(global_sum(sum(p.mask.sum() for p in packs)))

        def objective(p: Pack, denominator: float = denominator) -> Tensor:
            logprob, _ = token_logprobs(learner.policy, p, temperature=1.0)
            return nll_loss(logprob, p.mask, denominator)

        loss, grad_norm = descend(learner, packs, objective, lr, config, world)
        for sample in batch:
            tally.add("tokens", len(sample.completion))
            tally.add_sum("sampled_tokens", len(sample.completion))
        session.end_step(step, tally, {"loss": loss, "grad_norm": grad_norm, "lr": lr})
    session.summarise_loss("model", "hf")
    session.close()
    return session.run

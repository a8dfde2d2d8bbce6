"""Supervised fine-tuning: next-token loss on the completions of rows, with the same packs as in RL.

    loss = -sum_t m_t log pi(token_t | tokens before) / tokens of the step

A row is a chat and the completion that follows it; `chats` reads them from files. The checkpoint's template
renders the chat. Prompt and completion are encoded separately, as in sampling, and the completion ends with
the token that ends a turn. Prompt tokens have mask 0. Rows whose prompt is not a chat are encoded by a
function of their own (longshort.cold_start).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from thinkrl import UserError
from thinkrl.checkpoint import read_config
from thinkrl.config import Config
from thinkrl.data import chats
from thinkrl.data.problems import mix
from thinkrl.data.rows import Fields, load, split_spec
from thinkrl.distributed import World, global_sum
from thinkrl.grpo import divisor
from thinkrl.learner import learning_rate, model_path, new_learner
from thinkrl.model import Transformer
from thinkrl.run.folder import Run
from thinkrl.run.metrics import Tally
from thinkrl.run.watch import at
from thinkrl.session import Session, require_enough
from thinkrl.tokenizer import Tokenizer
from thinkrl.types import Pack, Sample
from thinkrl.update import descend, pack_evenly, token_logprobs


class Row(NamedTuple):
    """One completion to train on, with the chat before it."""

    messages: list[dict[str, str]]  # the chat up to the completion
    completion: str
    where: str = ""  # "file:row"
    conversation: dict | None = None  # the whole row, if it has the field "conversation"


def load_rows(spec: str | Path, columns: str = "", skip_bad_rows: bool = False) -> list[Row]:
    """Load rows of files and datasets in any layout of `chats`, one for each message of the assistant.

    columns, skip_bad_rows: as in `rows.load`. Raises UserError with file, row and field.
    """

    def make(fields: Fields) -> list[Row]:
        chat, row = chats.chat(fields), fields.values if "conversation" in fields else None
        return [
            Row(chat[:i], message["content"], fields.where, row)
            for i, message in enumerate(chat)
            if message["role"] == "assistant"
        ]

    return load(str(spec), make, columns, skip_bad_rows)


def load_parts(config: Config) -> list[list[Row]]:
    """Load the rows of each part of `--data` if --data_weights weights the parts, else all in one list."""
    specs = split_spec(config.data) if config.data_weights else [config.data]
    return [load_rows(spec, config.columns, config.skip_bad_rows) for spec in specs]


def chat_prompt(row: Row, tokenizer: Tokenizer) -> list[int]:
    """Prompt ids of a row through the checkpoint's chat template."""
    return tokenizer.encode_chat(row.messages)


Encode = Callable[[Row, Tokenizer], list[int]]


def samples(
    rows: list[Row], tokenizer: Tokenizer, context: int | None = None, encode: Encode = chat_prompt
) -> list[Sample]:
    """Encode rows as samples to pack. Advantages are unused and 0; ids are indices in `rows`.

    context    of the model, in tokens; raises UserError for a longer row
    encode     makes a row's prompt ids
    """
    out = []
    for i, row in enumerate(rows):
        completion = [*tokenizer.encode(row.completion), tokenizer.eos_id]
        zeros = torch.zeros(len(completion))
        out.append(Sample(encode(row, tokenizer), completion, zeros, zeros, str(i)))
        if context is not None and len(out[-1]) > context:
            raise UserError(
                f"{row.where}: prompt and completion have {len(out[-1])} tokens, more than the model's "
                f"context of {context}: shorten the row, or leave it out"
            )
    return out


def nll_loss(logprob: Tensor, mask: Tensor, denominator: Tensor | float) -> Tensor:
    """Sum of -logprob [T] where mask [T] is 1, divided by the step's token count on all ranks (at least 1).
    Scalar.
    """
    total = -torch.where(mask > 0, logprob, 0.0).sum()
    return total / divisor(denominator)


def sft_objective(policy: Transformer, packs: Sequence[Pack]) -> Callable[[Pack], Tensor]:
    """Make the loss of a pack, divided by the whole step's tokens, which are counted here. Collective."""
    denominator = float(global_sum(sum(p.mask.sum() for p in packs)))

    def objective(p: Pack) -> Tensor:
        logprob, _ = token_logprobs(policy, p, temperature=1.0)
        return nll_loss(logprob, p.mask, denominator)

    return objective


def with_steps(config: Config, rows: int) -> Config:
    """Set `steps` to those of --epochs passes over so many rows; without --epochs the config is unchanged.

    Each pass leaves out the few rows that do not fill a step, as `Stream` does.
    """
    if not config.epochs:
        return config
    return dataclasses.replace(config, steps=max(1, config.epochs * (rows // config.problems_per_step)))


def train(
    config: Config,
    world: World,
    parts: list[list[Row]],
    encode: Encode = chat_prompt,
    files: dict[str, str] | None = None,
    report: Callable[[Path], object] | None = None,
) -> Run:
    """Train for `steps` optimizer steps, or `epochs`, of `problems_per_step` rows, a share of each part.
    Collective.

    parts: as `load_parts` gives them. `encode` as in `samples`, `files` as in `Learner`, `report` as in
    `Session`.
    """
    config = with_steps(config, sum(map(len, parts)))
    path = model_path(config.model)
    tokenizer = Tokenizer(path)
    context = read_config(path).max_positions
    encoded = [samples(rows, tokenizer, context, encode) for rows in parts]
    stream = mix(encoded, config.data_weights, config.seed)
    require_enough(stream, config, world)
    learner = new_learner(path, config, world, tokenizer, files)
    with Session(config, world, {"policy": learner}, report=report) as session:
        for step in session.steps():
            at("update", step + 1)
            tally, lr = Tally(), learning_rate(step, config.steps, config)
            batch = stream.take(step, config.problems_per_step, world.rank, world.size)
            packs = pack_evenly(batch, config, world)
            objective = sft_objective(learner.policy, packs)
            loss, grad_norm = descend(learner, packs, objective, lr, config, world)
            for sample in batch:
                tally.add("tokens", len(sample.completion))
                tally.add_sum("sampled_tokens", len(sample.completion))
            session.end_step(step, tally, {"loss": loss, "grad_norm": grad_norm, "lr": lr})
        session.summarise_loss()
    return session.run

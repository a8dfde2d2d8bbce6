"""Step reward model: predicts whether a completion that begins with a prefix ends in the right answer.

    P(positive)_t = softmax(score(h_t))_1                 h_t: hidden state of the last token of a prefix

A prefix is the prompt and the first episodes of a completion, so the K+1 probabilities along a completion can
serve as J_0, …, J_K of the fitting gain (`--gain prm`). prm_training.py trains such a model.

Two kinds of checkpoint are read, which differ in four points:

                      made here                          Qwen2.5-Math-PRM and alike
    head          one linear layer, D -> 2           two, D -> D -> 2, with ReLU between
    read at       the prefix's own last token        a separator token `<extra_0>` after every step
    J_0           at the end of the prompt           at a separator after the prompt, in a row of its own
    vocabulary    the policy's, whose ids it reads   its own: attempts are re-tokenized for it (`retokenize`)

Readings: separator models were trained without a J_0. It is computed in a row of its own, because an empty
first step would stay in the context of all later ones. The length of a completion in their vocabulary is
known only after re-tokenization. A step that does not fit their context is not scored, nor are later ones: J
keeps its last value, and those episodes have no gain.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_model_state_dict

from thinkrl import UserError
from thinkrl.checkpoint import Layout, atomic_dir, fill, hf_layout, hf_tensors, tensor_files
from thinkrl.model import Block, ModelConfig, Transformer
from thinkrl.run.files import read_json, write_json
from thinkrl.tokenizer import Tokenizer, difference
from thinkrl.types import Problem

SEPARATOR = "<extra_0>"
# system message of separator models' training
SYSTEM = "Please reason step by step, and put your final answer within \\boxed{}."
TAG = re.compile(r"</?(?:think|episode_\d+)>")

Row = tuple[list[int], list[int]]  # tokens of a sequence, and the positions in it whose scores are asked for


class StepRewardModel(nn.Module):
    """A decoder without its LM head, and a two-class score head.

    Under FSDP the score head is in the root unit, so `logits` comes after `forward`.
    separator  id of the token after each step, where the score is read; None: no such token, see above
    forwards   tokens that went through the model so far
    """

    def __init__(self, config: ModelConfig, two_layers: bool = False, separator: int | None = None):
        super().__init__()
        self.separator, self.forwards = separator, 0
        self.body = Transformer(replace(config, tied=True))  # tied: no LM head is allocated
        D = config.width
        self.score = (
            nn.Sequential(nn.Linear(D, D), nn.ReLU(), nn.Linear(D, 2)) if two_layers else nn.Linear(D, 2)
        )

    @property
    def config(self) -> ModelConfig:
        return self.body.config

    @property
    def blocks(self) -> Sequence[Block]:
        """Units that `distributed.shard` wraps."""
        return self.body.blocks

    def forward(self, tokens: Tensor, cu_seqlens: Tensor, longest: int | None = None) -> Tensor:
        """Hidden states [T, D] of packed tokens [T] int64, cu_seqlens int32 [S+1]; longest as in
        `Transformer`.
        """
        self.forwards += len(tokens)
        return self.body(tokens, cu_seqlens, longest=longest)

    def logits(self, hidden: Tensor) -> Tensor:
        """[N, D] -> [N, 2] fp32: negative, positive."""
        return self.score(hidden).float()

    def step_scores(self, tokens: Tensor, cu_seqlens: Tensor, positions: Tensor) -> Tensor:
        """P(positive) [N] fp32 of the prefixes that end at `positions` [N] int64 of the packed row."""
        return self.logits(self(tokens, cu_seqlens)[positions]).softmax(-1)[:, 1]


@torch.no_grad()
def score_completions(
    model: StepRewardModel,
    prompts: Sequence[list[int]],
    completions: Sequence[list[int]],
    prefixes: Sequence[list[int]],
    budget: int = 16384,
) -> list[Tensor]:
    """Compute J_0, …, J_K of every completion: a list of [K+1] fp32 on the CPU. Ids are of the model's
    vocabulary.

    prefixes  K+1 numbers of completion tokens per completion, never decreasing: `Episodes.prefixes`, or 0 and
              the ends
    budget    tokens of one packed forward; a longer row gets a forward of its own
    """
    rows = [list(_rows(model, *attempt)) for attempt in zip(prompts, completions, prefixes, strict=True)]
    scores = iter(_score_rows(model, [row for attempt in rows for row in attempt], budget))
    return [torch.cat([next(scores) for _ in attempt]) for attempt in rows]


def _rows(
    model: StepRewardModel, prompt: list[int], completion: list[int], prefixes: list[int]
) -> Iterator[Row]:
    """Sequences whose scores, concatenated, are J_0, …, J_K."""
    assert prompt and prefixes == sorted(prefixes) and prefixes[-1] <= len(completion), (
        len(prompt),
        prefixes,
        len(completion),
    )
    if model.separator is None:
        yield [*prompt, *completion[: prefixes[-1]]], [len(prompt) + n - 1 for n in prefixes]
        return
    row = [*prompt, *completion[: prefixes[0]]]
    yield [*row, model.separator], [len(row)]
    positions = []
    for begin, end in pairwise(prefixes):
        row += [*completion[begin:end], model.separator]
        positions.append(len(row) - 1)
    if positions:
        yield row, positions


def _score_rows(model: StepRewardModel, rows: list[Row], budget: int) -> Iterator[Tensor]:
    device = model.body.embed.weight.device
    while rows:
        count, size = 1, len(rows[0][0])
        while count < len(rows) and size + len(rows[count][0]) <= budget:
            size += len(rows[count][0])
            count += 1
        batch, rows = rows[:count], rows[count:]
        starts = torch.tensor([0] + [len(tokens) for tokens, _ in batch]).cumsum(0)
        positions = [start + at for start, (_, row) in zip(starts.tolist(), batch) for at in row]
        tokens = torch.tensor([token for row, _ in batch for token in row])
        scores = model.step_scores(
            tokens.to(device), starts.int().to(device), torch.tensor(positions, device=device)
        )
        yield from scores.cpu().split([len(positions) for _, positions in batch])


def retokenize(
    question: str, steps: list[str], tokenizer: Tokenizer, context: int
) -> tuple[list[int], list[int], list[int]]:
    """Prompt, completion and prefixes in the ids of a separator model, for `score_completions`.

    steps are the episodes' texts; their tags are removed, and each is encoded separately because a separator
    follows it. `tokenizer` and `context` are the reward model's. Steps that do not fit, separators included,
    are left out, with their prefixes.
    """
    completion: list[int] = []
    prompt, prefixes = _separator_prompt(question, tokenizer), [0]
    for step in steps:
        ids = tokenizer.encode(TAG.sub("", step).strip())
        if len(prompt) + len(completion) + len(ids) + len(prefixes) > context:
            break
        completion += ids
        prefixes.append(len(completion))
    return prompt, completion, prefixes


def _separator_prompt(question: str, tokenizer: Tokenizer) -> list[int]:
    return tokenizer.encode_chat(
        [{"role": "system", "content": SYSTEM}, {"role": "user", "content": question}]
    )


def require_same_ids(policy: Tokenizer, prm: Tokenizer) -> None:
    """Raise UserError unless the reward model's tokenizer decodes the policy's ids as the policy's does."""
    if where := difference(policy, prm, SYSTEM):
        raise UserError(
            f"the reward model {prm.path} decodes ids differently from the policy {policy.path}: {where}; "
            "train one from this policy, by train.py prm"
        )


def require_context(
    model: StepRewardModel,
    tokenizer: Tokenizer,
    problems: Sequence[Problem],
    prompts: Sequence[list[int]],
    max_tokens: int,
) -> None:
    """Raise UserError if the reward model's context is too short for a prompt and what must follow it.

    That is a whole completion, or for a separator model the separator at which J_0 is read.
    """
    for problem, prompt in zip(problems, prompts, strict=True):
        if model.separator is not None:
            prompt, max_tokens = _separator_prompt(problem.question, tokenizer), 1
        if len(prompt) + max_tokens > model.config.max_positions:
            raise UserError(
                f"problem {problem.id} (counted from 0): a prompt of {len(prompt)} tokens and {max_tokens} "
                f"more exceed the reward model's context of {model.config.max_positions}; lower "
                "--max_tokens, or use another --prm"
            )


def new_prm(
    path: str | Path, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu"
) -> StepRewardModel:
    """Make a reward model from a policy's folder: its decoder and a head of zeros, so P(positive) is 1/2."""
    path = Path(path)
    model = _empty(_body_config(path), False, None, dtype, device)
    fill(
        model,
        path,
        tensor_files(path),
        {ours: parts for ours, parts in _layout(model).items() if ours.startswith("body.")},
    )
    for parameter in model.score.parameters():
        nn.init.zeros_(parameter)
    return model


def load_prm(
    path: str | Path, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu"
) -> StepRewardModel:
    """Read a folder written by `save_prm`, or one of the Qwen2.5-Math-PRM kind.

    Raises UserError, naming file and tensor, for a checkpoint without a score head or with other tensors
    missing.
    """
    path = Path(path)
    config, files = _body_config(path), tensor_files(path)
    if not {"score.weight", "score.0.weight"} & files.keys():
        raise UserError(
            f"{path}: tensor score.weight (one layer) or score.0.weight (two) is missing, so this is not a "
            "step reward model; train.py prm makes one"
        )
    separator = None if config.source.get("thinkrl_prm") else _separator(path)
    model = _empty(config, "score.0.weight" in files, separator, dtype, device)
    fill(model, path, files, _layout(model))
    return model


def save_prm(
    model: StepRewardModel, tokenizer: Tokenizer | None, path: str | Path, dtype: torch.dtype | None = None
) -> None:
    """Write config.json, model.safetensors and the tokenizer's files, all or nothing. Under FSDP every rank
    must call it. dtype as in `save_hf`.

    Rank 0 gathers one parameter at a time and holds the whole model once, in host memory.
    """
    tensors = hf_tensors(get_model_state_dict(model), _layout(model), dtype)
    with atomic_dir(Path(path)) as folder:
        if folder:
            save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
            written = str(next(iter(tensors.values())).dtype).removeprefix("torch.")
            write_json(
                folder / "config.json",
                model.config.to_hf()
                | {
                    "architectures": [
                        model.config.architecture.replace("ForCausalLM", "ForProcessRewardModel")
                    ],
                    "thinkrl_prm": model.separator is None,
                    "num_labels": 2,
                    "tie_word_embeddings": False,
                    "dtype": written,
                    "torch_dtype": written,
                },
            )
            if tokenizer is not None:
                tokenizer.save(folder)


def _body_config(path: Path) -> ModelConfig:
    where = path / "config.json"
    raw = read_json(where)
    architecture = (raw.get("architectures") or ["none"])[0].replace("ForProcessRewardModel", "ForCausalLM")
    return ModelConfig.from_hf(raw | {"architectures": [architecture]}, str(where))


def _separator(path: Path) -> int:
    tokenizer = Tokenizer(path)
    ids = tokenizer.encode(SEPARATOR)
    if len(ids) != 1 or tokenizer.decode(ids) != SEPARATOR:  # a tokenizer may drop unknown characters
        raise UserError(
            f"{path}: its tokenizer has no token {SEPARATOR}, after which such a model scores its steps"
        )
    return ids[0]


def _empty(
    config: ModelConfig, two_layers: bool, separator: int | None, dtype: torch.dtype, device
) -> StepRewardModel:
    with torch.device("meta"):
        model = StepRewardModel(config, two_layers, separator).to(dtype)
    return model.to_empty(device=device)


def _layout(model: StepRewardModel) -> Layout:
    """Layout as `checkpoint.hf_layout`, with the score head, whose tensors have the same names in both."""
    body = {f"body.{ours}": parts for ours, parts in hf_layout(model.config).items()}
    return body | {
        name: [(name, tuple(p.shape))] for name, p in model.named_parameters() if name.startswith("score.")
    }

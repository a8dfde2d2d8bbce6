"""The nouns: Problem -> Turn -> Trajectory -> Sample -> Pack.

A worked example. The problem "2+3?" with gold "5" is attempted twice (a group of G = 2). With one id per
character:

    Problem     question "2+3?", answer "5"
    Turn        prompt [2 + 3 ?], completion [5 EOS], logprobs [-0.1 -0.2]        what the sampler returned, untouched
    Trajectory  one turn (grpo, l2t) or several (longshort), its grade and its rewards
    Sample      prompt [2 + 3 ?], completion [5 EOS], advantage [0.7 0.7]         one row that enters the loss
    Pack        tokens     [2 + 3 ? 5 EOS | 2 + 3 ? 6 EOS]                        many samples in one row, T = 12
                cu_seqlens [0 6 12]
                mask       [0 0 0 0 1 1   | 0 0 0 0 1 1]                          1 = counts in the loss
                advantage  [0 0 0 0 .7 .7 | 0 0 0 0 -.7 -.7]                      0 where the mask is 0

Column t always speaks of token t itself: `logprob[t]` is the log-probability of token t given the tokens
before it. The mask comes from who produced a token (prompt or sampler), never from the token's value, so a
sampled stop token counts.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from thinkrl import UserError

__all__ = ["Pack", "Problem", "Sample", "Trajectory", "Turn", "UserError", "empty_pack", "pack"]


@dataclass(frozen=True)
class Problem:
    """A question with its gold answer."""

    id: int  # its address in the source: part of the address of every random number drawn for it
    question: str
    answer: str  # gold
    source: str = "arith"  # selects the grading rule: arith | gsm8k | math
    level: str = ""  # difficulty, for tables
    solution: str = ""
    system: str = ""  # system message, if the row carries its own


@dataclass
class Turn:
    """One prompt -> completion by one role."""

    role: str  # "policy" | "long" | "short"
    prompt: list[int]
    completion: list[int]  # sampled ids, the stop token included
    logprobs: list[float]  # the sampler's own, at the sampling temperature, one per completion token
    finish_reason: str  # "stop" | "length"
    hidden: Tensor | None = (
        None  # [len(completion), D], the hidden state that predicted each token, when it was kept
    )


@dataclass
class Trajectory:
    """All turns of one attempt at a problem, with its grade and its rewards. Rewards are raw: nothing
    overwrites them.
    """

    problem: Problem
    sample: int  # 0..G-1 within the group
    turns: list[Turn]
    text: str = ""  # decoded completion of the last turn
    answer: str | None = None  # as extracted from the text
    outcome_reward: float = 0.0  # 1 if the answer is the gold one
    reward: float = 0.0  # outcome_reward plus what the preset adds per trajectory
    extra: dict = field(
        default_factory=dict
    )  # what a preset wants in samples.jsonl: spans, gains, penalties, role rewards

    @property
    def correct(self) -> bool:
        return self.outcome_reward > 0.5

    @property
    def tokens(self) -> int:
        """Sampled tokens of all turns and roles."""
        return sum(len(turn.completion) for turn in self.turns)


@dataclass
class Sample:
    """One prompt + completion that enters the loss."""

    prompt: list[int]
    completion: list[int]
    advantage: Tensor  # [len(completion)] fp32, one value per completion token
    sampler_logprob: Tensor  # [len(completion)] fp32
    id: str = ""  # "problem/sample/turn", named when a loss is not finite

    def __len__(self) -> int:
        return len(self.prompt) + len(self.completion)


@dataclass
class Pack:
    """Many samples in one row of T tokens, no padding."""

    tokens: Tensor  # [T] int64
    cu_seqlens: Tensor  # [S+1] int32, sequence s is tokens[cu_seqlens[s]:cu_seqlens[s+1]]
    mask: Tensor  # [T] fp32, 1 = sampled by the policy that is trained
    advantage: Tensor  # [T] fp32
    sampler_logprob: Tensor  # [T] fp32, 0 where the mask is 0
    ids: list[str]
    old_logprob: Tensor | None = (
        None  # [T], by the trainer, before the first update; None: the policy has not moved yet
    )
    ref_logprob: Tensor | None = None  # [T], by the frozen reference

    def to(self, device: torch.device | str) -> Pack:
        moved = {k: v.to(device) if isinstance(v, Tensor) else v for k, v in vars(self).items()}
        return Pack(**moved)


def pack(samples: list[Sample], budget: int) -> list[Pack]:
    """Fill packs of at most `budget` tokens, in order of length so that a pack's sequences are alike.

    A sample longer than the budget gets a pack of its own. An empty list gives an empty list.
    """
    bins: list[list[Sample]] = []
    room = 0
    for sample in sorted(samples, key=len):
        if not bins or len(sample) > room:
            bins.append([])
            room = budget
        bins[-1].append(sample)
        room -= len(sample)
    return [_row(samples) for samples in bins]


def empty_pack() -> Pack:
    """Two tokens that count for nothing: a rank with fewer packs than its peers runs this, to keep
    collectives in step.
    """
    return _row(
        [Sample(prompt=[0, 0], completion=[], advantage=torch.zeros(0), sampler_logprob=torch.zeros(0))]
    )


def _row(samples: list[Sample]) -> Pack:
    lengths = torch.tensor([0] + [len(s) for s in samples])
    cu_seqlens = lengths.cumsum(0).to(torch.int32)

    def row(values: list[tuple[Tensor, int]]) -> Tensor:
        return torch.cat([torch.cat([torch.zeros(skip), value.float()]) for value, skip in values])

    return Pack(
        tokens=torch.tensor([t for s in samples for t in (*s.prompt, *s.completion)], dtype=torch.int64),
        cu_seqlens=cu_seqlens,
        mask=row([(torch.ones(len(s.completion)), len(s.prompt)) for s in samples]),
        advantage=row([(s.advantage, len(s.prompt)) for s in samples]),
        sampler_logprob=row([(s.sampler_logprob, len(s.prompt)) for s in samples]),
        ids=[s.id for s in samples],
    )

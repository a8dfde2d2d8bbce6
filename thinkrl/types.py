"""Data types: Problem -> Turn -> Trajectory -> Sample -> Pack.

A worked example. The problem "2+3?" with gold "5" is attempted twice (a group of G = 2). With one id per
character:

    Problem     question "2+3?", answer "5"
    Turn        prompt [2 + 3 ?], completion [5 EOS], logprobs [-0.1 -0.2]     as the sampler returned them
    Trajectory  one turn (grpo, l2t) or several (longshort), its grade and its reward
    Sample      prompt [2 + 3 ?], completion [5 EOS], advantage [0.7 0.7]      one sample of the loss
    Pack        tokens     [2 + 3 ? 5 EOS | 2 + 3 ? 6 EOS]                     many samples in one row, T = 12
                cu_seqlens [0 6 12]
                mask       [0 0 0 0 1 1   | 0 0 0 0 1 1]                       1 = counts in the loss
                advantage  [0 0 0 0 .7 .7 | 0 0 0 0 -.7 -.7]                   0 where the mask is 0

Column t is always about token t itself: `logprob[t]` is the log-probability of token t given the tokens
before it. The sampler sets the mask: 0 for prompt tokens, 1 for sampled ones, whatever the token's value, so
a sampled stop token counts.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from thinkrl import UserError

__all__ = ["Pack", "Problem", "Sample", "Trajectory", "Turn", "UserError", "empty_pack", "pack"]


@dataclass(frozen=True)
class Problem:
    """Question with its gold answer."""

    id: int  # index in its source: part of the keys of its random numbers
    question: str
    answer: str  # gold
    source: str = "arith"  # selects the grading rule: arith | gsm8k | last_number | math
    level: str = ""  # difficulty, for tables
    solution: str = ""
    system: str = ""  # system message, if the row carries its own
    instruct: bool = True  # whether the instruction of the grading rule follows the question
    # as read, for reward functions that need its columns
    row: dict | None = field(default=None, compare=False, repr=False)


@dataclass
class Turn:
    """One prompt -> completion by one role."""

    role: str  # "policy" | "long" | "short"
    prompt: list[int]
    completion: list[int]  # sampled ids, the stop token included
    logprobs: list[float]  # the sampler's own, at the sampling temperature, one per completion token
    finish_reason: str  # "stop" | "length"
    hidden: Tensor | None = None  # [len(completion), D], the state that predicted each token, if it was kept


@dataclass
class Trajectory:
    """All turns of one attempt at a problem, with grade and reward.

    A method adds fields in a subclass (l2t.preset.EpisodeTrajectory, longshort.protocol.Conversation).
    """

    problem: Problem
    sample: int  # 0..G-1 within the group
    turns: list[Turn]
    text: str = ""  # decoded completion of the last turn
    answer: str | None = None  # as extracted from the text
    outcome_reward: float = 0.0  # 1 if the answer is right, else 0
    reward: float = 0.0  # raw: outcome_reward plus what the preset adds; NaN: no reward
    rewards: list[float] = field(default_factory=list)  # raw, by each function of --reward; NaN: no reward

    @property
    def correct(self) -> bool:
        return self.outcome_reward > 0.5

    @property
    def tokens(self) -> int:
        """Number of sampled tokens of all turns and roles."""
        return sum(len(turn.completion) for turn in self.turns)

    def record(self, advantage: Tensor) -> dict:
        """Make one line of samples.jsonl, to which the log adds "step"; tensors become lists.

        problem, sample           the problem's id, the index in its group
        question, gold, level     of the problem
        answer, text              as extracted (null: none found), and the text it was extracted from
        outcome_reward, reward    raw; reward null: no reward
        turns                     role, prompt and completion (token ids), finish_reason of each turn, and the
                                  sampler's log-probs of the completion, rounded to 4 decimals
        advantage                 one number per trained token, in order, rounded to 4 decimals
        """
        turns = [
            {
                "role": turn.role,
                "prompt": turn.prompt,
                "completion": turn.completion,
                "finish_reason": turn.finish_reason,
                "logprobs": [round(value, 4) for value in turn.logprobs],
            }
            for turn in self.turns
        ]
        return {
            "problem": self.problem.id,
            "sample": self.sample,
            "question": self.problem.question,
            "gold": self.problem.answer,
            "level": self.problem.level,
            "answer": self.answer,
            "text": self.text,
            "outcome_reward": self.outcome_reward,
            "reward": None if math.isnan(self.reward) else self.reward,
            "turns": turns,
            "advantage": [round(a, 4) for a in advantage.tolist()],
        }


@dataclass
class Sample:
    """One prompt and completion for the loss."""

    prompt: list[int]
    completion: list[int]
    advantage: Tensor  # [len(completion)] fp32, one value per completion token
    sampler_logprob: Tensor  # [len(completion)] fp32
    id: str = ""  # "problem/sample/turn", for the error if a loss is not finite
    label: Tensor | None = None  # [len(completion)] fp32, see Pack.label

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
    places: Tensor  # [N] int64, where the mask is 1; [1] if it is 0 everywhere
    longest: int  # tokens of the longest sequence, on the host so that no layer synchronizes
    old_logprob: Tensor | None = None  # [T], by the trainer before its first update; None: unchanged
    ref_logprob: Tensor | None = None  # [T], by the frozen reference
    label: Tensor | None = None  # [T] fp32, target of a reward model at a token; NaN: none
    labelled: Tensor | None = None  # [M] int64, where the label is not NaN

    def to(self, device: torch.device | str) -> Pack:
        moved: dict[str, Any] = {k: v.to(device) for k, v in vars(self).items() if isinstance(v, Tensor)}
        return replace(self, **moved)


def pack(samples: list[Sample], budget: int) -> list[Pack]:
    """Pack samples, sorted by length, into rows of at most `budget` tokens.

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
    """Make a pack of two tokens with mask 0, for a rank with fewer packs, since every rank runs the same
    number.
    """
    return _row(
        [Sample(prompt=[0, 0], completion=[], advantage=torch.zeros(0), sampler_logprob=torch.zeros(0))]
    )


def _row(samples: list[Sample]) -> Pack:
    lengths = torch.tensor([0] + [len(s) for s in samples])
    cu_seqlens = lengths.cumsum(0).to(torch.int32)

    def row(values: list[Tensor], prompt: float = 0.0) -> Tensor:
        """Concatenate to [T]: each sample's values on its completion, `prompt` on its prompt."""
        parts = zip(samples, values, strict=True)
        return torch.cat([torch.cat([torch.full((len(s.prompt),), prompt), v.float()]) for s, v in parts])

    labels = [s.label for s in samples if s.label is not None]
    mask = row([torch.ones(len(s.completion)) for s in samples])
    label = row(labels, prompt=math.nan) if labels else None
    return Pack(
        tokens=torch.tensor([t for s in samples for t in (*s.prompt, *s.completion)], dtype=torch.int64),
        cu_seqlens=cu_seqlens,
        mask=mask,
        advantage=row([s.advantage for s in samples]),
        sampler_logprob=row([s.sampler_logprob for s in samples]),
        ids=[s.id for s in samples],
        places=mask.nonzero().flatten() if mask.any() else torch.tensor([1]),
        longest=max(map(len, samples)),
        label=label,
        labelled=None if label is None else (~label.isnan()).nonzero().flatten(),
    )

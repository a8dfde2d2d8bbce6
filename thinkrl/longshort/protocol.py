r"""Long⊗Short reinforcement learning: the turn protocol, the role rewards and the rounds.                           LS §4.2

The protocol, for many conversations at once; h is the history, Γ the role's prompt:

    h = []
    up to max_turns times:   l = π_long (Γ_long  ∥ q ∥ h);  h += l         "<think>…</think>"
                             s = π_short(Γ_short ∥ q ∥ h);  h += s         "<answer>…</rethink>" or "<answer>…</answer>"
                             stop after </answer>

    reward = η·EM + λ·FM + µ·LM                                                                            LS Eq. 9
    EM     1 if the closing answer is the gold one
    FM     1 if every own turn is well formed
    LM     0.5 - (len - min) / (max - min) over the group, in own tokens; at most 0 where EM is 0       Kimi k1.5 §2.3.3

A round trains one role by GRPO against the other one, frozen; its reference is the policy as the round began.     LS Eq. 7, 8
Every own turn is a sample of its own, whose prompt holds the partner's words: they never enter the loss.

Readings. The paper bounds no conversation; here it ends, with EM = 0, after `max_turns` exchanges, when the
next prompt leaves no room in the context, and at a malformed turn (by the tag-aware check, whatever the
reward's check is). An attempt in which the trained role never spoke has FM = LM = 0. Released code measures
length in characters, over whatever shares a process, and never counts a long turn as correct; `symmetric` is
its correction of that. What it trains is `single_exchange`: one long turn, one reply, graded as it stands.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from thinkrl import UserError
from thinkrl.config import schedule
from thinkrl.grading import extract, grade
from thinkrl.longshort.conversation import (
    ANSWERED,
    BUILT_IN,
    ROLES,
    STOPS,
    Prompts,
    build,
    gradable,
    well_formed,
)
from thinkrl.problems import messages
from thinkrl.sampler import Sampler
from thinkrl.tokenizer import Tokenizer, difference
from thinkrl.types import Problem, Sample, Trajectory, Turn


@dataclass(frozen=True)
class RoleSampler:
    """How a role is sampled."""

    sampler: Sampler  # with its tokenizer
    temperature: float
    max_tokens: int  # of one turn


def converse(
    voices: Mapping[str, RoleSampler],
    problems: Sequence[Problem],
    prompts: Prompts = BUILT_IN,
    *,
    group_size: int,
    max_turns: int = 5,
    seed: int,
    address: tuple[int, ...],
    suffix: str = "",
    rollout: str = "full",
) -> list[Trajectory]:
    """`group_size` conversations about each problem, groups contiguous, each graded: `outcome_reward` and `reward` are 0 or 1.

    All advance together, turn by turn; those that have ended wait. A turn's randomness has the address (seed,
    *address, problem, sample, turn, role). `extra` holds the turns' texts ("texts") and how the conversation
    "ended": answered | malformed | turns | context. The row's own system message is not used: the roles'
    prompts take its place.
    """
    single = rollout == "single_exchange"
    talks = [
        Trajectory(problem, sample, [], extra={"texts": [], "ended": ""})
        for problem in problems
        for sample in range(group_size)
    ]
    for turn in range(1 if single else max_turns):
        for role in ROLES:
            speaking = [talk for talk in talks if not talk.extra["ended"]]
            opening = turn == 0 and role == "long"  # a group's first prompt is one, and is prefilled once
            for talk in _speak(
                role,
                voices[role],
                speaking,
                group_size if opening else 1,
                turn,
                prompts,
                seed,
                address,
                suffix,
            ):
                text = talk.extra["texts"][-1]
                if single:
                    talk.extra["ended"] = "answered" if role == "short" else ""
                elif not well_formed(text, role):
                    talk.extra["ended"] = "malformed"
                elif text.endswith(ANSWERED):
                    talk.extra["ended"] = "answered"
    for talk in talks:
        talk.extra["ended"] = talk.extra["ended"] or "turns"
        talk.text = talk.extra["texts"][-1]
        if talk.extra["ended"] == "answered":
            closing, source = gradable(talk.text, talk.problem.source), talk.problem.source
            talk.answer = extract(closing, source)
            talk.outcome_reward = talk.reward = float(
                grade(closing, talk.problem.answer, source)
            )  # EM of LS Eq. 9
    return talks


def _speak(
    role: str,
    voice: RoleSampler,
    talks: list[Trajectory],
    n: int,
    turn: int,
    prompts: Prompts,
    seed: int,
    address: tuple[int, ...],
    suffix: str,
) -> list[Trajectory]:
    """Append one turn of `role` to each conversation; n neighbours have the same prompt. Returns those it
    was appended to.
    """
    context = voice.sampler.model.config.max_positions
    asked = []
    for talk in talks[::n]:
        question = messages(talk.problem, suffix=suffix)[-1]["content"]
        history = [own.completion for own in talk.turns]
        asked.append(build(role, question, history, voice.sampler.tokenizer, prompts))
    if turn > 0 or role == "short":
        for talk, prompt in zip(talks, asked):
            if len(prompt) + voice.max_tokens > context:
                talk.extra["ended"] = "context"
        asked = [prompt for talk, prompt in zip(talks, asked) if not talk.extra["ended"]]
        talks = [talk for talk in talks if not talk.extra["ended"]]
    if not talks:
        return []
    keys = [(*address, talk.problem.id, talk.sample, turn, ROLES.index(role)) for talk in talks]
    groups = voice.sampler.generate(
        asked,
        n=n,
        max_tokens=voice.max_tokens,
        temperature=voice.temperature,
        stop=STOPS[role],
        seed=seed,
        keys=keys,
    )
    written = [(prompt, completion) for prompt, group in zip(asked, groups) for completion in group]
    for talk, (prompt, completion) in zip(talks, written):
        talk.turns.append(
            Turn(role, prompt, completion.tokens, completion.logprobs, completion.finish_reason)
        )
        talk.extra["texts"].append(voice.sampler.tokenizer.decode(completion.tokens))
    return talks


def require_room(
    problems: Sequence[Problem],
    tokenizer: Tokenizer,
    context: int,
    max_tokens: int,
    prompts: Prompts = BUILT_IN,
    suffix: str = "",
) -> None:
    """Raise UserError before the first step if a question leaves no room for the opening turn in the
    model's context.
    """
    for problem in problems:
        length = len(build("long", messages(problem, suffix=suffix)[-1]["content"], [], tokenizer, prompts))
        if length + max_tokens > context:
            raise UserError(
                f"problem {problem.id} (counted from 0): an opening prompt of {length} tokens and a turn of "
                f"{max_tokens} exceed the model's context of {context}; lower --max_tokens, or leave it out"
            )


def require_same_tokenizer(long: Tokenizer, short: Tokenizer) -> None:
    """Raise UserError unless both roles read the same ids the same way: one's ids stand in the other's
    prompts.
    """
    if where := difference(long, short, BUILT_IN.long + BUILT_IN.short):
        raise UserError(
            f"the two roles have different tokenizers, {long.path} and {short.path}: {where}; train both from models "
            "of one family"
        )


def format_reward(text: str, role: str, strict: bool = False) -> float:
    """FM of one turn: 1 if it is exactly one non-empty segment of its role, else 0. strict: by the
    official pattern.
    """
    return float(well_formed(text, role, strict))  # FM of LS Eq. 9


def length_reward(lengths: Sequence[float], correct: Sequence[bool], symmetric: bool = False) -> list[float]:
    """LM of each attempt of one group, from lengths and correctness. Equal lengths give 0. Kimi k1.5 §2.3.3

    symmetric: a wrong attempt is paid for being short like a right one, instead of at most 0.
    """
    shortest, longest = min(lengths, default=0), max(lengths, default=0)
    if shortest == longest:
        return [0.0] * len(lengths)
    value = [0.5 - (length - shortest) / (longest - shortest) for length in lengths]
    return [v if right or symmetric else min(0.0, v) for v, right in zip(value, correct)]  # LM of LS Eq. 9


@dataclass(frozen=True)
class RoleReward:
    """What one attempt earned the trained role."""

    outcome: float  # EM
    format: float  # FM
    length: float  # LM
    total: float


def role_rewards(
    talks: Sequence[Trajectory],
    role: str,
    group_size: int,
    *,
    outcome_coef: float = 1.0,
    format_coef: float = 1.0,
    length_coef: float,
    strict: bool = False,
    symmetric: bool = False,
) -> list[RoleReward]:
    """Rewards of the trained role, one per conversation; groups are contiguous. length_coef is µ at this
    step.
    """
    rewards = []
    for start in range(0, len(talks), group_size):
        group = talks[start : start + group_size]
        own = [
            [text for turn, text in zip(talk.turns, talk.extra["texts"]) if turn.role == role]
            for talk in group
        ]
        spoke = [talk for talk, texts in zip(group, own) if texts]
        paid = iter(
            length_reward(
                [own_tokens(talk, role) for talk in spoke], [talk.correct for talk in spoke], symmetric
            )
        )
        for talk, texts in zip(group, own):
            outcome, length = talk.outcome_reward, next(paid) if texts else 0.0
            form = min((format_reward(text, role, strict) for text in texts), default=0.0)
            total = outcome_coef * outcome + format_coef * form + length_coef * length  # LS Eq. 9
            rewards.append(RoleReward(outcome, form, length, total))
    return rewards


def own_tokens(talk: Trajectory, role: str) -> int:
    return sum(len(turn.completion) for turn in talk.turns if turn.role == role)


def own_samples(talks: Sequence[Trajectory], role: str, advantages: Sequence[Tensor]) -> list[Sample]:
    """Every turn of the trained role as a (prompt, completion) sample. LS Eq. 7, 8

    advantages: per conversation, one value per token of its own turns in order, [own tokens] fp32.
    """
    samples = []
    for talk, advantage in zip(talks, advantages, strict=True):
        own = [(i, turn) for i, turn in enumerate(talk.turns) if turn.role == role]
        parts = advantage.split([len(turn.completion) for _, turn in own]) if own else []
        samples += [
            Sample(
                turn.prompt,
                turn.completion,
                part,
                torch.tensor(turn.logprobs),
                f"{talk.problem.id}/{talk.sample}/{i}",
            )
            for (i, turn), part in zip(own, parts)
        ]
    return samples


@dataclass(frozen=True)
class Round:
    """Where a global step stands in the schedule."""

    index: int  # of the round, from 0
    role: str  # that it trains
    step: int  # inside the round, from 0; at 0 the reference becomes the policy
    length_coef: float  # µ


def round_at(step: int, rounds: str, steps_per_round: int, length_coef: float = 1.0) -> Round:
    """The round that global step `step`, from 0, belongs to. µ rises linearly over a round, from 0 to
    length_coef. LS §4.2
    """
    roles = schedule(rounds)
    index, inside = divmod(step, steps_per_round)
    assert 0 <= index < len(roles), (
        f"step {step} is behind the last of {len(roles)} rounds of {steps_per_round}"
    )
    mu = length_coef * inside / max(1, steps_per_round - 1)
    return Round(index, roles[index], inside, mu)


def pair_name(rounds: str, finished: int) -> str:
    """The two policies after `finished` rounds, as the paper's tables name them: "LLSLSL" after 3 is
    L2⊗S1.
    """
    done = schedule(rounds)[:finished]
    return f"L{done.count('long')}⊗S{done.count('short')}"


def exchanges(talks: Sequence[Trajectory]) -> list[int]:
    """Turns of each conversation as the paper counts them: one long and, if it came to that, one short."""
    return [sum(turn.role == "long" for turn in talk.turns) for talk in talks]


def summary(talks: Sequence[Trajectory]) -> dict:
    """What a conversation adds to `evaluate.summarise`: exchanges (min, mean, max), tokens by role, how
    they ended.
    """
    count, turns = len(talks), exchanges(talks)
    ends = [talk.extra["ended"] for talk in talks]
    return {
        "turns": {"min": min(turns), "mean": sum(turns) / count, "max": max(turns)},
        **{f"{role}_tokens": sum(own_tokens(talk, role) for talk in talks) / count for role in ROLES},
        "ended": {end: ends.count(end) / count for end in ("answered", "malformed", "turns", "context")},
    }


_COLOURS = {"long": "\033[36m", "short": "\033[33m"}


def transcript(talk: Trajectory, colour: bool = True) -> str:
    """A conversation to be printed: question, then a heading and the text of every turn, roles coloured."""
    parts = [talk.problem.question]
    for turn, text in zip(talk.turns, talk.extra["texts"]):
        part = f"{turn.role} ({len(turn.completion)} tokens)\n{text}"
        parts.append(f"{_COLOURS[turn.role]}{part}\033[0m" if colour else part)
    return "\n\n".join(parts)

r"""Long⊗Short reinforcement learning: the turn protocol, the role rewards and the rounds.             LS §4.2

The protocol, for many conversations at once; h is the history, Γ the role's prompt:

    h = []
    up to max_turns times:   l = π_long (Γ_long  ∥ q ∥ h);  h += l    "<think>…</think>"
                             s = π_short(Γ_short ∥ q ∥ h);  h += s    "<answer>…</rethink>" or "…</answer>"
                             stop after </answer>

    reward = η·EM + λ·FM + µ·LM                                                     LS Eq. 9
    EM     1 if the final answer is right
    FM     1 if every turn of the trained role is well formed
    LM     0.5 - (len - min) / (max - min) over the group, in the trained role's tokens; at most 0 if EM is 0

A round trains one role by GRPO while the other is frozen; its reference is the policy at the start of the
round (LS Eq. 7, 8). Every turn of the trained role is a sample. The partner's tokens are part of its prompt,
so they never enter the loss. LM is that of Kimi k1.5 §2.3.3.

Readings: the paper does not limit a conversation. Here it ends, with EM = 0, after `max_turns` exchanges, if
the next turn does not fit the context, and at a malformed turn (checked with the five tags, even if the
reward is strict). A conversation without a turn of the trained role has FM = LM = 0. The released code
measures length in characters, over all samples in a process, and never counts a long turn as correct;
`symmetric` is its correction of that. It trains `single_exchange`: one long turn and one reply, which is
graded.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import product

from torch import Tensor

from thinkrl import UserError
from thinkrl.config import schedule
from thinkrl.data.problems import messages
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
from thinkrl.sampler import Sampler
from thinkrl.tokenizer import Tokenizer, difference
from thinkrl.types import Problem, Trajectory, Turn
from thinkrl.visible import visible


@dataclass
class Conversation(Trajectory):
    """Trajectory in which two roles take turns."""

    texts: list[str] = field(default_factory=list)  # of the turns, decoded
    ended: str = ""  # answered | malformed | turns | context; "" while it goes on
    trained: str = ""  # trained role; "" in evaluation
    role_reward: RoleReward | None = None  # that role's reward; None in evaluation

    def record(self, advantage: Tensor) -> dict:
        """Make one line of samples.jsonl: a trajectory's, and

        texts, ended                             as above
        format_reward, length_reward, trained    FM and LM of LS Eq. 9, and the trained role
        """
        line = super().record(advantage) | {"texts": self.texts, "ended": self.ended}
        if self.role_reward is not None:
            line["format_reward"], line["length_reward"] = self.role_reward.format, self.role_reward.length
            line["trained"] = self.trained
        return line


@dataclass(frozen=True)
class RoleSampler:
    """Prompts and sampling options of a role."""

    sampler: Sampler  # with its tokenizer
    temperature: float
    max_tokens: int  # of one turn
    prompts: Prompts = BUILT_IN
    suffix: str = ""  # text appended to every question
    # called during decoding with the role and the tokens of its turn so far
    on_tokens: Callable[[str, list[int]], None] | None = None

    def prompt(self, role: str, talk: Conversation) -> list[int]:
        """Ids of the role's next prompt. Γ replaces the system message of the row."""
        question = messages(talk.problem, suffix=self.suffix)[-1]["content"]
        history = [turn.completion for turn in talk.turns]
        return build(role, question, history, self.sampler.tokenizer, self.prompts)

    def has_room(self, prompt: list[int]) -> bool:
        """Whether a whole turn after this prompt fits the model's context."""
        return len(prompt) + self.max_tokens <= self.sampler.model.config.max_positions

    def sample_turn(
        self,
        role: str,
        talks: Sequence[Conversation],
        prompts: list[list[int]],
        n: int,
        seed: int,
        keys: list[tuple[int, ...]],
    ) -> None:
        """Sample a turn for every conversation and append it; n adjacent ones share a prompt."""
        if not talks:
            return
        groups = self.sampler.generate(
            prompts,
            n=n,
            max_tokens=self.max_tokens,
            temperature=self.temperature,
            stop=STOPS[role],
            seed=seed,
            keys=keys,
            on_tokens=self.on_tokens and (lambda _prompt, _sample, tokens: self.on_tokens(role, tokens)),
        )
        sampled = [(prompt, completion) for prompt, group in zip(prompts, groups) for completion in group]
        for talk, (prompt, c) in zip(talks, sampled, strict=True):
            talk.turns.append(Turn(role, prompt, c.tokens, c.logprobs, c.finish_reason))
            talk.texts.append(self.sampler.tokenizer.decode(c.tokens))


def converse(
    roles: Mapping[str, RoleSampler],
    problems: Sequence[Problem],
    *,
    group_size: int,
    max_turns: int = 5,
    seed: int,
    address: tuple[int, ...],
    rollout: str = "full",
) -> list[Conversation]:
    """Sample `group_size` conversations per problem, groups contiguous, and grade them: rewards are 0 or 1.

    The conversations that go on take their next turn in one batch. A turn's random numbers are drawn by the
    key (seed, *address, problem, sample, turn, role).

    rollout    "full", or "single_exchange": one turn of each role, whatever its tags
    """
    single = rollout == "single_exchange"
    talks = [Conversation(problem, sample, []) for problem in problems for sample in range(group_size)]
    for turn, role in product(range(1 if single else max_turns), ROLES):
        sampler, active = roles[role], [talk for talk in talks if not talk.ended]
        if turn == 0 and role == "long":  # a group shares its first prompt, prefilled once
            n, prompts = group_size, [sampler.prompt(role, talk) for talk in active[::group_size]]
        else:
            n, (active, prompts) = 1, _with_room(role, sampler, active)
        keys = [(*address, talk.problem.id, talk.sample, turn, ROLES.index(role)) for talk in active]
        sampler.sample_turn(role, active, prompts, n, seed, keys)
        for talk in active:
            talk.ended = _end(role, talk.texts[-1], single)
    for talk in talks:
        talk.ended = talk.ended or "turns"
        talk.text = talk.texts[-1]
        if talk.ended == "answered":
            _grade(talk)
    return talks


def _with_room(
    role: str, sampler: RoleSampler, talks: Sequence[Conversation]
) -> tuple[list[Conversation], list[list[int]]]:
    """Conversations where the role's next turn fits the context, and their prompts; the others end."""
    prompts = [sampler.prompt(role, talk) for talk in talks]
    for talk, prompt in zip(talks, prompts):
        talk.ended = "" if sampler.has_room(prompt) else "context"
    kept = [(talk, prompt) for talk, prompt in zip(talks, prompts) if not talk.ended]
    return [talk for talk, _ in kept], [prompt for _, prompt in kept]


def _end(role: str, text: str, single: bool) -> str:
    """Reason why a conversation ends with this turn; "" if it goes on."""
    if single:
        return "answered" if role == "short" else ""
    if not well_formed(text, role):
        return "malformed"
    return "answered" if text.endswith(ANSWERED) else ""


def _grade(talk: Conversation) -> None:
    """Grade the last turn. EM of LS Eq. 9"""
    closing, source = gradable(talk.text, talk.problem.source), talk.problem.source
    talk.answer = extract(closing, source)
    talk.outcome_reward = talk.reward = float(grade(closing, talk.problem.answer, source))


def opening_prompts(
    problems: Sequence[Problem], tokenizer: Tokenizer, prompts: Prompts = BUILT_IN, suffix: str = ""
) -> list[list[int]]:
    """Ids of the long role's first prompt in each problem's conversations."""
    questions = [messages(problem, suffix=suffix)[-1]["content"] for problem in problems]
    return [build("long", question, [], tokenizer, prompts) for question in questions]


def require_same_tokenizer(long: Tokenizer, short: Tokenizer) -> None:
    """Raise UserError unless both tokenizers decode alike: one role's ids are in the other's prompts."""
    if where := difference(long, short, BUILT_IN.long + BUILT_IN.short):
        raise UserError(
            f"the two roles have different tokenizers, {long.path} and {short.path}: {where}; train both "
            "from models of one family"
        )


def format_reward(text: str, role: str, strict: bool = False) -> float:
    """FM of one turn, 1 or 0: whether it is `well_formed`."""
    return float(well_formed(text, role, strict))  # FM of LS Eq. 9


def length_reward(lengths: Sequence[float], correct: Sequence[bool], symmetric: bool = False) -> list[float]:
    """LM of each attempt of one group, from lengths and correctness. Equal lengths give 0. Kimi k1.5 §2.3.3

    symmetric: a wrong attempt gets the same reward for brevity as a right one, instead of at most 0.
    """
    shortest, longest = min(lengths, default=0), max(lengths, default=0)
    if shortest == longest:
        return [0.0] * len(lengths)
    value = [0.5 - (length - shortest) / (longest - shortest) for length in lengths]
    return [v if right or symmetric else min(0.0, v) for v, right in zip(value, correct)]  # LM of LS Eq. 9


@dataclass(frozen=True)
class RoleReward:
    """Reward of one attempt for the trained role."""

    outcome: float  # EM
    format: float  # FM
    length: float  # LM
    total: float


def role_rewards(
    talks: Sequence[Conversation],
    role: str,
    group_size: int,
    *,
    outcome_coef: float = 1.0,
    format_coef: float = 1.0,
    length_coef: float,
    strict: bool = False,
    symmetric: bool = False,
) -> list[RoleReward]:
    """Rewards of the trained role, one per conversation; groups are contiguous. length_coef: µ."""
    rewards = []
    for start in range(0, len(talks), group_size):
        group = talks[start : start + group_size]
        own = [[text for turn, text in zip(talk.turns, talk.texts) if turn.role == role] for talk in group]
        took_part = [talk for talk, texts in zip(group, own) if texts]
        length_rewards = iter(
            length_reward(
                [own_tokens(talk, role) for talk in took_part],
                [talk.correct for talk in took_part],
                symmetric,
            )
        )
        for talk, texts in zip(group, own):
            outcome, length = talk.outcome_reward, next(length_rewards) if texts else 0.0
            form = min((format_reward(text, role, strict) for text in texts), default=0.0)
            total = outcome_coef * outcome + format_coef * form + length_coef * length  # LS Eq. 9
            rewards.append(RoleReward(outcome, form, length, total))
    return rewards


def own_tokens(talk: Trajectory, role: str) -> int:
    """Number of tokens sampled by a role."""
    return sum(len(turn.completion) for turn in talk.turns if turn.role == role)


@dataclass(frozen=True)
class Round:
    """Position of a global step in the schedule."""

    index: int  # of the round, from 0
    role: str  # that it trains
    step: int  # inside the round, from 0; at step 0 the reference is reset to the policy
    length_coef: float  # µ


def round_at(step: int, rounds: str, steps_per_round: int, length_coef: float = 1.0) -> Round:
    """Round of the global step `step`, from 0. µ rises from 0 to length_coef in a round. LS §4.2"""
    roles = schedule(rounds)
    index, inside = divmod(step, steps_per_round)
    assert 0 <= index < len(roles), (
        f"step {step} is after the last of {len(roles)} rounds of {steps_per_round}"
    )
    mu = length_coef * inside / max(1, steps_per_round - 1)
    return Round(index, roles[index], inside, mu)


def pair_name(rounds: str, finished: int) -> str:
    """Name of the pair after `finished` rounds, as in the paper's tables: "LLSLSL" after 3 is L2⊗S1."""
    done = schedule(rounds)[:finished]
    return f"L{done.count('long')}⊗S{done.count('short')}"


def exchanges(talks: Sequence[Trajectory]) -> list[int]:
    """Exchanges of each conversation as the paper counts them: a long turn and the short one that follows."""
    return [sum(turn.role == "long" for turn in talk.turns) for talk in talks]


def summary(talks: Sequence[Conversation]) -> dict:
    """Statistics of conversations, added to `evaluate.summarise`: exchanges, tokens by role, ends."""
    return _summary(
        [([(turn.role, len(turn.completion)) for turn in talk.turns], talk.ended) for talk in talks]
    )


def summary_of_records(records: Iterable[dict]) -> dict:
    """Compute `summary` from lines of `held_out_record`."""
    return _summary([([(turn["role"], turn["tokens"]) for turn in r["turns"]], r["ended"]) for r in records])


def _summary(talks: Sequence[tuple[list[tuple[str, int]], str]]) -> dict:
    """Compute `summary` from (role, tokens) of each conversation's turns, and how it ended."""
    count = len(talks)
    turns = [sum(role == "long" for role, _ in talk) for talk, _ in talks]
    tokens = {own: sum(n for talk, _ in talks for role, n in talk if role == own) for own in ROLES}
    ends = [ended for _, ended in talks]
    return {
        "turns": {"min": min(turns), "mean": sum(turns) / count, "max": max(turns)},
        **{f"{role}_tokens": total / count for role, total in tokens.items()},
        "ended": {end: ends.count(end) / count for end in ("answered", "malformed", "turns", "context")},
    }


_COLOURS = {"long": "\033[36m", "short": "\033[33m"}


def heading(role: str, colour: bool) -> str:
    """Heading of a role's turn; with `colour` the text after it is coloured up to `RESET`."""
    return f"{_COLOURS[role]}{role}\n" if colour else f"{role}\n"


RESET = "\033[0m"


def transcript(talk: Conversation, colour: bool = True) -> str:
    """Format a conversation for a terminal: the question, then heading and text of every turn."""
    parts = [visible(talk.problem.question)]
    for turn, text in zip(talk.turns, talk.texts):
        part = f"{turn.role} ({len(turn.completion)} tokens)\n{visible(text)}"
        parts.append(f"{_COLOURS[turn.role]}{part}{RESET}" if colour else part)
    return "\n\n".join(parts)

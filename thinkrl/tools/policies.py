"""Policies of sample.py: one that answers alone, and two that answer in a conversation.

`options` are those of sample.py.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

from thinkrl import UserError
from thinkrl.checkpoint import load_model, read_config
from thinkrl.config import embedded
from thinkrl.data.problems import messages
from thinkrl.distributed import World
from thinkrl.evaluate import held_out_record
from thinkrl.l2t.budgets import make_probes, measured, room_for
from thinkrl.learner import compute_dtype, model_path
from thinkrl.longshort import protocol as longshort
from thinkrl.longshort.conversation import shared_prompts
from thinkrl.rollout import EVALUATION, prompt_ids, require_room, rollout
from thinkrl.sampler import Sampler
from thinkrl.tokenizer import Tokenizer
from thinkrl.tools.chat import Messages, Stream, write
from thinkrl.types import Problem, Trajectory
from thinkrl.visible import visible


def limit(path: Path, options) -> int:
    """Resolve --max_tokens; by default half of the context, at most 2048."""
    return options.max_tokens or (
        200 if embedded(str(path)) else min(2048, read_config(path).max_positions // 2)
    )


def question(options, text: str) -> Problem:
    """Make a problem of the user's text, with --suffix, or with the instruction of --source."""
    source = options.source or ("arith" if embedded(options.long or options.model) else "math")
    return Problem(0, text, "0", source, instruct=bool(options.source))


def model_paths(options) -> list[Path]:
    """Folders of the policy, or of the two: long, short."""
    if options.long:
        return [model_path(options.long, "--long"), model_path(options.short, "--short")]
    return [model_path(options.model)]


class OnePolicy:
    """Policy that answers alone. budgets: those of --budgets, in tokens."""

    def __init__(self, options, world: World, budgets: Sequence[int] = ()):
        [path] = model_paths(options)
        self.options, self.budgets, self.max_tokens = options, budgets, limit(path, options)
        self.tokenizer = Tokenizer(path)
        self.sampler = Sampler(load_model(path, compute_dtype(options, world), world.device), self.tokenizer)
        self.samplers = [self.sampler]  # its completions are the attempts

    def attempt(self, problems: list[Problem], on_finish: Callable | None = None) -> list[Trajectory]:
        """Sample --n graded attempts at each problem."""
        o = self.options
        return rollout(
            self.sampler,
            self.tokenizer,
            problems,
            group_size=o.n,
            max_tokens=self.max_tokens,
            seed=o.seed,
            temperature=o.temperature,
            address=(EVALUATION, 0),
            system=o.system,
            suffix=o.suffix,
            on_finish=on_finish,
        )

    def require_room(self, problems: list[Problem]) -> None:
        """Raise UserError if a prompt and the tokens after it exceed the context."""
        o, more = self.options, room_for(self._probes(problems)) if self.budgets else 0
        context = self.sampler.model.config.max_positions
        prompts = [prompt_ids(problem, self.tokenizer, o.system, o.suffix) for problem in problems]
        require_room(problems, prompts, context, self.max_tokens + more)

    def records(self, problems: list[Problem]) -> list[dict]:
        """Sample attempts and make records; with --budgets also the accuracy at every budget."""
        if not self.budgets:
            return [held_out_record(t, self.tokenizer) for t in self.attempt(problems)]
        run, probes = partial(self.attempt, problems), self._probes(problems)
        attempts, chances = measured(run, self.sampler, probes, self.budgets)
        return [
            held_out_record(t, self.tokenizer)
            | {"at_budgets": [[L, chance] for L, chance in zip(self.budgets, row)]}
            for t, row in zip(attempts, chances)
        ]

    def _probes(self, problems: list[Problem]) -> list:
        o = self.options
        return make_probes(problems, self.tokenizer, o.probe_prefix, o.probe_suffix)

    def answers(self, problem: Problem) -> list[str]:
        return [
            f"{visible(t.text)}\n[{t.tokens} tokens, {t.turns[0].finish_reason}]"
            for t in self.attempt([problem])
        ]

    def reply(self, history: Messages, text: str) -> Messages:
        """Answer a text, shown during decoding; returns the chat with both."""
        o = self.options
        asked = messages(question(o, text), o.system, o.suffix)
        history = history + (asked[-1:] if history else asked)
        prompt = self.tokenizer.encode_chat(history)
        room = self.sampler.model.config.max_positions - len(prompt)
        if room < 1:
            raise UserError(f"the conversation of {len(prompt)} tokens fills the model's context")
        stream = Stream(self.tokenizer, write)
        [[completion]] = self.sampler.generate(
            [prompt],
            max_tokens=min(self.max_tokens, room),
            temperature=o.temperature,
            seed=o.seed,
            keys=[(EVALUATION, len(history))],
            on_tokens=lambda _prompt, _sample, tokens: stream.show(tokens),
        )
        stream.end()
        own = [t for t in completion.tokens if t not in self.tokenizer.stop_ids]
        return [*history, {"role": "assistant", "content": self.tokenizer.decode(own)}]


class TwoPolicies:
    """Pair of policies that answer in a conversation."""

    def __init__(self, options, world: World):
        paths = dict(zip(("long", "short"), model_paths(options)))
        tokenizers = {role: Tokenizer(path) for role, path in paths.items()}
        longshort.require_same_tokenizer(tokenizers["long"], tokenizers["short"])
        self.prompts = shared_prompts(options.prompts, *paths.values())
        self.options, self.samplers = options, []  # a completion is a turn here
        self.tokenizer = tokenizers["long"]
        self.roles = {
            role: longshort.RoleSampler(
                Sampler(
                    load_model(path, compute_dtype(options, world), world.device),
                    tokenizers[role],
                    memory_share=0.4,
                ),
                options.temperature,
                limit(path, options),
                self.prompts,
                options.suffix,
            )
            for role, path in paths.items()
        }

    def attempt(self, problems: list[Problem], n: int, **hooks) -> list[longshort.Conversation]:
        roles = {role: replace(sampler, **hooks) for role, sampler in self.roles.items()}
        return longshort.converse(
            roles,
            problems,
            group_size=n,
            max_turns=self.options.max_turns,
            seed=self.options.seed,
            address=(EVALUATION, 0),
        )

    def require_room(self, problems: list[Problem]) -> None:
        """Raise UserError if a prompt and an opening turn exceed the context."""
        long = self.roles["long"]
        context = long.sampler.model.config.max_positions
        prompts = longshort.opening_prompts(problems, self.tokenizer, self.prompts, self.options.suffix)
        require_room(problems, prompts, context, long.max_tokens)

    def records(self, problems: list[Problem]) -> list[dict]:
        talks = self.attempt(problems, self.options.n)
        return [held_out_record(talk, self.tokenizer) | {"ended": talk.ended} for talk in talks]

    def answers(self, problem: Problem) -> list[str]:
        talks = self.attempt([problem], self.options.n)
        colour = sys.stdout.isatty()
        return [f"{longshort.transcript(t, colour)}\n\n[{t.tokens} tokens, {t.ended}]" for t in talks]

    def reply(self, history: Messages, text: str) -> Messages:
        """Hold a conversation about the text, each role's turns shown during decoding."""
        stream, speaking = Stream(self.tokenizer, write), ""

        def show(role: str, tokens: list[int]) -> None:
            nonlocal speaking
            if role != speaking:
                if speaking:
                    stream.end()
                speaking = role
                stream.begin()
                write(longshort.heading(role, sys.stdout.isatty()))
            stream.show(tokens)

        problem = replace(question(self.options, text), id=len(history))
        self.require_room([problem])
        [talk] = self.attempt([problem], 1, on_tokens=show)
        stream.end()
        write(f"{longshort.RESET if sys.stdout.isatty() else ''}[{talk.tokens} tokens, {talk.ended}]\n")
        return [*history, {"role": "user", "content": text}]

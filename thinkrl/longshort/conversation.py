r"""The two roles' prompts and tags, and the builder of prompt ids for SFT, RL and evaluation.

    long    writes  <think>…</think>            a thought
    short   writes  <answer>…</rethink>         some steps, and a request for another thought
            or      <answer>…</answer>          the remaining steps and the final answer, at the end

A turn's prompt is one user message through the checkpoint's chat template:

    Γ_role
 question · segment · segment · …        "·" is the joiner, by default an empty line

The template is rendered once with a marker where the history goes. The text before the marker, each segment,
each joiner and the text after it are encoded separately, and their ids concatenated. So a segment has the
same ids everywhere: in SFT those of its text, in RL and evaluation the sampled ids.

Departures from the released code: Γ is always in the user message (there, in the system message for RL, and
in the user message for SFT and for the partner). A turn may contain "<", only the five tags are forbidden in
it; the official pattern, which rejects "x < 3", is `strict`. There is no opening tag `<rethink>`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Protocol

from thinkrl import UserError
from thinkrl.run.files import read_json

ROLES = ("long", "short")
THINK, THOUGHT = "<think>", "</think>"
ANSWER, ANSWERED, RETHINK = "<answer>", "</answer>", "</rethink>"
TAGS = (THINK, THOUGHT, ANSWER, ANSWERED, RETHINK)
STOPS = {"long": (THOUGHT,), "short": (ANSWERED, RETHINK)}  # stop strings of a turn
JOINER = "\n\n"

_OFFICIAL = {  # patterns of the released rewards; `$` allows a final line break
    "long": re.compile(r"(?s)^<think>([^<]*)</think>$"),
    "short": re.compile(r"(?s)^<answer>([^<]*)(?:</rethink>|</answer>)$"),
}
_HISTORY = "\ue000history\ue001"  # private-use characters, which no template or question contains


class Codec(Protocol):
    """The tokenizer methods that are used."""

    def encode(self, text: str) -> list[int]: ...

    def render_chat(self, messages: list[dict], add_generation_prompt: bool = True) -> str: ...


_CHUNK_REQUEST = """\
Below are a mathematics problem and a student's way to its solution, cut into numbered steps. Describe how \
the student thought, as a sequence of blocks: a block is a run of neighbouring steps that pursue one \
purpose, such as understanding the problem, setting up equations, a calculation, or checking a result.

Problem:
{problem}

Steps:
{steps}

Name each block's purpose in a few general words. The first block starts at step 1, each further block \
starts at the step after the end of the one before, and the last block ends at step {count}. Answer with \
this JSON and nothing else:
{"block 1": {"start": 1, "end": 2, "block type": "understanding the problem"}, "block 2": {...}, ...}"""

_COMPLETE_REQUEST = """\
Below are a mathematics problem and a solution with gaps. The solution is a JSON object of numbered parts: \
some are written out, of the others only the purpose is named. Write the missing parts, briefly, so that the \
whole reads as one solution; the last part ends with the final answer, in the form that the problem asks for.

Problem:
{problem}

Solution with gaps:
{solution}

Write these parts, in this order, and no others: {missing}. Each of them is one entry, however many steps it \
takes. Answer with this JSON and nothing else:
{"completed": [{"part": "{first}", "content": "..."}, ...]}"""

# what each request must contain
PLACEHOLDERS = {"chunk": ("{problem}", "{steps}"), "complete": ("{problem}", "{solution}", "{missing}")}


@dataclass(frozen=True)
class Prompts:
    """Role prompts Γ, the joiner of a conversation's parts, and chunk.py's requests to its instruct model."""

    long: str
    short: str
    joiner: str = JOINER
    chunk: str = _CHUNK_REQUEST  # with {problem}, {steps} and {count}, the number of steps
    # with {problem}, {solution}, {missing} and {first}, the first missing part
    complete: str = _COMPLETE_REQUEST

    def __getitem__(self, role: str) -> str:
        return {"long": self.long, "short": self.short}[role]


_SCENE = (
    "Two assistants work on the question below and take turns. The thinker works out the hard steps; the "
    "finisher builds on them and does what is left.\n"
    "The thinker writes one piece of reasoning between <think> and </think>.\n"
    "The finisher writes the steps that follow from it, beginning with <answer>. When they reach the final "
    "answer, the finisher states it in the form that the question asks for, in \\boxed{} if it asks for "
    "none, and closes with </answer>. When the reasoning so far is not enough or contains a mistake, the "
    "finisher says so and closes with </rethink>, and the thinker takes another turn.\n"
    "A conversation may therefore look like this: <think> reasoning </think> <answer> some steps, and what "
    "is missing </rethink> <think> more reasoning </think> <answer> remaining steps and the final answer "
    "</answer>\n"
)
BUILT_IN = Prompts(
    long=_SCENE
    + "You are the thinker. Write the next piece of reasoning and nothing else: begin with <think>, and end "
    "with </think>.\n",
    short=_SCENE
    + "You are the finisher. Write your part and nothing else: begin with <answer>, and end with </answer> "
    "if you gave the final answer, or with </rethink> if another thought is needed.\n",
)


def load_prompts(path: str | Path = "", folder: str | Path = "") -> Prompts:
    """Load prompts from the file `path`, else from prompts.json in the model's `folder`, else the built-in
    ones.

    The file is a JSON object: {"long": Γ_long, "short": Γ_short} and, optionally, "joiner", "chunk" and
    "complete", the last two with their `PLACEHOLDERS`. Raises UserError for any other content.
    """
    file = Path(path) if path else Path(folder) / "prompts.json"
    if not file.is_file():
        if path:
            raise UserError(f"--prompts {file}: no such file")
        return BUILT_IN
    content = read_json(file)
    known = [f.name for f in fields(Prompts)]
    if not set(ROLES) <= content.keys() <= set(known):
        raise UserError(
            f"{file}: an object with the texts 'long', 'short' and, if wanted, 'joiner', 'chunk' and "
            "'complete' is expected"
        )
    for name, text in content.items():
        if not isinstance(text, str) or (name in ROLES and not text.strip()):
            raise UserError(
                f"{file}: field {name!r} must be a text{'' if name == 'joiner' else ' that is not empty'}"
            )
        if lacking := [place for place in PLACEHOLDERS.get(name, ()) if place not in text]:
            raise UserError(
                f"{file}: field {name!r} must say {' and '.join(lacking)} where that is to be filled in"
            )
    return Prompts(**content)


def shared_prompts(path: str | Path, long: str | Path, short: str | Path) -> Prompts:
    """Load the prompts that two policies share, from `path`, else from their folders, which must agree."""
    prompts = load_prompts(path, long)
    if not path and _roles(load_prompts("", short)) != _roles(prompts):
        raise UserError(
            f"{long} and {short} have been trained with different prompts.json: give the right ones by "
            "--prompts FILE"
        )
    return prompts


def prompts_file(prompts: Prompts) -> dict[str, str]:
    """Make prompts.json, as {file name: text}, to be saved with a policy's weights for `load_prompts`."""
    return {"prompts.json": json.dumps(_roles(prompts), indent=2, ensure_ascii=False) + "\n"}


def _roles(prompts: Prompts) -> dict[str, str]:
    """Prompts that a policy is trained with, without the requests to an instruct model."""
    return {"long": prompts.long, "short": prompts.short, "joiner": prompts.joiner}


def tagged(role: str, text: str, last: bool = True) -> str:
    """Put a segment's text in its role's tags. Of the short ones only the last ends with `</answer>`."""
    if role == "long":
        return f"{THINK}{text}{THOUGHT}"
    return f"{ANSWER}{text}{ANSWERED if last else RETHINK}"


def without_tags(text: str) -> str:
    """Remove all five tags from a text and strip it."""
    return re.sub("|".join(map(re.escape, TAGS)), "", text).strip()


def assemble(segments: Sequence[str], joiner: str = JOINER) -> str:
    """Join segments into the history's text."""
    return joiner.join(segments)


def user_text(role: str, question: str, history: Sequence[str], prompts: Prompts = BUILT_IN) -> str:
    """User message of a turn as text, which `build` encodes in pieces."""
    return f"{prompts[role]}\n{assemble([question, *history], prompts.joiner)}"


def build(
    role: str,
    question: str,
    history: Sequence[str | Sequence[int]],
    tokenizer: Codec,
    prompts: Prompts = BUILT_IN,
) -> list[int]:
    """Build the token ids of a turn's prompt.

    history: the segments so far, each as token ids or as text. Raises UserError if the chat template does not
    contain the user message exactly once, unchanged.
    """
    message = user_text(role, question, [], prompts) + _HISTORY
    rendered = tokenizer.render_chat([{"role": "user", "content": message}]).split(_HISTORY)
    if len(rendered) != 2:
        raise UserError(
            f"the chat template writes the user message {len(rendered) - 1} times; a conversation needs it "
            "once"
        )
    before, after = (tokenizer.encode(text) for text in rendered)
    joiner = tokenizer.encode(prompts.joiner)
    ids = before
    for segment in history:
        ids = [*ids, *joiner, *(tokenizer.encode(segment) if isinstance(segment, str) else segment)]
    return [*ids, *after]


def example(
    role: str, question: str, history: Sequence[str], segment: str, prompts: Prompts = BUILT_IN
) -> dict:
    """Make one row of a cold-start file: alpaca's three fields, and the arguments of `build`.

    A program that only knows alpaca joins instruction and input by a line break, which is exactly
    `user_text`.
    """
    return {
        "instruction": prompts[role],
        "input": assemble([question, *history], prompts.joiner),
        "output": segment,
        "conversation": {
            "role": role,
            "question": question,
            "history": list(history),
            "joiner": prompts.joiner,
        },
    }


def example_prompt(row: dict, where: str, tokenizer: Codec) -> list[int]:
    """Prompt ids of a row with the field "conversation". Raises UserError, naming `where`, if it is
    malformed.
    """
    parts = row["conversation"]
    try:
        texts = [row["instruction"], parts["question"], parts["joiner"], *parts["history"]]
        complete = parts["role"] in ROLES and all(isinstance(text, str) for text in texts)
    except (KeyError, TypeError):
        complete = False
    if not complete:
        raise UserError(
            f"{where}: field 'conversation' needs role, question, history and joiner, and the row an "
            "instruction"
        )
    prompts = Prompts(row["instruction"], row["instruction"], parts["joiner"])
    return build(parts["role"], parts["question"], parts["history"], tokenizer, prompts)


def require_prompts(row: dict, where: str, prompts: Prompts) -> None:
    """Raise UserError if a row that `example_prompt` can read was written with other role prompts."""
    parts = row["conversation"]
    if (row["instruction"], parts["joiner"]) != (prompts[parts["role"]], prompts.joiner):
        raise UserError(
            f"{where}: written with other role prompts than those that would be saved with the policy: give "
            "the file that chunk.py had by --prompts"
        )


def well_formed(text: str, role: str, strict: bool = False) -> bool:
    """Whether a turn is exactly one non-empty segment of its role.

    strict: by the official pattern, which forbids "<" inside and allows a line break after the closing tag.
    """
    if strict:
        match = _OFFICIAL[role].search(text)
        return match is not None and bool(match[1].strip())
    opening = THINK if role == "long" else ANSWER
    closing = next((tag for tag in STOPS[role] if text.endswith(tag)), None)
    if closing is None or not text.startswith(opening):
        return False
    inner = text[len(opening) : -len(closing)]
    return bool(inner.strip()) and not any(tag in inner for tag in TAGS)


def gradable(segment: str, source: str) -> str:
    """Part of a short segment that is graded: all of it, or under the rule `arith` its last line.

    Answers of `arith` have no marker: `<answer>20*3=60\\n64</answer>` answers 64 after one step.
    """
    if source != "arith" or not segment.rstrip().endswith(ANSWERED):
        return segment
    lines = without_tags(segment).splitlines()
    return tagged("short", lines[-1] if lines else "")

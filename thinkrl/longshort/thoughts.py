r"""A long chain of thought -> thoughts -> importance -> labels -> the two cold-start sets.        LS §3, §4.1

    chunk       y = y_1 … y_n, by an instruct model (`llm`), at blank lines (`paragraphs`)
                or episode tags (`tags`)
    rollouts    N continuations of (question, y_1 … y_i) for every i, graded: accuracy P_i = right / N
    importance  M(y_i) = log2(1 + T1 T2 P_i) - δ_i                                            LS Eq. 1
                T1 = (d_y - d_{1..i}) / d_y     larger if the context is short
                T2 = (d_y - d_{y_i}) / d_y      larger if the thought is short
                δ_i = decay if P_i <= P_{i-1}, else 0;  δ_1 = 0
    label       y_1 is long; y_i is long if M(y_i) > max(M(y_1), …, M(y_{i-1})), else short
    segments    adjacent thoughts of one label form a segment; the short ones are written by a model (`llm`)
                or are the thoughts' own text (`block`), and end with </rethink>, the last one with </answer>

Readings: δ is subtracted, also at equal accuracy, but not from the first thought; only then does Eq. 1 give
the numbers of the paper's Figure 4. Lengths are tokens. Since T1(n) = 0 and δ_1 = 0, the last of two or more
thoughts is always short, so a conversation begins with a long segment and ends with a short one. Every step
must be covered by a thought; the released chunker drops the steps at the end.

Text of a model is read by `repair_json`, never by `eval`.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import accumulate, groupby
from pathlib import Path
from typing import Any

from thinkrl import UserError
from thinkrl.decode.pages import Pages
from thinkrl.grading import grade
from thinkrl.longshort.conversation import BUILT_IN, Prompts, example, gradable, tagged, without_tags
from thinkrl.rollout import prompt_ids
from thinkrl.sampler import Completion, Sampler
from thinkrl.tokenizer import Tokenizer
from thinkrl.types import Problem

CHUNKERS = ("llm", "paragraphs", "tags")
COMPLETERS = ("llm", "block")
TRIES = 5  # answers of an instruct model before an item is rejected
STEP = "\n\n"
ROLLOUT, CHUNKING, COMPLETING = 2, 3, 4  # first number of a key; 0 and 1 are training and evaluation


class Rejected(Exception):
    """Reason why an item cannot be used, one clause for rejects.jsonl. said: the rejected text, if any."""

    def __init__(self, reason: str, said: str = ""):
        super().__init__(reason)
        self.said = said


@dataclass(frozen=True)
class Thought:
    """One thought of a chain."""

    text: str  # without tags
    prefix: str  # its part of the assistant's turn that rollouts continue
    kind: str = ""  # block type, as the chunker named it


@dataclass(frozen=True)
class Sampling:
    """Model and the options that it is sampled with."""

    sampler: Sampler
    tokenizer: Tokenizer
    max_tokens: int  # of one text
    temperature: float
    seed: int

    def generate(self, prompts: list[list[int]], keys: list[tuple[int, ...]], **more: Any) -> list:
        """Call `Sampler.generate` with these options."""
        return self.sampler.generate(
            prompts,
            max_tokens=self.max_tokens,
            temperature=self.temperature,
            stop_ids=self.tokenizer.stop_ids,
            seed=self.seed,
            keys=keys,
            **more,
        )


def importance(lengths: Sequence[float], accuracies: Sequence[float], decay: float = 0.25) -> list[float]:
    """Importance M(y_i) of n thoughts from their lengths in tokens and the accuracies after each. LS Eq. 1

    Raises ValueError for lists of unequal length, an accuracy outside [0, 1], or thoughts without any token.
    """
    if len(lengths) != len(accuracies):
        raise ValueError(f"{len(lengths)} lengths for {len(accuracies)} accuracies")
    total = sum(lengths)
    if lengths and (min(lengths) < 0 or total <= 0) or not all(0 <= p <= 1 for p in accuracies):
        raise ValueError("importance needs lengths >= 0 with a positive sum, and accuracies in [0, 1]")
    scores = []
    for i, (length, until, accuracy) in enumerate(zip(lengths, accumulate(lengths), accuracies)):
        penalty = decay if i > 0 and accuracy <= accuracies[i - 1] else 0.0
        scores.append(
            math.log2(1 + (total - until) / total * (total - length) / total * accuracy) - penalty
        )  # LS Eq. 1
    return scores


def label(scores: Sequence[float]) -> list[str]:
    """Label the first score and every strict new maximum "long", the others "short". LS §4.1"""
    best = [-math.inf, *accumulate(scores, max)]
    return ["long" if score > before else "short" for score, before in zip(scores, best)]


def runs(labels: Sequence[str]) -> list[tuple[str, list[int]]]:
    """Merge adjacent thoughts of one label: (label, indices of its thoughts), strictly alternating."""
    return [
        (name, [i for i, _ in group]) for name, group in groupby(enumerate(labels), key=lambda pair: pair[1])
    ]


def split_response(response: str) -> tuple[str, str]:
    """Split a response at `</think>`: (reasoning, text after it), both without tags at their ends."""
    reasoning, _, final = response.partition("</think>")
    return reasoning.replace("<think>", "", 1), without_tags(final)


def paragraphs(response: str) -> list[Thought]:
    """Cut the reasoning into one thought per paragraph."""
    texts = map(without_tags, split_response(response)[0].split(STEP))
    return [Thought(text, text + STEP) for text in texts if text]


_EPISODE = re.compile(r"<episode_(\d+)>(.*?)</episode_\1>", re.DOTALL)


def tags(response: str) -> list[Thought]:
    """Cut the reasoning into one thought per `<episode_k>…</episode_k>`; prefixes keep the response's text
    and tags.

    Raises Rejected if there is no episode, or text after the last one.
    """
    reasoning = response.partition("</think>")[0]
    found = [m for m in _EPISODE.finditer(reasoning) if m[2].strip()]
    if not found:
        raise Rejected("no episode tags")
    if reasoning[found[-1].end() :].strip():
        raise Rejected("thinking after the last episode tag")
    starts = [0, *(m.end() for m in found)]
    return [Thought(without_tags(m[2]), reasoning[start : m.end()]) for m, start in zip(found, starts)]


def chunk_request(problem: str, steps: Sequence[str], prompts: Prompts = BUILT_IN) -> str:
    """Make the request to the instruct model, with the steps numbered from 1."""
    numbered = "\n".join(f"Step {i}: {step}" for i, step in enumerate(steps, start=1))
    return _filled(prompts.chunk, problem=problem, steps=numbered, count=str(len(steps)))


def _filled(text: str, **values: str) -> str:
    """Replace each {name} by its value in one pass; other braces stay."""
    return re.sub(rf"{{({'|'.join(values)})}}", lambda place: values[place[1]], text)


def read_blocks(answer: object, steps: Sequence[str], extend: bool = False) -> list[Thought]:
    """Read thoughts from an answer {"block 1": {"start", "end", "block type"}, …} or a list of such blocks.

    Blocks must follow each other from step 1 to the last. extend: if they stop early, the last block takes
    the remaining steps, and steps beyond the last are ignored, because published chunkings also count the
    text after the thinking. Raises Rejected.
    """
    blocks = list(answer.values()) if isinstance(answer, dict) else answer
    if not isinstance(blocks, list) or not blocks:
        raise Rejected("the answer holds no blocks")
    try:
        spans = [(int(b["start"]), int(b["end"]), str(b.get("block type", ""))) for b in blocks]
    except (TypeError, KeyError, ValueError, AttributeError, OverflowError):
        raise Rejected("a block has no numbers 'start' and 'end'") from None
    if extend:
        spans = [(start, min(end, len(steps)), kind) for start, end, kind in spans if start <= len(steps)]
        spans[-1:] = [(start, len(steps), kind) for start, _, kind in spans[-1:]]
    expected = 1
    for start, end, _ in spans:
        if start != expected or end < start:
            raise Rejected(f"a block covers steps {start} to {end} where step {expected} is next")
        expected = end + 1
    if expected != len(steps) + 1:
        raise Rejected(f"the blocks cover steps 1 to {expected - 1} of {len(steps)}")
    thoughts = [(without_tags(STEP.join(steps[start - 1 : end])), kind) for start, end, kind in spans]
    return [Thought(text, text + STEP, kind) for text, kind in thoughts if text]


def given_blocks(blocks: dict | None, response: str) -> list[Thought]:
    """Read the thoughts of a row in the layout of OpenMath-ThoughtChunk. Raises Rejected."""
    return read_blocks(blocks, split_response(response)[0].split(STEP), extend=True)


def chunk_by_model(
    model: Sampling, problems: Sequence[Problem], responses: Sequence[str], prompts: Prompts = BUILT_IN
) -> list[list[Thought] | Rejected]:
    """Cut each response by an instruct model. A result is Rejected if none of `TRIES` answers can be read."""
    steps = [split_response(response)[0].split(STEP) for response in responses]
    requests = [chunk_request(problem.question, s, prompts) for problem, s in zip(problems, steps)]

    def read(i: int, text: str) -> list[Thought]:
        return read_blocks(repair_json(text), steps[i])

    return _ask(model, requests, read, [(CHUNKING, problem.id) for problem in problems])


def _ask(
    model: Sampling,
    requests: Sequence[str],
    read: Callable[[int, str], list],
    addresses: Sequence[tuple[int, ...]],
) -> list:
    """Ask for each request, at most `TRIES` times while `read` rejects the answer; results, or the last
    Rejected.
    """
    context = model.sampler.model.config.max_positions
    prompts = [model.tokenizer.encode_chat([{"role": "user", "content": request}]) for request in requests]
    results: list = [
        Rejected(f"the request has {len(prompt)} tokens, too many for a context of {context}")
        for prompt in prompts
    ]
    left = [i for i, prompt in enumerate(prompts) if len(prompt) + model.max_tokens <= context]
    for attempt in range(TRIES if left else 0):
        groups = model.generate([prompts[i] for i in left], [(*addresses[i], attempt, 0) for i in left])
        for i, [written] in zip(left, groups):
            said = model.tokenizer.decode(written.tokens)
            try:
                results[i] = read(i, said)
            except Rejected as reason:
                results[i] = Rejected(f"{reason} (the last of {attempt + 1} answers)", said)
        left = [i for i in left if isinstance(results[i], Rejected)]
        if not left:
            break
    return results


@dataclass(frozen=True)
class Prefix:
    """Result of N rollouts after y_1 … y_i."""

    right: int
    rollouts: int
    new_tokens: float  # mean length of the continuations

    @property
    def accuracy(self) -> float:
        return self.right / self.rollouts


def rollouts(
    model: Sampling,
    problems: Sequence[Problem],
    chains: Sequence[Sequence[Thought]],
    n: int,
    suffix: str = "",
) -> list[list[Prefix]]:
    """Sample and grade n continuations of every prefix of every chain. LS §3.1

    Prefix and continuation are graded as one response. A continuation that reached its length limit is graded
    alone, because an answer inside the prefix was not meant as the final one.

    A chain goes through the model once: prefix i + 1 shares the pages of prefix i, and the n samples of a
    prefix share its pages. Raises UserError if there are too few pages. The chains must fit the context: see
    `require_chain`.
    """
    if not chains:
        return []
    prompts = [prompt_ids(problem, model.tokenizer, suffix=suffix) for problem in problems]
    prefixes = [(p, i) for p, chain in zip(problems, chains) for i in range(1, len(chain) + 1)]
    with ExitStack() as held:
        pages = [_prefill(model, *chain, held) for chain in zip(prompts, chains)]
        groups = model.generate(
            [[]] * len(prefixes),
            [(ROLLOUT, problem.id, i, sample) for problem, i in prefixes for sample in range(n)],
            n=n,
            prefix=sum(pages, []),
        )
    remaining, results = iter(groups), []
    for problem, chain in zip(problems, chains):
        texts = accumulate(thought.prefix for thought in chain)
        results.append([_graded(problem, text, next(remaining), model.tokenizer) for text in texts])
    return results


def _prefill(model: Sampling, prompt: list[int], thoughts: Sequence[Thought], held: ExitStack) -> list[Pages]:
    """Prefill one chain and fork the pages of every prefix; `held` releases them."""
    pieces = [model.tokenizer.encode(thought.prefix) for thought in thoughts]
    whole = model.sampler.prefill(prompt + sum(pieces, []))
    held.callback(whole.release)
    prefixes = []
    for cut in list(accumulate(map(len, pieces), initial=len(prompt)))[1:]:
        prefixes.append(whole.fork(cut))
        held.callback(prefixes[-1].release)
    return prefixes


def _graded(problem: Problem, text: str, group: Sequence[Completion], tokenizer: Tokenizer) -> Prefix:
    """Grade continuations with the prefix `text` before them, or alone if they reached the length limit."""
    responses = [(text if c.finish_reason == "stop" else "") + tokenizer.decode(c.tokens) for c in group]
    right = sum(grade(response, problem.answer, problem.source) for response in responses)
    return Prefix(right, len(group), sum(len(c.tokens) for c in group) / len(group))


def token_lengths(thoughts: Sequence[Thought], tokenizer: Tokenizer) -> list[int]:
    """Length of each thought's text in tokens."""
    return [len(tokenizer.encode(thought.text)) for thought in thoughts]


def require_chain(
    problem: Problem,
    thoughts: Sequence[Thought],
    tokenizer: Tokenizer,
    context: int,
    max_tokens: int,
    suffix: str = "",
) -> None:
    """Raise Rejected for fewer than two thoughts, and for a chain without room for a continuation."""
    if len(thoughts) < 2:
        raise Rejected("a chain of one thought" if thoughts else "no thought")
    length = len(prompt_ids(problem, tokenizer, suffix=suffix)) + sum(
        len(tokenizer.encode(t.prefix)) for t in thoughts
    )
    if length + max_tokens > context:
        raise Rejected(
            f"prompt and chain have {length} tokens: no room for {max_tokens} more in a context of {context}"
        )


def complete_by_block(
    problem: Problem, thoughts: Sequence[Thought], labels: Sequence[str], final: str
) -> list[str]:
    """Texts of the segments, made of their thoughts; the chain's final text is added if the last has no
    answer.
    """
    texts = [STEP.join(thoughts[i].text for i in indices) for _, indices in runs(labels)]
    if not _grades(texts[-1], problem):
        texts[-1] = f"{texts[-1]}\n{final}"
    return texts


def completion_request(
    question: str, thoughts: Sequence[Thought], labels: Sequence[str], prompts: Prompts = BUILT_IN
) -> str:
    """Make the request to the instruct model: long segments verbatim, short ones by block type only."""
    parts, missing = {}, []
    for number, (role, indices) in enumerate(runs(labels), start=1):
        if role == "long":
            parts[f"part {number}"] = STEP.join(thoughts[i].text for i in indices)
        else:
            kinds = [thoughts[i].kind for i in indices]
            parts[f"part {number}"] = "; ".join(kind or "next steps" for kind, _ in groupby(kinds))
            missing.append(f"part {number} ({parts[f'part {number}']})")
    solution = "\n".join(f'"{name}": {json.dumps(text, ensure_ascii=False)}' for name, text in parts.items())
    return _filled(
        prompts.complete,
        problem=question,
        solution=f"{{{solution}}}",
        missing=", ".join(missing),
        first=missing[0].partition(" (")[0],
    )


def read_completion(answer: object, count: int) -> list[str]:
    """Read the `count` parts of an answer, a list or an object with one list, by position.

    Raises Rejected.
    """
    if isinstance(answer, dict):
        lists = [value for value in answer.values() if isinstance(value, list)]
        answer = lists[0] if len(lists) == 1 else list(answer.values())
    if not isinstance(answer, list) or len(answer) != count:
        raise Rejected(f"the answer does not hold a list of {count} parts")
    contents = [part.get("content") if isinstance(part, dict) else part for part in answer]
    texts = [without_tags(text) if isinstance(text, str) else "" for text in contents]
    if not all(texts):
        raise Rejected("a completed part has no text")
    return texts


def complete_by_model(
    model: Sampling,
    problems: Sequence[Problem],
    questions: Sequence[str],
    chains: Sequence[Sequence[Thought]],
    labels: Sequence[Sequence[str]],
    prompts: Prompts = BUILT_IN,
) -> list[list[str] | Rejected]:
    """Texts of each chain's segments, the short ones written by an instruct model. LS §4.1"""
    requests = [completion_request(*item, prompts) for item in zip(questions, chains, labels)]

    def read(i: int, text: str) -> list[str]:
        parts = runs(labels[i])
        written = iter(read_completion(repair_json(text), sum(role == "short" for role, _ in parts)))
        return [
            STEP.join(chains[i][j].text for j in indices) if role == "long" else next(written)
            for role, indices in parts
        ]

    return _ask(model, requests, read, [(COMPLETING, problem.id) for problem in problems])


def segments(texts: Sequence[str], labels: Sequence[str], problem: Problem) -> list[str]:
    """Put each text in its role's tags. Raises Rejected unless the last segment is short and graded right."""
    roles = [role for role, _ in runs(labels)]
    if roles[-1] != "short" or not _grades(texts[-1], problem):
        raise Rejected("the last short segment does not give the gold answer", texts[-1])
    return [tagged(role, text, last=i == len(texts) - 1) for i, (role, text) in enumerate(zip(roles, texts))]


def cold_start(
    question: str, conversation: Sequence[str], prompts: Prompts = BUILT_IN
) -> tuple[list[dict], list[dict]]:
    """Rows (D_long, D_short) of one conversation: each segment once, with the segments before it as history.
    LS §4.1
    """
    rows: tuple[list[dict], list[dict]] = ([], [])
    for i, segment in enumerate(conversation):
        role = "long" if i % 2 == 0 else "short"
        rows[role == "short"].append(example(role, question, conversation[:i], segment, prompts))
    return rows


def _grades(text: str, problem: Problem) -> bool:
    return grade(gradable(tagged("short", text), problem.source), problem.answer, problem.source)


# "\n" is a line break, "\neq" is not; commands such as "\nless" are left out
_NEWLINE_OR_LATEX = (
    r"n(?!(?:abla|atural|cong|e|earrow|eg|eq|ewline|geq|i|leftarrow|leq|mid|oindent|olimits|onumber|ot|otag|"
    r"otin|prec|rightarrow|sim|subseteq|succ|supseteq|u|warrow)(?![a-zA-Z]))"
)
_ESCAPE = re.compile(rf'\\(\\|["/]|u[0-9a-fA-F]{{4}}|t(?![a-zA-Z])|{_NEWLINE_OR_LATEX})?')
_SINGLE_QUOTED = re.compile(r"(?<=[{\[,:\s])'((?:[^'\\]|\\.|'(?!\s*[,:}\]]))*)'(?=\s*[,:}\]])", re.DOTALL)
_STARTS = 20  # opening brackets at which parsing is tried


def repair_json(text: str) -> dict | list:
    r"""Parse the first non-empty JSON object or list in a model's answer. Raises Rejected if there is none.

    Repairs common mistakes: text and code fences around it, trailing commas, line breaks in strings, LaTeX
    with single backslashes ("\frac" is a fraction here, not a form feed), and single quotes.
    """
    text = _ESCAPE.sub(lambda m: m[0] if m[1] else r"\\", text.replace(r"\'", "'"))
    text = re.sub(r",(?=\s*[}\]])", "", text)
    requoted = _SINGLE_QUOTED.sub(lambda m: '"' + m[1].replace('"', r"\"") + '"', text)
    for candidate in (text, requoted):
        for start in [m.start() for m in re.finditer(r"[{\[]", candidate)][:_STARTS]:
            try:
                value, _ = json.JSONDecoder(strict=False).raw_decode(candidate, start)
            except (ValueError, RecursionError):
                continue
            if value:
                return value
    raise Rejected("the answer holds no JSON that can be read")


def plot(items: Sequence[dict], path: Path) -> None:
    """Plot mean importance and accuracy, and the number of chains, by the thought's position in the chain."""
    pyplot = require_pyplot()
    longest = max(len(item["importance"]) for item in items)
    places = range(1, longest + 1)

    def mean(name: str) -> list[float]:
        columns = [[item[name][i - 1] for item in items if len(item[name]) >= i] for i in places]
        return [sum(column) / len(column) for column in columns]

    figure, (top, bottom) = pyplot.subplots(2, 1, figsize=(6, 5), sharex=True, height_ratios=(3, 1))
    top.plot(places, mean("importance"), marker="o", label="importance M (Eq. 1)")
    top.plot(places, mean("accuracies"), marker="s", label="accuracy of rollouts")
    top.axhline(0, color="grey", linewidth=0.5)
    top.legend()
    bottom.bar(places, [sum(len(item["importance"]) >= i for item in items) for i in places])
    bottom.set(xlabel="thought i of the chain", ylabel="chains")
    figure.tight_layout()
    figure.savefig(path)
    pyplot.close(figure)


def require_pyplot():
    """Import matplotlib's pyplot for drawing into files. Raises UserError, naming the extra, if missing."""
    try:
        import matplotlib
    except ImportError:
        raise UserError("--plot needs matplotlib: pip install 'thinkrl[report]'") from None
    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot

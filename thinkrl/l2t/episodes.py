"""Cut a completion into episodes, on token ids.                                                     L2T §4.1

Two lists are kept apart:

    spans   for credit: every completion token belongs to exactly one episode
    cuts    for probes: end of each episode's prefix, before `</think>`, the final answer and the stop token;
            a probe after the final answer would copy it and count the outcome twice

    tokens   <think> <episode_1> 2+3 =5 </episode_1> <episode_2> ok </episode_2> </think> 5 <eos>
    ids         0         0       0   0      0            1       1       1          1    1   1
    ends                                     4                                                10
    cuts                                     4                            7
    start       0

Three ways to find the episodes of the thinking part, which ends where `</think>` begins:

    tags        `<episode_k> … </episode_k>`, k = 1, 2, …; `<think>` may be in the prompt
    paragraphs  blank lines
    fixed:N     every N tokens

A tag is not a fixed sequence of tokens: a real vocabulary may write "</episode_1></think>" with a token
"></". So tags are searched in the decoded text, each character is mapped to the token that completes it, and
a token that crosses a boundary belongs to the earlier episode.

Without `</think>`, thinking ends where an answer begins in a form that a grader reads: `<answer>`, a box, or
`####` with the number that is graded (other lines with `####` are headings). An answer without such a mark is
taken for thinking.

Readings: an episode is closed by the tag of its own number with no other tag between. Text before an episode
belongs to it. Text after the last closed episode belongs to that one, unless a tag was opened there and never
closed: then it is an episode of its own. Without a closed or open episode the completion is one episode. If
the tags are not exactly 1, 2, …, K, each closed, the completion is `malformed`, and the episodes that can be
parsed still count: this changes the credit, not the outcome.
"""

from __future__ import annotations

import functools
import re
from bisect import bisect_left
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from thinkrl.grading import canonical, extract
from thinkrl.tracing import Codec, trace
from thinkrl.types import UserError

TAG = re.compile(r"<(/?)episode_(\d+)>")
OPEN, CLOSE = "<think>", "</think>"
ANSWER = re.compile(r"<answer>|\\(?:boxed|fbox)(?:\s*\{|\s+[^\s{}$\\]|-?\d)")
HASHES = re.compile(r"####.*")
BLANK_LINE = re.compile(r"\n(?:[ \t]*\n)+")


@dataclass(frozen=True)
class Episodes:
    """K episodes of a completion of T tokens. A position is the index of a completion token."""

    ids: Tensor  # [T] int64, the episode of each token: 0, …, K-1, never decreasing
    ends: Tensor  # [K] int64, position of each episode's last token; the last one is T-1
    cuts: Tensor  # [K] int64, last token of each probed prefix, at ends or before; -1: the prompt alone
    # position of the last token of an opening `<think>`, where the first prefix ends; -1: the prompt alone
    start: int = -1
    malformed: bool = False  # by tags: not exactly episodes 1, …, K, each closed

    def __len__(self) -> int:
        return len(self.ends)

    @property
    def lengths(self) -> Tensor:
        """Tokens of each episode, [K] int64."""
        return torch.diff(self.ends, prepend=self.ends.new_tensor([-1]))

    @property
    def prefixes(self) -> list[int]:
        """Number of completion tokens before each of the K+1 probes; J_0 sees at most `<think>`."""
        return [self.start + 1, *(cut + 1 for cut in self.cuts.tolist())]


def segment(tokens: list[int], tokenizer: Codec, how: str = "tags") -> Episodes:
    """Cut a completion into episodes, by `how` = "tags", "paragraphs" or "fixed:N".

    tokens are the completion's ids, stop token included. No tokens, no episodes. Raises UserError for another
    `how`, and under "tags" for a tokenizer that cannot encode a tag at all.
    """
    chunk = _chunk_size(how)
    if how == "tags":
        require_tags(tokenizer)
    text, reached = trace(tokens, tokenizer)
    opened = text.find(OPEN)
    limit, last = _thinking(tokens, tokenizer, text, reached)
    start = _completes(reached, opened + len(OPEN)) if opened >= 0 and not text[:opened].strip() else -1
    start = min(start, last)

    malformed = False
    if chunk:
        ends = list(range(start + chunk, last + 1, chunk))
        if last > (ends[-1] if ends else start):
            ends.append(last)
    else:
        boundaries, malformed = _tags(text[:limit]) if how == "tags" else (_paragraphs(text[:limit]), False)
        ends = [_completes(reached, boundary) for boundary in boundaries]
    ends = [end for before, end in pairwise([-1, *ends]) if end > before] or [len(tokens) - 1]

    cuts = torch.tensor(ends).clamp(max=last)
    ends[-1] = len(tokens) - 1
    if not tokens:
        ends, cuts = [], cuts[:0]
    last_tokens = torch.tensor(ends, dtype=torch.int64)
    ids = torch.searchsorted(last_tokens, torch.arange(len(tokens)))
    return Episodes(ids, last_tokens, cuts, start, malformed)


def _chunk_size(how: str) -> int:
    """N of "fixed:N", 0 for the other two."""
    if how in ("tags", "paragraphs"):
        return 0
    name, _, size = how.partition(":")
    if name != "fixed" or not size.isdecimal() or int(size) < 1:
        raise UserError(f"episodes can be tags, paragraphs or fixed:N with N of at least 1, not {how!r}")
    return int(size)


@functools.lru_cache
def require_tags(tokenizer: Codec) -> None:
    """Raise UserError if the vocabulary cannot write an episode tag. A tag may take several tokens."""
    if "<episode_1>" not in tokenizer.decode(tokenizer.encode("<episode_1>")):
        raise UserError(
            "--episodes tags: this tokenizer cannot encode <episode_1>; use --episodes paragraphs or fixed:N"
        )


def _thinking(tokens: list[int], tokenizer: Codec, text: str, reached: list[int]) -> tuple[int, int]:
    """Find where thinking ends: its number of characters, and the last token that a probe may see (-1: none).

    A probe may see a token that begins `</think>`, but not one that completes it.
    """
    limit = text.find(CLOSE)
    hidden_from = limit + len(CLOSE)
    if limit < 0:
        limit = _announcement(text)
        hidden_from = limit + 1
    last = bisect_left(reached, hidden_from) - 1
    stop_ids = getattr(tokenizer, "stop_ids", ())
    stopped = next((t for t, token in enumerate(tokens) if token in stop_ids), len(tokens))
    return limit, min(last, stopped - 1)


def _announcement(text: str) -> int:
    """Find the character where the answer begins in a text; the text's length if there is no answer."""
    found = [(line.start(), extract(line[0], "gsm8k")) for line in HASHES.finditer(text)]
    numbers = [(start, canonical(number, "gsm8k")) for start, number in found if number is not None]
    graded = canonical(extract(text, "gsm8k") or "", "gsm8k")
    starts = [start for start, number in numbers if number == graded]
    return min([len(text), *starts, *(marker.start() for marker in ANSWER.finditer(text))])


def _tags(text: str) -> tuple[list[int], bool]:
    """Ends of the episodes in a thinking text, in characters, and whether its tags are malformed."""
    tags = [(int(m[2]), bool(m[1]), m.end()) for m in TAG.finditer(text)]
    pairs = [(number, end) for (opened, shut, _), (number, closes, end) in pairwise(tags)
             if closes and not shut and opened == number]  # fmt: skip
    boundaries = [end for _, end in pairs]
    well_formed = len(tags) == 2 * len(pairs) and [number for number, _ in pairs] == list(
        range(1, len(pairs) + 1)
    )
    if tags and not tags[-1][1]:
        boundaries.append(len(text))  # left open
    return boundaries, not (pairs and well_formed)


def _paragraphs(text: str) -> list[int]:
    """Ends of the paragraphs in a thinking text, in characters: each includes the blank lines after it."""
    begin = text.find(OPEN) + len(OPEN) if OPEN in text else 0
    ends = [m.end() for m in BLANK_LINE.finditer(text, begin)] + [len(text)]
    return [end for before, end in pairwise([begin, *ends]) if text[before:end].strip()]


def _completes(reached: list[int], characters: int) -> int:
    """Position of the token with which the text has that many characters."""
    return bisect_left(reached, characters)

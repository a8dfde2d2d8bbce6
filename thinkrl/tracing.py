"""Map ids to text, with the number of characters after each id."""

from __future__ import annotations

import functools
from collections.abc import Hashable
from typing import Protocol


class Codec(Hashable, Protocol):
    """Tokenizer methods that are used. Ids in its `stop_ids`, if it has any, end the thinking."""

    def encode(self, text: str) -> list[int]: ...

    def decode(self, ids: list[int]) -> str: ...


def trace(tokens: list[int], tokenizer: Codec) -> tuple[str, list[int]]:
    """Text of `tokens`, and the number of its characters after each token, never decreasing.

    Usually the text is the concatenation of the tokens' texts, one look-up each. Otherwise (a character in
    several tokens, a decoder that drops a first space) it is decoded step by step.
    """
    text = tokenizer.decode(tokens)
    pieces = [_piece(tokenizer, token) for token in tokens]
    if "".join(pieces) != text:
        return trace_ref(tokens, tokenizer)
    reached, length = [], 0
    for piece in pieces:
        length += len(piece)
        reached.append(length)
    return text, reached


@functools.lru_cache(maxsize=1 << 18)
def _piece(tokenizer: Codec, token: int) -> str:
    return tokenizer.decode([token])


def trace_ref(tokens: list[int], tokenizer: Codec) -> tuple[str, list[int]]:
    """Specification of `trace`, by incremental decoding: the text that a token adds to a few tokens before
    it.

    A character counts from the token that has its last byte.
    """
    text, reached = "", []
    context, known = 0, 0  # tokens[known:] have no text yet; tokens[context:known] are what they follow
    for t in range(1, len(tokens) + 1):
        before, after = tokenizer.decode(tokens[context:known]), tokenizer.decode(tokens[context:t])
        if not after.endswith("\ufffd") or t == len(tokens):
            text += after[len(before) :]
            context, known = known, t
        reached.append(len(text))
    return text, reached

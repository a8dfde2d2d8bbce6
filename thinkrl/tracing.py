"""Where the characters of a text come from: ids -> text, and how much of it is there after each id."""

from __future__ import annotations

import functools
from collections.abc import Hashable
from typing import Protocol


class Codec(Hashable, Protocol):
    """The tokenizer methods that are used. Ids in its `stop_ids`, if it has any, end the thinking wherever they
    appear.
    """

    def encode(self, text: str) -> list[int]: ...

    def decode(self, ids: list[int]) -> str: ...


def trace(tokens: list[int], tokenizer: Codec) -> tuple[str, list[int]]:
    """The text of `tokens`, and how many of its characters are there after each token. Never decreasing.

    Usually the tokens' own texts are the text, which one look-up per token finds out. Where they are not (a
    character spread over several tokens, a decoder that treats a first space apart), it is decoded step by
    step.
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
    """`trace` by incremental decoding: a token's text is what it adds to that of the few tokens before it.

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

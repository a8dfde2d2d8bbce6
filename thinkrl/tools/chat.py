"""Chat on the terminal: answers are shown during decoding.   `sample.py` without --prompt and --data

/new begins a new conversation, Ctrl-D ends, Ctrl-C stops an answer. A single policy sees the conversation so
far. For two policies (Long⊗Short) every message is a new question, and each role's text is shown under its
name.
"""

from __future__ import annotations

import sys
from collections.abc import Callable

from thinkrl import UserError
from thinkrl.tokenizer import IncrementalText, Tokenizer
from thinkrl.visible import visible

Messages = list[dict[str, str]]


class Stream:
    """Writer of the new text of a growing list of tokens, without stop ids."""

    def __init__(self, tokenizer: Tokenizer, write: Callable[[str], object]):
        self.tokenizer, self.write = tokenizer, write
        self.begin()

    def begin(self) -> None:
        """Begin a new text."""
        self.shown, self.text = 0, IncrementalText(self.tokenizer)

    def show(self, tokens: list[int]) -> None:
        for token in tokens[self.shown :]:
            if token not in self.tokenizer.stop_ids:
                self.write(visible(self.text.push(token)))
        self.shown = len(tokens)

    def end(self) -> None:
        self.write(visible(self.text.flush()) + "\n")


def write(text: str) -> None:
    """Write to the terminal and flush."""
    sys.stdout.write(text)
    sys.stdout.flush()


def chat(reply: Callable[[Messages, str], Messages]) -> None:
    """Read messages until the end of input.

    reply    shows an answer to the messages so far and a new text, and returns all messages with the answer
    """
    messages: Messages = []
    while True:
        try:
            text = input("> ").strip()
        except (EOFError, KeyboardInterrupt):
            write("\n")
            return
        if text == "/new":
            messages = []
        elif text:
            try:
                messages = reply(messages, text)
            except KeyboardInterrupt:
                write("\033[0m\n[stopped]\n")  # and no role's colour
            except UserError as mistake:
                write(f"{visible(mistake)}; /new begins a new conversation\n")

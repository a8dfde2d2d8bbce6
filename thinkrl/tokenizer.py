"""Text <-> ids, and the model's own chat template.

`tokenizers` does the encoding. The chat template is the checkpoint's own Jinja source, rendered in a sandbox set up as
transformers sets up its own, so that rendered text and ids are equal to `apply_chat_template`.
"""

from __future__ import annotations

from pathlib import Path

import tokenizers

from thinkrl.types import UserError


class Tokenizer:
    """The tokenizer of a Hugging Face folder.

    Nothing is ever added to what is encoded: beginning-of-sequence and turn markers come from the chat template, once.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        file = self.path / "tokenizer.json"
        if not file.exists():
            raise UserError(f"{file}: file not found; the fast tokenizer's tokenizer.json is needed")
        try:
            self._tokenizer = tokenizers.Tokenizer.from_file(str(file))
        except Exception as error:  # the Rust side raises bare Exception
            raise UserError(f"{file}: not a readable tokenizer ({error})") from None
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()

    @property
    def vocab_size(self) -> int:
        """Number of ids that stand for text; a model's own vocabulary is often padded above it."""
        return self._tokenizer.get_vocab_size(with_added_tokens=True)

    def encode(self, text: str) -> list[int]:
        """Ids of `text`, with nothing added; a special token spelled out in the text becomes its one id."""
        return self._tokenizer.encode(text, add_special_tokens=False).ids

    def decode(self, ids: list[int]) -> str:
        """Text of `ids`, special tokens included. Bytes that are not yet a character come out as U+FFFD."""
        return self._tokenizer.decode(ids, skip_special_tokens=False)

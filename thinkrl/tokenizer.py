"""Encode and decode text, render chat templates, and find stop strings during sampling.

`tokenizers` does the encoding. The chat template is the checkpoint's Jinja source, rendered in a sandbox with
the same settings as in transformers, so that rendered text and ids equal `apply_chat_template`.

Stop strings are matched on text, because in a real vocabulary they are not a fixed sequence of ids:
"</think>\\n\\n" ends in one token that holds ">\\n\\n", and one character may be spread over several tokens.
Decoding text for each new token of each running sequence would cost more than a small model's forward, so it
is avoided in two ways:

    StopStrings.endings    ids whose text may be the end of a stop string: a table over the vocabulary, made
                           once. Any other token costs one look-up.
    window                 after such a token, only the last `window` tokens are decoded: a token is at least
                           one byte, so a stop string of n bytes is in the last n tokens.
"""

from __future__ import annotations

import datetime
import functools
import json
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path

import jinja2
import jinja2.ext
import tokenizers
from jinja2.sandbox import ImmutableSandboxedEnvironment

from thinkrl import UserError
from thinkrl.run.files import read_json

SPECIAL_NAMES = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "tokenizer.model",
    "chat_template.jinja",
    "generation_config.json",
    "prompts.json",  # role prompts of a checkpoint
)
UNFINISHED = "\ufffd"  # decoded from bytes that are not, or not yet, a character
PARTIAL = 3  # a UTF-8 character may lack its last byte after at most 3


class Tokenizer:
    """Tokenizer of a Hugging Face folder.

    Encoding adds nothing: the beginning-of-sequence token and turn markers come from the chat template.
    `eos_token`, `bos_token` and the like are those of tokenizer_config.json.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        file = self.path / "tokenizer.json"
        if not file.exists():
            raise UserError(f"{file}: file not found; the fast tokenizer's tokenizer.json is needed")
        try:
            self._tokenizer = tokenizers.Tokenizer.from_file(str(file))
        except Exception as error:  # tokenizers raises no narrower type
            raise UserError(f"{file}: not a readable tokenizer ({error})") from None
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self._config = read_json(self.path / "tokenizer_config.json", missing={})
        named = read_json(self.path / "special_tokens_map.json", missing={}) | self._config
        self.special: dict[str, str] = {}
        for name in SPECIAL_NAMES:
            token = named.get(name)
            token = token.get("content") if isinstance(token, dict) else token
            if token is not None:
                self.special[name] = token

    @functools.cached_property
    def vocab_size(self) -> int:
        """Highest id of a text plus one; a model's vocabulary may be padded to more."""
        return max(self._tokenizer.get_vocab(with_added_tokens=True).values()) + 1

    @property
    def eos_id(self) -> int:
        """Id that ends a text in training data. Raises UserError if the folder names none."""
        eos = self._tokenizer.token_to_id(self.special.get("eos_token", ""))
        if eos is None:
            raise UserError(
                f"{self.path / 'tokenizer_config.json'}: eos_token is missing or not in the vocabulary"
            )
        return eos

    @functools.cached_property
    def stop_ids(self) -> list[int]:
        """All ids that end a completion: generation_config.json's, config.json's and the tokenizer's own."""
        ids = set()
        for file in ("generation_config.json", "config.json"):
            listed = read_json(self.path / file, missing={}).get("eos_token_id")
            ids.update(listed if isinstance(listed, list) else [listed])
        ids.add(self._tokenizer.token_to_id(self.special.get("eos_token", "")))
        return sorted(ids - {None})

    def encode(self, text: str) -> list[int]:
        """Encode `text`, with nothing added; a special token in the text becomes its id."""
        return self._tokenizer.encode(text, add_special_tokens=False).ids

    def decode(self, ids: Sequence[int]) -> str:
        """Decode `ids`, special tokens included. Bytes that are not a character become U+FFFD."""
        return self._tokenizer.decode(ids, skip_special_tokens=False)

    @functools.cached_property
    def _anchor(self) -> tuple[list[int], int]:
        """An id to put before others, and its text's length, because some decoders drop a leading space."""
        words = ((i, self.decode([i])) for i in range(self.vocab_size))
        return next((([i], len(text)) for i, text in words if text.isalnum()), ([], 0))

    def continuation(self, ids: Sequence[int]) -> str:
        """Decode `ids` as the continuation of other text, such as a completion after a prompt."""
        anchor, length = self._anchor
        return self.decode([*anchor, *ids])[length:]

    @functools.cached_property
    def pieces(self) -> list[str]:
        """`continuation([i])` of every id i."""
        anchor, length = self._anchor
        texts = self._tokenizer.decode_batch(
            [[*anchor, i] for i in range(self.vocab_size)], skip_special_tokens=False
        )
        return [text[length:] for text in texts]

    @functools.cached_property
    def _template(self) -> jinja2.Template | None:
        file = self.path / "chat_template.jinja"
        if file.exists():
            source = file.read_text(encoding="utf-8")
        else:
            file, source = self.path / "tokenizer_config.json", self._config.get("chat_template")
        if isinstance(source, list):
            source = {entry["name"]: entry["template"] for entry in source}
            if "default" not in source:
                raise UserError(f"{file}: none of the chat templates {sorted(source)} is named default")
            source = source["default"]
        if source is None:
            return None
        try:
            return _environment().from_string(source)
        except jinja2.TemplateError as error:
            raise UserError(f"{file}: the chat template is not valid Jinja ({error})") from None

    def render_chat(self, messages: list[dict], add_generation_prompt: bool = True) -> str:
        """Render a conversation by the chat template. Raises UserError if the template refuses it.

        messages: {"role": "system" | "user" | "assistant", "content": str}, ... Without a chat template (a
        base model), contents are joined by empty lines, after the beginning-of-sequence token if the
        tokenizer adds one.
        """
        if not messages:
            raise UserError("a conversation needs at least one message")
        if self._template is None:
            return self._first_token() + "\n\n".join(message["content"] for message in messages)
        messages = [{k: v for k, v in message.items() if v is not None} for message in messages]
        try:
            return self._template.render(
                messages=messages,
                tools=None,
                documents=None,
                add_generation_prompt=add_generation_prompt,
                **self.special,
            )
        except Exception as error:  # a template is a program and may raise anything
            raise UserError(f"{self.path}: the chat template refuses this conversation ({error})") from None

    def encode_chat(self, messages: list[dict], add_generation_prompt: bool = True) -> list[int]:
        """Encode `render_chat`, which includes the beginning-of-sequence token if there is one."""
        return self.encode(self.render_chat(messages, add_generation_prompt))

    def _first_token(self) -> str:
        bos = self.special.get("bos_token", "")
        return bos if bos and bos in self._tokenizer.encode("", add_special_tokens=True).tokens else ""

    def save(self, path: str | Path) -> None:
        """Copy the tokenizer's files, with generation_config.json for its stop ids, into `path`."""
        for name in FILES:
            if (self.path / name).exists():
                shutil.copyfile(self.path / name, Path(path) / name)


def difference(a: Tokenizer, b: Tokenizer, text: str) -> str:
    """Describe a difference of two tokenizers in decoding ids or in encoding `text`; "" if there is none."""
    if a.pieces != b.pieces:
        differing = (
            f"id {i} is {x!r} and {y!r}" for i, (x, y) in enumerate(zip(a.pieces, b.pieces)) if x != y
        )
        return next(differing, f"{len(a.pieces)} and {len(b.pieces)} ids")
    return "" if a.encode(text) == b.encode(text) else "the same text is cut differently"


class StopStrings:
    """Matcher of a set of stop strings in a completion.

    Only the completion's text counts, not the prompt's. The token whose text completes a stop string belongs
    to the completion, with any text after the stop string in that token.
    """

    def __init__(self, tokenizer: Tokenizer, stops: Sequence[str]):
        if "" in stops:
            raise UserError("an empty stop string would end every completion before it starts")
        self.tokenizer, self.stops = tokenizer, tuple(stops)
        self.window = max((len(stop.encode()) for stop in stops), default=0)
        self.endings = frozenset(self._possible_endings(tokenizer.pieces))

    def _possible_endings(self, pieces: Sequence[str]) -> Iterator[int]:
        rests = tuple(stop[n:] for stop in self.stops for n in range(1, len(stop)))
        wide = not all(stop[-1].isascii() for stop in self.stops)  # the last character may come in parts
        for i, piece in enumerate(pieces):
            # text after the end of a character that began in an earlier token
            whole = piece.lstrip(UNFINISHED)
            if (
                whole.startswith(rests)
                or any(stop in piece for stop in self.stops)
                or (wide and whole != piece)
            ):
                yield i

    def find(self, tokens: Sequence[int], start: int = 0) -> int | None:
        """Index of the first token from `start` on that completes a stop string, or None. tokens: the
        completion.
        """
        for i in range(start, len(tokens)):
            if tokens[i] in self.endings and self._ends_at(tokens, i):
                return i
        return None

    def _ends_at(self, tokens: Sequence[int], i: int) -> bool:
        start = max(0, i + 1 - self.window)
        text = self.tokenizer.continuation(tokens[start : i + 1])
        # back to the start of a character: some decoders replace a whole run of cut bytes
        for _ in range(PARTIAL):
            if start and text.startswith(UNFINISHED):
                start -= 1
                text = self.tokenizer.continuation(tokens[start : i + 1])
        before = len(self.tokenizer.continuation(tokens[start:i]).rstrip(UNFINISHED))
        return any(stop in text[max(0, before - len(stop) + 1) :] for stop in self.stops)


def find_stop_ref(tokenizer: Tokenizer, stops: Sequence[str], tokens: Sequence[int]) -> int | None:
    """Specification of `StopStrings.find`: decode the whole completion after every token."""
    texts = (tokenizer.continuation(tokens[: i + 1]) for i in range(len(tokens)))
    return next((i for i, text in enumerate(texts) if any(stop in text for stop in stops)), None)


class IncrementalText:
    """Incremental decoder: the concatenated results of `push` are the text of all ids so far.

    Text is held back only while its last bytes are not yet a character. A push decodes one token, or the few
    since the text last ended in a whole character. For invalid UTF-8 the number of U+FFFD may differ from
    decode's.
    """

    def __init__(self, tokenizer: Tokenizer):
        self.tokenizer = tokenizer
        self._pending: list[int] = []  # ids since the text last ended in a complete character
        self._given = 0  # characters of their text that were returned

    def push(self, token: int) -> str:
        """Add a token and return the characters that it completes, possibly none."""
        self._pending.append(token)
        text = self.tokenizer.continuation(self._pending)
        # Only the last PARTIAL bytes may still become a character.
        certain = max(self._given, len(text.rstrip(UNFINISHED)), len(text) - PARTIAL)
        new = text[self._given : certain]
        open_end = len(text) - certain
        if open_end == 0:
            self._pending = []
        # bytes that never become a character must not be decoded again and again
        elif len(self._pending) > 2 * PARTIAL:
            self._pending = self._pending[-PARTIAL:]
            text = self.tokenizer.continuation(self._pending)
        self._given = len(text) - open_end if self._pending else 0
        return new

    def flush(self) -> str:
        """Return the rest at the end of the sequence: U+FFFD for bytes that are not a character."""
        left = self.tokenizer.continuation(self._pending)[self._given :]
        self._pending, self._given = [], 0
        return left


class _Generation(jinja2.ext.Extension):
    """Tag {% generation %} … {% endgeneration %}, which marks the assistant's text for other trainers; no
    effect here.
    """

    tags = {"generation"}

    def parse(self, parser: jinja2.parser.Parser) -> jinja2.nodes.Node:
        line = next(parser.stream).lineno
        return jinja2.nodes.Scope(
            parser.parse_statements(("name:endgeneration",), drop_needle=True), lineno=line
        )


@functools.cache
def _environment() -> ImmutableSandboxedEnvironment:
    """Make the Jinja environment that templates expect: block trimming, loop controls, three functions."""

    def raise_exception(message: str) -> None:
        raise jinja2.TemplateError(message)

    def tojson(value, ensure_ascii=False, indent=None, separators=None, sort_keys=False) -> str:
        # Jinja's own would escape <, > and & for HTML.
        return json.dumps(
            value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
        )

    def strftime_now(format: str) -> str:
        return datetime.datetime.now().strftime(format)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, jinja2.ext.loopcontrols]
    )
    environment.filters["tojson"] = tojson
    environment.globals.update(raise_exception=raise_exception, strftime_now=strftime_now)
    return environment

"""Options of every program: fields of a frozen dataclass, read from the command line, printed by --help.

    @dataclass(frozen=True)
    class Options:
        _how = group("how")
        n: int = option(1, "completions per problem", low=1)

    options = parse_as(Options, sys.argv[1:], usage="torchrun sample.py [--key value …]")

A field has its help text and the bounds of its value, so every program rejects a bad value with the same
words. Nothing here imports torch, so --help and errors are fast.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple, NoReturn, TypeVar

from thinkrl import UserError
from thinkrl.launcher import end_with_launcher
from thinkrl.visible import visible

T = TypeVar("T")
BOOL = {"true": True, "1": True, "yes": True, "false": False, "0": False, "no": False}
KINDS = {"int": "an integer", "float": "a finite number", "bool": "true or false", "str": "text"}


def option(
    default,
    help: str,
    choices: tuple[str, ...] | None = None,
    *,
    low: float | None = None,
    high: float | None = None,
    above: float | None = None,
    below: float | None = None,
    presets: tuple[str, ...] | None = None,
    words: int = 1,
) -> Any:
    """Define a field of an options class.

    choices        allowed texts; "" is not shown
    low, high      inclusive bounds
    above, below   exclusive bounds
    presets        presets that read it; None: those of its group
    words          number of texts after the option; if more than one, the value is a tuple of texts
    """
    return dataclasses.field(
        default=default,
        metadata={
            "help": help,
            "choices": choices,
            "low": low,
            "high": high,
            "above": above,
            "below": below,
            "presets": presets,
            "words": words,
        },
    )


class Group(NamedTuple):
    """Heading of the options that follow it: a class attribute without annotation, so not a field."""

    title: str
    presets: tuple[str, ...]  # that read its options, unless an option has its own; (): no presets


def group(title: str, presets: tuple[str, ...] = ()) -> Group:
    """Make a heading, with the presets that read its options."""
    return Group(title, presets)


def groups(schema: type) -> Iterator[tuple[Group, list[dataclasses.Field]]]:
    """Yield each heading of an options class with its options, in source order."""
    fields = {f.name: f for f in dataclasses.fields(schema) if f.metadata}
    title = group("")
    own: list[dataclasses.Field] = []
    for name, value in vars(schema).items():
        if isinstance(value, Group):
            if own:
                yield title, own
            title, own = value, []
        elif name in fields:
            own.append(fields[name])
    if own:
        yield title, own


def parse_as(schema: type[T], argv: list[str], usage: str, notes: Iterable[str] = ()) -> T:
    """Parse the options of a program without presets. --help prints usage, options and notes, and exits 0.

    A field `given` of the schema receives the names of the options that were given.
    """
    if asks_for_help(argv):
        lines = [f"usage: {usage}"]
        for heading, fields in groups(schema):
            lines += ["", f"{heading.title}:"] * bool(heading.title)
            lines += [help_line(f, f.default) for f in fields]
        show_help("\n".join([*lines, *notes]))
    values = read_options(argv, schema)
    if "given" in {f.name for f in dataclasses.fields(schema)}:
        values["given"] = frozenset(values)
    return schema(**values)


def read_options(
    argv: list[str], schema: type, elsewhere: Callable[[str], str] = lambda name: ""
) -> dict[str, Any]:
    """Parse `--key value`, `--key=value` or, for a bool, `--key`. Dashes and underscores are the same.

    elsewhere    hint for an unknown name that is known from another library
    Raises UserError for an unknown option and for a value that its field does not allow.
    """
    fields = {f.name: f for f in dataclasses.fields(schema) if f.metadata}
    given: dict[str, Any] = {}
    queue = list(argv)
    while queue:
        word = queue.pop(0)
        key, equals, text = word.lstrip("-+").partition("=")
        key = key.replace("-", "_")
        if not word.startswith("--"):
            raise UserError(
                f"unexpected argument '{word}'{elsewhere(key) or ': options are written --key value'}"
            )
        if key not in fields:
            raise UserError(
                f"unknown option '--{key}'{elsewhere(key) or f'{nearest(key, fields)}: see --help'}"
            )
        f = fields[key]
        if not equals:
            if f.metadata["words"] > 1:
                given[key], queue = _words(f, queue)
                continue
            if type_name(f) == "bool" and (not queue or queue[0].startswith("--")):
                text = "true"
            elif not queue:
                raise UserError(f"option '--{key}' needs a value")
            else:
                text = queue.pop(0)
        given[key] = _value(f, text)
    return given


def _words(f: dataclasses.Field, queue: list[str]) -> tuple[tuple[str, ...], list[str]]:
    """Split off the texts of an option that takes several."""
    count = f.metadata["words"]
    words = tuple(queue[:count])
    if len(words) < count or any(word.startswith("--") for word in words):
        raise UserError(f"option '--{f.name}' needs {count} values")
    return words, queue[count:]


def _value(f: dataclasses.Field, text: str):
    kind, choices = type_name(f), f.metadata["choices"]
    if choices and text not in choices:
        raise UserError(f"--{f.name} is '{text}': it must be {requirement(f)}{nearest(text, choices)}")
    try:
        value = BOOL[text.lower()] if kind == "bool" else {"int": int, "float": float, "str": str}[kind](text)
    except (ValueError, KeyError):
        raise UserError(f"--{f.name} is '{text}': it must be {KINDS[kind]}") from None
    if kind == "float" and not math.isfinite(value):
        raise UserError(f"--{f.name} is '{text}': it must be {KINDS[kind]}")
    if not within(f, value):
        raise UserError(f"--{f.name} is {text}: it must be {requirement(f)}")
    return value


def within(f: dataclasses.Field, value) -> bool:
    """Whether a value is one of the field's choices and inside its bounds."""
    choices, low, high, above, below = (
        f.metadata[key] for key in ("choices", "low", "high", "above", "below")
    )
    return (
        (choices is None or value in choices)
        and (low is None or value >= low)
        and (high is None or value <= high)
        and (above is None or value > above)
        and (below is None or value < below)
    )


def requirement(f: dataclasses.Field) -> str:
    """Describe the condition on a value: "at least 0 and below 1", "one of token, sequence", or ""."""
    if f.metadata["choices"]:
        return "one of " + ", ".join(choice for choice in f.metadata["choices"] if choice)
    words = {"low": "at least", "above": "above", "high": "at most", "below": "below"}
    return " and ".join(
        f"{word} {f.metadata[key]}" for key, word in words.items() if f.metadata[key] is not None
    )


def type_name(f: dataclasses.Field) -> str:
    """Name of a field's type: int, float, bool or str."""
    return f.type if isinstance(f.type, str) else f.type.__name__


def nearest(word: str, known: Iterable[str]) -> str:
    """Suggest the nearest known word: " (did you mean 'X'?)" or ""."""
    match = difflib.get_close_matches(word, [k for k in known if k], n=1)
    return f" (did you mean '{match[0]}'?)" if match else ""


def help_line(f: dataclasses.Field, default: Any, tiny: Any = None) -> str:
    """Format one option for --help. tiny: the embedded model's default, if different."""
    choices = f.metadata["choices"]
    parts = [f.metadata["help"]]
    if choices:
        parts.append(f"[{'|'.join(choice for choice in choices if choice)}]")
    if default not in ("", ()) or tiny is not None:
        parts.append(f"(default {shown(default)}{'' if tiny is None else f'; tiny {shown(tiny)}'})")
    kind = "STR " * f.metadata["words"] if f.metadata["words"] > 1 else type_name(f).upper()
    return f"  --{f.name} {kind}".ljust(36) + " ".join(parts)


def shown(value: Any) -> str:
    """Format a value as it is typed, in quotes if it is empty or has spaces; a long text is cut."""
    if isinstance(value, bool):
        return str(value).lower()
    text = str(value) if len(str(value)) <= 40 else f"{value[:37]}…"
    return text if text and " " not in text else repr(text)


def asks_for_help(argv: list[str]) -> bool:
    """Whether --help or -h was given."""
    return "--help" in argv or "-h" in argv


def show_help(text: str) -> NoReturn:
    """Print a text on rank 0 and exit with status 0."""
    if os.environ.get("RANK", "0") == "0":
        print(text)
    sys.exit(0)


def exit_with_error(program: str, mistake: Exception, status: int = 2) -> NoReturn:
    """Print an error without a traceback, once if rank 0 has it too, and exit; 2 is a user's mistake."""
    if os.environ.get("RANK", "0") != "0":
        # if rank 0 has the same error, it prints and exits now, and torchrun ends this rank before it prints
        time.sleep(30)
    print(f"{program}: {visible(mistake)}", file=sys.stderr, flush=True)
    sys.exit(status)


def command_line(program: str, parse: Callable[[list[str]], T]) -> T:
    """Parse sys.argv; exit with an error for a user's mistake. Programs call it before they import torch."""
    end_with_launcher()
    try:
        return parse(sys.argv[1:])
    except UserError as mistake:
        exit_with_error(program, mistake)


def run_tool(program: str, parse: Callable[[list[str]], T], main: Callable[[T], None]) -> None:
    """Parse sys.argv and run main on it; exit with an error for a user's mistake in either."""
    options = command_line(program, parse)
    try:
        main(options)
    except UserError as mistake:
        exit_with_error(program, mistake)

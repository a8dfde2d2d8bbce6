"""Convert rows of public data sets to chats for supervised fine-tuning.

    messages | conversations       role and content (TRL, OpenR1-Math, NuminaMath), or from and value
                                   (ShareGPT, OpenThoughts)
    prompt                         prompt | problem | question | instruction, a text or (TRL) a list of
                                   messages; before it context or body, after an instruction
                                   input (alpaca) or context (Dolly)
    completion                     completion | response | output | generations | solution | answer: the first
                                   that the row has, so a worked solution comes before a bare answer. Of
                                   generations the first that is marked correct and complete
    history                        earlier turns, [question, answer] pairs (alpaca)
    system                         the system message

A chat that ends with the assistant's message is taken whole; `--columns` overrides it.
"""

from __future__ import annotations

from typing import Any

from thinkrl.data.layouts import with_context
from thinkrl.data.rows import Fields

Message = dict[str, str]

PROMPT = ("prompt", "problem", "question", "instruction")
COMPLETION = ("completion", "response", "output", "generations", "solution", "answer")
ROLES = {"system": "system", "user": "user", "human": "user", "assistant": "assistant", "gpt": "assistant"}


def chat(fields: Fields) -> list[Message]:
    """Messages of a row, the last one by the assistant. Raises UserError with the field if it has none."""
    messages = (
        []
        if {"problem", "completion"} & fields.columns.keys()
        else _messages(fields, "messages", "conversations")
    )
    whole = bool(messages) and messages[-1]["role"] == "assistant"
    if not whole:
        asked = _asked(fields) or messages
        if not asked:
            raise fields.error(
                f"field 'prompt' (or {', '.join(PROMPT[1:])}) is missing or empty"
                + fields.remedy("problem", *PROMPT)
            )
        messages = [*_history(fields), *asked, {"role": "assistant", "content": _completion(fields)}]
    if messages[0]["role"] != "system" and (system := fields.text("system")):
        messages = [{"role": "system", "content": system}, *messages]
    if not any(message["role"] == "user" for message in messages[:-1]):
        raise fields.error("the chat has no message by the user before the assistant's")
    fields.seen(*COMPLETION, *(PROMPT if whole else ()))  # unused fields repeat the used ones
    return messages


def _messages(fields: Fields, *names: str) -> list[Message]:
    """Messages of the first of these fields, with roles system, user, assistant; [] if it is a text."""
    column, value = fields.find(*names)
    messages = []
    for message in value if isinstance(value, list) else []:
        role, content = None, None
        if isinstance(message, dict):
            role = message.get("role") or message.get("from")
            content = message.get("content") or message.get("value")
        if role not in ROLES or not isinstance(content, str):
            raise fields.error(
                f"field {column!r} must be a list of messages with role and content (or from and value), the "
                f"roles {', '.join(ROLES)}"
            )
        messages.append({"role": ROLES[role], "content": content})
    return messages


def _asked(fields: Fields) -> list[Message]:
    """Prompt as messages; [] if the row has none."""
    if messages := _messages(fields, *PROMPT):
        return messages
    prompt = fields.text(*PROMPT)
    if prompt and fields.find(*PROMPT)[0] == fields.column("instruction"):
        prompt = "\n".join(filter(None, (prompt, fields.text("input"), fields.text("context"))))
    elif prompt:
        prompt = "\n".join(filter(None, (with_context(prompt, fields), fields.text("input"))))
    return [{"role": "user", "content": prompt}] * bool(prompt)


def _history(fields: Fields) -> list[Message]:
    """Earlier turns."""
    column, pairs = fields.find("history")
    messages = []
    for pair in pairs or []:
        if not isinstance(pair, list) or len(pair) != 2 or not all(isinstance(text, str) for text in pair):
            raise fields.error(f"field {column!r} must be a list of [question, answer] pairs of texts")
        messages += [{"role": role, "content": text} for role, text in zip(("user", "assistant"), pair)]
    return messages


def _completion(fields: Fields) -> str:
    """Completion to train on. Raises UserError if the row has none."""
    column, value = fields.find(*COMPLETION)
    if isinstance(value, list) and isinstance(value[0], dict):
        messages = _messages(fields, column)
        if [message["role"] for message in messages] != ["assistant"]:
            raise fields.error(f"field {column!r} must be one message by the assistant")
        return messages[0]["content"]
    if isinstance(value, list) and column == fields.column("generations"):
        value = _verified(fields, column, value)
    elif isinstance(value, list) and column == fields.column("solution"):  # several: OlympiadBench
        value = value[0]
    text = fields.as_text(column, value)
    if not text.strip():
        raise fields.error(
            f"field 'completion' (or {', '.join(COMPLETION[1:])}) is missing or empty"
            + fields.remedy(*COMPLETION)
        )
    return text


def _verified(fields: Fields, column: str, generations: list) -> Any:
    """First generation that is marked correct and complete; the very first if the row has no marks."""

    def marks(name: str) -> list:
        return fields.find(name)[1] or [None] * len(generations)

    by_rule, by_model, complete = map(
        marks, ("correctness_math_verify", "correctness_llama", "is_reasoning_complete")
    )
    marked = any(mark is not None for mark in (*by_rule, *by_model))
    for text, right, judged, whole in zip(generations, by_rule, by_model, complete):
        if (right or judged or not marked) and whole is not False:
            return text
    raise fields.error(f"field {column!r}: none is marked correct and complete")

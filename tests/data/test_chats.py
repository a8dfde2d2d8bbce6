"""Rows as public sets lay them out, in our own words, give the chat that is to be learned."""

import json

import pytest

from thinkrl import UserError
from thinkrl.data.chats import chat
from thinkrl.data.rows import Fields, load


def told(*texts, system=""):
    roles = ("user", "assistant") * len(texts)
    start = [{"role": "system", "content": system}] if system else []
    return start + [{"role": role, "content": text} for role, text in zip(roles, texts)]


LAYOUTS = {
    "LIMO, MATH": ({"question": "q", "solution": "so 2", "answer": "2"}, told("q", "so 2")),
    "answer alone": ({"question": "q", "answer": 42}, told("q", "42")),
    "response before solution": (
        {"problem": "q", "response": "r", "answer": "2", "solution": "s"},
        told("q", "r"),
    ),
    "MATH": ({"problem": "q", "level": "Level 1", "type": "Algebra", "solution": "so 2"}, told("q", "so 2")),
    "alpaca": ({"instruction": "do", "input": "this", "output": "c"}, told("do\nthis", "c")),
    "alpaca without input": ({"instruction": "do", "input": "", "output": "c"}, told("do", "c")),
    "alpaca with history": (
        {
            "instruction": "do",
            "input": "",
            "output": "c",
            "system": "S",
            "history": [["q1", "a1"], ["q2", "a2"]],
        },
        told("q1", "a1", "q2", "a2", "do", "c", system="S"),
    ),
    "Dolly": (
        {"instruction": "When?", "context": "In 1900.", "response": "c", "category": "qa"},
        told("When?\nIn 1900.", "c"),
    ),
    "OlympiadBench": (
        {"context": "Let x be 1.", "question": "2x?", "solution": ["so 2", "or"]},
        told("Let x be 1.\n2x?", "so 2"),
    ),
    "SVAMP": ({"Body": "One cat.", "Question": "How many?", "Answer": "1"}, told("One cat. How many?", "1")),
    "messages": ({"messages": told("q", "a", system="S")}, told("q", "a", system="S")),
    "NuminaMath": ({"problem": "q 1", "solution": "a 1", "messages": told("q 1", "a 1")}, told("q 1", "a 1")),
    "ShareGPT": (
        {"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]},
        told("q", "a"),
    ),
    "OpenThoughts": (
        {
            "system": "S",
            "conversations": [{"from": "user", "value": "q"}, {"from": "assistant", "value": "a"}],
        },
        told("q", "a", system="S"),
    ),
    "TRL's prompt-completion": ({"prompt": told("q"), "completion": told("q", "a")[1:]}, told("q", "a")),
    "TRL's text": ({"prompt": "q", "completion": "a"}, told("q", "a")),
    "prompt as messages": ({"messages": told("q"), "response": "a"}, told("q", "a")),
    "generations": (
        {
            **{"problem": "q", "answer": "2", "solution": "s", "generations": ["x", "y", "z", "w"]},
            **{
                "correctness_math_verify": [False, True, True, True],
                "is_reasoning_complete": [True, False, True, True],
            },
        },
        told("q", "z"),
    ),
    "generations judged by a model": (
        {
            "problem": "q",
            "generations": ["x", "y"],
            "correctness_math_verify": [False, False],
            "correctness_llama": [False, True],
        },
        told("q", "y"),
    ),
    "generations without marks": (
        {"problem": "q", "generations": ["x", "y"], "correctness_llama": None},
        told("q", "x"),
    ),
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_layouts(name):
    row, expected = LAYOUTS[name]
    fields = Fields(row, "d.jsonl:1")
    assert chat(fields) == expected and fields.unread() == []


@pytest.mark.parametrize(
    "row, message",
    [
        (
            {"completion": "c"},
            r"field 'prompt' \(or problem, question, instruction\) is missing or empty: --columns problem",
        ),
        (
            {"prompt": "p"},
            "field 'completion' .or response, output, .* is missing or empty: --columns completion=NAME",
        ),
        ({"prompt": "p", "completion": " "}, "field 'completion' .* is missing or empty$"),
        ({"prompt": "p", "completion": ["c"]}, "field 'completion' must be text, not list"),
        (
            {"prompt": "p", "completion": told("q", "a")},
            "field 'completion' must be one message by the assistant",
        ),
        (
            {"messages": [{"role": "tool", "content": "x"}]},
            "field 'messages' must be a list of messages with role",
        ),
        (
            {"messages": [{"role": "user", "content": ["x"]}]},
            "field 'messages' must be a list of messages with role",
        ),
        ({"conversations": ["x"]}, "field 'conversations' must be a list of messages with role"),
        ({"messages": told("q", "a")[1:]}, "the chat has no message by the user before the assistant's"),
        (
            {"instruction": "p", "output": "c", "history": ["q", "a"]},
            "field 'history' must be a list of .question, answer",
        ),
        (
            {"problem": "q", "generations": ["x"], "correctness_math_verify": [False]},
            "field 'generations': none is marked correct and complete",
        ),
    ],
)
def test_a_malformed_row_is_named(row, message):
    with pytest.raises(UserError, match=f"^d.jsonl:1: {message}"):
        chat(Fields(row, "d.jsonl:1"))


def test_columns_override_a_whole_chat():
    row = {"messages": told("no", "no"), "q": "q", "chain": "c", "solution": "s"}
    assert chat(Fields(row, "", {"problem": "q", "completion": "chain"})) == told("q", "c")
    assert chat(
        Fields({"problem": "q", "response": "r", "solution": "s"}, "", {"answer": "solution"})
    ) == told("q", "s")


def test_a_column_that_belongs_to_the_prompt_is_named(tmp_path, capsys):
    row = {"instruction": "Sum up.", "passage": "A long text.", "output": "Short."}
    (tmp_path / "d.jsonl").write_text(json.dumps(row))
    load(str(tmp_path / "d.jsonl"), lambda fields: chat(fields))
    assert "d.jsonl:1: nothing reads 'passage'; --columns context=NAME" in capsys.readouterr().err

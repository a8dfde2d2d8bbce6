"""One builder of ids: the same segment has the same ids wherever it stands; what a well-formed turn is."""

import json

import pytest

from thinkrl import UserError, sft
from thinkrl.learner import TINY
from thinkrl.longshort.conversation import (
    BUILT_IN,
    ROLES,
    Prompts,
    assemble,
    build,
    example,
    example_prompt,
    gradable,
    load_prompts,
    prompts_file,
    require_prompts,
    shared_prompts,
    tagged,
    user_text,
    well_formed,
    without_tags,
)
from thinkrl.tokenizer import Tokenizer


class Letters:
    """A tokenizer of one id per character, but "ab" is one id, so that cutting a text elsewhere changes
    its ids.
    """

    stop_ids = (0,)

    def encode(self, text: str) -> list[int]:
        return [1 if piece == "\1" else ord(piece) for piece in text.replace("ab", "\1")]

    def decode(self, ids) -> str:
        return "".join("ab" if i == 1 else chr(i) for i in ids)

    def render_chat(self, messages, add_generation_prompt=True) -> str:
        return (
            "".join(f"[{m['role']}]{m['content']}" for m in messages) + "[assistant]" * add_generation_prompt
        )


PROMPTS = Prompts("You think.", "You finish.", joiner="|")


def test_layout_is_one_user_message():
    ids = build("short", "1+1?", ["<think>x</think>", "<answer>y</rethink>"], Letters(), PROMPTS)
    assert Letters().decode(ids) == "[user]You finish.\n1+1?|<think>x</think>|<answer>y</rethink>[assistant]"
    assert (
        Letters().decode(build("long", "1+1?", [], Letters(), PROMPTS)) == "[user]You think.\n1+1?[assistant]"
    )


def test_a_segment_keeps_its_ids():
    sampled = [ord("x"), ord("a"), ord("b")]  # the sampler wrote "xab" with two tokens for "ab"
    ids = build("long", "?", [sampled], Letters(), PROMPTS)
    assert sampled == ids[-len("[assistant]") - 3 : -len("[assistant]")]
    # Even next to text with which it would merge: "a" + "b" stay two ids.
    ids = build("long", "?", ["a", "b"], Letters(), Prompts("g", "g", joiner=""))
    assert 1 not in ids and Letters().decode(ids) == "[user]g\n?ab[assistant]"


def test_history_from_text_and_from_its_ids_agree():
    tokenizer = Tokenizer(TINY)
    history = ["<think>70*6=420</think>", "<answer>so 420</rethink>"]
    ids = [tokenizer.encode(segment) for segment in history]
    for role in ROLES:
        assert build(role, "374*6?", history, tokenizer) == build(role, "374*6?", ids, tokenizer)


def test_sft_and_alpaca_readers_see_what_rl_sees(tmp_path):
    """The row's ids are build's; a program that only knows alpaca reads the same text."""
    tokenizer = Tokenizer(TINY)
    prompts = load_prompts(folder=TINY)
    history = ["<think>70*6=420</think>", "<answer>so 420</rethink>"]
    row = example("long", "374*6?", history, "<think>4*6=24</think>", prompts)
    assert example_prompt(row, "row 1", tokenizer) == build("long", "374*6?", history, tokenizer, prompts)
    (tmp_path / "long.json").write_text(json.dumps([row]))
    [read] = sft.load_rows(tmp_path / "long.json")
    assert read.completion == "<think>4*6=24</think>"
    assert row["instruction"] + "\n" + row["input"] == user_text("long", "374*6?", history, prompts)


def test_a_row_without_its_parts_is_refused():
    row = example("long", "?", [], "<think>x</think>")
    row["conversation"].pop("joiner")
    with pytest.raises(UserError, match=r"a\.json:3: field 'conversation'"):
        example_prompt(row, "a.json:3", Letters())
    with pytest.raises(UserError, match="a.json:4"):
        example_prompt(row | {"conversation": "long"}, "a.json:4", Letters())


def test_segments_of_the_paper():
    texts = [
        ("long", "t1", False),
        ("short", "s2\n\ns3", False),
        ("long", "t4", False),
        ("short", "s5", True),
    ]
    segments = [tagged(role, text, last) for role, text, last in texts]
    assert (
        assemble(segments, "")
        == "<think>t1</think><answer>s2\n\ns3</rethink><think>t4</think><answer>s5</answer>"
    )
    assert assemble(segments[:2]) == "<think>t1</think>\n\n<answer>s2\n\ns3</rethink>"


FORMATS = [  # text, role, official, tag-aware
    ("<think>a</think>", "long", 1, 1),
    ("<think> </think>", "long", 0, 0),
    ("<think>x < 3</think>", "long", 0, 1),
    ("<answer>b</rethink>", "short", 1, 1),
    ("<answer>b</answer>", "short", 1, 1),
    ("<answer></answer>", "short", 0, 0),
    ("<think>a</think><answer>b</answer>", "long", 0, 0),
    ("<think>a</think><answer>b</answer>", "short", 0, 0),
    ("<think>a</think>\n", "long", 1, 0),
    (" <think>a</think>", "long", 0, 0),
    ("<think>a", "long", 0, 0),
    ("<think>a</answer>", "long", 0, 0),
    ("<answer>b</rethink></answer>", "short", 0, 0),
    ("<think>a</think>", "short", 0, 0),
    ("<think>a\nb</think>", "long", 1, 1),
    ("<think></think>", "long", 0, 0),
    ("", "long", 0, 0),
]


@pytest.mark.parametrize("text, role, official, tag_aware", FORMATS)
def test_format(text, role, official, tag_aware):
    assert well_formed(text, role, strict=True) == bool(official)
    assert well_formed(text, role) == bool(tag_aware)


def test_what_is_graded():
    assert gradable("<answer>60+4=64\n64</answer>", "arith") == "<answer>64</answer>"
    assert gradable("<answer>64</answer>", "arith") == "<answer>64</answer>"
    assert gradable("<answer>60+4=64\n64</answer>", "math") == "<answer>60+4=64\n64</answer>"
    assert gradable("<answer>64</rethink>", "arith") == "<answer>64</rethink>"  # no answer was given
    assert without_tags(" <think>a</think> b</rethink>") == "a b"


def test_built_in_prompts_name_every_tag():
    for role, closing in (("long", "</think>"), ("short", "</rethink>")):
        assert all(
            tag in BUILT_IN[role] for tag in ("<think>", "</think>", "<answer>", "</answer>", "</rethink>")
        )
        assert closing in BUILT_IN[role].splitlines()[-1]


def test_prompts_come_from_file_folder_or_here(tmp_path):
    assert load_prompts() == BUILT_IN
    assert load_prompts(folder=tmp_path) == BUILT_IN
    (tmp_path / "prompts.json").write_text('{"long": "L", "short": "S", "joiner": ""}')
    assert load_prompts(folder=tmp_path) == Prompts("L", "S", "")
    (tmp_path / "own.json").write_text('{"long": "a", "short": "b"}')
    assert load_prompts(tmp_path / "own.json", tmp_path) == Prompts("a", "b", "\n\n")
    requests = {"chunk": "{problem} {steps}", "complete": "{problem} {solution} {missing}"}
    (tmp_path / "own.json").write_text(json.dumps({"long": "a", "short": "b"} | requests))
    assert load_prompts(tmp_path / "own.json") == Prompts("a", "b", **requests)


@pytest.mark.parametrize(
    "content",
    [
        '{"long": "a"}',
        '{"long": "a", "short": ""}',
        '{"long": "a", "short": 3}',
        "[]",
        "{",
        '{"long": "a", "short": "b", "medium": "c"}',
        '{"long": "a", "short": "b", "chunk": 3}',
        '{"long": "a", "short": "b", "complete": "{problem} {missing}"}',
    ],
)
def test_a_bad_prompts_file_is_named(tmp_path, content):
    file = tmp_path / "p.json"
    file.write_text(content)
    with pytest.raises(UserError, match="p.json"):
        load_prompts(file)
    with pytest.raises(UserError, match="nowhere.json: no such file"):
        load_prompts(tmp_path / "nowhere.json")


def test_a_request_without_its_placeholders_is_refused(tmp_path):
    file = tmp_path / "p.json"
    file.write_text(json.dumps({"long": "a", "short": "b", "chunk": "Cut {problem} up, {step} by {step}"}))
    with pytest.raises(
        UserError, match=r"p.json: field 'chunk' must say \{steps\} where that is to be filled in"
    ):
        load_prompts(file)


def test_a_template_that_repeats_the_message_is_refused():
    class Twice(Letters):
        def render_chat(self, messages, add_generation_prompt=True):
            return messages[0]["content"] * 2

    with pytest.raises(UserError, match="2 times"):
        build("long", "?", [], Twice())


def test_prompts_travel_with_the_policy(tmp_path):
    def save(prompts: Prompts, folder):
        for name, text in prompts_file(prompts).items():
            (folder / name).write_text(text, encoding="utf-8")

    prompts = Prompts("think", "answer", joiner="+")
    for role in ("long", "short"):
        (tmp_path / role).mkdir()
        save(prompts, tmp_path / role)
    assert shared_prompts("", tmp_path / "long", tmp_path / "short") == prompts
    row = example("short", "1*1?", ["<think>1</think>"], "<answer>1</answer>", prompts)
    require_prompts(row, "rows.json:1", prompts)
    for other in (Prompts("think", "Answer", joiner="+"), Prompts("think", "answer", joiner=" ")):
        with pytest.raises(UserError, match="rows.json:1: written with other role prompts .* --prompts"):
            require_prompts(row, "rows.json:1", other)
        save(other, tmp_path / "short")
        with pytest.raises(UserError, match="have been trained with different prompts.json"):
            shared_prompts("", tmp_path / "long", tmp_path / "short")
        assert (
            shared_prompts(tmp_path / "long" / "prompts.json", tmp_path / "long", tmp_path / "short")
            == prompts
        )

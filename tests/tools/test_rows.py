import json
from itertools import accumulate

import pytest

from report_runs import (
    EPISODES,
    PARTS,
    episodes,
    evaluation,
    new_chains,
    new_run,
    row,
    with_tokenizer,
    write_evaluations,
)
from thinkrl.tokenizer import Tokenizer
from thinkrl.tools import rows
from thinkrl.tools.reading import open_folders


def opened(log):
    return open_folders([log.folder])[0]


def groups(log, budget=10**6, steps=None) -> list[dict]:
    return rows.training_groups(opened(log), 0, budget, steps)


def text(completion: dict) -> list[str]:
    return ["".join(turn["pieces"]) for turn in completion["turns"]]


def test_every_token_has_its_piece_and_every_episode_its_numbers(tmp_path):
    log = new_run(tmp_path)
    episodes(log, Tokenizer(with_tokenizer(log).path))
    (group,) = groups(log)
    (completion,) = group["rows"]
    (turn,) = completion["turns"]
    assert text(completion) == ["".join(PARTS) + "5"] and len(turn["pieces"]) == completion["n"] == turn["n"]
    begins = [0, *completion["ends"]]
    parts = ["".join(turn["pieces"][a:b]) for a, b in zip(begins, completion["ends"])]
    assert parts == PARTS, "what follows the last episode is there too, and in none"
    assert completion["J"] == EPISODES["J"] and completion["R"] == EPISODES["process_reward"]
    assert completion["C"] == EPISODES["compression"] and completion["P"] == EPISODES["penalty"]
    assert turn["credit"] == [[0.5, completion["n"]]] and turn["surprise"] == [0.5] * completion["n"]
    assert (group["q"], group["gold"], group["level"], group["step"]) == (
        "What is (2+3)*2?",
        "10",
        "two steps",
        1,
    )


def test_without_a_tokenizer_the_text_is_one_piece(tmp_path):
    log = new_run(tmp_path)
    config = log.folder / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"model": str(tmp_path / "gone")}))
    log.samples(1, [row("".join(PARTS), ends=[3, 6, 9], **EPISODES)])
    completion = groups(log)[0]["rows"][0]
    assert [turn["pieces"] for turn in completion["turns"]] == [["".join(PARTS)]] and "ends" not in completion


def test_a_character_in_two_tokens_belongs_to_the_later_one(tmp_path):
    """Byte-level tokens: é is two of them."""
    from tokenizers import Tokenizer as Raw
    from tokenizers import decoders, models, pre_tokenizers

    raw = Raw(models.BPE({c: i for i, c in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}, []))
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    raw.decoder = decoders.ByteLevel()
    source = tmp_path / "bytes"
    source.mkdir()
    raw.save(str(source / "tokenizer.json"))
    tokenizer = Tokenizer(source)
    assert rows.pieces(tokenizer.encode("aéb"), tokenizer) == ["a", "", "é", "b"]


def test_only_the_trained_role_s_turns_have_credit(tmp_path):
    log = new_run(tmp_path, "longshort")
    talk = row(
        "<think>2+3=5</think>|5</rethink>|<answer>10", roles=("long", "short", "long"), format_reward=1.0
    )
    own = sum(len(talk["turns"][k]["completion"]) for k in (0, 2))
    log.samples(1, [talk | {"trained": "long", "advantage": [0.25] * own}])
    completion = groups(log)[0]["rows"][0]
    assert text(completion) == ["<think>2+3=5</think>", "5</rethink>", "<answer>10"]
    assert [turn["role"] for turn in completion["turns"]] == ["long", "short", "long"]
    assert ["credit" in turn for turn in completion["turns"]] == [True, False, True]
    assert completion["notes"] == {"format reward": 1.0}


def test_entropy_where_it_is_logged(tmp_path):
    log = new_run(tmp_path)
    log.samples(1, [row("5") | {"entropy": [0.25, 0.5]}])
    assert groups(log)[0]["rows"][0]["turns"][0]["entropy"] == [0.25, 0.5]


def test_any_logged_step_and_as_many_as_fit(tmp_path):
    log = new_run(tmp_path)
    for step in range(1, 41):
        log.samples(step, [row("5" * 100), row("10", sample=1)])
    assert [group["step"] for group in groups(log)] == list(range(1, 41))
    one = len(json.dumps(groups(log)[0]))
    kept = [group["step"] for group in groups(log, budget=9 * one)]
    assert 5 <= len(kept) <= 10 and kept == sorted(kept) and kept[0] == 1 and kept[-1] == 40
    assert max(b - a for a, b in zip(kept, kept[1:])) <= 10, "evenly spread"
    assert [group["step"] for group in groups(log, steps={2, 3, 77})] == [2, 3]
    assert len(groups(log, budget=0)) == 1, "one step at least"


def test_every_beginning_of_the_order_is_spread():
    assert (
        list(rows.spread(5)) == [0, 4, 2, 1, 3] and list(rows.spread(1)) == [0] and list(rows.spread(0)) == []
    )
    assert sorted(rows.spread(100)) == list(range(100))


def test_a_text_that_is_too_long_keeps_both_ends_and_its_number_of_tokens():
    short = rows.shortened(["a" * 40_000, "b" * 40_000])
    assert len(short) == 2
    parts = ["x"] * rows.LONGEST + ["y"] * 10
    short = rows.shortened(parts)
    assert (
        len(short) == len(parts)
        and short[0] == "x"
        and short[-1] == "y"
        and sum(map(len, short)) < len(parts) + 80
    )
    assert "10 characters are left out" in "".join(short)
    assert "100 characters are left out" in rows.shortened(["z" * (rows.LONGEST + 100)])[0]
    assert rows.shortened(["a", "b"]) == ["a", "b"]


def test_the_same_problem_before_and_after(tmp_path):
    log = new_run(tmp_path)
    write_evaluations(log, evaluation("before", 0, [True, False, True]), evaluation("step_5", 5, [False] * 3))
    write_evaluations(
        log, evaluation("after", 9, [True, True, False]), evaluation("before", 0, [True, False, True])
    )
    columns, (table,), problems = rows.held_out([opened(log)], 10**6)
    assert columns == ["before", "after"] and [p["q"] for p in problems] == [
        f"question {i}" for i in range(3)
    ]
    assert [[cell["right"] for cell in p["cells"]] for p in problems] == [
        [True, True],
        [False, True],
        [True, False],
    ]
    assert table["problems"] == 3 and table["count"] == {(True, True): 1, (True, False): 1, (False, True): 1,
                                                         (False, False): 0}  # fmt: skip
    assert problems[1]["cells"][0] == {"answer": None, "right": False, "n": 11, "cut": False,
                                       "turns": [{"role": "policy", "n": 11, "pieces": ["5"]}]}  # fmt: skip
    assert rows.lengths_by_evaluation(opened(log))["after"] == [10, 11, 12]


def test_several_attempts_at_a_problem_are_counted(tmp_path):
    log = new_run(tmp_path)
    again = [row | {"sample": 1} for row in evaluation("before", 0, [True, True])]
    write_evaluations(log, evaluation("before", 0, [True, False]), again)
    _, _, problems = rows.held_out([opened(log)], 10**6)
    assert [p["cells"][0]["share"] for p in problems] == ["2 of 2", "1 of 2"]


def test_where_not_all_fit_every_kind_of_change_is_shown(tmp_path):
    log = new_run(tmp_path)
    verdicts = [True] * 50 + [False]
    write_evaluations(log, evaluation("before", 0, [True] * 51), evaluation("after", 9, verdicts))
    _, (table,), problems = rows.held_out([opened(log)], 2000)
    assert table["count"][True, False] == 1 and 2 <= len(problems) < 20
    assert [False in [cell["right"] for cell in p["cells"]] for p in problems].count(True) == 1


def test_columns_of_several_runs(tmp_path):
    logs = [new_run(tmp_path, name=name) for name in ("a", "b")]
    for log in logs:
        write_evaluations(log, evaluation("before", 0, [False]), evaluation("after", 9, [True]))
    columns, _, problems = rows.held_out([opened(log) for log in logs], 10**6)
    assert columns == ["a, before", "a, after", "b, after"] and len(problems[0]["cells"]) == 3


def test_thoughts_of_a_chain(tmp_path):
    (folder,) = open_folders([new_chains(tmp_path)])
    first, _ = rows.annotated_chains(folder, 0, 10**6)
    assert first["thoughts"] == ["two", "three", "four"] and first["R"] == [0.1, -0.25, 0.3]
    assert list(accumulate(first["lengths"])) == [5, 8, 10] and first["labels"][1] == "short"


@pytest.mark.parametrize("field", ["question", "gold", "answer", "level", "text"])
def test_direction_characters_are_visible_everywhere(tmp_path, field):
    log = new_run(tmp_path)
    config = log.folder / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"model": str(tmp_path / "gone")}))
    log.samples(1, [row("5") | {field: "1\u202e2"}])
    assert "1⟨U+202E⟩2" in json.dumps(groups(log), ensure_ascii=False)
    assert "\u202e" not in json.dumps(groups(log), ensure_ascii=False)

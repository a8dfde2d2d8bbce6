"""Files as users have them, good and bad, and an order that no number of ranks changes."""

import json
from collections import Counter

import pytest

from thinkrl import arith
from thinkrl.grading import grade
from thinkrl.problems import (
    GPQA_OPTIONS,
    Stream,
    held_out_problems,
    load_problems,
    messages,
    read_rows,
    split_files,
    subsample,
)
from thinkrl.types import Problem, UserError


def write(path, *rows):
    path.write_text("".join(f"{row if isinstance(row, str) else json.dumps(row)}\n" for row in rows))
    return str(path)


VERL = {
    "data_source": "openai/gsm8k",
    "prompt": [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": 'What is 6*7? Answer after "####".'},
    ],
    "ability": "math",
    "reward_model": {"style": "rule", "ground_truth": "42"},
    "extra_info": {"split": "train", "index": 0, "answer": "6*7=42\n#### 42", "question": "What is 6*7?"},
}


def test_jsonl_with_every_spelling_of_a_row(tmp_path):
    path = write(
        tmp_path / "d.jsonl",
        {"problem": "1+1?", "answer": "2", "source": "arith", "level": 3},
        {"question": "2+2?", "answer": "2+2=4\n#### 4"},
        "",
        {"problem": "Half?", "solution": r"So \boxed{\frac{1}{2}}.", "level": "Level 1"},
        {"problem": "Cats?", "answer": 27.0, "data_source": "aime24", "system": "Meow."},
    )
    assert load_problems(path) == [
        Problem(0, "1+1?", "2", "arith", "3", "2"),
        Problem(1, "2+2?", "4", "gsm8k", "", "2+2=4\n#### 4"),
        Problem(2, "Half?", r"\frac{1}{2}", "math", "Level 1", r"So \boxed{\frac{1}{2}}."),
        Problem(3, "Cats?", "27.0", "aime24", "", "27.0", "Meow."),
    ]


def test_the_callers_source_is_for_rows_that_name_none(tmp_path):
    path = write(
        tmp_path / "d.jsonl",
        {"problem": "1+1?", "answer": "2"},
        {"problem": "x", "answer": "x", "source": "math"},
    )
    assert [p.source for p in load_problems(path, "arith")] == ["arith", "math"]


def test_a_json_list(tmp_path):
    path = tmp_path / "d.json"
    path.write_text(
        json.dumps([{"problem": "1+1?", "answer": 2}, {"problem": "2+2?", "answer": 4}], indent=1)
    )
    assert [p.answer for p in load_problems(str(path))] == ["2", "4"]


def test_verl_parquet(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    path = tmp_path / "train.parquet"
    only_user = VERL | {"prompt": VERL["prompt"][1:], "data_source": "math_dapo"}
    parquet.write_table(pyarrow.Table.from_pylist([VERL, only_user]), path)
    question = 'What is 6*7? Answer after "####".'
    assert load_problems(str(path)) == [
        Problem(0, question, "42", "openai/gsm8k", "", "6*7=42\n#### 42", "Be brief."),
        Problem(1, question, "42", "math_dapo", "", "6*7=42\n#### 42", ""),
    ]
    assert load_problems(write(tmp_path / "same.jsonl", VERL))[0] == load_problems(str(path))[0]
    path.write_bytes(b"not parquet")
    with pytest.raises(UserError, match="train.parquet: not a readable parquet file"):
        load_problems(str(path))


GOOD = {"problem": "1+1?", "answer": "2"}
CHOICE = {"problem": "1+1?", "options": ["2", "3", "4", "5"], "answer": "2"}
GPQA = {"Question": "1+1?", **dict(zip(GPQA_OPTIONS, ("right", "wrong", "worse", "worst")))}
LISTED = {
    "problem": "1+1?\nCandidate answer: (1) two, or so, or (2) f(3), or (3) 4, or (4) five",
    "answer": "two, or so",
}


@pytest.mark.parametrize(
    "row, message",
    [
        ({"answer": "2"}, r"d.jsonl:2: field 'problem' \(or 'question'\) is missing"),
        ({"problem": "1+1?"}, "d.jsonl:2: field 'answer' is missing"),
        ({"problem": "1+1?", "solution": "two"}, "d.jsonl:2: field 'answer' is missing"),
        ({"problem": ["1+1?"], "answer": "2"}, "d.jsonl:2: field 'problem' must be text, not list"),
        ({"problem": "1+1?", "answer": True}, "d.jsonl:2: field 'answer' must be text, not bool"),
        (
            {"problem": "1+1?", "answer": "two", "source": "gsm8k"},
            "d.jsonl:2: field 'answer': 'two' is not a number",
        ),
        ({"problem": "1+1?", "answer": r"\frac{1"}, "d.jsonl:2: field 'answer': .* unpaired"),
        (
            {"problem": "1+1?", "answer": "2", "source": "gsm9k"},
            "d.jsonl:2: field 'source': no grading rule.*gsm8k",
        ),
        ('{"problem": "1+1?"', "d.jsonl:2: not valid JSON"),
        ("[1]", "d.jsonl:2: a row must be an object with named fields, not list"),
        (CHOICE | {"answer": "7"}, "d.jsonl:2: field 'answer' must be one of the options"),
        (
            CHOICE | {"options": ["2", "2"]},
            "d.jsonl:2: field 'options' must be a list of 2 to 26 different texts",
        ),
        (CHOICE | {"options": "2, 3"}, "d.jsonl:2: field 'options'"),
        (CHOICE | {"options": ["2", "3", " "]}, "d.jsonl:2: field 'options'"),
        (CHOICE | {"options": ["2", 3]}, "d.jsonl:2: field 'options'"),
        (
            GPQA | {"Incorrect Answer 2": ""},
            "d.jsonl:2: fields .*'Incorrect Answer 2'.* must be different texts, none",
        ),
        (GPQA | {"Incorrect Answer 2": "worst "}, "d.jsonl:2: fields 'Correct Answer', "),
        (
            {k: v for k, v in GPQA.items() if k != "Incorrect Answer 3"},
            "d.jsonl:2: fields 'Correct Answer', ",
        ),
        (
            LISTED | {"problem": LISTED["problem"].replace("(4)", "(3)")},
            "d.jsonl:2: field 'problem' must list its",
        ),
        (
            LISTED | {"problem": LISTED["problem"].replace(" five", "")},
            "d.jsonl:2: field 'problem' must list its",
        ),
        (
            LISTED | {"problem": "1+1? Candidate answer: (1) two, so (2) three"},
            "d.jsonl:2: field 'problem' must list",
        ),
        (LISTED | {"answer": "(1)"}, "d.jsonl:2: field 'answer' must be one of the options"),
        (
            VERL | {"reward_model": {"style": "rule"}},
            "d.jsonl:2: field 'reward_model.ground_truth' is missing",
        ),
        (VERL | {"reward_model": "42"}, "d.jsonl:2: field 'reward_model.ground_truth' is missing"),
        (
            VERL | {"reward_model": {"ground_truth": "x"}},
            "d.jsonl:2: field 'reward_model.ground_truth': 'x' is not a number",
        ),
        (VERL | {"prompt": "What?"}, "d.jsonl:2: field 'prompt' must be a list of messages"),
        (VERL | {"prompt": [{"role": "user"}]}, "d.jsonl:2: field 'prompt' must be a list of messages"),
        (VERL | {"prompt": []}, "d.jsonl:2: field 'prompt' must be a list of messages"),
    ],
)
def test_a_malformed_row_is_named(tmp_path, row, message):
    with pytest.raises(UserError, match=message):
        load_problems(write(tmp_path / "d.jsonl", GOOD, row, GOOD))


def test_options_are_shuffled_the_same_way_every_time(tmp_path):
    """In the published GPQA file the right option is the first, 198 times of 198."""
    rows = [GPQA | {"Question": f"{i}+1?"} for i in range(200)]
    problems = load_problems(write(tmp_path / "gpqa.jsonl", *rows))
    assert all(f"({p.answer}) right" in p.question and p.source == "math" for p in problems)
    letters = Counter(p.answer for p in problems)
    assert set(letters) == set("ABCD") and max(letters.values()) < 80
    assert (
        load_problems(write(tmp_path / "other.jsonl", *rows[100:]))[0].question == problems[100].question
    ), "wherever it stands"
    [asked] = load_problems(write(tmp_path / "one.jsonl", CHOICE))
    assert sorted(line[4:] for line in asked.question.splitlines()[1:5]) == ["2", "3", "4", "5"]
    assert grade(rf"It is \boxed{{({asked.answer})}}.", asked.answer, asked.source)


def test_options_inside_the_question_are_shuffled_too(tmp_path):
    """The layout of the Long⊗Short paper's GPQA file: as the same options in a field of their own."""
    [listed] = load_problems(write(tmp_path / "listed.jsonl", LISTED | {"source": "gpqa"}))
    [apart] = load_problems(
        write(
            tmp_path / "apart.jsonl",
            {
                "problem": "1+1?",
                "options": ["two, or so", "f(3)", "4", "five"],
                "answer": "two, or so",
                "source": "gpqa",
            },
        )
    )
    assert (
        listed == apart
        and f"({listed.answer}) two, or so" in listed.question
        and "Candidate" not in listed.question
    )
    places = Counter(
        p.answer
        for p in load_problems(
            write(
                tmp_path / "many.jsonl",
                *(LISTED | {"problem": LISTED["problem"].replace("1+1", f"{i}+1")} for i in range(200)),
            )
        )
    )
    assert set(places) == set("ABCD") and max(places.values()) < 80


def test_unusable_files(tmp_path):
    for content, message in (
        ("", "has no rows"),
        ("\n\n", "has no rows"),
        ("[]", "has no rows"),
        ("[1", "not valid JSON"),
    ):
        (tmp_path / "d.jsonl").write_text(content)
        with pytest.raises(UserError, match=message):
            load_problems(str(tmp_path / "d.jsonl"))
    (tmp_path / "d.jsonl").write_bytes(b'{"problem": "\xff"}\n')
    with pytest.raises(UserError, match="d.jsonl:1: not valid JSON"):
        load_problems(str(tmp_path / "d.jsonl"))
    with pytest.raises(UserError, match="no such data file"):
        load_problems(str(tmp_path / "absent.jsonl"))
    with pytest.raises(UserError, match="is a folder"):
        load_problems(str(tmp_path))


def test_a_missing_extra_is_named(tmp_path, monkeypatch):
    (tmp_path / "d.parquet").write_bytes(b"")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"pip install 'thinkrl\[parquet\]'"):
        list(read_rows(tmp_path / "d.parquet"))
    with pytest.raises(UserError, match=r"pip install 'thinkrl\[hub\]'"):
        load_problems("hub:openai/gsm8k")


def test_a_dataset_out_of_reach_is_a_sentence(monkeypatch):
    pytest.importorskip("huggingface_hub")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match="hub:openai/gsm8k:test: cannot be fetched"):
        load_problems("hub:openai/gsm8k:test")


def test_which_files_of_a_dataset_make_a_split():
    files = [
        "README.md",
        "main/train-0.parquet",
        "main/train-1.parquet",
        "main/test-0.parquet",
        "socratic/train-0.parquet",
    ]
    assert split_files(files, "main/train", "hub:a/b") == files[1:3]
    assert split_files(files, "test", "hub:a/b") == ["main/test-0.parquet"]
    assert split_files(["test.jsonl", "trainer.json"], "test", "hub:a/b") == ["test.jsonl"]
    with pytest.raises(UserError, match="main/train or socratic/train"):
        split_files(files, "train", "hub:a/b")
    with pytest.raises(UserError, match="starts with 'train'"):
        split_files(["test.jsonl"], "train", "hub:a/b")


@pytest.mark.parametrize("rows", [list(range(10)), lambda seed, index: (seed, index)])
def test_the_stream_is_the_same_for_any_number_of_ranks(rows):
    stream = Stream(rows, seed=7)
    for step in range(6):
        whole = stream.take(step, 5)
        for world in (1, 2, 3, 5, 7):
            parts = [stream.take(step, 5, rank, world) for rank in range(world)]
            assert sum(parts, []) == whole
            assert max(map(len, parts)) - min(map(len, parts)) <= 1


def test_the_stream_resumes_from_the_step_alone_and_follows_its_seed():
    rows = list(range(10))
    once = [Stream(rows, 1).take(step, 4) for step in range(9)]
    again = Stream(rows, 1)
    assert [again.take(step, 4) for step in (8, 2, 5)] == [once[8], once[2], once[5]]
    assert once != [Stream(rows, 2).take(step, 4) for step in range(9)]


def test_an_epoch_of_a_list_meets_each_row_once_and_no_step_meets_one_twice():
    stream = Stream(list(range(10)), seed=0)
    epochs = [stream.take(2 * e, 5) + stream.take(2 * e + 1, 5) for e in range(3)]
    assert all(sorted(epoch) == list(range(10)) for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2]
    assert all(len(set(stream.take(step, 4))) == 4 for step in range(20))
    assert {row for step in range(20) for row in stream.take(step, 4)} == set(
        range(10)
    )  # nobody is left out for ever
    with pytest.raises(UserError, match="10 rows, fewer than the 11"):
        stream.take(0, 11)


def test_spare_rows_of_a_step_are_the_same_on_any_number_of_ranks_and_none_comes_twice():
    stream = Stream(list(range(30)), seed=0)
    whole = stream.take_rounds(1, 5, 3)
    assert len({row for rows in whole for row in rows}) == 15
    apart = [stream.take_rounds(1, 5, 3, rank, 2) for rank in range(2)]
    assert [a + b for a, b in zip(*apart)] == whole
    assert stream.take_rounds(4, 5, 1) == [stream.take(4, 5)]


def test_arith_trains_on_what_it_does_not_evaluate():
    stream = Stream(load_problems("arith"), seed=3)
    trained = {p.question for step in range(20) for p in stream.take(step, 32)}
    held_out = held_out_problems("", "arith")
    assert len(held_out) == len({p.question for p in held_out}) == 500
    assert not trained & {p.question for p in held_out}
    assert stream.take(2, 4)[1] == arith.training_problem(3, 9)
    assert (
        held_out_problems("arith", "other.jsonl") == held_out and held_out_problems("", "other.jsonl") == []
    )


def test_messages_ask_for_the_marker_once():
    def content(problem, **options):
        return [(m["role"], m["content"]) for m in messages(problem, **options)]

    assert content(Problem(0, "6*7?", "42")) == [("user", "6*7?")]
    assert content(Problem(0, "6*7?", "42"), system="S", suffix="End.") == [
        ("system", "S"),
        ("user", "6*7?\nEnd."),
    ]
    assert "####" in content(Problem(0, "6*7?", "42", "openai/gsm8k"))[0][1]
    assert r"\boxed{}" in content(Problem(0, "6*7?", "42", "math"))[0][1]
    asked = Problem(0, r"6*7? Use \boxed{}.", "42", "math", system="Own.")
    assert content(asked, system="S") == [("system", "Own."), ("user", asked.question)]


def test_problems_are_spread_evenly():
    rows = list(range(8))
    assert (
        subsample(rows, 4) == [0, 2, 4, 6]
        and subsample(rows, 3) == [0, 2, 5]
        and subsample(rows, 100) == rows
    )
    assert subsample(rows, 0) == [] == subsample([], 5)
    assert subsample(list(range(800)), 500)[-1] == 798, "the end of the file is met too"

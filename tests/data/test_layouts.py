"""Rows as public sets lay them out, in our own words, and rows that are none."""

import json
from collections import Counter

import pytest

from thinkrl import UserError
from thinkrl.data.layouts import GPQA_OPTIONS
from thinkrl.data.problems import load_problems, messages
from thinkrl.grading import grade
from thinkrl.types import Problem


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


def test_an_explicit_source_overrides_the_row_s_own(tmp_path):
    path = write(
        tmp_path / "d.jsonl",
        {"problem": "1+1?", "answer": "2"},
        {"problem": "1+2?", "answer": "3", "source": "math"},
        VERL,
        {"problem": "1+3?", "answer": "4", "source": "a site of riddles"},
    )
    assert [p.source for p in load_problems(path, "arith")] == ["arith"] * 4
    worked = write(tmp_path / "w.jsonl", {"question": "2+2?", "answer": "2+2=4\n#### 4"})
    assert load_problems(worked, "math")[0].answer == "4", "GSM8K's answers under another rule"
    with pytest.raises(UserError, match="d.jsonl:4: field 'source': no grading rule .*; --source RULE"):
        load_problems(path)
    with pytest.raises(
        UserError, match="d.jsonl:1: field 'source': no grading rule for data source 'riddles'"
    ):
        load_problems(path, "riddles")


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
        ({"answer": "2"}, r"d.jsonl:2: field 'problem' \(or question, prompt\) is missing"),
        ({"problem": "1+1?"}, "d.jsonl:2: field 'answer' is missing"),
        ({"problem": "1+1?", "solution": "two"}, "d.jsonl:2: field 'answer' is missing"),
        ({"problem": {"q": "1+1?"}, "answer": "2"}, "d.jsonl:2: field 'problem' must be text, not dict"),
        (
            {"problem": "1+1?", "answer": "proof"},
            "d.jsonl:2: field 'answer' is 'proof': the problem has no answer",
        ),
        ({"problem": "1+1?", "answer": "notfound", "solution": r"\boxed{2}"}, "field 'answer' is 'notfound'"),
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
            CHOICE | {"options": ["2"]},
            "d.jsonl:2: field 'options' must be a list of 2 to 26 texts, none of them empty",
        ),
        (
            CHOICE | {"options": ["2", "3", "4"], "answer": 2},
            "2 is one option's text and another's letter or place",
        ),
        (
            CHOICE | {"options": ["B", "A"], "answer": "A"},
            "'A' is one option's text and another's letter or place",
        ),
        (CHOICE | {"answer": "E"}, "d.jsonl:2: field 'answer' must be one of the options"),
        (
            CHOICE | {"answer": 4, "options": ["two", "three"]},
            "d.jsonl:2: field 'answer' must be one of the options",
        ),
        (CHOICE | {"answer": True}, "d.jsonl:2: field 'answer' must be text, not bool"),
        (CHOICE | {"options": "2, 3"}, "d.jsonl:2: field 'options'"),
        (CHOICE | {"options": ["2", "3", " "]}, "d.jsonl:2: field 'options'"),
        (CHOICE | {"options": ["2", 3]}, "d.jsonl:2: field 'options'"),
        (
            GPQA | {"Incorrect Answer 2": ""},
            "d.jsonl:2: fields .*'Incorrect Answer 2'.* must be texts, none of them empty",
        ),
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
        (VERL | {"prompt": {"role": "user"}}, "d.jsonl:2: field 'prompt' must be text, not dict"),
        (
            VERL | {"reward_model": {"ground_truth": '["1", "2"]'}},
            "field 'reward_model.ground_truth' has different answers",
        ),
        (VERL | {"reward_model": {"ground_truth": '["1", 2]'}}, "must be a text, or a JSON list of texts"),
        (VERL | {"data_source": "train-code-x"}, "d.jsonl:2: field 'source': no grading rule.*--source RULE"),
        (VERL | {"prompt": [*VERL["prompt"], *VERL["prompt"]]}, "field 'prompt' must be a list of messages"),
        (VERL | {"prompt": [{"role": "user"}]}, "d.jsonl:2: field 'prompt' must be a list of messages"),
        (VERL | {"prompt": []}, r"d.jsonl:2: field 'problem' \(or question, prompt\) is missing"),
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


def user(text, **others):
    return [
        {"role": "user", "content": text},
        *({"role": role, "content": says} for role, says in others.items()),
    ]


DAPO = (
    "Solve the following math problem step by step. The last line of your response should be of the form "
    "Answer: $Answer (without quotes) where $Answer is the answer to the problem.\n\nHow many\n\nsides has a "
    "cube's face?\n\nRemember to put "
    'your answer on its own line after "Answer:".'
)
BOX = r"One and one. \boxed{2}"
PUBLIC = {
    "OpenR1-Math": (
        {
            **{
                "problem": "1+1?",
                "solution": "Count.",
                "answer": "2",
                "problem_type": "Number Theory",
                "source": "cn_contest",
            },
            **{
                "question_type": "math-word-problem",
                "uuid": "x",
                "generations": ["<think>So 3.</think> 3"],
                "is_reasoning_complete": [True],
            },
            **{
                "correctness_math_verify": [False],
                "correctness_llama": None,
                "messages": user("1+1?", assistant="3"),
            },
        },
        ("1+1?", "2", "math", "Count."),
    ),
    "NuminaMath-CoT": (
        {
            "source": "synthetic_amc",
            "problem": "1+1?",
            "solution": BOX,
            "messages": user("1+1?", assistant=BOX),
        },
        ("1+1?", "2", "math", BOX),
    ),
    "Big-Math": (
        {
            "problem": "1+1?",
            "answer": "2",
            "source": "orca_math",
            "domain": ["Mathematics -> Algebra"],
            "llama8b_solve_rate": 0.5,
        },
        ("1+1?", "2", "math", "2"),
    ),
    "Big-Math, of GSM8K": (
        {"problem": "1+1?", "answer": "2", "source": "gsm8k"},
        ("1+1?", "2", "gsm8k", "2"),
    ),
    "Skywork-OR1": (
        {
            **{
                "data_source": "train-math-numinamath1.5_olympiads",
                "ability": "math",
                "prompt": user("Halve 1."),
            },
            **{"reward_model": {"style": "rule", "ground_truth": r'["\\frac{1}{2}", "0.5"]'}},
            **{"extra_info": {"index": 7, "model_difficulty": {"DeepSeek-R1-Distill-Qwen-7B": 3}}},
        },
        ("Halve 1.", r"\frac{1}{2}", "math", r'["\\frac{1}{2}", "0.5"]'),
    ),
    "DAPO-Math-17k": (
        {
            **{
                "data_source": "math_dapo",
                "prompt": user(DAPO),
                "ability": "MATH",
                "extra_info": {"index": "x"},
            },
            **{"reward_model": {"style": "rule-lighteval/MATH_v2", "ground_truth": "4"}},
        },
        ("How many\n\nsides has a cube's face?", "4", "math_dapo", "4"),
    ),
    "DAPO-Math-17k-Processed": (
        {
            **{
                "prompt": "1+1?",
                "solution": "2",
                "data_source": "math_dapo",
                "source_prompt": user(DAPO),
                "ability": "MATH",
            },
            **{
                "reward_model": {"style": "rule-lighteval/MATH_v2", "ground_truth": "2"},
                "extra_info": {"index": "x"},
            },
        },
        ("1+1?", "2", "math_dapo", "2"),
    ),
    "DeepScaleR": ({"problem": "1+1?", "answer": "2", "solution": ""}, ("1+1?", "2", "math", "2")),
    "MATH-lighteval": (
        {"problem": "1+1?", "level": "Level 1", "type": "Prealgebra", "solution": BOX},
        ("1+1?", "2", "math", BOX),
    ),
    "OlympiadBench": (
        {
            **{
                "id": 1,
                "subfield": "Number Theory",
                "context": None,
                "question": "Roots?",
                "solution": ["Try.", "Or guess."],
            },
            **{
                "final_answer": ["$4$,$8$"],
                "is_multiple_answer": True,
                "unit": None,
                "answer_type": "Numerical",
                "error": None,
            },
        },
        ("Roots?", "$4$,$8$", "math", "Try."),
    ),
    "OlympiadBench with context": (
        {
            "context": "Let x be 1.",
            "question": "And 2x? And 3x?",
            "solution": ["Add."],
            "final_answer": ["2", "3"],
        },
        ("Let x be 1.\nAnd 2x? And 3x?", "2, 3", "math", "Add."),
    ),
    "SVAMP": (
        {
            "ID": "chal-1",
            "Body": "One cat sat.",
            "Question": "Another came. How many?",
            "Equation": "( 1 + 1 )",
            "Answer": 2.0,
        }
        | {"Type": "Addition", "question_concat": "One cat sat. Another came. How many?"},
        ("One cat sat. Another came. How many?", "2.0", "math", "2.0"),
    ),
    "ASDiv": (
        {
            "body": "One cat sat.",
            "question": "How many sat?",
            "solution_type": "Addition",
            "answer": "1 (cat)",
            "formula": "1=1",
        },
        ("One cat sat. How many sat?", "1", "math", "1"),
    ),
    "ASDiv with two answers": (
        {
            "body": "One cat, two dogs.",
            "question": "How many?",
            "answer": "1 (cat); 2 (dogs)",
            "formula": "1=1",
        },
        ("One cat, two dogs. How many?", "1, 2", "math", "1, 2"),
    ),
    "AIME_2024": (
        {"ID": "2024-I-1", "Problem": "1+1?", "Solution": "Count.", "Answer": 2},
        ("1+1?", "2", "math", "Count."),
    ),
    "AIME_1983_2024": (
        {"ID": "1983-1", "Year": 1983, "Problem Number": 1, "Question": "1+1?", "Answer": "2", "Part": None},
        ("1+1?", "2", "math", "2"),
    ),
    "DeepMath": (
        {
            "question": "1+1?",
            "final_answer": "2",
            "difficulty": 3.0,
            "topic": "Algebra -> Sums",
            "r1_solution_1": "So2.",
        },
        ("1+1?", "2", "math", "2"),
    ),
    "TRL's prompt": ({"prompt": user("1+1?"), "answer": "2"}, ("1+1?", "2", "math", "2")),
    "TRL's prompt, a text": ({"prompt": "1+1?", "solution": BOX}, ("1+1?", "2", "math", BOX)),
    "TRL's DeepMath": ({"prompt": user("1+1?"), "solution": "$2$"}, ("1+1?", "2", "math", "$2$")),
    "TRL's DeepMath, a word": (
        {"prompt": user("Is 2 even?"), "solution": "Yes"},
        ("Is 2 even?", "Yes", "math", "Yes"),
    ),
    "TRL's messages": ({"messages": user("1+1?", assistant=BOX)}, ("1+1?", "2", "math", BOX)),
    "RLVR": ({"messages": user("1+1?"), "ground_truth": "2", "dataset": "MATH"}, ("1+1?", "2", "math", "2")),
}


@pytest.mark.parametrize("name", PUBLIC)
def test_public_layouts(tmp_path, name, capsys):
    row, expected = PUBLIC[name]
    [read] = load_problems(write(tmp_path / "d.jsonl", row))
    assert (read.question, read.answer, read.source, read.solution) == expected
    assert read.system == "" and capsys.readouterr().err == "", "no column with words is left"


def test_public_layouts_in_parquet(tmp_path):
    """What parquet gives for them: the same, nulls and nested lists included."""
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    for row, expected in PUBLIC.values():
        parquet.write_table(pyarrow.Table.from_pylist([row]), tmp_path / "d.parquet")
        [read] = load_problems(str(tmp_path / "d.parquet"))
        assert (read.question, read.answer, read.source, read.solution) == expected


def test_dapo_rows_ask_for_one_form(tmp_path):
    [read] = load_problems(write(tmp_path / "d.jsonl", PUBLIC["DAPO-Math-17k"][0]))
    [asked] = messages(read)
    assert asked["content"].count("boxed") == 1 and "Answer:" not in asked["content"]
    [read] = load_problems(write(tmp_path / "d.jsonl", PUBLIC["DAPO-Math-17k"][0]), verbatim=True)
    assert messages(read) == user(DAPO), "as published, for a reward that wants that line"


MMLU = {"question": "1+1?", "subject": "elementary_mathematics", "choices": ["1", "2", "3", "4"], "answer": 1}
MMLU_PRO = {
    **{"question_id": 7, "question": "1+1?", "options": list("1023456789"), "answer": "C", "answer_index": 2},
    **{"cot_content": "", "category": "math", "src": "ori_mmlu-elementary"},
}
AQUA = {
    "question": "1+1?",
    "options": ["A)1", "B)2", "C)3", "D)4", "E)5"],
    "rationale": "Count to two.",
    "correct": "B",
}


@pytest.mark.parametrize(
    "row",
    [
        MMLU,
        MMLU | {"answer": "B"},
        MMLU | {"answer": "(B)"},
        MMLU_PRO,
        {k: v for k, v in MMLU_PRO.items() if k != "answer_index"},
        AQUA,
        {"problem": "1+1?", "options": ["one", "two"], "answer": "two"},
        {"problem": "1+1?", "options": ["one", "two"], "answer": 1},
        {"problem": "1+1?", "options": ["B", "A"], "answer": "A", "answer_index": 1},
    ],
)
def test_the_right_option_by_text_letter_or_place(tmp_path, row):
    [read] = load_problems(write(tmp_path / "d.jsonl", row))
    lettered = dict(line[1:].split(") ") for line in read.question.splitlines()[1:-1])
    assert lettered[read.answer] in ("2", "two", "A") and read.question.startswith("1+1?\n(A) ")
    assert len(lettered) == len(row.get("options") or row["choices"]) and read.solution == read.answer
    assert "place" not in read.question and grade(rf"\boxed{{{read.answer}}}", read.answer, read.source)
    [kept] = load_problems(write(tmp_path / "d.jsonl", row), shuffle=False)
    options = [line[4:] for line in kept.question.splitlines()[1:-1]]
    assert options == [
        text.removeprefix(f"{c})") for c, text in zip("ABCDE" * 2, row.get("options") or row["choices"])
    ]
    assert options["ABCDEFGHIJ".index(kept.answer)] == lettered[read.answer]


def test_a_wrong_option_may_come_twice(tmp_path):
    """As in the paper's GPQA file at rows 90 and 127; the right one may not."""
    path = tmp_path / "d.jsonl"
    for row in (
        GPQA | {"Incorrect Answer 3": "worse"},
        CHOICE | {"options": ["2", "3", "3"]},
        LISTED | {"problem": LISTED["problem"].replace("four", "f(3)").replace("five", "f(3)")},
    ):
        [read] = load_problems(write(path, row))
        assert "(B) " in read.question
    for row in (
        GPQA | {"Incorrect Answer 3": "right "},
        CHOICE | {"options": ["2", "3", "2"]},
        LISTED | {"problem": LISTED["problem"].replace("f(3)", "two, or so")},
    ):
        with pytest.raises(UserError, match="d.jsonl:1: the right option, .*, is among the options twice"):
            load_problems(write(path, row))


def test_gpqa_s_csv(tmp_path):
    """The official file has many more columns, and texts of several lines."""
    import csv

    path = tmp_path / "gpqa_diamond.csv"
    row = {
        "Pre-Revision Question": "Two?",
        **GPQA,
        "Question": "One\nand one?",
        "Explanation": "Count,\nthen add.",
        "Record ID": "r",
    }
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(row))
        writer.writeheader()
        writer.writerow(row)
    [read] = load_problems(str(path))
    assert read.question.startswith("One\nand one?\n(A) ") and f"({read.answer}) right" in read.question


def test_the_row_is_kept_for_those_who_want_it(tmp_path):
    path = write(tmp_path / "d.jsonl", AQUA)
    assert load_problems(path)[0].row is None
    assert load_problems(path, keep_row=True)[0].row == AQUA

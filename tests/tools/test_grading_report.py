"""What is done to gold answers, and what is counted."""

import json

import pytest

from thinkrl import UserError
from thinkrl.grading import grade
from thinkrl.tools import grading_report
from thinkrl.tools.grading_report import CHANGES, SPELLINGS, changes, others, parse, report, spellings


def answers(cases):
    return {text.split(r"\boxed")[1].removesuffix("$.") for _, _, text in cases}


def test_a_gold_answer_is_spelled_in_the_ways_that_fit_it():
    assert answers(spellings(r"-\frac{1}{4}")) >= {
        r"{-\dfrac{1}{4}}", "{-1/4}", r"{\frac{-1}{4}}", "{-0.25}", r"{x = -\frac{1}{4}}", r"{−\frac{1}{4}}"
    }  # fmt: skip
    assert answers(spellings("1234")) >= {"{1,234}", r"{1\,234}", "{1234.0}", r"{\$1234}", " 1234"}
    assert answers(spellings("[0,3)")) >= {r"{0 \le x < 3}", r"{\left[ 0,3 \right)}", "{[0, 3)}"}
    assert not answers(spellings("1,234")) & {r"{\{1,234\}}", "{234, 1}"}, "it may be a number"


def test_a_change_is_another_answer():
    assert answers(changes("(1,2)")) == {"{(2,2)}", "{(1,3)}", "{(2,1)}", "{[1,2)}"}
    assert answers(changes("12")) == {"{13}", "{-12}", "{1 2}"}
    assert answers(changes("52_8")) == {"{-52_8}", "{53_8}", "{52_9}", "{52}"}
    assert not answers(changes("(2,2)")) & {"{(2,2)}"}


def test_rows_with_the_same_digits_may_be_the_same_answer():
    pairs = {(gold, text.split("{")[1][:-3]) for gold, _, text in others(["1,2", "3", "2, 1"])}
    assert pairs == {("1,2", "3"), ("3", "1,2"), ("3", "2, 1"), ("2, 1", "3")}


@pytest.mark.parametrize("table", [SPELLINGS, CHANGES], ids=["spellings", "changes"])
def test_each_rule_of_a_table_fits_something(table):
    golds = (
        ["7", "1234", "2.50", r"-\frac{1}{4}", r"\frac{1}{3}", r"2\sqrt{3}", r"6 \text{ cm}", r"90^\circ", "x=5", "2k + 3"]
        + [r"[0, 1)", r"(5,\infty)", r"(-\infty, 3]", "(1, 2)", "(1,2,3)", r"(1,2)\cup(3,4)", "3, 5", "1,2,3", "2 - 3x"]
        + [r"\begin{pmatrix} 1/2 & 3 \\ 4 & 5 \end{pmatrix}", r"\text{(C)}", r"\text{east}", "52_8", "3R^2", r"\pi"]
        + ["10,\\!080", "C"]
    )  # fmt: skip
    found = {done for gold in golds for _, done, _ in grading_report.rewritten(gold, table)}
    assert found == {name for name, *_ in table}


def test_wrong_verdicts_are_counted_and_shown(tmp_path, monkeypatch):
    rows = [{"problem": "?", "answer": "12", "solution": r"\boxed{13}"}, {"problem": "?", "answer": "7"}]
    path = tmp_path / "golds.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    graders = {"thinkrl": lambda text, gold: grade(text, gold, "math"), "lenient": lambda text, gold: True}
    monkeypatch.setattr(grading_report, "graders", lambda: graders)
    head, strict, lenient, shown = report(path, show=1).splitlines()
    counts = [len([*f("12"), *f("7")]) for f in (spellings, changes)]
    assert head == (
        "golds.jsonl: 2 rows, 2 different gold answers; wrong of "
        f"{counts[0]} spellings, {counts[1]} changes, 2 other rows, 1 solutions"
    )
    assert strict.split()[:5] == ["thinkrl", "0", "0", "0", "1"]
    assert lenient.split()[:5] == ["lenient", "0", str(counts[1]), "2", "0"]
    assert shown.strip() == r"solutions, a solution: '\\boxed{13}' for '12'"


def test_files_must_be_named():
    with pytest.raises(UserError, match="which files"):
        parse([])

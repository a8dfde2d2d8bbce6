"""Which answer a completion gives, and whether it is right; then text from people who wish us ill."""

import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from thinkrl import UserError
from thinkrl.grading import algebra, canonical, check_gold, equal, extract, grade, rule_set, rules


@pytest.mark.parametrize(
    "completion, gold, source, right",
    [
        (r"\boxed{42}", "42", "math", True),
        (r"\boxed{42}", "42", "gsm8k", True),
        ("#### 42.", "42", "gsm8k", True),
        ("#### 42.0", "42", "gsm8k", True),
        (r"\boxed{0.25}", r"\frac14", "math", True),
        (r"\boxed{\dfrac{3}{4}}", r"\frac{3}{4}", "math", True),
        (r"\boxed{2\sqrt3}", r"\sqrt{12}", "math", algebra.has_algebra()),
        (r"\boxed{50\%}", "50", "math", True),
        (r"\boxed{1} no, \boxed{2}", "2", "math", True),
        ("the answer is 42", "42", "math", False),
        ("the answer is 42", "42", "gsm8k", False),
        (r"\boxed{7}" + " and so on" * 40, "7", "math", True),
    ],
)
def test_the_ten_cases_of_the_docs(completion, gold, source, right):
    assert grade(completion, gold, source) is right


@pytest.mark.parametrize(
    "completion, gold, right",
    [
        (r"\boxed{18}", "18", True),
        (r"\boxed{\$18.00}", "18", True),
        (r"\boxed{18 \text{ dollars}}", "18", True),
        (r"\boxed{x = \frac{3}{4}}", "0.75", True),
        (r"\boxed{\sqrt{324}}", "18", False),
        (r"\boxed{7} #### 18", "18", True),
        (r"#### 18 \boxed{7}", "18", True),
        ("#### **18**", "18", True),
        ("#### x = 18", "18", True),
        ("#### The final answer is: $18", "18", True),
        (r"#### \boxed{18}", "18", True),
        ("#### Step 1: add.\n#### Step 2: done.\n\\boxed{18}", "18", True),
        ("#### Step 1: add.\n#### She earns $18", "18", True),
        ("#### 18\n#### Check", "18", True),
        ("####18", "18", True),
        ("##### 18", "18", True),
        ("The answer is 18.", "18", False),
    ],
)
def test_gsm8k_takes_a_number_behind_hashes_and_else_a_box(completion, gold, right):
    assert grade(completion, gold, "gsm8k") is right


@pytest.mark.parametrize(
    "text, answer, number",
    [
        ("so 3 + 4 = 7", "7", 7),
        ("She earns $1,234.50 a day.", "1,234.50", 1234.5),
        ("between 3 and -4", "-4", -4),
        ("8-3", "3", 3),
        ("temperature: −5°", "-5", -5),
        ("the odds are 3/4.", "3/4", 0.75),
        (r"$\frac{3}{4}$", r"\frac{3}{4}", 0.75),
        (r"\boxed{18}.", "18", 18),
        ("#### 18", "18", 18),
        ("1.5e3", "1.5e3", 1500),
        ("no number", None, None),
        ("", None, None),
    ],
)
def test_the_last_number(text, answer, number):
    assert extract(text, "last_number") == answer
    assert answer is None or canonical(answer, "last_number") == number


@pytest.mark.parametrize(
    "text, source, answer",
    [
        ("<think>6*7</think><answer>42</answer>", "arith", "42"),
        ("<answer>1</answer> wait <answer> 2 </answer>", "arith", "2"),
        ("<answer>1</answer> wait <answer>2", "arith", "1"),
        ("<answer>1", "arith", None),
        ("1</answer>", "arith", None),
        ("", "arith", None),
        ("so 6 * 7\n#### 42", "gsm8k", "42"),
        ("#### 1\n#### 2", "gsm8k", "2"),
        ("#### $1,234.50 dollars", "gsm8k", "1,234.50"),
        (r"#### \$18", "gsm8k", "18"),
        ("#### -$5", "gsm8k", "-5"),
        ("#### 3/4 of it", "gsm8k", "3/4"),
        ("#### −5", "gsm8k", "-5"),
        ("<answer>−5</answer>", "arith", "-5"),
        ("####\n42", "gsm8k", None),
        ("#### none", "gsm8k", None),
        ("42", "gsm8k", None),
        (r"\boxed{\frac{1}{2}}", "math", r"\frac{1}{2}"),
        (r"\boxed {x}", "math", "x"),
        (r"\boxed{\{1, 2\}}", "math", r"\{1, 2\}"),
        (r"\boxed{\boxed{5}}", "math", "5"),
        (r"\boxed{1} then \boxed{2", "math", "1"),
        (r"} \boxed{1} {", "math", "1"),
        (r"\boxed{", "math", None),
        (r"boxed{1}", "math", None),
        (r"$\boxed 2$.", "math", "2"),
        (r"so \boxed 92.", "math", "92."),
        (r"\boxed{1}, or rather \boxed x", "math", "x"),
        (r"\fbox9", "math", "9"),
        (r"\boxed2{3}", "math", "2"),
        (r"\boxed{\boxed 5}", "math", "5"),
        (r"\boxed ", "math", None),
        (r"\boxedx", "math", None),
    ],
)
def test_extract(text, source, answer):
    assert extract(text, source) == answer


def test_sources():
    assert [rule_set(s) for s in ("arith", "openai/gsm8k", "lighteval/MATH", "HuggingFaceH4/MATH-500")] == [
        "arith", "gsm8k", "math", "math"
    ]  # fmt: skip
    assert rule_set("aime_2024") == rule_set("AIME25") == "math"
    with pytest.raises(UserError, match="nearest: 'gsm8k'"):
        grade("#### 1", "1", "gms8k")


@pytest.mark.parametrize(
    "gold, source, message",
    [
        ("forty-two", "gsm8k", "not a number"),
        ("", "arith", "not a number"),
        ("1/0", "arith", "not a number"),
        ("", "math", "not an answer"),
        (" $ $ ", "math", "not an answer"),
        (r"\frac{1}{2", "math", "unpaired '{'"),
        ("x}", "math", "unpaired '}'"),
        ("1" * 501, "math", "501 characters"),
    ],
)
def test_gold_that_nothing_could_equal(gold, source, message):
    with pytest.raises(ValueError, match=message):
        check_gold(gold, source)


@pytest.mark.parametrize(
    "gold, source", [("42", "arith"), ("1,234", "gsm8k"), (r"\{1, 2\}", "math"), ("x < 3", "math")]
)
def test_gold_that_is_fine(gold, source):
    check_gold(gold, source)
    assert equal(gold, gold, source)


HOSTILE = {
    "boxes left open": r"\boxed{" * 14_000,
    "boxes in boxes": r"\boxed{" * 12_000 + "}" * 12_000,
    "braces": "{" * 50_000 + "}" * 50_000,
    "boxed braces": r"\boxed{" + "{" * 50_000 + "}" * 50_001,
    "digits": r"\boxed{" + "9" * 99_000 + "} #### " + "9" * 99_000 + "<answer>" + "9" * 99_000 + "</answer>",
    "commas": "#### " + "1," * 50_000 + r"\boxed{" + "1," * 50_000 + "}",
    "spaces": "####" + " " * 100_000 + r"\boxed" + " " * 100_000,
    "hashes": "#" * 100_000,
    "tags": "<answer>" * 12_000,
    "backslashes": "\\" * 100_001,
    "nested in a short answer": r"\boxed{" + "(" * 240 + ")" * 240 + "}",
    "fractions in a short answer": r"\boxed{" + r"\frac{" * 70 + "1" + "}" * 70 + "}",
    "spaces in a short answer": r"\boxed{x" + " " * 480 + "y} #### x" + " " * 480,
    "points in a short answer": r"\boxed{" + ". , " * 120 + "x}",
    "words in a short answer": r"\boxed{" + "1 cm " * 95 + "}",
    "commands that appear as others go": r"\boxed{" + r"\lef" * 80 + "t" * 80 + "}",
    "signs in a short answer": r"\boxed{" + r"\pm x," * 80 + "}",
    "rows in a short answer": r"\boxed{"
    + r"\begin{pmatrix}" * 20
    + r"1&2\\" * 20
    + r"\end{pmatrix}" * 3
    + "}",
    "elements in a short answer": r"\boxed{" + ",".join(f"x^{i}" for i in range(90)) + "}",
    "letters in a short answer": r"\boxed{" + "(A) " * 120 + "}",
    "numbers": "1,000/2e3-" * 10_000 + "x",
    "headlines": "#### Step 1\n" * 5_000 + "#### answer is",
    "boxes without braces": r"\boxed x" * 12_000 + " " * 10_000,
    "towers": "#### 1e999999999 <answer>1e999999999</answer>" + r"\boxed{10^{999999999}}",
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_text_takes_linear_time(name, monkeypatch):
    monkeypatch.setattr(algebra, "has_algebra", lambda: False)  # has a time limit and tests of its own
    start = time.process_time()  # of this process alone: other load does not count
    for source in rules.RULES:
        assert not grade(HOSTILE[name], "42", source)
    assert not grade(HOSTILE[name], ",".join(f"y^{i}" for i in range(90)), "math")
    assert time.process_time() - start < 10  # all take under 1 s; quadratic ones would take minutes


@settings(max_examples=300)
@given(st.text(max_size=200), st.sampled_from(rules.RULES))
def test_no_text_makes_grading_raise(text, source):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(algebra, "has_algebra", lambda: False)
        for completion in (text, rf"\boxed{{{text}}}", f"#### {text}", f"<answer>{text}</answer>"):
            assert grade(completion, "42", source) in (True, False)
        value = canonical(text, source)
        assert value is None or hash(value) == hash(canonical(text, source))

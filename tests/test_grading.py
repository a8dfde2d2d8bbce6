"""What counts as right, case by case; then text from people who wish us ill."""

import signal
import time
from fractions import Fraction

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from thinkrl import UserError, grading
from thinkrl.grading import canonical, check_gold, equal, extract, grade, normalise, rational, rule_set


@pytest.mark.parametrize(
    "completion, gold, source, right",
    [
        (r"\boxed{42}", "42", "math", True),
        (r"\boxed{42}", "42", "gsm8k", False),
        ("#### 42.", "42", "gsm8k", True),
        ("#### 42.0", "42", "gsm8k", True),
        (r"\boxed{0.25}", r"\frac14", "math", True),
        (r"\boxed{\dfrac{3}{4}}", r"\frac{3}{4}", "math", True),
        (r"\boxed{2\sqrt3}", r"\sqrt{12}", "math", True),
        (r"\boxed{50\%}", "50", "math", True),
        (r"\boxed{1} no, \boxed{2}", "2", "math", True),
        ("the answer is 42", "42", "math", False),
        ("the answer is 42", "42", "gsm8k", False),
        (r"\boxed{7}" + " and so on" * 40, "7", "math", True),
    ],
)
def test_the_ten_cases_of_the_docstring(completion, gold, source, right):
    assert grade(completion, gold, source) is right


def test_without_the_extra_only_the_symbolic_case_changes(monkeypatch):
    monkeypatch.setattr(grading, "has_algebra", lambda: False)
    grading._symbolically_equal.cache_clear()
    assert not grade(r"\boxed{2\sqrt3}", r"\sqrt{12}", "math")
    assert grade(r"\boxed{0.25}", r"\frac14", "math") and grade(r"\boxed{2\sqrt3}", r"2 \sqrt{3}", "math")
    grading._symbolically_equal.cache_clear()


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
    ],
)
def test_extract(text, source, answer):
    assert extract(text, source) == answer


@pytest.mark.parametrize(
    "text, number",
    [
        ("-7", -7),
        ("007", 7),
        ("1,234,567.5", Fraction("1234567.5")),
        (".5", Fraction(1, 2)),
        ("3/4", Fraction(3, 4)),
        ("3 / -4", Fraction(-3, 4)),
        (r"-\frac{1}{3}", Fraction(-1, 3)),
        (r"2\frac{1}{3}", Fraction(7, 3)),
        (r"-2\frac{1}{3}", Fraction(-7, 3)),
        ("1.5e3", 1500),
        ("3*10^{-2}", Fraction(3, 100)),
        ("1/0", None),
        ("1,23", None),
        ("1e9999", None),
        ("12 34", None),
        ("", None),
        ("inf", None),
        ("٣", 3),
    ],
)
def test_rational(text, number):
    assert rational(text) == number


SAME = [
    (r"\tfrac12", "0.5"),
    (r"\frac{10}{4}", "2.5"),
    (r"1\frac{1}{2}", "3/2"),
    ("1 1/2", "1.5"),
    ("1,000", "1000"),
    (r"1{,}000", r"10^3 ".replace("10^3", "1\\,000")),
    (r"1,\!000,\!000", "1000000"),
    (r"3 \times 10^{5}", "300000"),
    (r"5\text{ cm}^2", "5"),
    (r"18.90\text{ dollars}", r"\$18.9"),
    ("12 square inches", "12"),
    (r"336^\circ", "336"),
    (r"90^{\circ}", "90 degrees"),
    (r"25\%", "25"),
    (r"\text{East}", "east"),
    (r"\textbf{(C)}", "C"),
    ("x = 5", "5"),
    (r"x \in [1, 2)", "[1,2)"),
    ("f(x) = x^2", "x^{2}"),
    (r"\left( 3, \frac{\pi}{2} \right)", r"(3,\frac{\pi}{2})"),
    ("(1, 2)", "(1.0, 4/2)"),
    ("3, 5", r"5 \text{ and } 3"),
    ("x=1, x=2", "1 or 2"),
    (r"\{1, 2, 3\}", "3,2,1"),
    (r"\lbrace 1, 2 \rbrace", r"\{2, 1\}"),
    ("x < 5", "5 > x"),
    (r"1 \le x < 3", r"3 > x \geq 1"),
    (r"x \leqslant 2", "x ≤ 2"),
    (r"(-\infty, 1) \cup (2, +\infty)", "(2, ∞) ∪ (-∞, 1)"),
    (r"\sqrt2", r"\sqrt{2}"),
    ("−3", "-3"),
    ("$7$", "7"),
    (r"\( 7 \)", "7."),
    (r"2 \cdot 3", r"2 \times 3"),
    (r"1011_2", r"1011_{2}"),
]
DIFFERENT = [
    (r"50\%", "0.5"),
    (r"\frac{1}{3}", "0.333333"),
    ("(1, 2)", "(2, 1)"),
    ("(1, 2)", "[1, 2]"),
    ("(1, 2]", "(1, 2)"),
    ("(1,000)", "1000"),
    ("x < 5", "x > 5"),
    ("x < 5", r"x \leq 5"),
    ("1, 2", "1, 2, 2"),
    (r"\text{east}", r"\text{seat}"),
    ("12", "1 2 3"),
    ("10:30 p.m.", "10:30 a.m."),
    (r"10:30\text{ p.m.}", r"10:30\text{ a.m.}"),
    ("5x", "5"),
    ("1.7320508", r"\sqrt{3}"),
    ("", "0"),
]


@pytest.mark.parametrize("a, b", SAME)
def test_same_without_algebra(a, b, monkeypatch):
    monkeypatch.setattr(grading, "_symbolically_equal", lambda *_: False)
    assert equal(a, b, "math") and equal(b, a, "math")
    assert hash(canonical(a, "math")) == hash(canonical(b, "math"))


@pytest.mark.parametrize("a, b", DIFFERENT)
def test_different(a, b):
    assert not equal(a, b, "math") and not equal(b, a, "math")


@pytest.mark.parametrize(
    "a, b", [("x^2+2x+1", "(x+1)^2"), (r"(\sqrt{12}, 1)", r"(2\sqrt{3}, 1)"), (r"\frac{\pi}{2}", r"0.5\pi")]
)
def test_same_by_algebra(a, b):
    assert canonical(a, "math") != canonical(b, "math")
    assert equal(a, b, "math")


def test_a_comparison_that_never_ends_is_killed_and_the_next_one_works(monkeypatch):
    assert equal(r"\sqrt{8}", r"2\sqrt{2}", "math")
    worker = grading._algebra.process
    monkeypatch.setattr(grading, "TIMEOUT", 0.5)
    assert not equal("9^{9^{9^{9}}}", "8^{8^{8^{8}}}", "math")
    assert worker.returncode == -signal.SIGPROF, "its own processor time ended it, not our wait"
    monkeypatch.undo()
    assert equal(r"\sqrt{18}", r"3\sqrt{2}", "math")


def test_a_worker_that_died_costs_one_answer():
    assert equal(r"\sqrt{20}", r"2\sqrt{5}", "math")
    grading._algebra.process.kill()
    grading._algebra.process.wait()
    assert not equal(r"\sqrt{24}", r"2\sqrt{6}", "math")
    assert equal(r"\sqrt{28}", r"2\sqrt{7}", "math")


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
    "towers": "#### 1e999999999 <answer>1e999999999</answer>" + r"\boxed{10^{999999999}}",
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_text_takes_linear_time(name, monkeypatch):
    monkeypatch.setattr(
        grading, "_symbolically_equal", lambda *_: False
    )  # has a time limit and a test of its own
    start = time.process_time()  # of this process alone: other load does not count
    for source in grading.RULES:
        assert not grade(HOSTILE[name], "42", source)
    assert time.process_time() - start < 10  # all take under 0.1 s; quadratic ones would take minutes


LATEX = st.lists(
    st.sampled_from(
        r"1 0 23 . , ; : + - * / ^ _ = < > ( ) [ ] { } \{ \} x y \frac \dfrac \sqrt \left \right \text{ and cm} \text{cm}"
        r" \cdot \le \leq \in \cup \circ ^\circ % \% $ \! \, \boxed{ e5 1,000 {,} \pi \infty or degrees".split(
            " "
        )
        + [" "]
    ),
    max_size=14,
).map("".join)


@settings(max_examples=300)
@given(LATEX | st.text(max_size=40))
@example(r"100, 200")
@example(r"\pi x")
def test_normal_form_is_a_fixed_point(text):
    assert normalise(normalise(text)) == normalise(text)


@settings(max_examples=300)
@given(LATEX | st.text(max_size=200), st.sampled_from(grading.RULES))
def test_no_text_makes_grading_raise(text, source):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(grading, "_symbolically_equal", lambda *_: False)
        for completion in (text, rf"\boxed{{{text}}}", f"#### {text}", f"<answer>{text}</answer>"):
            assert grade(completion, "42", source) in (True, False)
        value = canonical(text, source)
        assert value is None or hash(value) == hash(canonical(text, source))


@given(st.integers(-(10**9), 10**9), st.integers(1, 10**4))
def test_every_spelling_of_a_rational_is_the_same_number(top, bottom):
    value = Fraction(top, bottom)
    for text in (
        f"{top}/{bottom}",
        rf"\frac{{{top}}}{{{bottom}}}",
        rf"\left( \dfrac{{{top}}}{{{bottom}}} \right)",
    ):
        assert canonical(text, "math") == value
    assert canonical(f"{top:,}", "gsm8k") == canonical(f"{top}.00", "arith") == top

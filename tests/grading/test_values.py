"""What counts as the same answer under the `math` rule, case by case."""

from fractions import Fraction

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from helpers import needs_algebra
from thinkrl.grading import algebra, canonical, equal, rules
from thinkrl.grading.notation import normalise, rational
from thinkrl.grading.values import value

COLUMN = r"\begin{pmatrix} -1/3 \\ 2/3 \\ 5/3 \end{pmatrix}"
SQUARE = r"\begin{pmatrix} 1 & 2 \\ 3 & 4 \end{pmatrix}"


@pytest.fixture
def without_algebra(monkeypatch):
    monkeypatch.setattr(algebra, "has_algebra", lambda: False)
    rules._equal_by_parts.cache_clear()
    yield
    rules._equal_by_parts.cache_clear()


@pytest.mark.parametrize(
    "text, number",
    [
        ("-7", -7),
        ("007", 7),
        ("1,234,567.5", Fraction("1234567.5")),
        (".5", Fraction(1, 2)),
        ("3/4", Fraction(3, 4)),
        ("3 / -4", Fraction(-3, 4)),
        ("-1./3", Fraction(-1, 3)),
        (r"-\frac{1}{3}", Fraction(-1, 3)),
        (r"2\frac{1}{3}", Fraction(7, 3)),
        (r"-2\frac{1}{3}", Fraction(-7, 3)),
        ("1.5e3", 1500),
        ("3*10^{-2}", Fraction(3, 100)),
        ("10^{3}", 1000),
        (r"0.\overline{3}", Fraction(1, 3)),
        (r"-2.1\overline{6}", Fraction(-13, 6)),
        ("1/0", None),
        ("1,23", None),
        ("0,125", None),
        ("1e9999", None),
        ("12 34", None),
        ("", None),
        (".", None),
        ("inf", None),
        ("٣", 3),
    ],
)
def test_rational(text, number):
    assert rational(text) == number


SAME = [
    # numbers
    (r"\tfrac12", "0.5"),
    (r"\frac{10}{4}", "2.5"),
    (r"1\frac{1}{2}", "3/2"),
    ("1 1/2", "1.5"),
    (r"137 \frac{1}{2}", "137.5"),
    (r"\dfrac 3 8", r"\frac{3}{8}"),
    (r"\frac{270}7", "270/7"),
    (r"- \frac 32", r"\frac{-3}{2}"),
    (r"0.\overline3", r"\frac13"),
    (r"3 \times 10^{5}", "300000"),
    (r"4.5 \cdot 10^{33}", "4.5e33"),
    ("10^{33}", "1e33"),
    ("1,000", "1000"),
    (r"1{,}000", r"1\,000"),
    (r"1,\!000,\!000", "1 000 000"),
    (r"11,\! 111,\! 111,\! 100", "11111111100"),
    (r"11,\! 111,\! 111,\! 100", "11,111,111,100"),
    (r"\dfrac{1}{29,\!322,\!216}", "1/29322216"),
    ("−3", "-3"),
    ("½", "0.5"),
    # units, words, and what only shows
    (r"5\text{ cm}^2", "5"),
    (r"15\mbox{ cm}^2", "15 cm^2"),
    (r"18.90\text{ dollars}", r"\$18.9"),
    (r"\$32,\!348", "32348"),
    ("12 square inches", "12"),
    ("12 in.", "12"),
    ("5 km/h", "5"),
    ("5 m/s^2", r"5 \text{ m/s}^2"),
    (r"12\pi cm", r"12\pi"),
    (r"6.5 \mathrm{~m}", "6.5"),
    (r"9\text{ values}.", "9"),
    (r"336^\circ", "336"),
    (r"90^{\circ}", "90 degrees"),
    ("20°C", "20"),
    (r"25\%", "25"),
    (r"2.5 \text{ million dollars}", "2,500,000"),
    ("3 thousand", "3000"),
    (r"\text{East}", "east"),
    (r"\text{two lines}", "two lines"),
    (r"4\!:\!51\!:\!06 \text{ p.m.}", "4:51:06 pm"),
    ("$7$", "7"),
    (r"\( 7 \)", "7."),
    (r"\text{The answer is } 7", "7"),
    (r"\mathbf{2340}", "2340"),
    (r"\quad(2, 3)", "(2,3)"),
    # letters of multiple choice
    (r"\textbf{(C)}", "C"),
    ("**C**", r"\text{C}"),
    ("C)", r"\text{(C)}"),
    # expressions
    (r"\sqrt2", r"\sqrt{2}"),
    ("√12", r"\sqrt{12}"),
    ("2sqrt(3)", r"2\sqrt{3}"),
    ("2*pi", r"2\pi"),
    (r"2 \cdot 3", r"2 \times 3"),
    ("x²", "x**2"),
    (r"\frac\pi 2", r"\frac{\pi}{2}"),
    (r"\frac{\sqrt6}2", r"\frac{\sqrt{6}}{2}"),
    ("x^{2}y", "x^2 y"),
    (r"\\frac{\\pi}{2}", r"\frac{\pi}{2}"),
    (r"1011_2", r"1011_{2}"),
    # names
    ("x = 5", "5"),
    ("2=x", "x=2"),
    (r"x \approx 5.2", "5.2"),
    (r"x = \frac12 = 0.5", "0.5"),
    ("f(x) = x^2", "x^{2}"),
    (r"m_{\max }=n^{2}", "n^2"),
    (r"\angle ABC = 90^\circ", "90"),
    (r"\text{Area} = 5", "5"),
    # tuples, intervals, inequalities
    (r"\left( 3, \frac{\pi}{2} \right)", r"(3,\frac{\pi}{2})"),
    ("(1, 2)", "(1.0, 4/2)"),
    (r"\langle 1, 2\rangle", "(1; 2)"),
    ("(x, y) = (2, 3)", "(2,3)"),
    (r"x \in [1, 2)", "[1,2)"),
    (r"0\le x<1", "[0,1)"),
    ("x>5", r"(5,\infty)"),
    ("x < 5", "5 > x"),
    (r"1 \le x < 3", r"3 > x \geq 1"),
    (r"x \leqslant 2", "x ≤ 2"),
    (r"-80\leq g(x)\leq 82", "[-80, 82]"),
    (r"(-\infty, 1) \cup (2, +\infty)", "(2, ∞) ∪ (-∞, 1)"),
    (r"x < 1 \text{ or } x > 2", r"(-\infty,1)\cup(2,\infty)"),
    (r"x \ne 3", r"(-\infty,3)\cup(3,\infty)"),
    (r"x \in \mathbb R", r"(-\infty,\infty)"),
    (r"\{x \mid x > 5\}", r"(5,\infty)"),
    (r"\{x \in \mathbb{R} : 1 < x \le 2\}", "(1,2]"),
    # sets and lists
    ("3, 5", r"5 \text{ and } 3"),
    (r"6, 8\text{, and }10", "6, 8, 10"),
    (r"5 \quad 6", "5, 6"),
    ("x=1, x=2", "1 or 2"),
    (r"\{1, 2, 3\}", "3,2,1"),
    (r"\lbrace 1, 2 \rbrace", r"\{2, 1\}"),
    (r"\{1,1,2\}", r"\{1,2\}"),
    (r"\{5\}", "5"),
    (r"\emptyset", r"\varnothing"),
    (r"\{ \}", "∅"),
    (r"\pm 3", "3, -3"),
    (r"\{1\pm\sqrt{5},-2\}", r"-2, 1+\sqrt5, 1-\sqrt5"),
    ("27,54,108,135", "27, 54, 108, 135"),
    ("(1,1);(3,2)", "(3,2),(1,1)"),
    # matrices
    (COLUMN, r"\begin{pmatrix}-1/3\\2/3\\5/3\end{pmatrix}"),
    (COLUMN, r"\begin{bmatrix} -\frac13 \\ \frac23 \\ \frac53 \end{bmatrix}"),
    (COLUMN, "\\begin{pmatrix}\n-1/3 \\\\\n2/3 \\\\\n5/3 \\\\\n\\end{pmatrix}"),
    (COLUMN, r"\begin{pmatrix} -1/3 \\[2pt] 2/3 \\[0.5em] 5/3 \end{pmatrix}"),
    (COLUMN, r"\left[\begin{array}{c} -1/3 \\ 2/3 \\ 5/3 \end{array}\right]"),
    (COLUMN, r"\frac13 \begin{pmatrix} -1 \\ 2 \\ 5 \end{pmatrix}"),
    (COLUMN, r"\left(-\frac13, \frac23, \frac53\right)"),
    (SQUARE, r"\left(\begin{matrix}1&2\\\,3&4\end{matrix}\right)"),
    (SQUARE, r"A = \begin{pmatrix} 1 & 2 \\ 3 & \phantom{-}4 \end{pmatrix}"),
]
SAME_BY_PARTS = [  # not by == of canonical values, which could not be transitive
    ("x=2, y=3", "(2,3)"),
    ("y=3, x=2", "(2,3)"),
    ("y=3, x=2", "x=2, y=3"),
    ("x_1 = 2, x_2 = 3", "3, 2"),
    ("x=y", "y=x"),
    ("81,256", "81, 256"),
    ("5 m^2", "5"),
    ("5m", "5"),
    (r"\textbf{(C)}\ 12", "C"),
    (r"\textbf{(C)}\ 12", "12"),
]
DIFFERENT = [
    (r"50\%", "0.5"),
    (r"\frac{1}{3}", "0.333333"),
    ("1 2", "12"),
    ("1 2", "2"),
    (r"2\text{ million}", "2"),
    (r"5 \quad 6", "56"),
    ("12", "1 2 3"),
    ("x^2 3", "x^{23}"),
    (r"11,\! 111,\! 111,\! 100", "11111111101"),
    ("(1,000)", "1000"),
    ("5x", "5"),
    ("5x^2", "5"),
    ("3i", "3"),
    (r"3\mathrm{i}", "3"),
    ("1011", "1011_2"),
    ("11", "1011_2"),
    ("52_8", "52_9"),
    ("x'", "x"),
    ("3R^2", "3r^2"),
    ("1.7320508", r"\sqrt{3}"),
    (r"\ln 2", r"\log 2"),
    (r"\text{east}", r"\text{seat}"),
    ("10:30 p.m.", "10:30 a.m."),
    (r"10:30\text{ p.m.}", r"10:30\text{ a.m.}"),
    ("1:2", "2:1"),
    ("A, B", "A"),
    ("(A), (B)", "A"),
    ("", "0"),
    ("(1, 2)", "(2, 1)"),
    ("(1, 2)", "[1, 2]"),
    ("(1, 2]", "(1, 2)"),
    ("x < 5", "x > 5"),
    ("x < 5", r"x \leq 5"),
    (r"0 < x < 1", "[0,1)"),
    ("1, 2", "1, 2, 2"),
    ("x=3, y=2", "x=2, y=3"),
    ("x=1, y=2, z=3", "x=1, y=3, z=2"),
    ("a=2, b=3", "x=2, y=3"),
    ("x=3, y=2", "(2,3)"),
    ("0", "5x - 7y + 4 = 0"),
    ("x = x+1", "x = x+2"),
    ("1.56 = 56\\%", "0.56 = 56\\%"),
    (COLUMN, r"\begin{pmatrix} 2/3 \\ -1/3 \\ 5/3 \end{pmatrix}"),
    (COLUMN, r"\begin{pmatrix} -1/3 & 2/3 & 5/3 \end{pmatrix}"),
    (SQUARE, r"\begin{pmatrix} 1 & 3 \\ 2 & 4 \end{pmatrix}"),
    (SQUARE, r"\begin{vmatrix} 1 & 2 \\ 3 & 4 \end{vmatrix}"),
    (SQUARE, r"\begin{pmatrix} 1 & 2 \end{pmatrix}"),
]


@pytest.mark.parametrize("a, b", SAME)
def test_same_without_algebra(a, b, without_algebra):
    assert equal(a, b, "math") and equal(b, a, "math")
    assert hash(canonical(a, "math")) == hash(canonical(b, "math"))


@pytest.mark.parametrize("answer, gold", SAME_BY_PARTS)
def test_same_by_parts(answer, gold, without_algebra):
    assert canonical(answer, "math") != canonical(gold, "math")
    assert equal(answer, gold, "math")


def test_a_letter_is_a_unit_only_if_the_gold_answer_shows_it():
    assert equal("5m", "5", "math") and not equal("5", "5m", "math")
    assert not equal("5m", "5n", "math") and not equal("5x", "5", "math")


@pytest.mark.parametrize("a, b", DIFFERENT)
def test_different(a, b):
    assert not equal(a, b, "math") and not equal(b, a, "math")


@needs_algebra
@pytest.mark.parametrize(
    "a, b",
    [
        ("x^2+2x+1", "(x+1)^2"),
        (r"\frac{\pi}{2}", r"0.5\pi"),
        ("e^{i\\pi/2}", "i"),
        (r"\sqrt{-1}", "i"),
        (r"\tan 15^\circ", r"2-\sqrt3"),
        (r"(\sqrt{12}, 1)", r"(2\sqrt{3}, 1)"),
        (r"\sqrt{19}+1, 1-\sqrt{19}", r"1 \pm \sqrt{19}"),
        (r"\sqrt{12} < x \le 4", r"(2\sqrt3, 4]"),
        (r"\begin{pmatrix} \sqrt{12} \\ 1 \end{pmatrix}", r"\begin{pmatrix} 2\sqrt3 \\ 1 \end{pmatrix}"),
        ("-5x + 7y = 4", "5x - 7y + 4 = 0"),
        ("y - 2x = 3", "y = 2x + 3"),
        (r"\lfloor m / 2 \rfloor", r"\left\lfloor\frac{m}{2}\right\rfloor"),
        (r"\sqrt2 - \sqrt2", "0"),
    ],
)
def test_same_by_algebra(a, b):
    assert canonical(a, "math") != canonical(b, "math")
    assert equal(a, b, "math") and equal(b, a, "math")


@pytest.mark.parametrize(
    "a, b",
    [
        ("x^2+2x", "(x+1)^2"),
        (r"\pi 10^{-20}", r"2\pi 10^{-20}"),
        ("5x - 7y + 5 = 0", "5x - 7y + 4 = 0"),
        (r"(\sqrt{12}, 1)", r"(1, 2\sqrt{3})"),
        ("y = 2x + 4", "y = 2x + 3"),
        ("2n", "2m"),
    ],
)
def test_different_by_algebra(a, b):
    assert not equal(a, b, "math") and not equal(b, a, "math")


LATEX = st.lists(
    st.sampled_from(
        r"1 0 23 . , ; : + - * / ^ _ = < > ( ) [ ] { } \{ \} \\ & x y ' \frac \dfrac \sqrt \left \right "
        r"\text{ and cm} \text{cm} m"
        r" \cdot \le \leq \neq \in \cup \pm \circ ^\circ % \% $ \! \, \quad \boxed{ e5 1,000 {,} \pi \infty "
        r"or degrees \overline"
        r" \begin{pmatrix} \end{pmatrix} \phantom ** \mathbb R √ sqrt".split(" ")
        + [" "]
    ),
    max_size=14,
).map("".join)


@settings(max_examples=300)
@given(LATEX | st.text(max_size=40))
@example(r"100, 200")
@example(r"\pi x")
@example("1 2")
def test_normal_form_is_a_fixed_point(text):
    assert normalise(normalise(text)) == normalise(text)


@settings(max_examples=300)
@given(LATEX | st.text(max_size=200))
def test_every_text_has_a_value(text):
    assert hash(value(normalise(text))) == hash(value(normalise(text)))


@given(st.integers(-(10**9), 10**9), st.integers(1, 10**4))
def test_every_spelling_of_a_rational_is_the_same_number(top, bottom):
    exact = Fraction(top, bottom)
    for text in (
        f"{top}/{bottom}",
        rf"\frac{{{top}}}{{{bottom}}}",
        rf"\left( \dfrac{{{top}}}{{{bottom}}} \right)",
    ):
        assert canonical(text, "math") == exact
    assert canonical(f"{top:,}", "gsm8k") == canonical(f"{top}.00", "arith") == top

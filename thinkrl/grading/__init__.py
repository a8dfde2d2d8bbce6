"""Grading of answers: `grade(completion, gold, source)`.

Read in this order:

    rules       where each rule set finds the answer, and when two answers are equal
    notation    a canonical spelling of LaTeX answers
    values      values of answers: numbers, tuples, sets, intervals, … that compare with ==
    algebra     math-verify, where exact comparison does not decide
"""

from thinkrl.grading.notation import rational
from thinkrl.grading.rules import RULES, canonical, check_gold, equal, extract, grade, rule_set

__all__ = ["RULES", "canonical", "check_gold", "equal", "extract", "grade", "rational", "rule_set"]

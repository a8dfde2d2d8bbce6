"""Is the answer right?  `grade(completion, gold, source)`.

Read in this order:

    rules       where each rule set finds the answer, and when two answers are equal
    notation    one spelling for answers in LaTeX
    values      what an answer is: numbers, tuples, sets, intervals, … that compare with ==
    algebra     math-verify, for what exact comparison leaves open
"""

from thinkrl.grading.notation import rational
from thinkrl.grading.rules import RULES, canonical, check_gold, equal, extract, grade, rule_set

__all__ = ["RULES", "canonical", "check_gold", "equal", "extract", "grade", "rational", "rule_set"]

"""What a run that learns nothing is told."""

import pytest

from thinkrl.run.metrics import STUCK, why_stuck

LEARNS = {"advantage_max": 0.5, "answered": 1.0, "accuracy": 0.5, "truncated": 0.0, "unrewarded": 0.0}
STANDS = LEARNS | {"advantage_max": 0.0}


@pytest.mark.parametrize(
    "shares, why",
    [
        ({"answered": 0.0, "accuracy": 0.0}, "the grading rule gsm8k found no answer in any completion"),
        ({"accuracy": 0.0}, "under the grading rule gsm8k every answer was wrong"),
        ({"accuracy": 1.0}, "every answer was right"),
        ({"truncated": 1.0, "answered": 0.0}, "every completion was cut off; raise --max_tokens"),
        ({"unrewarded": 1.0}, "--reward gave no completion a number"),
        ({}, "the rewards of each group were equal"),
    ],
)
def test_the_likely_cause_is_named(shares, why):
    sentence = why_stuck([STANDS | shares] * STUCK, "gsm8k")
    assert sentence.startswith(f"nothing was learned in the last {STUCK} steps") and why in sentence


def test_one_step_that_taught_something_is_enough():
    assert why_stuck([STANDS] * 4 + [LEARNS], "gsm8k") == ""
    assert why_stuck([], "gsm8k") == ""


def test_a_run_that_learns_from_wrong_answers_alone_is_told():
    """As a conversation does, whose format is rewarded, under a rule that finds no answer."""
    rows = [LEARNS | {"accuracy": 0.0, "answered": 0.0}] * STUCK
    sentence = why_stuck(rows, "arith")
    assert sentence.startswith(
        f"no answer was right in the last {STUCK} steps, only other parts of the reward"
    )
    assert "the grading rule arith found no answer" in sentence
    assert why_stuck([*rows[1:], LEARNS], "arith") == ""


def test_a_cause_holds_in_every_step():
    rows = [STANDS | {"answered": 0.0, "accuracy": 0.0}] * 4 + [STANDS | {"answered": 0.25, "accuracy": 0.0}]
    assert "every answer was wrong" in why_stuck(rows, "math")

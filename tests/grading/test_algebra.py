"""The process that does algebra: it ends when it takes too long, and another takes its place."""

import signal

import pytest

from helpers import needs_algebra
from thinkrl.grading import algebra, equal, rules
from thinkrl.grading.values import same


@pytest.fixture(autouse=True)
def nothing_remembered():
    rules._equal_by_parts.cache_clear()


@pytest.mark.slow
@needs_algebra
def test_a_comparison_that_never_ends_is_killed_and_the_next_one_works(monkeypatch):
    assert equal(r"\sqrt{8}", r"2\sqrt{2}", "math")
    process = algebra.worker.process
    monkeypatch.setattr(algebra, "TIMEOUT", 0.5)
    assert not equal("9^{9^{9^{9}}}", "8^{8^{8^{8}}}", "math")
    assert process.returncode == -signal.SIGPROF, "its own processor time ended it, not our wait"
    monkeypatch.undo()
    assert equal(r"\sqrt{18}", r"3\sqrt{2}", "math")


@needs_algebra
def test_a_worker_that_died_costs_one_answer():
    assert equal(r"\sqrt{20}", r"2\sqrt{5}", "math")
    algebra.worker.process.kill()
    algebra.worker.process.wait()
    assert not equal(r"\sqrt{24}", r"2\sqrt{6}", "math")
    assert equal(r"\sqrt{28}", r"2\sqrt{7}", "math")


@needs_algebra
def test_the_parts_of_an_answer_share_one_limit(monkeypatch):
    asked = []

    def slow(a, b, seconds):
        asked.append(seconds)
        return False, 1.25

    monkeypatch.setattr(algebra.worker, "equal", slow)
    many = [("set", *(f"{x}+{i}" for i in range(50))) for x in "ab"]
    assert not same(*many, algebra.Judge())
    assert asked == [3.0, 1.75, 0.5], "and then no more"


@needs_algebra
@pytest.mark.parametrize("word", ["east", "10:30am", "52_{8}", "x'", "1 2", ""])
def test_what_is_no_algebra_is_not_sent(word, monkeypatch):
    monkeypatch.setattr(algebra.worker, "equal", lambda *_: (True, 0.0))
    judge = algebra.Judge()
    assert not judge(word, "x") and not judge("x", word)
    assert judge("x_{max}", "x")


def test_without_the_extra_only_algebra_is_missing(monkeypatch):
    monkeypatch.setattr(algebra, "has_algebra", lambda: False)
    assert not equal(r"2\sqrt3", r"\sqrt{12}", "math")
    assert equal("0.25", r"\frac14", "math") and equal(r"2\sqrt3", r"2 \sqrt{3}", "math")
    rules._equal_by_parts.cache_clear()

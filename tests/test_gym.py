"""reasoning-gym's tasks as problems: an endless stream, a held-out set apart, and the task's own scorer."""

import sys

import pytest

pytest.importorskip("reasoning_gym")

from thinkrl import UserError, gym
from thinkrl.data.problems import held_out_problems, load_problems, messages, training_stream
from thinkrl.grading import canonical, extract, grade
from thinkrl.l2t.gain import forcing

SUMS = "gym:chain_sum,min_terms=2,max_terms=2,max_digits=2"


def test_a_stream_that_follows_its_seed_and_any_number_of_ranks():
    stream = training_stream(SUMS, 7)
    steps = [stream.take(step, 6) for step in range(3)]
    assert [p.id for rows in steps for p in rows] == [*range(18)]
    assert len({p.question for rows in steps for p in rows}) > 12
    again = training_stream(SUMS, 7)
    assert again.take(2, 6, 0, 2) + again.take(2, 6, 1, 2) == steps[2]
    assert training_stream(SUMS, 8).take(0, 6) != steps[0]
    assert all(p.question.count("+") + p.question.count("-") <= 3 for p in steps[0]), "two terms, as asked"


def test_what_is_held_out_is_never_trained_on():
    held_out = held_out_problems("", SUMS)
    questions = {p.question for p in held_out}
    assert len(held_out) == len(questions) > 100 and [p.id for p in held_out] == [*range(len(held_out))]
    assert held_out == held_out_problems(SUMS, "other.jsonl")
    assert not questions & {p.question for p in training_stream(SUMS, 7).take(0, 1000)}


def test_answers_are_graded_by_the_task():
    [problem] = training_stream(SUMS, 7).take(0, 1)
    assert "<answer>" in messages(problem)[0]["content"]
    assert grade(f"So <answer>{problem.answer}</answer>", problem.answer, problem.source)
    assert not grade(f"So <answer>{problem.answer}1</answer>", problem.answer, problem.source)
    assert not grade(problem.answer, problem.answer, problem.source), "no marker, no answer"
    assert canonical(" 7 ", problem.source) == "7" and extract("<answer> 7 </answer>", problem.source) == "7"
    assert forcing(problem) == ("\n</think>\n\n<answer>", "</answer>"), "and L2T's probes can force it"
    assert grade(f"<answer>{problem.answer}.0</answer>", problem.answer, problem.source), (
        "its scorer reads numbers"
    )
    assert not grade(f"<answer>{problem.answer}.5</answer>", problem.answer, problem.source)


def test_a_gold_answer_that_its_own_scorer_misreads_is_right():
    """gsm_symbolic's scorer does not read a minus sign."""
    problems = held_out_problems("", "gym:gsm_symbolic")
    assert all(grade(f"<answer>{p.answer}</answer>", p.answer, p.source) for p in problems)


def test_another_rule_may_grade():
    [problem] = training_stream(SUMS, 7, source="math").take(0, 1)
    assert problem.source == "math" and grade(rf"\boxed{{{problem.answer}}}", problem.answer, problem.source)
    assert {p.source for p in held_out_problems("", SUMS, "math")} == {"math"}


def test_a_mixture_of_tasks():
    stream = training_stream("gym:leg_counting+arith+gym:chain_sum", 7, "1,1,2")
    problems = [problem for step in range(2) for problem in stream.take(step, 4)]
    assert len({p.id for p in problems}) == 8
    assert sorted(p.source.split("#")[0] for p in problems[:4]) == [
        "arith",
        "gym:chain_sum",
        "gym:chain_sum",
        "gym:leg_counting",
    ]
    with pytest.raises(
        UserError, match="gym:chain_sum never ends, so joined to others it needs --data_weights"
    ):
        load_problems("gym:leg_counting+arith".replace("leg_counting", "chain_sum"))


@pytest.mark.parametrize(
    "task, message",
    [
        ("gym:chain_sums", r"no task 'chain_sums' .did you mean 'chain_sum'"),
        ("gym:", "no task ''"),
        (
            "gym:chain_sum,min_term=2",
            r"'min_term=2' is no key=value .did you mean 'min_terms'.*: min_terms, max_terms",
        ),
        ("gym:chain_sum,min_terms", "'min_terms' is no key=value"),
        ("gym:chain_sum,seed=3", "'seed=3' is no key=value"),
        ("gym:chain_sum,min_terms=9,max_terms=2", "--data gym:chain_sum,min_terms=9,max_terms=2: "),
        ("gym:countdown", "its scorer might run the answer as Python"),
        ("gym:puzzle24", "its scorer might run the answer as Python"),
        ("gym:graph_color", "this task gives no answer of its own"),
        ("gym:leg_counting,min_animals=1,max_animals=1,min_instances=1,max_instances=1", None),
    ],
)
def test_a_mistake_is_a_sentence(task, message):
    if message is None:
        assert 0 < len(gym.heldout(task)) < 500, "what there is"
        return
    with pytest.raises(UserError, match=message) as mistake:
        load_problems(task)
    assert "\n" not in str(mistake.value)


def test_a_task_with_one_question_is_refused():
    with pytest.raises(UserError, match="too few different questions; make it harder"):
        for held_out in (True, False):  # its one question is on one side of the division
            gym._draw("gym:count_bits,min_n=1,max_n=1", "any", 0, 0, held_out)


def test_lists_in_a_configuration():
    name, values = gym._configuration('gym:basic_arithmetic,operators=["+","-"],max_digits=1')
    assert values == {"operators": ["+", "-"], "max_digits": 1}
    assert "*" not in "".join(
        p.question for p in training_stream('gym:basic_arithmetic,operators=["+","-"]', 1).take(0, 20)
    )


def test_the_scorer_s_own_failure_is_a_wrong_answer():
    [problem] = training_stream(SUMS, 7).take(0, 1)
    assert not gym.right("\ud800" * 10, problem.source) and not gym.right("", problem.source)


def test_a_missing_extra_is_named(monkeypatch):
    gym._configuration.cache_clear()
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"--data gym:chain_sum.*pip install 'thinkrl\[gym\]'"):
        load_problems("gym:chain_sum")
    assert "reasoning_gym" in sys.modules, "here it is installed"

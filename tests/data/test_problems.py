"""The order in which every rank meets the problems, and how they are asked."""

import pytest

from thinkrl import arith
from thinkrl.data.problems import (
    Mixture,
    Stream,
    held_out_problems,
    load_problems,
    messages,
    mix,
    subsample,
    training_stream,
)
from thinkrl.types import Problem, UserError


@pytest.mark.parametrize("rows", [list(range(10)), lambda seed, index: (seed, index)])
def test_the_stream_is_the_same_for_any_number_of_ranks(rows):
    stream = Stream(rows, seed=7)
    for step in range(6):
        whole = stream.take(step, 5)
        for world in (1, 2, 3, 5, 7):
            parts = [stream.take(step, 5, rank, world) for rank in range(world)]
            assert sum(parts, []) == whole
            assert max(map(len, parts)) - min(map(len, parts)) <= 1


def test_the_stream_resumes_from_the_step_alone_and_follows_its_seed():
    rows = list(range(10))
    once = [Stream(rows, 1).take(step, 4) for step in range(9)]
    again = Stream(rows, 1)
    assert [again.take(step, 4) for step in (8, 2, 5)] == [once[8], once[2], once[5]]
    assert once != [Stream(rows, 2).take(step, 4) for step in range(9)]


def test_an_epoch_of_a_list_meets_each_row_once_and_no_step_meets_one_twice():
    stream = Stream(list(range(10)), seed=0)
    epochs = [stream.take(2 * e, 5) + stream.take(2 * e + 1, 5) for e in range(3)]
    assert all(sorted(epoch) == list(range(10)) for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2]
    assert all(len(set(stream.take(step, 4))) == 4 for step in range(20))
    # nobody is left out for ever
    assert {row for step in range(20) for row in stream.take(step, 4)} == set(range(10))
    with pytest.raises(UserError, match="10 rows, fewer than the 11"):
        stream.take(0, 11)


def test_spare_rows_of_a_step_are_the_same_on_any_number_of_ranks_and_none_comes_twice():
    stream = Stream(list(range(30)), seed=0)
    whole = stream.take_rounds(1, 5, 3)
    assert len({row for rows in whole for row in rows}) == 15
    apart = [stream.take_rounds(1, 5, 3, rank, 2) for rank in range(2)]
    assert [a + b for a, b in zip(*apart)] == whole
    assert stream.take_rounds(4, 5, 1) == [stream.take(4, 5)]


def test_arith_trains_on_what_it_does_not_evaluate():
    stream = Stream(load_problems("arith"), seed=3)
    trained = {p.question for step in range(20) for p in stream.take(step, 32)}
    held_out = held_out_problems("", "arith")
    assert len(held_out) == len({p.question for p in held_out}) == 500
    assert not trained & {p.question for p in held_out}
    assert stream.take(2, 4)[1] == arith.training_problem(3, 9)
    assert (
        held_out_problems("arith", "other.jsonl") == held_out and held_out_problems("", "other.jsonl") == []
    )


def test_messages_ask_for_the_marker_once():
    def content(problem, **options):
        return [(m["role"], m["content"]) for m in messages(problem, **options)]

    assert content(Problem(0, "6*7?", "42")) == [("user", "6*7?")]
    assert content(Problem(0, "6*7?", "42"), system="S", suffix="End.") == [
        ("system", "S"),
        ("user", "6*7?\nEnd."),
    ]
    assert "####" in content(Problem(0, "6*7?", "42", "openai/gsm8k"))[0][1]
    assert r"\boxed{}" in content(Problem(0, "6*7?", "42", "math"))[0][1]
    asked = Problem(0, r"6*7? Use \boxed{}.", "42", "math", system="Own.")
    assert content(asked, system="S") == [("system", "Own."), ("user", asked.question)]


def test_problems_are_spread_evenly():
    rows = list(range(8))
    assert (
        subsample(rows, 4) == [0, 2, 4, 6]
        and subsample(rows, 3) == [0, 2, 5]
        and subsample(rows, 100) == rows
    )
    assert subsample(rows, 0) == [] == subsample([], 5)
    assert subsample(list(range(800)), 500)[-1] == 798, "the end of the file is met too"


def test_a_free_prompt_is_asked_as_it_stands():
    free = Problem(0, "The capital of France is", "", "math", instruct=False)
    assert messages(free) == [{"role": "user", "content": "The capital of France is"}]
    assert messages(free, suffix="Where?")[0]["content"].endswith("is\nWhere?"), "but for what the user adds"


def test_a_mixture_keeps_its_shares_in_every_step_and_for_any_number_of_ranks():
    parts = [[f"a{i}" for i in range(6)], [f"b{i}" for i in range(3)], lambda seed, index: f"c{seed}.{index}"]
    mixture = mix(parts, "2,1,1", seed=7)
    assert isinstance(mixture, Mixture) and mixture.counts(4) == [2, 1, 1] and mixture.counts(5) == [3, 1, 1]
    assert mixture.counts(7) == [3, 2, 2], "3.5, 1.75, 1.75: the largest remainders are rounded up"
    steps = [mixture.take(step, 4) for step in range(6)]
    assert all(sorted(row[0] for row in rows) == ["a", "a", "b", "c"] for rows in steps)
    assert [row for rows in steps for row in rows if row[0] == "c"] == [f"c7.{i}" for i in range(6)]
    for epoch in (steps[:3], steps[3:]):
        assert sorted(row for rows in epoch for row in rows if row[0] == "a") == parts[0], (
            "each once in an epoch"
        )
    assert len({tuple(row[0] for row in rows) for rows in steps}) > 1, "a part has no fixed place in the step"
    again = mix(parts, "2,1,1", seed=7)
    for step in (5, 2):
        assert sum((again.take(step, 4, rank, 3) for rank in range(3)), []) == steps[step]
    assert mixture.preview(4) == [*parts[0], *parts[1], "c7.0"]
    assert sum(mixture.take_rounds(0, 2, 2), []) == steps[0], "spare rows are mixed too"


def test_one_part_is_a_plain_stream():
    rows = list(range(10))
    assert mix([rows], "", 7).take(1, 4) == Stream(rows, 7).take(1, 4)


@pytest.mark.parametrize("weights", ["1", "1,2,3", "1,0", "1,-1", "1,x", "1,nan", "1,inf", ","])
def test_weights_that_are_none(weights):
    with pytest.raises(UserError, match="--data_weights .*a positive number for each of the 2 parts"):
        mix([[1], [2]], weights, 0)


def test_a_step_too_small_for_a_share():
    with pytest.raises(
        UserError, match="a step of 4 rows has none of part 2 of --data: raise --problems_per_step"
    ):
        mix([[1] * 9, [2] * 9], "9,1", 0).take(0, 4)


def test_several_files_with_weights(tmp_path):
    for name, answer in (("a", 2), ("b", 3)):
        rows = "".join(f'{{"problem": "{name}{i}", "answer": {answer}}}\n' for i in range(4))
        (tmp_path / f"{name}.jsonl").write_text(rows)
    spec = f"{tmp_path}/a.jsonl+{tmp_path}/b.jsonl"
    assert len(training_stream(spec, 1).rows) == 8, "without weights one list"
    stream = training_stream(f"{spec}+arith", 1, "3,1,1")
    taken = [problem for step in range(4) for problem in stream.take(step, 5)]
    assert {problem.question[0] for problem in taken[:5]} > {"a", "b"}
    assert len({p.id for p in taken if p.source == "arith"}) == 4
    ids = {problem.question: problem.id for problem in taken}
    assert len(set(ids.values())) == len(ids), "no two problems share an address of randomness"
    with pytest.raises(UserError, match="arith never ends, so joined to others it needs --data_weights"):
        training_stream(f"{spec}+arith", 1)

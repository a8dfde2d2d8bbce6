"""Rewards written for TRL and verl are called as they are there; what cannot be rewarded is NaN."""

import json
import math
import sys

import pytest
import torch

import train
from helpers import ID, write_tokenizer
from thinkrl import UserError
from thinkrl.config import parse
from thinkrl.data.problems import load_problems, reading
from thinkrl.grpo import group_advantages
from thinkrl.rewards import each, load_rewards, require_columns, weighted_sum
from thinkrl.types import Problem, Trajectory, Turn

MODULE = """
def length(completions, **columns):
    return [float(len(text)) for text in completions]

def chat_length(completions, **columns):
    return [float(len(messages[0]["content"])) for messages in completions]

def right(completions, answer, solution):
    return [float(text == gold) if text else None for text, gold in zip(completions, answer)]

seen = []
def spy(prompts, completions, **columns):
    seen.append(dict(prompts=prompts, completions=completions, **columns))
    return [None] * len(prompts)

def compute_score(data_source, solution_str, ground_truth, extra_info=None):
    seen.append((data_source, solution_str, ground_truth, extra_info))
    return {"score": float(solution_str == ground_truth), "acc": 1}

def verl_number(solution_str, ground_truth, **rest):
    return None if solution_str == "b" else 2

def short(completions):
    return [1.0]

def text(completions):
    return ["good"] * len(completions)

def number(completions):
    return 1.0

def infinite(completions):
    return [float("inf")] * len(completions)

def nan(completions):
    return [float("nan")] * len(completions)

def breaks(completions, **columns):
    return columns["nowhere"]

def wants(completions, difficulty):
    return difficulty

def other(x):
    return x

async def later(completions):
    return []
"""


@pytest.fixture
def tokenizer(tmp_path, monkeypatch):
    (tmp_path / "my_rewards.py").write_text(MODULE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.path", ["", *__import__("sys").path])
    monkeypatch.delitem(__import__("sys").modules, "my_rewards", raising=False)
    return write_tokenizer(tmp_path / "tokenizer")


def attempt(problem, text, stop=True, outcome=0.0):
    ids = [ID[c] for c in text] + [ID["<eos>"]] * stop
    return Trajectory(
        problem, 0, [Turn("policy", [ID["?"]], ids, [0.0] * len(ids), "stop")], "no", outcome_reward=outcome
    )


def given(names, trajectories, tokenizer, weights=""):
    rewards = load_rewards(names, weights)
    return [weighted_sum(rewards, values) for values in each(rewards, trajectories, tokenizer)]


A, B = Problem(0, "a?", "a", "math"), Problem(1, "b?", "b", "math")


def test_a_reward_for_trl(tokenizer):
    tried = [attempt(A, "a"), attempt(A, "ab", stop=False), attempt(B, "b"), attempt(B, "")]
    assert given("my_rewards:length", tried, tokenizer) == [1, 2, 1, 0], "without the stop token"
    right = given("my_rewards:right", tried, tokenizer)
    assert right[:3] == [1, 0, 1] and math.isnan(right[3])


def test_several_with_weights(tokenizer):
    tried = [attempt(A, "a", outcome=1.0), attempt(A, "bb"), attempt(A, "")]
    assert given("my_rewards:length+outcome", tried, tokenizer, "0.5,-2") == [-1.5, 1, 0]
    assert given("my_rewards:right + my_rewards:length", tried, tokenizer) == [2, 2, 0], (
        "what gives None adds nothing"
    )
    assert given("outcome", tried, tokenizer) == [1, 0, 0]
    assert all(map(math.isnan, given("my_rewards:spy+my_rewards:nan", tried, tokenizer)))


def test_what_each_gives_is_kept_raw(tokenizer):
    tried = [attempt(A, "a", outcome=1.0), attempt(A, "bb")]
    rewards = load_rewards("my_rewards:length+outcome+my_rewards:spy", "0.5,-2,1")
    values = each(rewards, tried, tokenizer)
    assert [row[:2] for row in values] == [[1, 1], [2, 0]] and all(math.isnan(row[2]) for row in values)


def test_what_trl_passes(tmp_path, tokenizer):
    rows = '{"prompt": "a?", "solution": "$a$", "level": "hard", "tests": [1]}\n{"prompt": "b?", "answer": "b"}\n'
    (tmp_path / "d.jsonl").write_text(rows)
    first, second = load_problems(str(tmp_path / "d.jsonl"), keep_row=True, verbatim=True)
    given("my_rewards:spy", [attempt(first, "a"), attempt(second, "b")], tokenizer)
    import my_rewards

    assert my_rewards.seen == [
        {
            **{
                "prompts": ["a?", "b?"],
                "completions": ["a", "b"],
                "completion_ids": [[ID["a"], 0], [ID["b"], 0]],
            },
            **{
                "question": ["a?", "b?"],
                "answer": ["a", "b"],
                "solution": ["$a$", "b"],
                "source": ["math", "math"],
            },
            **{"level": ["hard", ""], "tests": [[1], None]},
        }
    ]


def test_a_conversational_row_gives_messages(tmp_path, tokenizer):
    (tmp_path / "d.jsonl").write_text('{"prompt": [{"role": "user", "content": "a?"}], "answer": "a"}\n')
    [problem] = load_problems(str(tmp_path / "d.jsonl"), keep_row=True, verbatim=True)
    assert given("my_rewards:chat_length", [attempt(problem, "ab")], tokenizer) == [2]
    given("my_rewards:spy", [attempt(problem, "ab")], tokenizer)
    import my_rewards

    assert my_rewards.seen[0]["prompts"] == [[{"role": "user", "content": "a?"}]]
    assert my_rewards.seen[0]["completions"] == [[{"role": "assistant", "content": "ab"}]]


def test_a_reward_for_verl(tmp_path, tokenizer):
    (tmp_path / "d.jsonl").write_text(
        '{"data_source": "math_dapo", "prompt": [{"role": "user", "content": "a?"}], "extra_info": {"index": 3}, '
        '"reward_model": {"ground_truth": "a"}}\n'
    )
    [problem] = load_problems(str(tmp_path / "d.jsonl"), keep_row=True)
    assert given("my_rewards:compute_score", [attempt(problem, "a"), attempt(problem, "b")], tokenizer) == [
        1,
        0,
    ]
    import my_rewards

    assert my_rewards.seen[0] == ("math_dapo", "a", "a", {"index": 3})
    assert given("my_rewards:compute_score", [attempt(A, "a")], tokenizer) == [1], "a problem without a row"
    assert my_rewards.seen[2] == ("math", "a", "a", None)
    number, nothing = given("my_rewards:verl_number", [attempt(A, "a"), attempt(A, "b")], tokenizer)
    assert number == 2 and math.isnan(nothing)


@pytest.mark.parametrize(
    "name, message",
    [
        ("my_rewards", "--reward my_rewards: write module:function, or outcome"),
        ("my_rewards:", "write module:function, or outcome"),
        ("nowhere:f", "--reward nowhere:f: No module named 'nowhere'"),
        ("my_rewards:f", "--reward my_rewards:f: module 'my_rewards' has no attribute 'f'"),
        ("my_rewards:seen", "not a function"),
        ("my_rewards:later", "not a function that can be called and answers at once"),
        ("my_rewards:other", "neither TRL's form.* 'completions', nor verl's.*: it has x"),
        ("my_rewards:short", "my_rewards:short must return a list, one number or None per completion"),
        ("my_rewards:number", "my_rewards:number must return a list"),
        (
            "my_rewards:text",
            "my_rewards:text returned 'good' for problem 0, sample 0: a finite number or None",
        ),
        (
            "my_rewards:infinite",
            "my_rewards:infinite returned inf for problem 0, sample 0: a finite number or None",
        ),
        ("my_rewards:breaks", "my_rewards:breaks failed with KeyError: 'nowhere' .*my_rewards.py:[0-9]+"),
    ],
)
def test_a_mistake_is_a_sentence(tokenizer, name, message):
    with pytest.raises(UserError, match=message):
        given(name, [attempt(A, "a"), attempt(A, "b")], tokenizer)


def test_a_column_that_is_wanted_must_be_there(tokenizer):
    with pytest.raises(
        UserError, match="wants difficulty, and --data has no such column: there are .*question, ans"
    ):
        require_columns(load_rewards("my_rewards:wants"), [A])
    with_it = Problem(0, "a?", "a", "math", row={"difficulty": 3})
    names = "my_rewards:wants+outcome+my_rewards:length+my_rewards:compute_score+my_rewards:verl_number"
    require_columns(load_rewards(names), [A, with_it])
    assert given("my_rewards:wants", [attempt(with_it, "a")], tokenizer) == [3]


@pytest.mark.parametrize("weights", ["1", "1,2,3", "1,x", "1,nan"])
def test_weights_that_are_none(tokenizer, weights):
    with pytest.raises(UserError, match="--reward_weights .*one number for each of the 2 of --reward"):
        load_rewards("outcome+my_rewards:length", weights)


def test_rows_are_kept_only_for_rewards_that_read_them():
    class Options:
        source = columns = ""
        skip_bad_rows = False

    def how(reward):
        Options.reward = reward
        return reading(Options)["keep_row"], reading(Options)["verbatim"]

    assert how("") == how("outcome") == (False, False)
    assert how("my:f") == how("my:f + my:g") == (True, True), "the prompt is theirs"
    assert how("my:f+outcome") == (True, False), "the outcome needs its instruction"


@pytest.mark.parametrize(
    "more, message",
    [
        ("--length kimi", "--length and --dynamic_sampling go by the graded outcome"),
        ("--dynamic_sampling 2", "--length and --dynamic_sampling go by the graded outcome"),
        ("l2t --credit local --gain continue", "--credit local takes J"),
        ("--advantage_std mean", "--advantage_std mean divides .* which --reward may make negative"),
    ],
)
def test_options_that_go_by_the_outcome_are_refused(more, message):
    with pytest.raises(UserError, match=message):
        preset, *rest = more.split() if more.startswith("l2t") else ["grpo", *more.split()]
        parse([preset, "--reward", "my_rewards:length", *rest])


@pytest.mark.slow
@pytest.mark.parametrize(
    "preset, more",
    [
        ("grpo", ()),
        ("l2t", ()),
        ("l2t", ("--credit", "guarded")),
        ("l2t", ("--advantage_std", "batch")),
        ("l2t", ("--credit", "to_go")),
    ],
)
def test_training_by_a_reward_of_ones_own(tmp_path, monkeypatch, preset, more):
    """Shorter is better, and what thinks of a 7 cannot be rewarded: it gets no advantage and does not move
    the others'.
    """
    (tmp_path / "brief.py").write_text(
        "def brief(completions, **columns):\n    return [None if '7' in text else -len(text) for text in "
        "completions]\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    options = (
        "--steps 1 --problems_per_step 2 --group_size 4 --max_tokens 60 --eval_problems 0 --log_groups 2"
    )
    where = ["--reward", "brief:brief", "--runs_dir", str(tmp_path), "--name", "run"]
    train.main(parse([preset, *options.split(), *where, *more]))
    sys.modules.pop("brief")  # the next one is another file
    samples = [json.loads(line) for line in (tmp_path / "run" / "samples.jsonl").read_text().splitlines()]
    [row] = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    none = [s for s in samples if s["reward"] is None]
    assert 0 < len(none) < 8 == len(samples) and row["unrewarded"] == len(none) / 8
    assert all("7" in s["text"] and not any(s["advantage"]) for s in none)
    rest = [s for s in samples if s["reward"] is not None]
    assert all(s["reward"] < 0 for s in rest) and row["reward"] == pytest.approx(
        sum(s["reward"] for s in rest) / len(rest)
    )
    assert (
        any(any(s["advantage"]) for s in rest)
        and math.isfinite(row["loss"])
        and math.isfinite(row["grad_norm"])
    )
    if preset == "grpo":
        for group in (samples[:4], samples[4:]):
            given = [s["reward"] if s["reward"] is not None else math.nan for s in group]
            expected = group_advantages(torch.tensor([given], dtype=torch.float64))[0]
            assert [s["advantage"][0] for s in group] == pytest.approx(expected.tolist(), abs=1e-4)

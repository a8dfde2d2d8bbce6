"""Rewards written for TRL and verl are called as they are there; what cannot be rewarded is NaN."""

import math

import pytest

from helpers import ID, write_tokenizer
from thinkrl import UserError
from thinkrl.problems import load_problems, reading
from thinkrl.rewards import load_rewards, total
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
    return total(load_rewards(names, weights), trajectories, tokenizer)


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
        ("my_rewards:text", "my_rewards:text returned 'good': a finite number or None"),
        ("my_rewards:infinite", "my_rewards:infinite returned inf: a finite number or None"),
        ("my_rewards:breaks", "my_rewards:breaks failed with KeyError: 'nowhere' .*my_rewards.py:[0-9]+"),
        (
            "my_rewards:wants",
            "my_rewards:wants wants difficulty; there are question, answer, .*no such column",
        ),
    ],
)
def test_a_mistake_is_a_sentence(tokenizer, name, message):
    with pytest.raises(UserError, match=message):
        given(name, [attempt(A, "a"), attempt(A, "b")], tokenizer)


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

"""The protocol with scripted roles and with the embedded model; rewards, own turns, rounds."""

import json
import math
import shutil
from types import SimpleNamespace

import pytest
import torch

from thinkrl import UserError
from thinkrl.checkpoint import load_model
from thinkrl.data.problems import INSTRUCTIONS
from thinkrl.evaluate import summarise, tally_outcomes
from thinkrl.grpo import group_advantages
from thinkrl.learner import TINY
from thinkrl.longshort.conversation import Prompts, build, load_prompts
from thinkrl.longshort.protocol import (
    Conversation,
    RoleReward,
    RoleSampler,
    converse,
    exchanges,
    format_reward,
    length_reward,
    opening_prompts,
    own_tokens,
    pair_name,
    require_same_tokenizer,
    role_rewards,
    round_at,
    schedule,
    summary,
    transcript,
)
from thinkrl.presets import turn_samples
from thinkrl.rollout import require_room
from thinkrl.run.metrics import Tally
from thinkrl.sampler import Completion, Sampler
from thinkrl.tokenizer import Tokenizer
from thinkrl.types import Problem, Turn, pack

PROMPTS = Prompts("L", "S", joiner="|")


class Letters:
    """One id per character."""

    def encode(self, text):
        return [ord(c) for c in text]

    def decode(self, ids):
        return "".join(map(chr, ids))

    def render_chat(self, messages, add_generation_prompt=True):
        return f"({messages[0]['content']})"


class Scripted:
    """A sampler that says prepared texts, one list per call, and remembers what it was asked."""

    def __init__(self, *calls, context=10_000):
        self.calls, self.asked, self.options = list(calls), [], []
        self.tokenizer = Letters()
        self.model = SimpleNamespace(config=SimpleNamespace(max_positions=context))

    def generate(self, prompts, n, **options):
        self.asked.append([Letters().decode(p) for p in prompts])
        self.options.append(options)
        texts = self.calls.pop(0)
        assert len(texts) == len(prompts) * n == len(options["keys"]), "the script and the protocol disagree"
        done = [Completion(Letters().encode(t), [-0.5] * len(t), "stop") for t in texts]
        return [done[i : i + n] for i in range(0, len(done), n)]


def talk(long, short, problems=1, group_size=1, source="arith", suffix="", **options):
    roles = {
        "long": RoleSampler(long, 0.9, 50, PROMPTS, suffix),
        "short": RoleSampler(short, 0.3, 60, PROMPTS, suffix),
    }
    problems = [Problem(i, f"q{i}", "4", source) for i in range(problems)]
    return converse(roles, problems, group_size=group_size, seed=1, address=(0, 7), **options)


def test_rethink_then_answer():
    long = Scripted(["<think>a</think>"], ["<think>b</think>"])
    short = Scripted(["<answer>c</rethink>"], ["<answer>2+2=4\n4</answer>"])
    [t] = talk(long, short)
    assert [turn.role for turn in t.turns] == ["long", "short", "long", "short"]
    assert t.ended == "answered"
    assert t.texts == [
        "<think>a</think>",
        "<answer>c</rethink>",
        "<think>b</think>",
        "<answer>2+2=4\n4</answer>",
    ]
    assert (t.answer, t.outcome_reward, t.reward) == ("4", 1.0, 1.0)
    assert t.text == "<answer>2+2=4\n4</answer>" and exchanges([t]) == [2]
    assert long.asked == [["(L\nq0)"], ["(L\nq0|<think>a</think>|<answer>c</rethink>)"]]
    assert short.asked == [
        ["(S\nq0|<think>a</think>)"],
        ["(S\nq0|<think>a</think>|<answer>c</rethink>|<think>b</think>)"],
    ]
    assert t.turns[2].prompt == build(
        "long", "q0", [turn.completion for turn in t.turns[:2]], Letters(), PROMPTS
    )


@pytest.mark.parametrize("suffix, said", [("", INSTRUCTIONS["math"][1]), ("Be brief.", "Be brief.")])
def test_both_roles_read_where_the_answer_goes(suffix, said):
    """The question of every turn ends with the instruction of its grading rule, or with --suffix."""
    long, short = Scripted(["<think>a</think>"]), Scripted(["<answer>\\boxed{4}</answer>"])
    [t] = talk(long, short, source="math", suffix=suffix)
    assert said and t.correct
    assert long.asked == [[f"(L\nq0\n{said})"]]
    assert short.asked == [[f"(S\nq0\n{said}|<think>a</think>)"]]


def test_each_role_has_its_own_sampling_and_every_turn_its_own_key():
    long, short = (
        Scripted(["<think>a</think>"] * 4, ["<think>a</think>"] * 2),
        Scripted(
            ["<answer>4</answer>", "<answer>c</rethink>"] * 2, ["<answer>5</answer>", "<answer>4</answer>"]
        ),
    )
    talks = talk(long, short, problems=2, group_size=2)
    assert [t.outcome_reward for t in talks] == [1, 0, 1, 1] and exchanges(talks) == [1, 2, 1, 2]
    assert [(t.problem.id, t.sample) for t in talks] == [(0, 0), (0, 1), (1, 0), (1, 1)]
    assert {(o["temperature"], o["max_tokens"], o["stop"]) for o in long.options} == {
        (0.9, 50, ("</think>",))
    }
    assert {(o["temperature"], o["max_tokens"], o["stop"]) for o in short.options} == {
        (0.3, 60, ("</answer>", "</rethink>"))
    }
    keys = [key for o in long.options + short.options for key in o["keys"]]
    assert len(set(keys)) == len(keys) == 12 and all(key[:2] == (0, 7) for key in keys)
    assert [len(asked) for asked in long.asked] == [2, 2], (
        "a group's first prompt is one prompt; ended conversations wait"
    )


def test_never_answers():
    long, short = Scripted(*[["<think>a</think>"]] * 3), Scripted(*[["<answer>4</rethink>"]] * 3)
    [t] = talk(long, short, max_turns=3)
    assert (len(t.turns), t.ended, t.outcome_reward, t.answer) == (6, "turns", 0.0, None)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "<think></think>",
        "<think> \n</think>",
        "<think>a",
        "a</think>",
        "<think>a</think><answer>4</answer>",
        "<think>a</answer>",
        "<think>a</think>\n",
    ],
)
def test_a_malformed_thought_ends_the_conversation(text):
    [t] = talk(Scripted([text]), Scripted())
    assert (len(t.turns), t.ended, t.outcome_reward) == (1, "malformed", 0.0)
    assert turn_samples([t], [torch.zeros(0)], "short") == []


@pytest.mark.parametrize(
    "text",
    ["", "4", "<answer></answer>", "<answer>4</answer></rethink>", "<think>a</think><answer>4</answer>"],
)
def test_a_malformed_answer_is_not_graded(text):
    [t] = talk(Scripted(["<think>a</think>"]), Scripted([text]))
    assert (len(t.turns), t.ended, t.outcome_reward) == (2, "malformed", 0.0)


def test_no_room_for_another_turn():
    # the second prompt has 40 + 36 characters
    long = Scripted(["<think>a</think>"] * 2, ["<think>a</think>"], context=100)
    short = Scripted(["<answer>c</rethink>", "<answer>" + "c" * 40 + "</rethink>"], ["<answer>4</answer>"])
    talks = talk(long, short, problems=2)
    assert [t.ended for t in talks] == ["answered", "context"] and [len(t.turns) for t in talks] == [4, 2]


@pytest.mark.parametrize("context, ended", [(83, "answered"), (82, "context")])
def test_a_turn_may_end_at_the_last_place_of_the_context(context, ended):
    """The short prompt "(S\\nq0|<think>a</think>)" has 23 characters and a short turn may have 60."""
    [t] = talk(Scripted(["<think>a</think>"]), Scripted(["<answer>4</answer>"], context=context))
    assert t.ended == ended


def test_single_exchange_grades_the_one_reply():
    long, short = Scripted(["<think>a"] * 2), Scripted(["<answer>4</answer>", "<answer>4</rethink>"])
    talks = talk(long, short, group_size=2, rollout="single_exchange")
    assert [len(t.turns) for t in talks] == [2, 2] and [t.outcome_reward for t in talks] == [1, 0]


# Rewards


def test_format_reward():
    assert [format_reward("<think>x < 3</think>", "long", strict) for strict in (False, True)] == [1.0, 0.0]
    assert (
        format_reward("<answer>b</rethink>", "short") == 1.0
        and format_reward("<answer></answer>", "short") == 0.0
    )


def test_length_reward():
    assert length_reward([100, 200, 300], [1, 0, 1]) == [0.5, 0, -0.5]
    assert length_reward([100, 200, 300], [0, 0, 1]) == [0, 0, -0.5]
    assert length_reward([100, 200, 300], [1, 1, 0]) == [0.5, 0, -0.5], "wrong ones are long, and pay for it"
    assert length_reward([100, 200, 300], [0, 0, 1], symmetric=True) == [0.5, 0, -0.5]
    assert length_reward([7, 7], [1, 0]) == [0, 0] and length_reward([], []) == []


def attempt(*turns, correct=True, sample=0):
    out = Conversation(Problem(5, "q", "4"), sample, [], outcome_reward=float(correct), ended="answered")
    for i, (role, text) in enumerate(turns):
        out.turns.append(Turn(role, [1000 + i], Letters().encode(text), [-0.1 * (i + 1)] * len(text), "stop"))
        out.texts.append(text)
    return out


def test_total_reward():
    """Own lengths 16 and 32 + 16; the group is the problem's; LM is in [-0.5, 0.5]."""
    thought = "<think>a</think>"
    talks = [
        attempt(("long", thought), ("short", "<answer>4</answer>")),
        attempt(("long", thought + thought), ("short", "<answer>4</rethink>"), ("long", thought), sample=1),
        attempt(("long", thought), correct=False),
        attempt(("long", thought), correct=False, sample=1),
    ]
    rewards = role_rewards(talks, "long", 2, outcome_coef=2, format_coef=3, length_coef=4)
    assert rewards[0] == RoleReward(outcome=1, format=1, length=0.5, total=2 + 3 + 2)
    assert rewards[1] == RoleReward(outcome=1, format=0, length=-0.5, total=2 + 0 - 2), (
        "one bad turn spoils the format"
    )
    assert rewards[2] == rewards[3] == RoleReward(outcome=0, format=1, length=0, total=3), (
        "equal lengths, and no other problem's"
    )


def test_brevity_is_relative_to_the_group():
    talks = [attempt(("long", "1" * n), sample=n % 2) for n in (1, 2, 101, 102)]
    assert [r.length for r in role_rewards(talks, "long", 2, length_coef=1.0)] == [0.5, -0.5, 0.5, -0.5]


def test_who_never_spoke_earns_nothing_and_sets_no_length():
    talks = [
        attempt(("long", "x"), correct=False),
        *(
            attempt(("long", "<think>a</think>"), ("short", f"<answer>{'4' * n}</answer>"), sample=n)
            for n in (1, 2)
        ),
    ]
    assert [r.total for r in role_rewards(talks, "short", 3, length_coef=1.0)] == [
        0,
        1 + 1 + 0.5,
        1 + 1 - 0.5,
    ]


def test_advantages_of_the_spec():
    assert group_advantages(torch.tensor([[2.5, 1.0], [1.0, 1.0]]), eps=1e-4).tolist() == [
        [pytest.approx(0.70704, abs=1e-5), pytest.approx(-0.70704, abs=1e-5)],
        [0, 0],
    ]


def test_only_own_turns_enter_the_loss():
    t = attempt(
        ("long", "<think>aa</think>"),
        ("short", "<answer>c</rethink>"),
        ("long", "<think>b</think>"),
        ("short", "<answer>4</answer>"),
    )
    for role, turns in (("long", (0, 2)), ("short", (1, 3))):
        n = own_tokens(t, role)
        assert n == sum(len(t.turns[i].completion) for i in turns)
        samples = turn_samples([t], [torch.arange(1.0, n + 1)], role)
        assert [s.id for s in samples] == [f"5/0/{i}" for i in turns]
        [row] = pack(samples, budget=1000)
        assert row.mask.sum() == n and row.advantage.sum() == n * (n + 1) / 2
        own = [token for i in turns for token in t.turns[i].completion]
        assert sorted(row.tokens[row.mask == 1].tolist()) == sorted(own)
        assert row.sampler_logprob[row.mask == 1].tolist() == pytest.approx(
            [p for s in sorted(samples, key=len) for p in s.sampler_logprob.tolist()]
        )
        assert torch.cat([s.advantage for s in samples]).tolist() == list(range(1, n + 1)), (
            "in the order of the turns"
        )


# Rounds


def test_schedule():
    assert schedule("LLSLSL") == ["long", "long", "short", "long", "short", "long"]
    with pytest.raises(UserError, match="must be letters L and S, not X"):
        schedule("LXS")
    with pytest.raises(UserError, match="must be letters L and S"):
        schedule("")


def test_rounds():
    at = [round_at(step, "LS", steps_per_round=3, length_coef=2.0) for step in range(6)]
    assert [(r.index, r.role, r.step) for r in at] == [
        (0, "long", 0),
        (0, "long", 1),
        (0, "long", 2),
        (1, "short", 0),
        (1, "short", 1),
        (1, "short", 2),
    ]
    assert [r.length_coef for r in at] == [0, 1, 2, 0, 1, 2]
    assert round_at(1, "LL", steps_per_round=1).length_coef == 0
    with pytest.raises(AssertionError):
        round_at(6, "LS", 3)
    assert [pair_name("LLSLSL", n) for n in (0, 1, 3, 6)] == ["L0⊗S0", "L1⊗S0", "L2⊗S1", "L4⊗S2"]


# With the embedded model


@pytest.fixture(scope="module")
def tiny():
    return Sampler(load_model(TINY), Tokenizer(TINY), num_pages=300)


@pytest.mark.slow
def test_the_real_sampler_holds_a_conversation(tiny):
    """The embedded policy was not taught the roles: what matters is that ids, stops and ends fit together."""
    prompts = Prompts("<|long|>", "<|short|>", joiner="")
    roles = {"long": RoleSampler(tiny, 1.0, 30, prompts), "short": RoleSampler(tiny, 0.3, 30, prompts)}
    problems = [Problem(i, f"{i + 2}*3?", str(3 * i + 6), "arith") for i in range(3)]
    talks = converse(roles, problems, group_size=4, max_turns=2, seed=3, address=(0, 1))
    assert len(talks) == 12 and tiny.pool.free_pages == tiny.pool.num_pages
    for t in talks:
        history = []
        for turn, text in zip(t.turns, t.texts):
            assert turn.prompt == build(turn.role, t.problem.question, history, tiny.tokenizer, prompts), (
                "token ids in and out"
            )
            assert (
                tiny.tokenizer.decode(turn.completion) == text
                and len(turn.logprobs) == len(turn.completion) <= 30
            )
            history.append(turn.completion)
    alone = converse(roles, problems[1:2], group_size=4, max_turns=2, seed=3, address=(0, 1))
    assert [t.texts for t in alone] == [t.texts for t in talks[4:8]], "neighbours change nothing"
    counts = summary(talks)
    assert (
        sum(counts["ended"].values()) == pytest.approx(1)
        and 1 <= counts["turns"]["min"] <= counts["turns"]["max"] <= 2
    )
    assert counts["long_tokens"] + counts["short_tokens"] == pytest.approx(sum(t.tokens for t in talks) / 12)


def test_a_turn_ends_at_any_stop_id_of_the_checkpoint(tiny, tmp_path):
    """generation_config.json may name several. Here one of them is "<episode_1>", with which a thought
    goes on otherwise.
    """
    for file in TINY.glob("*.json"):
        shutil.copy(file, tmp_path)
    end = tiny.tokenizer.encode("<episode_1>")
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [0, *end]}))
    talks = []
    for tokenizer in (tiny.tokenizer, Tokenizer(tmp_path)):
        voice = RoleSampler(Sampler(tiny.model, tokenizer, num_pages=20), 0.0, 6, load_prompts(folder=TINY))
        talks += converse(
            {"long": voice, "short": voice}, [Problem(0, "2*3?", "6")], group_size=1, seed=3, address=(0, 1)
        )
    (plain, *_), (stopped, *_) = (talk.turns for talk in talks)
    assert (talks[1].texts, talks[1].ended) == (
        ["<think><episode_1>"],
        "malformed",
    ) and stopped.finish_reason == "stop"
    assert len(plain.completion) == 6 and plain.completion[:2] == stopped.completion


def test_truncated_counts_every_turn(world):
    """Of two conversations, one has a first turn that was cut and a last one that was not."""
    whole, cut = (attempt(("long", "a"), ("short", "4"), sample=sample) for sample in range(2))
    cut.turns[0].finish_reason = "length"
    tally = Tally()
    tally_outcomes(tally, [whole, cut], group_size=2)
    assert summarise([whole, cut])["truncated"] == tally.row(1)["truncated"] == 0.5


def test_transcript():
    t = attempt(("long", "<think>a</think>"), ("short", "<answer>4</answer>"))
    assert (
        transcript(t, colour=False)
        == "q\n\nlong (16 tokens)\n<think>a</think>\n\nshort (18 tokens)\n<answer>4</answer>"
    )
    assert "\033[36mlong" in transcript(t) and transcript(t).count("\033[0m") == 2


def test_tokenizers_must_agree(tmp_path):
    ours = Tokenizer(TINY)
    require_same_tokenizer(ours, Tokenizer(TINY))
    text = (TINY / "tokenizer.json").read_text()
    a, b = ours.encode("+")[0], ours.encode("-")[0]
    other = (
        text.replace(f'"+": {a}', f'"-": {a}').replace(f'"-": {b}', f'"+": {b}', 1)
        if f'"+": {a}' in text
        else ""
    )
    assert other, "the file is written otherwise than this test expects"
    (tmp_path / "tokenizer.json").write_text(other)
    with pytest.raises(UserError, match="different tokenizers"):
        require_same_tokenizer(ours, Tokenizer(tmp_path))


def test_length_reward_is_bounded_and_ordered():
    lengths = [3, 10, 4, 8]
    rewards = length_reward(lengths, [True] * 4)
    assert max(rewards) == 0.5 and min(rewards) == -0.5
    assert sorted(range(4), key=lambda i: -rewards[i]) == sorted(range(4), key=lambda i: lengths[i])
    assert math.isclose(rewards[2], 0.5 - 1 / 7)


def test_a_question_without_room_is_named_before_the_first_step(tiny):
    problems = [Problem(3, "2*3?", "6"), Problem(4, "1" * 90, "1")]
    prompts = Prompts("<|long|>", "<|short|>", joiner="")
    asked = opening_prompts(problems, tiny.tokenizer, prompts)
    require_room(problems, asked, 140, 40)
    with pytest.raises(
        UserError,
        match=r"problem 4 \(counted from 0\): a prompt of \d+ tokens and 40 more, sampled or probed, exceed",
    ):
        require_room(problems, asked, 100, 40)


@pytest.mark.parametrize(
    "source, suffix, length",
    [("arith", "", 5), ("arith", "now", 9), ("math", "", 6 + len(INSTRUCTIONS["math"][1]))],
)
def test_an_opening_prompt_may_leave_exactly_one_turn(source, suffix, length):
    """ "(L\\nq)" has 5 characters; what follows the question stands on a line of its own."""
    problems = [Problem(0, "q", "4", source)]
    prompts = opening_prompts(problems, Letters(), PROMPTS, suffix)
    require_room(problems, prompts, length + 40, 40)
    with pytest.raises(UserError, match=f"a prompt of {length} tokens"):
        require_room(problems, prompts, length + 39, 40)

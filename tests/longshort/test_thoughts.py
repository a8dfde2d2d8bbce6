"""Eq. 1 and the labels against the paper's numbers; chunking, rollouts and completion; the two cold-start
sets.
"""

import json
import math
from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from thinkrl.checkpoint import load_model
from thinkrl.learner import TINY
from thinkrl.longshort import thoughts
from thinkrl.longshort.conversation import Prompts
from thinkrl.longshort.thoughts import (
    Prefix,
    Rejected,
    Sampling,
    Thought,
    cold_start,
    importance,
    label,
    read_blocks,
    repair_json,
    runs,
    segments,
)
from thinkrl.rollout import prompt_ids
from thinkrl.sampler import Completion, Sampler
from thinkrl.tokenizer import Tokenizer
from thinkrl.types import Problem

FIGURE_4 = ([28000, 2500, 500, 1, 68999], [0.6, 0.6, 1, 1, 1])
SECOND = ([10, 20, 30, 40], [0.5, 0.75, 0.5, 1])


def test_figure_4():
    scores = importance(*FIGURE_4)
    assert scores == pytest.approx([0.3907, 0.2422, 0.7541, 0.5070, -0.25], abs=5e-5)
    assert label(scores) == ["long", "short", "long", "short", "short"]


def test_second_vector():
    scores = importance(*SECOND)
    assert scores == pytest.approx([0.490570, 0.505891, -0.060966, 0.0], abs=5e-7)
    assert label(scores) == ["long", "long", "short", "short"]


def test_by_hand():
    # Two thoughts of equal length: T1 = T2 = 1/2, P = 1 -> log2(1.25); then T1 = 0, and equal accuracy costs
    # delta.
    assert importance([4, 4], [1, 1]) == pytest.approx([math.log2(1.25), -0.25])
    assert importance([4, 4], [0.5, 1], decay=0.9) == pytest.approx([math.log2(1.125), 0.0])
    assert importance([], []) == []


def test_ties_and_firsts():
    assert label([0.1, 0.1, 0.2, 0.2, 0.15, 0.3]) == ["long", "short", "long", "short", "short", "long"]
    assert label([-0.5]) == ["long"] and label([]) == []


chains = st.lists(st.tuples(st.integers(1, 1000), st.integers(0, 8)), min_size=2, max_size=30)


@given(chains, st.floats(0.01, 0.99))
def test_properties(chain, decay):
    lengths, accuracies = [length for length, _ in chain], [right / 8 for _, right in chain]
    scores = importance(lengths, accuracies, decay)
    for i, score in enumerate(scores):
        delta = decay if i and accuracies[i] <= accuracies[i - 1] else 0
        assert -1e-12 <= score + delta < 1
    assert scores[-1] == -decay or scores[-1] == 0
    labels = label(scores)
    assert labels[0] == "long" and labels[-1] == "short"
    merged = runs(labels)
    assert [role for role, _ in merged] == ["long", "short"] * (len(merged) // 2)
    assert sum((indices for _, indices in merged), []) == list(range(len(chain)))


@given(st.floats(0, 1), st.floats(0, 1), st.floats(0, 1))
def test_error_bound(a, p, p_true):
    """Sampling error of P moves M by at most |error| / ln 2. LS §3.3"""
    moved = abs(math.log2(1 + a * p) - math.log2(1 + a * p_true))
    assert moved <= abs(p - p_true) / math.log(2) + 1e-12


def test_the_shipped_metric_obeys_the_bound():
    for estimate, true in ((0.5, 0.625), (1.0, 0.75), (0.125, 0.0)):
        m, optimum = importance([3, 5, 9], [estimate, 0, 0])[0], importance([3, 5, 9], [true, 0, 0])[0]
        assert 0 < abs(m - optimum) <= abs(estimate - true) / math.log(2)


@pytest.mark.parametrize(
    "lengths, accuracies", [([1], [1, 1]), ([0, 0], [1, 1]), ([1, 1], [0, 1.5]), ([-1, 2], [0, 0])]
)
def test_impossible_numbers(lengths, accuracies):
    with pytest.raises(ValueError):
        importance(lengths, accuracies)


# Chunkers

CHAIN = "<think>\n\nFirst.\n\nThen x < 3.\n\n\n\nLast.\n</think>\nThe answer is \\boxed{3}."


def test_paragraphs():
    cut = thoughts.paragraphs(CHAIN)
    assert [t.text for t in cut] == ["First.", "Then x < 3.", "Last."]
    assert "".join(t.prefix for t in cut) == "First.\n\nThen x < 3.\n\nLast.\n\n"
    assert thoughts.split_response(CHAIN)[1] == "The answer is \\boxed{3}."
    assert thoughts.split_response("no tags at all") == ("no tags at all", "")


def test_tags_keep_the_response_to_the_letter():
    response = "<think><episode_1>20*3=60</episode_1><episode_2>so 60</episode_2></think><answer>60</answer>"
    cut = thoughts.tags(response)
    assert [t.text for t in cut] == ["20*3=60", "so 60"]
    assert "".join(t.prefix for t in cut) == response.partition("</think>")[0]
    assert cut[0].prefix == "<think><episode_1>20*3=60</episode_1>"
    for bad in (
        "<answer>60</answer>",
        "<episode_1>a</episode_2></think>",
        "<episode_1>a</episode_1>b</think>",
    ):
        with pytest.raises(Rejected):
            thoughts.tags("<think>" + bad)


def test_a_thought_is_as_long_as_its_text():
    """20*3=60, 4*3=12 and 60+12=72; the tags around them do not count. LS Eq. 1"""
    assert thoughts.token_lengths(thoughts.tags(RESPONSE), Letters()) == [7, 6, 8]


STEPS = ["a", "b", "c", "d"]


def test_blocks_must_cover_every_step():
    answer = {
        "block 1": {"start": "1", "end": 1, "block type": "x"},
        "block 2": {"start": 2, "end": 4, "block type": "y"},
    }
    assert [(t.text, t.kind) for t in read_blocks(answer, STEPS)] == [("a", "x"), ("b\n\nc\n\nd", "y")]
    assert [t.text for t in read_blocks(list(answer.values()), STEPS)] == ["a", "b\n\nc\n\nd"]
    for spans, reason in [
        ([(1, 3)], "1 to 3 of 4"),
        ([(1, 2), (2, 4)], "step 3 is next"),
        ([(1, 2), (4, 4)], "step 3 is next"),
        ([(2, 4)], "step 1 is next"),
        ([(1, 5)], "1 to 5 of 4"),
        ([(1, 4), (5, 3)], "step 5 is next"),
    ]:
        with pytest.raises(Rejected, match=reason):
            read_blocks([{"start": a, "end": b} for a, b in spans], STEPS)
    for bad in (
        [],
        {},
        "text",
        [{"start": 1}],
        [{"start": "one", "end": 4}],
        [3],
        {"block 1": {"start": None, "end": 2}},
        [{"start": 1, "end": float("inf")}],
    ):
        with pytest.raises(Rejected):
            read_blocks(bad, STEPS)


def test_published_blocks_lose_nothing():
    """Their numbering starts before the thinking and they drop the tail: the last block takes it."""
    response = "<think>\n\nA\n\nB\n\nC\n</think>\n\nanswer"  # steps: "", A, B, "C\n"
    cut = thoughts.given_blocks(
        {"block 1": {"start": 1, "end": 2}, "block 2": {"start": 3, "end": 3}}, response
    )
    assert [t.text for t in cut] == ["A", "B\n\nC"]
    cut = thoughts.given_blocks(
        {"block 1": {"start": 1, "end": 3}, "block 2": {"start": 4, "end": 6}}, response
    )
    assert [t.text for t in cut] == ["A\n\nB", "C"]
    with pytest.raises(Rejected):
        thoughts.given_blocks(None, response)


# Reading a model's JSON

texts = st.text(st.characters(exclude_categories=("Cs", "Cc"), exclude_characters="\\"), max_size=12)


@given(
    st.recursive(
        st.one_of(st.integers(-1000, 1000), texts, st.booleans(), st.none()),
        lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(texts, inner, max_size=3)),
        max_leaves=8,
    )
)
def test_reads_what_json_writes(value):
    if (
        isinstance(value, (dict, list))
        and value
        and not any(mark in json.dumps(value) for mark in (",]", ",}", ", ]", ", }"))
    ):
        assert repair_json(f"Sure:\n```json\n{json.dumps(value, indent=1)}\n```") == value


@pytest.mark.parametrize(
    "text, value",
    [
        (
            "{'block 1': {'start': '1', 'end': '2', 'block type': 'the student\\'s plan'}}",
            {"block 1": {"start": "1", "end": "2", "block type": "the student's plan"}},
        ),
        ('{"a": [1, 2,], }', {"a": [1, 2]}),
        (
            r'[{"content": "so \frac{1}{2} \times 3 \neq \boxed{7}\nThen \\pi"}]',
            [{"content": "so \\frac{1}{2} \\times 3 \\neq \\boxed{7}\nThen \\pi"}],
        ),
        ('{"a": "two\nlines"}', {"a": "two\nlines"}),
        (
            r'["\neg p \nleq \nearrow \newline \nabla f \nu_1 + \nu \neq3 \ne 4 \notin S \not= 5"]',
            [r"\neg p \nleq \nearrow \newline \nabla f \nu_1 + \nu \neq3 \ne 4 \notin S \not= 5"],
        ),
        (
            r'["so\nother\nnext\nuntil\negative\n\nequals\n2"]',
            ["so\nother\nnext\nuntil\negative\n\nequals\n2"],
        ),
        ('As in [] and {x}: {"a": 1} and more {', {"a": 1}),
        ("{'a': 'it is John's \"x\"'}", {"a": 'it is John\'s "x"'}),
    ],
)
def test_forgives(text, value):
    assert repair_json(text) == value


@pytest.mark.parametrize(
    "text", ["", "no", "{", "{}", '{"a": ', "[" * 100_000, "{'a': __import__('os')}", '{"a" 1}']
)
def test_gives_up(text):
    with pytest.raises(Rejected):
        repair_json(text)


# An instruct model that answers from a script


class Letters:
    stop_ids = ()

    def encode(self, text):
        return [ord(c) for c in text]

    def encode_chat(self, messages):
        return self.encode(messages[-1]["content"])

    def decode(self, ids):
        return "".join(map(chr, ids))


class Scripted:
    """Gives out prepared texts, one list per call."""

    def __init__(self, *calls, context=100_000):
        self.calls, self.asked, self.keys = list(calls), [], []
        self.model = SimpleNamespace(config=SimpleNamespace(max_positions=context))

    def generate(self, prompts, *, keys, **options):
        self.asked.append([Letters().decode(p) for p in prompts])
        self.keys += keys
        return [[Completion(Letters().encode(text), [0.0] * len(text), "stop")] for text in self.calls.pop(0)]


GOOD = '{"block 1": {"start": 1, "end": 1, "block type": "plan"}, "block 2": {"start": 2, "end": 2, "block type": "compute"}}'
PROBLEMS = [Problem(7, "q7", "3", "math"), Problem(8, "q8", "3", "math")]


def test_the_chunker_is_asked_again_until_it_parses():
    model = Scripted([GOOD, "sorry"], ["{}"], [GOOD])
    cut = thoughts.chunk_by_model(Sampling(model, Letters(), 100, 0.1, 0), PROBLEMS, ["a\n\nb", "c\n\nd"])
    assert [[(t.text, t.kind) for t in chain] for chain in cut] == [
        [("a", "plan"), ("b", "compute")],
        [("c", "plan"), ("d", "compute")],
    ]
    assert "Step 1: a\nStep 2: b" in model.asked[0][0] and "q7" in model.asked[0][0]
    assert [len(asked) for asked in model.asked] == [2, 1, 1], "only what did not parse is asked again"
    assert len(set(model.keys)) == 4, "a second try must not repeat the first one's randomness"


def test_a_chunker_that_never_parses_is_given_up():
    model = Scripted(*[["no"]] * thoughts.TRIES)
    [why] = thoughts.chunk_by_model(Sampling(model, Letters(), 100, 0.1, 0), PROBLEMS[:1], ["a\n\nb"])
    assert isinstance(why, Rejected) and "no JSON" in str(why) and "5 answers" in str(why)
    assert why.said == "no"
    [why] = thoughts.chunk_by_model(
        Sampling(Scripted(context=50), Letters(), 10, 0.1, 0), PROBLEMS[:1], ["a\n\nb"]
    )
    assert "context of 50" in str(why)


@pytest.mark.parametrize("room", [0, -1])
def test_an_answer_may_end_at_the_last_place_of_the_context(room):
    asked = thoughts.chunk_request("q7", ["a", "b"])
    model = Scripted([GOOD], context=len(asked) + 100 + room)
    [chain] = thoughts.chunk_by_model(Sampling(model, Letters(), 100, 0.1, 0), PROBLEMS[:1], ["a\n\nb"])
    assert isinstance(chain, Rejected) == (room < 0)


CHAIN_OF_5 = [
    Thought(f"t{i}", f"t{i}\n\n", kind)
    for i, kind in enumerate(["plan", "set up", "solve", "check", "check"], start=1)
]
LABELS = ["long", "short", "long", "short", "short"]


def test_completion_is_matched_by_place():
    answer = '{"completed": [{"part": "Setting up", "content": "<answer>u2</answer>"}, {"part": "x", "content": "so \\boxed{3}"}]}'
    model = Scripted([answer])
    [texts] = thoughts.complete_by_model(
        Sampling(model, Letters(), 100, 0.1, 0), PROBLEMS[:1], ["q7 boxed"], [CHAIN_OF_5], [LABELS]
    )
    assert texts == ["t1", "u2", "t3", "so \\boxed{3}"]
    [[asked]] = model.asked
    assert (
        '"part 1": "t1"' in asked
        and '"part 2": "set up"' in asked
        and '"part 4": "check"' in asked
        and "q7 boxed" in asked
    )
    assert "t2" not in asked and "t4" not in asked, "short thoughts are named, not shown"


def test_requests_in_other_words():
    """Only the placeholders are filled in, once: braces of the text and of what is filled in stay."""
    prompts = Prompts(
        "L", "S", chunk='Q {problem}\n{steps}\n{"start": 1}', complete="{problem} {solution} {missing} {x}"
    )
    model = Scripted([GOOD])
    problem = Problem(7, "x in {steps}?", "3", "math")
    thoughts.chunk_by_model(Sampling(model, Letters(), 100, 0.1, 0), [problem], ["a\n\nb"], prompts=prompts)
    assert model.asked == [['Q x in {steps}?\nStep 1: a\nStep 2: b\n{"start": 1}']]
    chain = [Thought("t1", ""), Thought("t2", "", "check")]
    model = Scripted(['["so \\boxed{3}"]'])
    thoughts.complete_by_model(
        Sampling(model, Letters(), 100, 0.1, 0),
        [problem],
        ["q"],
        [chain],
        [["long", "short"]],
        prompts=prompts,
    )
    assert model.asked == [['q {"part 1": "t1"\n"part 2": "check"} part 2 (check) {x}']]


def test_completion_must_have_every_part():
    assert thoughts.read_completion([{"thought": "a", "content": "x"}, "y"], 2) == ["x", "y"]
    assert thoughts.read_completion({"part 2": "x", "part 4": "y"}, 2) == ["x", "y"]
    for bad in ([{"content": "x"}], [{"content": "x"}, {"content": " "}], "text", {"a": [1], "b": [2]}):
        with pytest.raises(Rejected):
            thoughts.read_completion(bad, 2)


# Segments and the cold start


def test_segments_and_cold_start_of_the_paper():
    texts = ["t1", "s2\n\ns3", "t4", "\\boxed{3}"]
    labels = ["long", "short", "short", "long", "short"]
    talk = segments(texts, labels, PROBLEMS[0])
    assert talk == [
        "<think>t1</think>",
        "<answer>s2\n\ns3</rethink>",
        "<think>t4</think>",
        "<answer>\\boxed{3}</answer>",
    ]
    long, short = cold_start("q", talk, Prompts("L", "S", joiner=""))
    assert [row["output"] for row in long] == [talk[0], talk[2]] and [row["output"] for row in short] == [
        talk[1],
        talk[3],
    ]
    assert [row["instruction"] for row in long + short] == ["L", "L", "S", "S"]
    assert long[0]["input"] == "q" and long[1]["input"] == "q<think>t1</think><answer>s2\n\ns3</rethink>"
    assert short[0]["input"] == "q<think>t1</think>" and short[1]["input"] == "q" + "".join(talk[:3])


def test_only_conversations_that_end_right_are_kept():
    with pytest.raises(Rejected, match="gold"):
        segments(["t1", "\\boxed{4}"], ["long", "short"], PROBLEMS[0])
    with pytest.raises(Rejected, match="gold"):
        segments(["t1 \\boxed{3}", "done"], ["long", "short"], PROBLEMS[0])


def test_completion_by_block_gives_the_answer_once():
    problem = Problem(0, "20*3+4?", "64", "arith")
    chain = [Thought("20*3=60", ""), Thought("60+4=64", ""), Thought("so 64", "")]
    labels = ["long", "short", "short"]
    assert thoughts.complete_by_block(problem, chain, labels, "64") == ["20*3=60", "60+4=64\n\nso 64\n64"]
    chain[2] = Thought("64", "")
    assert thoughts.complete_by_block(problem, chain, labels, "64") == ["20*3=60", "60+4=64\n\n64"]
    assert (
        segments(["20*3=60", "60+4=64\n\nso 64\n64"], labels, problem)[1]
        == "<answer>60+4=64\n\nso 64\n64</answer>"
    )


# Rollouts with the real sampler


@pytest.fixture(scope="module")
def tiny():
    tokenizer = Tokenizer(TINY)
    return Sampler(load_model(TINY), tokenizer, num_pages=200)


RESPONSE = (
    "<think><episode_1>20*3=60</episode_1><episode_2>4*3=12</episode_2><episode_3>60+12=72</episode_3></think>"
    "<answer>72</answer>"
)


def test_a_chain_goes_through_the_model_once(tiny):
    problem, chain = Problem(3, "24*3?", "72", "arith"), thoughts.tags(RESPONSE)
    before = tiny.forwards.prefill
    [prefixes] = thoughts.rollouts(Sampling(tiny, tiny.tokenizer, 40, 1.0, 0), [problem], [chain], n=4)
    tokens = len(prompt_ids(problem, tiny.tokenizer)) + len(
        tiny.tokenizer.encode(RESPONSE.partition("</think>")[0])
    )
    assert tiny.forwards.prefill - before == tokens - 1, "the last token is fed as the first decode step"
    assert tiny.pool.free_pages == tiny.pool.num_pages, "every page was given back"
    assert [p.rollouts for p in prefixes] == [4, 4, 4]
    assert prefixes[2].accuracy >= 0.75, "with the sum written down, what is left is to copy it"
    assert prefixes[2].new_tokens < prefixes[0].new_tokens


@pytest.mark.slow
def test_rollouts_are_those_of_the_prefix_alone(tiny):
    """Slow twin: every prefix as a prompt of its own."""
    problem, chain = Problem(3, "24*3?", "72", "arith"), thoughts.tags(RESPONSE)
    [prefixes] = thoughts.rollouts(Sampling(tiny, tiny.tokenizer, 40, 1.0, 5), [problem], [chain], n=4)
    for i, prefix in enumerate(prefixes, start=1):
        text = "".join(t.prefix for t in chain[:i])
        prompt = prompt_ids(problem, tiny.tokenizer) + tiny.tokenizer.encode(text)
        keys = [(thoughts.ROLLOUT, problem.id, i, sample) for sample in range(4)]
        [group] = tiny.generate([prompt], n=4, max_tokens=40, temperature=1.0, seed=5, keys=keys)
        right = sum(thoughts.grade(text + tiny.tokenizer.decode(c.tokens), "72", "arith") for c in group)
        assert prefix == Prefix(right, 4, sum(len(c.tokens) for c in group) / 4)


def test_a_cut_continuation_is_graded_by_what_it_says_itself(tiny):
    """The chain mentions the answer at once. Cut in its thinking, the model has not given it; at its own
    end, it has.
    """
    problem = Problem(3, "24*3?", "72", "arith")
    chain = [Thought("", "<answer>72</answer><think>"), *thoughts.tags(RESPONSE)]
    chain[1] = Thought(chain[1].text, chain[1].prefix.removeprefix("<think>"))

    def accuracies(chain: list[Thought], max_tokens: int) -> list[float]:
        [prefixes] = thoughts.rollouts(
            Sampling(tiny, tiny.tokenizer, max_tokens, 0.0, 0), [problem], [chain], 1
        )
        return [prefix.accuracy for prefix in prefixes]

    assert accuracies(chain, max_tokens=3) == [0, 0, 0, 0]
    assert accuracies(chain, max_tokens=100)[-1] == 1
    assert accuracies([Thought("", RESPONSE)], max_tokens=3) == [1], "what is left is to end"


def test_chains_that_cannot_be_rolled_out(tiny):
    problem, chain = Problem(3, "24*3?", "72", "arith"), thoughts.tags(RESPONSE)
    thoughts.require_chain(problem, chain, tiny.tokenizer, context=100, max_tokens=40)
    for bad, context, reason in [
        (chain[:1], 100, "one thought"),
        ([], 100, "no thought"),
        (chain, 60, "no room for 40"),
    ]:
        with pytest.raises(Rejected, match=reason):
            thoughts.require_chain(problem, bad, tiny.tokenizer, context, max_tokens=40)


def test_a_rollout_may_end_at_the_last_place_of_the_context(tiny):
    problem, chain = Problem(3, "24*3?", "72", "arith"), thoughts.tags(RESPONSE)
    length = len(prompt_ids(problem, tiny.tokenizer)) + sum(
        len(tiny.tokenizer.encode(t.prefix)) for t in chain
    )
    thoughts.require_chain(problem, chain, tiny.tokenizer, length + 40, 40)
    with pytest.raises(Rejected, match=f"have {length} tokens: no room for 40"):
        thoughts.require_chain(problem, chain, tiny.tokenizer, length + 39, 40)


def test_plot(tmp_path):
    items = [
        {"importance": [0.4, -0.25], "accuracies": [0.5, 0.5]},
        {"importance": [0.1, 0.2, 0.0], "accuracies": [0, 0.5, 1]},
    ]
    thoughts.plot(items, tmp_path / "importance.png")
    assert (tmp_path / "importance.png").stat().st_size > 1000

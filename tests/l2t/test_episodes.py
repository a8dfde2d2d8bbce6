import itertools
import random

import pytest
import tokenizers
import torch

from thinkrl.grading import RULES, extract, grade
from thinkrl.l2t.episodes import CLOSE, TAG, segment
from thinkrl.tracing import trace, trace_ref
from thinkrl.types import UserError


class Words:
    """A vocabulary of whole words: every id is one of `words`."""

    def __init__(self, *words: str):
        self.words = words
        self.stop_ids = [words.index("<eos>")] if "<eos>" in words else []

    def encode(self, text):
        ids = []
        while text:
            word = max((w for w in self.words if text.startswith(w)), key=len, default="?")
            ids.append(self.words.index(word))
            text = text[len(word) :]
        return ids

    def decode(self, ids):
        return "".join(self.words[i] for i in ids)


TAGS = [f"<{slash}episode_{k}>" for k in range(1, 5) for slash in ("", "/")]
WORDS = Words(
    *"<think> </think> <answer> </answer> <eos> a b c 5 \\boxed{ } ?".split(), "\n\n", "#### ", *TAGS
)


class Bpe:
    """A byte-level BPE trained on `corpus`, so that it has tokens across the borders of tags."""

    def __init__(self, corpus, vocab_size=400):
        self.bpe = tokenizers.Tokenizer(tokenizers.models.BPE())
        self.bpe.decoder = tokenizers.decoders.ByteLevel()
        self.bpe.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        trainer = tokenizers.trainers.BpeTrainer(
            vocab_size=vocab_size,
            special_tokens=["<eos>"],
            initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
            max_token_length=6,
            show_progress=False,
        )
        self.bpe.train_from_iterator(corpus, trainer)
        self.stop_ids = [self.bpe.token_to_id("<eos>")]

    def encode(self, text):
        return self.bpe.encode(text, add_special_tokens=False).ids

    def decode(self, ids):
        return self.bpe.decode(ids, skip_special_tokens=False)


def chain(steps, numbers=None):
    numbers = numbers or range(1, len(steps) + 1)
    return "".join(f"<episode_{k}>{step}</episode_{k}>" for k, step in zip(numbers, steps))


BPE = Bpe([f"<think>{chain(['1+2=3', 'ok', 'so 3'])}</think><answer>3</answer>", "naïve → 日本 🙂"] * 20)


def cut_text(text, how="tags", vocabulary=WORDS):
    """Each episode's text and each cut's prefix, and the Episodes."""
    tokens = vocabulary.encode(text)
    e = segment(tokens, vocabulary, how)
    spans = [
        vocabulary.decode([t for t, k in zip(tokens, e.ids.tolist()) if k == episode])
        for episode in range(len(e))
    ]
    return spans, [vocabulary.decode(tokens[:n]) for n in e.prefixes], e


def test_positions_of_the_worked_example():
    e = segment(WORDS.encode("<think><episode_1>ab</episode_1><episode_2>c</episode_2></think>5<eos>"), WORDS)
    assert e.ids.tolist() == [0, 0, 0, 0, 0, 1, 1, 1, 1, 1, 1]
    assert e.ends.tolist() == [4, 10]
    assert e.cuts.tolist() == [4, 7]
    assert (e.start, e.malformed, len(e)) == (0, False, 2)
    assert e.lengths.tolist() == [5, 6]
    assert e.prefixes == [1, 5, 8]


@pytest.mark.parametrize(
    "text, spans, prefixes, malformed",
    [
        # the prompt opened the thinking
        (
            "<episode_1>a</episode_1><episode_2>b</episode_2></think>5<eos>",
            ["<episode_1>a</episode_1>", "<episode_2>b</episode_2></think>5<eos>"],
            ["", "<episode_1>a</episode_1>", "<episode_1>a</episode_1><episode_2>b</episode_2>"],
            False,
        ),
        # text before and between
        (
            "<think>c<episode_1>a</episode_1>c<episode_2>b</episode_2>c</think>5",
            ["<think>c<episode_1>a</episode_1>", "c<episode_2>b</episode_2>c</think>5"],
            [
                "<think>",
                "<think>c<episode_1>a</episode_1>",
                "<think>c<episode_1>a</episode_1>c<episode_2>b</episode_2>",
            ],
            False,
        ),
        # truncated inside an episode
        (
            "<think><episode_1>a</episode_1><episode_2>bb",
            ["<think><episode_1>a</episode_1>", "<episode_2>bb"],
            ["<think>", "<think><episode_1>a</episode_1>", "<think><episode_1>a</episode_1><episode_2>bb"],
            True,
        ),
        # left open, and then answered
        (
            "<episode_1>a</episode_1><episode_2>b</think><answer>5</answer><eos>",
            ["<episode_1>a</episode_1>", "<episode_2>b</think><answer>5</answer><eos>"],
            ["", "<episode_1>a</episode_1>", "<episode_1>a</episode_1><episode_2>b"],
            True,
        ),
        # truncated between episodes: the rest joins the last closed one
        (
            "<episode_1>a</episode_1>bb",
            ["<episode_1>a</episode_1>bb"],
            ["", "<episode_1>a</episode_1>"],
            False,
        ),
        # a number is skipped: episodes all the same
        (
            "<episode_1>a</episode_1><episode_3>b</episode_3></think>5",
            ["<episode_1>a</episode_1>", "<episode_3>b</episode_3></think>5"],
            ["", "<episode_1>a</episode_1>", "<episode_1>a</episode_1><episode_3>b</episode_3>"],
            True,
        ),
        # closed by another's tag, or without being opened: not an episode
        (
            "<episode_1>a</episode_2><episode_2>b</episode_2></think>5",
            ["<episode_1>a</episode_2><episode_2>b</episode_2></think>5"],
            ["", "<episode_1>a</episode_2><episode_2>b</episode_2>"],
            True,
        ),
        # no tags, empty thinking, only an answer
        ("<think>ab</think>5<eos>", ["<think>ab</think>5<eos>"], ["<think>", "<think>ab"], True),
        ("<think></think>5<eos>", ["<think></think>5<eos>"], ["<think>", "<think>"], True),
        ("</think>5<eos>", ["</think>5<eos>"], ["", ""], True),
        ("<answer>5</answer><eos>", ["<answer>5</answer><eos>"], ["", ""], True),
        ("ab\\boxed{5}", ["ab\\boxed{5}"], ["", "ab"], True),
        ("ab\n\n#### 5\n\n", ["ab\n\n#### 5\n\n"], ["", "ab\n\n"], True),
        ("#### a", ["#### a"], ["", "#### a"], True),  # a headline
        ("ab<eos>", ["ab<eos>"], ["", "ab"], True),
        # tags in the answer are words like any others
        (
            "<episode_1>a</episode_1></think><episode_2>b</episode_2>",
            ["<episode_1>a</episode_1></think><episode_2>b</episode_2>"],
            ["", "<episode_1>a</episode_1>"],
            False,
        ),
    ],
)
def test_tags(text, spans, prefixes, malformed):
    got_spans, got_prefixes, e = cut_text(text)
    assert got_spans == spans
    assert got_prefixes == prefixes
    assert e.malformed == malformed


def test_paragraphs():
    spans, prefixes, e = cut_text("<think>\n\na\n\nb\n\n\n\nc</think>5\n\n5<eos>", "paragraphs")
    assert spans == ["<think>\n\na\n\n", "b\n\n\n\n", "c</think>5\n\n5<eos>"]
    assert prefixes == [
        "<think>",
        "<think>\n\na\n\n",
        "<think>\n\na\n\nb\n\n\n\n",
        "<think>\n\na\n\nb\n\n\n\nc",
    ]
    assert not e.malformed
    assert cut_text("a\n\nb\n\n</think>5", "paragraphs")[0] == ["a\n\n", "b\n\n</think>5"]
    assert cut_text("<think>\n\n</think>5", "paragraphs")[0] == ["<think>\n\n</think>5"]
    assert cut_text("a\n\nc\\boxed{5}", "paragraphs")[1] == ["", "a\n\n", "a\n\nc"]


def test_a_probe_may_see_a_token_that_only_begins_the_closing_tag():
    """`b</` ends the text so far and may be cut off; `think>5` completes the tag and tells the answer."""
    words = Words("<think>", "a", "b</", "think>5", "<eos>")
    e = segment([0, 1, 2, 3, 4], words, "fixed:1")
    assert e.prefixes == [1, 2, 3]


def test_fixed_length():
    spans, prefixes, _ = cut_text("<think>abcabcab</think>5<eos>", "fixed:3")
    assert spans == ["<think>abc", "abc", "ab</think>5<eos>"]
    assert prefixes == ["<think>", "<think>abc", "<think>abcabc", "<think>abcabcab"]
    assert cut_text("abcabc</think>5", "fixed:3")[0] == ["abc", "abc</think>5"]
    assert cut_text("</think>5", "fixed:3")[1] == ["", ""]
    assert cut_text("abca<eos>", "fixed:3")[0] == ["abc", "a<eos>"]


def test_no_tokens_no_episodes():
    e = segment([], WORDS)
    assert len(e) == 0 and e.ids.shape == e.cuts.shape == (0,) and e.prefixes == [0]


def test_tokens_across_tags_belong_to_the_earlier_episode():
    text = f"<think>{chain(['1+2=3', 'ok'])}</think><answer>3</answer><eos>"
    tokens = BPE.encode(text)
    pieces = [BPE.decode([t]) for t in tokens]
    straddling = [p for p in pieces if "><" in p]
    assert len(straddling) >= 2, pieces  # the vocabulary does what this test is about
    spans, prefixes, e = cut_text(text, vocabulary=BPE)
    border = f"<think>{chain(['1+2=3'])}"
    assert "".join(spans) == text
    assert spans[0].startswith(border) and spans[0] != border
    assert not e.malformed and len(e) == 2
    assert border in prefixes[1] and chain(["1+2=3", "ok"]) in prefixes[2]
    assert CLOSE not in prefixes[2]


def test_characters_spread_over_tokens_are_there_with_their_last_byte():
    text = "日本🙂naïve"
    bytewise = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokens = [BPE.bpe.token_to_id(letter) for letter in bytewise.pre_tokenize_str(text)[0][0]]
    assert len(tokens) == len(text.encode()) and BPE.decode(tokens) == text
    traced, reached = trace(tokens, BPE)
    assert traced == text
    assert reached == [0, 0, 1, 1, 1, 2, 2, 2, 2, 3, 4, 5, 5, 6, 7, 8]


def pieces_of_tags(rng):
    """A random jumble of tags, parts of tags, and text."""
    words = [
        "a ",
        "1+2=3",
        "→",
        "</",
        "episode_1>",
        "\n\n",
        "#### 7\n",
        "#### So 8 a\n",
        "\\fbox {3}",
        "<answer>5</answer>",
    ]
    parts = [*TAGS, "<think>", CLOSE, *words]
    return "".join(rng.choices(parts, k=rng.randint(1, 14))) + rng.choice(["", "<eos>"])


@pytest.mark.parametrize("how", ["tags", "paragraphs", "fixed:4"])
def test_every_token_has_one_episode_and_no_probe_sees_the_answer(how):
    rng = random.Random(how)
    for _ in range(300):
        text = pieces_of_tags(rng)
        if rng.random() < 0.3:
            text = chain(rng.choices(["1+2=3", "ok", "so 3"], k=rng.randint(1, 4))) + text
        tokens = BPE.encode(text)
        e = segment(tokens, BPE, how)
        K = len(e)
        assert e.ids.tolist() == sorted(e.ids.tolist()) and sorted(set(e.ids.tolist())) == list(range(K)), (
            text
        )
        assert e.ends[-1] == len(tokens) - 1 and e.lengths.min() >= 1 and e.lengths.sum() == len(tokens), text
        assert torch.equal(e.ids[e.ends], torch.arange(K)), text
        assert (e.cuts <= e.ends).all() and all(
            a <= b for a, b in itertools.pairwise([e.start, *e.cuts.tolist()])
        ), text
        seen = BPE.decode(tokens[: e.prefixes[-1]])
        assert CLOSE not in seen and "<eos>" not in seen, text
        marked = [rule for rule in RULES if rule != "last_number"]  # which has no marker to be found by
        for answer, rule in ((extract(text, rule), rule) for rule in marked if CLOSE not in text):
            assert answer is None or extract(seen, rule) != answer, text
        if how == "tags" and not e.malformed:
            assert [m[0] for m in TAG.finditer(text.split(CLOSE)[0])][: 2 * K] == TAGS[: 2 * K], text


@pytest.mark.parametrize(
    "rule, answer",
    [
        *(("gsm8k", f"#### {form}") for form in ("42", "42 dollars", "**42**", "The answer is 42", "42%", "+42", "42. Done", "$42",
                                                "84/2", "42 dollars\n\nYes, 42.0:\n\n#### 42")),
        *(("math", form) for form in (r"\boxed{42}", r"\boxed {42}", r"\fbox{42}", "\\boxed\n{42}", r"$\boxed{42}$, so \boxed{42")),
        ("arith", "<answer>42</answer>"), ("gsm8k", r"\boxed{42}"), ("gsm8k", r"\boxed 42"), ("math", r"$\boxed 42$"),
    ],
)  # fmt: skip
def test_no_probe_sees_what_the_grader_reads(rule, answer):
    thinking = f"{chain(['1+2=3'])}\n\n#### Step 2\n\nso 3\n\n"
    tokens = BPE.encode(thinking + answer)
    assert grade(thinking + answer, "42", rule)
    for how in ("tags", "paragraphs", "fixed:4"):
        seen = BPE.decode(tokens[: segment(tokens, BPE, how).prefixes[-1]])
        assert not grade(seen, "42", rule), how
        if rule == "gsm8k" and how != "tags":
            assert "so 3" in seen, "a headline before the answer is thinking"


def test_fast_and_incremental_traces_agree():
    rng = random.Random(0)
    for _ in range(200):
        tokens = BPE.encode(pieces_of_tags(rng))
        assert trace(tokens, BPE) == trace_ref(tokens, BPE)


def test_misuse_is_explained():
    for how in ("tag", "fixed", "fixed:", "fixed:0", "fixed:-3", "fixed:x"):
        with pytest.raises(UserError, match="tags, paragraphs or fixed:N"):
            segment([1], WORDS, how)
    unwritable = Words("a", "b", "?")
    with pytest.raises(UserError, match="paragraphs or fixed:N"):
        segment([0], unwritable)
    assert len(segment([0, 1], unwritable, "fixed:1")) == 2

"""Ends of a forced answer in a vocabulary whose tokens cross prefix, answer and terminator."""

import json

import pytest
import torch
from tokenizers import Tokenizer as Raw
from tokenizers import decoders, models, pre_tokenizers, trainers

from thinkrl.l2t.episodes import segment
from thinkrl.l2t.gain import (
    FORCING,
    Gain,
    answer_probability,
    endings_ref,
    ids_ending_a_number_ref,
    make_probe,
    predicted_correctness_ref,
)
from thinkrl.learner import TINY
from thinkrl.model import ModelConfig, Transformer
from thinkrl.sampler import Sampler
from thinkrl.tokenizer import Tokenizer


@pytest.fixture(scope="module")
def bpe(tmp_path_factory) -> Tokenizer:
    """A byte-level BPE that has learnt `}.`, `}\n`, `}}`, `{\\`, `>\n` and ` 42` as single tokens."""
    raw = Raw(models.BPE())
    raw.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(" ", "merged_with_next"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    raw.decoder = decoders.ByteLevel()
    text = ["{7}. {8}\n {9}} {\\ {( <answer>5</answer>\n ####", " 42\n 42. 42 apples"] * 20
    trainer = trainers.BpeTrainer(
        vocab_size=600, special_tokens=["<eos>"], initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    raw.train_from_iterator(
        [piece for line in text for piece in ("}.", "}\n", "}}", "{\\", ">\n", line)], trainer
    )
    folder = tmp_path_factory.mktemp("bpe")
    raw.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<eos>"}))
    return Tokenizer(folder)


CASES = [
    ("math", "12"),
    ("math", r"\frac{3}{4}"),
    ("math", "(1,2)"),
    ("arith", "42"),
    ("gsm8k", "42"),
    ("gsm8k", "-3"),
]


def test_the_vocabulary_has_the_merges_that_are_tested(bpe):
    assert {"}.", "}\n", "}}", "{\\", " 42"} <= set(bpe.pieces)


@pytest.mark.parametrize("rule, answer", [case for case in CASES if case[0] != "gsm8k"])
def test_every_id_that_completes_the_answer_is_found(bpe, rule, answer):
    prefix, suffix = FORCING[rule]
    probe = make_probe(bpe, answer, prefix, suffix)
    text = (prefix + answer + suffix)[len(bpe.decode(probe.forced)) :]
    assert probe.endings and probe.endings == endings_ref(bpe, probe.gold, text)


def test_what_a_terminator_merges_with(bpe):
    probe = make_probe(bpe, "12", *FORCING["math"])
    ends = {bpe.pieces[v] for v in dict(probe.endings)[len(probe.gold) - 1]}
    assert {"}.", "}\n", "}}"} <= ends and "}" not in ends, "what stands in gold is not counted twice"
    braces = make_probe(bpe, r"\frac{3}{4}", *FORCING["math"])
    assert bpe.pieces[braces.gold[0]].startswith("{\\") and not bpe.decode(braces.forced).endswith("{")
    places = [{bpe.pieces[v] for v in ids} for _, ids in braces.endings]
    assert "}}" in places[0], "answer and terminator in one token"
    number = make_probe(bpe, "42", *FORCING["gsm8k"])
    assert bpe.pieces[number.gold[0]].startswith(" 42")


def test_what_ends_a_number(bpe):
    """Nothing behind which 42 may still become 427, 42.5, 42,000, 42/5 or 42e3."""
    probe = make_probe(bpe, "42", *FORCING["gsm8k"])
    ((place, ids),) = probe.endings
    assert place == len(probe.gold) - 1 and probe.gold[-1] == bpe.eos_id
    ends = {bpe.pieces[v] for v in ids}
    assert {"\n", "%", "k", "}."} <= ends
    assert not ends & {"7", ".", ",", "/", "e", "E", " ", " 42"}


def test_what_ends_a_number_is_what_the_grader_reads_as_its_end(bpe):
    ((_, ids),) = make_probe(bpe, "42", *FORCING["gsm8k"]).endings
    fast, slow = {*ids, bpe.eos_id}, set(ids_ending_a_number_ref(bpe))
    assert fast <= slow and len(fast) > 100
    missed = [bpe.pieces[i] for i in slow - fast]  # separators, and groups of digits as in 42 000
    assert not any(c.isalpha() for piece in missed for c in piece), missed


@pytest.mark.parametrize("rule, answer", CASES)
@pytest.mark.parametrize("max_tokens_per_forward", [8192, 30])
def test_j_on_forked_pages_is_that_of_the_whole_vocabulary(bpe, rule, answer, max_tokens_per_forward):
    torch.manual_seed(0)
    config = ModelConfig(
        "Qwen3ForCausalLM", vocab_size=bpe.vocab_size, width=16, layers=2, heads=2, kv_heads=1, head_dim=8,
        mlp_width=24, max_positions=256,
    )  # fmt: skip
    model = Transformer.random(config, 0)
    sampler = Sampler(model, bpe, num_pages=200, page_size=4, max_tokens_per_forward=max_tokens_per_forward)
    probes = [make_probe(bpe, answer, *FORCING[rule]), make_probe(bpe, "7", *FORCING[rule])]
    prompts = [[5, 6, 7], [9]]
    gain = Gain(sampler, probes, lambda tokens: segment(tokens, bpe, "fixed:5"))
    groups = sampler.generate(prompts, n=2, max_tokens=12, on_finish=gain.on_finish)
    completions = [(i, c) for i, group in enumerate(groups) for c in group]
    for (i, completion), (episodes, J) in zip(completions, gain.results(), strict=True):
        expected = predicted_correctness_ref(model, prompts[i], completion.tokens, episodes, probes[i])
        torch.testing.assert_close(J, expected, rtol=1e-4, atol=0)


def test_a_writer_of_merged_terminators_has_predicted_its_answer(bpe):
    """P(1) = P(2) = 1, then `}.` .9 and `}` .1: J is 1, of which the token `}` alone tells a tenth."""
    probe = make_probe(bpe, "12", *FORCING["math"])
    logprob = torch.zeros(len(probe.suffix) + len(probe.endings))
    logprob[len(probe.suffix) - 1] = torch.tensor(0.1).log()
    logprob[len(probe.suffix) :] = torch.tensor([0.9] * 1 + [0.0] * (len(probe.endings) - 1)).log()
    if len(probe.endings) > 1:
        logprob[len(probe.suffix) :] = logprob[len(probe.suffix) :].flip(0)
    assert float(answer_probability(logprob, probe)) == pytest.approx(1.0)


def test_the_embedded_vocabulary_has_one_terminator():
    tokenizer = Tokenizer(TINY)
    probe = make_probe(tokenizer, "2244", *FORCING["arith"])
    assert probe.endings == () and probe.suffix == tokenizer.encode("</think><answer>2244</answer>")

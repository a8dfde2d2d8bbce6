"""Rows of every layout become the ids that the policy would see and write."""

import json

import pytest
import torch
from tokenizers import Tokenizer as Ids
from tokenizers import models

from thinkrl.config import parse
from thinkrl.longshort.cold_start import row_prompt
from thinkrl.longshort.conversation import Prompts, build, example
from thinkrl.sft import Row, load_rows, nll_loss, samples, with_steps
from thinkrl.tokenizer import Tokenizer
from thinkrl.types import UserError, pack


def user(text):
    return [{"role": "user", "content": text}]


def test_each_message_of_the_assistant_is_a_row(tmp_path):
    """As it would be sampled, after the messages before it."""
    talk = [
        *user("q1"),
        {"role": "assistant", "content": "a1"},
        *user("q2"),
        {"role": "assistant", "content": "a2"},
    ]
    (tmp_path / "rows.json").write_text(json.dumps([{"messages": talk}, {"prompt": "p", "completion": "c"}]))
    where = f"{tmp_path}/rows.json"
    assert load_rows(where) == [
        Row(talk[:1], "a1", f"{where}:1"),
        Row(talk[:3], "a2", f"{where}:1"),
        Row(user("p"), "c", f"{where}:2"),
    ]


def test_rows_of_several_files_with_columns_and_bad_rows(tmp_path, capsys):
    (tmp_path / "a.jsonl").write_text('{"q": "p", "a": "c"}\n{"q": "p"}\n')
    (tmp_path / "b.csv").write_text("q,a\nr,s\n")
    spec = f"{tmp_path}/a.jsonl+{tmp_path}/b.csv"
    with pytest.raises(
        UserError, match="a.jsonl:2: field 'completion' .*; --skip_bad_rows leaves such rows out"
    ):
        load_rows(spec, columns="problem=q,completion=a")
    rows = load_rows(spec, columns="problem=q,completion=a", skip_bad_rows=True)
    assert [(row.messages, row.completion) for row in rows] == [(user("p"), "c"), (user("r"), "s")]
    assert "a.jsonl: skipped 1 of its rows" in capsys.readouterr().err


@pytest.fixture
def tokenizer(tmp_path):
    """One id per character: a=0, b=1, c=2, <eos>=3, but bc=7 is one; and a template that writes [user
    message].
    """
    vocabulary = {"a": 0, "b": 1, "c": 2, "<eos>": 3, "[": 4, "]": 5, "\n": 6, "bc": 7}
    ids = Ids(models.BPE(vocabulary, merges=[("b", "c")]))
    ids.add_special_tokens(["<eos>"])
    ids.save(str(tmp_path / "tokenizer.json"))
    template = "{% for m in messages %}[{{ m['content'] }}]{% endfor %}"
    (tmp_path / "tokenizer_config.json").write_text(
        json.dumps({"eos_token": "<eos>", "chat_template": template})
    )
    return Tokenizer(tmp_path)


def test_samples_train_the_completion_and_its_end(tokenizer):
    first, second = samples([Row(user("ab"), "ca"), Row(user("b"), "c")], tokenizer)
    assert (first.prompt, first.completion) == ([4, 0, 1, 5], [2, 0, 3])
    (row,) = pack([first, second], budget=100)
    assert row.tokens.tolist() == [4, 1, 5, 2, 3, 4, 0, 1, 5, 2, 0, 3]
    assert row.mask.tolist() == [0, 0, 0, 1, 1, 0, 0, 0, 0, 1, 1, 1]
    assert row.ids == ["1", "0"]


def test_a_row_beyond_the_context_is_named(tokenizer, tmp_path):
    rows = [{"prompt": "ab", "completion": "c"}, {"prompt": "ab", "completion": "ca"}]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    rows = load_rows(tmp_path / "rows.jsonl")
    assert [len(sample) for sample in samples(rows, tokenizer, context=7)] == [6, 7]
    with pytest.raises(
        UserError,
        match="rows.jsonl:2: prompt and completion have 7 tokens, more than the model's context of 6",
    ):
        samples(rows, tokenizer, context=6)


def test_a_row_of_a_conversation_has_the_ids_of_reinforcement_learning(tokenizer, tmp_path):
    """Two turns "b" and "c" stay two ids, as they were when they were sampled; read as alpaca they would
    merge.
    """
    prompts = Prompts("a", "a", joiner="")
    row = example("long", "a", ["b", "c"], "ca", prompts)
    assert row["instruction"] + "\n" + row["input"] == "a\nabc"
    (tmp_path / "rows.jsonl").write_text(
        "\n".join(json.dumps(r) for r in (row, {k: row[k] for k in row if k != "conversation"}))
    )
    told, alpaca = samples(load_rows(tmp_path / "rows.jsonl"), tokenizer, encode=row_prompt)
    assert told.prompt == build("long", "a", ["b", "c"], tokenizer, prompts) == [4, 0, 6, 0, 1, 2, 5]
    assert alpaca.prompt == [4, 0, 6, 0, 7, 5] and told.completion == alpaca.completion == [2, 0, 3]


def test_epochs_are_steps_of_whole_batches():
    """700 rows in steps of 64 are 10 steps and 60 rows over: three passes are 30 steps."""
    config = parse(["sft", "--model", "some/folder", "--data", "rows.jsonl"])
    assert (config.epochs, config.problems_per_step) == (3, 64)
    assert with_steps(config, 700).steps == 30
    for argv, steps in ((["--epochs", "5"], 50), (["--steps", "7"], 7), (["--epochs", "0"], 500)):
        other = parse(["sft", "--model", "some/folder", "--data", "rows.jsonl", *argv])
        assert with_steps(other, 700).steps == steps
    assert with_steps(parse(["sft", "--data", "rows.jsonl"]), 700).steps == 300, "the embedded model's own"
    with pytest.raises(UserError, match="--steps 7 and --epochs 2: one of them says how long sft trains"):
        parse(["sft", "--data", "rows.jsonl", "--steps", "7", "--epochs", "2"])


def test_nll_by_hand():
    logprob = torch.tensor([float("nan"), -1.0, -3.0, -5.0], requires_grad=True)
    mask = torch.tensor([0.0, 1.0, 1.0, 0.0])
    loss = nll_loss(logprob, mask, 8.0)
    loss.backward()
    assert loss.item() == 0.5
    assert logprob.grad.tolist() == [0.0, -0.125, -0.125, 0.0]
    assert nll_loss(logprob, torch.zeros(4), 0.0).item() == 0.0


def test_nll_does_not_depend_on_how_the_step_is_cut():
    logprob, mask = -torch.arange(6.0), torch.tensor([0.0, 1, 1, 0, 1, 1])
    whole = nll_loss(logprob, mask, mask.sum())
    assert whole == (1 + 2 + 4 + 5) / 4
    assert nll_loss(logprob[:3], mask[:3], mask.sum()) + nll_loss(logprob[3:], mask[3:], mask.sum()) == whole

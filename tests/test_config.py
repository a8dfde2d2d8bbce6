"""Options: where a value comes from, and the sentence that a mistake gets."""

import dataclasses
import subprocess
import sys

import pytest

from helpers import ROOT
from thinkrl import UserError, config
from thinkrl.config import Config, exit_with_error, help_text, parse


def test_later_sources_win():
    assert parse(["grpo", "--model", "some/folder"]).lr == Config.lr == 1e-6
    assert parse(["grpo"]).lr == config.EMBEDDED_VALUES["grpo"]["lr"]
    assert parse(["grpo", "--lr", "0.5"]).lr == 0.5
    assert parse(["l2t"]).statistic == "return_sum"
    assert parse(["l2t", "--profile", "paper"]).statistic == "token_trunc_mean"
    assert parse(["l2t", "--profile", "paper", "--statistic", "return_sum"]).statistic == "return_sum"


def test_published_l2t_values_on_a_real_model():
    c = parse(["l2t", "--model", "some/folder"])
    assert (c.alpha, c.beta, c.lr, c.schedule, c.warmup, c.weight_decay) == (
        0.8,
        0.6,
        1e-6,
        "cosine",
        0.1,
        0.01,
    )
    assert (c.problems_per_step * c.group_size, c.max_tokens, c.keep) == (256, 16384, 0.95)


def test_spellings_of_an_option():
    assert parse(["--max-tokens=7"]).max_tokens == parse(["--max_tokens", "7"]).max_tokens == 7
    assert parse(["--wandb"]).wandb and not parse(["--wandb", "false"]).wandb
    assert parse(["--suffix=--x"]).suffix == "--x"


@pytest.mark.parametrize(
    "argv, words",
    [
        (["--lrr", "1"], ["--lrr", "did you mean 'lr'"]),
        (["grpoo"], ["grpoo", "did you mean 'grpo'"]),
        (["--steps", "many"], ["--steps", "int", "'many'"]),
        (["--steps"], ["--steps", "value"]),
        (["stray", "grpo"], ["stray"]),
        (["grpo", "stray"], ["stray"]),
        (["--max_tokens", "0"], ["--max_tokens", "at least 1"]),
        (["--group_size", "1"], ["--group_size", "--advantage_std none"]),
        (["--top_p", "0.9"], ["--top_p", "temperature"]),
        (["--temperature", "0"], ["--temperature"]),
        (["l2t", "--gain", "forcd"], ["--gain", "did you mean 'forced'"]),
        (["l2t", "--compression", "diagonal"], ["--compression", "did you mean 'diag'"]),
        (["l2t", "--proxy", "svdd"], ["--proxy", "did you mean 'svd'"]),
        (["l2t", "--rank_share", "1.5"], ["--rank_share", "(0, 1]"]),
        (["l2t", "--rank_share", "0"], ["--rank_share", "(0, 1]"]),
        (["l2t", "--episodes", "fixed:0"], ["--episodes", "fixed:N"]),
        (["l2t", "--gain", "prm"], ["--prm"]),
        (["sft"], ["--data"]),
        (["longshort", "--rounds", "LXS"], ["--rounds", "X"]),
        (["longshort", "--rounds", ""], ["--rounds", "empty"]),
        (["longshort", "--steps", "9"], ["--steps", "--steps_per_round"]),
        (["longshort", "--long", "L0"], ["--short"]),
        (["l2t", "--length_penalty", "0.1"], ["--length_penalty", "train.py grpo"]),
        (["grpo", "--profile", "paper"], ["--profile paper", "l2t"]),
        (["l2t", "--temperature", "0.7"], ["--temperature 0.7", "--compression none"]),
        (["--lr", "nan"], ["--lr", "'nan'"]),
        (["--temperature", "inf"], ["--temperature", "'inf'"]),
        (["--eval_every", "-1"], ["--eval_every", "negative"]),
        (["--importance_cap", "-2"], ["--importance_cap", "negative"]),
        (["--max_grad_norm", "0"], ["--max_grad_norm", "positive"]),
        (["--fisher_decay", "3"], ["--fisher_decay", "between 0 and 1"]),
    ],
)
def test_a_mistake_gets_one_sentence(argv, words):
    with pytest.raises(UserError) as mistake:
        parse(argv)
    assert all(word in str(mistake.value) for word in words), mistake.value
    assert "\n" not in str(mistake.value)


def test_the_papers_spelling_of_the_rounds():
    config = parse(["longshort", "--rounds", "L,L,S", "--steps_per_round", "5"])
    assert (config.rounds, config.steps, config.eval_every) == ("LLS", 15, 5)


def test_a_mistake_that_only_another_rank_sees_is_told_too(monkeypatch, capsys):
    """Rank 0 would have spoken, and torchrun have ended this rank, long before it wakes up."""
    waited = []
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setattr("time.sleep", waited.append)
    with pytest.raises(SystemExit) as stopped:
        exit_with_error("train.py", UserError("problem 7 is too long"))
    assert (
        stopped.value.code == 2
        and waited == [30]
        and capsys.readouterr().err == "train.py: problem 7 is too long\n"
    )


def test_help_comes_once_from_all_ranks(monkeypatch, capsys):
    monkeypatch.setenv("RANK", "1")
    with pytest.raises(SystemExit):
        parse(["--help"])
    assert capsys.readouterr().out == ""


def test_group_of_one_is_fine_without_std():
    assert parse(["--group_size", "1", "--advantage_std", "none"]).group_size == 1


def test_help_names_every_option_once():
    lines = help_text().splitlines()
    for f in dataclasses.fields(Config):
        assert sum(line.startswith(f"  --{f.name} ") for line in lines) == 1


def test_help_does_not_import_torch():
    code = "import sys, runpy; sys.argv = ['train.py', '--help']\ntry: runpy.run_path('train.py', run_name='__main__')\n"
    code += "except SystemExit as e: assert not e.code\nassert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, stdout=subprocess.DEVNULL)


def test_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        parse([]).lr = 1.0

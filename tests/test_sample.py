"""sample.py as a user meets it: a prompt, a data file, a conversation, a comparison; mistakes."""

import gc
import json
import shutil
import subprocess
import sys
import weakref
from pathlib import Path

import pytest
import torch

import sample
from helpers import ROOT
from thinkrl.checkpoint import load_model
from thinkrl.learner import TINY
from thinkrl.tokenizer import Tokenizer
from thinkrl.tools import policies

ROWS = [
    {"problem": "24*3?", "answer": "72", "source": "arith", "level": "2 digits"},
    {"problem": "7*8?", "answer": "56", "source": "arith", "level": "1 digit"},
]
TALK = ("--long", "tiny", "--short", "tiny")


@pytest.fixture
def data(tmp_path) -> str:
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return str(tmp_path / "rows.jsonl")


def run(*argv: str) -> None:
    sample.main(sample.parse_options(["--device", "cpu", *argv]))
    torch.set_num_threads(1)  # as conftest says


def test_a_prompt_is_answered(capsys):
    run("--prompt", "7*8?", "--temperature", "0")
    said = capsys.readouterr().out
    assert "<answer>56</answer>" in said and said.endswith(" tokens, stop]\n")


BOXED = "\nThink step by step, then put the final answer in \\boxed{}."


@pytest.mark.parametrize(
    "embedded, argv, asked",
    [
        (True, [], "7*8?"),
        (False, [], "7*8?"),
        (True, ["--source", "math"], "7*8?" + BOXED),
        (False, ["--source", "arith"], "7*8?"),
    ],
)
def test_only_an_explicit_source_adds_its_instruction_to_a_prompt(
    tmp_path, monkeypatch, embedded, argv, asked
):
    model = shutil.copytree(TINY, tmp_path / "model")
    (model / "config.json").write_text(
        json.dumps(json.loads((TINY / "config.json").read_text()) | {"thinkrl_embedded": embedded})
    )
    rendered = []
    real = Tokenizer.render_chat
    monkeypatch.setattr(
        Tokenizer,
        "render_chat",
        lambda self, messages, *rest: rendered.append(messages[-1]["content"]) or real(self, messages, *rest),
    )
    run("--model", str(model), "--prompt", "7*8?", "--max_tokens", "1", *argv)
    assert rendered == [asked]


def test_a_data_file_is_measured_and_written(tmp_path, data, capsys):
    out = tmp_path / "out"
    run("--data", data, "--n", "2", "--out", str(out))
    said = capsys.readouterr().out
    lines = [json.loads(line) for line in (out / "completions.jsonl").read_text().splitlines()]
    assert [(line["problem"], line["sample"]) for line in lines] == [(0, 0), (0, 1), (1, 0), (1, 1)]
    assert [line["gold"] for line in lines] == ["72", "72", "56", "56"]
    assert all(line["outcome_reward"] == (line["answer"] == line["gold"]) for line in lines)
    assert all(f"<answer>{line['answer']}</answer>" in line["turns"][0]["text"] for line in lines)
    result = json.loads((out / "summary.json").read_text())
    assert result["accuracy"] == sum(line["outcome_reward"] for line in lines) / 4
    assert {"accuracy_interval", "tokens_median", "tokens_95", "pass@2", "maj@2"} <= result.keys()
    assert list(result["by_level"]) == ["1 digit", "2 digits"]
    assert said.strip() == (out / "summary.md").read_text().strip() and said.startswith(f"tiny on {data}\n")


def test_accuracy_at_token_budgets(tmp_path, data):
    out = tmp_path / "out"
    run("--data", data, "--budgets", "200,3,30", "--out", str(out))
    result = json.loads((out / "summary.json").read_text())
    budgets, accuracy = zip(*result["budgets"])
    assert budgets == (3, 30, 200) and accuracy[-1] == result["accuracy"], (
        "the last one holds every completion"
    )
    assert 0 < accuracy[0] < 1 and len(result["budget_intervals"]) == 3


@pytest.mark.slow
def test_a_conversation_is_measured_then_compared(tmp_path, data, capsys, monkeypatch):
    """One model after the other: the pair's result is out, and the pair gone, before the base model is
    read.
    """
    models, out = [], tmp_path / "out"

    def watched(path: Path, *rest):
        if len(models) == 2:
            assert not any(model() for model in models) and (out / "summary.json").exists()
            assert "accuracy" in capsys.readouterr().out
        model = load_model(path, *rest)
        models.append(weakref.ref(model))
        return model

    monkeypatch.setattr(policies, "load_model", watched)
    gc.disable()  # it might tidy up by chance
    try:
        run("--data", data, *TALK, "--base", "tiny", "--max_turns", "2", "--out", str(out), "--seed", "3")
    finally:
        gc.enable()
    assert len(models) == 3
    assert "A = tiny and tiny\nB = tiny\n" in capsys.readouterr().out
    comparison = json.loads((out / "comparison.json").read_text())[""]
    assert comparison["problems"] == 2 and len(comparison["aes_interval"]) == 2
    assert json.loads((out / "summary.json").read_text())["ended"].keys() == {
        *("answered", "malformed", "turns", "context")
    }
    for line in map(json.loads, (out / "completions.jsonl").read_text().splitlines()):
        assert [turn["role"] for turn in line["turns"]] == ["long", "short", "long", "short"][
            : len(line["turns"])
        ]
        assert line["ended"] in ("answered", "malformed", "turns")


@pytest.mark.slow
def test_a_base_that_is_never_right(data, capsys):
    run("--data", data, "--base", "tiny", "--max_tokens", "1")
    assert "no AES: it is relative to the accuracy of B, which is 0 here\n" in capsys.readouterr().out


@pytest.mark.slow
def test_two_evaluations_are_compared(tmp_path, data, capsys):
    for name, limit in (("a", "200"), ("b", "8")):
        run("--data", data, "--n", "2", "--max_tokens", limit, "--out", str(tmp_path / name))
    capsys.readouterr()
    run("--compare", str(tmp_path / "a"), str(tmp_path / "b"), "--out", str(tmp_path / "c"))
    assert "2 problems, paired: 2 better, 0 worse" in capsys.readouterr().out
    assert json.loads((tmp_path / "c" / "comparison.json").read_text())["sampled"]["better"] == 2
    assert (tmp_path / "c" / "comparison.md").exists()


def chat_with(monkeypatch, texts: list[str], *argv: str) -> list[str]:
    """What a chat writes, piece by piece, to somebody who types these texts and then Ctrl-D."""
    shown, typed = [], iter(texts)

    def read(prompt: str) -> str:
        for text in typed:
            return text
        raise EOFError

    monkeypatch.setattr("builtins.input", read)
    monkeypatch.setattr(policies, "write", shown.append)
    monkeypatch.setattr(sys.stdin, "isatty", lambda: True, raising=False)
    run(*argv)
    return shown


def test_a_chat_goes_on_and_streams(monkeypatch):
    """The second question is asked behind the first and its answer; what is printed is what was sampled."""
    asked, real = [], Tokenizer.render_chat
    monkeypatch.setattr(
        Tokenizer, "render_chat", lambda self, m, *rest: asked.append(m) or real(self, m, *rest)
    )
    shown = chat_with(monkeypatch, ["24*3?", "/new", "7*8?", "5*5?"], "--temperature", "0")
    assert [[m["content"] for m in messages if m["role"] == "user"] for messages in asked] == [
        ["24*3?"],
        ["7*8?"],
        ["7*8?", "5*5?"],
    ]
    answer = asked[2][1]["content"]
    assert asked[2][1]["role"] == "assistant" and answer.endswith("<answer>56</answer>")
    assert answer + "\n" in "".join(shown) and "<|eos|>" not in "".join(shown)
    assert max(map(len, shown)) < len(answer) / 2, "in pieces"


def test_a_chat_of_two_says_who_speaks(monkeypatch):
    said = "".join(chat_with(monkeypatch, ["24*3?"], *TALK))
    assert said.startswith("long\n<think>") and "\nshort\n<answer>" in said
    assert said.rstrip().endswith("answered]") and "</think>\nshort" in said


@pytest.mark.slow
def test_a_reader_that_leaves_is_no_mistake():
    """`sample.py … | head`: no traceback, and exit status 0."""
    command = [sys.executable, "sample.py", "--prompt", "7*8?", "--n", "2", "--max_tokens", "4"]
    program = subprocess.Popen(
        [*command, "--device", "cpu"], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    program.stdout.close()
    _, errors = program.communicate()
    assert program.returncode == 0 and "BrokenPipe" not in errors, errors


@pytest.mark.parametrize(
    "argv, sentence",
    [
        (["--prompt", "1*1?", "--n", "0"], "--n is 0: it must be at least 1"),
        (["--prompt", "1*1?", *TALK, "--max_turns", "0"], "--max_turns is 0: it must be at least 1"),
        (["--data", "arith", "--limit", "-1"], "--limit is -1: it must be at least 0"),
        (["--prompt", "1*1?", "--temperature", "-1"], "--temperature is -1:"),
        (["--prompt", "1*1?", "--data", "arith"], "--prompt and --data: give one of them"),
        (["--prompt", "1*1?", "--base", "tiny"], "--base and --budgets are for --data FILE"),
        (["--prompt", "1*1?", "--out", "x"], "--out is for --data FILE and --compare A B"),
        (["--prompt", "1*1?", "--long", "tiny"], "a conversation needs both"),
        (["--data", "arith", "--budgets", "9,x"], "--budgets is '9,x': give positive numbers of tokens"),
        (["--data", "arith", "--budgets", "9", *TALK], "--budgets cuts off the thinking of one policy"),
        (["--compare", "a"], "option '--compare' needs 2 values"),
        (["--compare", "a", "--out", "x"], "option '--compare' needs 2 values"),
        ([], "give --prompt TEXT, --data FILE or --compare A B; without them, a chat needs a terminal"),
    ],
)
def test_options(argv, sentence, monkeypatch):
    monkeypatch.setattr(sys.stdin, "isatty", lambda: False, raising=False)
    with pytest.raises(sample.UserError, match=sentence):
        sample.parse_options(argv)


@pytest.mark.parametrize(
    "argv, sentence",
    [
        (
            ["--out", "sample.py/out"],
            "the folder sample.py/out cannot be written (Not a directory): choose another --runs_dir (or "
            "--out)",
        ),
        (
            ["--base", "nowhere"],
            "--base nowhere: no such folder; give a Hugging Face folder, owner/name[@revision] of the hub, "
            "or 'tiny'",
        ),
    ],
)
def test_what_would_fail_in_the_end_is_refused_at_the_start(data, capsys, monkeypatch, argv, sentence):
    monkeypatch.setattr(policies, "load_model", None)
    monkeypatch.chdir(ROOT)
    with pytest.raises(SystemExit) as stopped:
        run("--data", data, *argv)
    assert stopped.value.code == 2 and capsys.readouterr().err == f"sample.py: {sentence}\n"


def test_a_file_of_another_layout_is_measured(tmp_path, capsys):
    rows = [{"q": "7*8?", "a": "56"}, {"q": "9*9?"}, {"q": "5*5?", "a": None}]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    run(
        *("--data", str(tmp_path / "rows.jsonl"), "--source", "arith", "--columns", "problem=q,answer=a"),
        *("--skip_bad_rows", "--temperature", "0", "--max_tokens", "60"),
    )
    said = capsys.readouterr()
    assert "skipped 2 of its rows" in said.err and "| all |        1 |  100.0 % |" in said.out

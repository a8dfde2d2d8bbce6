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


def numbers(said: str) -> dict[str, str]:
    """Those of the whole, by name; what is indented belongs to a part."""
    return dict(line.split()[:2] for line in said.splitlines() if line[:1].strip() and len(line.split()) > 1)


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
    real = sample.Tokenizer.render_chat
    monkeypatch.setattr(
        sample.Tokenizer,
        "render_chat",
        lambda self, messages, *rest: rendered.append(messages[-1]["content"]) or real(self, messages, *rest),
    )
    run("--model", str(model), "--prompt", "7*8?", "--max_tokens", "1", *argv)
    assert rendered == [asked]


def test_a_data_file_is_measured_and_written(tmp_path, data, capsys):
    run("--data", data, "--n", "2", "--out", str(tmp_path / "out.jsonl"))
    said = numbers(capsys.readouterr().out)
    lines = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert [line["problem"] for line in lines] == [0, 0, 1, 1] and [line["gold"] for line in lines] == [
        "72",
        "72",
        "56",
        "56",
    ]
    assert (
        said["completions"] == "4" and float(said["accuracy"]) == sum(line["correct"] for line in lines) / 4
    )
    assert {"pass@2", "maj@2", "tokens_max", "truncated"} <= said.keys()
    assert all(line["correct"] == (line["answer"] == line["gold"]) for line in lines)
    assert all(f"<answer>{line['answer']}</answer>" in line["text"] for line in lines)


@pytest.mark.slow
def test_a_conversation_is_measured_then_compared(tmp_path, data, capsys, monkeypatch):
    """One model after the other: the pair's result is out, and the pair gone, before the base model is
    read.
    """
    models, out = [], tmp_path / "out.jsonl"

    def watched(path: Path, *rest):
        if len(models) == 2:
            assert (
                not any(model() for model in models) and out.exists() and "turns" in capsys.readouterr().out
            )
        model = load_model(path, *rest)
        models.append(weakref.ref(model))
        return model

    monkeypatch.setattr(sample, "load_model", watched)
    gc.disable()  # it might tidy up by chance
    try:
        run("--data", data, *TALK, "--base", "tiny", "--max_turns", "2", "--out", str(out), "--seed", "3")
    finally:
        gc.enable()
    assert len(models) == 3
    score = capsys.readouterr().out
    assert score.startswith("AES ") and "against tiny: accuracy" in score
    for line in map(json.loads, out.read_text().splitlines()):
        assert [turn["role"] for turn in line["turns"]] == ["long", "short", "long", "short"][
            : len(line["turns"])
        ]
        assert line["turns"][-1]["text"] == line["text"] and line["ended"] in (
            "answered",
            "malformed",
            "turns",
        )


def test_a_base_that_is_never_right(data, capsys):
    run("--data", data, "--base", "tiny", "--max_tokens", "1")
    assert capsys.readouterr().out.endswith(
        "\nno AES: it is relative to the accuracy of --base tiny, which is 0 here\n"
    )


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
        (["--prompt", "1*1?", "--data", "arith"], "give either --prompt TEXT or --data FILE"),
        (["--prompt", "1*1?", "--base", "tiny"], "--base and --out are for --data FILE"),
        (["--prompt", "1*1?", "--long", "tiny"], "a conversation needs both"),
    ],
)
def test_options(argv, sentence):
    with pytest.raises(sample.UserError, match=sentence):
        sample.parse_options(argv)


@pytest.mark.parametrize(
    "argv, sentence",
    [
        (
            ["--out", "nowhere/out.jsonl"],
            "--out nowhere/out.jsonl cannot be written: give a file in a folder that exists",
        ),
        (
            ["--base", "nowhere"],
            "--base nowhere: no such folder; give a Hugging Face folder, owner/name[@revision] of the hub, or 'tiny'",
        ),
    ],
)
def test_what_would_fail_in_the_end_is_refused_at_the_start(data, capsys, monkeypatch, argv, sentence):
    monkeypatch.setattr(sample, "load_model", None)
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
    assert "skipped 2 of its rows" in said.err and float(numbers(said.out)["accuracy"]) == 1

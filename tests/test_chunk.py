"""chunk.py as a user meets it: killed and continued, on one rank and two; layouts; mistakes."""

import json
import shutil
import signal
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import chunk
from helpers import python, torchrun
from thinkrl import UserError, sft
from thinkrl.data.problems import INSTRUCTIONS
from thinkrl.distributed import World, start, stop
from thinkrl.learner import TINY
from thinkrl.longshort.conversation import example_prompt, user_text
from thinkrl.sampler import Completion
from thinkrl.tokenizer import Tokenizer

SMALL = ("--rollouts", "2", "--max_tokens", "30", "--items_per_batch", "1", "--device", "cpu")
FILES = ("annotated.json", "long.json", "short.json", "rejects.jsonl", "summary.json")


def options(folder: Path, *more: str) -> list[str]:
    return ["--out", str(folder), "--limit", "6", *SMALL, *more]


@pytest.fixture(scope="module")
def world() -> Iterator[World]:
    alone = start("cpu")
    torch.set_num_threads(1)  # as conftest says
    yield alone
    stop()


def run(world: World, *argv: str) -> None:
    chunk.chunk(chunk.parse_options(list(argv)), world)


def lines(folder: Path) -> list[str]:
    parts = sorted((folder / "parts").glob("rank_*.jsonl"))
    return [
        line for part in parts for line in part.read_text().splitlines(keepends=True) if line.endswith("\n")
    ]


@pytest.mark.slow
def test_kill_and_resume_neither_repeats_nor_loses_an_item(tmp_path, world):
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    run(world, *options(whole))
    done = python("tests/killed.py", "tqdm:tqdm.update", "2", "chunk.py", *options(cut))
    assert done.returncode == -signal.SIGKILL, done.stderr[-3000:]
    before = lines(cut)
    assert len(before) == 2
    with (cut / "parts" / "rank_0.jsonl").open("a") as part:
        part.write('{"id": 5, "item": {"quest')  # what a kill in the middle of a write leaves
    done = torchrun(2, "chunk.py", *options(cut))
    assert done.returncode == 0, done.stderr[-3000:]
    after = lines(cut)
    assert after[: len(before)] == before, "finished items are not touched"
    assert sorted(json.loads(line)["id"] for line in after) == list(range(6))
    assert len(list((cut / "parts").iterdir())) == 2, "the second rank took its share"
    for name in FILES:
        assert (whole / name).read_text() == (cut / name).read_text(), name
    run(world, *options(cut))
    assert lines(cut) == after, "a finished folder is only merged again"


def test_default_lengths_are_lowered_to_the_context_and_given_ones_are_not(tmp_path):
    """The embedded model's files in another folder are a model like any other, with a context of 1024."""
    model = shutil.copytree(TINY, tmp_path / "model")
    options, said = chunk.fitted(chunk.parse_options(["--model", str(model), "--out", str(tmp_path)]))
    assert (options.max_tokens, options.instruct_max_tokens) == (384, 384)  # 3/8 of 1024
    assert said.splitlines() == [
        "--max_tokens 384 (default 4096): lowered to the model's context of 1024 tokens",
        "--instruct_max_tokens 384 (default 7120): lowered to the model's context of 1024 tokens",
    ]
    given = ["--model", str(model), "--out", str(tmp_path), "--max_tokens", "999"]
    options, said = chunk.fitted(chunk.parse_options([*given, "--chunker", "tags", "--completer", "block"]))
    assert options.max_tokens == 999 and said == ""


def test_outputs(tmp_path, world):
    run(world, *options(tmp_path, "--plot"))
    summary = json.loads((tmp_path / "summary.json").read_text())
    annotated, long, short = (
        json.loads((tmp_path / f"{name}.json").read_text()) for name in ("annotated", "long", "short")
    )
    rejects = [json.loads(line) for line in (tmp_path / "rejects.jsonl").read_text().splitlines()]
    assert summary["rows"] == 6 == summary["kept"] + len(rejects) and summary["kept"] == len(annotated) > 0
    assert sum(summary["rejected"].values()) == len(rejects)
    assert len(long) == sum((len(item["segments"]) + 1) // 2 for item in annotated) == summary["long_rows"]
    assert len(long) + len(short) == sum(len(item["segments"]) for item in annotated)
    for item in annotated:
        n = len(item["thoughts"])
        assert n >= 2 and all(
            len(item[key]) == n for key in ("lengths", "accuracies", "importance", "labels", "types")
        )
        assert item["segments"][-1].endswith(f"{item['answer']}</answer>")
    tokenizer = Tokenizer(TINY)
    for row in long + short:
        parts = row["conversation"]
        assert row["instruction"] == f"<|{parts['role']}|>", "the embedded model's own prompts.json"
        assert len(example_prompt(row, "", tokenizer)) > 0 and row["input"] in user_text(
            parts["role"], row["input"], []
        )
    assert len(sft.load_rows(tmp_path / "long.json")) == len(long)
    assert (tmp_path / "importance.png").exists()


THINKING = "<think>20*3=60\n\n4*3=12\n\n60+12=72</think><answer>72</answer>"


def write(path: Path, rows: list[dict], as_list: bool = False) -> str:
    path.write_text(json.dumps(rows) if as_list else "".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def test_published_layout_with_its_blocks(tmp_path, world):
    """The blocks a row brings are used: the model, which cannot chunk, is never asked."""
    spans = {"block 1": (1, 1, "first part"), "block 2": (2, 2, "second")}
    block = {
        name: {"start": start, "end": end, "block type": kind} for name, (start, end, kind) in spans.items()
    }
    data = write(
        tmp_path / "chunked.json",
        [{"question": "24*3?", "answer": "72", "thought": THINKING, "block": block}],
        True,
    )
    run(
        world, "--data", data, "--source", "arith", "--out", str(tmp_path / "out"), "--chunker", "llm", *SMALL
    )
    [item] = json.loads((tmp_path / "out" / "annotated.json").read_text())
    assert item["thoughts"] == ["20*3=60", "4*3=12\n\n60+12=72"] and item["types"] == ["first part", "second"]
    assert item["segments"] == ["<think>20*3=60</think>", "<answer>4*3=12\n\n60+12=72\n72</answer>"]


def test_rejects_and_the_rest(tmp_path, world):
    rows = [
        {"problem": "24*3?", "answer": "72", "response": THINKING},
        {"problem": "24*3?", "answer": "72", "response": "<think>20*3=60</think><answer>72</answer>"},
        {"problem": "24*3?", "answer": "72", "response": THINKING.replace("72", "73")},
        {"problem": "24*3?", "answer": "72", "response": "\n\n".join(["20*3=60"] * 150)},
    ]
    data = write(tmp_path / "rows.jsonl", rows)
    run(
        world,
        "--data",
        data,
        "--source",
        "arith",
        "--out",
        str(tmp_path / "out"),
        "--chunker",
        "paragraphs",
        *SMALL,
    )
    rejects = [json.loads(line) for line in (tmp_path / "out" / "rejects.jsonl").read_text().splitlines()]
    assert [(r["id"], r["rejected"][:20]) for r in rejects] == [
        (1, "a chain of one thoug"),
        (2, "the last short segme"),
        (3, "prompt and chain hav"),
    ]
    assert rejects[0]["thought"] == rows[1]["response"]


def test_a_chunker_that_never_parses(tmp_path, world):
    """The embedded model knows no JSON: the item is put aside, and the sentence says where."""
    data = write(
        tmp_path / "rows.jsonl", [{"problem": "24*3?", "answer": "72", "response": "<think>60\n\n12</think>"}]
    )
    with pytest.raises(UserError, match="none of 1 rows can be used: .*rejects.jsonl says why"):
        run(
            world,
            "--data",
            data,
            "--source",
            "arith",
            "--out",
            str(tmp_path / "out"),
            "--chunker",
            "llm",
            "--instruct_max_tokens",
            "5",
            *SMALL,
        )
    [reject] = [json.loads(line) for line in (tmp_path / "out" / "rejects.jsonl").read_text().splitlines()]
    assert (
        reject["rejected"].startswith(("the answer holds no JSON", "the request has"))
        and reject["question"] == "24*3?"
    )


@pytest.mark.parametrize(
    "row, sentence",
    [
        (
            {"problem": "2*3?", "answer": "6"},
            r"rows.jsonl:2: field 'response' \(or 'thought'\) is missing or empty",
        ),
        ({"problem": "2*3?", "answer": "6", "response": ""}, "field 'response'"),
        ({"answer": "6", "response": "x"}, "field 'problem'"),
        ({"problem": "2*3?", "response": "x"}, "field 'answer'"),
    ],
)
def test_a_bad_row_stops_before_anything_is_written(tmp_path, world, row, sentence):
    data = write(tmp_path / "rows.jsonl", [{"problem": "24*3?", "answer": "72", "response": THINKING}, row])
    with pytest.raises(UserError, match=sentence):
        run(world, "--data", data, "--source", "arith", "--out", str(tmp_path / "out"), *SMALL)
    assert not (tmp_path / "out").exists()


def test_other_options_or_data_do_not_mix(tmp_path, world):
    rows = [{"problem": "24*3?", "answer": "72", "response": THINKING}]
    arguments = [
        "--data",
        write(tmp_path / "rows.jsonl", rows),
        "--source",
        "arith",
        "--chunker",
        "paragraphs",
        "--out",
        str(tmp_path / "out"),
        *SMALL,
    ]
    run(world, *arguments)
    with pytest.raises(UserError, match="was begun with temperature 0.7, now 0.5: give the same"):
        run(world, *arguments, "--temperature", "0.5")
    write(tmp_path / "rows.jsonl", rows * 2)
    with pytest.raises(UserError, match="was begun with data_crc32"):
        run(world, *arguments)


def test_a_mistake_does_not_bind_the_folder(tmp_path, world):
    """What cannot be loaded is refused before an item is worked on, and leaves the folder to the corrected
    command.
    """
    out = tmp_path / "out"
    arguments = [
        "--data",
        write(tmp_path / "rows.jsonl", [{"problem": "24*3?", "answer": "72", "response": THINKING}]),
        "--source",
        "arith",
        "--chunker",
        "paragraphs",
        "--out",
        str(out),
        *SMALL,
    ]
    (tmp_path / "empty").mkdir()
    for more, sentence in [
        (["--prompts", str(tmp_path / "typo.json")], "typo.json: no such file"),
        (["--model", str(tmp_path / "typo")], "typo: no such folder"),
        (["--model", str(tmp_path / "empty"), "--completer", "block"], "empty/config.json"),
    ]:
        with pytest.raises(UserError, match=sentence):
            run(world, *arguments, *more)
        assert not (out / "config.json").exists() and not list(out.glob("parts/*"))
    run(world, *arguments)
    assert len(lines(out)) == 1


class Scripted:
    """An instruct model that gives one answer to every request, and remembers them."""

    model = SimpleNamespace(config=SimpleNamespace(max_positions=100_000))

    def __init__(self, answer: str):
        self.answer, self.asked, self.tokenizer = answer, [], self

    stop_ids = ()

    def encode_chat(self, messages: list[dict]) -> list[int]:
        return [ord(letter) for letter in messages[-1]["content"]]

    def decode(self, ids: list[int]) -> str:
        return "".join(map(chr, ids))

    def generate(self, prompts: list[list[int]], **options) -> list[list[Completion]]:
        self.asked += map(self.decode, prompts)
        ids = [ord(letter) for letter in self.answer]
        return [[Completion(ids, [0.0] * len(ids), "stop")] for _ in prompts]


@pytest.fixture
def instructed(monkeypatch):
    """Put a scripted model in the place of the one that chunks and completes."""
    load = chunk.load_tools

    def put(answer: str) -> Scripted:
        model = Scripted(answer)
        monkeypatch.setattr(chunk, "load_tools", lambda *given: replace(load(*given), instruct=model))
        return model

    return put


@pytest.mark.parametrize("suffix, said", [("", INSTRUCTIONS["math"][1]), ("Be brief.", "Be brief.")])
def test_every_row_and_request_says_where_the_answer_goes(tmp_path, world, instructed, suffix, said):
    """As reinforcement learning asks: with the instruction of the grading rule, or with --suffix."""
    model = instructed(r'["so \boxed{72}"]')
    data = write(tmp_path / "rows.jsonl", [{"problem": "24*3?", "answer": "72", "response": THINKING}])
    run(
        world,
        *("--data", data, "--source", "math", "--suffix", suffix, "--out", str(tmp_path / "out")),
        *("--chunker", "paragraphs", "--completer", "llm", *SMALL),
    )
    for name in ("long", "short"):
        [row] = json.loads((tmp_path / "out" / f"{name}.json").read_text())
        assert row["conversation"]["question"] == f"24*3?\n{said}"
        assert row["input"].startswith(f"24*3?\n{said}")
    [asked] = model.asked
    assert f"Problem:\n24*3?\n{said}\n" in asked


@pytest.mark.parametrize(
    "answer, reason, said",
    [
        ("I would rather not.", "the answer holds no JSON", "I would rather not."),
        (r'["so \boxed{73}"]', "the last short segment", r"so \boxed{73}"),
    ],
)
def test_rejects_keep_what_the_model_said(tmp_path, world, instructed, answer, reason, said):
    instructed(answer)
    data = write(tmp_path / "rows.jsonl", [{"problem": "24*3?", "answer": "72", "response": THINKING}])
    with pytest.raises(UserError, match="none of 1 rows"):
        run(
            world,
            *("--data", data, "--source", "math", "--out", str(tmp_path / "out")),
            *("--chunker", "paragraphs", "--completer", "llm", *SMALL),
        )
    [reject] = map(json.loads, (tmp_path / "out" / "rejects.jsonl").read_text().splitlines())
    assert reject["rejected"].startswith(reason) and reject["said"] == said


def test_role_prompts_may_change_and_requests_may_not(tmp_path, world):
    block = {"block 1": {"start": 1, "end": 1}, "block 2": {"start": 2, "end": 3}}
    rows = [{"question": "24*3?", "answer": "72", "thought": THINKING, "block": block}]
    arguments = [
        "--data",
        write(tmp_path / "chunked.json", rows, True),
        "--source",
        "arith",
        "--chunker",
        "llm",
        "--out",
        str(tmp_path / "out"),
        *SMALL,
    ]
    run(world, *arguments)
    before = lines(tmp_path / "out")
    (tmp_path / "own.json").write_text(json.dumps({"long": "Think!", "short": "Finish!"}))
    run(world, *arguments, "--prompts", str(tmp_path / "own.json"))
    assert json.loads((tmp_path / "out" / "long.json").read_text())[0]["instruction"] == "Think!"
    assert lines(tmp_path / "out") == before, "nothing is measured again for it"
    (tmp_path / "own.json").write_text(
        json.dumps({"long": "Think!", "short": "Finish!", "chunk": "Cut {problem}: {steps}"})
    )
    with pytest.raises(UserError, match="was begun with requests_crc32"):
        run(world, *arguments, "--prompts", str(tmp_path / "own.json"))


@pytest.mark.slow
def test_ranks_meet_after_every_batch(tmp_path):
    """Items are dealt one by one, and a mistake of one rank stops the others at the end of their batch,
    not of their work.
    """
    model = shutil.copytree(TINY, tmp_path / "model")
    settings = json.loads((model / "tokenizer_config.json").read_text())
    template = (
        "{% if '0*0' in messages[0]['content'] %}{{ no_such_thing.at_all }}{% endif %}"
        + settings["chat_template"]
    )
    (model / "tokenizer_config.json").write_text(json.dumps(settings | {"chat_template": template}))
    questions = ["24*3?", "24*3?", "24*3?", "0*0?", "24*3?", "24*3?"]  # the fourth is the second of rank 1
    data = write(
        tmp_path / "rows.jsonl", [{"problem": q, "answer": "72", "response": THINKING} for q in questions]
    )
    done = torchrun(
        2,
        "chunk.py",
        "--data",
        data,
        "--source",
        "arith",
        "--chunker",
        "paragraphs",
        "--completer",
        "block",
        "--model",
        str(model),
        "--out",
        str(tmp_path / "out"),
        *SMALL,
    )
    assert (
        done.returncode
        and "chunk.py: " in done.stderr
        and "the chat template refuses this conversation" in done.stderr
    )
    parts = [
        (tmp_path / "out" / "parts" / f"rank_{rank}.jsonl").read_text().splitlines() for rank in range(2)
    ]
    assert [[json.loads(line)["id"] for line in part] for part in parts] == [[0, 2], [1]]


@pytest.mark.parametrize(
    "argv, sentence",
    [
        (["--rollout", "4"], "unknown option '--rollout' \\(did you mean 'rollouts'"),
        (["--rollouts", "0"], "--rollouts is 0"),
        (["--limit", "-1"], "--limit is -1: it must be at least 0"),
        (["--temperature", "-0.5"], "--temperature is -0.5"),
        (["--decay", "1"], "it must be above 0 and below 1"),
        (["--chunker", "paragraph"], "did you mean 'paragraphs'"),
    ],
)
def test_options(argv, sentence):
    with pytest.raises(UserError, match=sentence):
        chunk.parse_options(argv)


def test_the_exit_status_of_a_mistake(capsys):
    with pytest.raises(SystemExit) as stopped:
        chunk.main(chunk.parse_options(["--data", "nowhere.jsonl"]))
    said = capsys.readouterr().err
    assert stopped.value.code == 2 and said == "chunk.py: nowhere.jsonl: no such data file\n"


def test_options_keep_the_order_that_the_chain_was_written_for(tmp_path):
    rows = [
        {"problem": f"{i}+1?", "options": ["two", "three", "four"], "answer": "three", "response": "So (B)."}
        for i in range(20)
    ]
    items = chunk.load_items(chunk.parse_options(["--data", write(tmp_path / "rows.jsonl", rows)]))
    assert {item.problem.answer for item in items} == {"B"} and [item.problem.id for item in items] == [
        *range(20)
    ]
    assert items[7].problem.question.splitlines()[1:4] == ["(A) two", "(B) three", "(C) four"]


def test_rows_of_another_layout_and_bad_ones(tmp_path, capsys):
    rows = [{"q": "2*3?", "a": "6", "response": "6"}, {"q": "2*4?", "a": "8"}]
    data = ["--data", write(tmp_path / "rows.jsonl", rows), "--columns", "problem=q,answer=a"]
    [item] = chunk.load_items(chunk.parse_options([*data, "--skip_bad_rows"]))
    assert (item.problem.question, item.response) == ("2*3?", "6")
    assert "rows.jsonl:2: field 'response'" in capsys.readouterr().err

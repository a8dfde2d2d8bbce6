"""What docs/determinism.md promises and no other file holds."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import train
from helpers import torchrun
from thinkrl.config import parse

SMALL = "--steps 2 --problems_per_step 4 --group_size 4 --max_tokens 40 --eval_problems 0 --lr 1e-3 --log_groups 4"


def rows(folder: Path, name: str) -> list[dict]:
    return [json.loads(line) for line in (folder / name).read_text().splitlines()]


def completions(folder: Path, step: int) -> dict:
    """(problem, sample) -> token ids, of all completions of a step that rank 0 logged."""
    logged = [row for row in rows(folder, "samples.jsonl") if row["step"] == step]
    return {(row["problem"], row["sample"]): row["turns"][0]["completion"] for row in logged}


@pytest.mark.slow
def test_the_same_seed_is_the_same_run_and_another_is_not(tmp_path):
    runs = {}
    for name, seed in (("one", "1"), ("again", "1"), ("other", "2")):
        options = ["grpo", *SMALL.split(), "--seed", seed, "--runs_dir", str(tmp_path), "--name", name]
        train.main(parse(options))
        numbers = rows(tmp_path / name, "metrics.jsonl")
        timed = {key for key in numbers[0] if "seconds" in key or key == "tokens_per_second"}
        kept = [{key: value for key, value in row.items() if key not in timed} for row in numbers]
        runs[name] = (
            kept,
            rows(tmp_path / name, "samples.jsonl"),
            load_file(tmp_path / name / "hf/model.safetensors"),
        )
    one, again, other = runs["one"], runs["again"], runs["other"]
    assert one[:2] == again[:2] and all(torch.equal(weight, again[2][key]) for key, weight in one[2].items())
    assert one[0] != other[0] and not all(
        torch.equal(weight, other[2][key]) for key, weight in one[2].items()
    )


@pytest.mark.slow
def test_two_ranks_sample_what_one_samples(tmp_path):
    for ranks in (1, 2):
        options = ["grpo", *SMALL.split(), "--runs_dir", str(tmp_path), "--name", str(ranks)]
        done = torchrun(ranks, "train.py", *options)
        assert done.returncode == 0, done.stderr[-3000:]
    alone, first_half = completions(tmp_path / "1", 1), completions(tmp_path / "2", 1)
    assert len(alone) == 16 and len(first_half) == 8 and first_half.items() <= alone.items()
    one, two = (rows(tmp_path / name, "metrics.jsonl")[0] for name in ("1", "2"))
    for key in ("reward", "accuracy", "tokens", "zero_groups"):
        assert one[key] == two[key], key
    for key in ("loss", "grad_norm", "entropy"):
        assert one[key] == pytest.approx(two[key], rel=1e-5, abs=1e-8), key

"""Supervised fine-tuning of one role: on rows written for its prompts, and no others."""

import json

import pytest

import train
from thinkrl import UserError
from thinkrl.config import parse
from thinkrl.distributed import start
from thinkrl.learner import TINY
from thinkrl.longshort.cold_start import role_files
from thinkrl.longshort.conversation import Prompts, example, load_prompts, prompts_file
from thinkrl.sft import load_rows


def test_rows_written_with_other_role_prompts_are_refused(tmp_path):
    """The second row is: by --prompts, and by the model's own folder where there is none."""
    ours, other = load_prompts(folder=TINY), Prompts("Think!", "Finish!")
    rows = [example("long", "2*3?", [], "<think>6</think>", prompts) for prompts in (ours, other)]
    file = tmp_path / "rows.json"
    file.write_text(json.dumps(rows))
    (tmp_path / "other.json").write_text(prompts_file(other)["prompts.json"])
    for first, more in ((2, []), (1, ["--prompts", str(tmp_path / "other.json")])):
        config = parse(["sft", "--data", str(file), "--runs_dir", str(tmp_path / "runs"), *more])
        with pytest.raises(UserError, match=f"rows.json:{first}: written with other role prompts"):
            train.train_sft(config, start("cpu"))
    assert not (tmp_path / "runs").exists()


def test_the_prompts_are_saved_beside_the_weights(tmp_path):
    ours = load_prompts(folder=TINY)
    (tmp_path / "rows.json").write_text(json.dumps([example("long", "2*3?", [], "<think>6</think>", ours)]))
    assert role_files(load_rows(tmp_path / "rows.json"), "", TINY) == prompts_file(ours)

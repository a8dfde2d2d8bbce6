"""Worked solutions of chain_sum."""

import json
import random

import pytest

from thinkrl import UserError
from thinkrl.data.chats import chat
from thinkrl.data.rows import load
from thinkrl.grading import grade
from thinkrl.tools.worked_sums import main, parse, solution
from thinkrl.types import Problem

SUM = Problem(
    0, "State the final answer to the following arithmetic problem: 3 + 4 - 9 =", "-2", "gym:chain_sum#0.0"
)


def test_one_term_after_the_other():
    steps = "<think>\nStart with 3.\n\n3 + 4 = 7\n\n7 - 9 = -2\n</think>\n<answer>-2</answer>"
    assert solution(SUM, random.Random(0), repeats=0) == steps
    repeated = solution(SUM, random.Random(0), repeats=1)
    assert repeated.count("check this step again") == 2 and grade(repeated, SUM.answer, "arith")


def test_other_problems_are_refused():
    for question in ("What is 3 + 4?", "Spell sun backward", "- 3 + 4"):
        with pytest.raises(UserError, match="no chain of sums"):
            solution(Problem(0, question, "8", "arith"), random.Random(0), repeats=0)
    with pytest.raises(UserError, match="--out FILE is missing"):
        parse([])


def test_the_file_is_one_that_sft_reads(tmp_path):
    pytest.importorskip("reasoning_gym")
    out = tmp_path / "sums.jsonl"
    main(parse(["--out", str(out), "--rows", "3"]))
    assert len(load(str(out), lambda fields: [chat(fields)])) == 3
    user, assistant = json.loads(out.read_text().splitlines()[0])["messages"]
    assert "between <answer> and </answer>" in user["content"] and assistant["content"].startswith(
        "<think>\nStart"
    )


def test_prompts_of_ones_own(tmp_path):
    pytest.importorskip("reasoning_gym")
    out = tmp_path / "sums.jsonl"
    main(parse(["--out", str(out), "--rows", "1", "--system", "Be exact.", "--suffix", "Think first."]))
    system, user, _ = json.loads(out.read_text())["messages"]
    assert system == {"role": "system", "content": "Be exact."}
    assert user["content"].endswith(" =\nThink first.")

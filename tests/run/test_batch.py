"""A step that is not finite stops the run, with the samples' names and with what computes the same again."""

import json
import shlex

import pytest
import torch

import train
from helpers import python, torchrun
from thinkrl.config import parse
from thinkrl.distributed import start
from thinkrl.presets import Grpo
from thinkrl.run.batch import read_packs
from thinkrl.sampler import Sampler
from thinkrl.tools import again
from thinkrl.types import empty_pack
from thinkrl.update import Diverged, require_finite

RUN = "--problems_per_step 2 --steps 3 --save_every 1 --name run"
RL = "--eval_problems 0 --group_size 2 --max_tokens 30"


def stopped(tmp_path, capsys, *options: str) -> str:
    """The one sentence of a run that stops with status 1."""
    with pytest.raises(SystemExit) as exit:
        train.main(parse([*options, *RUN.split(), "--runs_dir", str(tmp_path)]))
    [sentence] = [line for line in capsys.readouterr().err.splitlines() if line.startswith("train.py: ")]
    assert exit.value.code == 1
    return sentence


def computed_again(folder) -> str:
    with pytest.raises(Diverged) as reason:
        again.again(folder, start("cpu"))  # the run has ended its own group
    return str(reason.value)


def spoil(model) -> None:
    """One weight of 1e38 makes a logit overflow."""
    with torch.no_grad():
        next(p for name, p in model.named_parameters() if name.endswith("norm.weight"))[3] = 1e38


@pytest.fixture
def the_second_policy_is_spoiled(monkeypatch):
    begin = Grpo.begin_step

    def spoiling(self, step: int):
        learner = begin(self, step)
        if step == 1:
            spoil(learner.policy)
        return learner

    monkeypatch.setattr(Grpo, "begin_step", spoiling)


@pytest.mark.slow
def test_a_loss_that_is_not_finite_is_computed_again(tmp_path, capsys, the_second_policy_is_spoiled):
    sentence = stopped(tmp_path, capsys, "grpo", *RL.split(), "--micro_batch_tokens", "40")
    reason, command = sentence.removeprefix("train.py: step 2: ").split(
        "; nothing was saved over the last checkpoint; "
    )
    folder = tmp_path / "run" / "nonfinite" / "step_2"
    assert reason.startswith("loss nan, gradient norm ") and "rows that are not finite: " in reason
    assert (tmp_path / "run" / "latest").read_text() == "step_1\n"
    assert computed_again(folder) == reason
    packs = read_packs(folder)
    assert len(packs) == 4 and all(id in reason for p in packs for id in p.ids)
    assert json.loads((folder / "batch.json").read_text())["reason"].startswith(f"step 2: {reason}")
    done = python(*shlex.split(command.removesuffix(" computes it again"))[1:])
    assert (done.returncode, done.stdout) == (0, f"{reason}\n"), done.stderr


def test_a_log_prob_of_the_sampler(tmp_path, capsys, monkeypatch):
    """It does not enter the loss: it is looked for."""
    generate = Sampler.generate

    def spoiled(self, *arguments, **named):
        groups = generate(self, *arguments, **named)
        groups[1][0].logprobs[2] = float("nan")
        return groups

    monkeypatch.setattr(Sampler, "generate", spoiled)
    sentence = stopped(tmp_path, capsys, "grpo", *RL.split())
    reason = sentence.removeprefix("train.py: step 1: ").partition(";")[0]
    assert reason.startswith("sampler's log-prob nan of ") and reason.endswith("/0/0 (problem/sample/turn)")
    assert computed_again(tmp_path / "run" / "nonfinite" / "step_1") == reason


@pytest.mark.parametrize("value", [float("inf"), float("-inf")])
def test_a_reward(tmp_path, capsys, monkeypatch, value):
    reward = Grpo.reward

    def spoiled(self, trajectories, step, tally):
        reward(self, trajectories, step, tally)
        trajectories[3].reward = value

    monkeypatch.setattr(Grpo, "reward", spoiled)
    sentence = stopped(tmp_path, capsys, "grpo", *RL.split())
    assert f"step 1: reward {value} of " in sentence and "/1, advantage nan of " in sentence
    again_sentence = computed_again(tmp_path / "run" / "nonfinite" / "step_1")
    assert again_sentence.startswith("advantage nan of ") and again_sentence in sentence


@pytest.mark.slow
@pytest.mark.parametrize(
    "preset, options", [("sft", ""), ("prm", "--gain_samples 1 --group_size 2 --max_tokens 30")]
)
def test_weights_that_have_left_all_bounds(tmp_path, capsys, preset, options):
    """A learning rate of 1e36 is one step of it."""
    sentence = stopped(tmp_path, capsys, preset, *options.split(), *too_fast(tmp_path, preset))
    reason = sentence.removeprefix("train.py: step 2: ").partition("; nothing was saved")[0]
    assert reason.startswith("loss ") and computed_again(tmp_path / "run/nonfinite/step_2") == reason


@pytest.mark.slow
def test_the_rows_of_two_ranks(tmp_path):
    done = torchrun(
        2, "train.py", "sft", *RUN.split(), *too_fast(tmp_path, "sft"), "--runs_dir", str(tmp_path)
    )
    [sentence] = [line for line in done.stderr.splitlines() if line.startswith("train.py: ")]
    folder = tmp_path / "run" / "nonfinite" / "step_2"
    assert done.returncode != 0 and f"step 2: {computed_again(folder)}; " in sentence
    assert len(read_packs(folder)) == 2


def too_fast(tmp_path, preset: str) -> list[str]:
    rows = [{"prompt": f"{i}+1?", "response": f"<answer>{i + 1}</answer>"} for i in range(8)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return ["--lr", "1e36", *(["--data", str(tmp_path / "rows.jsonl")] if preset == "sft" else [])]


def test_finite_rows_are_no_reason():
    start("cpu")
    require_finite(None, [empty_pack()])

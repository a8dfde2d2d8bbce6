"""What a finished run leaves: models under stable paths, a card, no state that only a resume reads."""

import json
from unittest.mock import create_autospec

import huggingface_hub
import pytest
import yaml

from thinkrl import UserError, finish
from thinkrl.config import Config, parse
from thinkrl.run.folder import Run

RESULT = {"accuracy": 0.5, "tokens": 63.8, "greedy": {"accuracy": 0.75, "tokens": 37.0}}
BETTER = {"accuracy": 0.875, "tokens": 50.3, "greedy": {"accuracy": 0.9, "tokens": 50.0}}


def finished_run(tmp_path, config: Config, *models: str, summary: dict | None = None) -> Run:
    """A run folder as training leaves it: two checkpoints, each with models and sharded state."""
    folder = tmp_path / "name"
    for step in (1, config.steps):
        checkpoint = folder / "checkpoints" / f"step_{step}"
        (checkpoint / "dcp").mkdir(parents=True)
        (checkpoint / "dcp" / "shard").write_text("weights and optimizer")
        (checkpoint / "extra.pt").write_text("state")
        for model in models:
            (checkpoint / model).mkdir()
            (checkpoint / model / "config.json").write_text(f'"{model} of step {step}"')
    (folder / "summary.json").write_text(json.dumps(summary or {}))
    return Run(folder, False, config)


def front_matter(card: str) -> dict:
    return yaml.safe_load(card.split("---")[1])


def test_the_policy_has_a_stable_path_and_the_checkpoint_leads_there(tmp_path):
    config = parse(["grpo", "--steps", "3"])
    run = finished_run(tmp_path, config, "hf", summary={"before": RESULT, "after": BETTER})
    assert finish.finish(run, config) == [run.folder / "hf"]
    checkpoint = run.folder / "checkpoints" / "step_3"
    assert (run.folder / "hf" / "config.json").read_text() == '"hf of step 3"'
    assert (checkpoint / "hf").is_symlink() and (checkpoint / "hf" / "README.md").exists()
    assert (run.folder / "checkpoints" / "step_1" / "hf" / "config.json").read_text() == '"hf of step 1"'
    assert not list(run.folder.rglob("dcp")) and not list(run.folder.rglob("extra.pt"))
    assert finish.finish(run, config) == [run.folder / "hf"], "a second time changes nothing"
    assert run.summary == {"before": RESULT, "after": BETTER}


def test_optimizer_states_stay_where_they_are_asked_for(tmp_path):
    config = parse(["grpo", "--steps", "3", "--keep_optimizer"])
    run = finished_run(tmp_path, config, "hf")
    finish.finish(run, config)
    assert len(list(run.folder.rglob("dcp"))) == len(list(run.folder.rglob("extra.pt"))) == 2


def test_a_run_without_evaluation_is_finished_before_its_state_goes(tmp_path):
    config = parse(["grpo", "--steps", "3"])
    run = finished_run(tmp_path, config, "hf")
    finish.finish(run, config)
    assert run.summary == {"after": {"step": 3}}
    assert "accuracy" not in (run.folder / "hf" / "README.md").read_text()


def test_the_card_says_where_the_model_comes_from_and_what_came_of_it(tmp_path):
    config = parse(
        ["grpo", "--model", "owner/base@v2", "--data", "hub:openai/gsm8k", "--steps", "3", "--lr", "2e-6"]
    )
    run = finished_run(tmp_path, config, "hf", summary={"before": RESULT, "after": BETTER})
    finish.finish(run, config)
    card = (run.folder / "hf" / "README.md").read_text()
    assert front_matter(card) == {
        "library_name": "transformers",
        "tags": ["thinkrl", "grpo"],
        "base_model": "owner/base",
    }
    assert "- base model: `owner/base@v2`\n- data: `hub:openai/gsm8k`\n- steps: 3\n" in card
    assert "| accuracy, sampled | 50.0% | 87.5% |\n| mean tokens, sampled | 63.8 | 50.3 |" in card
    assert "| accuracy, greedy | 75.0% | 90.0% |" in card
    assert card.rstrip().endswith("- `--steps 3`\n- `--lr 2e-06`"), (
        "options that differ from the defaults, no others"
    )


def test_a_card_of_a_supervised_run_has_the_loss_and_no_hub_name_for_a_folder(tmp_path):
    config = parse(["sft", "--data", "rows.jsonl", "--model", str(tmp_path), "--steps", "3"])
    run = finished_run(tmp_path, config, "hf", summary={"after": {"loss": 0.25}})
    finish.finish(run, config)
    card = (run.folder / "hf" / "README.md").read_text()
    assert "Loss of the last step: 0.2500" in card and "base_model" not in front_matter(card)


def test_two_policies_and_where_they_are_uploaded(tmp_path, monkeypatch):
    config = parse(
        ["longshort", "--long", "o/L0", "--short", "o/S0", "--rounds", "L", "--push_to_hub", "me/pair"]
    )
    run = finished_run(tmp_path, config, "hf_long", "hf_short")
    folders = finish.finish(run, config)
    assert [folder.name for folder in folders] == ["hf_long", "hf_short"]
    assert "- base model: `o/S0`" in (folders[1] / "README.md").read_text()
    uploaded = []
    monkeypatch.setattr(finish, "upload", lambda folder, name: uploaded.append((folder.name, name)))
    finish.push(folders, config)
    assert uploaded == [("hf_long", "me/pair-long"), ("hf_short", "me/pair-short")]
    finish.push(folders[:1], config)
    assert uploaded[-1] == ("hf_long", "me/pair"), "one model has the name that was given"


def test_an_upload_is_what_the_package_expects(tmp_path, monkeypatch):
    """Signatures are the real package's."""
    calls = {}
    for name in ("create_repo", "upload_folder"):
        calls[name] = create_autospec(getattr(huggingface_hub, name))
        monkeypatch.setattr(huggingface_hub, name, calls[name])
    finish.upload(tmp_path, "me/policy")
    calls["create_repo"].assert_called_once_with("me/policy", exist_ok=True)
    calls["upload_folder"].assert_called_once_with(
        repo_id="me/policy", folder_path=tmp_path, commit_message="Trained with thinkrl"
    )


def test_an_upload_that_fails_names_the_folder_that_is_safe(tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(UserError) as mistake:
        finish.upload(tmp_path, "me/policy")
    assert f"the run is complete, but {tmp_path} could not be uploaded" in str(mistake.value)
    assert f"`hf upload me/policy {tmp_path}`" in str(mistake.value) and "\n" not in str(mistake.value)

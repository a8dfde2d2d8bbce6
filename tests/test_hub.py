"""Models of the hub, through the real package: offline, so with what its cache holds."""

import huggingface_hub
import pytest
from huggingface_hub.utils import filter_repo_objects

from thinkrl import UserError, hub
from thinkrl.learner import TINY, model_path

COMMIT = "0" * 39 + "1"


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """An offline machine whose cache holds owner/tiny at main, as the hub's client lays it out."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    own = tmp_path / "models--owner--tiny"
    (own / "refs").mkdir(parents=True)
    (own / "refs" / "main").write_text(COMMIT)
    (own / "snapshots").mkdir()
    (own / "snapshots" / COMMIT).symlink_to(TINY)
    return own


def test_what_the_cache_holds_needs_no_network(cache):
    assert model_path("owner/tiny").resolve() == TINY.resolve()
    assert model_path(f"owner/tiny@{COMMIT}").resolve() == TINY.resolve()


def test_an_unknown_model_or_revision_offline_is_one_sentence(cache):
    for name in ("owner/other", "owner/tiny@v2"):
        with pytest.raises(UserError) as mistake:
            model_path(name, "--prm")
        sentence = str(mistake.value)
        assert sentence.startswith(f"--prm {name}: no such folder, and it cannot be fetched from the hub (")
        assert "\n" not in sentence


def test_revision_and_files_that_are_asked_for(monkeypatch, tmp_path):
    asked = {}

    def download(repository, *, revision, allow_patterns):
        asked.update(repository=repository, revision=revision, patterns=allow_patterns)
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    assert hub.fetch_model("owner/name@refs/pr/1") == tmp_path
    assert (asked["repository"], asked["revision"]) == ("owner/name", "refs/pr/1")
    files = """README.md config.json generation_config.json model-00001-of-00002.safetensors model-00002-of-00002.safetensors
    model.safetensors.index.json consolidated.safetensors original/consolidated.00.pth original/params.json onnx/model.onnx
    pytorch_model.bin tokenizer.json tokenizer_config.json tokenizer.model vocab.json merges.txt chat_template.jinja"""
    assert set(filter_repo_objects(files.split(), allow_patterns=asked["patterns"])) == {
        "config.json",
        "generation_config.json",
        "model-00001-of-00002.safetensors",
        "model-00002-of-00002.safetensors",
        "model.safetensors.index.json",
        "tokenizer.json",
        "tokenizer_config.json",
        "tokenizer.model",
        "vocab.json",
        "merges.txt",
        "chat_template.jinja",
    }


def test_without_the_extra(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"--model a/b: no such folder.*pip install 'thinkrl\[hub\]'"):
        model_path("a/b")


@pytest.mark.parametrize("name", ["nowhere", "a/b/c", "/tmp/nowhere", "a/b@"])
def test_what_is_no_name_of_the_hub_is_only_a_missing_folder(name):
    with pytest.raises(UserError, match=f"--model {name}: no such folder; give a Hugging Face folder"):
        model_path(name)

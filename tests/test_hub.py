"""Models and datasets of the hub, through the real package: offline, so with what its cache holds."""

import huggingface_hub
import pytest
from huggingface_hub.utils import filter_repo_objects

from thinkrl import UserError, hub
from thinkrl.data.problems import load_problems
from thinkrl.hub import choose_files
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


GSM8K = [
    "README.md",
    "main/train-0.parquet",
    "main/test-0.parquet",
    "socratic/train-0.parquet",
    "socratic/test-0.parquet",
]
GSM8K_CARD = [
    {
        "config_name": config,
        "data_files": [{"split": s, "path": f"{config}/{s}-*"} for s in ("train", "test")],
    }
    for config in ("main", "socratic")
]
OPENR1 = [*(f"data/train-{i}.parquet" for i in range(2)), "extended/train-0.parquet", "all/default-0.parquet"]
OPENR1_CARD = [
    {"config_name": "all", "data_files": [{"split": "default", "path": ["all/default-*"]}]},
    {"config_name": "default", "data_files": [{"split": "train", "path": "data/train-*"}]},
    {"config_name": "extended", "data_files": [{"split": "train", "path": "extended/train-*"}]},
]
ASDIV_CARD = [
    {"config_name": "asdiv", "data_files": [{"split": "validation", "path": "asdiv/v*"}], "default": True}
]


def chosen(files, card, *wanted):
    return choose_files(files, card, list(wanted), "hub:a/b")


@pytest.mark.parametrize("card", [[], GSM8K_CARD])
def test_configurations_and_splits(card):
    assert chosen(GSM8K, card) == ["main/train-0.parquet"], "main, where there is no default"
    assert chosen(GSM8K, card, "test") == ["main/test-0.parquet"]
    assert chosen(GSM8K, card, "socratic") == ["socratic/train-0.parquet"]
    assert chosen(GSM8K, card, "socratic", "test") == ["socratic/test-0.parquet"]
    with pytest.raises(UserError, match="hub:a/b: 'main' has no split 'dev', but train, test"):
        chosen(GSM8K, card, "dev")
    with pytest.raises(UserError, match="name one of its configurations.*: main, socratic"):
        chosen(GSM8K, card, "mian", "test")


def test_a_card_says_what_names_do_not():
    assert chosen(OPENR1, OPENR1_CARD) == ["data/train-0.parquet", "data/train-1.parquet"]
    assert chosen(OPENR1, OPENR1_CARD, "all") == ["all/default-0.parquet"], "its only split"
    assert chosen(["asdiv/validation-0.parquet"], ASDIV_CARD) == ["asdiv/validation-0.parquet"]
    assert chosen(["x/a.csv", "b.csv"], [{"config_name": "default", "data_files": "x/*.csv"}]) == ["x/a.csv"]
    assert chosen(["a.csv", "b.csv"], [{"config_name": "default", "data_files": ["a.csv"]}]) == ["a.csv"]


def test_names_without_a_card():
    assert chosen(["test.jsonl", "README.md"], []) == ["test.jsonl"], "the only split there is"
    assert chosen(["deepscaler.json", ".gitattributes"], []) == ["deepscaler.json"], (
        "no split named: for training"
    )
    assert chosen(["data/dapo-math-17k.parquet"], [], "train") == ["data/dapo-math-17k.parquet"]
    assert chosen(["data/math-00000-of-00001.parquet", "data/code-00000-of-00001.parquet"], [], "math") == [
        "data/math-00000-of-00001.parquet"
    ]
    assert chosen(["main/train/0000.parquet", "main/test/0000.parquet"], [], "main", "test") == [
        "main/test/0000.parquet"
    ]
    assert chosen(["train.jsonl.gz", "train_2.jsonl.gz", "trainer.json"], []) == [
        "train.jsonl.gz",
        "train_2.jsonl.gz",
    ]


def test_one_copy_of_a_split_is_enough():
    assert chosen(["train.jsonl", "train.parquet", "dataset_infos.json"], []) == ["train.parquet"]


def test_ambiguous_and_unreadable_datasets_are_refused():
    with pytest.raises(UserError, match="name one of its configurations.*: algebra, geometry"):
        chosen(["algebra/train.jsonl", "geometry/train.jsonl"], [])
    with pytest.raises(UserError, match="none of its files can be read: train.zip"):
        chosen(["train.zip"], [])
    with pytest.raises(UserError, match="write hub:owner/name"):
        chosen(GSM8K, [], "main", "test", "3")


def test_a_dataset_out_of_reach_is_a_sentence(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match="hub:openai/gsm8k:test: cannot be fetched"):
        load_problems("hub:openai/gsm8k:test")


def test_a_missing_extra_is_named_for_a_dataset(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"pip install 'thinkrl\[hub\]'"):
        load_problems("hub:openai/gsm8k")


@pytest.mark.parametrize(
    "name, sentence",
    [
        ("policy", "--push_to_hub is 'policy': it must be owner/name"),
        ("me/policy@v1", "--push_to_hub is 'me/policy@v1': it must be owner/name"),
        ("me/policy", "--push_to_hub me/policy: cannot be created or written; log in with `hf auth login`"),
    ],
)
def test_what_cannot_be_uploaded_is_refused_before_training(name, sentence, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(UserError) as mistake:
        hub.require_upload(name)
    assert str(mistake.value).startswith(sentence) and "\n" not in str(mistake.value)

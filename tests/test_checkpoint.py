"""Folders that transformers wrote, folders that transformers must read, and runs that must not notice an
interruption.
"""

import json
import subprocess
import sys

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch.distributed.fsdp import fully_shard

from thinkrl import UserError
from thinkrl.checkpoint import load_model, save_hf
from thinkrl.distributed import start, stop
from thinkrl.model import ModelConfig, Transformer

FAMILIES = {
    "Qwen2": {"num_attention_heads": 6, "num_key_value_heads": 1},
    "Qwen3": {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 10},
    "Llama": {
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "rope_parameters": {
            "rope_type": "llama3",
            "rope_theta": 500.0,
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 32,
        },
    },
}


def write_folder(path, family="Qwen2", tied=False, **options) -> transformers.PreTrainedModel:
    torch.manual_seed(0)
    config = getattr(transformers, f"{family}Config")(
        vocab_size=61, hidden_size=24, intermediate_size=40, num_hidden_layers=2, max_position_embeddings=64,
        tie_word_embeddings=tied, **FAMILIES[family],
    )  # fmt: skip
    model = getattr(transformers, f"{family}ForCausalLM")(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_()
    model.save_pretrained(path, **options)
    return model


@pytest.fixture(scope="module")
def group():
    start("cpu")  # another file's group may still be there: tests share a process in any order
    yield
    stop()


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("tied", [False, True])
def test_what_transformers_wrote_comes_back_to_it_unchanged(family, tied, tmp_path):
    theirs = write_folder(tmp_path / "theirs", family, tied)
    save_hf(load_model(tmp_path / "theirs"), None, tmp_path / "ours")
    back = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "ours")
    assert type(back) is type(theirs) and back.dtype == torch.float32
    expected = theirs.state_dict()
    assert back.state_dict().keys() == expected.keys()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in back.state_dict().items())
    config, expected = back.config.to_dict(), theirs.config.to_dict()
    assert {key for key in expected if config[key] != expected[key]} <= {"_name_or_path", "dtype"}


def test_shards_are_read_and_written(tmp_path):
    theirs = write_folder(tmp_path / "theirs", max_shard_size="10KB")
    assert len(list((tmp_path / "theirs").glob("*.safetensors"))) > 2
    model = load_model(tmp_path / "theirs")
    save_hf(model, None, tmp_path / "ours", shard_bytes=10_000)
    files = sorted((tmp_path / "ours").glob("*.safetensors"))
    assert len(files) > 2 and files[0].name == f"model-00001-of-{len(files):05}.safetensors"
    for file in files:
        tensors = load_file(file).values()
        # q, k and v stay together
        assert len(tensors) <= 3 or sum(tensor.nbytes for tensor in tensors) <= 10_000
    back = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "ours")
    assert all(torch.equal(tensor, theirs.state_dict()[name]) for name, tensor in back.state_dict().items())
    assert torch.equal(load_model(tmp_path / "ours").head_weight, model.head_weight)


def test_a_folder_can_be_written_in_another_dtype_and_over_an_older_one(tmp_path):
    write_folder(tmp_path / "model")
    model = load_model(tmp_path / "model")
    save_hf(model, None, tmp_path / "model", dtype=torch.bfloat16)
    back = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    assert torch.equal(back.lm_head.weight, model.head_weight.bfloat16())
    assert torch.equal(load_model(tmp_path / "model").head_weight, model.head_weight.bfloat16().float())
    assert [entry.name for entry in tmp_path.iterdir()] == ["model"]  # nothing temporary is left


def test_a_sharded_policy_is_written_whole(group, tmp_path):
    write_folder(tmp_path / "theirs")
    model = load_model(tmp_path / "theirs")
    expected = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    for block in model.blocks:
        fully_shard(block)
    save_hf(fully_shard(model), None, tmp_path / "ours")
    assert all(
        torch.equal(tensor, expected[name])
        for name, tensor in load_model(tmp_path / "ours").state_dict().items()
    )


def test_a_tied_head_stored_twice_is_read_once(tmp_path):
    write_folder(tmp_path, tied=True)
    edit(tmp_path, lambda tensors: tensors.update({"lm_head.weight": torch.zeros(61, 24)}))
    model = load_model(tmp_path)
    assert model.head_weight is model.embed.weight and model.head_weight.abs().max() > 0


def edit(path, change) -> None:
    tensors = load_file(path / "model.safetensors")
    change(tensors)
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})


def drop_a_shard(path) -> None:
    weights = load_file(path / "model.safetensors")
    (path / "model.safetensors").unlink()
    index = {"weight_map": dict.fromkeys(weights, "model-00001-of-00001.safetensors")}
    (path / "model.safetensors.index.json").write_text(json.dumps(index))


def shard_without_its_tensor(path) -> None:
    drop_a_shard(path)
    save_file({"model.norm.weight": torch.ones(24)}, path / "model-00001-of-00001.safetensors")


def truncate(path) -> None:
    whole = (path / "model.safetensors").read_bytes()
    (path / "model.safetensors").write_bytes(whole[: len(whole) // 2])


DAMAGE = {
    "no config": (lambda path: (path / "config.json").unlink(), "config.json: file not found"),
    "half a config": (
        lambda path: (path / "config.json").write_text('{"vocab'),
        "config.json: not readable as JSON",
    ),
    "a list for a config": (
        lambda path: (path / "config.json").write_text("[]"),
        "a JSON object is expected, not a list",
    ),
    "no weights": (
        lambda path: (path / "model.safetensors").unlink(),
        "neither model.safetensors nor model.saf",
    ),
    "half the weights": (truncate, "model.safetensors: damaged"),
    "not weights": (lambda path: (path / "model.safetensors").write_bytes(b""), "model.safetensors: damaged"),
    ".bin weights": (
        lambda path: (path / "model.safetensors").rename(path / "pytorch_model.bin"),
        "convert them to safete",
    ),
    "a shard is missing": (drop_a_shard, "model-00001-of-00001.safetensors: file not found"),
    "a shard lacks a tensor": (
        shard_without_its_tensor,
        r"00001.safetensors: tensor model.embed_tokens.weight of shape \[61, 24\] is missing",
    ),
    "an index without a map": (
        lambda path: (drop_a_shard(path), (path / "model.safetensors.index.json").write_text("{}")),
        "index.json: the object weight_map",
    ),
    "a tensor is missing": (
        lambda path: edit(path, lambda tensors: tensors.pop("model.layers.1.self_attn.k_proj.bias")),
        r"tensor model.layers.1.self_attn.k_proj.bias of shape \[4\] is missing",
    ),
    "a tensor of another shape": (
        lambda path: edit(path, lambda tensors: tensors.update({"model.norm.weight": torch.ones(23)})),
        r"model.safetensors: tensor model.norm.weight has shape \[23\], config.json asks for \[24\]",
    ),
    "a tensor too many": (
        lambda path: edit(
            path, lambda tensors: tensors.update({"model.layers.2.mlp.up_proj.weight": torch.ones(1)})
        ),
        "tensor model.layers.2.mlp.up_proj.weight is unknown to Qwen2ForCausalLM",
    ),
    "quantised weights": (
        lambda path: edit(
            path, lambda tensors: tensors.update({"model.norm.weight": torch.ones(24, dtype=torch.int8)})
        ),
        "tensor model.norm.weight is I8; quantised weights are not supported",
    ),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_folder_is_named_with_its_file_tensor_and_shape(damage, tmp_path):
    write_folder(tmp_path)
    spoil, words = DAMAGE[damage]
    spoil(tmp_path)
    with pytest.raises(UserError, match=words) as caught:
        load_model(tmp_path)
    assert str(tmp_path) in str(caught.value) and "\n" not in str(caught.value)


def test_a_folder_that_is_not_there_is_named(tmp_path):
    with pytest.raises(UserError, match="nowhere: no such folder"):
        load_model(tmp_path / "nowhere")


@pytest.mark.slow
def test_loading_never_holds_the_checkpoint_twice(tmp_path):
    write_folder(tmp_path / "warm-up")
    raw = {
        "architectures": ["LlamaForCausalLM"],
        "vocab_size": 4096,
        "hidden_size": 1024,
        "intermediate_size": 2048,
    }
    raw |= {"num_hidden_layers": 2, "num_attention_heads": 8, "max_position_embeddings": 64}
    model = Transformer.random(ModelConfig.from_hf(raw))
    save_hf(model, None, tmp_path / "large")
    script = """if True:
        import re, sys
        from pathlib import Path
        from thinkrl.checkpoint import load_model
        peak = lambda: 1024 * int(re.search(r"VmHWM:\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1])
        load_model(sys.argv[1])
        before = peak()
        model = load_model(sys.argv[2])
        print(peak() - before)
    """
    command = [sys.executable, "-c", script, tmp_path / "warm-up", tmp_path / "large"]
    grown = int(subprocess.run(command, check=True, capture_output=True).stdout)
    size = sum(parameter.nbytes for parameter in model.parameters())
    assert 0.9 * size < grown < 1.4 * size  # twice, if all of the files were in memory beside the parameters

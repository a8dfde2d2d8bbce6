"""Weights in and out: Hugging Face folders (config.json + safetensors), and step checkpoints that a run resumes from.

A parameter of ours is one Hugging Face tensor, or several stacked along their rows (`hf_layout` is the whole mapping), so
reading is a copy into rows and writing is a split of rows. Reading streams: parameters are allocated once, every tensor is
mapped from its file, checked and copied, and nothing is held twice.
"""

from __future__ import annotations

import contextlib
import json
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from thinkrl.model import ModelConfig, Transformer
from thinkrl.types import UserError

FLOAT_DTYPES = ("F64", "F32", "F16", "BF16")  # as safetensors spells them; anything else is quantised


def hf_layout(config: ModelConfig) -> dict[str, list[tuple[str, tuple[int, ...]]]]:
    """Our parameter name -> the Hugging Face tensors (name, shape) that are its rows, top to bottom."""
    D, F, Dh = config.width, config.mlp_width, config.head_dim
    q_rows, kv_rows = config.heads * Dh, config.kv_heads * Dh
    layout = {"embed.weight": [("model.embed_tokens.weight", (config.vocab_size, D))]}
    for layer in range(config.layers):
        ours, theirs = f"blocks.{layer}", f"model.layers.{layer}"
        projections = [("q", q_rows), ("k", kv_rows), ("v", kv_rows)]
        layout |= {
            f"{ours}.attention_norm.weight": [(f"{theirs}.input_layernorm.weight", (D,))],
            f"{ours}.qkv.weight": [(f"{theirs}.self_attn.{p}_proj.weight", (rows, D)) for p, rows in projections],
            f"{ours}.o.weight": [(f"{theirs}.self_attn.o_proj.weight", (D, q_rows))],
            f"{ours}.mlp_norm.weight": [(f"{theirs}.post_attention_layernorm.weight", (D,))],
            f"{ours}.gate_up.weight": [(f"{theirs}.mlp.{p}_proj.weight", (F, D)) for p in ("gate", "up")],
            f"{ours}.down.weight": [(f"{theirs}.mlp.down_proj.weight", (D, F))],
        }
        if config.qkv_bias:
            layout[f"{ours}.qkv.bias"] = [(f"{theirs}.self_attn.{p}_proj.bias", (rows,)) for p, rows in projections]
        if config.qk_norm:
            layout |= {f"{ours}.{p}_norm.weight": [(f"{theirs}.self_attn.{p}_norm.weight", (Dh,))] for p in ("q", "k")}
    layout["norm.weight"] = [("model.norm.weight", (D,))]
    if not config.tied:
        layout["head.weight"] = [("lm_head.weight", (config.vocab_size, D))]
    return layout


def load_model(path: str | Path, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu") -> Transformer:
    """Read a Hugging Face folder: config.json and model.safetensors, or its shards and their index.

    Raises UserError, naming file, tensor and shapes, for whatever is missing, damaged, quantised or of another shape.
    """
    path = Path(path)
    config = read_config(path)
    files = _tensor_files(path)
    model = Transformer.empty(config, dtype, device)
    layout = hf_layout(config)
    wanted = {name for parts in layout.values() for name, _ in parts}
    for name in files.keys() - wanted:
        if name != "lm_head.weight" and not name.endswith("rotary_emb.inv_freq"):  # a tied head and tables: derived
            raise UserError(f"{files[name]}: tensor {name} is unknown to {config.architecture} as config.json describes it")

    parameters = dict(model.named_parameters())
    assert parameters.keys() == layout.keys(), parameters.keys() ^ layout.keys()
    with contextlib.ExitStack() as stack, torch.no_grad():
        shards = {}
        for ours, parts in layout.items():
            row = 0
            for name, shape in parts:
                if name not in files:
                    raise UserError(f"{path}: tensor {name} of shape {list(shape)} is missing from the safetensors files")
                if files[name] not in shards:
                    shards[files[name]] = stack.enter_context(_open(files[name]))
                tensor = _read(shards[files[name]], files[name], name, shape)
                parameters[ours][row : row + shape[0]].copy_(tensor)
                row += shape[0]
    return model


def read_config(path: str | Path) -> ModelConfig:
    """The config.json of a Hugging Face folder."""
    path = Path(path)
    if not path.is_dir():
        raise UserError(f"{path}: no such folder; a model is a local Hugging Face folder (config.json + safetensors)")
    return ModelConfig.from_hf(_read_json(path / "config.json"), where=str(path / "config.json"))


def _read_json(file: Path) -> dict:
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{file}: file not found") from None
    except (OSError, ValueError) as error:
        raise UserError(f"{file}: not readable as JSON ({error})") from None
    if not isinstance(content, dict):
        raise UserError(f"{file}: a JSON object is expected, not a {type(content).__name__}")
    return content


def _tensor_files(path: Path) -> dict[str, Path]:
    """Tensor name -> the file that holds it."""
    single, index = path / "model.safetensors", path / "model.safetensors.index.json"
    if single.exists():
        with _open(single) as shard:
            return dict.fromkeys(shard.keys(), single)
    if index.exists():
        weight_map = _read_json(index).get("weight_map")
        if not isinstance(weight_map, dict):
            raise UserError(f"{index}: the object weight_map (tensor name -> file) is missing")
        return {name: path / file for name, file in weight_map.items()}
    if any(path.glob("*.bin")):
        raise UserError(f"{path}: only .bin weights; convert them to safetensors (transformers: save_pretrained)")
    raise UserError(f"{path}: neither model.safetensors nor model.safetensors.index.json is here")


def _open(file: Path):
    try:
        return safe_open(file, framework="pt")
    except FileNotFoundError:
        raise UserError(f"{file}: file not found") from None
    except (SafetensorError, OSError) as error:
        raise UserError(f"{file}: damaged or not a safetensors file ({error})") from None


def _read(shard, file: Path, name: str, shape: tuple[int, ...]) -> torch.Tensor:
    try:
        header = shard.get_slice(name)
    except SafetensorError:
        raise UserError(f"{file}: tensor {name} of shape {list(shape)} is missing") from None
    if tuple(header.get_shape()) != shape:
        raise UserError(f"{file}: tensor {name} has shape {header.get_shape()}, config.json asks for {list(shape)}")
    if header.get_dtype() not in FLOAT_DTYPES:
        raise UserError(f"{file}: tensor {name} is {header.get_dtype()}; quantised weights are not supported")
    return shard.get_tensor(name)

"""Read and write Hugging Face folders (config.json + safetensors). resume.py has the checkpoints of a run.

A parameter of ours is one Hugging Face tensor, or several stacked along their rows (`hf_layout` is the
mapping), so reading copies into rows and writing splits rows. Reading allocates the parameters once; every
tensor is mapped from its file, checked and copied. Writing gathers one parameter at a time and holds at most
one file's tensors.

A folder is written under a temporary name, then renamed.
"""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict import get_model_state_dict

from thinkrl import UserError
from thinkrl.distributed import on_main, rank, whole
from thinkrl.model import ModelConfig, Transformer
from thinkrl.run.files import read_json, write_json
from thinkrl.run.watch import alive

# our parameter -> the Hugging Face tensors that are its rows
Layout = dict[str, list[tuple[str, tuple[int, ...]]]]
FLOAT_DTYPES = ("F64", "F32", "F16", "BF16")  # in safetensors' spelling; other dtypes are quantised


def hf_layout(config: ModelConfig) -> Layout:
    """Map each parameter name to the Hugging Face tensors (name, shape) that are its rows, top to bottom."""
    D, F, Dh = config.width, config.mlp_width, config.head_dim
    q_rows, kv_rows = config.heads * Dh, config.kv_heads * Dh
    layout: Layout = {"embed.weight": [("model.embed_tokens.weight", (config.vocab_size, D))]}
    for layer in range(config.layers):
        ours, theirs = f"blocks.{layer}", f"model.layers.{layer}"
        projections = [("q", q_rows), ("k", kv_rows), ("v", kv_rows)]
        layout |= {
            f"{ours}.attention_norm.weight": [(f"{theirs}.input_layernorm.weight", (D,))],
            f"{ours}.qkv.weight": [
                (f"{theirs}.self_attn.{p}_proj.weight", (rows, D)) for p, rows in projections
            ],
            f"{ours}.o.weight": [(f"{theirs}.self_attn.o_proj.weight", (D, q_rows))],
            f"{ours}.mlp_norm.weight": [(f"{theirs}.post_attention_layernorm.weight", (D,))],
            f"{ours}.gate_up.weight": [(f"{theirs}.mlp.{p}_proj.weight", (F, D)) for p in ("gate", "up")],
            f"{ours}.down.weight": [(f"{theirs}.mlp.down_proj.weight", (D, F))],
        }
        if config.qkv_bias:
            layout[f"{ours}.qkv.bias"] = [
                (f"{theirs}.self_attn.{p}_proj.bias", (rows,)) for p, rows in projections
            ]
        if config.qk_norm:
            layout |= {
                f"{ours}.{p}_norm.weight": [(f"{theirs}.self_attn.{p}_norm.weight", (Dh,))]
                for p in ("q", "k")
            }
    layout["norm.weight"] = [("model.norm.weight", (D,))]
    if not config.tied:
        layout["head.weight"] = [("lm_head.weight", (config.vocab_size, D))]
    return layout


def read_config(path: str | Path) -> ModelConfig:
    """Read config.json of a Hugging Face folder. Raises UserError."""
    path = Path(path)
    if not path.is_dir():
        raise UserError(
            f"{path}: no such folder; a model is a local Hugging Face folder (config.json + safetensors)"
        )
    return ModelConfig.from_hf(read_json(path / "config.json"), where=str(path / "config.json"))


def load_model(
    path: str | Path, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu"
) -> Transformer:
    """Read a Hugging Face folder: config.json and model.safetensors, or its shards and their index.

    Raises UserError, naming file, tensor and shapes, for tensors that are missing, damaged, quantised or of
    another shape.
    """
    path = Path(path)
    config = read_config(path)
    files = tensor_files(path)
    model = Transformer.empty(config, dtype, device)
    layout = hf_layout(config)
    wanted = {name for parts in layout.values() for name, _ in parts}
    for name in files.keys() - wanted:
        # derived: a tied head, rotary tables
        if name != "lm_head.weight" and not name.endswith("rotary_emb.inv_freq"):
            raise UserError(
                f"{files[name]}: tensor {name} is unknown to {config.architecture} as config.json describes "
                "it"
            )

    assert dict(model.named_parameters()).keys() == layout.keys()
    fill(model, path, files, layout)
    return model


@torch.no_grad()
def fill(model: nn.Module, path: Path, files: dict[str, Path], layout: Layout) -> None:
    """Copy the tensors that `layout` names into the model's parameters, one at a time. Raises UserError as
    `load_model` does.
    """
    parameters = dict(model.named_parameters())
    for ours, parts in layout.items():
        row = 0
        for name, shape in parts:
            if name not in files:
                raise UserError(
                    f"{path}: tensor {name} of shape {list(shape)} is missing from the safetensors files"
                )
            # Reopened for each tensor: while a file is mapped, the parts that were read stay in memory.
            with _open(files[name]) as shard:
                parameters[ours][row : row + shape[0]].copy_(_read(shard, files[name], name, shape))
            row += shape[0]


def save_hf(
    model: Transformer,
    tokenizer: Any,
    path: str | Path,
    dtype: torch.dtype | None = None,
    shard_bytes: int = 4 << 30,
) -> None:
    """Write a Hugging Face folder that transformers loads with equal weights. Collective.

    tokenizer    object with `.save(folder)`, which writes its files; None: without them
    dtype        of the written tensors; None: that of the parameters
    shard_bytes  files above this size are split; rank 0 holds at most about one of them in memory
    """
    layout = hf_layout(model.config)
    state: Mapping[str, Any] = get_model_state_dict(model)
    dtype = dtype or model.head_weight.dtype
    parts = _split({name: state[name].numel() * dtype.itemsize for name in layout}, shard_bytes)
    names = [f"model-{i:05}-of-{len(parts):05}.safetensors" for i in range(1, len(parts) + 1)]
    files = dict(zip(names if len(parts) > 1 else ["model.safetensors"], parts))
    with atomic_dir(Path(path)) as folder:
        weight_map, total = _write_files(folder, files, state, layout, dtype)
        if folder and len(files) > 1:
            index = {"metadata": {"total_size": total}, "weight_map": weight_map}
            write_json(folder / "model.safetensors.index.json", index)
        if folder:
            name = str(dtype).removeprefix("torch.")
            write_json(folder / "config.json", model.config.to_hf() | {"dtype": name, "torch_dtype": name})
        if folder and tokenizer is not None:
            tokenizer.save(folder)


def _write_files(
    folder: Path | None,
    files: dict[str, list[str]],
    state: Mapping[str, Any],
    layout: Layout,
    dtype: torch.dtype,
) -> tuple[dict[str, str], int]:
    """Gather and write file by file, {file: our parameters}; rank 0 holds one file's tensors. Collective.

    Returns, on rank 0, the file of each tensor and the bytes of all.
    """
    weight_map: dict[str, str] = {}
    total = 0
    failed: Exception | None = None
    for file, names in files.items():
        tensors = hf_tensors(state, {name: layout[name] for name in names}, dtype)
        weight_map |= dict.fromkeys(tensors, file)
        total += sum(tensor.nbytes for tensor in tensors.values())
        try:
            if folder and not failed:
                save_file(tensors, folder / file, metadata={"format": "pt"})
        except (OSError, SafetensorError) as error:
            failed = error  # raised below: other ranks wait in the next file's gather
    if failed:
        raise failed
    return weight_map, total


def _split(sizes: dict[str, int], limit: int) -> list[list[str]]:
    """Names in order, cut into lists of at most `limit` bytes each; a larger one gets a list of its own."""
    parts: list[list[str]] = [[]]
    room = limit
    for name, size in sizes.items():
        if size > room and parts[-1]:
            parts.append([])
            room = limit
        parts[-1].append(name)
        room -= size
    return parts


def hf_tensors(
    state: Mapping[str, Any], layout: Layout, dtype: torch.dtype | None = None
) -> dict[str, Tensor]:
    """Gather parameters as Hugging Face tensors to rank 0's host memory; {} on other ranks. Collective.

    layout: the parameters and their tensors. dtype: None keeps the parameters' dtype.
    """
    tensors: dict[str, Tensor] = {}
    for ours, rows in layout.items():
        alive()
        full = whole(state[ours])
        if rank() == 0:
            parts = full.to("cpu", dtype).split([shape[0] for _, shape in rows])
            tensors |= {theirs: part.clone() for (theirs, _), part in zip(rows, parts)}
    return tensors


@contextlib.contextmanager
def atomic_dir(path: Path) -> Iterator[Path | None]:
    """Make a temporary folder that is flushed to disk and renamed to `path` at the end. Collective.

    Yields the folder on rank 0, None on others. If it cannot be written, UserError is raised on all ranks and
    `path` is unchanged; therefore code that fills it must raise only after its last collective.
    """
    make_temporary(path)
    with moved_at_the_end(path) as folder:
        yield folder


def make_temporary(path: Path) -> None:
    """Make an empty `temporary(path)`, which `moved_at_the_end` moves. Collective; may raise UserError."""

    def make() -> None:
        shutil.rmtree(temporary(path), ignore_errors=True)
        temporary(path).mkdir(parents=True)

    on_main(make)


@contextlib.contextmanager
def moved_at_the_end(path: Path, group: dist.ProcessGroup | None = None) -> Iterator[Path | None]:
    """The second half of `atomic_dir`, after `make_temporary`. Collective in the group."""
    folder, error = temporary(path), ""

    def move() -> None:
        if error:
            raise OSError(0, error, str(path))
        for file in [file for file in folder.rglob("*") if file.is_file()]:
            with file.open("rb") as opened:
                os.fsync(opened.fileno())
        retired = path.with_name(path.name + ".old")
        shutil.rmtree(retired, ignore_errors=True)
        if path.exists():
            path.rename(retired)
        folder.rename(path)
        shutil.rmtree(retired, ignore_errors=True)

    try:
        yield folder if rank() == 0 else None
    except CheckpointException as failed:  # of one rank, raised on all
        error = str(min(failed.failures.items())[1][0])
    except (OSError, SafetensorError) as failed:
        error = str(failed)
    on_main(move, group=group)


def temporary(path: Path) -> Path:
    """Path under which a file or folder is written before it is renamed."""
    return path.with_name(path.name + ".tmp")


def tensor_files(path: Path) -> dict[str, Path]:
    """Map each tensor name to its file."""
    single, index = path / "model.safetensors", path / "model.safetensors.index.json"
    if single.exists():
        with _open(single) as shard:
            return dict.fromkeys(shard.keys(), single)
    if index.exists():
        weight_map = read_json(index).get("weight_map")
        if not isinstance(weight_map, dict):
            raise UserError(f"{index}: the object weight_map (tensor name -> file) is missing")
        return {name: path / file for name, file in weight_map.items()}
    if any(path.glob("*.bin")):
        raise UserError(
            f"{path}: only .bin weights; convert them to safetensors (transformers: save_pretrained)"
        )
    raise UserError(f"{path}: neither model.safetensors nor model.safetensors.index.json is here")


def _open(file: Path):
    try:
        return safe_open(file, framework="pt")
    except FileNotFoundError:
        raise UserError(f"{file}: file not found") from None
    except (SafetensorError, OSError) as error:
        raise UserError(f"{file}: damaged or not a safetensors file ({error})") from None


def _read(shard, file: Path, name: str, shape: tuple[int, ...]) -> Tensor:
    try:
        header = shard.get_slice(name)
    except SafetensorError:
        raise UserError(f"{file}: tensor {name} of shape {list(shape)} is missing") from None
    if tuple(header.get_shape()) != shape:
        raise UserError(
            f"{file}: tensor {name} has shape {header.get_shape()}, config.json asks for {list(shape)}"
        )
    if header.get_dtype() not in FLOAT_DTYPES:
        raise UserError(f"{file}: tensor {name} is {header.get_dtype()}; quantised weights are not supported")
    return shard.get_tensor(name)

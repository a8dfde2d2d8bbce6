"""A policy with its optimizer, reference and sampler: creation, checkpoints, restoring."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Generic, TypeVar

import torch
import torch.distributed as dist

from thinkrl import UserError
from thinkrl.checkpoint import load_model, read_config, save_hf, temporary
from thinkrl.config import SAMPLING, Config, fit_to_context
from thinkrl.distributed import World, free_memory, global_max, on_main, shard
from thinkrl.hub import HUB_NAME, fetch_model
from thinkrl.memory import Setting, fit_to_memory, parameters
from thinkrl.model import Transformer
from thinkrl.resume import begin_step, load_latest, point_latest, save_step
from thinkrl.run.folder import begun_with
from thinkrl.sampler import Sampler
from thinkrl.tokenizer import Tokenizer

TINY = Path(__file__).parent / "assets" / "tiny"


M = TypeVar("M", bound=torch.nn.Module)


@dataclass
class Learner(Generic[M]):
    """Model that is trained: a policy, or a step reward model."""

    policy: M  # sharded; fp32 master weights
    tokenizer: Tokenizer
    optimizer: torch.optim.Optimizer
    reference: M | None = None  # frozen start policy, sharded; None without a KL term
    files: dict[str, str] = field(default_factory=dict)  # name -> text of files saved with its weights

    def move_moments(self, device: torch.device) -> None:
        """Move AdamW's moments, half of a policy's memory, which only its own steps need."""
        for state in self.optimizer.state.values():
            for name in ("exp_avg", "exp_avg_sq"):
                state[name] = state[name].to(device)

    def reset_reference(self) -> None:
        """Copy the policy's current weights to the reference."""
        if self.reference is not None:
            with torch.no_grad():
                for kept, moving in zip(self.reference.parameters(), self.policy.parameters()):
                    kept.copy_(moving)


@dataclass(kw_only=True)
class Actor(Learner[Transformer]):
    """Policy that is trained on its own samples."""

    sampler: Sampler  # this rank's full copy of the weights in the compute dtype


def model_path(model: str, option: str = "--model") -> Path:
    """Find the folder of a model: a path, 'tiny' for the embedded model, or owner/name[@revision] of the hub.

    Raises UserError if there is none.
    """
    path = TINY if model == "tiny" else Path(model)
    if path.is_dir():
        return path
    if HUB_NAME.fullmatch(model):
        return fetch_model(model, option)
    raise UserError(
        f"{option} {model}: no such folder; give a Hugging Face folder, owner/name[@revision] of the hub, or "
        "'tiny'"
    )


def fitted(config: Config, world: World) -> Config:
    """Apply `fit_to_context` for the smallest context of the models; rank 0 prints what was lowered."""
    shortest = min(read_config(path).max_positions for path in _model_paths(config))
    config, line = fit_to_context(config, shortest)
    if line and world.main:
        print(line)
    return config


def fitted_to_memory(config: Config, world: World) -> Config:
    """Apply `fit_to_memory` for the larger model, the same on all ranks; rank 0 prints it. Collective."""
    configs = [read_config(path) for path in _model_paths(config)]
    setting = Setting(
        ranks=world.size // config.replicate,
        policies=2 if config.preset == "longshort" else 1,
        reference=config.kl_coef > 0,
        sampler=config.preset in SAMPLING,
        b=compute_dtype(config, world).itemsize,
        cuda=world.device.type == "cuda",
    )
    free = -global_max(-free_memory(world.device))
    largest = max(configs, key=lambda c: c.layers * parameters(c)[0])
    config, line = fit_to_memory(config, largest, setting, free, begun_with(config, world))
    if line and world.main:
        print(line)
    return config


def _model_paths(config: Config) -> list[Path]:
    two = config.preset == "longshort" and config.long
    return [model_path(config[key], f"--{key}") for key in (("long", "short") if two else ("model",))]


def compute_dtype(config: Config, world: World) -> torch.dtype:
    """Resolve --dtype: auto is bf16 on CUDA, fp32 on CPU."""
    if config.dtype == "auto":
        return torch.bfloat16 if world.device.type == "cuda" else torch.float32
    return getattr(torch, config.dtype)


def save_dtype(config: Config, world: World) -> torch.dtype:
    """Resolve --save_dtype, the dtype of exported weights."""
    return compute_dtype(config, world) if config.save_dtype == "auto" else getattr(torch, config.save_dtype)


def new_learner(
    path: Path, config: Config, world: World, tokenizer: Tokenizer, files: dict[str, str] | None = None
) -> Learner[Transformer]:
    """Load a policy from a checkpoint folder for training. files: see `Learner`."""
    dtype = compute_dtype(config, world)

    def sharded() -> Transformer:
        """Load to host memory and shard one block at a time, so a device never holds all fp32 weights."""
        return shard(
            load_model(path), world, dtype, config.replicate, config.activation_checkpointing, config.compile
        )

    policy = sharded()
    reference = sharded().requires_grad_(False) if config.kl_coef else None
    return Learner(policy, tokenizer, new_optimizer(policy, config), reference, files or {})


def new_actor(
    path: Path,
    config: Config,
    world: World,
    tokenizer: Tokenizer,
    files: dict[str, str] | None = None,
    samplers: int = 1,
) -> Actor:
    """Make `new_learner` with a sampler. samplers: number that share a device's memory for KV pages."""
    sampler = Sampler(
        load_model(path, compute_dtype(config, world), world.device),
        tokenizer,
        config.kv_pages or None,
        max_rows=config.max_rows,
        cuda_graphs=config.cuda_graphs,
        memory_share=0.8 / samplers,
    )
    return Actor(**vars(new_learner(path, config, world, tokenizer, files)), sampler=sampler)


def new_optimizer(model: torch.nn.Module, config: Config) -> torch.optim.Optimizer:
    """Make AdamW, fused on CUDA; only matrices have weight decay."""
    return torch.optim.AdamW(
        [
            {"params": [p for p in model.parameters() if p.ndim > 1], "weight_decay": config.weight_decay},
            {"params": [p for p in model.parameters() if p.ndim == 1], "weight_decay": 0.0},
        ],
        lr=config.lr,
        betas=(config.beta1, config.beta2),
        fused=next(model.parameters()).is_cuda or None,
    )


def learning_rate(step: int, steps: int, config: Config) -> float:
    """Learning rate of a step, from 0: linear warm-up from above 0, then constant or a cosine to 0."""
    warmup = max(1, round(config.warmup * steps))
    if step < warmup:
        return config.lr * (step + 1) / warmup
    if config.schedule == "constant":
        return config.lr
    return config.lr * 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))


def save(
    folder: Path,
    step: int,
    learners: Mapping[str, Learner],
    state: dict,
    config: Config,
    group: dist.ProcessGroup,
    export: Callable = save_hf,
) -> Callable[[], None]:
    """Begin checkpoints/step_N: the state for a resume and, by `export`, a folder per learner. Collective.

    The state is copied and the folders are written. Returns a function that writes the copy, for another
    thread, with the group's collectives. It updates `latest` last, so a run that is killed before resumes
    from the previous checkpoint.
    """
    snapshot = begin_step(folder, step, _modules(learners), _optimizers(learners), state)
    for name, learner in learners.items():
        own = temporary(snapshot.path) / {"policy": "hf", "prm": "prm"}.get(name, f"hf_{name}")
        export(learner.policy, learner.tokenizer, own)
        on_main(_write_files, own, learner.files)

    def write() -> None:
        save_step(snapshot, group)
        point_latest(folder, step, config.keep_checkpoints, group)

    return write


def restore(folder: Path, learners: Mapping[str, Learner]) -> tuple[int, dict]:
    """Load the latest usable checkpoint into learners and samplers: (step, state), or (0, {}). Collective."""
    step, state = load_latest(folder, _modules(learners), _optimizers(learners))
    for learner in learners.values():
        if step and isinstance(learner, Actor):
            learner.sampler.load_weights(learner.policy)
    return step, state


def _write_files(folder: Path, files: dict[str, str]) -> None:
    for name, text in files.items():
        (folder / name).write_text(text, encoding="utf-8")


def _modules(learners: Mapping[str, Learner]) -> dict[str, torch.nn.Module]:
    references = {f"{name}_reference": x.reference for name, x in learners.items() if x.reference is not None}
    return {name: x.policy for name, x in learners.items()} | references


def _optimizers(learners: Mapping[str, Learner]) -> dict[str, torch.optim.Optimizer]:
    return {name: x.optimizer for name, x in learners.items()}

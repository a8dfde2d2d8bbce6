"""What several tests share: launching ranks, a tiny vocabulary, a random step reward model."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import tokenizers
import torch
from tokenizers import decoders, models

from thinkrl.grading.algebra import has_algebra
from thinkrl.l2t.prm import StepRewardModel
from thinkrl.model import ModelConfig
from thinkrl.tokenizer import Tokenizer

ROOT = Path(__file__).parent.parent
needs_algebra = pytest.mark.skipif(not has_algebra(), reason="needs math-verify: the extra [math]")


def python(*arguments: str, **environment: str) -> subprocess.CompletedProcess:
    """A program of the repository in a process of its own: `python("train.py", "sft", …)`."""
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT)} | environment,
        capture_output=True,
        text=True,
    )


def torchrun(ranks: int, *arguments: str, **environment: str) -> subprocess.CompletedProcess:
    """The same on so many ranks of this machine: of its GPUs, or of its CPU where they are fewer."""
    launch = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"]
    hidden = {} if ranks <= torch.cuda.device_count() else {"CUDA_VISIBLE_DEVICES": ""}
    return python(*launch, *arguments, **hidden | environment)


PIECES = [
    "<eos>",
    "?",
    "a",
    "b",
    "4",
    "5",
    "<answer>",
    "</answer>",
    "<extra_0>",
    "<episode_1>",
    "</episode_1>",
    " ",
    "\n",
]
ID = {piece: i for i, piece in enumerate(PIECES)}
V = 16
PRM_CONFIG = ModelConfig(
    "Qwen2ForCausalLM",
    vocab_size=V,
    width=16,
    layers=2,
    heads=2,
    kv_heads=1,
    head_dim=8,
    mlp_width=24,
    max_positions=128,
)


def write_tokenizer(folder, pieces=PIECES):
    raw = tokenizers.Tokenizer(models.BPE({piece: i for i, piece in enumerate(pieces)}, []))
    raw.add_special_tokens([piece for piece in pieces if len(piece) > 1])
    raw.decoder = decoders.Fuse()
    folder.mkdir(exist_ok=True)
    raw.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<eos>"}))
    return Tokenizer(folder)


def random_prm(two_layers=False, separator=None, seed=0, config=PRM_CONFIG) -> StepRewardModel:
    torch.manual_seed(seed)
    model = StepRewardModel(config, two_layers, separator)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.normal_(0, 0.3) if not name.endswith("norm.weight") else parameter.fill_(1.0)
    return model

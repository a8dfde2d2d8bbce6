"""What training keeps in memory, measured, against the formulas; and the choices made from them."""

import json
from collections.abc import Callable
from dataclasses import replace
from functools import partial

import pytest
import torch
from torch import nn

from fake_cuda import CUDA, FusedNorm, Launches, fake_cuda
from kernels.attention import packed_attention, packed_attention_triton, packed_attention_varlen
from thinkrl import distributed
from thinkrl.config import as_dict, parse
from thinkrl.distributed import checkpoint_block, free_memory
from thinkrl.learner import fitted_to_memory
from thinkrl.memory import CHECKPOINTING, Setting, activation_bytes, fit_to_memory, update_bytes
from thinkrl.model import ModelConfig, Transformer, inverse_frequencies, make_rotate
from thinkrl.run.folder import begun_with, open_run

SMALL = ModelConfig("LlamaForCausalLM", 64, 48, 3, 4, 2, 16, 112, 512)
SEVEN_B = ModelConfig("Qwen2ForCausalLM", 152064, 3584, 28, 28, 4, 128, 18944, 32768)
SMOLLM2 = ModelConfig("LlamaForCausalLM", 49152, 576, 30, 9, 3, 64, 1536, 8192, tied=True)  # 135 M
ARCHITECTURES = ("LlamaForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM")


def saved_bytes(model: Transformer, how: str, cu_seqlens: torch.Tensor, attention: Callable) -> int:
    """What one block keeps for its backward, without its weights, the tables of rotation and cu_seqlens."""
    block, found, kept = model.blocks[0], {}, []
    checkpoint_block(block, how)
    not_counted = {p.untyped_storage()._cdata for p in model.parameters()}

    def keep(t: torch.Tensor) -> torch.Tensor:
        kept.append(t)  # alive, so that no storage takes the place of another
        if t.untyped_storage()._cdata not in not_counted:
            found[t.untyped_storage()._cdata] = t.untyped_storage().nbytes()
        return t

    T, head_dim, weight = 128, model.config.head_dim, model.embed.weight
    rotate = make_rotate(torch.arange(T, device=weight.device), head_dim, model.config.rope)
    for table in (cell.cell_contents for cell in rotate.__closure__):
        if isinstance(table, torch.Tensor):
            not_counted.add(table.untyped_storage()._cdata)
    not_counted.add(cu_seqlens.untyped_storage()._cdata)
    x = torch.zeros(T, model.config.width, dtype=weight.dtype, device=weight.device, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        block(x, rotate, lambda layer, q, k, v: attention(q, k, v, cu_seqlens))
    return sum(found.values())


@pytest.mark.parametrize("how", CHECKPOINTING)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_block_keeps_what_the_formula_says_on_a_cpu(architecture, how):
    config = replace(SMALL, architecture=architecture)
    cu_seqlens = torch.tensor([0, 128], dtype=torch.int32)
    saved = saved_bytes(Transformer.random(config), how, cu_seqlens, packed_attention)
    assert saved == 128 * activation_bytes(config, how, b=4, cuda=False)


@pytest.mark.parametrize("attention", [packed_attention_triton, partial(packed_attention_varlen, longest=98)])
@pytest.mark.parametrize("how", CHECKPOINTING)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_block_keeps_what_the_formula_says_on_cuda(architecture, how, attention, monkeypatch):
    config = replace(SMALL, architecture=architecture)
    monkeypatch.setattr(nn.RMSNorm, "forward", lambda norm, x: FusedNorm.apply(x, norm.weight))
    inverse_frequencies.cache_clear()
    cu_seqlens = torch.tensor([0, 30, 128], dtype=torch.int32)
    with fake_cuda(), Launches():
        torch.set_default_dtype(torch.bfloat16)
        try:
            with CUDA:
                model = Transformer(config)
        finally:
            torch.set_default_dtype(torch.float32)
        saved = saved_bytes(model, how, cu_seqlens.to(CUDA), attention)
    inverse_frequencies.cache_clear()
    assert saved - 128 * activation_bytes(config, how) in (0, 16), (
        "FlashAttention keeps the state of a generator"
    )


def test_bytes_by_hand():
    # 7B, bf16: 2 (4 · 18944 + 4 · 3584 + 64 · 128) + 4 · 30; without the first term; 2 · 3584
    assert activation_bytes(SEVEN_B) == 196_728
    assert activation_bytes(SEVEN_B, "selective") == 45_176
    assert activation_bytes(SEVEN_B, "full") == 7_168
    # 135 M, fp32 on a CPU: 4 (4 · 1536 + 6 · 576 + 33 · 64) + 4 · 11, times 30 layers: 1.3 MiB a token
    assert 30 * activation_bytes(SMOLLM2, b=4, cuda=False) == 1_406_760


@pytest.mark.parametrize("how", CHECKPOINTING[1:])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_gradients_do_not_depend_on_what_is_recomputed(architecture, how):
    config = replace(SMALL, architecture=architecture)
    cu_seqlens = torch.tensor([0, 5, 12], dtype=torch.int32)
    tokens = torch.randint(config.vocab_size, (12,))
    gradients = []
    for mode in ("none", how):
        model = Transformer.random(config)
        for block in model.blocks:
            checkpoint_block(block, mode)
        model(tokens, cu_seqlens).square().sum().backward()
        gradients.append([p.grad for p in [model.embed.weight, *model.blocks.parameters()]])
    assert all(torch.equal(a, b) for a, b in zip(*gradients)) and gradients[0][0].norm() > 0


CPU = Setting(b=4, cuda=False)


def fit(model: ModelConfig, gb: float, *argv: str, setting: Setting = CPU) -> tuple:
    """(activation checkpointing, tokens of a row, the line)"""
    config, line = fit_to_memory(parse(["grpo", "--model", "some/folder", *argv]), model, setting, gb * 1e9)
    return config.activation_checkpointing, config.micro_batch_tokens, line


def test_choices_on_a_cpu():
    """135 M parameters take 3.2 GB, and a token of a row 1.4 MB: 23 GB with 16,384 of them."""
    assert fit(SMOLLM2, 40)[:2] == ("none", 16384)
    assert fit(SMOLLM2, 20)[:2] == ("none", 8192)
    assert fit(SMOLLM2, 12)[:2] == ("none", 4096)
    assert fit(SMOLLM2, 8)[:2] == ("selective", 4096)
    assert fit(SMOLLM2, 5.5)[0] == "full"
    mode, row, line = fit(SMOLLM2, 2)
    assert (mode, row) == ("full", 2048) and "more ranks" in line, "completions have rows of 2,048 tokens"


def test_what_is_given_is_kept():
    assert fit(SMOLLM2, 8, "--micro_batch_tokens", "16384")[:2] == ("full", 16384)
    assert fit(SMOLLM2, 12, "--activation_checkpointing", "full")[:2] == ("full", 16384)
    both = ("--activation_checkpointing", "none", "--micro_batch_tokens", "16384")
    assert fit(SMOLLM2, 1, *both) == ("none", 16384, "")
    assert fit(SMOLLM2, 20, "--max_tokens", "16384")[:2] == ("selective", 16384), "of one completion already"
    assert fit(SMOLLM2, 12, "--activation_checkpointing", "auto") == fit(SMOLLM2, 12)


def test_7b_on_eight_gpus():
    """Resting 27 GB, and 90 GB of activations in a row of 16,384 tokens: 80 GB hold a row of 4,096."""
    eight = Setting(ranks=8)
    assert fit(SEVEN_B, 80, setting=eight)[:2] == ("none", 4096)
    l2t = ["--max_tokens", "16384", "--micro_batch_tokens", "16384"]
    assert fit(SEVEN_B, 85, *l2t, setting=eight)[:2] == ("selective", 16384)


def test_the_line_says_what_and_why():
    line = fit(SMOLLM2, 12)[2]
    need, more = (sum(update_bytes(SMOLLM2, T, "none", CPU).values()) / 1e9 for T in (4096, 16384))
    assert line == (
        f"--activation_checkpointing none --micro_batch_tokens 4096: an update takes about {need:.1f} GB of "
        "the 12.0 that a rank has free; with --activation_checkpointing none --micro_batch_tokens 16384 it "
        f"would take {more:.1f}"
    )
    assert 8.8 < need < 9 and 26 < more < 28


def test_the_partner_s_moments_are_not_on_the_gpu():
    one, two = (sum(update_bytes(SEVEN_B, 0, "none", Setting(policies=n)).values()) for n in (1, 2))
    P = 7_615_616_512
    assert two - one == (4 + 2) * P


def test_a_container_s_limit_counts(monkeypatch, tmp_path):
    monkeypatch.setattr(distributed, "CGROUP", tmp_path)
    before = free_memory(torch.device("cpu"))
    (tmp_path / "memory.max").write_text("max\n")
    assert free_memory(torch.device("cpu")) == pytest.approx(before, rel=0.2)
    (tmp_path / "memory.max").write_text("3000000\n")
    (tmp_path / "memory.stat").write_text("anon 1000000\nfile 500000\n")
    assert free_memory(torch.device("cpu")) == 2_000_000
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    assert free_memory(torch.device("cpu")) == 1_000_000


def test_a_resumed_run_takes_what_it_began_with(tmp_path, capsys, monkeypatch):
    world = distributed.start("cpu")
    argv = ["grpo", "--runs_dir", str(tmp_path), "--resume", "auto", "--steps", "3"]
    monkeypatch.setattr("thinkrl.learner.free_memory", lambda device: 1e8)
    first = fitted_to_memory(parse(argv), world)
    assert (first.activation_checkpointing, first.micro_batch_tokens) != ("none", 4096)
    folder = open_run(first, world).folder
    assert json.loads((folder / "config.json").read_text()) == as_dict(first)
    assert "1 GB of the 0.1" in capsys.readouterr().out
    monkeypatch.setattr("thinkrl.learner.free_memory", lambda device: 1e12)
    again = fitted_to_memory(parse(argv), world)
    assert capsys.readouterr().out.endswith(": as the run began\n")
    assert as_dict(again) == as_dict(first) and open_run(again, world).resumed
    given = [*argv, "--micro_batch_tokens", "8192"]
    assert begun_with(parse(given), world) == {}, "another value was given: another run"
    other = fitted_to_memory(parse([*argv, "--lr", "1"]), world)
    assert (other.activation_checkpointing, other.micro_batch_tokens) == ("none", 4096)

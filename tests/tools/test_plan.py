"""The planner's memory against what the code allocates, its arithmetic against numbers done by hand."""

from dataclasses import replace

import pytest
import torch

from helpers import python
from kernels.attention import packed_attention
from thinkrl.config import parse as parse_training
from thinkrl.learner import new_optimizer
from thinkrl.model import ModelConfig, Transformer, make_rotate, sequence_positions
from thinkrl.tools.plan import Options, activation_bytes, fits, memory, models, parameters, remedy, seconds

SEVEN_B = models(Options())["Qwen2.5-7B"]
SMALL = ModelConfig("LlamaForCausalLM", 64, 48, 3, 4, 2, 16, 112, 512)


@pytest.mark.parametrize(
    "name, count",
    [("0.5B", 494_032_768), ("1.5B", 1_543_714_304), ("7B", 7_615_616_512), ("32B", 32_763_876_352)],
)
def test_parameters_are_those_that_the_models_publish(name, count):
    config = models(Options())[f"Qwen2.5-{name}"]
    block, root = parameters(config)
    assert config.layers * block + root == count


@pytest.mark.parametrize("architecture", ["LlamaForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM"])
def test_parameters_are_the_model_s(architecture):
    config = replace(SMALL, architecture=architecture, tied=architecture == "Qwen2ForCausalLM")
    block, root = parameters(config)
    assert config.layers * block + root == sum(p.numel() for p in Transformer.empty(config).parameters())


def saved_bytes(config: ModelConfig, T: int) -> int:
    """What one block keeps for its backward on the CPU in fp32, the tables of rotation aside."""
    model, found = Transformer.random(config), {}
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    cu_seqlens = torch.tensor([0, T], dtype=torch.int32)
    rotate = make_rotate(sequence_positions(cu_seqlens, T), config.head_dim, config.rope)
    kept = []  # alive, so that no address is used twice

    def keep(t: torch.Tensor) -> torch.Tensor:
        kept.append(t)
        if t.untyped_storage().data_ptr() not in own:
            found[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    x = torch.randn(T, config.width, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        model.blocks[0](x, rotate, lambda layer, q, k, v: packed_attention(q, k, v, cu_seqlens))
    return sum(found.values()) - 2 * 4 * T * config.head_dim


@pytest.mark.parametrize(
    "config",
    [
        replace(SMALL, width=256, mlp_width=704, head_dim=64),
        replace(SMALL, width=128, mlp_width=512, heads=8),
    ],
)
def test_activations_are_what_the_backward_keeps_within_15_percent(config):
    T = 128
    assert activation_bytes(config, b=4, fused=False) * T == pytest.approx(saved_bytes(config, T), rel=0.15)


def test_activations_by_hand():
    # 7B, bf16: 2 (4 · 18944 + 4 · 3584 + 64 · 128) + 4 · 28 + 8 = 196,728
    assert activation_bytes(SEVEN_B) == 196_728
    assert activation_bytes(SEVEN_B, checkpointing=True) == 2 * 3584


def test_resting_memory_is_the_tensors_that_training_holds():
    policy = Transformer.random(SMALL)
    optimizer = new_optimizer(policy, parse_training(["grpo"]))
    for p in policy.parameters():
        p.grad = torch.zeros_like(p)
    optimizer.step()
    moments = [v for state in optimizer.state.values() for v in state.values() if v.ndim]
    held = sum(t.nbytes for t in [*policy.parameters(), *moments])
    held += sum(p.numel() * 2 for p in policy.parameters())  # the sampler's bf16 copy
    assert memory(SMALL, 1, Options())["resting"] * 1e9 == pytest.approx(held, rel=0.001)


def test_sharding_and_two_policies():
    one, eight = (memory(SEVEN_B, gpus, Options()) for gpus in (1, 8))
    for part in ("weights", "AdamW", "gradients"):
        assert eight[part] == pytest.approx(one[part] / 8)
    assert eight["sampler"] == one["sampler"] == pytest.approx(2 * 7.615616512)
    two = memory(SEVEN_B, 8, Options(policies=2))
    assert two["resting"] == pytest.approx(2 * eight["resting"]) and two["gradients"] == eight["gradients"]
    assert memory(SEVEN_B, 8, Options(reference=True))["reference"] == eight["weights"]


def test_what_does_not_fit_and_what_helps():
    options = Options()
    assert not fits(memory(SEVEN_B, 8, options), options)
    assert remedy(SEVEN_B, 8, options) == "fits with --activation_checkpointing true"
    assert "larger GPUs" in remedy(models(options)["Qwen2.5-32B"], 8, options)
    assert fits(memory(SEVEN_B, 8, replace(options, gpu_memory=141.0)), replace(options, gpu_memory=141.0))


def test_seconds_by_hand():
    # 1 GPU, 1 problem x 1 completion of 10 tokens behind 6: ten decode steps; 16 tokens trained.
    o = Options(
        problems_per_step=1, group_size=1, prompt_tokens=6, completion_tokens=10, training=1.0, decoding=1.0
    )
    block, _ = parameters(SMALL)
    products = 3 * block + 64 * 48
    step = 2 * products + 2 * 2 * 3 * 2 * 16 * 11  # weights, and K/V of 6 + 10/2 tokens
    t = seconds(SMALL, 1, o, kv_gb=1.0)
    assert t["rollout"] == pytest.approx(10 * step / 3350e9)
    attention = 3.5 * 2 * 3 * 4 * 16 * 16
    assert t["training"] == pytest.approx(16 * (6 * products + attention) / 989e12)
    assert t["communication"] == 0
    assert seconds(SMALL, 1, replace(o, decoding=0.5), 1.0)["rollout"] == pytest.approx(2 * t["rollout"])


def test_the_command(tmp_path):
    done = python("-m", "thinkrl.tools.plan", "--model", "thinkrl/assets/tiny", "--gpus", "2")
    assert done.returncode == 0 and "GPUs" in done.stdout and "yes" in done.stdout
    done = python("-m", "thinkrl.tools.plan", "--model", str(tmp_path / "none"))
    assert done.returncode == 2 and done.stderr.startswith("thinkrl.tools.plan: --model")

"""The planner's memory against what the code allocates, its arithmetic against numbers done by hand."""

from dataclasses import replace

import pytest
import torch

from helpers import python
from thinkrl.config import parse as parse_training
from thinkrl.learner import new_optimizer
from thinkrl.memory import parameters
from thinkrl.model import ModelConfig, Transformer
from thinkrl.tools.plan import Options, fits, memory, models, parse, remedy, seconds

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
    assert two["weights"] == pytest.approx(2 * eight["weights"]) and two["sampler"] == 2 * eight["sampler"]
    assert (two["AdamW"], two["gradients"]) == (eight["AdamW"], eight["gradients"])
    assert memory(SEVEN_B, 8, Options(reference=True))["reference"] == eight["weights"]


def test_what_does_not_fit_and_what_helps():
    options = Options()
    assert not fits(memory(SEVEN_B, 8, options), options)
    assert remedy(SEVEN_B, 8, options) == "fits with --micro_batch_tokens 4096"
    smaller = remedy(SEVEN_B, 8, replace(options, gpu_memory=61.0))
    assert smaller == "fits with --activation_checkpointing selective --micro_batch_tokens 8192"
    assert "larger GPUs" in remedy(models(options)["Qwen2.5-32B"], 8, options)
    assert fits(memory(SEVEN_B, 8, replace(options, gpu_memory=141.0)), replace(options, gpu_memory=141.0))


def test_every_remedy_is_made_of_options_and_makes_it_fit():
    helped = set()
    for gpu_memory in range(30, 160, 10):
        for gpus in (1, 8, 64):
            o = Options(gpu_memory=float(gpu_memory))
            for c in models(o).values():
                verdict, _, words = remedy(c, gpus, o).partition(" with ")
                if verdict == "fits":
                    parse_training(["grpo", *words.split()])
                    changed = parse([*words.split(), "--gpu_memory", str(gpu_memory)])
                    assert fits(memory(c, gpus, changed), changed)
                    helped.add(words)
    assert len(helped) >= 5


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

"""The planner's memory against what the code allocates, its arithmetic against numbers done by hand."""

from collections.abc import Callable
from dataclasses import replace
from itertools import accumulate

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from helpers import ROOT, python
from thinkrl.config import parse as parse_training
from thinkrl.distributed import shard
from thinkrl.learner import Learner, new_optimizer
from thinkrl.memory import CHECKPOINTING, Setting, parameters, update_bytes
from thinkrl.model import ModelConfig, Transformer
from thinkrl.run.metrics import Tally
from thinkrl.tools.plan import (
    Options,
    advice,
    fits,
    largest_copy,
    main,
    memory,
    models,
    parse,
    remedy,
    seconds,
)
from thinkrl.types import Sample, pack
from thinkrl.update import update

QWEN = models(Options())
SEVEN_B = QWEN["Qwen2.5-7B"]
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


UNTIED = ModelConfig("Qwen2ForCausalLM", 1024, 128, 4, 4, 2, 32, 384, 2048)
TIED = ModelConfig("LlamaForCausalLM", 4096, 256, 8, 4, 2, 64, 768, 2048, tied=True)


def highest(run: Callable[[], object]) -> int:
    """Bytes that tensors took at most while it ran, beyond those that were there before. The allocator
    reports each block.
    """
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
        run()
    events = [e for e in seen.profiler.kineto_results.events() if e.name() == "[memory]"]
    assert events
    return max(accumulate(e.nbytes() for e in sorted(events, key=lambda e: e.start_ns())))


@pytest.mark.parametrize("how", CHECKPOINTING)
@pytest.mark.parametrize("config, row", [(UNTIED, 2048), pytest.param(TIED, 1024, marks=pytest.mark.slow)])
def test_the_peak_of_an_update_is_the_formula_s(config, row, how, world):
    """Of a whole update on two rows, in fp32 on a CPU: from the second row on there are gradients beside
    activations.
    """
    options = parse_training(["grpo", "--micro_batch_tokens", str(row)])
    policy = shard(Transformer.random(config), world, torch.float32, activation_checkpointing=how)
    learner = Learner(policy, None, new_optimizer(policy, options))
    for p in policy.parameters():
        p.grad = torch.zeros_like(p)
    learner.optimizer.step()  # makes the moments
    learner.optimizer.zero_grad()
    signs = torch.tensor([1.0, -1.0]).repeat(120)
    samples = [Sample([1] * 16, [7 * i % 1024 for i in range(240)], signs, torch.zeros(240))] * (row // 128)
    packs = pack(samples, row)
    assert [len(p.tokens) for p in packs] == [row, row]
    states = [v for state in learner.optimizer.state.values() for v in state.values() if v.ndim]
    held = sum(t.numel() * 4 for t in [*policy.parameters(), *states])
    measured = held + highest(lambda: update(learner, packs, 1e-3, options, world, Tally()))
    parts = update_bytes(config, row, how, Setting(sampler=False, b=4, cuda=False))
    assert sum(parts.values()) == pytest.approx(measured, rel=0.15)


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


def test_the_largest_copy_that_leaves_room():
    """0.8 (80 - 2 P - 12 P / N) = 0.02 · 80 GB: 14 P = 78 on one GPU, 2 P = 78 on very many."""
    assert largest_copy(1, Options()) == pytest.approx(78e9 / 14)
    assert largest_copy(10**9, Options()) == pytest.approx(39e9)
    assert largest_copy(8, Options(reference=True, policies=2)) == pytest.approx(78e9 / 8)
    for gpus in (1, 8, 64):
        P = largest_copy(gpus, Options())
        sizes = {
            name: sum(p.numel() for p in Transformer.empty(c, device="meta").parameters())
            for name, c in QWEN.items()
        }
        for name, size in sizes.items():
            assert (memory(QWEN[name], gpus, Options())["KV cache"] > 1.6) == (size < P), (name, gpus)


def test_the_tables_have_every_size_and_count(capsys):
    main(parse(["--problems_per_step", "512"]))
    out = capsys.readouterr().out
    for name in ("0.5B", "1.5B", "7B", "14B", "32B"):
        block = out.split(f"Qwen2.5-{name}: ")[1].split("\n\n")[0].splitlines()
        assert [row.split()[0] for row in block[2:]] == ["1", "8", "64", "512"]
        assert block[1].split()[5:8] == ["rollout", "training", "comm."]
    assert "5.6 B on 1, 22.3 B on 8, 35.7 B on 64, 38.5 B on 512.\nBeyond:" in out
    assert "a copy split over 2 GPUs would fit" in out
    assert out.endswith(advice((1, 8, 64, 512), Options()) + "\n")


def test_the_command(capsys):
    main(parse(["--model", str(ROOT / "thinkrl/assets/tiny"), "--gpus", "2"]))
    out = capsys.readouterr().out
    assert "GPUs" in out and "yes" in out


@pytest.mark.slow
def test_a_mistake_is_one_sentence(tmp_path):
    done = python("-m", "thinkrl.tools.plan", "--model", str(tmp_path / "none"))
    assert done.returncode == 2 and done.stderr.startswith("thinkrl.tools.plan: --model")

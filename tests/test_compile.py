"""--compile: the eager step is its twin."""

import json

import pytest
import torch

from helpers import python
from thinkrl.config import parse
from thinkrl.distributed import checkpoint_block, compile_block
from thinkrl.learner import Learner
from thinkrl.model import ModelConfig, Transformer
from thinkrl.run.metrics import Tally
from thinkrl.types import Sample, pack
from thinkrl.update import update

LENGTHS = (12, 5, 40, 33, 64)


def trained(architecture: str, how: str, world, compiled: bool) -> list[torch.Tensor]:
    """The weights, fp64, after a step of SGD on a pack of each of LENGTHS tokens."""
    shape = dict(vocab_size=64, width=48, layers=2, heads=4, kv_heads=2, head_dim=16, mlp_width=112)
    policy = Transformer.random(ModelConfig(architecture, max_positions=512, **shape)).double()
    for block in policy.blocks:
        checkpoint_block(block, how)
        if compiled:
            compile_block(block)
    learner = Learner(policy, None, torch.optim.SGD(policy.parameters(), lr=0.0))
    for step, n in enumerate(LENGTHS):
        tokens = [(7 * i + step) % 64 for i in range(n)]
        signs = torch.tensor([1.0, -1.0]).repeat(n)[: n - 2]
        sample = Sample(tokens[:2], tokens[2:], signs, torch.zeros(n - 2))
        config = parse(["grpo", "--micro_batch_tokens", "4096"])
        update(learner, pack([sample], 4096), 0.1, config, world, Tally())
    return [p.detach() for p in policy.parameters()]


@pytest.mark.slow
@pytest.mark.parametrize(
    "architecture, how",
    [("Qwen3ForCausalLM", "none"), ("Qwen2ForCausalLM", "selective"), ("LlamaForCausalLM", "full")],
)
def test_compiled_steps_are_the_eager_steps(architecture, how, world):
    """In fp64 the two may differ by rounding: some 10⁴ additions one after the other, of 1.1e-16 each,
    relative to a gradient of norm 1, are 1e-12; a step moves a weight by 0.1 of its gradient, and 1e-10
    leaves the rest for what five steps make of it. A graph break would raise, and so would a recompilation
    too many.
    """
    expected = trained(architecture, how, world, compiled=False)
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    result = trained(architecture, how, world, compiled=True)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 2, "of both layers and all lengths"
    assert all((a - b).abs().max() < 1e-10 for a, b in zip(result, expected))
    start = Transformer.random(ModelConfig(architecture, 64, 48, 2, 4, 2, 16, 112, 512)).double().parameters()
    assert max((a - b).abs().max() for a, b in zip(result, start)) > 1e-3


@pytest.mark.slow
def test_l2t_measures_compiled_policies_as_others(tmp_path):
    """The penalty of the last block reads the inputs of its layers, by hooks: what it measures before the
    first update is the same to the last bit.
    """
    rows = []
    for compiled in ("false", "true"):
        done = python(
            "train.py", "l2t", "--compile", compiled, "--proxy", "last_block", "--steps", "1", "--group_size", "2",
            "--problems_per_step", "2", "--max_tokens", "60", "--eval_problems", "0", "--device", "cpu",
            "--runs_dir", str(tmp_path), "--name", compiled,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr[-3000:]
        rows.append(json.loads((tmp_path / compiled / "metrics.jsonl").read_text()))
    for name in ("compression", "penalty", "process_reward", "fitting_gain"):
        assert rows[0][name] == rows[1][name]
    assert rows[0]["compression"] > 0
    # fp32: the log-probs of some 100 tokens are sums of 64 products in each of 4 layers
    assert rows[1]["grad_norm"] == pytest.approx(rows[0]["grad_norm"], rel=1e-3) and rows[0]["grad_norm"] > 0


@pytest.mark.slow
def test_without_a_compiler():
    done = python("train.py", "grpo", "--compile", "true", "--device", "cpu", CXX="no-such-compiler")
    assert done.returncode == 2
    assert done.stderr.startswith("train.py: --compile needs a compiler, and there is no 'no-such-compiler'")

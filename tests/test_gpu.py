"""What a GPU must hold beyond its kernels. Without one the same runs on a CPU."""

import json

import pytest
import torch

from helpers import python
from thinkrl.model import ModelConfig, Transformer
from thinkrl.sampler import Sampler

pytestmark = pytest.mark.gpu
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.mark.slow
def test_recorded_steps_write_what_eager_steps_write():
    """In fp32. Seven rows in a bucket of eight, which end one by one, then new weights."""
    config = ModelConfig("Qwen3ForCausalLM", 97, 64, 2, 4, 2, 16, 96, 512)
    model, other = Transformer.random(config), Transformer.random(config, 1)
    for parameter in [*model.parameters(), *other.parameters()]:
        parameter.data.mul_(3)
    samplers = [
        Sampler(Transformer.random(config).to(DEVICE), num_pages=200, cuda_graphs=graphs)
        for graphs in (True, False)
    ]
    for weights in (model, other):
        groups = []
        for sampler in samplers:
            sampler.load_weights(weights.to(DEVICE))
            groups.append(
                sampler.generate(
                    [[1, 2], [5] * 20, [7], *[[i] for i in range(4)]], max_tokens=40, stop_ids=[3, 4]
                )
            )
        for (recorded,), (eager,) in zip(*groups):
            assert recorded.tokens == eager.tokens and recorded.finish_reason == eager.finish_reason
            assert recorded.logprobs == pytest.approx(eager.logprobs, abs=1e-4)
    assert len({tuple(c.tokens) for (c,) in groups[0]}) == 7


@pytest.mark.slow
@pytest.mark.parametrize("preset", ["grpo", "l2t"])
def test_a_run_on_the_device_that_is_here(preset, tmp_path):
    done = python(
        "train.py", preset, "--steps", "2", "--problems_per_step", "4", "--group_size", "4", "--max_tokens", "100",
        "--kv_pages", "400", "--eval_problems", "0", "--runs_dir", str(tmp_path), "--name", "run",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert len(rows) == 2 and rows[0]["grad_norm"] > 0
    assert rows[0]["mismatch"] < (1e-2 if DEVICE == "cuda" else 1e-5), "trainer and sampler: bf16 on CUDA"

"""The CUDA path without a CUDA device: launches, waits, devices, and the graph beside the eager step."""

from __future__ import annotations

import dataclasses
from collections import deque

import pytest
import torch
from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException

from fake_cuda import CUDA, Graph, Launches, fake_cuda, record
from kernels.attention import paged_attention_triton
from kernels.gate import silu_mul_triton
from kernels.norm import add_rms_norm_triton
from kernels.rotary import rotate_and_store_triton
from kernels.sample import sample_token_triton
from thinkrl.config import parse
from thinkrl.decode.loop import DecodeLoop, Group, Request, Row
from thinkrl.decode.paged_model import PagedModel, TokenForwards
from thinkrl.decode.pages import PagePool
from thinkrl.decode.step import GraphStep, bucket
from thinkrl.learner import Learner
from thinkrl.longshort.preset import LongShort
from thinkrl.model import ModelConfig, Transformer, inverse_frequencies
from thinkrl.sampler import Sampler


def config(layers: int, family: str = "Qwen2") -> ModelConfig:
    return ModelConfig(
        f"{family}ForCausalLM",
        vocab_size=61,
        width=32,
        layers=layers,
        heads=4,
        kv_heads=2,
        head_dim=8,
        mlp_width=24,
        max_positions=4096,
    )


@pytest.fixture
def fake():
    """The pretended device; none of its tensors stays in a cache."""
    inverse_frequencies.cache_clear()
    with fake_cuda():
        yield
    inverse_frequencies.cache_clear()


def test_the_pretended_device_refuses_what_a_real_one_does(fake):
    x = torch.ones(3, device=CUDA)
    with pytest.raises(RuntimeError, match="two (different )?devices"):
        x + torch.ones(3)
    for wait in (x.sum().item, x.tolist, x.nonzero):
        with pytest.raises((DataDependentOutputException, DynamicOutputShapeException)):
            wait()
    with Launches() as seen:
        (x.view(3, 1) + 1).t().mul_(2)
        torch.empty_like(x)
        torch.ones(2).to(CUDA)
    assert seen.count == {"add": 1, "mul_": 1, "copy": 1}


def fake_model(config: ModelConfig) -> Transformer:
    """In bf16 on the pretended device."""
    torch.set_default_dtype(torch.bfloat16)
    try:
        with CUDA:
            return Transformer(config)
    finally:
        torch.set_default_dtype(torch.float32)


def launches(layers: int, family: str, rows: int = 8, longest: int = 500, stops: bool = False) -> Launches:
    """Of one step of the decode loop."""
    with torch.inference_mode():
        model = fake_model(config(layers, family))
        paged = PagedModel(
            model, PagePool(layers, 100, 2, 8, 16, torch.bfloat16, CUDA), 4096, TokenForwards()
        )
        waiting = deque(Row(Group(i, [1] * (longest - 20), None, 1), 0, i) for i in range(rows))
        loop = DecodeLoop(paged, waiting, Request(20, 1.0, [3], None, None), rows, 8)
        if stops:
            loop.may_end = torch.zeros_like(loop.is_stop)
        loop.rows = list(waiting)
        with Launches():
            loop._step()  # makes what is cached
        with Launches() as seen:
            loop._step()
    return seen


@pytest.mark.parametrize("family", ["Qwen2", "Qwen3", "Llama"])
@pytest.mark.parametrize("longest, per_layer", [(500, 9), (3000, 10)])
def test_a_decode_step_takes_few_launches_and_no_wait(family, longest, per_layer, fake):
    """A context beyond one part of attention takes one launch more per layer, to combine the parts."""
    two, three = (launches(layers, family, longest=longest) for layers in (2, 3))
    assert three.total - two.total == per_layer, three.count - two.count
    assert two.total - 2 * per_layer <= 20, two.count
    assert two.count["copy"] == 0


def test_stop_strings_add_two_launches(fake):
    assert launches(2, "Qwen2", stops=True).total - launches(2, "Qwen2").total == 2


def test_buckets():
    assert [bucket(n) for n in (1, 2, 3, 4, 5, 6, 7, 9, 12, 13, 17, 25, 200)] == [
        1, 2, 3, 4, 6, 6, 8, 12, 12, 16, 24, 32, 256,
    ]  # fmt: skip
    assert len({bucket(n) for n in range(1, 513)}) == 18


def test_the_frozen_partner_s_moments_wait_on_the_host(fake):
    learners = {}
    for role in ("long", "short"):
        policy = torch.nn.Linear(2, 3, device=CUDA)
        optimizer = torch.optim.AdamW(policy.parameters())
        policy(torch.ones(1, 2, device=CUDA)).sum().backward()
        optimizer.step()
        learners[role] = Learner(policy, None, optimizer, None)
    preset = LongShort.__new__(LongShort)
    preset.config = parse(["longshort", "--rounds", "LS", "--steps_per_round", "2"])
    preset.device, preset.learners = CUDA, learners
    for step, trained in ((0, "long"), (1, "long"), (2, "short")):
        assert preset.begin_step(step) is learners[trained]
        for role, learner in learners.items():
            for state in learner.optimizer.state.values():
                where = CUDA if role == trained else torch.device("cpu")
                assert state["exp_avg"].device == state["exp_avg_sq"].device == where
    learners["short"].optimizer.step()


@pytest.fixture
def as_on_cuda(monkeypatch):
    """Triton kernels, in the interpreter, where a CPU takes PyTorch's operations; recordings instead of captures."""
    for name, kernel in [
        ("paged_attention", paged_attention_triton),
        ("add_rms_norm", add_rms_norm_triton),
        ("silu_mul", silu_mul_triton),
        ("rotate_and_store", rotate_and_store_triton),
    ]:
        monkeypatch.setattr(f"thinkrl.decode.paged_model.{name}", kernel)
    monkeypatch.setattr("thinkrl.decode.step.sample_token", sample_token_triton)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    monkeypatch.setattr(torch.cuda, "graph", record)
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: None)


def test_a_graph_writes_what_eager_steps_write(as_on_cuda):
    """Six completions in five rows that end one by one, across pages, with preemptions; then new weights."""
    small = dataclasses.replace(config(1, "Qwen3"), heads=2, kv_heads=1)
    models = [Transformer.random(small, seed) for seed in (0, 1)]
    for model in models:
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(3)
    prompts = [[1, 2], [5] * 6, [7, 8, 9]]
    eager = Sampler(models[0], num_pages=40, page_size=4, max_rows=5)
    graphs = Sampler(Transformer.random(small), num_pages=14, page_size=4, max_rows=5)
    graphs.load_weights(models[0])
    graphs.paged  # noqa: B018  creates the pool, before its step is chosen by hand
    graphs._step = GraphStep(5)

    def same(max_tokens: int) -> None:
        options = dict(n=2, max_tokens=max_tokens, stop_ids=[0, 1, 2], seed=1, return_hidden=True)
        expected, groups = (s.generate(prompts, **options) for s in (eager, graphs))
        for a, b in zip(sum(groups, []), sum(expected, [])):
            assert (a.tokens, a.finish_reason) == (b.tokens, b.finish_reason)
            assert a.logprobs == pytest.approx(b.logprobs, abs=1e-5)
            torch.testing.assert_close(a.hidden, b.hidden, atol=1e-5, rtol=1e-5)
        assert len({tuple(c.tokens) for group in groups for c in group}) >= 5

    same(max_tokens=12)
    assert len(graphs._step.graphs) >= 3 and (6, 1.0) in graphs._step.graphs, "five rows: one of six is dead"
    assert graphs.forwards.prefill > eager.forwards.prefill, "nothing was preempted"
    recorded = dict(graphs._step.graphs)
    graphs.load_weights(models[1])
    eager.load_weights(models[1])
    same(max_tokens=3)
    assert recorded.items() <= graphs._step.graphs.items(), "new weights need no new recording"
    assert graphs.pool.free_pages == 14

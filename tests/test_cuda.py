"""The CUDA path without a CUDA device: launches, waits, devices, and the graph beside the eager step."""

from __future__ import annotations

import dataclasses
import inspect
import sys
from collections import deque
from types import SimpleNamespace

import pytest
import torch
from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException
from torch.nn.attention.varlen import varlen_attn
from torch.utils._python_dispatch import _disable_current_modes

from fake_cuda import CUDA, FusedNorm, Graph, Launches, fake_cuda, record, tensors_in
from kernels.attention import packed_attention, paged_attention_triton
from kernels.gate import silu_mul_triton
from kernels.norm import add_rms_norm_triton
from kernels.rotary import rotate_and_store_triton
from kernels.sample import sample_token_triton
from thinkrl.config import parse
from thinkrl.decode.loop import DecodeLoop, Group, Request, Row
from thinkrl.decode.paged_model import PagedModel, TokenForwards
from thinkrl.decode.pages import PagePool
from thinkrl.decode.step import GraphStep, bucket
from thinkrl.distributed import World, checkpoint_block
from thinkrl.l2t.compression import Proxy
from thinkrl.l2t.episodes import Episodes
from thinkrl.l2t.gain import Gain, Probe
from thinkrl.learner import Learner, new_optimizer
from thinkrl.longshort.preset import LongShort
from thinkrl.model import ModelConfig, Transformer, inverse_frequencies
from thinkrl.run.metrics import Tally
from thinkrl.sampler import Sampler
from thinkrl.sft import nll_loss
from thinkrl.types import Sample, Turn, pack
from thinkrl.update import descend, token_logprobs, update


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
        waiting = deque(Row(Group(i, [1] * (longest - 20), None, 1, 20), 0, i) for i in range(rows))
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


THREE = Episodes(torch.arange(6) // 2, torch.tensor([1, 3, 5]), torch.tensor([1, 3, 5]))
PACKS = pack(  # by the host, which the pretended device is not: two rows of four sequences
    [Sample([1] * 5, [2] * n, torch.ones(n), torch.zeros(n), str(n)) for n in range(5, 13)], 50
)


@pytest.fixture
def waits(monkeypatch, fake):
    """What a step reads back from the device, on one rank with FlashAttention and fused AdamW as on CUDA."""
    seen = []

    def read(x):
        seen.extend(tensors_in(x))
        return 1.0

    monkeypatch.setattr("thinkrl.update.float", read, raising=False)
    monkeypatch.setattr("thinkrl.update.global_sum", lambda x: x)
    monkeypatch.setattr("thinkrl.update.global_max", lambda x: x)
    monkeypatch.setattr("kernels.attention._torch_has_flash", lambda device: True)
    monkeypatch.setattr(
        sys.modules[torch.optim.Optimizer.__module__],
        "_get_fused_kernels_supported_devices",
        lambda: [CUDA.type],
    )
    monkeypatch.setattr(torch.nn.RMSNorm, "forward", lambda norm, x: FusedNorm.apply(x, norm.weight))
    return seen


def training_step(layers: int, packs: int, how: str, *options: str) -> Launches:
    models = [fake_model(config(layers)) for _ in range(2)]
    for block in models[0].blocks:
        checkpoint_block(block, how)
    c, world = parse(["grpo", *options]), World(0, 1, CUDA)
    models[1].requires_grad_(False).reshard = lambda: None
    learner = Learner(models[0], None, new_optimizer(models[0], c), models[1] if c.kl_coef else None)
    tally = Tally()
    with Launches() as seen:
        update(learner, [p.to(CUDA) for p in PACKS[:packs]], 1e-3, c, world, tally)
    assert {"mismatch", "clip_fraction"} <= {name for name, _, _ in tally.on_device}
    return seen


@pytest.mark.parametrize(
    "options",
    [
        "",
        "--kl_coef 0.1 --updates_per_rollout 2 --importance_cap 2",
        "--aggregate sequence --level sequence",
        "--aggregate constant --updates_per_rollout 2 --surrogate sapo",
        "--updates_per_rollout 2 --surrogate cispo --importance_cap 2 --importance_low 0.1",
    ],
)
def test_a_training_step_waits_no_more_for_more_packs(options, waits):
    """For the step's largest advantage and its count of tokens, and per update for loss and gradient norm.
    Packs go to the device before.
    """
    training_step(2, 1, "none", *options.split())
    once = len(waits)
    training_step(2, 2, "none", *options.split())
    updates = 2 if "updates_per_rollout" in options else 1
    assert len(waits) - once == once == 1 + 2 * updates + ("constant" not in options)


@pytest.mark.slow
@pytest.mark.parametrize("how, per_layer", [("none", 48), ("selective", 51), ("full", 62)])
def test_the_launches_of_training(how, per_layer, waits):
    """Per layer of one more pack, forward and backward; one kernel each for the attention, and for AdamW's
    two groups.
    """
    two, three = (
        training_step(layers, 2, how).count - training_step(layers, 1, how).count for layers in (2, 3)
    )
    assert three.total() - two.total() <= per_layer, three - two
    assert (three - two)["_varlen_attn_backward"] == 1
    step = training_step(2, 2, how)
    assert step.count["_fused_adamw_"] == 2
    assert step.count["copy"] == 2 * len([x for x in vars(PACKS[0]).values() if isinstance(x, torch.Tensor)])


def test_sft_waits_no_more_for_more_packs(waits):
    model = fake_model(config(2))
    learner, c = Learner(model, None, torch.optim.SGD(model.parameters())), parse(["sft", "--data", "x"])
    for packs in (1, 2):
        rows = [p.to(CUDA) for p in PACKS[:packs]]

        def objective(p):
            return nll_loss(token_logprobs(model, p, 1.0)[0], p.mask, 8.0)

        with Launches():
            descend(learner, rows, objective, 1e-3, c, World(0, 1, CUDA))
        assert len(waits) == 2 * packs


def heads(dtype: torch.dtype = torch.bfloat16, width: int = 8) -> list[torch.Tensor]:
    """q, k and v as a block gives them to its attention: views of a wider row."""
    row = torch.zeros(12, 8, width, dtype=dtype, device=CUDA, requires_grad=True)
    return list(row.split([4, 2, 2], dim=1))


def test_attention_by_torch_s_flash_attention(monkeypatch, waits):
    """The real function takes these arguments; its backward is told to repeat its sums."""
    cu_seqlens, told, bound = torch.tensor([0, 5, 12], dtype=torch.int32).to(CUDA), [], []

    def spy(*args, **kwargs):
        bound.append(inspect.signature(varlen_attn).bind(*args, **kwargs).arguments)
        return varlen_attn(*args, **kwargs)

    monkeypatch.setattr("kernels.attention.varlen_attn", spy)
    monkeypatch.setattr(torch, "use_deterministic_algorithms", told.append)
    q, k, v = heads()
    with Launches() as seen:
        packed_attention(q, k, v, cu_seqlens, longest=7).sum().backward()
    assert seen.count["_varlen_attn"] == seen.count["_varlen_attn_backward"] == 1 and told == [True, False]
    (given,) = bound
    assert given["cu_seq_q"] is given["cu_seq_k"] is cu_seqlens
    assert given["max_q"] == given["max_k"] == 7 and given["window_size"] == (-1, 0)
    assert given["value"].is_contiguous() and given.get("enable_gqa", True)
    with pytest.raises(DataDependentOutputException):
        packed_attention(q, k, v, cu_seqlens)


def test_attention_by_flash_attn(monkeypatch, waits):
    """Where the package is installed: a stub with the signature of its version 2.8."""
    given = {}

    def flash_attn_varlen_func(
        q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p=0.0, softmax_scale=None,
        causal=False, window_size=(-1, -1), softcap=0.0, alibi_slopes=None, deterministic=False,
        return_attn_probs=False, block_table=None,
    ):  # fmt: skip
        given.update(locals())
        return q

    monkeypatch.setattr("kernels.attention.flash_attn_varlen_func", flash_attn_varlen_func)
    cu_seqlens = torch.tensor([0, 5, 12], dtype=torch.int32).to(CUDA)
    packed_attention(*heads(), cu_seqlens, longest=7)
    assert given["causal"] and given["deterministic"] and given["softmax_scale"] is None
    assert given["max_seqlen_q"] == given["max_seqlen_k"] == 7
    assert given["cu_seqlens_q"] is given["cu_seqlens_k"] is cu_seqlens


@pytest.mark.parametrize(
    "dtype, width, flash", [(torch.float32, 8, True), (torch.bfloat16, 12, True), (torch.bfloat16, 8, False)]
)
def test_attention_by_our_kernels(dtype, width, flash, monkeypatch, waits):
    """In fp32, at widths that FlashAttention does not take, and where there is none."""
    monkeypatch.setattr("kernels.attention._torch_has_flash", lambda device: flash)
    cu_seqlens = torch.tensor([0, 5, 12], dtype=torch.int32).to(CUDA)
    with Launches() as seen:
        packed_attention(*heads(dtype, width), cu_seqlens, longest=7).sum().backward()
    assert seen.count["_packed_forward_kernel"] == seen.count["_packed_backward_kv_kernel"] == 1


@pytest.mark.parametrize(
    "proxy, kind", [("svd", "diag"), ("svd", "rank1"), ("lm_head", "invariant"), ("last_block", "rank1")]
)
def test_the_penalty_waits_twice_however_many_rows(proxy, kind, monkeypatch, waits):
    """For the values of all rows, and for each matrix's sum of squared gradients over ranks."""
    with _disable_current_modes():  # which layers are drawn is the host's
        ours = Proxy(Transformer.random(config(2)), proxy)
    ours.model = fake_model(config(2))
    if proxy == "svd":
        ours.V, ours.S = torch.zeros(32, 4, device=CUDA), torch.zeros(4, device=CUDA)
    turns = [Turn("policy", [1, 2], [3] * 6, [0.0] * 6, "stop") for _ in range(4)]
    read, cpu, tensor = [], torch.Tensor.cpu, torch.tensor
    monkeypatch.setattr(torch, "tensor", lambda *x, device="cpu", **kwargs: tensor(*x, **kwargs).to(device))
    monkeypatch.setattr(torch.Tensor, "cpu", lambda x: read.append(x) or cpu(x))

    def reduce(x: torch.Tensor) -> torch.Tensor:
        read.extend([x] * x.is_cuda)
        return x

    found = []
    for budget in (1000, 1000, 16, 8):  # one row, one, two, four
        with Launches() as seen:
            ours.penalties(kind, turns, [THREE] * 4, budget, reduce)
        found.append((len(read), seen.count["copy"]))
        read.clear()
    per_matrix = {"svd": 1, "lm_head": 1, "last_block": 4}[proxy]
    assert [n for n, _ in found] == [1 + per_matrix] * 4
    assert found[3][1] > found[2][1] > found[1][1], "every row is copied to the device"


def test_probes_wait_once_for_all(monkeypatch):
    probes = [Probe([1], [2, 3]), Probe([1, 1], [4], ((0, (5, 6)),))]
    with fake_cuda():
        scores = [torch.zeros(3, device=CUDA), torch.zeros(4, device=CUDA)]
    read = []

    def cpu(x: torch.Tensor) -> torch.Tensor:
        read.append(x)
        return torch.tensor([0.5, 0.5, 0.5, 0.5, 0.5, 0.125, 0.25]).log()

    monkeypatch.setattr(torch.Tensor, "cpu", cpu)
    gain = Gain(SimpleNamespace(score=lambda *asked: scores), probes, lambda tokens: None)
    gain._waiting = {(i,): SimpleNamespace(prompt=i, fork=None) for i in range(2)}
    gain._score()
    assert gain._J == pytest.approx({(0,): 0.25, (1,): 0.125 + 0.25}) and len(read) == 1


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
    """Triton kernels, in the interpreter, where a CPU takes PyTorch's operations; recordings instead of
    captures.
    """
    for name, kernel in [
        ("paged_attention", paged_attention_triton),
        ("add_rms_norm", add_rms_norm_triton),
        ("silu_mul", silu_mul_triton),
        ("rotate_and_store", rotate_and_store_triton),
    ]:
        monkeypatch.setattr(f"thinkrl.decode.paged_model.{name}", kernel)
    monkeypatch.setattr("thinkrl.decode.paged_model.pack_weight", lambda weight: weight)
    monkeypatch.setattr("thinkrl.decode.step.sample_token", sample_token_triton)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    monkeypatch.setattr(torch.cuda, "graph", record)
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: None)


@pytest.mark.slow
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

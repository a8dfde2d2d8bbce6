"""Run under torchrun by test_distributed.py: replay recorded samples through update.update and write what
came out.
"""

import itertools
import sys

import torch
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

from thinkrl.config import parse
from thinkrl.distributed import run_and_exit, shard, start, stop
from thinkrl.learner import Learner
from thinkrl.model import ModelConfig, Transformer
from thinkrl.run.metrics import Tally
from thinkrl.types import Sample
from thinkrl.update import pack_evenly, update

MODEL = ModelConfig(
    "Qwen2ForCausalLM",
    vocab_size=23,
    width=16,
    layers=2,
    heads=2,
    kv_heads=1,
    head_dim=8,
    mlp_width=24,
    max_positions=128,
)
# (prompt length, completion length, advantage): unequal lengths; the third and fourth are a group without
# spread; the last four have nothing sampled, so that the second of two ranks is all masked.
UNEVEN = [
    (3, 9, 0.7),
    (3, 2, -0.7),
    (5, 4, 0.0),
    (5, 7, 0.0),
    (2, 30, 1.2),
    (2, 1, -0.4),
    (4, 5, 0.5),
    (4, 6, -0.9),
]
HALF_MASKED = UNEVEN[:4] + [(n, 0, 0.0) for n in (4, 7, 2, 9)]


def recorded(shapes: list[tuple[int, int, float]]) -> list[Sample]:
    g = torch.Generator().manual_seed(7)

    def ids(n: int) -> list[int]:
        return torch.randint(0, MODEL.vocab_size, (n,), generator=g).tolist()

    return [
        Sample(ids(p), ids(c), torch.full((c,), a), -torch.rand(c, generator=g), f"{i}")
        for i, (p, c, a) in enumerate(shapes)
    ]


def replay(world, shapes, budget: int, aggregate: str, level: str, cap: float, updates: int) -> dict:
    options = [
        "--aggregate",
        aggregate,
        "--level",
        level,
        "--importance_cap",
        str(cap),
        "--updates_per_rollout",
        str(updates),
        "--kl_coef",
        "0.1",
        "--problems_per_step",
        "4",
        "--group_size",
        "2",
        "--max_tokens",
        "30",
        "--lr",
        "0.01",
    ]
    config = parse(["grpo", *options, "--micro_batch_tokens", str(budget)])
    policy = shard(Transformer.random(MODEL, seed=1), world, torch.float32)
    reference = shard(Transformer.random(MODEL, seed=2), world, torch.float32).requires_grad_(False)
    optimizer = torch.optim.AdamW(policy.parameters(), lr=config.lr)
    samples = recorded(shapes)
    mine = [samples[i] for i in world.share(len(samples))]
    tally = Tally()
    packs = pack_evenly(mine, config, world)
    loss, grad_norm = update(
        Learner(policy, None, optimizer, reference), packs, config.lr, config, world, tally
    )
    means = tally.reduce()
    weights = get_model_state_dict(policy, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
    return {"loss": loss, "grad_norm": grad_norm, "means": means, "weights": weights, "packs": len(packs)}


def main(out: str) -> None:
    world = start("cpu")
    results = {}
    for name, shapes in (("uneven", UNEVEN), ("half_masked", HALF_MASKED)):
        for aggregate, budget in itertools.product(("token", "sequence", "constant"), (1, 24, 1000)):
            results[name, aggregate, "token", budget] = replay(
                world, shapes, budget, aggregate, "token", 0.0, 1
            )
    for budget in (1, 1000):
        results["uneven", "token", "sequence", budget] = replay(
            world, UNEVEN, budget, "token", "sequence", 2.0, 2
        )
    if world.main:
        torch.save(results, out)
    stop()


if __name__ == "__main__":
    run_and_exit(main, sys.argv[1])

"""A step whose advantages are all 0: what it would have computed, without a backward."""

import pytest
import torch

import thinkrl.update
import train
from thinkrl.arith import heldout
from thinkrl.config import parse
from thinkrl.distributed import start
from thinkrl.run.metrics import Tally
from thinkrl.update import descend, pack_evenly, update


def two_steps(*argv: str, advantage: float = 0.0) -> tuple[dict, list, Tally, int]:
    """After a step that learns, one whose advantages are all `advantage`: weights and optimizer state, what
    the second returned and tallied, and its backwards.
    """
    world = start("cpu")
    argv = (
        "--group_size",
        "2",
        "--problems_per_step",
        "2",
        "--max_tokens",
        "40",
        "--weight_decay",
        "0.1",
        *argv,
    )
    config = parse(["grpo", *argv])
    preset = train.method("grpo")(config, world)
    learner = preset.begin_step(0)
    trajectories = preset.rollout(heldout()[100:400:200], 0, Tally())
    for value, tally in ((1.0, Tally()), (advantage, Tally())):
        samples = preset.samples(trajectories, [torch.full((t.tokens,), value) for t in trajectories], 0)
        packs = pack_evenly(samples, config, world)
        backwards, real = [], torch.Tensor.backward
        torch.Tensor.backward = lambda self: backwards.append(1) or real(self)  # noqa: B023
        try:
            numbers = update(learner, packs, 1e-3, config, world, tally)
        finally:
            torch.Tensor.backward = real
    state = {f"weight {name}": p.full_tensor() for name, p in learner.policy.named_parameters()}
    for i, values in enumerate(learner.optimizer.state.values()):
        state |= {f"{key} {i}": getattr(v, "full_tensor", lambda v=v: v)() for key, v in values.items()}
    return state, list(numbers), tally, len(backwards)


@pytest.mark.slow
@pytest.mark.parametrize("argv", [[], ["--updates_per_rollout", "2"], ["--aggregate", "constant"]])
def test_a_flat_step_is_the_step_without_its_backward(monkeypatch, argv):
    """Weights, AdamW's averages and count, loss, norm and metrics: as with a backward, to the last bit."""
    state, numbers, tally, backwards = two_steps(*argv)

    def with_backward(*arguments):
        return descend(*arguments[:6], flat=False)

    monkeypatch.setattr(thinkrl.update, "descend", with_backward)
    expected, expected_numbers, expected_tally, expected_backwards = two_steps(*argv)
    assert backwards == 0 and expected_backwards > 0
    assert numbers == expected_numbers == [0.0, 0.0] and tally.pairs == expected_tally.pairs
    assert state.keys() == expected.keys() and all(torch.equal(state[key], expected[key]) for key in state)
    assert tally.pairs["entropy"][0] > 0 and tally.pairs["advantage_max"][0] == 0


def test_a_kl_still_needs_its_backward():
    *_, backwards = two_steps("--kl_coef", "0.1")
    assert backwards > 0


def test_another_rank_s_advantages_need_every_rank_s_backward(monkeypatch):
    """Forwards and backwards of a sharded model are collective."""
    monkeypatch.setattr(thinkrl.update, "global_max", lambda value: max(value, 0.5))
    *_, backwards = two_steps()
    assert backwards > 0


def test_any_advantage_is_trained_on():
    *_, tally, backwards = two_steps(advantage=-0.25)
    assert backwards > 0 and tally.pairs["advantage_max"] == [0.25, 1.0]

"""Packing, on the worked example of thinkrl/types.py."""

import torch

from thinkrl.types import Sample, empty_pack, pack


def sample(prompt: int, completion: int, advantage: float = 1.0) -> Sample:
    return Sample(
        list(range(prompt)),
        list(range(100, 100 + completion)),
        torch.full((completion,), advantage),
        torch.full((completion,), -0.5),
        f"{prompt}/{completion}",
    )


def test_the_worked_example():
    [row] = pack([sample(4, 2, 0.7), sample(4, 2, -0.7)], budget=100)
    assert row.tokens.tolist() == [0, 1, 2, 3, 100, 101] * 2
    assert row.cu_seqlens.tolist() == [0, 6, 12] and row.cu_seqlens.dtype == torch.int32
    assert row.mask.tolist() == [0, 0, 0, 0, 1, 1] * 2
    torch.testing.assert_close(row.advantage, torch.tensor([0, 0, 0, 0, 0.7, 0.7, 0, 0, 0, 0, -0.7, -0.7]))
    assert row.sampler_logprob.tolist() == [0, 0, 0, 0, -0.5, -0.5] * 2


def test_the_stop_token_counts_even_if_it_stands_in_the_prompt():
    eos = 9
    [row] = pack([Sample([eos, 1], [2, eos], torch.ones(2), torch.zeros(2))], budget=10)
    assert row.tokens.tolist() == [eos, 1, 2, eos] and row.mask.tolist() == [0, 0, 1, 1]


def test_budget():
    rows = pack([sample(2, n) for n in (8, 1, 3, 1)], budget=8)  # lengths 10, 3, 5, 3
    assert [row.cu_seqlens.diff().tolist() for row in rows] == [[3, 3], [5], [10]]  # 10 > 8: a row of its own
    assert sorted(i for row in rows for i in row.ids) == ["2/1", "2/1", "2/3", "2/8"]


def test_nothing():
    assert pack([], budget=8) == []
    row = empty_pack()
    assert row.mask.sum() == 0 and row.cu_seqlens.tolist() == [0, 2]


def test_moving_keeps_everything():
    [row] = pack([sample(2, 3)], budget=8)
    moved = row.to("cpu")
    assert (
        vars(moved).keys() == vars(row).keys() and moved.ids == row.ids and torch.equal(moved.mask, row.mask)
    )

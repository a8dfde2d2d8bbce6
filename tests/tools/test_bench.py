"""What `make bench` runs, at sizes that measure nothing."""

import re

import pytest

from thinkrl import UserError
from thinkrl.model import ModelConfig
from thinkrl.tools.bench import BENCHES, compiled_updates, cost_curves, l2t_shares, parse


@pytest.mark.slow
def test_cost_curves(capsys):
    """One row per value; other quantities have their middle value, so the middle rows are of one step."""
    cost_curves(1, {"tokens": (4, 8, 12), "group": (1, 2), "K": (2,), "width": (32,)}, ranks=(1,))
    lines = capsys.readouterr().out.splitlines()
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    assert [row[0] for row in cells[2:]] == [
        "tokens 4", "tokens 8", "tokens 12", "group 1", "group 2", "K 2", "width 32", "ranks 1",
    ]  # fmt: skip
    assert all(float(cell) > 0 for row in cells[2:-1] for cell in row[1:5])
    assert cells[-1][5].startswith("a step of 16 × 8 completions: ")


@pytest.mark.slow
def test_compiled_beside_eager(capsys):
    compiled_updates(1, {"small": (ModelConfig("LlamaForCausalLM", 72, 32, 1, 2, 1, 16, 48, 512), 128)})
    out = capsys.readouterr().out
    assert re.fullmatch(r"small, 128 tokens: eager [\d.]+ s, compiled [\d.]+ s, [\d.]+\n", out)


def test_shares_by_hand():
    """A step of 3 + 1 s; states kept cost 0.2, probes 0.5, the penalty 0.2."""
    parts = {
        "rollout": 3.0, "training": 1.0, "penalty": 0.2, "probes, of it": 0.5, "rollout, states kept, probes": 3.7,
    }  # fmt: skip
    assert l2t_shares(parts) == pytest.approx((0.4 / 4, 0.9 / 4))


def test_an_unknown_benchmark():
    with pytest.raises(UserError, match=f"no benchmark 'costs'.*{', '.join(BENCHES)}"):
        parse(["costs"])

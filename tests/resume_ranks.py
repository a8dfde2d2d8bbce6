"""On several ranks: save two steps of training, or load them and compare with what was saved."""

import dataclasses
import sys
from pathlib import Path

import torch
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict
from torch.distributed.fsdp import fully_shard

from helpers import PRM_CONFIG
from thinkrl.distributed import run_and_exit, start, stop
from thinkrl.model import Transformer
from thinkrl.resume import begin_step, load_latest, point_latest, save_step


def learner(**changes) -> tuple[Transformer, torch.optim.Optimizer]:
    model = Transformer.empty(dataclasses.replace(PRM_CONFIG, **changes), torch.float32, "cpu")
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(generator=generator)
    for block in model.blocks:
        fully_shard(block)
    fully_shard(model)
    parameters = list(model.parameters())
    groups = [
        {"params": [p for p in parameters if p.ndim > 1], "weight_decay": 0.1},
        {"params": [p for p in parameters if p.ndim == 1], "weight_decay": 0.0},
    ]
    return model, torch.optim.AdamW(groups, lr=1e-3)


def train(model: Transformer, optimizer: torch.optim.Optimizer, steps: range) -> None:
    for step in steps:
        tokens = torch.randint(16, (20,), generator=torch.Generator().manual_seed(step))
        logits = model.logits(model(tokens, torch.tensor([0, 20], dtype=torch.int32)))
        torch.nn.functional.cross_entropy(logits[:-1], tokens[1:]).backward()
        optimizer.step()
        optimizer.zero_grad()


def save(folder, step: int, model, optimizer, extra=None, keep=2) -> None:
    save_step(begin_step(folder, step, {"policy": model}, {"policy": optimizer}, extra or {"step": step}))
    point_latest(folder, step, keep)


def load(folder, model, optimizer) -> tuple[int, dict]:
    return load_latest(folder, {"policy": model}, {"policy": optimizer})


def main(what: str, folder: Path) -> None:
    world = start("cpu")
    model, optimizer = learner()
    train(model, optimizer, range(2 if what == "save" else 1))
    if what == "save":
        save(folder, 2, model, optimizer)
    else:
        assert load(folder, model, optimizer) == (2, {"step": 2})
    whole = get_state_dict(model, optimizer, options=StateDictOptions(full_state_dict=True))
    flat = {
        f"{name}/{key}": value for name, state in whole[1]["state"].items() for key, value in state.items()
    }
    flat |= whole[0]
    if world.main and what == "save":
        torch.save(flat, folder / "whole.pt")
    elif world.main:
        expected = torch.load(folder / "whole.pt")
        assert flat.keys() == expected.keys()
        assert all(torch.equal(value, expected[key]) for key, value in flat.items())
        print("equal")
    stop()


if __name__ == "__main__":
    run_and_exit(main, sys.argv[1], Path(sys.argv[2]))

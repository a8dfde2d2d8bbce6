"""On several ranks: save two steps of training, or load them and compare with what was saved."""

import sys
from pathlib import Path

import torch
from test_resume import learner, load, save, train
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict

from thinkrl.distributed import run_and_exit, start, stop


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

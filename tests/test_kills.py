"""Runs that are killed, wherever it is, end as the uninterrupted one to the last bit.

Three places are fixed and in `make test`. `make test-long` kills every program LONG_KILLS times (20) at
random places; the seed is printed, and LONG_SEED repeats it.
"""

import json
import os
import random
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from helpers import torchrun

KILLS = int(os.environ.get("LONG_KILLS", 20))
SEED = int(os.environ.get("LONG_SEED", time.time_ns() % 1_000_000))
SMALL = "--problems_per_step 4 --group_size 2 --max_tokens 20 --save_every 1"
COMMANDS = {
    "grpo": f"train.py grpo --steps 6 {SMALL} --eval_problems 2 --kl_coef 0.01",
    "l2t": f"train.py l2t --steps 6 {SMALL} --eval_problems 2",
    "longshort": f"train.py longshort --rounds LS --steps_per_round 3 {SMALL} --eval_problems 2",
    "sft": "train.py sft --data ROWS --steps 6 --problems_per_step 4 --save_every 1",
    "prm": f"train.py prm --steps 6 {SMALL} --gain_samples 1",
    "chunk": "chunk.py --limit 8 --rollouts 2 --max_tokens 20 --items_per_batch 1",
}
# function -> its calls on a rank in one to two steps, about
ROLLOUT = {"thinkrl.decode.loop:DecodeLoop._step": 60}
UPDATE = {"torch:Tensor.backward": 2, "torch.optim:AdamW.step": 2}
CHECKPOINT = {
    "torch:save": 2,
    "safetensors.torch:save_file": 2,
    "thinkrl.run.files:write_json": 4,
    "thinkrl.resume:begin_step": 2,
    "thinkrl.resume:save_step": 2,
    "thinkrl.resume:point_latest": 2,
    "shutil:rmtree": 4,
    "thinkrl.run.metrics:append": 4,
}
SYNC = {"thinkrl.sampler:Sampler.load_weights": 3}
PLACES = {
    **dict.fromkeys(("grpo", "l2t", "longshort"), ROLLOUT | UPDATE | CHECKPOINT | SYNC),
    "sft": UPDATE | CHECKPOINT,
    "prm": ROLLOUT | UPDATE | CHECKPOINT,
    "chunk": ROLLOUT | {"thinkrl.run.files:write_json": 1, "tqdm:tqdm.update": 2},
}


def command(program: str, folder: Path) -> list[str]:
    """The program on its data, into this folder, to be started again with the same words."""
    rows = folder.parent / "rows.jsonl"
    if program == "sft" and not rows.exists():
        texts = [{"prompt": f"{i}+1?", "response": f"<answer>{i + 1}</answer>"} for i in range(24)]
        rows.write_text("".join(json.dumps(row) + "\n" for row in texts))
    words = COMMANDS[program].replace("ROWS", str(rows)).split()
    if program == "chunk":
        return [*words, "--out", str(folder)]
    return [*words, "--runs_dir", str(folder.parent), "--name", folder.name, "--resume", "auto"]


def outcome(program: str, folder: Path) -> dict:
    """All that must not depend on kills: file or key -> content."""
    if program == "chunk":
        names = ("annotated.json", "long.json", "short.json", "rejects.jsonl", "summary.json")
        return {name: (folder / name).read_text() for name in names}
    weights = [path for path in folder.glob("*/model.safetensors") if not path.is_symlink()]
    result: dict = {
        f"{path.parent.name}/{name}": w for path in weights for name, w in load_file(path).items()
    }
    assert result
    for line in (folder / "metrics.jsonl").read_text().splitlines():
        row = json.loads(line)
        timed = {key for key in row if "seconds" in key or key == "tokens_per_second"}
        result[f"step {row['step']}"] = {key: value for key, value in row.items() if key not in timed}
    summary = json.loads((folder / "summary.json").read_text())
    return result | {"summary": summary}


def same(one: dict, other: dict) -> None:
    assert one.keys() == other.keys()
    for key, value in one.items():
        equal = torch.equal(value, other[key]) if isinstance(value, torch.Tensor) else value == other[key]
        assert equal, f"{key} differs"


def finish(program: str, folder: Path) -> dict:
    done = torchrun(2, *command(program, folder))
    assert done.returncode == 0, done.stderr[-3000:]
    return outcome(program, folder)


def kill(program: str, folder: Path, place: str, times: int, who: str) -> bool:
    """Start it and kill it there. Whether it came there; else it has finished."""
    mark = folder.parent / "struck"
    mark.unlink(missing_ok=True)
    environment = {"KILL_WHO": who, "KILL_MARK": str(mark)}
    done = torchrun(2, "tests/killed.py", place, str(times), *command(program, folder), **environment)
    assert mark.exists() == (done.returncode != 0), f"it ended for another reason: {done.stderr[-3000:]}"
    return mark.exists()


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> dict:
    return finish("grpo", tmp_path_factory.mktemp("kills") / "whole")


@pytest.mark.slow
@pytest.mark.parametrize(
    "place, times, who",
    [
        ("thinkrl.decode.loop:DecodeLoop._step", 70, "1"),
        ("torch:Tensor.backward", 2, "launcher"),
        ("safetensors.torch:save_file", 2, "all"),
    ],
    ids=["rollout", "backward", "checkpoint"],
)
def test_a_kill_at_a_fixed_place(tmp_path, whole, place, times, who):
    assert kill("grpo", tmp_path / "cut", place, times, who)
    same(whole, finish("grpo", tmp_path / "cut"))


@pytest.mark.long
@pytest.mark.parametrize("program", COMMANDS)
def test_kills_at_random_places(tmp_path, program, capsys):
    """A run that finishes before all kills are spent is compared, and another one takes its place."""
    random_places = random.Random(f"{SEED}/{program}")
    with capsys.disabled():
        print(f"\n{program}: {KILLS} kills, LONG_SEED={SEED}")
    whole = finish(program, tmp_path / "whole")
    kills, runs = 0, 0
    while kills < KILLS:
        runs += 1
        folder, alive = tmp_path / f"cut_{runs}", True
        while alive and kills < KILLS:
            place, most = random_places.choice(sorted(PLACES[program].items()))
            times, who = random_places.randint(1, most), random_places.choice(["all", "0", "1", "launcher"])
            alive = kill(program, folder, place, times, who)
            kills += alive
            with capsys.disabled():
                print(f"  {kills}: {place} {times}, {who}: {'killed' if alive else 'finished before'}")
        same(whole, finish(program, folder) if alive else outcome(program, folder))

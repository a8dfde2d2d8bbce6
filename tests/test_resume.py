"""Runs that must not notice an interruption, and checkpoints that are damaged, foreign or hostile."""

import os
import pickle
import resource
import shutil

import pytest
import torch
from resume_ranks import learner, load, save, train
from safetensors.torch import load_file

from helpers import torchrun
from thinkrl import UserError
from thinkrl.distributed import start, stop
from thinkrl.model import Transformer
from thinkrl.resume import begin_step, load_step, point_latest, save_step


@pytest.fixture(scope="module", autouse=True)
def group():
    start("cpu")  # another file's group may still be there: tests share a process in any order
    yield
    stop()


def weights(model: Transformer) -> list[torch.Tensor]:
    return [parameter.full_tensor().clone() for parameter in model.parameters()]


def equal(one: list[torch.Tensor], other: list[torch.Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def test_a_resumed_run_is_the_uninterrupted_one_to_the_last_bit(tmp_path):
    straight, optimizer = learner()
    train(straight, optimizer, range(4))

    model, optimizer = learner()
    train(model, optimizer, range(2))
    extra = {
        "cursor": {"epoch": 1, "order": [3, 1]},
        "fisher": torch.arange(3.0),
        "rng": torch.get_rng_state(),
        "name": "l2t",
    }
    save_step(begin_step(tmp_path, 2, {"policy": model}, {"policy": optimizer}, extra))
    assert load(tmp_path, *learner()) == (0, {}), "nobody has said that it is complete"
    point_latest(tmp_path, 2)

    model, optimizer = learner()
    # a restore must overwrite everything, not only what is still at its start
    train(model, optimizer, range(7, 8))
    optimizer.param_groups[0]["lr"] = 1.0
    step, restored = load(tmp_path, model, optimizer)
    assert step == 2 and restored["cursor"] == extra["cursor"] and restored["name"] == "l2t"
    assert torch.equal(restored["fisher"], extra["fisher"]) and torch.equal(restored["rng"], extra["rng"])
    train(model, optimizer, range(2, 4))
    assert equal(weights(model), weights(straight))


def test_what_is_saved_is_the_copy_and_not_what_training_makes_of_it_since(tmp_path):
    model, optimizer = learner()
    train(model, optimizer, range(1))
    before, extra = weights(model), {"fisher": torch.zeros(3)}
    snapshot = begin_step(tmp_path, 1, {"policy": model}, {"policy": optimizer}, extra)
    train(model, optimizer, range(1, 2))
    extra["fisher"] += 1
    save_step(snapshot)
    point_latest(tmp_path, 1)

    restored, optimizer = learner()
    assert load(tmp_path, restored, optimizer) == (1, {"fisher": pytest.approx(torch.zeros(3))})
    assert equal(weights(restored), before) and not equal(weights(model), before)
    assert optimizer.state[restored.norm.weight]["step"] == 1


def test_two_policies_share_one_checkpoint(tmp_path):
    (long, long_optimizer), (short, short_optimizer) = learner(), learner()
    train(long, long_optimizer, range(1))
    modules, optimizers = {"long": long, "short": short}, {"long": long_optimizer, "short": short_optimizer}
    save_step(begin_step(tmp_path, 1, modules, optimizers, {}))
    assert long_optimizer.state and not short_optimizer.state, (
        "saving takes no step, not even one of zero length"
    )
    kept = weights(long) + weights(short)
    train(long, long_optimizer, range(2, 3))
    train(short, short_optimizer, range(2, 3))
    assert load_step(tmp_path / "checkpoints" / "step_1", modules, optimizers) == {}
    assert long_optimizer.state and not short_optimizer.state
    assert equal(weights(long) + weights(short), kept)
    assert not torch.equal(long.norm.weight.full_tensor(), short.norm.weight.full_tensor())


def test_old_checkpoints_go_and_half_written_ones_do_not_count(tmp_path):
    model, optimizer = learner()
    for step in (1, 9, 10):
        save(tmp_path, step, model, optimizer)
    checkpoints = tmp_path / "checkpoints"
    assert sorted(os.listdir(checkpoints)) == ["step_10", "step_9"]

    class Interrupted(torch.optim.SGD):
        def state_dict(self):
            raise KeyboardInterrupt

    interrupted = Interrupted(model.parameters(), momentum=0.9)
    train(model, interrupted, range(1))
    with pytest.raises(KeyboardInterrupt):
        begin_step(tmp_path, 11, {"policy": model}, {"policy": interrupted}, {})
    assert load(tmp_path, model, optimizer)[0] == 10 and not (checkpoints / "step_11").exists()
    save(tmp_path, 11, model, optimizer)  # over the remains
    save(tmp_path, 11, model, optimizer, {"again": True})
    assert load(tmp_path, model, optimizer) == (11, {"again": True})
    assert sorted(os.listdir(checkpoints)) == ["step_10", "step_11"]


@pytest.fixture
def two(tmp_path):
    """Checkpoints of steps 1 and 2, and the weights of each."""
    model, optimizer = learner()
    kept = {}
    for step in (1, 2):
        train(model, optimizer, range(step, step + 1))
        save(tmp_path, step, model, optimizer)
        kept[step] = weights(model)
    return kept


def shard(tmp_path, step: int):
    [file] = (tmp_path / "checkpoints" / f"step_{step}" / "dcp").iterdir()
    return file


DAMAGE = {
    "a shard is cut off": lambda folder: os.truncate(next((folder / "dcp").iterdir()), 1000),
    "a shard is gone": lambda folder: next((folder / "dcp").iterdir()).unlink(),
    "extra.pt is cut off": lambda folder: os.truncate(folder / "extra.pt", 100),
    "files.json is gone": lambda folder: (folder / "files.json").unlink(),
    "nothing is there": lambda folder: shutil.rmtree(folder),
    "extra.pt is noise": lambda folder: (folder / "extra.pt").write_bytes(
        os.urandom((folder / "extra.pt").stat().st_size)
    ),
    "a shard's header is noise": lambda folder: overwrite(next((folder / "dcp").iterdir())),
}


def overwrite(file) -> None:
    with file.open("r+b") as opened:
        opened.write(b"\xff" * 64)


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_checkpoint_is_passed_over(two, tmp_path, capsys, damage):
    DAMAGE[damage](tmp_path / "checkpoints" / "step_2")
    model, optimizer = learner()
    assert load(tmp_path, model, optimizer) == (1, {"step": 1}) and equal(weights(model), two[1])
    said = capsys.readouterr().out
    if damage != "nothing is there":
        assert said.count("\n") == 1 and "skipped" in said and "step_2" in said
    save(tmp_path, 2, model, optimizer, keep=1)
    save(tmp_path, 3, model, optimizer)
    assert {"step_2", "step_3"} <= set(os.listdir(tmp_path / "checkpoints")), (
        "the damaged one is not kept for one"
    )


def test_when_no_checkpoint_is_usable_the_run_does_not_start_over(two, tmp_path):
    for step in (1, 2):
        os.truncate(shard(tmp_path, step), 1000)
    with pytest.raises(UserError, match="no checkpoint of .* is usable: .*1000 bytes, of .*another --name"):
        load(tmp_path, *learner())


def test_a_checkpoint_of_another_model_is_named(two, tmp_path):
    model, optimizer = learner(mlp_width=32)
    with pytest.raises(UserError, match="step_1: does not fit this model") as caught:
        load_step(tmp_path / "checkpoints" / "step_1", {"policy": model}, {"policy": optimizer})
    assert "\n" not in str(caught.value)


@pytest.mark.slow
def test_a_full_disk_is_one_sentence_and_the_checkpoint_before_stays(two, tmp_path):
    """A limit on the size of files is met where a full disk would be."""
    model, optimizer = learner()
    train(model, optimizer, range(3))
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2000, before[1]))
    try:
        with pytest.raises(
            UserError, match="writing of .*step_3 failed .*too large.*--resume auto"
        ) as caught:
            save(tmp_path, 3, model, optimizer)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert "\n" not in str(caught.value)
    assert load(tmp_path, model, optimizer)[0] == 2 and equal(weights(model), two[2])


def test_a_folder_that_cannot_be_written_is_one_sentence(tmp_path):
    (tmp_path / "checkpoints").write_text("a file where the folder should be")
    with pytest.raises(UserError, match=r"writing of .*checkpoints.* failed \(.*irectory.*\): ") as caught:
        save(tmp_path, 1, *learner())
    assert "\n" not in str(caught.value)


class Hostile:
    """Unpickled, it makes a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


def test_nothing_of_a_checkpoint_is_unpickled(two, tmp_path):
    """Code in a pickle does not run, wherever it stands: not in extra.pt, and not where
    torch.distributed.checkpoint would read its index from.
    """
    trap, folder = tmp_path / "run by a pickle", tmp_path / "checkpoints" / "step_2"
    pickle.loads(pickle.dumps(Hostile(trap))).close()
    assert trap.exists(), "it is a trap indeed"
    trap.unlink()
    assert not list(folder.rglob("*.distcp")) and load_file(shard(tmp_path, 2)), "shards are safetensors"

    (folder / "dcp" / ".metadata").write_bytes(pickle.dumps(Hostile(trap)))
    model, optimizer = learner()
    assert load(tmp_path, model, optimizer)[0] == 2 and equal(weights(model), two[2])

    torch.save({"extra": Hostile(trap), "param_groups": {}}, folder / "extra.pt")
    size = (folder / "extra.pt").stat().st_size
    text = (folder / "files.json").read_text().rpartition('"extra.pt":')[0]
    (folder / "files.json").write_text(f'{text}"extra.pt": {size}}}')
    with pytest.raises(UserError, match="extra.pt: damaged, or holds more than tensors and numbers"):
        load_step(folder, {"policy": model}, {"policy": optimizer})
    assert not trap.exists()


@pytest.mark.slow
def test_a_checkpoint_of_two_ranks_continues_with_one_and_four(tmp_path):
    """The whole state, gathered: weights, both moments and the step count."""
    done = torchrun(2, "tests/resume_ranks.py", "save", str(tmp_path))
    assert done.returncode == 0, done.stderr[-3000:]
    for ranks in (1, 4):
        done = torchrun(ranks, "tests/resume_ranks.py", "load", str(tmp_path))
        assert done.returncode == 0 and done.stdout.split() == ["equal"], done.stderr[-3000:]

"""Gradients depend neither on the number of ranks nor on the micro-batch size: recorded trajectories,
replayed on gloo.
"""

import subprocess
import sys

import pytest
import torch

from helpers import ROOT, torchrun

pytestmark = pytest.mark.slow  # all of it in processes of their own


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """Both world sizes, one launch each, all scenarios in it."""
    folder, out = tmp_path_factory.mktemp("replay"), {}
    for ranks in (1, 2):
        done = torchrun(ranks, "tests/replay_ranks.py", str(folder / f"{ranks}.pt"))
        assert done.returncode == 0, done.stderr[-3000:]
        out[ranks] = torch.load(folder / f"{ranks}.pt")
    return out


def same(a: dict, b: dict) -> None:
    assert a["loss"] == pytest.approx(b["loss"], rel=1e-5, abs=1e-8)
    assert a["grad_norm"] == pytest.approx(b["grad_norm"], rel=1e-5)
    assert a["weights"].keys() == b["weights"].keys()
    # Over the whole model: Adam gives full-sized steps to parameters whose gradient is 0 but for rounding
    # (the bias of k).
    w, v = (torch.cat([weight.flatten() for weight in r["weights"].values()]) for r in (a, b))
    assert (w - v).norm() <= 1e-5 * w.norm()


@pytest.mark.parametrize("name", ["uneven", "half_masked"])
@pytest.mark.parametrize("aggregate", ["token", "sequence", "constant"])
def test_ranks_and_micro_batches_do_not_matter(results, name, aggregate):
    base = results[1][name, aggregate, "token", 1000]
    assert base["grad_norm"] > 0
    for ranks in (1, 2):
        for budget in (1, 24, 1000):
            same(results[ranks][name, aggregate, "token", budget], base)


def test_sequence_ratio_two_updates_and_importance_weights(results):
    base = results[1]["uneven", "token", "sequence", 1000]
    for ranks, budget in ((1, 1), (2, 1), (2, 1000)):
        same(results[ranks]["uneven", "token", "sequence", budget], base)


def test_the_scenarios_differ(results):
    """The equalities above would hold trivially if options or data did not reach the loss."""
    losses = {key: r["loss"] for key, r in results[1].items() if key[-1] == 1000}
    weights = results[1]["uneven", "token", "token", 1000]["weights"]
    assert not any(
        torch.equal(w, results[1]["half_masked", "token", "token", 1000]["weights"][n])
        for n, w in weights.items()
    )
    assert len({round(x, 9) for x in losses.values()}) == len(losses)


def test_micro_batches_really_differ(results):
    packs = [results[1]["uneven", "token", "token", budget]["packs"] for budget in (1, 24, 1000)]
    assert packs == sorted(packs, reverse=True) and packs[0] == 8 and packs[-1] == 1


@pytest.mark.parametrize("name", ["uneven", "half_masked"])
def test_means_are_global(results, name):
    """Also where a rank has nothing to count and runs an empty row to keep its peers company."""
    one, two = (results[r][name, "token", "token", 24]["means"] for r in (1, 2))
    assert one.keys() == two.keys() >= {"entropy", "kl", "clip_fraction", "mismatch"}
    for key, value in one.items():
        assert two[key] == pytest.approx(value, rel=1e-5, abs=1e-8), key


@pytest.mark.parametrize("status", [0, 2])
def test_a_process_ends_with_its_status_and_without_finalization(status):
    """Whatever would abort while the interpreter is taken apart; output and exit handlers are not lost."""
    program = (
        "import atexit, os, sys; from thinkrl.distributed import run_and_exit\n"
        "class Aborts: __del__ = lambda self: os.abort()\n"
        "keep = Aborts(); atexit.register(print, 'handler')\n"
        f"def main(word): print(word); sys.exit({status})\n"
        "run_and_exit(main, 'output')"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (status, "output\nhandler\n"), done.stderr

"""Compute again the step at which a run was not finite, from the files that it kept (thinkrl/run/batch.py):

    python -m thinkrl.tools.again runs/NAME/nonfinite/step_N

It runs in one process, with the weights and the rows of all ranks, and writes nothing. It ends with the run's
error, which names what is not finite, or says that everything is finite here; then the cause is the machine,
or the number of ranks.
"""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path

from thinkrl import UserError
from thinkrl.config import Config
from thinkrl.distributed import World, shard, start, stop
from thinkrl.l2t.prm import load_prm
from thinkrl.l2t.prm_training import prm_objective
from thinkrl.learner import Learner, compute_dtype, new_learner, new_optimizer
from thinkrl.options import exit_with_error
from thinkrl.run.batch import read_packs
from thinkrl.run.files import read_json
from thinkrl.run.metrics import Tally
from thinkrl.sft import sft_objective
from thinkrl.tokenizer import Tokenizer
from thinkrl.update import Diverged, descend, policy_objective, require_finite


def again(folder: Path, world: World) -> tuple[float, float]:
    """Compute loss and gradient norm of the kept step. Raises Diverged if they are not finite."""
    config = Config(**read_json(folder.parents[1] / "config.json"))
    packs = [p.to(world.device) for p in read_packs(folder)]
    learner, flat = kept_learner(folder / "policy", config, world), False
    if config.preset == "sft":
        objective = sft_objective(learner.policy, packs)
    elif config.preset == "prm":
        objective = prm_objective(learner.policy, packs, Tally())
    else:
        require_finite(learner, packs)
        flat = not config.kl_coef and not any(p.advantage.any() for p in packs)  # as in `update`
        objective = policy_objective(learner.policy, packs, config, Tally())
    return descend(learner, packs, objective, 0.0, config, world, flat)


def kept_learner(path: Path, config: Config, world: World) -> Learner:
    """Load the model of a folder, sharded as in the run. The rows have the reference's log-probs, if any."""
    tokenizer = Tokenizer(path)
    if config.preset != "prm":
        return new_learner(path, dataclasses.replace(config, kl_coef=0.0), world, tokenizer)
    model = shard(load_prm(path), world, compute_dtype(config, world), 1, config.activation_checkpointing)
    return Learner(model, tokenizer, new_optimizer(model, config))


def main() -> None:
    parser = argparse.ArgumentParser(prog="again", description=__doc__.partition("\n")[0])
    parser.add_argument("folder", type=Path, help="runs/NAME/nonfinite/step_N")
    parser.add_argument("--device", default="auto", choices=["auto", "cpu", "cuda"])
    asked = parser.parse_args()
    try:
        loss, grad_norm = again(asked.folder.resolve(), start(asked.device))
        print(f"everything is finite here: loss {loss}, gradient norm {grad_norm}")
    except UserError as mistake:
        exit_with_error("again", mistake)
    except Diverged as reason:
        print(reason)
    finally:
        stop()


if __name__ == "__main__":
    main()

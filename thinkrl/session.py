"""What reinforcement learning, sft and prm share around their steps: open the run, resume, log, save, sum up.

session = Session(config, world, learners)           the run folder, new or continued; learners restored
for step in session.steps():                         the steps that are left
    tally = Tally()
    ...
    session.end_step(step, tally, {"loss": loss})    a line of metrics.jsonl, and a checkpoint when one is due
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

from thinkrl import UserError
from thinkrl.checkpoint import save_hf
from thinkrl.config import Config, as_dict
from thinkrl.distributed import World
from thinkrl.learner import Learner, restore, save
from thinkrl.metrics import Log, Tally
from thinkrl.problems import Stream
from thinkrl.runs import open_run


def require_enough(stream: Stream, config: Config, world: World) -> None:
    """Raise UserError unless every rank gets something to do in every step."""
    if world.size > config.problems_per_step:
        raise UserError(
            f"{world.size} ranks share {config.problems_per_step} problems per step, some would have none: raise "
            "--problems_per_step, or lower --nproc_per_node"
        )
    stream.take(
        0, config.problems_per_step * (1 + config.dynamic_sampling)
    )  # raises if there are not as many


class Session:
    """One process's work on a run. Opening it is collective, and so are `end_step` and `steps`.

    first     optimizer steps taken before, by the run that is resumed; 0 for a new one
    state     what `end_step` was given with the checkpoint that is resumed; {} for a new run
    export    writes a learner's weights where others load them, as (model, tokenizer, folder)
    """

    def __init__(
        self, config: Config, world: World, learners: dict[str, Learner], export: Callable = save_hf
    ):
        self.config, self.world, self.learners, self.export = config, world, learners, export
        self.run = open_run(config, world)
        self.first, self.state = restore(self.run.folder, learners)

    def steps(self) -> Iterator[int]:
        """The steps that are left, from 0."""
        c, folder = self.config, self.run.folder
        self.log = Log(
            folder, self.world.main, self.first, c.steps, c.wandb, c.tensorboard, settings=as_dict(c)
        )
        yield from range(self.first, c.steps)
        self.log.close()

    def end_step(
        self,
        step: int,
        tally: Tally,
        numbers: dict[str, float],
        samples: Sequence[dict] = (),
        state: dict | None = None,
    ) -> None:
        """Log a step, and save a checkpoint if it is the last or --save_every says so.

        numbers    of this step, equal on all ranks, to stand beside the tally's
        samples    lines for samples.jsonl
        state      what a resumed run needs beside the learners
        """
        self.log.step(tally.row(step + 1, **numbers))
        self.log.samples(step + 1, samples)
        every, last = self.config.save_every, step + 1 == self.config.steps
        if last or every and (step + 1) % every == 0:
            save(self.run.folder, step + 1, self.learners, state or {}, self.config, self.export)

    def summarise_loss(self, product: str, folder: str) -> None:
        """The end of a run without held-out problems: the last loss into summary.json, and where the product is."""
        if self.world.main:
            loss = self.log.last("loss")
            self.run.update_summary(after={"loss": loss})
            saved = self.run.folder / "checkpoints" / f"step_{self.config.steps}" / folder
            print(f"loss {loss:.4f}\n{product}: {saved}")

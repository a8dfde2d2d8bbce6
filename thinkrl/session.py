"""The parts that reinforcement learning, sft and prm share around their steps: open the run, resume, log, save, sum up.

session = Session(config, world, learners)           the run folder, new or continued; learners restored
for step in session.steps():                         the steps that are left
    tally = Tally()
    ...
    session.end_step(step, tally, {"loss": loss})    a line of metrics.jsonl, and a checkpoint when one is due
session.close()
"""

from __future__ import annotations

import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path

from tqdm import tqdm

from thinkrl import UserError
from thinkrl.checkpoint import save_hf
from thinkrl.config import Config, as_dict
from thinkrl.data.problems import Stream
from thinkrl.distributed import World
from thinkrl.learner import Learner, restore, save, save_dtype
from thinkrl.metrics import Log, Tally, append
from thinkrl.runs import open_run, record_launch
from thinkrl.sinks import flat, open_sinks, table_rows


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
    """One process's work on a run. Opening it is collective, and so are `end_step` and `steps`. Rank 0 writes.

    first     optimizer steps taken before, by the run that is resumed; 0 for a new one
    state     what `end_step` was given with the checkpoint that is resumed; {} for a new run
    export    writes a learner's weights where others load them, as (model, tokenizer, folder, dtype=…)
    report    writes the page of a run folder: every --report_every steps and after every evaluation
    """

    def __init__(
        self,
        config: Config,
        world: World,
        learners: Mapping[str, Learner],
        export: Callable = save_hf,
        report: Callable[[Path], object] | None = None,
    ):
        self.config, self.world, self.learners = config, world, learners
        self.export = partial(export, dtype=save_dtype(config, world))
        self.report = report
        self.run = open_run(config, world)
        self.first, self.state = restore(self.run.folder, learners)
        self.sinks = []
        if world.main:
            record_launch(self.run.folder, self.first, world)
            project = config.wandb_project if config.wandb else ""
            self.sinks = open_sinks(self.run.folder, self.first, project, config.tensorboard, as_dict(config))

    def steps(self) -> Iterator[int]:
        """The steps that are left, from 0."""
        self.log = Log(self.run.folder, self.world.main, self.first, self.config.steps)
        yield from range(self.first, self.config.steps)
        self.log.close()

    def end_step(
        self,
        step: int,
        tally: Tally,
        numbers: dict[str, float],
        samples: Sequence[dict] = (),
        state: dict | None = None,
    ) -> None:
        """Log a step; save a checkpoint if it is the last or --save_every says so; rewrite the report when it is due.

        numbers    of this step, equal on all ranks, to stand beside the tally's
        samples    lines for samples.jsonl
        state      what a resumed run needs beside the learners
        """
        row, done = tally.row(step + 1, **numbers), step + 1
        self.log.step(row)
        self.log.samples(done, samples)
        for sink in self.sinks:
            sink.numbers(done, row)
        if done == self.config.steps or _due(done, self.config.save_every):
            save(self.run.folder, done, self.learners, state or {}, self.config, self.export)
        if _due(done, self.config.report_every):
            for sink in self.sinks if samples else []:
                sink.completions(done, "training completions", table_rows(done, samples))
            self.write_report()

    def end_evaluation(self, when: str, step: int, result: dict, records: Sequence[dict]) -> None:
        """Log a held-out evaluation as `when`, after `step` steps. `records` are lines for evaluations.jsonl."""
        if not self.world.main:
            return
        for record in records:
            append(self.run.folder / "evaluations.jsonl", {"step": step, "when": when, **record})
        for sink in self.sinks:
            sink.numbers(step, dict(flat(result, "held_out")))
            sink.completions(step, "held-out completions", table_rows(step, records))
        self.run.update_summary(**{when: {"step": step, **result}})  # last: now it need not be done again
        self.write_report()

    def write_report(self) -> None:
        """Rewrite the run's page. A run is not lost over its page: what goes wrong is printed."""
        if not (self.world.main and self.report):
            return
        try:
            self.report(self.run.folder)
        except Exception:
            tqdm.write(f"the report was not written:\n{traceback.format_exc()}")

    def summarise_loss(self) -> None:
        """The end of a run without held-out problems: the last loss into summary.json."""
        if self.world.main:
            loss = self.log.last("loss")
            self.run.update_summary(after={"loss": loss})
            print(f"loss {loss:.4f}")

    def close(self) -> None:
        """Let the trackers finish."""
        for sink in self.sinks:
            sink.close()


def _due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0

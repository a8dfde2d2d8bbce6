"""The common part of RL, sft and prm around their steps: open the run, resume, log, save, summarise.

with Session(config, world, learners) as session:        run folder opened, learners restored
    for step in session.steps():                         the remaining steps
        tally = Tally()
        ...
        session.end_step(step, tally, {"loss": loss})    a line of metrics.jsonl; a checkpoint if due

After SIGTERM or SIGINT, the step or evaluation is finished, the state is saved, and `Stopped` is raised.
"""

from __future__ import annotations

import sys
import threading
import time
import traceback
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager
from functools import partial
from pathlib import Path

import torch
from tqdm import tqdm

from thinkrl import UserError
from thinkrl.checkpoint import save_hf
from thinkrl.config import Config, as_dict
from thinkrl.data.problems import Stream
from thinkrl.distributed import World, background_group, from_main, gather, global_max, on_main
from thinkrl.learner import Actor, Learner, compute_dtype, restore, save, save_dtype
from thinkrl.rollout import completions_bar
from thinkrl.run import watch
from thinkrl.run.batch import write_packs
from thinkrl.run.folder import open_run, record_launch
from thinkrl.run.metrics import STUCK, Log, Tally, append, set_aside, why_stuck
from thinkrl.run.signals import Stopped, StopRequest
from thinkrl.run.sinks import Sink, flat, open_sinks, table_rows
from thinkrl.types import Pack
from thinkrl.update import Diverged, Mismatched, mismatch_limit


def require_enough(stream: Stream, config: Config, world: World) -> None:
    """Raise UserError unless every rank gets problems in every step."""
    if world.size > config.problems_per_step:
        raise UserError(
            f"{world.size} ranks share {config.problems_per_step} problems per step, some would have none: "
            "raise --problems_per_step, or lower --nproc_per_node"
        )
    stream.take(0, config.problems_per_step * (1 + config.dynamic_sampling))  # raises if the data has fewer


class Session:
    """A run in one process. Opening it and its methods are collective. Rank 0 writes.

    first     optimizer steps taken before, by the run that is resumed; 0 for a new one
    state     the `state` that `end_step` got for the resumed checkpoint; {} for a new run
    export    writes a learner's weights for export: (model, tokenizer, folder, dtype=…)
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
        self.done = self.saved = self.first  # steps taken, and those of the newest checkpoint
        self.saved_at = time.monotonic()
        self.log = Log(self.run.folder, False, self.first, config.steps)  # of rank 0 from the first step on
        self.sinks: list[Sink] = []
        self.recent: deque[dict] = deque(maxlen=STUCK)  # lines of metrics.jsonl
        self.stuck = False  # whether the user was warned about them
        self.mismatched = False  # whether the user was warned that sampler and trainer differ
        on_main(self._begin)
        self.stop = StopRequest("this step", world.main)
        self.group = background_group()  # of the thread that writes checkpoints
        self.writer = ThreadPoolExecutor(1, "checkpoint")
        self.writer_thread = self.writer.submit(threading.get_ident).result()
        self.writing: Future[None] | None = None  # of the newest checkpoint

    def __enter__(self) -> Session:
        watch.begin("train.py", self.config.timeout, self.world)
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if isinstance(error, Diverged):
            error.args = (self._keep_batch(error),)
        elif isinstance(error, RuntimeError):
            watch.exit_if_lost(error)
        self.writer.shutdown()  # after the checkpoint that is being written: nothing saved is lost
        watch.end()
        self.stop.close()
        self.log.close()
        for sink in self.sinks:
            sink.close()

    def _begin(self) -> None:
        """Print where a resumed run continues, and open the sinks."""
        folder, config = self.run.folder, self.config
        if self.run.resumed and self.first:
            print(f"continues at step {self.first} from {folder}/checkpoints/step_{self.first}")
        elif self.run.resumed:
            kept = set_aside(folder)
            line = f"; the lines of its earlier start are kept in {', '.join(kept)}" if kept else ""
            print(f"{folder} has no checkpoint yet: it starts over{line}")
        record_launch(folder, self.first, self.world)
        project = config.wandb_project if config.wandb else ""
        self.sinks = open_sinks(folder, self.first, project, config.tensorboard, as_dict(config))

    def _open_log(self) -> None:
        self.log = Log(self.run.folder, True, self.first, self.config.steps)

    def steps(self) -> Iterator[int]:
        """Yield the remaining steps, counted from 0."""
        on_main(self._open_log)
        self.stop_if_asked()
        yield from range(self.first, self.config.steps)
        self.finish_save()
        self.log.close()

    def end_step(
        self,
        step: int,
        tally: Tally,
        numbers: dict[str, float],
        samples: Sequence[dict] = (),
        state: dict | None = None,
    ) -> None:
        """Log a step; save a checkpoint after the last step and every --save_every; rewrite the report if
        due.

        numbers    further numbers of this step, equal on all ranks
        samples    lines for samples.jsonl
        state      state for a resume, besides the learners
        """
        watch.at("log")
        row, done = tally.row(step + 1, **numbers), step + 1
        self.recent.append(row)
        on_main(self._log_step, done, row, samples)
        if self.writing and not global_max(not self.writing.done()):
            self.finish_save()  # raises now, and not at the next save, if it failed
        if "mismatch" in row:
            self._check_mismatch(done, row["mismatch"])
        self.done, self.state = done, state or {}
        if done == self.config.steps or _due(done, self.config.save_every) or self._minutes_are_over():
            self.save()
        if _due(done, self.config.report_every):
            for sink in self.sinks if samples else []:
                sink.completions(done, "training completions", table_rows(done, samples))
            self.write_report()
        self.stop_if_asked()

    def _log_step(self, done: int, row: dict[str, float], samples: Sequence[dict]) -> None:
        self.log.step(row)
        self.log.samples(done, samples)
        for sink in self.sinks:
            sink.numbers(done, row)

    def _check_mismatch(self, done: int, mismatch: float) -> None:
        """Warn once if the sampler's log-probs are not the policy's. Raises Mismatched with --strict."""
        config, dtype = self.config, compute_dtype(self.config, self.world)
        width = next(iter(self.learners.values())).policy.config.width
        limit, name = mismatch_limit(dtype, width, config.temperature), str(dtype).removeprefix("torch.")
        above = not mismatch <= limit
        sentence = (
            f"step {done}: log-probs of sampler and trainer differ by {mismatch:.2g} in the mean, more than "
            f"the {limit:.2g} that rounding to {name} explains: a weight was not copied to the sampler, or "
            "one of the two computes something else"
        )
        if above and config.strict:
            raise Mismatched(f"{sentence}; stopped by --strict, nothing was saved over the last checkpoint")
        if above and not self.mismatched and self.world.main:
            tqdm.write(f"warning: {sentence}", file=sys.stderr)
        self.mismatched = above

    def _keep_batch(self, error: Diverged) -> str:
        """Write the rows of the step that was not taken. Returns the error's text with step and folder."""
        watch.at("save")
        sentence = f"step {self.done + 1}: {error}; nothing was saved over the last checkpoint"
        folder = self.run.folder / "nonfinite" / f"step_{self.done + 1}"
        packs: list[Pack] = sum(gather([p.to("cpu") for p in error.packs]), [])
        learner = error.learner
        try:
            self.export(learner.policy, learner.tokenizer, folder / "policy", dtype=torch.float32)
            on_main(write_packs, folder, packs, sentence)
        except UserError as full:
            return f"{sentence}; its rows could not be kept: {full}"
        return f"{sentence}; python -m thinkrl.tools.again {folder} computes it again"

    def _minutes_are_over(self) -> bool:
        """Whether --save_minutes have passed since the last checkpoint, by rank 0's clock. Collective."""
        minutes = self.config.save_minutes
        return minutes > 0 and from_main(time.monotonic() - self.saved_at > 60 * minutes)

    def save(self) -> None:
        """Save the current state: copy it, and let a thread write the copy while the run goes on."""
        self.finish_save()
        watch.at("save")
        write = save(
            self.run.folder, self.done, self.learners, self.state, self.config, self.group, self.export
        )
        self.writing = self.writer.submit(write)
        self.saved, self.saved_at = self.done, time.monotonic()

    def finish_save(self) -> None:
        """Wait until the newest checkpoint is written. Raises its UserError. Collective."""
        if self.writing:
            watch.at("save")
            writing, self.writing = self.writing, None
            with watch.waiting_for(self.writer_thread):
                writing.result()

    def stop_if_asked(self) -> None:
        """Save, unless saved, and raise Stopped, if a rank was asked to stop."""
        if not self.stop.agreed():
            return
        if self.saved < self.done:
            self.save()
        self.finish_save()
        at = f"after step {self.done}, which is saved" if self.done else "before the first step was taken"
        raise Stopped(f"stopped {at}: the same command with --resume auto continues {self.run.folder}")

    def warn_if_stuck(self, rule: str) -> None:
        """Warn once if the newest steps have no advantage or no right answer. rule: the grading rule."""
        sentence = why_stuck(self.recent, rule) if len(self.recent) == STUCK else ""
        if sentence and not self.stuck and self.world.main:
            tqdm.write(f"warning: {sentence}", file=sys.stderr)
        self.stuck = bool(sentence)

    def bar(self, what: str, completions: int) -> AbstractContextManager:
        """Make a progress bar over so many completions, or over turns with two samplers."""
        samplers = [learner.sampler for learner in self.learners.values() if isinstance(learner, Actor)]
        return completions_bar(samplers, completions if len(samplers) == 1 else None, what, self.world.main)

    def end_evaluation(self, when: str, step: int, result: dict, records: Sequence[dict]) -> None:
        """Log a held-out evaluation as `when`, after `step` steps. records: lines for evaluations.jsonl."""
        on_main(self._keep_evaluation, when, step, result, records)
        if when != "after":  # after that nothing is left to continue
            self.stop_if_asked()

    def _keep_evaluation(self, when: str, step: int, result: dict, records: Sequence[dict]) -> None:
        for record in records:
            append(self.run.folder / "evaluations.jsonl", {"step": step, "when": when, **record})
        for sink in self.sinks:
            sink.numbers(step, dict(flat(result, "held_out")))
            sink.completions(step, "held-out completions", table_rows(step, records))
        self.run.update_summary(**{when: {"step": step, **result}})  # last: marks the evaluation as done
        self.write_report()

    def write_report(self) -> None:
        """Rewrite the run's report. An error is printed and does not stop the run."""
        if not (self.world.main and self.report):
            return
        watch.at("report")
        try:
            self.report(self.run.folder)
        except Exception:
            tqdm.write(f"the report was not written:\n{traceback.format_exc()}")

    def summarise_loss(self) -> None:
        """Write the last loss to summary.json, for a run without held-out problems."""
        if self.world.main:
            loss = self.log.last("loss")
            self.run.update_summary(after={"loss": loss})
            print(f"loss {loss:.4f}")


def _due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0

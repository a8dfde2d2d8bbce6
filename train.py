"""Train a policy to reason efficiently:  torchrun --nproc_per_node=8 train.py [PRESET] [--key value …]

One step of reinforcement learning, whatever the preset, is `train_step`:

    problems -> rollout -> reward -> advantages -> samples -> packs -> loss -> optimizer step -> weights to
    sampler

A preset decides how trajectories are generated and rewarded, and how advantages are computed; from the
samples on, the code is the same for all. (sft and prm have other losses: thinkrl/sft.py,
thinkrl/l2t/prm_training.py.)
"""

from thinkrl.config import parse
from thinkrl.options import command_line

if __name__ == "__main__":  # before torch is imported, so --help and wrong options are fast
    CONFIG = command_line("train.py", parse)

from collections.abc import Sequence
from pathlib import Path
from types import ModuleType

from torch import Tensor

from thinkrl import UserError, require_own_kernels, sft
from thinkrl.config import Config
from thinkrl.data.problems import held_out_problems, reading, subsample, training_stream
from thinkrl.distributed import World, gather, require_compiler, run_and_exit, start, stop
from thinkrl.evaluate import held_out_record, summary_table, tally_outcomes
from thinkrl.finish import finish, push
from thinkrl.hub import require_upload
from thinkrl.learner import fitted, fitted_to_memory, model_path
from thinkrl.options import exit_with_error
from thinkrl.presets import Grpo, Preset
from thinkrl.rollout import EVALUATION, sample_differences
from thinkrl.run import watch
from thinkrl.run.folder import Run
from thinkrl.run.lock import release
from thinkrl.run.metrics import Stopwatch, Tally
from thinkrl.run.signals import Stopped, exit_when_stopped
from thinkrl.run.sinks import require_sinks
from thinkrl.session import Session, require_enough
from thinkrl.types import Problem, Trajectory
from thinkrl.update import Diverged, Mismatched, pack_evenly, require_finite, update


def method(preset: str, name: str = "") -> type[Preset]:
    """Import the class of a preset, or of --method. A paper's folder is imported only if it is used."""
    if name == "s-grpo":
        from thinkrl.l2t.exits import SGrpo

        return SGrpo
    if preset == "l2t":
        from thinkrl.l2t.preset import L2T

        return L2T
    if preset == "longshort":
        from thinkrl.longshort.preset import LongShort

        return LongShort
    return Grpo


def token_budgets() -> ModuleType:
    """Import the module of --eval_budgets, whose forced answers are L2T's probes."""
    from thinkrl.l2t import budgets

    return budgets


def train_step(
    preset: Preset,
    problems: list[Problem],
    step: int,
    world: World,
    tally: Tally,
    spare: Sequence[list[Problem]] = (),
) -> tuple[Sequence[Trajectory], list[Tensor], dict[str, float]]:
    """Run one step of reinforcement learning on this rank's problems. Collective.

    spare: for each round of dynamic sampling, a replacement of each problem. Returns the trajectories, their
    advantages, and the numbers of the update: loss, grad_norm, lr.
    """
    config, clock = preset.config, Stopwatch()
    learner, lr = preset.begin_step(step), preset.learning_rate(step)
    watch.at("rollout", step + 1)
    trajectories, replaced = sample_differences(  # sampled and graded, with loss mask and log-probs
        lambda problems: preset.rollout(problems, step, tally), [problems, *spare], config.group_size
    )
    for each in preset.learners.values():
        each.sampler.release_pool()  # frees the KV pages for the backward
    tally.add("rollout_seconds", clock.seconds)
    if spare:
        tally.add("resampled", len(replaced) / config.group_size, len(problems))
        tally.add_sum("sampled_tokens", sum(t.tokens for t in replaced))
    watch.at("reward")
    preset.reward(trajectories, step, tally)  # the outcome plus the method's part
    advantages = preset.advantages(trajectories, step, tally)  # per trajectory, a value per trained token
    samples = preset.samples(trajectories, advantages, step)  # (prompt, completion) pairs
    watch.at("update")
    packs = pack_evenly(samples, config, world)  # many samples in one row, as many rows on every rank
    require_finite(learner, packs, trajectories)
    loss, grad_norm = update(learner, packs, lr, config, world, tally)  # loss, backward, clip, AdamW
    watch.at("weight sync")
    learner.sampler.load_weights(learner.policy)
    return trajectories, advantages, {"loss": loss, "grad_norm": grad_norm, "lr": lr}


def train(config: Config, world: World) -> Run:
    """Reinforcement learning: grpo, l2t, longshort."""
    stream = training_stream(config.data, config.seed, config.data_weights, **reading(config))
    require_enough(stream, config, world)
    preset = method(config.preset, config.method)(config, world)
    preset.require_room(stream.preview(config.problems_per_step), training=True)
    held_out = subsample(
        held_out_problems(config.eval_data, config.data, **reading(config)), config.eval_problems
    )
    preset.require_room(held_out, training=False)
    if config.eval_budgets:
        token_budgets().require_room(preset, held_out)
    with Session(config, world, preset.learners, report=write_report) as session:
        preset.load_state_dict(session.state)

        def evaluate_after(step: int) -> None:
            if config.eval_every and step % config.eval_every == 0 and 0 < step < config.steps:
                evaluate(preset, held_out, session, preset.name(step), step)

        evaluate(preset, held_out, session, "before", session.first)
        evaluate_after(session.first)  # the run may have been killed between a step and its evaluation
        for step in session.steps():
            tally = Tally()
            problems, *spare = stream.take_rounds(
                step, config.problems_per_step, 1 + config.dynamic_sampling, world.rank, world.size
            )
            with session.bar(f"step {step + 1}", len(problems) * config.group_size):
                trajectories, advantages, numbers = train_step(preset, problems, step, world, tally, spare)
            tally_outcomes(tally, trajectories, config.group_size)
            shown = config.log_groups * config.group_size
            records = [t.record(advantage) for t, advantage in zip(trajectories[:shown], advantages)]
            session.end_step(step, tally, numbers, records, preset.state_dict())
            session.warn_if_stuck(problems[0].source)
            evaluate_after(step + 1)
        evaluate(preset, held_out, session, "after", config.steps)
    if world.main:
        print(summary_table(session.run.summary))
    return session.run


def evaluate(preset: Preset, problems: list[Problem], session: Session, when: str, step: int) -> None:
    """Evaluate on held-out problems, sampled and greedily, into summary.json under `when`. Collective."""
    if when in session.run.summary or not problems:
        return
    watch.at("evaluation", step)
    c, mine = preset.config, [problems[i] for i in session.world.share(len(problems))]
    tokenizer = next(iter(preset.learners.values())).tokenizer
    results, records = [], []
    for decoding, n, temperature in (("sampled", c.eval_samples, c.temperature), ("greedy", 1, 0.0)):
        asked, rows = (mine, n, temperature, (EVALUATION, step)), []
        with session.bar(f"evaluation {when}, {decoding}", len(mine) * n):
            if c.eval_budgets:
                own, rows = token_budgets().attempt(preset, *asked)
            else:
                own = preset.attempt(*asked)
        attempts: list[Trajectory] = sum(gather(own), [])
        results.append(preset.summarise(attempts))
        if c.eval_budgets:
            results[-1] |= token_budgets().curve(sum(gather(rows), []), c)
        records += [{"decoding": decoding, **held_out_record(t, tokenizer)} for t in attempts]
    session.end_evaluation(when, step, {**results[0], "greedy": results[1]}, records)


def train_sft(config: Config, world: World) -> Run:
    """Supervised fine-tuning; rows of the Long⊗Short cold start are encoded like its conversations."""
    parts = sft.load_parts(config)
    rows = [row for part in parts for row in part]
    if not any(row.conversation for row in rows):
        return sft.train(config, world, parts, report=write_report)
    from thinkrl.longshort.cold_start import role_files, row_prompt

    files = role_files(rows, config.prompts, model_path(config.model))
    return sft.train(config, world, parts, row_prompt, files, write_report)


def train_prm(config: Config, world: World) -> Run:
    """Train the step reward model of `l2t --gain prm`."""
    from thinkrl.l2t.prm_training import train

    return train(config, world, write_report)


def write_report(folder: Path) -> Path:
    """Write the report of a run. Training needs nothing else of tools."""
    from thinkrl.tools import report

    return report.write_report(folder)


def main(config: Config) -> None:
    try:
        require_own_kernels()
        require_sinks(config.wandb, config.tensorboard)
        world = start(config.device)
        if config.compile:
            require_compiler(world.device)
        if world.main and config.push_to_hub:
            require_upload(config.push_to_hub)
        config = fitted_to_memory(fitted(config, world), world)
        run = {"sft": train_sft, "prm": train_prm}.get(config.preset, train)(config, world)
        if world.main:
            models = finish(run, run.config)
            print("\n".join(f"model: {folder}" for folder in models))
            print(f"report: {write_report(run.folder)}\nrun: {run.folder}")
            if config.push_to_hub:
                push(models, config)
    except UserError as mistake:
        exit_with_error("train.py", mistake)
    except (Diverged, Mismatched) as reason:
        exit_with_error("train.py", reason, status=1)
    except Stopped as request:
        exit_when_stopped("train.py", request)
    finally:
        release()
        stop()


if __name__ == "__main__":
    run_and_exit(main, CONFIG)

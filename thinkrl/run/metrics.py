"""Definitions of all logged numbers, and the logs: metrics.jsonl, samples.jsonl and the tqdm bar."""

from __future__ import annotations

import itertools
import json
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from thinkrl.distributed import global_sum

# Keys of metrics.jsonl, one line per optimizer step. Means are over the whole step and all ranks.
DEFINITIONS = {
    "step": "optimizer steps taken, this one included",
    "reward": "mean over trajectories of the raw reward (outcome plus what the preset adds per trajectory)",
    "unrewarded": "share of trajectories for which no --reward gave a number; they are not in the mean",
    "accuracy": "share of trajectories whose answer is graded right",
    "answered": "share of trajectories in which the grading rule found an answer, right or wrong",
    "tokens": "mean sampled tokens per trajectory, stop token included, all turns",
    "truncated": "share of trajectories that reached --max_tokens",
    "resampled": (
        "grpo with --dynamic_sampling: mean number of groups per problem that were replaced by other "
        "problems' groups"
    ),
    "zero_groups": (
        "share of groups whose rewards are all equal: their advantages are 0, except those of l2t's process "
        "rewards"
    ),
    "loss": "the step's loss: sum over all micro-batches and ranks divided by the step's own count",
    "grad_norm": "global L2 norm of the gradient before clipping",
    "lr": "learning rate of this step",
    "entropy": (
        "mean entropy in nats of the policy's next-token distribution at sampled tokens, at the sampling "
        "temperature"
    ),
    "kl": "k3 estimate of KL(policy || reference) per token; 0 when no reference is held",
    "clip_fraction": (
        "share of tokens whose ratio was clipped, so that their gradient is 0 (cispo: whose weight is "
        "bounded)"
    ),
    "mismatch": "mean |log-prob by the trainer - log-prob by the sampler| per sampled token",
    "advantage_max": (
        "largest |advantage| of the step, over all ranks; 0: nothing to learn, no backward was run"
    ),
    "seconds": "wall-clock of the step, rollout to weight sync",
    "tokens_per_second": "sampled tokens of all ranks / seconds",
    "rollout_seconds": "part of `seconds` spent on sampling and, under l2t, on probes",
    "probe_tokens": (
        "l2t: token-forwards spent on probes per step, by the policy or the reward model, all ranks"
    ),
    "probe_seconds": "l2t: seconds spent on probes and on cutting into episodes (mean over ranks)",
    "episodes": "l2t: mean episodes K per completion",
    "malformed": "l2t: share of completions whose episode tags are malformed",
    "fitting_gain": "l2t: mean over completions of J_K - J_0",
    "decorative": "l2t: share of episodes that change J by less than 0.01",
    "compression": "l2t: mean over completions of the raw total compression, before normalisation",
    "penalty": "l2t: mean over completions of the normalised total compression, which beta multiplies",
    "process_reward": "l2t: mean over completions of the summed process reward",
    "penalty_length_correlation": (
        "l2t: correlation over episodes of normalised compression and length in tokens"
    ),
    "penalty_tokens": (
        "l2t: token-forwards for the penalty per step, all ranks; 0 if it uses the sampler's hidden states"
    ),
    "penalty_seconds": "l2t: seconds spent on the compression penalty",
    "label_error": "prm: mean |P(positive) - Monte-Carlo label| over prefixes",
    "round": "longshort: the round, counted from 1",
    "turns": "longshort: mean turns per conversation",
    "format": "longshort: share of trajectories in which all turns of the trained role are well formed",
}


STUCK = 5  # steps without any advantage, or without a right answer, after which a run warns


def why_stuck(rows: Sequence[dict], rule: str) -> str:
    """Explain why these newest lines of metrics.jsonl have no advantage, or no right answer; "" if they have.

    rule: the grading rule's name, for the sentence.
    """
    shares = {
        key: [row.get(key, 0.0) for row in rows]
        for key in ("answered", "accuracy", "truncated", "unrewarded")
    }
    all_of, none_of = ({key for key, values in shares.items() if set(values) == {x}} for x in (1, 0))
    taught = any(row["advantage_max"] > 0 for row in rows)
    if not rows or (taught and "accuracy" not in none_of):
        return ""
    if "unrewarded" in all_of:
        why = "--reward gave no completion a number"
    elif "truncated" in all_of:
        why = "every completion was cut off; raise --max_tokens"
    elif "answered" in none_of:
        why = (
            f"the grading rule {rule} found no answer in any completion; tell the model the format by "
            "--suffix or --system, or choose another rule by --source (last_number takes the last number)"
        )
    elif "accuracy" in none_of:
        why = (
            f"under the grading rule {rule} every answer was wrong; do the gold answers have its format, is "
            "the data too hard?"
        )
    elif "accuracy" in all_of:
        why = "every answer was right; take harder data"
    else:
        why = "the rewards of each group were equal; raise --group_size or --temperature"
    if taught:
        what = (
            f"no answer was right in the last {len(rows)} steps, only other parts of the reward are learned"
        )
    else:
        what = f"nothing was learned in the last {len(rows)} steps, all advantages were 0"
    return f"{what}: {why}"


class Tally:
    """Numbers of one step, which begins when this is made.

    Means are kept as (sum, count). `reduce` sums everything over ranks, as one vector. Every rank must add
    the same names.
    """

    def __init__(self) -> None:
        self.clock = Stopwatch()
        self.pairs: dict[str, list[float]] = {}
        self.on_device: list[tuple[str, int, Tensor]] = []  # read back once a step
        self.sums: dict[str, float] = {}

    def add(self, name: str, total: Tensor | float, count: Tensor | float = 1.0) -> None:
        """Add to a mean, which is the sum of `total` / the sum of `count`."""
        pair = self.pairs.setdefault(name, [0.0, 0.0])
        for i, value in enumerate((total, count)):
            if isinstance(value, Tensor) and value.is_cuda:
                self.on_device.append((name, i, value.detach()))
            else:
                pair[i] += float(value.detach() if isinstance(value, Tensor) else value)

    def add_all(self, pairs: dict[str, tuple]) -> None:
        for name, (total, count) in pairs.items():
            self.add(name, total, count)

    def add_sum(self, name: str, value: float) -> None:
        self.sums[name] = self.sums.get(name, 0.0) + value

    def reduce(self) -> dict[str, float]:
        """Means and sums over all ranks; a mean with count 0 is 0. Collective."""
        if self.on_device:
            values = torch.stack([value.double() for _, _, value in self.on_device]).tolist()
            for (name, i, _), number in zip(self.on_device, values):
                self.pairs[name][i] += number
            self.on_device = []
        means, sums = sorted(self.pairs), sorted(self.sums)
        pairs = [self.pairs[name] for name in means] + [[self.sums[name], 1.0] for name in sums]
        totals = global_sum(torch.tensor(pairs, dtype=torch.float64).reshape(-1, 2)).tolist()
        reduced = {name: total / count if count else 0.0 for name, (total, count) in zip(means, totals)}
        return reduced | {name: total for name, (total, _) in zip(sums, totals[len(means) :])}

    def row(self, step: int, **numbers: float) -> dict[str, float]:
        """Make the line of metrics.jsonl of optimizer step `step`, from 1. Collective.

        numbers: further entries, equal on all ranks.
        """
        reduced, seconds = self.reduce(), self.clock.seconds
        known = {name: value for name, value in reduced.items() if name in DEFINITIONS}
        speed = reduced["sampled_tokens"] / seconds
        return {"step": step, "kl": 0.0, **known, **numbers, "seconds": seconds, "tokens_per_second": speed}


def correlation(x: Tensor, y: Tensor) -> float:
    """Pearson correlation of all ranks' pairs [N]; 0 if x or y is constant. Collective."""
    x, y = x.double().cpu(), y.double().cpu()
    n, sx, sy, sxx, syy, sxy = global_sum(
        torch.stack(
            [
                torch.tensor(float(len(x)), dtype=torch.float64),
                x.sum(),
                y.sum(),
                (x * x).sum(),
                (y * y).sum(),
                (x * y).sum(),
            ]
        )
    ).tolist()
    variance = max(0.0, n * sxx - sx * sx) * max(0.0, n * syy - sy * sy)
    return (n * sxy - sx * sy) / variance**0.5 if variance > 0 else 0.0


def set_aside(folder: Path) -> list[str]:
    """Rename the logs of a run that starts over, to metrics.1.jsonl and so on. Returns the new names."""
    kept = []
    for name in ("metrics", "samples"):
        path = folder / f"{name}.jsonl"
        if path.exists() and path.stat().st_size:
            number = next(i for i in itertools.count(1) if not (folder / f"{name}.{i}.jsonl").exists())
            kept.append(path.rename(folder / f"{name}.{number}.jsonl").name)
    return kept


class Log:
    """Writer of metrics.jsonl and samples.jsonl; on ranks other than 0 it does nothing."""

    def __init__(self, folder: Path, main: bool, first_step: int, steps: int):
        self.main, self.folder = main, folder
        if not main:
            return
        self._forget_after(first_step)
        self.bar = tqdm(
            total=steps, initial=first_step, desc="train", unit="step", dynamic_ncols=True, smoothing=0.05
        )

    def _forget_after(self, step: int) -> None:
        """Remove the lines of steps after `step`, which a resumed run repeats."""
        for name in ("metrics.jsonl", "samples.jsonl"):
            path = self.folder / name
            if path.exists():
                kept = [line for line in path.read_text().splitlines() if _step_of(line) <= step]
                temporary = path.with_suffix(".tmp")
                temporary.write_text("".join(line + "\n" for line in kept))
                temporary.replace(path)

    def step(self, row: dict[str, float]) -> None:
        if not self.main:
            return
        undefined = set(row) - set(DEFINITIONS)
        assert not undefined, f"logged without a definition: {undefined}"
        append(self.folder / "metrics.jsonl", {k: _short(v) for k, v in row.items()})
        shown = {k: row[k] for k in ("reward", "accuracy", "tokens", "tokens_per_second", "loss") if k in row}
        self.bar.set_postfix(
            {"tok/s" if k == "tokens_per_second" else k: f"{v:.3g}" for k, v in shown.items()}
        )
        self.bar.update()

    def samples(self, step: int, rows: Sequence[dict]) -> None:
        for row in rows if self.main else []:
            append(self.folder / "samples.jsonl", {"step": step, **row})

    def last(self, key: str) -> float:
        """Number of the newest step, of this process or of the resumed run. Rank 0 only."""
        return json.loads((self.folder / "metrics.jsonl").read_text().splitlines()[-1])[key]

    def close(self) -> None:
        if self.main:
            self.bar.close()


def _step_of(line: str) -> float:
    """Step of a line; infinity for a line cut off by a crash."""
    try:
        return json.loads(line)["step"]
    except (json.JSONDecodeError, KeyError):
        return float("inf")


def _short(value: float) -> float:
    return value if isinstance(value, int) else float(f"{value:.6g}")


def append(path: Path, row: dict) -> None:
    """Append a line to a .jsonl file."""
    with path.open("a") as file:
        file.write(json.dumps(row) + "\n")


class Stopwatch:
    """Clock that starts when it is made."""

    def __init__(self) -> None:
        self.start = time.perf_counter()

    @property
    def seconds(self) -> float:
        return time.perf_counter() - self.start

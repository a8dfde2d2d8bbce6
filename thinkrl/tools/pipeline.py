"""Long⊗Short on the embedded model: all four stages from the built-in long chains.   `make longshort`

    python -m thinkrl.tools.pipeline [--key value …]

    1 chunk        built-in long chains -> thoughts, importance, labels -> two files    chunk.py
    2 cold start   the base policy is fine-tuned for each role -> L0, S0                train.py sft
    3 rounds       L and S are trained in turns -> L1⊗S0, L2⊗S0, L2⊗S1, …               train.py longshort
    4 baseline     the base policy by GRPO, with the same steps and attempts            train.py grpo

Each stage is one torchrun. A finished stage is not repeated, so the same command continues a killed pipeline;
config.json keeps the options, which must be the same. At the end there are a table, report.html of all
stages, and summary.json in the folder --out, with the base policy, the chains, an entry per round, and GRPO.
All are measured on the same held-out problems at T = 1 and greedily; tokens are of both roles and all turns.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path

from thinkrl import UserError
from thinkrl.config import schedule
from thinkrl.evaluate import aes
from thinkrl.longshort.protocol import pair_name
from thinkrl.options import command_line, exit_with_error, option, parse_as
from thinkrl.run.files import write_json
from thinkrl.run.folder import finished, launch, open_out, torchrun
from thinkrl.run.lock import take
from thinkrl.run.signals import Stopped, exit_when_stopped
from thinkrl.tools.report import write_report


@dataclass(frozen=True)
class Options:
    out: str = option(
        "runs/longshort", "folder of the stages and of summary.json; an unfinished one is continued"
    )
    ranks: int = option(2, "processes of every torchrun", low=1)
    device: str = option("cpu", "where to compute; the embedded model needs no GPU", ("auto", "cpu", "cuda"))
    seed: int = option(42, "of every stage")
    chains: int = option(800, "built-in long chains to chunk", low=1)
    rollout_tokens: int = option(
        40,
        "token limit of a Monte Carlo rollout: what a prefix is worth to a policy that must be brief",
        low=1,
    )
    sft_steps: int = option(200, "optimizer steps of each cold start", low=1)
    rounds: str = option("LLSLSL", "which role each round trains: L (long) or S (short)")
    steps_per_round: int = option(20, "optimizer steps per round", low=1)
    eval_problems: int = option(500, "held-out problems, at most 500", low=1)


FREE_TO_CHANGE = {"out", "ranks", "device"}


def parse(argv: list[str]) -> Options:
    options = parse_as(Options, argv, "python -m thinkrl.tools.pipeline [--key value …]")
    schedule(options.rounds)
    return options


def open_folder(options: Options) -> Path:
    """Open the folder `out` and write config.json. Raises UserError if its stages had other options."""
    folder = Path(options.out)
    take(folder)
    settings = {key: value for key, value in asdict(options).items() if key not in FREE_TO_CHANGE}
    open_out(folder, settings)
    write_json(folder / "config.json", settings)
    return folder


def run_stages(options: Options) -> None:
    """Run all stages in the folder `out`: chunk/, L0/, S0/, longshort/, grpo/. UserError if one fails."""
    folder = Path(options.out).resolve()
    common = ["--seed", str(options.seed), "--device", options.device]

    def run(title: str, *arguments: str) -> None:
        print(f"\n== {title}", flush=True)
        status = launch(torchrun(options.ranks, *arguments, *common))
        if status:
            raise UserError(
                f"the stage '{title}' failed with status {status}; the same command continues from here"
            )

    def train(title: str, name: str, preset: str, *arguments: str) -> Path:
        if not finished(folder / name):
            run(
                title,
                "train.py",
                preset,
                "--runs_dir",
                str(folder),
                "--name",
                name,
                "--resume",
                "auto",
                *arguments,
            )
        return folder / name

    chunks = folder / "chunk"
    run(
        "1 chunk",
        "chunk.py",
        "--out",
        str(chunks),
        "--limit",
        str(options.chains),
        "--max_tokens",
        str(options.rollout_tokens),
        "--temperature",
        "1.0",
    )
    start = []
    for role, name in (("long", "L0"), ("short", "S0")):
        saved = train(
            f"2 cold start of {name}",
            name,
            "sft",
            "--data",
            str(chunks / f"{role}.json"),
            "--steps",
            str(options.sft_steps),
        )
        start += [f"--{role}", str(saved / "hf")]
    measured = ["--eval_problems", str(options.eval_problems)]
    train(
        "3 rounds",
        "longshort",
        "longshort",
        *start,
        "--rounds",
        options.rounds,
        "--steps_per_round",
        str(options.steps_per_round),
        "--save_every",
        str(options.steps_per_round),
        *measured,
    )
    train(
        "4 baseline", "grpo", "grpo", "--steps", str(len(options.rounds) * options.steps_per_round), *measured
    )


def collect(folder: Path, rounds: str) -> dict:
    """Collect summary.json: base, long_chains, rounds (the cold start first) and grpo."""
    talks, grpo = (json.loads((folder / name / "summary.json").read_text()) for name in ("longshort", "grpo"))
    chains = json.loads((folder / "chunk" / "annotated.json").read_text())
    names = [pair_name(rounds, k) for k in range(len(rounds) + 1)]
    results = [talks["before"], *(talks[name] for name in names[1:-1]), talks["after"]]
    base = grpo["before"]

    def entry(result: dict) -> dict:
        greedy = result["greedy"]
        kept = ("accuracy", "tokens", "long_tokens", "short_tokens", "turns", "ended", "by_level")
        numbers = {key: result[key] for key in kept if key in result}
        numbers["aes"] = aes(result["accuracy"], result["tokens"], base["accuracy"], base["tokens"])
        numbers["greedy"] = {key: greedy[key] for key in kept if key in greedy}
        numbers["greedy"]["aes"] = aes(
            greedy["accuracy"], greedy["tokens"], base["greedy"]["accuracy"], base["greedy"]["tokens"]
        )
        return numbers

    return {
        "base": entry(base),
        "long_chains": {
            "chains": len(chains),
            "tokens": sum(sum(chain["lengths"]) for chain in chains) / len(chains),
            "thoughts": sum(len(chain["thoughts"]) for chain in chains) / len(chains),
            "exchanges": sum(len(chain["segments"]) / 2 for chain in chains) / len(chains),
        },
        "rounds": [
            {"policies": name, "trained": trained, **entry(result)}
            for name, trained, result in zip(names, [None, *schedule(rounds)], results)
        ],
        "grpo": entry(grpo["after"]),
    }


def table(summary: dict) -> str:
    rows = [
        ("base policy", summary["base"]),
        *((r["policies"], r) for r in summary["rounds"]),
        ("base + GRPO", summary["grpo"]),
    ]
    lines = [
        "| policies | T=1 accuracy | tokens | long + short | turns min/mean/max | AES | greedy accuracy | "
        "tokens | AES |",
        "|---" * 9 + "|",
    ]
    for name, r in rows:
        split = f"{r['long_tokens']:.1f} + {r['short_tokens']:.1f}" if "turns" in r else ""
        turns = (
            f"{r['turns']['min']} / {r['turns']['mean']:.2f} / {r['turns']['max']}" if "turns" in r else ""
        )
        greedy = r["greedy"]
        lines.append(
            f"| {name} | {r['accuracy']:.1%} | {r['tokens']:.1f} | {split} | {turns} | {r['aes']:+.2f} | "
            f"{greedy['accuracy']:.1%} | {greedy['tokens']:.1f} | {greedy['aes']:+.2f} |"
        )
    return "\n".join(lines)


def require_exchanges(summary: dict) -> None:
    """Raise UserError if a pair of policies never used a second turn, so that the roles do not cooperate."""
    single = [r["policies"] for r in summary["rounds"] if r["turns"]["max"] == 1]
    if single:
        raise UserError(
            f"every conversation of {', '.join(single)} ended at its first turn: the roles did not learn to "
            "ask again; see chunk/summary.json for how many chains have more than one exchange"
        )


def main(options: Options) -> None:
    try:
        folder = open_folder(options)
    except UserError as mistake:
        exit_with_error("pipeline", mistake)
    try:
        run_stages(options)
        summary = collect(folder, options.rounds)
        write_json(folder / "summary.json", summary)
        print(f"\n{table(summary)}\nsummary: {folder}/summary.json\nreport: {write_report(folder)}")
        require_exchanges(summary)
    except UserError as mistake:
        exit_with_error("pipeline", mistake, status=1)
    except Stopped as request:
        exit_when_stopped("pipeline", request)


if __name__ == "__main__":
    main(command_line("pipeline", parse))

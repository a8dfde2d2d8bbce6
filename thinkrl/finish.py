"""The end of a run: move its models to stable paths, write model cards, remove files that only a resume
needs.

runs/NAME/hf                      the policy as a Hugging Face folder (longshort: hf_long, hf_short; prm: prm)
runs/NAME/hf/README.md            the model card
runs/NAME/checkpoints/step_N/hf   link to runs/NAME/hf
"""

from __future__ import annotations

import shutil
from pathlib import Path

from thinkrl import __version__
from thinkrl.config import PRESETS, Config, as_dict, readers
from thinkrl.hub import HUB_NAME, upload
from thinkrl.options import shown
from thinkrl.run.folder import FREE_TO_CHANGE, Run


def finish(run: Run, config: Config) -> list[Path]:
    """Move the models of the last checkpoint and write their cards; return their folders. Rank 0 only.

    Without --keep_optimizer, removes the weights and optimizer states for a resume.
    """
    if "after" not in run.summary:  # nothing was evaluated
        # from here on the run is finished: it is not resumed
        run.update_summary(after={"step": config.steps})
    checkpoints, folders = run.folder / "checkpoints", []
    for saved in sorted(path.parent for path in (checkpoints / f"step_{config.steps}").glob("*/config.json")):
        folder = run.folder / saved.name
        if not saved.is_symlink():
            shutil.rmtree(folder, ignore_errors=True)  # from an earlier end of a run that was resumed
            saved.rename(folder)
            saved.symlink_to(Path("..", "..", saved.name))
        (folder / "README.md").write_text(model_card(run, config, folder), encoding="utf-8")
        folders.append(folder)
    if not config.keep_optimizer:
        for state in checkpoints.glob("step_*/dcp"):
            shutil.rmtree(state)
        for name in ("extra.pt", "files.json"):
            for state in checkpoints.glob(f"step_*/{name}"):
                state.unlink()
        for damaged in checkpoints.glob("step_*.damaged"):
            shutil.rmtree(damaged)
    return folders


def push(folders: list[Path], config: Config) -> None:
    """Upload the folders of `finish` to --push_to_hub; two policies get their roles as suffixes."""
    for folder in folders:
        role = folder.name.removeprefix("hf").replace("_", "-") if len(folders) > 1 else ""
        upload(folder, config.push_to_hub + role)


def model_card(run: Run, config: Config, folder: Path) -> str:
    """Write the text of a model's README.md, the hub's model card."""
    start = config[folder.name.removeprefix("hf_")] if folder.name.startswith("hf_") else ""
    start = start or config.model
    front = ["library_name: transformers", f"tags: [thinkrl, {config.preset}]"]
    if HUB_NAME.fullmatch(start) and not Path(start).is_dir():
        front.append(f"base_model: {start.partition('@')[0]}")
    changed = {
        key: value
        for key, value in as_dict(config).items()
        if value != getattr(Config, key)
        and config.preset in readers(key)
        and key not in FREE_TO_CHANGE | {"preset", "model", "data", "eval_data"}
    }
    return (
        "\n\n".join(
            [
                "\n".join(["---", *front, "---"]),
                f"# {run.folder.name}",
                f"Trained with thinkrl {__version__}, preset `{config.preset}`: {PRESETS[config.preset]}.",
                f"- base model: `{start}`\n- data: `{config.data}`\n- steps: {config.steps}",
                *_results(run.summary, config),
                "## Options that differ from the defaults",
                "\n".join(f"- `--{key} {shown(value)}`" for key, value in changed.items()),
            ]
        )
        + "\n"
    )


def _results(summary: dict, config: Config) -> list[str]:
    """Table of accuracy and tokens before and after; or the loss if nothing was evaluated."""
    columns = [when for when in ("before", "after") if "accuracy" in summary.get(when, {})]
    if not columns:
        return (
            [f"Loss of the last step: {summary['after']['loss']:.4f}"] if "loss" in summary["after"] else []
        )
    problems = config.eval_data or f"held-out problems of {config.data}"
    rows = [["", *columns], ["---"] * (len(columns) + 1)]
    for name, part in (("sampled", lambda result: result), ("greedy", lambda result: result["greedy"])):
        results = [part(summary[when]) for when in columns]
        rows.append([f"accuracy, {name}", *(f"{result['accuracy']:.1%}" for result in results)])
        rows.append([f"mean tokens, {name}", *(f"{result['tokens']:.1f}" for result in results)])
    return [
        f"Accuracy and completion length on {problems}, at temperature {config.temperature} and greedily:",
        "\n".join(f"| {' | '.join(row)} |" for row in rows),
    ]

"""The Hugging Face hub (extra [hub]): download models and datasets, upload trained models."""

from __future__ import annotations

import fnmatch
import re
from pathlib import Path

from thinkrl import UserError, require_extra
from thinkrl.tokenizer import FILES

HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+(@[\w./-]+)?")  # owner/name[@revision]
MODEL_FILES = [
    "config.json",
    "model.safetensors",
    "model-*.safetensors",
    "model.safetensors.index.json",
    "sampling.json",
    *FILES,
]
KINDS = (".parquet", ".jsonl", ".json", ".csv", ".tsv")  # in order of preference
SPLITS = ("train", "test", "validation", "valid", "val", "dev")


def fetch_model(name: str, option: str = "--model") -> Path:
    """Download owner/name[@revision] (config, tokenizer, safetensors) or find it in the cache; return its
    folder.

    Every rank may call it: on one machine the others wait for the rank that downloads. Raises UserError.
    """
    require_extra("huggingface_hub", "hub", f"{option} {name}: no such folder, and to fetch it from the hub")
    import huggingface_hub

    repository, _, revision = name.partition("@")
    try:
        return Path(
            huggingface_hub.snapshot_download(
                repository, revision=revision or None, allow_patterns=MODEL_FILES
            )
        )
    except Exception as error:  # of many kinds, by transport and version: not found, no access, no network
        raise UserError(
            f"{option} {name}: no such folder, and it cannot be fetched from the hub ({reason(error)})"
        ) from None


def require_upload(name: str) -> None:
    """Create owner/name on the hub if it is missing. Raises UserError, so a missing login is noticed before
    training.
    """
    if not HUB_NAME.fullmatch(name) or "@" in name:
        raise UserError(f"--push_to_hub is '{name}': it must be owner/name")
    require_extra("huggingface_hub", "hub", f"--push_to_hub {name}")
    import huggingface_hub

    try:
        huggingface_hub.create_repo(name, exist_ok=True)
    except Exception as error:
        raise UserError(
            f"--push_to_hub {name}: cannot be created or written; log in with `hf auth login` "
            f"({reason(error)})"
        ) from None


def upload(folder: Path, name: str) -> None:
    """Upload a model's folder to owner/name. Raises UserError, with the command that uploads it by hand."""
    import huggingface_hub

    try:
        huggingface_hub.create_repo(name, exist_ok=True)
        huggingface_hub.upload_folder(repo_id=name, folder_path=folder, commit_message="Trained with thinkrl")
    except Exception as error:
        raise UserError(
            f"the run is complete, but {folder} could not be uploaded ({reason(error)}): `hf upload {name} "
            f"{folder}`"
        ) from None


def reason(error: Exception) -> str:
    """Type of an error and the first line of its text."""
    return f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0]}"


def fetch_dataset(spec: str) -> list[Path]:
    """Download the files of hub:owner/name[:config][:split] and return their paths. Raises UserError."""
    require_extra("huggingface_hub", "hub", spec)
    import huggingface_hub
    from huggingface_hub.errors import EntryNotFoundError

    name, *wanted = spec.removeprefix("hub:").split(":")
    try:
        files = huggingface_hub.list_repo_files(name, repo_type="dataset")
        try:
            card = huggingface_hub.DatasetCard.load(name).data.to_dict()
        except EntryNotFoundError:
            card = {}
        return [
            Path(huggingface_hub.hf_hub_download(name, file, repo_type="dataset"))
            for file in choose_files(files, card.get("configs") or [], wanted, spec)
        ]
    except UserError:
        raise
    except Exception as error:  # of many kinds, by transport and version: not found, no access, no network
        raise UserError(f"{spec}: cannot be fetched ({reason(error)})") from None


def choose_files(files: list[str], configs: list[dict], wanted: list[str], spec: str) -> list[str]:
    """Choose the files of a dataset's [config][, split], given as `wanted`. Raises UserError, naming the
    choices.

    files: all in the repository. configs: those of its card's YAML. Without them a folder is a configuration,
    and a file's name begins with its split, unless the folder has only one. The default configuration is the
    card's, or "default", or "main", or the only one that has the split.
    """
    table = _splits_of_card(files, configs) if configs else _splits_of_names(files)
    if not table:
        raise UserError(f"{spec}: none of its files can be read: {', '.join(files)}")
    if len(wanted) > 2:
        raise UserError(f"{spec}: write hub:owner/name[:config][:split]")
    config, split = wanted if len(wanted) == 2 else ("", *wanted) if wanted else ("", "")
    if len(wanted) == 1 and split in table:
        config, split = split, ""
    if not config:
        defaults = [c["config_name"] for c in configs if c.get("default")] + ["default", "main"]
        having = [c for c, splits in table.items() if (split or "train") in splits]
        single = [options[0] for options in (list(table), having) if len(options) == 1]
        config = next((c for c in defaults + single if c in table), "")
    if config not in table:
        raise UserError(f"{spec}: name one of its configurations, hub:owner/name:CONFIG: {', '.join(table)}")
    splits = table[config]
    split = split or ("train" if "train" in splits or len(splits) > 1 else next(iter(splits)))
    if split not in splits:
        raise UserError(f"{spec}: {config!r} has no split {split!r}, but {', '.join(splits)}")
    kind = next(kind for kind in KINDS if any(_kind(file) == kind for file in splits[split]))
    return sorted(file for file in splits[split] if _kind(file) == kind)


def _kind(file: str) -> str:
    """File type, such as ".jsonl" for "a/b.jsonl.gz"; "" if the file has no rows."""
    name = file.rpartition("/")[2]
    kind = Path(name.removesuffix(".gz")).suffix
    return kind if kind in KINDS and not name.startswith(("dataset_info", ".")) else ""


def _splits_of_card(files: list[str], configs: list[dict]) -> dict[str, dict[str, list[str]]]:
    """Map {configuration: {split: files}} from a card's patterns, which may be per split."""
    table: dict[str, dict[str, list[str]]] = {}
    for config in configs:
        entries = config.get("data_files") or []
        for entry in [entries] if isinstance(entries, (str, dict)) else entries:
            split, patterns = (entry["split"], entry["path"]) if isinstance(entry, dict) else ("train", entry)
            patterns = [patterns] if isinstance(patterns, str) else patterns
            fitting = [f for f in files if _kind(f) and any(fnmatch.fnmatch(f, p) for p in patterns)]
            if fitting:
                table.setdefault(config["config_name"], {}).setdefault(split, []).extend(fitting)
    return table


def _splits_of_names(files: list[str]) -> dict[str, dict[str, list[str]]]:
    """Map {configuration: {split: files}} from the names of files and folders."""
    table: dict[str, dict[str, list[str]]] = {}
    for file in filter(_kind, files):
        folder, _, name = file.rpartition("/")
        if folder.rpartition("/")[2] in SPLITS:  # config/train/0000.parquet
            folder, _, split = folder.rpartition("/")
        else:
            stem = name.split(".")[0]
            split = re.split(r"[-_]", stem)[0]
            split = split if split in SPLITS else re.sub(r"-\d{5}-of-\d{5}", "", stem)
        table.setdefault("default" if folder in ("", "data") else folder, {}).setdefault(split, []).append(
            file
        )
    for splits in table.values():
        if not set(splits) & set(SPLITS):  # no split in the names: all files are for training
            splits["train"] = [file for part in splits.values() for file in part]
    return table

"""Models of the Hugging Face hub (extra [hub]): fetched to be trained, and uploaded when they are."""

from __future__ import annotations

from pathlib import Path

from thinkrl import UserError, require_extra
from thinkrl.tokenizer import FILES

MODEL_FILES = [
    "config.json",
    "model.safetensors",
    "model-*.safetensors",
    "model.safetensors.index.json",
    *FILES,
]


def fetch_model(name: str, option: str = "--model") -> Path:
    """The folder of owner/name[@revision]: config, tokenizer and safetensors, downloaded or from the cache.

    Every rank may call it: on one machine they wait for the one that downloads. Raises UserError.
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


def reason(error: Exception) -> str:
    """The kind of an error and the first line of its text."""
    return f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0]}"

"""Files with the rows of a step that was not finite, so that it can be computed again.

runs/NAME/nonfinite/step_N/   packs.safetensors, batch.json: the packs of all ranks, and what was not finite
                              policy/: the weights that they were computed with, float32

python -m thinkrl.tools.again runs/NAME/nonfinite/step_N        the same step, on one process
packs = read_packs("runs/NAME/nonfinite/step_N")                the rows, to look at
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from safetensors.torch import load_file, save_file
from torch import Tensor

from thinkrl.run.files import read_json, write_json
from thinkrl.types import Pack


def write_packs(folder: Path, packs: Sequence[Pack], reason: str) -> None:
    """Write packs.safetensors, with tensors I/FIELD of pack I, and batch.json, with the other fields."""
    fields = [vars(p.to("cpu")) for p in packs]
    tensors = {
        f"{i}/{k}": v.contiguous()
        for i, p in enumerate(fields)
        for k, v in p.items()
        if isinstance(v, Tensor)
    }
    save_file(tensors, folder / "packs.safetensors")
    rest = [{k: v for k, v in p.items() if not isinstance(v, Tensor)} for p in fields]
    write_json(folder / "batch.json", {"reason": reason, "packs": rest})


def read_packs(folder: str | Path) -> list[Pack]:
    """Read the files of `write_packs`, bit for bit. Raises UserError if there are none."""
    rest = read_json(Path(folder) / "batch.json")["packs"]
    tensors = load_file(Path(folder) / "packs.safetensors")
    for key, tensor in tensors.items():
        i, field = key.split("/")
        rest[int(i)][field] = tensor
    return [Pack(**fields) for fields in rest]

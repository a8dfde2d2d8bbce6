"""The table of `make bench-gpu`, at sizes that measure nothing, on the device that is here."""

import builtins

import pytest
import torch

from helpers import python
from thinkrl.model import Transformer
from thinkrl.tools import bench_gpu
from thinkrl.tools.bench_gpu import PARTS, main, parse, products, tiny_size

pytestmark = pytest.mark.gpu
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def table(capsys, monkeypatch, *argv: str) -> list[list[str]]:
    monkeypatch.setattr(bench_gpu, "ceilings", lambda device: (1e12, 1e10))
    monkeypatch.setattr(bench_gpu, "milliseconds", lambda run, device: [1.0 for _ in [run()]])
    main(parse(["--size", "tiny", "--device", DEVICE, "--repeat", "1", *argv]))
    lines = capsys.readouterr().out.splitlines()
    assert "1 TFLOP/s in a large product, 10 GB/s in a large copy" in lines[1]
    return [
        [cell.strip() for cell in line.strip("|").split("|")] for line in lines[5:] if line.startswith("|")
    ]


@pytest.mark.slow
@pytest.mark.parametrize(
    "part, rows",
    [
        ("kernels", 14),
        ("workload", 1),
        ("training", 3 + (DEVICE == "cuda")),
        ("sync", 1),
        ("l2t", 6),
        ("pool", 3),
    ],
)
def test_every_part_runs(part, rows, capsys, monkeypatch, world):
    found = table(capsys, monkeypatch, "--parts", part)
    assert len(found) == rows and not any("out of memory" in row[-1] for row in found)
    assert all(row[1].endswith(" ms") for row in found if part not in ("l2t", "pool"))


@pytest.mark.parametrize("installed", [True, False])
def test_decoding_beside_transformers_or_without(installed, capsys, monkeypatch, world):
    if installed:
        pytest.importorskip("transformers")
    else:
        real = builtins.__import__

        def absent(name, *args, **kwargs):
            assert not name.startswith("transformers")
            return real(name, *args, **kwargs)

        monkeypatch.setattr(builtins, "__import__", absent)
        monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    found = table(capsys, monkeypatch, "--parts", "decode")
    engines = 2 + (DEVICE == "cuda") if installed else 1 + (DEVICE == "cuda")
    assert len(found) == 2 * engines + (not installed)
    assert ("not installed" in found[-1][-1]) == (not installed)


def test_products_are_the_model_s_matrices():
    c = tiny_size().decode["tiny"]
    model = Transformer.empty(c, device="meta")
    # tied: the embedding is the head
    assert products(c) == sum(p.numel() for p in model.parameters() if p.ndim == 2)


@pytest.mark.slow
def test_names_of_parts():
    done = python("-m", "thinkrl.tools.bench_gpu", "--parts", "kernel")
    assert done.returncode == 2 and "did you mean" in done.stderr and ", ".join(PARTS) in done.stderr

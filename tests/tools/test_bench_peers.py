"""The table of `make bench-peers`: with transformers of this environment, and without its peers."""

import json
import sys

import pytest

from helpers import python
from thinkrl.tools import bench_peers
from thinkrl.tools.bench_peers import Line, Peer, environment, last_line, main, parse, row


@pytest.fixture
def folder(tmp_path):
    """Environments: transformers of this one; vllm's is one in which every import fails."""
    for name, command in (
        ("trl", f'exec "{sys.executable}" "$@"'),
        ("vllm", "echo no module named vllm >&2; exit 1"),
    ):
        (tmp_path / name / "bin").mkdir(parents=True)
        (tmp_path / name / "installed").touch()
        script = tmp_path / name / "bin" / "python"
        script.write_text(f"#!/bin/sh\n{command}\n")
        script.chmod(0o755)
    return tmp_path


@pytest.mark.slow
def test_the_sampler_beside_its_peers(folder, capsys, world):
    pytest.importorskip("transformers")
    main(parse(["--folder", str(folder), "--cases", "1.3M fp32", "--repeat", "1", "--tokens", "4"]))
    heads, dashes, measured = capsys.readouterr().out.splitlines()[1:]
    what, theirs, vllm, ours, products = [cell.strip() for cell in measured.strip("|").split("|")]
    assert what == "sampler 1.3M fp32, tokens per second"
    assert heads.count("|") == dashes.count("|") == measured.count("|")
    assert theirs.startswith("transformers 5") and theirs.endswith("(1.00)")
    assert vllm == "not run: no module named vllm"
    assert all(float(cell.split()[0].replace(",", "")) > 0 for cell in (ours, products))


@pytest.mark.slow
def test_the_step_without_trl(tmp_path, capsys, world):
    main(
        parse(
            [
                "--folder",
                str(tmp_path),
                "--install",
                "false",
                "--cases",
                "GRPO step",
                "--repeat",
                "1",
                "--tokens",
                "4",
            ]
        )
    )
    measured = capsys.readouterr().out.splitlines()[-1]
    assert measured.startswith(
        "| GRPO step, embedded model, 128 × 4 tokens, steps per second | not installed: --install false | – |"
    )
    ours, products = measured.split("|")[-3:-1]
    assert ours.endswith("(1.00) ") and float(products.split()[0].replace(",", "")) > 0


@pytest.mark.slow
def test_an_environment_that_cannot_be_made(tmp_path, monkeypatch):
    monkeypatch.setattr(bench_peers, "ENVIRONMENTS", {"vllm": [str(tmp_path / "no-such-package")]})
    python_path, error = environment("vllm", tmp_path, install=True)
    assert error.startswith("not installed: ") and "no-such-package" in error
    assert environment("vllm", tmp_path, install=False)[1] == "not installed: --install false"


def test_ratios_are_to_the_first_that_ran():
    peers = {"transformers": Peer(version="5"), "vllm": Peer(error="not run: x")}
    assert row(Line("s", peers, {"transformers": 200.0, "thinkrl": 500.0}, 800.0)) == (
        "| s | transformers 5: 200 (1.00) | not run: x | 500 (2.50) | 800 (4.00) |"
    )
    peers["transformers"].error = "not run: y"
    assert row(Line("s", peers, {"thinkrl": 500.0}, 800.0)) == (
        "| s | not run: y | not run: x | 500 (1.00) | 800 (1.60) |"
    )
    assert last_line("a\n\n b \n\n") == "b" and last_line("") == "it said nothing"


@pytest.mark.slow
def test_an_unknown_line():
    done = python("-m", "thinkrl.tools.bench_peers", "--cases", "GRPO stop")
    assert done.returncode == 2 and "GRPO step" in done.stderr and json.dumps(done.stdout) == '""'

"""Imports go downward only. This table is the architecture."""

import ast
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from helpers import ROOT

LAYERS = {
    0: ["kernels"],
    1: ["visible", "tracing", "options", "intervals", "config", "types", "distributed", "run", "launcher"],
    2: [*("model", "checkpoint", "resume", "tokenizer", "hub", "arith", "gym", "grading", "data")],
    3: ["memory", "decode", "sampler", "rollout", "grpo", "length", "rewards"],
    4: ["learner", "evaluate", "update", "session", "finish", "sft", "presets"],
    5: ["l2t", "longshort"],
    6: ["tools"],
    7: ["train", "sample", "chunk", "cli"],
}
# Inside a folder, from the bottom up: a module sees those before it.
INSIDE = {
    "config": ["aliases", "fields", "values", "checks", "help", "resolve"],
    "run": ["files", "parts", "lock", "signals", "watch", "sinks", "metrics", "batch", "folder"],
    "grading": ["notation", "values", "algebra", "rules"],
    "data": ["rows", "layouts", "chats", "problems"],
    "decode": ["pages", "paged_model", "step", "loop"],
    "l2t": ["episodes", "prm", "prm_training", "gain", "budgets", "compression", "credit", "preset", "exits"],
    "longshort": ["conversation", "thoughts", "protocol", "cold_start", "preset"],
    "tools": [
        "docs",
        "formats",
        "reading",
        "figures",
        "rows",
        "sections",
        "report",
        "grading_report",
        "evaluation",
        "paired",
        "differences",
        "again",
        "chat",
        "policies",
        "compare",
        "worked_sums",
        "pipeline",
        "bench",
        "plan",
        "bench_gpu",
        "peer",
        "bench_peers",
    ],
}
# Within a layer, modules do not see each other, but for these.
SIDEWAYS = {
    ("options", "visible"),
    ("options", "launcher"),
    ("distributed", "launcher"),
    ("run", "visible"),
    ("run", "config"),
    ("run", "types"),
    ("run", "distributed"),
    ("config", "options"),
    ("checkpoint", "model"),
    ("resume", "checkpoint"),
    ("hub", "tokenizer"),
    ("grading", "gym"),
    ("data", "hub"),
    ("data", "grading"),
    ("data", "arith"),
    ("data", "gym"),
    ("sampler", "decode"),
    ("rollout", "sampler"),
    ("length", "grpo"),
    ("update", "learner"),
    ("session", "learner"),
    ("session", "update"),
    ("sft", "learner"),
    ("sft", "session"),
    ("sft", "update"),
    ("presets", "learner"),
    ("presets", "evaluate"),
}
LAYER = {module: layer for layer, modules in LAYERS.items() for module in modules}
FILES = {
    path.relative_to(ROOT).with_suffix("").as_posix().removeprefix("thinkrl/").replace("/", "."): path
    for path in [*ROOT.glob("*.py"), *(ROOT / "thinkrl").glob("*.py"), *(ROOT / "thinkrl").glob("*/*.py")]
    if path.stem not in ("setup", "__init__")
}


def imported(path: Path) -> set[str]:
    """Modules of ours that a file imports, anywhere in it: "grpo", "l2t.credit"; all of kernels/ is
    "kernels".
    """
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            members = {f"{node.module}.{alias.name}" for alias in node.names}
            modules = {name for name in members if name.removeprefix("thinkrl.") in FILES}
            names |= modules if modules == members else {node.module, *modules}
        elif isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
    ours = {
        name.removeprefix("thinkrl.")
        for name in names
        if name.split(".")[0] in {"thinkrl", *LAYERS[0], *LAYERS[7]}
    }
    return {"kernels" for name in ours if name.split(".")[0] == "kernels"} | (
        ours & (set(FILES) | set(LAYER))
    )


def allowed(module: str, other: str) -> bool:
    """Whether the table lets one module import another."""
    (home, _, name), (other_home, _, other_name) = module.partition("."), other.partition(".")
    if home == other_home:
        order = INSIDE[home]
        return bool(other_name) and order.index(other_name) < order.index(name)
    return LAYER[other_home] < LAYER[home] or (home, other_home) in SIDEWAYS


def test_every_module_has_its_place():
    flat = {module for module in FILES if "." not in module}
    assert flat == set(LAYER) - {"kernels"} - set(INSIDE)
    for folder, order in INSIDE.items():
        assert {module for module in FILES if module.startswith(f"{folder}.")} == {
            f"{folder}.{x}" for x in order
        }


@pytest.mark.parametrize("module", sorted(FILES))
def test_imports_go_downward(module):
    for other in imported(FILES[module]) - {module}:
        assert allowed(module, other), f"{module} imports {other}"


@pytest.mark.parametrize("path", sorted((ROOT / "kernels").glob("*.py")), ids=lambda path: path.stem)
def test_kernels_know_nothing_of_thinkrl(path):
    assert imported(path) <= {"kernels"}


def test_the_check_sees_an_upward_and_a_sideways_import(tmp_path):
    file = tmp_path / "grpo.py"
    file.write_text("def f():\n    from thinkrl.l2t.credit import token_rewards\n    import train\n")
    assert imported(file) == {"l2t.credit", "train"}
    assert not allowed("grpo", "l2t.credit") and not allowed("l2t.gain", "longshort.conversation")
    assert not allowed("l2t.episodes", "l2t.gain") and allowed("l2t.gain", "l2t.episodes")


# An editable installation would find the removed folder in the repository.
WITHOUT_INSTALLATION = """
import importlib.util, runpy, sys
sys.meta_path[:] = [finder for finder in sys.meta_path if "editable" not in finder.__module__]
sys.path.insert(0, "")
assert importlib.util.find_spec("thinkrl." + sys.argv.pop(1)) is None
runpy.run_path("train.py", run_name="__main__")
"""


@pytest.mark.slow
@pytest.mark.parametrize("folder", ["l2t", "longshort"])
def test_without_a_paper_s_folder_grpo_still_trains(folder, tmp_path):
    def ignore(path: str, names: list[str]) -> list[str]:
        removed = [folder] if Path(path).name == "thinkrl" else []
        return [name for name in names if name in ("__pycache__", *removed)]

    for part in ("kernels", "thinkrl"):
        shutil.copytree(ROOT / part, tmp_path / part, ignore=ignore)
    shutil.copy(ROOT / "train.py", tmp_path)
    options = "--steps 1 --problems_per_step 2 --group_size 2 --max_tokens 20 --eval_problems 2 --name run"
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_INSTALLATION, folder, "grpo", *options.split()],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert (tmp_path / "runs" / "run" / "checkpoints" / "step_1" / "hf" / "model.safetensors").exists()


def test_train_imports_the_report_in_one_function():
    """A run that cannot draw its report has trained all the same."""
    tree = ast.parse((ROOT / "train.py").read_text())
    users = [
        f.name for f in tree.body if isinstance(f, ast.FunctionDef) and "thinkrl.tools" in ast.unparse(f)
    ]
    top = [ast.unparse(node) for node in tree.body if isinstance(node, ast.Import | ast.ImportFrom)]
    assert users == ["write_report"] and not any(
        "thinkrl.tools" in line or "thinkrl.l2t" in line for line in top
    )

"""Imports go downward only. This table is the architecture."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
LAYERS = {
    0: ["kernels"],
    1: ["config", "types", "distributed", "metrics", "runs"],
    2: [
        "model",
        "checkpoint",
        "tokenizer",
        "problems",
        "arith",
        "grading",
        "pages",
        "episodes",
        "conversation",
    ],
    3: ["sampler", "grpo", "sft", "rollout"],
    4: ["l2t", "gain", "compression", "thoughts", "longshort", "prm", "evaluate", "report", "learner"],
    5: ["presets", "bench"],
    6: ["train", "sample", "chunk", "compare", "pipeline"],
}
# Within a layer, modules do not see each other, but for these.
SIDEWAYS = {
    ("metrics", "distributed"),
    ("runs", "config"),
    ("runs", "distributed"),
    ("checkpoint", "model"),
    ("episodes", "grading"),
    ("problems", "grading"),
    ("problems", "arith"),
    ("rollout", "sampler"),
    ("gain", "prm"),
}
LAYER = {module: layer for layer, modules in LAYERS.items() for module in modules}
SOURCES = [*ROOT.glob("*.py"), *(ROOT / "thinkrl").glob("*.py")]
FILES = {path.stem: path for path in SOURCES if path.stem not in ("setup", "__init__")}


def imported(path: Path) -> set[str]:
    """Modules of ours that a file imports, anywhere in it; every file of kernels/ counts as `kernels`."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            names |= (
                {node.module}
                if node.module != "thinkrl"
                else {f"thinkrl.{alias.name}" for alias in node.names}
            )
        elif isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
    roots = {"thinkrl", "kernels", *LAYERS[6]}
    ours = {name.removeprefix("thinkrl.").split(".")[0] for name in names if name.split(".")[0] in roots}
    return ours & (set(LAYER) | {"kernels"})


def test_every_module_has_a_layer():
    assert set(FILES) <= set(LAYER), f"not in the table: {set(FILES) - set(LAYER)}"


@pytest.mark.parametrize("module", sorted(FILES))
def test_imports_go_downward(module):
    for other in imported(FILES[module]) - {module}:
        allowed = LAYER[other] < LAYER[module] or (module, other) in SIDEWAYS
        assert allowed, f"{module} (layer {LAYER[module]}) imports {other} (layer {LAYER[other]})"


@pytest.mark.parametrize("path", sorted((ROOT / "kernels").glob("*.py")), ids=lambda path: path.stem)
def test_kernels_know_nothing_of_thinkrl(path):
    assert imported(path) <= {"kernels"}


def test_the_check_sees_an_upward_import(tmp_path):
    file = tmp_path / "grpo.py"
    file.write_text("def f():\n    from thinkrl.l2t import token_rewards\n    import train\n")
    assert imported(file) == {"l2t", "train"}

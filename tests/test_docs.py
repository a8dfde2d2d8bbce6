"""README and docs name files and functions that exist, and commands that work."""

import ast
import importlib.util
import re
import shlex

import pytest

import sample
from helpers import ROOT, python
from thinkrl import config

PAGES = [
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    ROOT / "BENCHMARKS.md",
    *sorted((ROOT / "docs").glob("*.md")),
]


def defined(path) -> set[str]:
    """Names of functions, classes and methods of a Python file, and what it assigns at the top."""
    tree = ast.parse(path.read_text())
    names = {n.name for n in ast.walk(tree) if isinstance(n, ast.FunctionDef | ast.ClassDef)}
    return names | {
        t.id for n in tree.body if isinstance(n, ast.Assign) for t in n.targets if isinstance(t, ast.Name)
    }


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_files_and_functions_that_are_named_exist(page):
    text = page.read_text()
    for name in re.findall(r"`((?:thinkrl|kernels|tests|docs)/[\w/.-]+\.\w+)", text):
        assert (ROOT / name).exists(), f"{page.name} names {name}"
    for file, name in re.findall(r"`((?:thinkrl|kernels)/[\w/]+\.py)::(\w+)", text):
        assert name in defined(ROOT / file), f"{page.name}: {file} has no {name}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)#]+)", page.read_text()):
        assert target.startswith("https://") or (page.parent / target).exists(), (
            f"{page.name} links to {target}"
        )


PARSERS = {"train.py": config.parse, "sample.py": sample.parse_options}
SMALL = {  # keeps a documented command short
    "train.py": "--steps 1 --problems_per_step 2 --group_size 2 --eval_problems 2 --max_tokens 40",
    "sample.py": "--max_tokens 20",
}
PLACEHOLDER = re.compile(r"\b(DIR|FILE|NAME|TEXT|TASK|PRM|RUN|RUN_A|RUN_B|L0_DIR|S0_DIR|owner/name)\b|…|\[")


def commands(page) -> list[str]:
    """The lines of a page's code blocks that start a program, comments included."""
    blocks = re.findall(r"```\w*\n(.*?)```", page.read_text(), re.DOTALL)
    lines = [line.strip() for block in blocks for line in block.splitlines()]
    return [line for line in lines if re.match(r"(torchrun|python|make) ", line)]


def program(words: list[str]) -> list[str]:
    """What a command line starts: from `train.py` or `-m module` on, without the launcher."""
    start = next(i for i, word in enumerate(words) if word.endswith(".py") or word == "-m")
    return words[start:]


DOCUMENTED = sorted({line for page in PAGES for line in commands(page)})
RUNNABLE = [x for x in DOCUMENTED if x[:4] != "make" and "needs GPUs" not in x and not PLACEHOLDER.search(x)]


@pytest.mark.parametrize("line", DOCUMENTED)
def test_a_documented_command_is_accepted(line):
    """The make target exists, or the program knows the options and allows their values."""
    words = shlex.split(line, comments=True)
    if words[0] == "make":
        assert re.search(rf"^{words[1]}:", (ROOT / "Makefile").read_text(), re.MULTILINE)
        return
    name, *arguments = program(words)
    if name == "-m":
        assert importlib.util.find_spec(arguments[0])
    else:
        assert (ROOT / name).exists()
        if name in PARSERS and "…" not in arguments:
            PARSERS[name](arguments)


@pytest.mark.slow
@pytest.mark.parametrize("line", RUNNABLE)
def test_a_documented_command_runs(line, tmp_path):
    """As documented, but on one process and shortened by SMALL. What needs GPUs says so; placeholders are for
    the reader.
    """
    words = program(shlex.split(line, comments=True))
    runs = ["--runs_dir", str(tmp_path)] if words[0] == "train.py" else []
    done = python(*words, *SMALL.get(words[0], "").split(), *runs, OMP_NUM_THREADS="1")
    assert done.returncode == 0, done.stderr[-2000:]

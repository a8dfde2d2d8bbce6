"""Run folders written by hand, and what a test wants to know of a page made of them."""

import json
from html.parser import HTMLParser
from pathlib import Path

import torch

from thinkrl.config import as_dict, parse
from thinkrl.evaluate import held_out_record
from thinkrl.run.metrics import Log
from thinkrl.tokenizer import Tokenizer
from thinkrl.types import Problem, Trajectory, Turn

TINY = Path(__file__).parent.parent / "thinkrl" / "assets" / "tiny"
PARTS = [
    "<think><episode_1>2+3=5</episode_1>",
    "<episode_2>5*2=10</episode_2>",
    "<episode_3>10 ok</episode_3></think><answer>10</answer>",
]
EPISODES = dict(
    J=[0.25, 0.5, 0.25, 1.0],
    compression=[0.004, 0.002, 0.001],
    penalty=[0.04, 0.02, 0.01],
    process_reward=[0.25, -0.5, 1.0],
    malformed=False,
)
VOID = {"meta", "input"}


class Page(HTMLParser):
    """Elements as (tag, attributes, text), in order; fails where tags do not balance. `data` is what the
    script reads.
    """

    def __init__(self, path: Path):
        super().__init__()
        self.open, self.elements, self.source = [], [], path.read_text(encoding="utf-8")
        self.feed(self.source)
        self.close()
        assert self.open == []
        self.data = json.loads(self.all("script")[0][1])

    def handle_starttag(self, tag, attributes):
        element = [tag, dict(attributes), ""]
        self.elements.append(element)
        if tag not in VOID:
            self.open.append(element)
        if tag in ("td", "th"):
            self.handle_data(" ")

    def handle_startendtag(self, tag, attributes):
        self.elements.append([tag, dict(attributes), ""])

    def handle_endtag(self, tag):
        assert self.open.pop()[0] == tag

    def handle_data(self, data):
        for element in self.open:
            element[2] += data

    def all(self, tag: str, kind: str = "") -> list[tuple[dict, str]]:
        return [
            (a, text)
            for t, a, text in self.elements
            if t == tag and set(kind.split()) <= set((a.get("class") or "").split())
        ]

    def texts(self, tag: str, kind: str = "") -> list[str]:
        """What is written in such elements, white space as a browser shows it."""
        return [" ".join(text.split()) for _, text in self.all(tag, kind)]


def new_run(folder: Path, *options: str, name: str = "run") -> Log:
    """A run that has just begun; its Log writes metrics.jsonl and samples.jsonl."""
    (folder / name).mkdir()
    (folder / name / "config.json").write_text(json.dumps(as_dict(parse(list(options) or ["l2t"]))))
    return Log(folder / name, True, 0, 10)


def with_tokenizer(log: Log, step: int = 10, source: Path = TINY) -> Tokenizer:
    folder = log.folder / "checkpoints" / f"step_{step}" / "hf"
    folder.mkdir(parents=True)
    Tokenizer(source).save(folder)
    return Tokenizer(folder)


def trajectory(
    text: str, answer="10", question="What is (2+3)*2?", roles=("policy",), sample=0
) -> Trajectory:
    """An attempt with one turn per role; turns are separated by "|" in `text`. Right if the answer is 10."""
    tokenizer = Tokenizer(TINY)
    turns = [
        Turn(role, [1], tokenizer.encode(part), [], "stop") for role, part in zip(roles, text.split("|"))
    ]
    for turn in turns:
        turn.logprobs = [-0.5] * len(turn.completion)
    right = float(answer == "10")
    problem = Problem(7, question, "10", level="two steps")
    return Trajectory(problem, sample, turns, text, answer, right, right)


def row(text: str, answer="10", question="What is (2+3)*2?", roles=("policy",), sample=0, **method) -> dict:
    """A row of samples.jsonl as train.py writes it, with the keys that a method adds."""
    t = trajectory(text, answer, question, roles, sample)
    return t.record(torch.full((t.tokens,), 0.5)) | method


def episodes(log: Log, tokenizer: Tokenizer) -> None:
    """Step 1: one completion of three episodes and a token after them."""
    lengths = [len(tokenizer.encode(part)) for part in PARTS]
    ends = [sum(lengths[: k + 1]) for k in range(3)]
    log.samples(1, [row("".join(PARTS) + "5", ends=ends, **EPISODES)])


def result(accuracy: float, tokens: float, step: int = 0, level: float = 0.5) -> dict:
    """An evaluation in summary.json."""
    own = {
        "step": step,
        "completions": 4,
        "accuracy": accuracy,
        "tokens": tokens,
        "by_level": {
            "": {"accuracy": 0.0, "tokens": 0.0},
            "easy": {"completions": 2, "accuracy": level, "tokens": 2 * tokens},
        },
    }
    return own | {"greedy": own | {"accuracy": 1.0, "tokens": 10.0}}


def write_summary(log: Log, **results: dict) -> None:
    (log.folder / "summary.json").write_text(json.dumps(results))


def evaluation(when: str, step: int, verdicts: list[bool], decoding: str = "sampled", text="5") -> list[dict]:
    """Rows of evaluations.jsonl as train.py writes them: one attempt per problem, of 10, 11, 12, … tokens."""
    tokenizer, rows = Tokenizer(TINY), []
    for i, right in enumerate(verdicts):
        t = trajectory("5", "10" if right else None)
        t.problem = Problem(i, f"question {i}", "10", level="easy" if i % 2 else "hard")
        t.turns[0].completion = [5] * (10 + i)
        row = {"step": step, "when": when, "decoding": decoding, **held_out_record(t, tokenizer)}
        row["turns"][0]["text"] = text
        rows.append(row)
    return rows


def write_evaluations(log: Log, *evaluations: list[dict]) -> None:
    with (log.folder / "evaluations.jsonl").open("a") as file:
        file.writelines(json.dumps(row) + "\n" for rows in evaluations for row in rows)


def new_chains(folder: Path, texts=("two", "three", "four"), name: str = "chunk") -> Path:
    """A folder of chunk.py with two chains of three thoughts."""
    (folder / name).mkdir()
    item = {
        "question": "What is (2+3)*2?",
        "answer": "10",
        "thoughts": list(texts),
        "labels": ["long", "short", "long"],
        "lengths": [5, 3, 2],
        "accuracies": [0.25, 0.5, 1.0],
        "importance": [0.1, -0.25, 0.3],
    }
    summary = {"rows": 3, "kept": 2, "thoughts": 3.0, "segments": 2.0}
    for file, content in {
        "config": {"data": "arith"},
        "annotated": [{"id": i, **item} for i in range(2)],
        "summary": summary,
    }.items():
        (folder / name / f"{file}.json").write_text(json.dumps(content))
    return folder / name

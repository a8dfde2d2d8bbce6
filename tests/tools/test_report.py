import json
import runpy
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch

import train
from thinkrl.config import as_dict, parse
from thinkrl.metrics import DEFINITIONS, Log
from thinkrl.tokenizer import Tokenizer
from thinkrl.tools.report import HOVERED, _chart, _smooth, _ticks, write_report
from thinkrl.types import Problem, Trajectory, Turn

ROOT = Path(__file__).parent.parent.parent
TINY = ROOT / "thinkrl" / "assets" / "tiny"
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
VOID = {"meta", "line", "polyline", "circle", "rect"}


class Page(HTMLParser):
    """Elements as (tag, attributes, text), in order; fails where tags do not balance."""

    def __init__(self, path: Path):
        super().__init__()
        self.open, self.elements, self.source = [], [], path.read_text(encoding="utf-8")
        self.feed(self.source)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        element = [tag, dict(attributes), ""]
        self.elements.append(element)
        if tag not in VOID:
            self.open.append(element)

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
            if t == tag and set(kind.split()) <= set(a.get("class", "").split())
        ]

    def texts(self, tag: str, kind: str = "") -> list[str]:
        return [text for _, text in self.all(tag, kind)]


def new_run(folder: Path, *options: str) -> Log:
    config = parse(list(options) or ["l2t"])
    (folder / "run").mkdir()
    (folder / "run" / "config.json").write_text(json.dumps(as_dict(config)))
    return Log(folder / "run", True, 0, 10)


def with_tokenizer(log: Log, step: int = 10, source: Path = TINY) -> Tokenizer:
    folder = log.folder / "checkpoints" / f"step_{step}" / "hf"
    folder.mkdir(parents=True)
    Tokenizer(source).save(folder)
    return Tokenizer(folder)


def sample(
    text: str, sample: int = 0, question="What is (2+3)*2?", answer="10", roles=("policy",), **extra
) -> dict:
    """A row of samples.jsonl as train.py writes it."""
    tokenizer = Tokenizer(TINY)
    turns = [
        Turn(role, [1], tokenizer.encode(part), [], "stop") for role, part in zip(roles, text.split("|"))
    ]
    right = answer == "10"
    t = Trajectory(
        Problem(7, question, "10", level="two steps"),
        sample,
        turns,
        text,
        answer,
        float(right),
        float(right),
        extra,
    )
    return train.describe(t, torch.full((t.tokens,), 0.5))


def summary(accuracy: float, tokens: float, level: float) -> dict:
    own = {
        "completions": 4,
        "accuracy": accuracy,
        "tokens": tokens,
        "by_level": {
            "": {"accuracy": 0.0, "tokens": 0.0},
            "easy": {"completions": 2, "accuracy": level, "tokens": 2 * tokens},
        },
    }
    return own | {"greedy": own | {"accuracy": 1.0, "tokens": 10.0}}


def test_the_page_is_whole_and_asks_for_nothing(tmp_path):
    log = new_run(tmp_path)
    with_tokenizer(log)
    for step in range(1, 4):
        log.step(dict.fromkeys(DEFINITIONS, 0.5) | {"step": step})
        log.samples(step, [sample("".join(PARTS), ends=[1, 2, 3], **EPISODES)])
    (log.folder / "summary.json").write_text(
        json.dumps({"before": summary(0.5, 40, 0.5), "after": summary(0.75, 30, 1.0)})
    )
    path = write_report(log.folder)
    page = Page(path)
    assert path == log.folder / "report.html" and not list(log.folder.glob("*.tmp"))
    assert "://" not in page.source and not {"script", "link", "img", "iframe"} & {
        tag for tag, _, _ in page.elements
    }
    assert not any(
        name.startswith("on") or name in ("src", "href") for _, a, _ in page.elements for name in a
    )
    assert any(
        a.get("content") == "default-src 'none'; style-src 'unsafe-inline'" for a, _ in page.all("meta")
    )
    drawn = page.texts("figcaption")
    assert sorted(drawn) == sorted(words for key, words in DEFINITIONS.items() if key != "step"), (
        "every curve, with its definition"
    )


def test_episodes_are_coloured_by_what_they_were_paid(tmp_path):
    log = new_run(tmp_path)
    tokenizer = with_tokenizer(log)
    lengths = [len(tokenizer.encode(part)) for part in PARTS]
    ends = [sum(lengths[: k + 1]) for k in range(3)]
    log.samples(1, [sample("".join(PARTS) + "5", ends=ends, **EPISODES)])
    page = Page(write_report(log.folder))
    spans = page.all("span", "ep")
    assert [text for _, text in spans] == PARTS
    assert page.texts("pre") == ["".join(PARTS) + "5"], "what follows the last episode is there too"
    # Square roots of 0.25, 0.5 and 1.0 over the largest, 1.0.
    colours = [(a["class"], a["style"]) for a, _ in spans]
    assert colours == [("ep plus", "--w:0.50"), ("ep minus", "--w:0.71"), ("ep plus", "--w:1.00")]
    assert spans[1][0]["data-tip"] == (
        f"episode 2 of 3 · {lengths[1]} tokens\nJ 0.5 → 0.25 · fitting gain −0.25\n"
        "compression 0.002 raw · 0.02 normalised\nprocess reward −0.5 · advantage +0.5"
    )
    assert page.texts("p", "legend")[0].startswith("−1+1")
    assert page.texts("span", "badge") == ["✓ 10"]
    assert f"{ends[-1] + 1} tokens" in page.texts("span", "chip")


def test_without_a_tokenizer_the_text_is_plain(tmp_path):
    log = new_run(tmp_path)
    log.samples(1, [sample("".join(PARTS), ends=[3, 6, 9], **EPISODES)])
    page = Page(write_report(log.folder))
    assert (
        page.texts("pre") == ["".join(PARTS)] and not page.all("span", "ep") and not page.all("p", "legend")
    )


def test_a_character_in_two_tokens_belongs_to_the_later_episode(tmp_path):
    """Byte-level tokens: é is two of them, and the cut goes between."""
    from tokenizers import Tokenizer as Raw
    from tokenizers import decoders, models, pre_tokenizers

    raw = Raw(models.BPE({c: i for i, c in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}, []))
    raw.pre_tokenizer, raw.decoder = (
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        decoders.ByteLevel(),
    )
    source = tmp_path / "bytes"
    source.mkdir()
    raw.save(str(source / "tokenizer.json"))
    log = new_run(tmp_path)
    tokenizer = with_tokenizer(log, source=source)
    row = sample("") | {"ends": [2, 4], "process_reward": [1.0, -1.0]}
    row["turns"][0]["completion"] = tokenizer.encode("aéb")
    log.samples(1, [row])
    assert Page(write_report(log.folder)).texts("span", "ep") == ["a", "éb"]


def test_model_text_is_data(tmp_path):
    log = new_run(tmp_path)
    evil = "</pre><script>alert(\"1\")</script><b onclick='x'>&amp;\x00\x1b"
    log.samples(1, [sample(evil, question=evil, answer=evil, note=evil) | {"text": evil + "\ud800"}])
    page = Page(write_report(log.folder))
    seen = evil.replace("\x00", "␀").replace("\x1b", "␛")
    assert page.texts("pre") == [seen + "?"], "half a surrogate pair cannot be written"
    assert page.texts("span", "badge") == [f"✗ {seen}"] and page.texts("div", "question")[0].startswith(seen)
    assert not page.all("script") and not any("onclick" in a for _, a, _ in page.elements)


def test_first_middle_and_last_step_are_shown(tmp_path):
    log = new_run(tmp_path)
    for step in (1, 2, 3, 7, 20):
        log.samples(step, [sample(f"{step}", i, answer=answer) for i, answer in enumerate(("10", None))])
    page = Page(write_report(log.folder))
    assert page.texts("h3", "step") == ["Step 1", "Step 3", "Step 20"] and page.texts("pre") == [
        "1",
        "1",
        "3",
        "3",
        "20",
        "20",
    ]
    assert page.texts("span", "badge")[:2] == ["✓ 10", "✗ no answer"] and "1 of 2 right" in page.texts(
        "span", "chip"
    )


def test_turns_carry_their_roles(tmp_path):
    log = new_run(tmp_path)
    with_tokenizer(log)
    log.samples(
        1,
        [
            sample(
                "<think>2+3=5</think>|5</rethink>|<answer>10",
                roles=("long", "short", "long"),
                format_reward=1.0,
            )
        ],
    )
    page = Page(write_report(log.folder))
    assert page.texts("pre") == ["<think>2+3=5</think>", "5</rethink>", "<answer>10"]
    assert [a["class"] for a, _ in page.all("div", "turn")] == ["turn long", "turn short", "turn long"]
    assert "format reward 1" in page.texts("span", "chip")


def test_before_and_after_by_level(tmp_path):
    log = new_run(tmp_path)
    (log.folder / "summary.json").write_text(
        json.dumps({"before": summary(0.5, 40, 0.5), "after": summary(0.75, 30, 0.25)})
    )
    page = Page(write_report(log.folder))
    rows = page.texts("tr")
    assert rows[:3] == [
        "sampledaccuracy, %tokens",
        "all50.075.0+25.040.030.0−25.0 %",
        "easy50.025.0−25.080.060.0−25.0 %",
    ]
    assert rows[4] == "all100.0100.0+0.010.010.0+0.0 %"
    assert page.texts("dd") == ["75.0 %", "30.0", "100.0 %", "10.0"]
    verdicts = [a["class"] for a, _ in page.all("span") if a.get("class") in ("good", "bad", "same")]
    assert verdicts[4:9] == ["good", "good", "bad", "good", "same"], (
        "accuracy should rise, tokens should fall"
    )


def test_every_evaluation_stands_on_the_curves(tmp_path):
    log = new_run(tmp_path, "longshort")
    for step in (1, 2):
        log.step({"step": step, "accuracy": 0.5, "tokens": 40.0, "loss": 0.1})
    evaluations = {
        when: {"step": step} | summary(0.5, 40, 0.5) for step, when in enumerate(("before", "L1⊗S0", "after"))
    }
    (log.folder / "summary.json").write_text(json.dumps(evaluations))
    page = Page(write_report(log.folder))
    assert [title for title in page.texts("title") if title.startswith("held-out")] == [
        f"held-out, step {step}: {value}" for value in ("50.0 %", "40.0") for step in (0, 1, 2)
    ]


def test_options_that_differ_and_no_others(tmp_path):
    log = new_run(tmp_path, "grpo", "--model", "some/model", "--lr", "0.5", "--steps", "500")
    page = Page(write_report(log.folder))
    assert page.texts("tr") == ["optionheredefault", 'model"some/model""tiny"', "lr0.51e-06"]


def test_an_unfinished_run_and_one_that_has_just_begun(tmp_path):
    log = new_run(tmp_path, "grpo")
    assert "step 0 of 200" in Page(write_report(log.folder)).texts("p", "eyebrow")[0]
    log.step({"step": 1, "loss": float("nan"), "reward": 0.5})
    log.samples(1, [sample("5")])
    for name in ("metrics", "samples"):
        with (log.folder / f"{name}.jsonl").open("a") as file:
            file.write('{"step": 2, "rew')
    (log.folder / "summary.json").write_text(json.dumps({"before": summary(0.5, 40, 0.5)}))
    page = Page(write_report(log.folder))
    assert "step 1 of 200" in page.texts("p", "eyebrow")[0] and page.texts("h3", "step") == ["Step 1"]
    never = [text for text in page.texts("figcaption") if text.startswith("never finite")]
    assert never == ["never finite: " + DEFINITIONS["loss"]]
    assert "all50.0–40.0–" in page.texts("tr")


def test_an_sft_run(tmp_path):
    log = new_run(tmp_path, "sft", "--data", "rows.jsonl")
    for step in (1, 2):
        log.step({"step": step, "loss": 2.0 / step, "tokens": 3.5, "seconds": 31.0})
    (log.folder / "summary.json").write_text('{"after": {"loss": 1.0}}')
    page = Page(write_report(log.folder))
    assert page.texts("p", "eyebrow") == ["thinkrl · sft · finished"] and page.texts("dd") == ["1", "3.5"]
    assert page.texts("p", "facts")[0].endswith("64 rows a step · 1 min 2 s")
    assert page.texts("h2") == ["Curves", "Options"]


def test_the_newest_checkpoint_has_the_tokenizer(tmp_path):
    log = new_run(tmp_path)
    with_tokenizer(log, 10)
    with_tokenizer(log, 9)
    (log.folder / "checkpoints" / "step_9" / "hf" / "tokenizer.json").write_text("damaged: must not be read")
    (log.folder / "checkpoints" / "step_11.tmp" / "hf").mkdir(parents=True)
    log.samples(1, [sample("5+5", ends=[3], process_reward=[1.0])])
    assert Page(write_report(log.folder)).texts("span", "ep") == ["5+5"]


def test_a_curve_by_hand():
    chart = _chart("loss", [(1, 4.0), (2, 0.0), (3, 2.0)], [(0, 2.0)])
    # 320 x 140, margins 4 left, 40 right, 8 top, 18 bottom: steps 0..3 over 276, values 4..0 over 114.
    assert 'class="raw" points="96.0,8.0 188.0,122.0 280.0,65.0"' in chart
    assert '<circle cx="4.0" cy="65.0" r="3.5"/><title>held-out, step 0: 2</title>' in chart
    assert "<title>step 2: 0</title>" in chart and "<b>2</b>" in chart
    flat = _chart("tokens", [(1, 12.0), (2, 12.0)])
    assert 'class="raw" points="4.0,65.0 280.0,65.0"' in flat, "a constant runs through the middle"
    assert "5.0,65.0" not in _chart("kl", [(1, 0.0)]) and 'points="4.0,65.0"' in _chart("kl", [(1, 0.0)])
    long = _chart("loss", [(i, float(i % 7)) for i in range(10_000)])
    assert long.count("<rect") <= HOVERED


def test_ticks_are_few_and_round():
    assert _ticks(0.0, 1.0) == [0.0, 0.5, 1.0]
    assert _ticks(30.0, 60.0) == [30.0, 40.0, 50.0, 60.0]
    for low, high in ((0.123, 0.124), (-5e-7, 3e-6), (17.0, 9000.0), (99.99, 100.01)):
        ticks = _ticks(low, high)
        assert 2 <= len(ticks) <= 4 and low - 1e-9 <= ticks[0] and ticks[-1] <= high + 1e-9


def test_the_running_mean_is_centred():
    points = [(i, float(i)) for i in range(40)]
    assert _smooth(points)[10:12] == [(10, 10.0), (11, 11.0)] and _smooth(points)[0] == (0, 1.0)
    assert _smooth(points[:19]) == points[:19], "a short run is not smoothed"


def test_from_the_command_line(tmp_path, monkeypatch, capsys):
    log = new_run(tmp_path)
    monkeypatch.delitem(
        sys.modules, "thinkrl.tools.report"
    )  # -m runs a fresh copy, runpy warns about another
    monkeypatch.setattr(sys, "argv", ["report", str(log.folder)])
    runpy.run_module("thinkrl.tools.report", run_name="__main__")
    assert capsys.readouterr().out.strip() == str(log.folder / "report.html")
    for arguments, sentence in (
        ([str(tmp_path)], f"{tmp_path} is not a run folder, it has no config.json"),
        ([], "usage: python -m thinkrl.tools.report runs/NAME"),
    ):
        monkeypatch.setattr(sys, "argv", ["report", *arguments])
        with pytest.raises(SystemExit) as end:
            runpy.run_module("thinkrl.tools.report", run_name="__main__")
        assert end.value.code == 2 and capsys.readouterr().err == f"thinkrl.tools.report: {sentence}\n"

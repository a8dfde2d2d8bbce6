"""The page as a document: what it holds, that it asks for nothing, and that what a run says stays text."""

import base64
import hashlib
import json
import re
import runpy
import sys

import pytest

from helpers import ROOT
from report_runs import (
    Page,
    episodes,
    evaluation,
    new_chains,
    new_run,
    result,
    row,
    with_tokenizer,
    write_evaluations,
    write_summary,
)
from thinkrl import UserError
from thinkrl.run.metrics import DEFINITIONS
from thinkrl.tools.report import LIMIT, step_set, write_report
from thinkrl.tools.sections import group_of

CSS = (ROOT / "thinkrl" / "assets" / "report.css").read_text()


def page_of(*logs, **options) -> Page:
    return Page(write_report(*[log.folder for log in logs], **options))


def whole_run(folder, name="run", *options: str):
    log = new_run(folder, *options, name=name)
    episodes(log, with_tokenizer(log))
    for step in range(1, 4):
        log.step({key: 0.5 + 0.1 * step for key in DEFINITIONS} | {"step": step})
        log.samples(step + 1, [row("5" * step)])
    write_summary(log, before=result(0.5, 40), after=result(0.75, 30, 3))
    write_evaluations(log, evaluation("before", 0, [True, False]), evaluation("after", 3, [True, True]))
    return log


def test_the_page_is_whole_and_asks_for_nothing(tmp_path):
    log = whole_run(tmp_path)
    page = page_of(log)
    assert not list(log.folder.glob("*.tmp"))
    assert re.findall("[a-z]+://[^\"']*", page.source) == ["http://www.w3.org/2000/svg"], (
        "the name of SVG, no address"
    )
    assert not {"link", "img", "iframe", "base", "form"} & {tag for tag, _, _ in page.elements}
    assert all(a["href"].startswith("#") for a, _ in page.all("a"))
    assert not any(
        name.startswith("on") or name in ("src", "style") for _, a, _ in page.elements for name in a
    )
    sections = [a["id"] for a, _ in page.all("section")]
    assert sections == ["results", "curves", "before-after", "completions", "configuration"]
    assert [a["href"] for a, _ in page.all("a")] == [f"#{section}" for section in sections], (
        "a table of contents"
    )
    assert set(page.texts("figcaption")) >= {words for key, words in DEFINITIONS.items() if key != "step"}


def test_the_policy_allows_this_style_sheet_and_this_script_and_nothing_else(tmp_path):
    page = page_of(whole_run(tmp_path))
    (policy,) = [a["content"] for a, _ in page.all("meta") if "http-equiv" in a]
    names = {}
    for kind, text in (("style", page.all("style")[0][1]), ("script", page.all("script")[1][1])):
        names[kind] = "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
    assert policy == (
        f"default-src 'none'; style-src '{names['style']}'; script-src '{names['script']}'; "
        "base-uri 'none'; form-action 'none'"
    )
    assert len(page.all("script")) == 2 and page.all("script")[0][0]["type"] == "application/json"


def test_curves_are_grouped_the_plain_ones_first_and_constants_last(tmp_path):
    log = new_run(tmp_path)
    for step in range(1, 4):
        varying = dict.fromkeys(DEFINITIONS, float(step)) | {"kl": 0.0, "lr": 0.5, "loss": float("nan")}
        log.step(varying | {"step": step})
    page = page_of(log)
    groups = ["Results", "Optimisation", "L2T", "Long⊗Short", "Step reward model", "Time"]
    assert page.texts("summary")[:6] == groups
    assert page.texts("summary")[-2] == "Constant"
    assert page.texts("h4")[:4] == ["reward", "accuracy", "tokens", "truncated"]
    rows = page.texts("tr")
    assert f"loss never finite {DEFINITIONS['loss']}" in rows and f"kl 0 {DEFINITIONS['kl']}" in rows
    assert set(page.data["curves"]) == set(DEFINITIONS) - {"step", "kl", "lr", "loss"}
    assert page.data["curves"]["reward"] == [[[1, 2, 3], [1.0, 2.0, 3.0]]], "the values behind the pointer"


def test_a_metric_s_group_follows_its_definition():
    assert (
        group_of("fitting_gain") == "l2t"
        and group_of("turns") == "longshort"
        and group_of("label_error") == "prm"
    )
    assert (
        group_of("probe_seconds") == "time"
        and group_of("loss") == "optimisation"
        and group_of("unheard_of") == "more"
    )


def test_before_and_after_by_level(tmp_path):
    log = new_run(tmp_path)
    write_summary(log, before=result(0.5, 40), after=result(0.75, 30, 9, level=0.25))
    page = page_of(log)
    rows = page.texts("tr")
    assert rows[:3] == ["sampled accuracy, % tokens", "all 50.0 75.0 +25.0 40.0 30.0 −25.0 %",
                        "easy 50.0 25.0 −25.0 80.0 60.0 −25.0 %"]  # fmt: skip
    assert rows[4] == "all 100.0 100.0 +0.0 10.0 10.0 +0.0 %"
    assert page.texts("dd")[::2] == ["75.0 %", "30.0", "100.0 %", "10.0"]
    verdicts = [a["class"] for a, _ in page.all("span") if a.get("class") in ("good", "bad", "same")]
    assert verdicts[4:9] == ["good", "good", "bad", "good", "same"], "accuracy should rise, tokens fall"


def test_evaluations_are_points_on_the_way(tmp_path):
    log = new_run(tmp_path)
    for step in (1, 2):
        log.step({"step": step, "accuracy": 0.5, "tokens": 40.0 + step, "loss": 0.1})
    write_summary(log, before=result(0.5, 40), step_5=result(0.6, 35, 5), after=result(0.75, 30, 9))
    told = page_of(log).texts("title")
    assert (
        "sampled, step_5: 60.0 % with 35.0 tokens" in told
        and "greedy, after: 100.0 % with 10.0 tokens" in told
    )
    assert [t for t in told if t.startswith("held-out")] == [
        *[f"held-out, step {step}: {value}" for step, value in ((0, "50.0 %"), (5, "60.0 %"), (9, "75.0 %"))],
        *[f"held-out, step {step}: {value}" for step, value in ((0, "40.0"), (5, "35.0"), (9, "30.0"))],
    ]


def test_accuracy_at_budgets_is_drawn_where_the_evaluation_has_it(tmp_path):
    log = new_run(tmp_path)
    before, after = result(0.5, 40), result(0.75, 30, 9)
    write_summary(log, before=before, after=after)
    assert "Accuracy at token budgets" not in page_of(log).texts("h3")
    write_summary(
        log,
        before=before | {"budgets": [[8, 0.0], [16, 0.5]]},
        after=after | {"budgets": [[8, 0.25], [16, 0.75]]},
    )
    page = page_of(log)
    assert "Accuracy at token budgets" in page.texts("h3")
    assert {"before, 16 tokens: 50.0 %", "after, 16 tokens: 75.0 %"} <= set(page.texts("title"))


def test_histograms_of_length_and_reward(tmp_path):
    log = new_run(tmp_path)
    write_evaluations(log, evaluation("before", 0, [True, False]), evaluation("after", 9, [True, True]))
    write_summary(log, before=result(0.5, 40), after=result(0.75, 30, 9))
    for step in range(1, 9):
        log.samples(step, [row("5", answer="10" if step > 4 else None)])
    told = page_of(log).texts("title")
    assert "10 to 10.1 before: 50.0 % after: 50.0 %" in told, "10 and 11 tokens"
    assert any(
        t.startswith("1 to") and t.endswith("first quarter: 0.0 % last quarter: 100.0 %") for t in told
    )


def test_rounds_of_longshort(tmp_path):
    log = new_run(tmp_path, "longshort", "--rounds", "LS", "--steps_per_round", "2")
    talk = {
        "turns": {"min": 1, "mean": 1.5, "max": 3},
        "long_tokens": 10.0,
        "short_tokens": 30.0,
        "ended": {"answered": 0.9},
    }
    names = {"before": (0.5, 0), "L1⊗S0": (0.6, 2), "after": (0.75, 4)}
    write_summary(log, **{name: result(a, 40, step) | talk for name, (a, step) in names.items()})
    rows = page_of(log).texts("tr")
    assert "before 50.0 % 40.0 10.0 30.0 1 / 1.5 / 3 90.0 % +0 100.0 % 10.0" in rows
    assert "L1⊗S0 long 60.0 % 40.0 10.0 30.0 1 / 1.5 / 3 90.0 % +0.6 100.0 % 10.0" in rows, "0 + 3·0.2"
    assert any(text.startswith("after short 75.0 %") for text in rows)


def test_several_runs_side_by_side(tmp_path):
    logs = [whole_run(tmp_path, "a"), whole_run(tmp_path, "b", "l2t", "--lr", "0.5")]
    page = page_of(*logs)
    assert write_report(*[log.folder for log in logs]) == tmp_path / "report.html" and page.data["runs"] == [
        "a",
        "b",
    ]
    assert "a 50.0 75.0 +25.0 40.0 30.0 −25.0 % +1.75 3 2 s" in page.texts("tr"), "AES: .25 + 3·.5"
    assert [text for _, text in page.all("h1")] == ["2 runs"] and len(page.texts("label", "run")) == 2
    assert {"a, after: 75.0 % with 30.0 tokens", "b, after: 75.0 % with 30.0 tokens"} <= set(
        page.texts("title")
    )
    assert [len(lines) for lines in page.data["curves"].values()] == [2] * len(page.data["curves"])
    assert {group["run"] for group in page.data["training"]} == {0, 1}
    assert page.data["columns"] == ["a, before", "a, after", "b, after"]
    assert [text.split()[:4] for text in page.texts("tr", "differ")] == [["lr", "0.0002", "0.5", "1e-06"]]


def test_chains_of_chunk(tmp_path):
    page = Page(write_report(new_chains(tmp_path)))
    assert [a["id"] for a, _ in page.all("section")] == ["chains"] and len(page.data["chains"]) == 2
    assert (
        "thought 2: importance −0.25" in page.texts("title")
        and "2 of 3 rows kept" in page.texts("p", "facts")[0]
    )


def test_a_tag_in_a_model_s_text_is_text(tmp_path):
    log = new_run(tmp_path)
    evil = "</pre></script><script>alert(\"1\")</script><b onclick='x'>&amp;<!--\x00\x1b"
    log.samples(1, [row("5", question=evil, answer=evil, note=evil, level=evil) | {"text": evil + "\ud800"}])
    write_evaluations(log, evaluation("before", 0, [True], text=evil))
    write_summary(log, before=result(0.5, 40) | {"by_level": {evil: {"accuracy": 0.5, "tokens": 1.0}}})
    page = page_of(log)
    seen = evil.replace("\x00", "␀").replace("\x1b", "␛")
    group = page.data["training"][0]
    assert group["q"] == group["rows"][0]["answer"] == group["rows"][0]["notes"]["note"] == seen
    assert page.data["held_out"][0]["cells"][0]["turns"][0]["pieces"] == [seen]
    assert any(text.startswith(seen) for text in page.texts("tr")), "a level's name"
    assert len(page.all("script")) == 2 and not any("onclick" in a for _, a, _ in page.elements)


@pytest.mark.slow
def test_a_page_is_never_larger_than_its_limit(tmp_path):
    log = new_run(tmp_path)
    with_tokenizer(log)
    rows = [row("<think>5*2=10</think>" * 500, sample=i) for i in range(4)]
    for step in range(1, 121):
        log.samples(step, rows)
    write_evaluations(log, evaluation("before", 0, [True] * 300, text="5*2=10 " * 2000))
    path = write_report(log.folder)
    page = Page(path)
    assert 0.8 * LIMIT < path.stat().st_size <= LIMIT < 5_000_000
    shown = [group["step"] for group in page.data["training"]]
    assert shown[0] == 1 and shown[-1] == 120 and len(shown) < 120
    about = " ".join(page.texts("p", "about"))
    assert (
        f"{len(shown)} of 120 logged steps are on this page" in about and "of 300 fit on this page" in about
    )
    chosen = Page(write_report(log.folder, steps={7, 8}))
    assert [group["step"] for group in chosen.data["training"]] == [7, 8]


@pytest.mark.slow
def test_many_runs_fit_and_more_are_refused(tmp_path):
    values = {key: 0.123456 for key in DEFINITIONS}
    lines = [
        json.dumps({key: v * (1 + step % 7) for key, v in values.items()} | {"step": step})
        for step in range(1, 501)
    ]
    for i in range(64):
        log = new_run(tmp_path, name=f"{i:02}")
        (log.folder / "metrics.jsonl").write_text("".join(line + "\n" for line in lines))
    assert write_report(tmp_path).stat().st_size < 5_000_000
    new_run(tmp_path, name="one_more")
    with pytest.raises(UserError, match="65 runs are too many for one page"):
        write_report(tmp_path)


def test_options_that_differ_versions_and_command_line(tmp_path):
    log = new_run(tmp_path, "grpo", "--model", "some/model", "--lr", "0.5", "--steps", "500")
    launch = {
        "started": "2026-01-01 10:00",
        "step": 0,
        "command": "train.py grpo --lr 0.5",
        "hardware": "2 CPU cores",
        "versions": {"torch": "2.13.0"},
    }
    (log.folder / "environment.json").write_text(json.dumps([launch, launch | {"step": 100}]))
    page = page_of(log)
    changed = page.texts("tr")[:3]
    assert changed[0] == "option here default meaning" and changed[1].startswith('model "some/model" "tiny"')
    assert changed[2].startswith("lr 0.5 1e-06")
    assert page.texts("dd")[:3] == ["train.py grpo --lr 0.5", "2 CPU cores", "torch 2.13.0"]
    assert page.texts("dt")[-1].endswith("from step 100")


def test_an_unfinished_run_and_one_that_has_just_begun(tmp_path):
    log = new_run(tmp_path, "grpo")
    page = page_of(log)
    assert "step 0 of 200" in page.texts("p", "eyebrow")[0] and "reload every" in page.texts("p", "live")[0]
    log.step({"step": 1, "loss": float("nan"), "reward": 0.5})
    write_summary(log, before=result(0.5, 40))
    page = page_of(log)
    assert "step 1 of 200" in page.texts("p", "eyebrow")[0] and "all 50.0 – 40.0 –" in page.texts("tr")


def test_an_sft_run(tmp_path):
    log = new_run(tmp_path, "sft", "--data", "rows.jsonl")
    for step in (1, 2):
        log.step({"step": step, "loss": 2.0 / step, "tokens": 3.5, "seconds": 31.0})
    write_summary(log, after={"loss": 1.0})
    page = page_of(log)
    assert page.texts("p", "eyebrow") == ["thinkrl · sft · finished"] and page.texts("dd")[::2] == [
        "1",
        "3.5",
    ]
    assert page.texts("p", "facts")[0].endswith("64 rows a step · 1 min 2 s")
    assert page.texts("h2") == ["Results", "Curves", "Configuration"]


def test_steps_on_the_command_line():
    assert step_set("") is None and step_set("1,100-102") == {1, 100, 101, 102}
    for wrong in ("a", "3-", "-3", "1,,2"):
        with pytest.raises(UserError, match="is neither a step nor a range such as 100-120"):
            step_set(wrong)


def test_from_the_command_line(tmp_path, monkeypatch, capsys):
    log = new_run(tmp_path)
    log.samples(1, [row("5")])
    log.samples(2, [row("5")])

    def run(*arguments: str) -> None:
        monkeypatch.delitem(sys.modules, "thinkrl.tools.report", raising=False)  # -m runs a fresh copy
        monkeypatch.setattr(sys, "argv", ["report", *arguments])
        runpy.run_module("thinkrl.tools.report", run_name="__main__")

    run(str(log.folder))
    assert capsys.readouterr().out.strip() == str(log.folder / "report.html")
    run(str(log.folder), "--steps", "2", "--out", str(tmp_path / "two.html"))
    assert [group["step"] for group in Page(tmp_path / "two.html").data["training"]] == [2]
    for arguments, sentence in (
        ([str(tmp_path / "no")], f"{tmp_path / 'no'} is not a run folder"),
        ([], "which runs? usage: python -m thinkrl.tools.report RUN [RUN …]"),
        ([str(log.folder), "--step", "2"], "--step"),
    ):
        with pytest.raises(SystemExit) as end:
            run(*arguments)
        assert end.value.code == 2 and sentence in capsys.readouterr().err


def themes() -> list[dict[str, str]]:
    """The style sheet's colours, light and dark, by name."""
    found: list[dict[str, str]] = []
    for block in re.findall(r":root \{([^}]*)\}", CSS):
        found.append(
            (found[0] if found else {}) | dict(re.findall(r"--([\w-]+):\s*([^;]+?)\s*(?:;|$)", block))
        )
    return found


def rgb(value: str) -> list[float]:
    return (
        [int(value[i : i + 2], 16) for i in (1, 3, 5)]
        if value[0] == "#"
        else [float(x) for x in value.split()]
    )


def contrast(a: list[float], b: list[float]) -> float:
    """WCAG 2.2: (lighter + 0.05) / (darker + 0.05) of relative luminances."""

    def luminance(colour: list[float]) -> float:
        linear = [c / 255 / 12.92 if c <= 10.31475 else ((c / 255 + 0.055) / 1.055) ** 2.4 for c in colour]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    dark, light = sorted((luminance(a), luminance(b)))
    return (light + 0.05) / (dark + 0.05)


def test_the_contrast_of_black_on_white_is_21():
    assert (
        round(contrast(rgb("#000000"), rgb("#ffffff")), 6) == 21
        and contrast(rgb("#777777"), rgb("#777777")) == 1
    )
    assert round(contrast(rgb("#767676"), rgb("#ffffff")), 2) == 4.54, (
        "the darkest grey's neighbour that passes AA"
    )


@pytest.mark.parametrize("theme", themes(), ids=["light", "dark"])
def test_contrast_is_wcag_aa(theme):
    texts = ["ink", "soft", "accent", "good", "bad", "long", "short", *(f"run-{i}" for i in range(8))]
    assert {"paper", "card", *texts} <= theme.keys() and len(themes()) == 2
    for under in ("paper", "card"):
        for name in texts:
            assert contrast(rgb(theme[name]), rgb(theme[under])) >= 4.5, f"{name} on {under}"
    for tint in ("plus", "minus"):  # behind an episode at full strength
        alpha = float(theme["tint"])
        behind = [alpha * a + (1 - alpha) * b for a, b in zip(rgb(theme[tint]), rgb(theme["card"]))]
        for name in ("ink", "tag"):
            assert contrast(rgb(theme[name]), behind) >= 4.5, f"{name} on {tint}"
        assert contrast(rgb(theme[tint]), rgb(theme["paper"])) >= 3, "a bar of a figure"

"""The page in a headless Chromium: policy, script, keyboard, widths. Skipped without a browser."""

import json

import pytest

from chromium import BROWSER, DRIVER, Chromium
from report_runs import (
    EPISODES,
    PARTS,
    evaluation,
    new_chains,
    new_run,
    result,
    row,
    with_tokenizer,
    write_evaluations,
    write_summary,
)
from thinkrl.tools.report import write_report

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        not (BROWSER and DRIVER),
        reason="Chromium and chromedriver are not installed; `apt install chromium-driver`",
    ),
]
EVIL = (
    "</pre></script><script>document.title='owned'</script><img src=x onerror=\"document.title='owned'\">"
    "<style>body{display:none}</style><svg onload=\"document.title='owned'\"></svg>{{7*7}}&lt;b&gt;\u202egnp"
)
SHOWN = EVIL.replace("\u202e", "⟨U+202E⟩")


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    with Chromium(tmp_path_factory.mktemp("profile")) as browser:
        yield browser


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    """Six steps of two attempts each, one of them right; three held-out problems."""
    log = new_run(tmp_path_factory.mktemp("runs"))
    tokenizer = with_tokenizer(log)
    lengths = [len(tokenizer.encode(part)) for part in PARTS]
    ends = [sum(lengths[: k + 1]) for k in range(3)]
    for step in range(1, 7):
        log.step({"step": step, "reward": step / 8, "accuracy": 0.5, "tokens": 10.0 * step})
        right = row("".join(PARTS), ends=ends, **EPISODES)
        log.samples(step, [right, row("5" * step, sample=1, answer=None)])
    write_summary(log, before=result(0.5, 40), after=result(0.75, 30, 6))
    write_evaluations(
        log, evaluation("before", 0, [True, False, False]), evaluation("after", 6, [True, True, False])
    )
    return write_report(log.folder)


def text(browser, selector: str) -> str:
    return browser.run("return document.querySelector(arguments[0]).textContent", selector)


def status(browser, section: str) -> str:
    return text(browser, f"#{section} [role=status]")


def choose(browser, section: str, label: str, option: str) -> None:
    browser.run(
        """const labels = [...document.querySelectorAll(`#${arguments[0]} label`)];
        const label = labels.find(each => each.firstChild.textContent.trim() === arguments[1]);
        const select = label.querySelector("select");
        select.value = [...select.options].find(o => o.textContent === arguments[2]).value;
        select.dispatchEvent(new Event("change"));""",
        section,
        label,
        option,
    )


def test_the_script_runs_under_the_policy_without_a_complaint(browser, page):
    browser.console()
    browser.look()
    browser.open(page)
    assert browser.console() == [] and status(browser, "completions") == "1 of 12"
    assert browser.run("return performance.getEntriesByType('resource').length") == 0, "no request"


def test_nothing_else_runs_under_the_policy(browser, page):
    browser.open(page)
    browser.run("""const script = document.createElement("script"); script.textContent = "document.title = 'owned'";
        document.body.append(script);
        document.body.insertAdjacentHTML("beforeend", "<img src=x onerror=\\"document.title='owned'\\">");""")
    assert browser.run("return document.title") == "run · thinkrl"
    assert sum("Content Security Policy" in message for message in browser.console()) >= 2


def test_model_text_stays_text(browser, tmp_path):
    log = new_run(tmp_path)
    config = log.folder / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"model": str(tmp_path / "gone")}))
    log.samples(
        1, [row("5", question=EVIL, answer=EVIL, note=EVIL) | {"text": EVIL, "gold": EVIL, "level": EVIL}]
    )
    rows = evaluation("before", 0, [True], text=EVIL)
    write_evaluations(
        log, [{**r, "question": EVIL, "gold": EVIL, "answer": EVIL, "level": EVIL} for r in rows]
    )
    write_summary(log, before=result(0.5, 40) | {"by_level": {EVIL: {"accuracy": 0.5, "tokens": 1.0}}})
    new_chains(tmp_path, texts=(EVIL, "a", "b"))
    browser.console()
    browser.open(write_report(tmp_path))
    assert browser.run("return document.title") == "2 runs · thinkrl" and browser.console() == []
    assert (
        browser.run("return document.querySelectorAll('img, main style, main script, [onload]').length") == 0
    )
    for section in ("before-after", "completions", "chains"):
        assert SHOWN in text(browser, f"#{section} pre"), section
        isolated = "return getComputedStyle(document.querySelector(arguments[0])).unicodeBidi"
        assert browser.run(isolated, f"#{section} pre bdi") == "isolate", section
    for part in ("question", "verdict", "chips b"):
        assert SHOWN in text(browser, f"#completions .{part}"), part
    assert browser.run("return document.body.getBoundingClientRect().height") > 500


def test_next_and_previous_by_keyboard(browser, page):
    browser.open(page)
    browser.run("document.getElementById('completions').scrollIntoView()")
    for key, seen in (
        ("right", "2 of 12"),
        ("j", "3 of 12"),
        ("left", "2 of 12"),
        ("k", "1 of 12"),
        ("k", "1 of 12"),
    ):
        browser.press(key)
        assert status(browser, "completions") == seen
    browser.run("document.getElementById('before-after').scrollIntoView()")
    browser.press("right")
    assert status(browser, "before-after") == "2 of 3" and status(browser, "completions") == "1 of 12"
    browser.run("document.querySelector('#completions select').focus()")
    browser.press("right")
    assert status(browser, "before-after") == "2 of 3", "a key in a field belongs to the field"


def test_everything_can_be_reached_by_tab(browser, page):
    browser.open(page)
    names = []
    for _ in range(60):
        browser.press("tab")
        names.append(
            browser.run(
                "const e = document.activeElement; return e.tagName + ' ' + (e.textContent || e.name || e.id).slice(0, 12)"
            )
        )
    assert {"A Results", "A Curves", "INPUT at", "BUTTON next →"} <= set(names)
    outline = browser.run(
        "document.querySelector('nav a').focus(); return getComputedStyle(document.activeElement).outlineStyle"
    )
    assert outline != "none"


def test_filters(browser, page):
    browser.open(page)
    choose(browser, "completions", "verdict", "wrong")
    assert status(browser, "completions") == "1 of 6 chosen, 12 in all" and "✗" in text(
        browser, "#completions .verdict"
    )
    browser.run(
        """const field = document.querySelector("#completions [aria-label='step, least']");
        field.value = 5; field.dispatchEvent(new Event("input"));"""
    )
    assert status(browser, "completions") == "1 of 2 chosen, 12 in all" and "step 5" in text(
        browser, "#completions .browser"
    )
    browser.run(
        """const field = document.querySelector("#completions [aria-label='tokens, most']");
        field.value = 5; field.dispatchEvent(new Event("input"));"""
    )
    assert status(browser, "completions") == "1 of 1 chosen, 12 in all"
    address = browser.run("return location.hash")
    browser.open(page, address)
    assert status(browser, "completions") == "1 of 1 chosen, 12 in all", "the address keeps what is chosen"
    choose(browser, "before-after", "before", "wrong")
    choose(browser, "before-after", "after", "right")
    assert status(browser, "before-after") == "1 of 1 chosen, 3 in all"
    assert "question 1" in text(browser, "#before-after .question")


def test_a_completion_has_its_episodes_its_figure_and_its_tip(browser, page):
    browser.open(page)
    assert (
        browser.run("return [...document.querySelectorAll('#completions .ep')].map(e => e.textContent)")
        == PARTS
    )
    colours = browser.run(
        "return [...document.querySelectorAll('#completions .ep')].map(e => [e.className, e.style.getPropertyValue('--w')])"
    )
    assert colours == [["ep plus", "0.50"], ["ep minus", "0.71"], ["ep plus", "1.00"]], (
        "square roots over the largest"
    )
    assert (
        browser.run("return document.querySelectorAll('#completions .tag').length") == 10
        and text(browser, "#completions .tag") == "<think>"
    )
    # J_0 … J_3 at the ends of the episodes: 1 is at the top of the panel, 0 110 units below.
    points = browser.run("return document.querySelector('#completions .J').getAttribute('points')")
    heights = [float(point.split(",")[1]) for point in points.split()]
    assert [round(22 + 110 * (1 - J), 1) for J in EPISODES["J"]] == heights
    browser.run(
        """const box = document.querySelectorAll("#completions .ep")[1];
        box.scrollIntoView({ block: "center" });
        return new Promise(done => requestAnimationFrame(() => requestAnimationFrame(() => {  // when it has come to rest
          box.dispatchEvent(new PointerEvent("pointerover", { bubbles: true }));
          done();
        })));"""
    )
    tip = text(browser, ".tip")
    assert tip.startswith("episode 2 of 3 · ") and "J 0.5 → 0.25 · fitting gain −0.25" in tip
    assert "compression 0.002 raw · 0.02 normalised\nprocess reward −0.5 · advantage +0.5" in tip
    near = browser.run("""const a = document.querySelectorAll("#completions .ep")[1].getBoundingClientRect();
        const b = document.querySelector(".tip").getBoundingClientRect();
        return Math.min(Math.abs(a.top - b.bottom), Math.abs(b.top - a.bottom))""")
    assert near < 20, "beside the episode"
    assert browser.run("return document.querySelectorAll('#completions tr.lit').length") == 1


def test_tokens_are_coloured_by_credit_and_surprise(browser, page):
    browser.open(page)
    choose(browser, "completions", "colour by", "advantage of a token")
    tokens = "return [...document.querySelectorAll('#completions pre .plus')].map(e => e.style.getPropertyValue('--w'))"
    assert set(browser.run(tokens)) == {"1.00"} and "".join(PARTS) == text(browser, "#completions pre")
    choose(browser, "completions", "colour by", "nothing")
    assert browser.run(tokens) == [] and "colour=none" in browser.run("return location.hash")


def test_the_values_at_one_step_in_all_charts(browser, page):
    browser.open(page)
    rest = text(browser, ".chart output")
    browser.run(
        "const at = document.getElementById('at'); at.value = 2; at.dispatchEvent(new Event('input'))"
    )
    assert text(browser, ".chart output") == "0.25" and text(browser, "#at-step") == "step 2"
    browser.run("document.getElementById('at').focus()")
    browser.press("right")
    assert text(browser, "#at-step") == "step 3" and text(browser, ".chart output") == "0.375", "by keyboard"
    browser.press("escape")
    assert text(browser, ".chart output") == rest


@pytest.mark.parametrize("width", [360, 768, 1280])
def test_no_page_is_wider_than_its_window(browser, page, width):
    browser.look(width, 800)
    browser.open(page)
    assert browser.run("return document.documentElement.scrollWidth - innerWidth") <= 0
    browser.look()


def test_light_and_dark_follow_the_reader(browser, page):
    paper = {}
    for dark in (False, True):
        browser.look(dark=dark)
        browser.open(page)
        paper[dark] = browser.run("return getComputedStyle(document.body).backgroundColor")
    browser.look()
    assert paper == {False: "rgb(251, 250, 247)", True: "rgb(20, 22, 26)"}


def test_a_run_can_be_hidden(browser, tmp_path):
    for name in ("a", "b"):
        log = new_run(tmp_path, name=name)
        log.step({"step": 1, "reward": 0.5})
        log.step({"step": 2, "reward": 0.25})
    browser.open(write_report(tmp_path))
    drawn = "return [...document.querySelectorAll('polyline.mean')].map(e => getComputedStyle(e).display)"
    assert browser.run(drawn) == ["inline", "inline"]
    browser.run("document.querySelector('#runs input').click()")
    assert browser.run(drawn) == ["none", "inline"]

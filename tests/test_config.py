"""Options: where a value comes from, which preset reads it, and the sentence that a mistake gets."""

import dataclasses
import inspect
import os
import re
import subprocess
import sys

import pytest

from helpers import ROOT
from thinkrl import UserError, config, length
from thinkrl.config import (
    PRESETS,
    Config,
    as_dict,
    fit_to_context,
    overview,
    parse,
    preset_help,
    preset_values,
    readers,
)
from thinkrl.config.aliases import ELSEWHERE, elsewhere
from thinkrl.options import exit_with_error, group, option, parse_as, run_tool, within
from thinkrl.tools.docs import PAGES

OPTIONS = [f for f in dataclasses.fields(Config) if f.metadata]


def test_later_sources_win():
    assert parse(["grpo", "--model", "some/folder"]).lr == Config.lr == 1e-6
    assert parse(["grpo"]).lr == config.EMBEDDED_VALUES["grpo"]["lr"]
    assert parse(["grpo", "--lr", "0.5"]).lr == 0.5
    assert parse(["l2t"]).statistic == "return_sum"
    assert parse(["l2t", "--profile", "paper"]).statistic == "token_trunc_mean"
    assert parse(["l2t", "--profile", "paper", "--statistic", "return_sum"]).statistic == "return_sum"


def test_the_preset_is_a_field():
    grpo = dataclasses.replace(parse(["grpo"]), lr=1e-3)
    assert grpo.preset == as_dict(grpo)["preset"] == "grpo"
    assert parse([]).preset == "l2t"
    assert parse(["--preset", "sft", "--data", "rows.jsonl"]).preset == "sft"


def test_a_config_knows_what_was_given():
    c = parse(["grpo", "--max_tokens", "7", "--wandb"])
    assert c.given == {"max_tokens", "wandb"}
    assert "given" not in as_dict(c)
    assert as_dict(c).keys() == {f.name for f in OPTIONS}


def test_published_l2t_values_on_a_real_model():
    c = parse(["l2t", "--model", "some/folder"])
    assert (c.alpha, c.beta, c.lr, c.schedule, c.warmup, c.weight_decay) == (
        0.8,
        0.6,
        1e-6,
        "cosine",
        0.1,
        0.01,
    )
    assert (c.problems_per_step * c.group_size, c.max_tokens, c.keep) == (256, 16384, 0.95)


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("tiny", [False, True])
@pytest.mark.parametrize("profile", config.PROFILE_VALUES)
@pytest.mark.parametrize(
    "method",
    [*(dict(length=x) for x in config.LENGTH_VALUES), *(dict(method=x) for x in config.METHOD_VALUES)],
)
def test_every_default_is_allowed_by_its_field(preset, tiny, profile, method):
    values = preset_values(preset, tiny, profile, **method)
    for f in OPTIONS:
        assert within(f, values.get(f.name, f.default)), f.name


def test_spellings_of_an_option():
    assert parse(["--max-tokens=7"]).max_tokens == parse(["--max_tokens", "7"]).max_tokens == 7
    assert parse(["--wandb"]).wandb and not parse(["--wandb", "false"]).wandb
    assert parse(["--suffix=--x"]).suffix == "--x"


@pytest.mark.parametrize(
    "argv, sentence",
    [
        (["--lrr", "1"], "unknown option '--lrr' (did you mean 'lr'?): see --help"),
        (["--qqq", "1"], "unknown option '--qqq': see --help"),
        (
            ["grpoo"],
            "no preset 'grpoo' (did you mean 'grpo'?): it must be one of l2t, grpo, longshort, sft, prm",
        ),
        (["--steps", "many"], "--steps is 'many': it must be an integer"),
        (["--steps", "1.5"], "--steps is '1.5': it must be an integer"),
        (["--steps"], "option '--steps' needs a value"),
        (["--wandb=maybe"], "--wandb is 'maybe': it must be true or false"),
        (["--lr", "nan"], "--lr is 'nan': it must be a finite number"),
        (["--temperature", "inf"], "--temperature is 'inf': it must be a finite number"),
        (["grpo", "stray"], "unexpected argument 'stray': options are written --key value"),
        (["--max_tokens", "0"], "--max_tokens is 0: it must be at least 1"),
        (["--eval_every", "-1"], "--eval_every is -1: it must be at least 0"),
        (["--temperature", "0"], "--temperature is 0: it must be above 0"),
        (["--clip_low", "1.5"], "--clip_low is 1.5: it must be at least 0 and at most 1"),
        (["--beta2", "1"], "--beta2 is 1: it must be at least 0 and below 1"),
        (["--rank_share", "0"], "--rank_share is 0: it must be above 0 and at most 1"),
        (
            ["--gain", "forcd"],
            "--gain is 'forcd': it must be one of forced, mc, continue, prm, none (did you mean 'forced'?)",
        ),
        (
            ["--episodes", "fixed:0"],
            "--episodes is 'fixed:0': it must be tags, paragraphs or fixed:N with N at least 1",
        ),
        (["longshort", "--rounds", "LXS"], "--rounds is 'LXS': it must be letters L and S, not X"),
        (["longshort", "--rounds", ""], "--rounds is '': it must be letters L and S"),
        (["grpo", "--group_size", "1"], "--group_size is 1: grpo compares the completions of a group, use 2"),
        (["--gain", "prm"], "--gain prm needs --prm PATH, a step reward model made by train.py prm"),
        (
            ["--credit", "to_go", "--advantage_std", "none"],
            "--advantage_std none: --credit to_go divides a group by the root mean square",
        ),
        (["l2t", "--group_size", "1", "--advantage_std", "none"], "--group_size is 1: l2t compares the"),
        (["sft"], "sft needs --data FILE.jsonl or an alpaca JSON list"),
        (["longshort", "--long", "L0"], "longshort starts from both --long DIR and --short DIR, or, without"),
        (["--temperature", "0.7"], "--temperature 0.7: the Fisher information in the penalty is that of"),
    ],
)
def test_a_mistake_gets_one_sentence(argv, sentence):
    with pytest.raises(UserError) as mistake:
        parse(argv)
    assert str(mistake.value).startswith(sentence), mistake.value
    assert "\n" not in str(mistake.value)


LENGTH = {
    "--length kimi --length_alpha 1": "--length kimi does not read --length_alpha, it reads --length_weight",
    "--length_weight 1": "--length_weight belongs to a method: choose one with --length",
    "--length truncation": "--length truncation needs --length_limit",
    "--length overlong --length_limit 100": "--length overlong needs --length_cache",
    "--length l1_max": "--length l1_max needs --length_target",
    "--length gfpo": "--length gfpo needs --length_keep",
    "--length laser --length_limit 200": "--length laser does nothing from 200 tokens on: completions end at",
    "--length overlong --length_limit 300 --length_cache 100": (
        "--length overlong does nothing from 200 tokens"
    ),
    "--length overlong --length_limit 50 --length_cache 60": "--length_cache is 60: it must be at most",
    "--length gfpo --length_keep 8": (
        "--length_keep is 8: gfpo keeps 2 or more, and fewer than --group_size 8"
    ),
    "--length gfpo --length_keep 1": (
        "--length_keep is 1: gfpo keeps 2 or more, and fewer than --group_size 8"
    ),
    "--length gfpo --length_keep 4 --advantage_std none": "--length gfpo has its own advantages",
    "--length l1_max --length_target 9:3": "--length_target is '9:3': it must be N or LOW:HIGH, tokens",
    "--length l1_max --length_target 0": "--length_target is '0': it must be N or LOW:HIGH, tokens",
    "--length l1_max --length_target 9 --length_prompt x": "--length_prompt must say {target}",
    "--length kimi --advantage_std mean": (
        "--advantage_std mean divides by a group's mean reward, which kimi may"
    ),
    "--advantage_std each": "--advantage_std each is for several rewards of grpo: name them with --reward",
    "--length limit": "--length is 'limit': it must be one of truncation,",
    "--surrogate sapo": "--surrogate sapo does nothing with one update per rollout",
    "--surrogate cispo --updates_per_rollout 2 --level sequence": "--surrogate cispo is one of tokens",
    "--surrogate sapo --updates_per_rollout 2 --clip_low 0.1": "--surrogate sapo has no clip",
    "--importance_low 0.5": "--importance_low 0.5 needs --importance_cap, the upper bound",
}


CREDIT = {
    "--profile paper --method mrt": "--profile paper and --method mrt: choose one",
    "--credit_lambda 0.5": "--credit_lambda is read by --credit step and local, not by uniform",
    "--gain mc --gain_scale log": (
        "--gain_scale log is one of a forced answer's probability: --gain mc has none"
    ),
    "--credit local --gain none": "--credit local needs J to be the value of a state",
    "--credit local --gain_scale log": "--credit local needs J to be the value of a state",
    "--credit local --advantage_std none": "--credit local has one scale for the whole step",
    "--credit local --released_sum": "--released_sum is not read by --credit local",
    "--advantage_std mean": (
        "--advantage_std mean divides by a group's mean reward, which l2t may make negative"
    ),
}


@pytest.mark.parametrize("line", CREDIT)
def test_contradictions_of_credit_are_refused(line):
    with pytest.raises(UserError) as mistake:
        parse(["l2t", *line.split()])
    assert str(mistake.value).startswith(CREDIT[line]) and "\n" not in str(mistake.value)


def test_a_method_sets_values_that_can_be_given_still():
    c = parse(["l2t", "--method", "vineppo", "--gain_samples", "2"])
    assert (c.gain, c.gain_samples, c.credit, c.beta) == ("continue", 2, "local", 0.0)


@pytest.mark.parametrize("line", LENGTH)
def test_an_option_that_would_do_nothing_is_refused(line):
    with pytest.raises(UserError) as mistake:
        parse(["grpo", *line.split()])
    assert str(mistake.value).startswith(LENGTH[line]) and "\n" not in str(mistake.value)


def test_every_length_method_is_a_function_and_reads_its_arguments():
    for name, values in config.LENGTH_VALUES.items():
        arguments = {key.removeprefix("length_") for key in values if key.startswith("length_")} - {"prompt"}
        if name == "laser_d":  # `laser` with limits of its own
            arguments, name = arguments | {"limit"}, "laser"
        if name:
            assert list(arguments) and arguments == set(
                inspect.signature(getattr(length, name)).parameters
            ) - {"correct", "tokens", "eps"}


def test_published_length_values_are_those_of_the_functions():
    for name, values in config.LENGTH_VALUES.items():
        for key, value in values.items():
            if name not in ("", "laser_d") and key.startswith("length_") and value and key != "length_prompt":
                default = (
                    inspect.signature(getattr(length, name)).parameters[key.removeprefix("length_")].default
                )
                assert default == value, (name, key)


@pytest.mark.parametrize(
    "argv, sentence",
    [
        (["grpo", "--beta", "0.04"], "--beta is read by l2t, not by grpo: TRL's beta is --kl_coef here"),
        (["sft", "--beta", "0.04", "--data", "x"], "--beta is read by l2t, not by sft"),
        (["l2t", "--length", "kimi"], "--length is read by grpo, not by l2t"),
        (["grpo", "--profile", "paper"], "--profile is read by l2t, not by grpo"),
        (["--rounds", "L"], "--rounds is read by longshort, not by l2t"),
        (["sft", "--gain_samples", "2"], "--gain_samples is read by l2t and prm, not by sft"),
        (
            ["longshort", "--steps", "9"],
            "--steps is read by grpo, l2t, sft and prm, not by longshort: "
            "its length is --rounds times --steps_per_round",
        ),
    ],
)
def test_an_option_of_another_preset_is_refused(argv, sentence):
    with pytest.raises(UserError) as mistake:
        parse(argv)
    assert str(mistake.value) == sentence


def test_every_preset_sets_only_what_some_preset_reads():
    for preset, values in config.PRESET_VALUES.items():
        assert all(preset in readers(key) for key in values), preset
    for values in config.PROFILE_VALUES.values():
        assert all("l2t" in readers(key) for key in values)


@pytest.mark.parametrize(
    "argument, meant",
    [
        ("--num_generations", "TRL's num_generations is --group_size here"),
        ("--num-generations=8", "TRL's num_generations is --group_size here"),
        ("--learning_rate", "TRL's learning_rate is --lr here"),
        (
            "--loss_type",
            "TRL's loss_type dapo / grpo / dr_grpo / cispo / sapo is --aggregate token / sequence / "
            "constant, --surrogate cispo / sapo here",
        ),
        ("--actor_rollout_ref.rollout.n=8", "verl's rollout.n is --group_size here"),
        ("--rollout_n", "verl's rollout.n is --group_size here"),
        ("actor_rollout_ref.actor.kl_loss_coef=0.1", "verl's kl_loss_coef is --kl_coef here"),
        ("+data.max_response_length=7", "verl's data.max_response_length is --max_tokens here"),
        ("--top_p", "training samples from the whole distribution"),
        ("--top_k", "training samples from the whole distribution"),
    ],
)
def test_names_of_other_libraries_are_known(argument, meant):
    with pytest.raises(UserError, match=meant.replace("(", r"\(").replace(".", r"\.")):
        parse(["grpo", argument])


def test_the_table_of_other_names_points_at_options():
    names = {f.name for f in OPTIONS}
    for here, trl, verl in ELSEWHERE:
        pointed = [word.strip(",") for word in here.split() if word.startswith("--")]
        assert pointed and all(word.removeprefix("--") in names for word in pointed), here
        for name in filter(None, f"{trl}, {verl}".split(", ")):
            assert here in elsewhere(name.split()[0]), name


@pytest.mark.parametrize(
    "argv, context, limits, said",
    [
        (["l2t"], 32768, (16384, 2048), ""),
        (
            ["l2t"],
            8192,
            (6144, 2048),
            "--max_tokens 6144 (default 16384): lowered to the model's context of 8192",
        ),
        (["l2t", "--gain", "continue"], 8192, (3072, 2048), "--max_tokens 3072"),  # and its continuation
        (["l2t", "--max_tokens", "9000"], 8192, (9000, 2048), ""),  # refused later, by require_room
        (["prm"], 4096, (1536, 2048), "--max_tokens 1536 (default 2048)"),
        (["longshort"], 8192, (1024, 2048), ""),
        (
            ["longshort"],
            2048,
            (512, 512),
            "--max_tokens 512 (default 1024), --partner_max_tokens 512 (default 2048): lowered",
        ),
        (["longshort", "--partner_max_tokens", "900"], 2048, (512, 900), "--max_tokens 512 (default 1024)"),
        (["sft", "--data", "rows.jsonl"], 100, (2048, 2048), ""),  # nothing is sampled
    ],
)
def test_a_default_is_lowered_to_the_context_and_what_was_given_is_not(argv, context, limits, said):
    config, line = fit_to_context(parse([*argv, "--model", "some/folder"]), context)
    assert (config.max_tokens, config.partner_max_tokens) == limits
    assert line.startswith(said) and bool(line) == bool(said)


@pytest.mark.parametrize("preset", PRESETS)
def test_the_embedded_model_has_room_for_its_defaults(preset):
    config = parse([preset, "--data", "arith"])
    assert fit_to_context(config, 1024) == (config, "")


def test_the_papers_spelling_of_the_rounds():
    config = parse(["longshort", "--rounds", "L,L,S", "--steps_per_round", "5"])
    assert (config.rounds, config.steps, config.eval_every) == ("LLS", 15, 5)


def test_a_mistake_that_only_another_rank_sees_is_told_too(monkeypatch, capsys):
    """Rank 0 would have spoken, and torchrun have ended this rank, long before it wakes up."""
    waited = []
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setattr("time.sleep", waited.append)
    with pytest.raises(SystemExit) as stopped:
        exit_with_error("train.py", UserError("problem 7 is too long"))
    assert (
        stopped.value.code == 2
        and waited == [30]
        and capsys.readouterr().err == "train.py: problem 7 is too long\n"
    )


def test_a_tool_exits_with_the_mistake_of_its_main(monkeypatch, capsys):
    def main(words: list[str]) -> None:
        raise UserError(f"no file {words[0]}")

    monkeypatch.setattr("sys.argv", ["tool", "a.jsonl"])
    with pytest.raises(SystemExit) as stopped:
        run_tool("tool", list, main)
    assert stopped.value.code == 2 and capsys.readouterr().err == "tool: no file a.jsonl\n"


def test_help_comes_once_from_all_ranks(monkeypatch, capsys):
    monkeypatch.setenv("RANK", "1")
    with pytest.raises(SystemExit):
        parse(["--help"])
    assert capsys.readouterr().out == ""


def test_the_overview_names_every_preset_and_option():
    words = overview().split()
    assert all(words.count(f"--{f.name}") == 1 for f in OPTIONS if f.name != "preset")
    assert set(PRESETS) <= set(words)


@pytest.mark.parametrize("preset", PRESETS)
def test_help_of_a_preset_lists_what_it_reads(preset, capsys):
    with pytest.raises(SystemExit):
        parse([preset, "--help"])
    text = capsys.readouterr().out
    assert text == preset_help(preset) + "\n"
    for f in OPTIONS:
        assert text.count(f"  --{f.name} ") == (preset in readers(f.name) and f.name != "preset"), f.name


def test_help_of_a_preset_shows_its_values():
    lines = {line.split()[0]: line for line in preset_help("l2t").splitlines() if line.startswith("  --")}
    assert lines["--max_tokens"].endswith("(default 16384; tiny 200)")
    assert lines["--kl_coef"].endswith("(default 0.001; tiny 0.0)")
    assert lines["--alpha"].endswith("(default 0.8)")
    assert lines["--dtype"].endswith("[auto|float32|bfloat16] (default auto)")
    assert "default" not in lines["--name"]


def test_help_does_not_import_torch():
    code = (
        "import sys, runpy; sys.argv = ['train.py', '--help']\ntry: runpy.run_path('train.py', "
        "run_name='__main__')\n"
    )
    code += "except SystemExit as e: assert not e.code\nassert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, stdout=subprocess.DEVNULL)


@pytest.mark.parametrize("program", ["train", "sample", "chunk"])
def test_console_commands_start_the_programs_from_any_folder(program, tmp_path):
    """`python -m chunk` would not: Python has a module of that name until 3.12."""
    code = (
        f"import sys; sys.argv = ['thinkrl-{program}', '--help']\nfrom thinkrl.cli import {program}; "
        f"{program}()"
    )
    run = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0 and f"{program}.py" in run.stdout.splitlines()[0], run.stderr


def test_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        parse([]).lr = 1.0


@dataclasses.dataclass(frozen=True)
class Options:
    _what = group("What")
    n: int = option(1, "completions", low=1)
    _how = group("How")
    greedy: bool = option(False, "take the most probable token")


def test_a_program_without_presets(capsys):
    assert parse_as(Options, ["--n", "3", "--greedy"], "sample.py") == Options(3, True)
    with pytest.raises(UserError, match="--n is 0: it must be at least 1"):
        parse_as(Options, ["--n", "0"], "sample.py")
    with pytest.raises(SystemExit):
        parse_as(Options, ["--help"], "sample.py [--key value …]", notes=["", "and so on"])
    assert capsys.readouterr().out.splitlines() == [
        "usage: sample.py [--key value …]",
        "",
        "What:",
        "  --n INT                           completions (default 1)",
        "",
        "How:",
        "  --greedy BOOL                     take the most probable token (default false)",
        "",
        "and so on",
    ]


@pytest.mark.parametrize("name", PAGES)
def test_pages_made_from_the_code_are_up_to_date(name):
    assert (ROOT / "docs" / name).read_text() == PAGES[name](), f"docs/{name} is out of date: run `make docs`"


METHODS = (ROOT / "docs" / "methods.md").read_text()


def test_the_options_of_a_method_s_row_are_its_settings():
    rows = re.findall(
        r"^\| `([\w-]+)` \(\d{4}\.\d{5}\) \|.*\| (?:`(--[^`]*)`|the same with `(--[^`]*)`) \|$", METHODS, re.M
    )
    assert {name for name, _, _ in rows} == set(config.METHOD_VALUES) - {""}
    above = ""
    for name, options, changed in rows:
        above = f"{above if changed else ''} {options}{changed}"
        spelt, named = as_dict(parse(["l2t", *above.split()])), as_dict(parse(["l2t", "--method", name]))
        assert {k: v for k, v in spelt.items() if k != "method"} == {
            k: v for k, v in named.items() if k != "method"
        }


def test_recipes_of_the_page_parse():
    recipes = re.findall(r"^\| [\w. ]+ \| `(--[^`]*)`.*\|$", METHODS, re.M)
    assert len(recipes) == 6
    for recipe in recipes:
        parse(
            [
                "grpo",
                "--model",
                "some/folder",
                "--max_tokens",
                "20480",
                *recipe.replace(" N ", " 4000 ").split(),
            ]
        )


def test_every_length_method_has_its_row():
    rows = set(re.findall(r"^\| `(\w+)` \|", METHODS.split("### Recipes")[0], re.M))
    assert rows == set(config.LENGTH_VALUES) - {""}

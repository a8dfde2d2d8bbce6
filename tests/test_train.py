"""train.py as a user meets it: real checkpoints and data on two ranks, a kill and a resume, and every
mistake's sentence.
"""

import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import transformers
from safetensors.torch import load_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

import sample
import train
from helpers import ROOT, torchrun
from thinkrl.config import parse
from thinkrl.learner import fitted

TEMPLATE = (
    "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
SMALL = dict(
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=256,
)


@pytest.fixture(scope="module")
def tokenizer_file(tmp_path_factory) -> Path:
    """A byte-level BPE trained here, as real checkpoints carry."""
    raw = Tokenizer(models.BPE())
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    text = ["Think step by step, then put the final answer in \\boxed{7}. What is 12 + 34?"] * 4
    special = ["<|eos|>", "<|user|>", "<|system|>", "<|assistant|>"]
    raw.train_from_iterator(
        text,
        trainers.BpeTrainer(
            vocab_size=320, special_tokens=special, initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
        ),
    )
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    raw.save(str(path))
    return path


def checkpoint(folder: Path, kind: str, tokenizer_file: Path) -> Path:
    """Random weights, written by transformers."""
    fast = transformers.PreTrainedTokenizerFast(tokenizer_file=str(tokenizer_file), eos_token="<|eos|>")
    fast.chat_template = TEMPLATE
    torch.manual_seed(0)
    config, model = {
        "qwen2": (transformers.Qwen2Config, transformers.Qwen2ForCausalLM),
        "llama": (transformers.LlamaConfig, transformers.LlamaForCausalLM),
    }[kind]
    model(config(vocab_size=len(fast), eos_token_id=0, bos_token_id=None, **SMALL)).save_pretrained(folder)
    fast.save_pretrained(folder)
    return folder


def verl_rows(path: Path, count: int = 12) -> Path:
    pyarrow, parquet = (pytest.importorskip(name) for name in ("pyarrow", "pyarrow.parquet"))
    rows = [
        {
            "data_source": "openai/gsm8k",
            "prompt": [{"role": "user", "content": f"What is {i} + 1?"}],
            "ability": "math",
            "reward_model": {"style": "rule", "ground_truth": str(i + 1)},
            "extra_info": {"split": "train", "index": i},
        }
        for i in range(count)
    ]
    parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    return path


def test_a_default_completion_limit_is_lowered_to_the_models_context(tmp_path, tokenizer_file, capsys):
    model = checkpoint(tmp_path / "model", "qwen2", tokenizer_file)
    world = SimpleNamespace(main=True)
    assert fitted(parse(["l2t", "--model", str(model)]), world).max_tokens == 192  # 3/4 of 256
    assert capsys.readouterr().out == (
        "--max_tokens 192 (default 16384): lowered to the model's context of 256 tokens\n"
    )
    assert fitted(parse(["l2t", "--model", str(model), "--max_tokens", "999"]), world).max_tokens == 999
    pair = ["longshort", "--long", "tiny", "--short", str(model)]  # contexts of 1024 and 256
    assert fitted(parse(pair), world).partner_max_tokens == 64


@pytest.mark.slow
@pytest.mark.parametrize(
    "kind, more",
    [
        ("qwen2", ["--kl_coef", "0.1", "--updates_per_rollout", "2", "--importance_cap", "2"]),
        (
            "llama",
            "--aggregate sequence --activation_checkpointing selective --replicate 2 --compile true".split(),
        ),
    ],
)
def test_a_real_checkpoint_and_a_verl_parquet_on_two_ranks(kind, more, tmp_path, tokenizer_file):
    model, data = checkpoint(tmp_path / "model", kind, tokenizer_file), verl_rows(tmp_path / "train.parquet")
    done = torchrun(
        2,
        "train.py",
        "grpo",
        "--model",
        str(model),
        "--data",
        str(data),
        "--eval_data",
        str(data),
        "--steps",
        "3",
        "--problems_per_step",
        "3",
        "--group_size",
        "2",
        "--max_tokens",
        "12",
        "--lr",
        "1e-3",
        "--runs_dir",
        str(tmp_path),
        "--name",
        "run",
        "--save_every",
        "2",
        "--eval_budgets",
        "2",
        *more,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [1, 2, 3]
    wanted = (
        "step reward accuracy tokens loss grad_norm lr entropy kl clip_fraction mismatch seconds "
        "tokens_per_second"
    )
    assert set(wanted.split()) <= rows[0].keys()
    assert rows[0]["mismatch"] < 1e-5, "sampler and trainer must agree"
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert {"accuracy", "tokens", "greedy", "by_level"} <= summary["before"].keys() & summary["after"].keys()
    assert [point[0] for point in summary["after"]["greedy"]["budgets"]] == [6, 12]
    assert summary["before"]["budgets"][-1][1] == summary["before"]["accuracy"], (
        "the last budget is the limit"
    )
    loaded = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "run" / "checkpoints" / "step_3" / "hf"
    )
    before = load_file(model / "model.safetensors")
    moved = [n for n, w in loaded.state_dict().items() if n in before and not torch.equal(w, before[n])]
    assert rows[-1]["zero_groups"] == 1.0 and kind == "llama" or moved, (
        "weights move when anything was learnt"
    )


SAVE_EVERY = 2
COMMON = [
    "--save_every",
    str(SAVE_EVERY),
    "--problems_per_step",
    "4",
    "--group_size",
    "4",
    "--max_tokens",
    "60",
    "--eval_problems",
    "4",
    "--kl_coef",
    "0.01",
]
# preset, its own options, where it is killed, where it ends
LONG = ["l2t", "--steps", "4"], 2, 4
# killed inside the round of the short role
ROUNDS = ["longshort", "--rounds", "LS", "--steps_per_round", "3"], 4, 6


@pytest.mark.slow
@pytest.mark.parametrize("options, killed, steps", [LONG, ROUNDS], ids=["l2t", "longshort"])
def test_kill_and_resume_is_the_same_run(tmp_path, options, killed, steps):
    """2N steps == N steps, a kill, a resume: bit for bit. Optimizers, references, running Fisher and both
    roles included.
    """
    whole = [*options, *COMMON, "--runs_dir", str(tmp_path), "--name", "whole"]
    cut = [*whole[:-1], "cut"]
    done = torchrun(2, "train.py", *whole)
    assert done.returncode == 0, done.stderr[-3000:]
    saves = str(killed // SAVE_EVERY)
    done = torchrun(2, "tests/killed.py", "thinkrl.resume:point_latest", saves, "train.py", *cut)
    assert done.returncode != 0 and (tmp_path / "cut" / "latest").read_text() == f"step_{killed}\n"
    done = torchrun(2, "train.py", *cut, "--resume", "auto")
    assert done.returncode == 0, done.stderr[-3000:]
    models = [path.relative_to(tmp_path / "whole") for path in tmp_path.glob("whole/hf*/model.safetensors")]
    assert len(models) == (2 if options[0] == "longshort" else 1)
    for saved in models:
        one, other = (load_file(tmp_path / name / saved) for name in ("whole", "cut"))
        assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one), saved

    def lines(name: str) -> list[dict]:
        rows = [json.loads(line) for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]
        return [
            {k: v for k, v in row.items() if "seconds" not in k and k != "tokens_per_second"} for row in rows
        ]

    assert lines("whole") == lines("cut")


def mistake(capsys, *argv: str) -> str:
    """Exit status 2 and one line on stderr."""
    capsys.readouterr()  # transformers prints while it saves
    with pytest.raises(SystemExit) as stopped:
        train.main(parse(list(argv)))
    assert stopped.value.code == 2
    sentence = capsys.readouterr().err.strip()
    assert sentence.startswith("train.py: ") and "\n" not in sentence and "Traceback" not in sentence
    return sentence


def test_bad_models(capsys, tmp_path, tokenizer_file):
    runs = ["--runs_dir", str(tmp_path / "runs")]
    assert "no such folder" in mistake(capsys, "grpo", "--model", str(tmp_path / "nowhere"), *runs)
    folder = checkpoint(tmp_path / "model", "qwen2", tokenizer_file)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"architectures": ["GPT2LMHeadModel"]}))
    assert "Qwen3ForCausalLM" in mistake(capsys, "grpo", "--model", str(folder), *runs)
    (folder / "config.json").write_text(json.dumps(config | {"intermediate_size": 40}))
    sentence = mistake(capsys, "grpo", "--model", str(folder), *runs)
    assert "gate_proj" in sentence and "48" in sentence and "40" in sentence
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes()[:500])
    assert "model.safetensors" in mistake(capsys, "grpo", "--model", str(folder), *runs)
    assert not (tmp_path / "runs").exists(), "nothing half-written"


def test_bad_data(capsys, tmp_path):
    runs = ["--runs_dir", str(tmp_path / "runs")]
    data = tmp_path / "data.jsonl"
    data.write_text("")
    assert "no rows" in mistake(capsys, "grpo", "--data", str(data), *runs)
    data.write_text('{"problem": "1+1?", "answer": "2"}\n{"problem": "1+2?"}\n')
    sentence = mistake(capsys, "grpo", "--data", str(data), *runs)
    assert "data.jsonl:2" in sentence and "answer" in sentence
    data.write_text('{"problem": "1+1?", "answer": "\\\\boxed{"}\n' * 20)
    assert "data.jsonl:1" in mistake(capsys, "grpo", "--data", str(data), "--source", "gsm8k", *runs)
    data.write_text(json.dumps({"problem": "1+" * 600, "answer": "2", "source": "arith"}) + "\n")
    assert "context" in mistake(capsys, "grpo", "--data", str(data), "--problems_per_step", "1", *runs)
    assert "context" in mistake(capsys, "grpo", "--max_tokens", "5000", *runs)
    assert not (tmp_path / "runs").exists(), "nothing half-written"


@pytest.mark.slow
def test_more_ranks_than_problems(tmp_path):
    done = torchrun(2, "train.py", "grpo", "--problems_per_step", "1", "--runs_dir", str(tmp_path))
    own = [line for line in done.stderr.splitlines() if line.startswith("train.py: ")]
    assert done.returncode != 0 and len(own) == 1 and "--nproc_per_node" in own[0]
    assert 'train.py", line' not in done.stderr, "no traceback of ours; torchrun adds its own report"


def test_run_folders(capsys, tmp_path):
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "metrics.jsonl").write_text("")
    assert "--resume auto" in mistake(capsys, "grpo", "--runs_dir", str(tmp_path), "--name", "taken")
    (tmp_path / "file").write_text("")
    assert "--runs_dir" in mistake(capsys, "grpo", "--runs_dir", str(tmp_path / "file"))


def test_a_foreign_kernels_package(tmp_path):
    (tmp_path / "kernels").mkdir()
    (tmp_path / "kernels" / "__init__.py").write_text("")
    done = subprocess.run(
        [
            sys.executable,
            "-c",
            "import sys; sys.path.insert(0, sys.argv[1]); sys.path.append(sys.argv[2])\n"
            "from thinkrl import require_own_kernels\nrequire_own_kernels()",
            str(tmp_path),
            str(ROOT),
        ],
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert "pip install -e ." in done.stderr


def test_a_wrong_option_from_the_shell():
    done = subprocess.run(
        [sys.executable, "train.py", "--lrr", "1"], cwd=ROOT, capture_output=True, text=True
    )
    assert (done.returncode, done.stderr.strip()) == (
        2,
        "train.py: unknown option '--lrr' (did you mean 'lr'?): see --help",
    )


@pytest.mark.slow
def test_sft_learns_its_rows_and_leaves_a_folder(tmp_path):
    rows = [
        {"problem": f"{a}*{b}?", "response": f"<think></think><answer>{a * b}</answer>"}
        for a in (3, 4)
        for b in range(2, 10)
    ]
    data = tmp_path / "rows.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    train.main(
        parse(
            [
                "sft",
                "--data",
                str(data),
                "--epochs",
                "3",
                "--problems_per_step",
                "8",
                "--lr",
                "1e-3",
                "--warmup",
                "0.1",
                "--runs_dir",
                str(tmp_path),
                "--name",
                "sft",
                "--save_dtype",
                "bfloat16",
            ]
        )
    )
    losses = [
        json.loads(line)["loss"] for line in (tmp_path / "sft" / "metrics.jsonl").read_text().splitlines()
    ]
    assert len(losses) == 6, "three passes over 16 rows, 8 a step"
    assert losses[-1] < 0.7 * losses[0], losses
    folder = tmp_path / "sft" / "hf"
    assert transformers.AutoModelForCausalLM.from_pretrained(folder).config.vocab_size == 72
    assert {weight.dtype for weight in load_file(folder / "model.safetensors").values()} == {torch.bfloat16}
    assert not list((tmp_path / "sft" / "checkpoints").glob("*/dcp")), "no state that only a resume reads"
    assert (tmp_path / "sft" / "report.html").exists()


@pytest.mark.slow
def test_sample_measures_what_the_run_measured(tmp_path):
    """The prompt and the limit of a policy are beside its weights."""
    rows = [{"problem": f"{i}*7", "answer": str(i * 7), "source": "arith"} for i in range(1, 9)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    asked = ["--suffix", "?", "--max_tokens", "40", "--eval_data", str(tmp_path / "rows.jsonl")]
    small = ["--steps", "1", "--problems_per_step", "2", "--group_size", "2"]
    train.main(parse(["grpo", *asked, *small, "--lr", "0", "--runs_dir", str(tmp_path), "--name", "run"]))
    model = tmp_path / "run" / "hf"
    assert json.loads((model / "sampling.json").read_text()) == {
        "system": "",
        "suffix": "?",
        "max_tokens": 40,
        "temperature": 1.0,
    }

    def measured(out: str, *options: str) -> tuple[float, float]:
        command = ["--model", str(model), "--data", str(tmp_path / "rows.jsonl"), "--temperature", "0"]
        sample.main(sample.parse_options([*command, "--out", str(tmp_path / out), *options]))
        summary = json.loads((tmp_path / out / "summary.json").read_text())
        return summary["accuracy"], summary["tokens"]

    after = json.loads((tmp_path / "run" / "summary.json").read_text())["after"]["greedy"]
    as_in_training = after["accuracy"], after["tokens"]
    assert measured("same") == as_in_training != measured("other", "--suffix", "")


@pytest.mark.slow
def test_a_reward_model_is_trained_and_used(tmp_path):
    small = [
        "--problems_per_step",
        "2",
        "--group_size",
        "2",
        "--max_tokens",
        "60",
        "--runs_dir",
        str(tmp_path),
    ]
    train.main(parse(["prm", "--steps", "2", "--gain_samples", "2", "--lr", "1e-3", "--name", "prm", *small]))
    rows = [json.loads(line) for line in (tmp_path / "prm" / "metrics.jsonl").read_text().splitlines()]
    assert len(rows) == 2 and all(0 < row["label_error"] < 1 for row in rows)
    folder = tmp_path / "prm" / "prm"
    train.main(
        parse(
            [
                "l2t",
                "--gain",
                "prm",
                "--prm",
                str(folder),
                "--steps",
                "1",
                "--eval_problems",
                "2",
                "--name",
                "l2t",
                *small,
            ]
        )
    )
    [*_, last] = (json.loads(line) for line in (tmp_path / "l2t" / "samples.jsonl").read_text().splitlines())
    assert all(0 <= j <= 1 for j in last["J"]) and last["episode_ids"][-1] == len(last["J"]) - 2


def test_a_policy_is_no_reward_model(capsys, tmp_path):
    policy = str(train.model_path("tiny"))
    sentence = mistake(capsys, "l2t", "--gain", "prm", "--prm", policy, "--runs_dir", str(tmp_path / "runs"))
    assert "score.weight" in sentence and not (tmp_path / "runs").exists()


@pytest.mark.slow
def test_a_round_trains_its_own_role_against_a_fresh_reference(tmp_path):
    train.main(
        parse(
            [
                "longshort",
                "--rounds",
                "LS",
                "--steps_per_round",
                "2",
                "--save_every",
                "2",
                "--problems_per_step",
                "4",
                "--group_size",
                "4",
                "--max_tokens",
                "40",
                "--eval_problems",
                "2",
                "--kl_coef",
                "0.1",
                "--lr",
                "1e-3",
                "--runs_dir",
                str(tmp_path),
                "--name",
                "run",
            ]
        )
    )
    start = load_file(train.model_path("tiny") / "model.safetensors")

    def moved(step: int, role: str) -> bool:
        weights = load_file(
            tmp_path / "run" / "checkpoints" / f"step_{step}" / f"hf_{role}" / "model.safetensors"
        )
        return any(not torch.equal(weights[name], start[name]) for name in start)

    assert [moved(2, "long"), moved(2, "short"), moved(4, "short")] == [True, False, True]
    long = [
        (tmp_path / "run" / "checkpoints" / f"step_{step}" / "hf_long" / "model.safetensors").read_bytes()
        for step in (2, 4)
    ]
    assert long[0] == long[1], "the frozen partner stays as it is"
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [row["round"] for row in rows] == [1, 1, 2, 2]
    assert [row["kl"] > 0 for row in rows] == [False, True, False, True], "each round begins at its reference"
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary.keys() >= {"before", "L1⊗S0", "after"} and summary["after"]["turns"]["max"] <= 5


@pytest.mark.slow
def test_rounds_begin_at_their_reference_and_saving_changes_nothing(tmp_path):
    """With and without a checkpoint between the rounds: the same steps, the same weights."""
    runs = []
    for save_every in ("0", "2"):
        train.main(
            parse(
                [
                    "longshort",
                    "--rounds",
                    "LLS",
                    "--steps_per_round",
                    "2",
                    "--save_every",
                    save_every,
                    "--kl_coef",
                    "0.1",
                    "--problems_per_step",
                    "4",
                    "--group_size",
                    "4",
                    "--max_tokens",
                    "40",
                    "--eval_problems",
                    "0",
                    "--lr",
                    "1e-3",
                    "--runs_dir",
                    str(tmp_path),
                    "--name",
                    save_every,
                ]
            )
        )
        rows = [
            json.loads(line) for line in (tmp_path / save_every / "metrics.jsonl").read_text().splitlines()
        ]
        assert [row["kl"] > 0 for row in rows] == [False, True] * 3
        runs.append([(row["loss"], row["grad_norm"], row["kl"]) for row in rows])
        last = tmp_path / save_every / "checkpoints" / "step_6"
        runs[-1] += [
            load_file(last / f"hf_{role}" / "model.safetensors")["lm_head.weight"]
            for role in ("long", "short")
        ]
    for one, other in zip(*runs):
        assert torch.equal(one, other) if torch.is_tensor(one) else one == other


@pytest.mark.slow
def test_a_step_in_which_the_trained_role_never_speaks(tmp_path):
    train.main(
        parse(
            [
                "longshort",
                "--rounds",
                "S",
                "--steps_per_round",
                "1",
                "--max_tokens",
                "2",
                "--partner_max_tokens",
                "2",
                "--problems_per_step",
                "2",
                "--group_size",
                "2",
                "--eval_problems",
                "0",
                "--runs_dir",
                str(tmp_path),
                "--name",
                "run",
            ]
        )
    )
    row = json.loads((tmp_path / "run" / "metrics.jsonl").read_text())
    assert row["turns"] == 1 and row["loss"] == 0 and row["grad_norm"] == 0


@pytest.mark.slow
def test_what_a_kill_left_out_is_made_up(tmp_path):
    """Killed after a step was saved: its evaluation, and for a finished run the numbers of its last step."""
    options = [
        "grpo",
        "--steps",
        "3",
        "--save_every",
        "1",
        "--eval_every",
        "1",
        "--problems_per_step",
        "2",
        "--group_size",
        "2",
        "--max_tokens",
        "20",
        "--eval_problems",
        "2",
        "--runs_dir",
        str(tmp_path),
        "--name",
        "run",
        "--keep_optimizer",
    ]
    train.main(parse(options))
    run = tmp_path / "run"
    whole = json.loads((run / "summary.json").read_text())
    assert whole.keys() == {"before", "step_1", "step_2", "after"}
    (run / "latest").write_text("step_2\n")
    (run / "summary.json").write_text(json.dumps({key: whole[key] for key in ("before", "step_1")}))
    train.main(parse([*options, "--resume", "auto"]))
    assert json.loads((run / "summary.json").read_text()) == whole

    rows = [{"prompt": f"{i}+1?", "response": f"<answer>{i + 1}</answer>"} for i in range(8)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    options = [
        "sft",
        "--data",
        str(tmp_path / "rows.jsonl"),
        "--steps",
        "2",
        "--problems_per_step",
        "4",
        "--runs_dir",
        str(tmp_path),
        "--name",
        "sft",
        "--keep_optimizer",
    ]
    train.main(parse(options))
    whole = json.loads((tmp_path / "sft" / "summary.json").read_text())
    (tmp_path / "sft" / "summary.json").unlink()
    train.main(parse([*options, "--resume", "auto"]))
    assert json.loads((tmp_path / "sft" / "summary.json").read_text()) == whole

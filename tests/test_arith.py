"""The built-in task: what the teacher claims is true, the held-out set stays out, and the shipped folder
is what make writes.
"""

import json
import random
import re
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer

import thinkrl.arith as arith
from thinkrl.assets.tiny import make
from thinkrl.types import Problem, UserError

TINY = Path(make.__file__).parent
STEP = re.compile(r"(\d+)([+*])(\d+)=(\d+)")
PERFECT = arith.Teacher(misjudge=(0, 0, 0), slip=0)
STRAIGHT = arith.Teacher(
    decompose=(1, 1),
    misjudge=(0, 0, 0),
    slip=0,
    empty=0,
    opening=0,
    idle_middle=0,
    idle_last=0,
    again_steps=0,
    force=0,
)


def product(a: int, b: int) -> Problem:
    return Problem(0, f"{a}*{b}?", str(a * b), level=arith.LEVELS[len(str(a)) - 1])


def true(step: str) -> bool:
    x, operator, y, value = STEP.fullmatch(step).groups()
    return int(value) == (int(x) * int(y) if operator == "*" else int(x) + int(y))


def test_a_straight_chain_reads_as_the_docstring_says():
    assert arith.chain(product(374, 6), random.Random(0), STRAIGHT) == (
        "<think><episode_1>300*6=1800</episode_1><episode_2>70*6=420</episode_2><episode_3>1800+420=2220</episode_3>"
        "<episode_4>4*6=24</episode_4><episode_5>2220+24=2244</episode_5></think><answer>2244</answer>"
    )
    assert arith.episodes(product(304, 6), random.Random(0), STRAIGHT)[0] == [
        "300*6=1800",
        "4*6=24",
        "1800+24=1824",
    ]
    assert arith.episodes(product(7, 8), random.Random(0), STRAIGHT) == (["7*8=56"], "56")


@given(st.integers(2, 999), st.integers(2, 9), st.integers(0, 10**6))
def test_a_teacher_that_does_not_err_writes_only_true_steps(a, b, seed):
    text = arith.chain(product(a, b), random.Random(seed), PERFECT)
    assert all(true(match.group()) for match in STEP.finditer(text)) and " no" not in text
    assert text.endswith(f"</think><answer>{a * b}</answer>")


@given(st.integers(2, 999), st.integers(2, 9), st.integers(0, 10**6))
def test_checks_are_right_even_where_steps_are_wrong(a, b, seed):
    clumsy = arith.Teacher(misjudge=(0.5, 0.5, 0.5), slip=0.5)
    thoughts, answer = arith.episodes(product(a, b), random.Random(seed), clumsy)
    assert len(thoughts) <= arith.LONGEST_CHAIN
    for thought in thoughts:
        if thought.startswith("check "):
            _, step, verdict = thought.split(" ")
            assert true(step) == (verdict == "ok")
        elif thought != "wait" and not thought.startswith(("recall ", "so ")):
            assert STEP.fullmatch(thought)
    values = [t.split("=")[1] for t in thoughts if STEP.fullmatch(t)]
    assert not values or values[-1] == answer  # the answer is what the thinking came to, right or wrong


def test_the_teacher_errs_as_often_as_it_is_told_to():
    hard = [p for p in (arith.training_problem(0, i) for i in range(3000)) if p.level == "3 digits"]
    glance = arith.Teacher(decompose=(0, 0), empty=0, again_glance=0)
    right = sum(arith.episodes(p, random.Random(i), glance)[1] == p.answer for i, p in enumerate(hard)) / len(
        hard
    )
    # misjudge is 0.45 at three digits; five standard errors of 1800 draws are 0.06
    assert abs(right - 0.55) < 0.05


def test_training_never_meets_a_held_out_product():
    kept = {p.question for p in arith.heldout(500)}
    assert len(kept) == 500
    drawn = [arith.training_problem(seed, i) for seed in (0, 1) for i in range(4000)]
    assert not kept & {p.question for p in drawn}
    assert not any(arith.is_heldout(*arith.operands(p)) for p in drawn)
    assert all(arith.is_heldout(*arith.operands(p)) for p in arith.heldout(500))


def test_problem_i_of_a_stream_is_the_same_wherever_it_is_asked_for():
    forwards = [arith.training_problem(7, i) for i in range(50)]
    assert [arith.training_problem(7, i) for i in reversed(range(50))] == forwards[::-1]
    assert forwards != [arith.training_problem(8, i) for i in range(50)]
    assert arith.training_problem(7, 3).id == 3
    assert [p.question for p in arith.heldout(3)] == [p.question for p in arith.heldout(3)]


def test_levels_say_the_digits_and_come_in_their_shares():
    problems = [arith.training_problem(3, i) for i in range(4000)]
    assert all(p.level[0] == str(len(p.question.split("*")[0])) for p in problems)
    assert all(int(p.answer) == arith.operands(p)[0] * arith.operands(p)[1] for p in problems)
    counts = Counter(p.level for p in problems)
    assert all(abs(counts[level] / 4000 - share) < 0.04 for level, share in zip(arith.LEVELS, arith.SHARES))
    kept = Counter(p.level for p in arith.heldout(500))
    assert sum(kept.values()) == 500 and set(kept) == set(arith.LEVELS)


@pytest.mark.parametrize("n", [0, 1, 7, 100, 499, 1500])
def test_heldout_gives_as_many_as_asked_for(n):
    problems = arith.heldout(n)
    assert len({p.question for p in problems}) == n and [p.id for p in problems] == list(range(n))


def test_more_than_is_held_out_is_refused():
    with pytest.raises(UserError, match="held-out problems, asked for 9999"):
        arith.heldout(9999)


def test_rows_answer_after_cut_thinking_with_the_gold_alone():
    rows = list(arith.sft_rows(5, 2000))
    assert rows[:20] == list(arith.sft_rows(5, 20))
    forced = [row for row in rows if not row["response"].startswith("<think>")]
    assert abs(len(forced) / 2000 - arith.TEACHER.force) < 0.05
    for row in forced:
        a, b, rest = re.fullmatch(r"(\d+)\*(\d+)\?<think>(.*)</think><answer>", row["problem"]).groups()
        assert row["response"] == f"{int(a) * int(b)}</answer>"
        assert rest == "" or rest.endswith(">")
    assert all(re.fullmatch(r"\d+\*\d+\?", row["problem"]) for row in rows if row not in forced)


def test_every_tag_and_word_is_one_token_and_chains_survive_the_round_trip():
    tokenizer = Tokenizer.from_file(str(TINY / "tokenizer.json"))
    for piece in make.VOCABULARY:
        assert tokenizer.encode(piece).ids == [make.VOCABULARY.index(piece)]
    assert f"</episode_{arith.MAX_EPISODES}>" in make.VOCABULARY
    for i in range(300):
        text = arith.chain(arith.training_problem(1, i), random.Random(i)) + "\n\n<|long|><|short|></rethink>"
        encoded = tokenizer.encode(text)
        assert make.VOCABULARY.index(make.UNK) not in encoded.ids
        assert tokenizer.decode(encoded.ids, skip_special_tokens=False) == text
        assert len(encoded.ids) < 200
    assert tokenizer.encode("4x6").tokens == ["4", make.UNK, "6"]


def test_the_shipped_folder_is_small_and_is_what_make_describes(tmp_path):
    assert sum(file.stat().st_size for file in TINY.iterdir() if file.is_file()) <= 4 * 2**20
    make.write_folder(tmp_path, make.random_weights())
    for file in tmp_path.glob("*.json"):
        assert json.loads((TINY / file.name).read_text()) == json.loads(file.read_text()), file.name


def test_transformers_loads_the_shipped_folder_and_it_thinks():
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model, report = AutoModelForCausalLM.from_pretrained(TINY, output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"]
    tokenizer = AutoTokenizer.from_pretrained(TINY)
    messages = [{"role": "system", "content": "ignored"}, {"role": "user", "content": "7*8?"}]
    assert tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True) == "7*8?"
    ids = tokenizer("7*8?", return_tensors="pt").input_ids
    assert ids.tolist() == [[make.VOCABULARY.index(c) for c in "7*8?"]]
    out = model.generate(ids, do_sample=False, max_new_tokens=100)
    text = tokenizer.decode(out[0], skip_special_tokens=False)
    assert re.fullmatch(
        r"7\*8\?<think>(<episode_\d+>[^<]+</episode_\d+>)*</think><answer>56</answer><\|eos\|>", text
    ), text

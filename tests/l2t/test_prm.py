import json
import math
from dataclasses import replace

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

import train
from helpers import ID, PIECES, PRM_CONFIG, V, random_prm, write_tokenizer
from thinkrl.checkpoint import save_hf
from thinkrl.config import parse
from thinkrl.distributed import shard, start, stop
from thinkrl.l2t import prm_training
from thinkrl.l2t.prm import (
    StepRewardModel,
    load_prm,
    new_prm,
    require_context,
    require_same_ids,
    retokenize,
    save_prm,
    score_completions,
)
from thinkrl.l2t.prm_training import (
    label_positions,
    labelled_rollout,
    pack_loss,
    prefix_labels,
    prm_loss,
    samples,
)
from thinkrl.model import Transformer
from thinkrl.sampler import Sampler
from thinkrl.tokenizer import Tokenizer
from thinkrl.types import Problem, Trajectory, Turn, UserError, empty_pack, pack


def ids(text: str) -> list[int]:
    return [ID[piece] for piece in text.split()]


@pytest.fixture
def tokenizer(tmp_path):
    return write_tokenizer(tmp_path / "tokenizer")


def p_positive(model: StepRewardModel, tokens: list[int]) -> float:
    """The score of one prefix, alone in its row."""
    with torch.no_grad():
        hidden = model.body(torch.tensor(tokens), torch.tensor([0, len(tokens)], dtype=torch.int32))[-1]
        return model.score(hidden).softmax(-1)[1].item()


def test_loss_by_hand():
    # P = 1/2, 3/4, 3/4
    logits = torch.tensor([[0.0, 0.0], [0.0, math.log(3)], [0.0, math.log(3)]], dtype=torch.float64)
    labels = torch.tensor([1.0, 1.0, 0.25])
    by_hand = [math.log(2), math.log(4 / 3), 0.25 * math.log(4 / 3) + 0.75 * math.log(4)]
    for n in (1, 2, 3):
        assert prm_loss(logits[:n], labels[:n], 1.0).item() == pytest.approx(sum(by_hand[:n]), rel=1e-6)
    assert prm_loss(logits, labels, 6.0).item() == pytest.approx(sum(by_hand) / 6, rel=1e-6)
    assert prm_loss(logits[:0], labels[:0], 0.0).item() == 0.0


def test_a_soft_label_is_best_met_exactly():
    label = torch.tensor([0.25])
    losses = [prm_loss(torch.tensor([[0.0, math.log(p / (1 - p))]]), label, 1.0) for p in (0.2, 0.25, 0.3)]
    assert losses[1] < losses[0] and losses[1] < losses[2]


@pytest.mark.parametrize("separator", [None, ID["<extra_0>"]])
def test_scores_in_packs_equal_each_prefix_alone(separator):
    model = random_prm(two_layers=separator is not None, separator=separator)
    prompts = [ids("a ?"), ids("b b ?"), ids("?")]
    completions = [ids("a b 4 5 a <answer> 5 </answer> <eos>"), ids("b <eos>"), ids("4 a 5 <eos>")]
    prefixes = [[0, 2, 3, 5], [0], [1, 3, 3]]
    end = [] if separator is None else [separator]

    def alone(prompt, completion, counts):
        first = p_positive(model, [*prompt, *completion[: counts[0]], *end])
        rest, row = [], [*prompt, *completion[: counts[0]]]
        for before, after in zip(counts, counts[1:]):
            row += [*completion[before:after], *end]
            rest.append(p_positive(model, row))
        return [first, *rest]

    for budget in (1, 17, 1000):
        J = score_completions(model, prompts, completions, prefixes, budget)
        for values, *attempt in zip(J, prompts, completions, prefixes):
            torch.testing.assert_close(values, torch.tensor(alone(*attempt)), atol=1e-6, rtol=1e-5)
    if separator is None:
        assert J[2][1] == J[2][2], "equal prefixes, equal scores"


@pytest.mark.parametrize("separator", [None, ID["<extra_0>"]])
def test_forwards_are_the_tokens_that_the_model_reads(separator):
    model = random_prm(two_layers=separator is not None, separator=separator)
    seen = []
    model.body.register_forward_pre_hook(lambda module, inputs: seen.append(len(inputs[0])))
    score_completions(model, [ids("a b ?")], [ids("a 4 b 5 a b <answer> 5 </answer> <eos>")], [[0, 2, 5]])
    assert model.forwards == sum(seen) == (8 if separator is None else 4 + 8 + 2), (
        "J_0's row, and a separator behind each step"
    )


def attempt(problem: Problem, prompt: str, completion: str, sample=0) -> Trajectory:
    turn = Turn("policy", ids(prompt), ids(completion), [0.0] * len(completion.split()), "stop")
    return Trajectory(problem, sample, [turn])


def bigrams(successors: dict[str, list[str]]) -> Transformer:
    """A policy in which the last token alone decides: one-hot embeddings, silent blocks, and a head that
    is a table.
    """
    model = Transformer.random(replace(PRM_CONFIG, tied=False))
    with torch.no_grad():
        for parameter in model.blocks.parameters():
            parameter.zero_()
        model.embed.weight.copy_(torch.eye(V))
        model.head.weight.zero_()
        for before, after in successors.items():
            model.head.weight[ids(" ".join(after)), ID[before]] = 10.0
    return model


SUCCESSORS = {
    "?": ["<answer>"],
    "<answer>": ["4", "5"],
    "4": ["</answer>"],
    "5": ["</answer>"],
    "</answer>": ["<eos>"],
    "a": ["a"],
}


def label(tokenizer, trajectories, prefixes, continuations):
    sampler = Sampler(bigrams(SUCCESSORS), tokenizer, num_pages=200)
    labels = prefix_labels(
        sampler,
        tokenizer,
        trajectories,
        prefixes,
        continuations=continuations,
        max_tokens=6,
        temperature=1.0,
        seed=0,
        address=(7,),
    )
    return labels, sampler


def test_labels_by_hand(tokenizer):
    problem = Problem(3, "?", "5")
    right, wrong = (attempt(problem, "?", f"a <answer> {n} </answer> <eos>", i) for i, n in enumerate("54"))
    lost = attempt(problem, "?", "b a <answer> 5 </answer> <eos>", 2)
    (J, I, L), _ = label(tokenizer, [right, wrong, lost], [[0, 3], [0, 3], [0, 2]], continuations=64)
    assert J[1] == 1.0 and I[1] == 0.0, "the answer is in the prefix"
    assert L[1] == 0.0, "behind 'a' there is nothing but 'a', up to the limit"
    # Behind '?' the policy draws 4 or 5: the share of 64 fair draws, five standard deviations wide.
    assert J[0] == I[0] == L[0] and abs(J[0] - 0.5) < 5 * 0.5 / math.sqrt(64) and (J[0] * 64) % 1 == 0


def test_equal_prefixes_are_continued_once_and_world_size_does_not_matter(tokenizer):
    problems = [Problem(3, "?", "5"), Problem(4, "?", "4")]
    trajectories = [attempt(p, "?", "a <answer> 5 </answer> <eos>", i) for p in problems for i in range(2)]
    prefixes = [[0, 1, 3]] * 4
    together, sampler = label(tokenizer, trajectories, prefixes, continuations=8)
    assert (
        sampler.forwards.decode
        == sum(  # (3 tokens up to </answer>, then <eos>; 6 times 'a'; </answer>, <eos>), 2 problems
            8 * n for n in (4, 6, 2)
        )
        * 2
    )
    apart = [label(tokenizer, trajectories[i : i + 2], prefixes[:2], continuations=8)[0] for i in (0, 2)]
    assert [x.tolist() for x in together] == [x.tolist() for part in apart for x in part]
    assert together[0][0] + together[2][0] != 1.0, "two problems with the same prompt draw differently"


def test_labels_are_drawn_at_the_completions_temperature(tokenizer):
    """4 is more likely than 5 by e: at temperature 0.05 that is certainty, at 1 three draws in four."""
    model = bigrams(SUCCESSORS)
    with torch.no_grad():
        model.head.weight[ID["5"], ID["<answer>"]] -= 1.0
    options = ["--episodes", "fixed:1", "--max_tokens", "6", "--group_size", "2", "--gain_samples", "64"]
    config = parse(["prm", "--temperature", "0.05", *options])
    _, labelled = labelled_rollout(
        Sampler(model, tokenizer, num_pages=200), [Problem(3, "?", "4")], 0, config
    )
    labels = torch.cat([sample.label for sample in labelled])
    assert (labels[~labels.isnan()] == 1).all()


@pytest.mark.slow
def test_the_loss_is_divided_by_the_labels_of_all_ranks(tmp_path, monkeypatch):
    """As if a second rank had as many: the loss that this one adds is half as large."""
    options = ["prm", "--steps", "1", "--problems_per_step", "2", "--group_size", "2", "--max_tokens", "30"]
    options += ["--gain_samples", "1", "--runs_dir", str(tmp_path)]
    for name, ranks in (("one", 1), ("two", 2)):
        monkeypatch.setattr(prm_training, "global_sum", lambda value, ranks=ranks: ranks * value)
        train.main(parse([*options, "--name", name]))
    one, two = (
        json.loads((tmp_path / name / "metrics.jsonl").read_text())["loss"] for name in ("one", "two")
    )
    assert two == pytest.approx(one / 2, rel=1e-5) and one > 0


def packed(trajectories, prefixes, labels, budget=1000):
    return pack(samples(trajectories, prefixes, labels), budget)


def test_labels_stand_at_the_ends_of_their_prefixes():
    (p,) = packed(
        [attempt(Problem(1, "", "5"), "a b ?", "a b <answer> 5 <eos>")], [[0, 2]], [torch.tensor([0.5, 0.0])]
    )
    assert p.tokens.tolist() == ids("a b ? a b"), "nothing behind the last prefix is read"
    assert label_positions(p).tolist() == [2, 4] and p.label[[2, 4]].tolist() == [0.5, 0.0]
    assert label_positions(empty_pack()).tolist() == []


def toy():
    """Right if the prefix ends in 5; J_0 of a fair coin."""
    endings = ["a 5", "b 4", "5 a 5", "5 4", "4 b 5", "4 5 4", "a a 4", "b b 5"]
    trajectories = [attempt(Problem(i, "", "5"), "a ?", e) for i, e in enumerate(endings)]
    prefixes = [[0, len(e.split())] for e in endings]
    return trajectories, prefixes, [torch.tensor([0.5, float(e.endswith("5"))]) for e in endings]


def test_a_toy_is_learned():
    trajectories, prefixes, labels = toy()
    rows = packed(trajectories, prefixes, labels)
    model = random_prm()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    first = None
    for _ in range(30):
        optimizer.zero_grad()
        loss, stats = zip(*[pack_loss(model, p, 16.0) for p in rows])
        sum(loss).backward()
        optimizer.step()
        first = first or sum(loss).item()
    # The eight J_0 are coins: the least possible loss is half of ln 2, the mean over 8 coins and 8
    # certainties.
    assert sum(loss).item() - math.log(2) / 2 < 0.02 < first - math.log(2) / 2
    assert stats[0]["label_error"][0] / stats[0]["label_error"][1] < 0.05 and stats[0]["label_error"][1] == 16
    turns = [t.turns[0] for t in trajectories]
    J = score_completions(
        model, [turn.prompt for turn in turns], [turn.completion for turn in turns], prefixes
    )
    for scores, (coin, truth) in zip(J, labels):
        assert abs(scores[0] - coin) < 0.1 and abs(scores[1] - truth) < 0.1


def gradients(model) -> dict[str, torch.Tensor]:
    grads = {name: p.grad for name, p in model.named_parameters()}
    return {name: g.full_tensor() if hasattr(g, "full_tensor") else g for name, g in grads.items()}


def test_micro_batches_do_not_matter():
    results = []
    for budget in (1, 12, 1000):
        model = random_prm()
        rows = packed(*toy(), budget)
        for p in rows:
            pack_loss(model, p, 16.0)[0].backward()
        results.append((len(rows), gradients(model)))
    assert [count for count, _ in results] == sorted({count for count, _ in results}, reverse=True)
    for _, grads in results[1:]:
        for name, g in grads.items():
            torch.testing.assert_close(g, results[0][1][name], rtol=1e-4, atol=1e-6)


def test_a_row_without_labels_reaches_every_parameter():
    model = random_prm(two_layers=True)
    pack_loss(model, empty_pack(), 5.0)[0].backward()
    assert all(g is not None and not g.any() for g in gradients(model).values())


def test_sharded_training_and_saving(tmp_path, tokenizer):
    threads = torch.get_num_threads()
    world = start("cpu")
    try:
        whole, sharded = random_prm(), shard(random_prm(), world, torch.float32)
        for model in (whole, sharded):
            for p in [*packed(*toy()), empty_pack()]:
                pack_loss(model, p, 16.0)[0].backward()
        theirs = gradients(sharded)
        for name, g in gradients(whole).items():
            torch.testing.assert_close(theirs[name], g)
        save_prm(sharded, tokenizer, tmp_path / "sharded")
    finally:
        stop()
        torch.set_num_threads(threads)
    loaded = dict(load_prm(tmp_path / "sharded").named_parameters())
    for name, parameter in whole.named_parameters():
        assert torch.equal(loaded[name], parameter), name


def test_new_prm_is_the_policy_undecided(tmp_path, tokenizer):
    policy = Transformer.random(replace(PRM_CONFIG, tied=False), seed=3)
    save_hf(policy, tokenizer, tmp_path / "policy")
    model = new_prm(tmp_path / "policy")
    tokens, cu = torch.tensor(ids("a b ? 4")), torch.tensor([0, 4], dtype=torch.int32)
    assert torch.equal(model(tokens, cu), policy(tokens, cu))
    (J,) = score_completions(model, [ids("a ?")], [ids("4 5")], [[0, 2]])
    assert J.tolist() == [0.5, 0.5]


@pytest.mark.parametrize("architecture", ["Qwen2ForCausalLM", "Qwen3ForCausalLM", "LlamaForCausalLM"])
def test_saved_and_loaded_are_equal(architecture, tmp_path, tokenizer):
    model = random_prm(config=replace(PRM_CONFIG, architecture=architecture))
    save_prm(model, tokenizer, tmp_path / "prm")
    config = json.loads((tmp_path / "prm" / "config.json").read_text())
    assert (
        config["architectures"] == [architecture.replace("CausalLM", "ProcessRewardModel")]
        and config["thinkrl_prm"] is True
    )
    assert "lm_head.weight" not in load_file(tmp_path / "prm" / "model.safetensors")
    loaded = load_prm(tmp_path / "prm")
    assert loaded.separator is None and Tokenizer(tmp_path / "prm").decode(ids("a ?")) == "a?"
    example = [ids("a ?")], [ids("a 4 5")], [[0, 1, 3]]
    assert torch.equal(score_completions(loaded, *example)[0], score_completions(model, *example)[0])


@pytest.fixture
def qwen_prm(tmp_path):
    """A folder as Qwen2.5-Math-PRM is laid out: body by transformers, score.0 and score.2, an lm_head
    nobody needs.
    """
    folder = tmp_path / "qwen"
    write_tokenizer(folder)
    torch.manual_seed(1)
    config = transformers.Qwen2Config(
        vocab_size=V,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=128,
    )
    body = transformers.Qwen2Model(config).eval()
    score = torch.nn.Sequential(torch.nn.Linear(16, 16), torch.nn.ReLU(), torch.nn.Linear(16, 2))
    with torch.no_grad():
        for parameter in [*body.parameters(), *score.parameters()]:
            parameter.add_(0.3 * torch.randn_like(parameter))
    tensors = {f"model.{name}": t.clone() for name, t in body.state_dict().items()} | {
        "lm_head.weight": torch.randn(V, 16)
    }
    save_file(
        tensors | {f"score.{name}": t.clone() for name, t in score.state_dict().items()},
        folder / "model.safetensors",
        metadata={"format": "pt"},
    )
    raw = json.loads(config.to_json_string(use_diff=False)) | {
        "architectures": ["Qwen2ForProcessRewardModel"]
    }
    (folder / "config.json").write_text(json.dumps(raw))
    return folder, body, score


def test_a_separator_model_scores_as_its_authors_do(qwen_prm):
    folder, body, score = qwen_prm
    model = load_prm(folder)
    assert model.separator == ID["<extra_0>"]
    conversation = ids("a b ? a 4 <extra_0> b 5 a <extra_0> b <extra_0>")
    with torch.no_grad():
        at = torch.tensor(conversation) == ID["<extra_0>"]
        expected = score(body(torch.tensor([conversation])).last_hidden_state[0, at]).softmax(-1)[:, 1]
    (J,) = score_completions(model, [ids("a b ?")], [ids("a 4 b 5 a b <eos>")], [[0, 2, 5, 6]])
    torch.testing.assert_close(J[1:], expected, atol=1e-5, rtol=1e-4)
    assert J[0] == pytest.approx(p_positive(model, ids("a b ? <extra_0>")), abs=1e-6)
    assert expected.max() - expected.min() > 1e-3


def test_a_separator_model_survives_saving(qwen_prm, tmp_path):
    folder, _, _ = qwen_prm
    model = load_prm(folder)
    save_prm(model, Tokenizer(folder), tmp_path / "again")
    again = load_prm(tmp_path / "again")
    assert again.separator == model.separator
    assert all(torch.equal(a, b) for a, b in zip(again.parameters(), model.parameters(), strict=True))


def test_retelling_leaves_the_tags_out(tokenizer):
    prompt, completion, prefixes = retokenize("a?", ["<episode_1> 4\n</episode_1>", "b 5"], tokenizer, 128)
    assert tokenizer.decode(prompt).endswith("a?")
    assert (tokenizer.decode(completion), prefixes) == ("4b 5", [0, 1, 4])


def test_what_reaches_beyond_the_context_is_not_told(tokenizer):
    steps = ["4", "b 5", "a", "b"]
    prompt, *whole = retokenize("a?", steps, tokenizer, 128)
    assert whole[1] == [0, 1, 4, 5, 6]
    for context, told in ((10, 4), (9, 3), (8, 3), (7, 2), (6, 2), (5, 1), (2, 1), (1, 0)):
        _, completion, prefixes = retokenize("a?", steps, tokenizer, len(prompt) + context)
        assert (completion, prefixes) == (whole[0][: prefixes[-1]], whole[1][: told + 1]), (
            "with its separators it must fit"
        )


def test_foreign_ids_are_refused(tmp_path, tokenizer):
    require_same_ids(tokenizer, tokenizer)
    for pieces in (PIECES[::-1], PIECES[:-1]):
        with pytest.raises(
            UserError, match="decodes ids differently from the policy .*: (id 0 is '<eos>' and|13 and 12 ids)"
        ):
            require_same_ids(tokenizer, write_tokenizer(tmp_path / "foreign", pieces))


@pytest.mark.parametrize("separator, needed", [(None, 2 + 30), (ID["<extra_0>"], 3 + 1)])
def test_a_short_context_is_refused(separator, needed, tokenizer):
    """The ids' reader needs room for a whole completion; told in its own words, "a\n?" is three tokens
    without the prompt's.
    """
    problems, prompts = [Problem(0, "", "5"), Problem(7, "a\n?", "5")], [ids("a"), ids("a ?")]
    needed += len(retokenize("", [], tokenizer, 128)[0]) if separator is not None else 0
    for context in (needed, needed - 1):
        model = random_prm(separator=separator, config=replace(PRM_CONFIG, max_positions=context))
        if context == needed:
            require_context(model, tokenizer, problems, prompts, 30)
            continue
        with pytest.raises(UserError, match=f"problem 7 .* exceed the reward model's context of {context}"):
            require_context(model, tokenizer, problems, prompts, 30)


def test_mistakes_are_named(qwen_prm, tmp_path, tokenizer):
    folder, _, _ = qwen_prm
    tensors = load_file(folder / "model.safetensors")

    def without(*names):
        save_file({k: v for k, v in tensors.items() if k not in names}, folder / "model.safetensors")

    save_hf(Transformer.random(PRM_CONFIG), tokenizer, tmp_path / "policy")
    with pytest.raises(
        UserError, match="policy: tensor score.weight .* is missing, so this is not a step reward model"
    ):
        load_prm(tmp_path / "policy")
    without("score.2.bias")
    with pytest.raises(UserError, match="qwen: tensor score.2.bias of shape .2. is missing"):
        load_prm(folder)
    without("model.norm.weight")
    with pytest.raises(UserError, match="tensor model.norm.weight of shape .16. is missing"):
        load_prm(folder)
    without()
    write_tokenizer(folder, [piece for piece in PIECES if piece != "<extra_0>"])
    with pytest.raises(UserError, match="its tokenizer has no token <extra_0>"):
        load_prm(folder)
    with pytest.raises(UserError, match="nowhere/config.json: file not found"):
        load_prm(tmp_path / "nowhere")

import copy
import json
from itertools import pairwise

import pytest
import tokenizers
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import decoders, models

from thinkrl.checkpoint import load_model
from thinkrl.decode.paged_model import rectangle
from thinkrl.distributed import shard, start, stop, whole
from thinkrl.model import ModelConfig, Transformer
from thinkrl.sampler import Sampler
from thinkrl.tokenizer import Tokenizer
from thinkrl.types import UserError

V = 97
PROMPTS = [[1, 2, 3], [5] * 17, [7], list(range(33)), list(range(40, 56))]


def random_model(layers=2, seed=0, scale=3.0, vocab=V, family="Qwen2"):
    """Weights large enough that the next token depends on the context."""
    config = ModelConfig(
        f"{family}ForCausalLM",
        vocab_size=vocab,
        width=32,
        layers=layers,
        heads=6,
        kv_heads=2,
        head_dim=8,
        mlp_width=48,
        max_positions=256,
    )
    model = Transformer.random(config, seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(scale)
    return model


@pytest.fixture(scope="module")
def model():
    return random_model()


@torch.no_grad()
def full_forward(model, tokens, temperature=1.0):
    """Log-probs [T] and predicting hidden states [T, D] of one sequence; index 0 is of token 1."""
    tokens = torch.tensor(tokens)
    hidden = model(tokens, torch.tensor([0, len(tokens)], dtype=torch.int32))[:-1]
    logprobs = (model.logits(hidden) / temperature).log_softmax(-1)
    return logprobs.gather(1, tokens[1:, None])[:, 0], hidden


@torch.no_grad()
def last_hidden(model, tokens):
    """Hidden state [D] of a sequence's last token."""
    return model(torch.tensor(tokens), torch.tensor([0, len(tokens)], dtype=torch.int32))[-1]


def tokens_of(groups):
    return [[completion.tokens for completion in group] for group in groups]


@pytest.mark.parametrize("family", ["Qwen2", "Llama"])
def test_greedy_equals_transformers(family, tmp_path):
    import transformers

    torch.manual_seed(0)
    sizes = dict(
        vocab_size=V, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        intermediate_size=48, max_position_embeddings=128, initializer_range=0.5,
        eos_token_id=None, bos_token_id=None, pad_token_id=None,
    )  # fmt: skip
    config = getattr(transformers, family + "Config")(**sizes)
    theirs = getattr(transformers, family + "ForCausalLM")(config).eval()
    theirs.save_pretrained(tmp_path)
    sampler = Sampler(load_model(tmp_path), num_pages=60, max_rows=3)
    ours = sampler.generate(PROMPTS, max_tokens=40, temperature=0)
    for prompt, [completion] in zip(PROMPTS, ours):
        ids = torch.tensor([prompt])
        expected = theirs.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=40, do_sample=False
        )[0, len(prompt) :]
        assert completion.tokens == expected.tolist()
    assert len({token for [completion] in ours for token in completion.tokens}) > 20, (
        "constant text would prove little"
    )


def test_a_limit_for_each_prompt(model):
    whole, limits = Sampler(model, num_pages=100, max_rows=3), [1, 9, 4, 2, 20]
    full = whole.generate(PROMPTS, n=2, max_tokens=20, stop_ids=[])
    cut = Sampler(model, num_pages=100, max_rows=3).generate(PROMPTS, n=2, max_tokens=limits, stop_ids=[])
    assert tokens_of(cut) == [[c.tokens[:most] for c in group] for group, most in zip(full, limits)]
    assert {c.finish_reason for group in cut for c in group} == {"length"}


def test_logprobs_and_hidden_states_are_those_of_a_packed_forward(model):
    groups = Sampler(model, num_pages=100).generate(
        PROMPTS, n=2, max_tokens=20, temperature=0.7, return_hidden=True
    )
    for prompt, group in zip(PROMPTS, groups):
        for completion in group:
            logprob, hidden = full_forward(model, prompt + completion.tokens, 0.7)
            torch.testing.assert_close(
                torch.tensor(completion.logprobs), logprob[len(prompt) - 1 :], atol=1e-5, rtol=0
            )
            torch.testing.assert_close(completion.hidden, hidden[len(prompt) - 1 :], atol=1e-4, rtol=0)
            assert not completion.hidden.is_inference()


@pytest.mark.parametrize("changed", ["blocks.0.qkv.weight", "blocks.1.down.weight", "head.weight"])
def test_changed_weights_are_packed_anew(changed, monkeypatch):
    """Those of a model that the caller shares with the sampler, between two calls."""
    monkeypatch.setattr("thinkrl.model.PACKED_FROM", 0)
    model = random_model()
    sampler = Sampler(model, num_pages=20)

    def greedy(sampler: Sampler) -> list[float]:
        [[completion]] = sampler.generate([[1, 2, 3]], max_tokens=5, temperature=0, stop_ids=[])
        return completion.logprobs

    before, packed = greedy(sampler), sampler.paged.packed
    assert greedy(sampler) == before and sampler.paged.packed is packed
    with torch.no_grad():
        model.get_parameter(changed).mul_(2)
    assert greedy(sampler) == greedy(Sampler(model, num_pages=20)) != before


@pytest.mark.parametrize("family", ["Qwen2", "Qwen3", "Llama"])
def test_a_decode_step_is_a_forward_with_attention_over_pages(family, monkeypatch):
    """Three sequences of 5, 17 and 32 tokens, and one token more of each: at a page's start, inside, at its
    end. Each way rounds at most twice as much as a forward without pages does, against float64.
    """
    monkeypatch.setattr("thinkrl.model.PACKED_FROM", 0)
    model = random_model(family=family)
    sampler = Sampler(model, num_pages=20)
    sequences = [sampler.prefill(list(range(n, 2 * n))) for n in (6, 17, 33)]
    for pages in sequences:
        pages.reserve(pages.filled + 1)
    table = torch.tensor(rectangle([pages.table for pages in sequences]), dtype=torch.int32)
    token, position = torch.tensor([[pages.tokens[-1], pages.filled] for pages in sequences]).T.contiguous()
    before = sampler.pool.storage.clone()
    with torch.inference_mode():
        sampler.paged.pack_weights()
        fast = sampler.paged.decode(token, position, table)
        stored = sampler.pool.storage.clone()
        sampler.pool.storage.copy_(before)
        slow = sampler.paged.forward([(pages, pages.unfed) for pages in sequences])
    exact, plain = (
        torch.stack([last_hidden(each, pages.tokens) for pages in sequences])
        for each in (copy.deepcopy(model).double(), model)
    )
    rounding = (plain - exact).abs().max()
    for hidden in (fast, slow):
        assert (hidden - exact).abs().max() <= 2 * rounding
    torch.testing.assert_close(stored, sampler.pool.storage, atol=2 * float(rounding), rtol=0)


def test_greedy_logprobs_are_at_temperature_one(model):
    [[completion]] = Sampler(model, num_pages=10).generate([[1, 2]], max_tokens=5, temperature=0)
    logprob, _ = full_forward(model, [1, 2, *completion.tokens])
    torch.testing.assert_close(torch.tensor(completion.logprobs), logprob[1:], atol=1e-5, rtol=0)


def test_first_tokens_follow_the_models_distribution(model):
    [group] = Sampler(model, num_pages=300).generate([[3, 1]], n=2000, max_tokens=1)
    counts = torch.bincount(torch.tensor([completion.tokens[0] for completion in group]), minlength=V)
    with torch.no_grad():
        probability = model.logits(model(torch.tensor([3, 1]), torch.tensor([0, 2], dtype=torch.int32)))[
            -1
        ].softmax(-1)
    error = (counts / 2000 - probability).abs()
    assert (error < 5 * (probability * (1 - probability) / 2000).sqrt() + 1e-3).all()


def test_a_prompt_is_prefilled_once_and_its_full_pages_are_shared(model):
    """64 prompt tokens: 63 are prefilled into 4 pages, 3 of them full. 8 samples of 4 tokens add at most
    two each.
    """
    sampler = Sampler(model, num_pages=3 + 1 + 8 * 2)
    prompt = [t % V for t in range(64)]
    [group] = sampler.generate([prompt], n=8, max_tokens=4)
    assert (sampler.forwards.prefill, sampler.forwards.decode) == (63, 8 * 4)
    assert len({tuple(completion.tokens) for completion in group}) > 1


@pytest.mark.slow
@pytest.mark.parametrize("num_pages, max_rows", [(6, 8), (7, 3), (10, 16)])
def test_preemption_recomputes_the_same_tokens(model, num_pages, max_rows):
    roomy = Sampler(model, num_pages=200)
    tight = Sampler(model, num_pages=num_pages, max_rows=max_rows)
    options = dict(n=3, max_tokens=60, seed=5, return_hidden=True)
    expected, groups = roomy.generate(PROMPTS, **options), tight.generate(PROMPTS, **options)
    assert tokens_of(groups) == tokens_of(expected)
    assert tight.forwards.prefill > roomy.forwards.prefill, "nothing was preempted: the test shows nothing"
    assert tight.pool.free_pages == num_pages
    for group, other in zip(groups, expected):
        for a, b in zip(group, other):
            torch.testing.assert_close(a.hidden, b.hidden, atol=1e-4, rtol=0)
            assert a.logprobs == pytest.approx(b.logprobs, abs=1e-5)


@pytest.mark.slow
def test_a_trajectory_does_not_depend_on_its_neighbours(model):
    keys = [(0, p, s) for p in range(len(PROMPTS)) for s in range(2)]
    together = Sampler(model, num_pages=200).generate(PROMPTS, n=2, max_tokens=30, seed=3, keys=keys)
    one_by_one = Sampler(model, num_pages=200, max_rows=1)
    for p, prompt in enumerate(PROMPTS):
        for s in range(2):
            [[alone]] = one_by_one.generate([prompt], max_tokens=30, seed=3, keys=[(0, p, s)])
            assert alone.tokens == together[p][s].tokens
    others = Sampler(model, num_pages=200).generate(PROMPTS, n=2, max_tokens=30, seed=4, keys=keys)
    assert tokens_of(others) != tokens_of(together), "the seed is part of the address"


def test_stop_ids_and_the_limit(model):
    sampler = Sampler(model, num_pages=100)
    free = sampler.generate(PROMPTS, n=4, max_tokens=24)
    stopped = sampler.generate(PROMPTS, n=4, max_tokens=24, stop_ids=[11, 12, 13, 14])
    reasons = set()
    for a, b in zip(sum(free, []), sum(stopped, [])):
        hits = [i for i, token in enumerate(a.tokens) if token in (11, 12, 13, 14)]
        assert b.tokens == a.tokens[: hits[0] + 1 if hits else 24], "up to the first stop id, which is kept"
        assert b.finish_reason == ("stop" if hits else "length") and len(b.logprobs) == len(b.tokens)
        reasons.add(b.finish_reason)
        assert a.finish_reason == "length"
    assert reasons == {"stop", "length"}


PIECES = ["<", "/", "th", "ink", ">", ">\n", "a", "b", "</think", "x>y", " ", "é"]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    """One id per piece, no merges, so that a test can say which pieces a completion is made of."""
    folder = tmp_path_factory.mktemp("tokenizer")
    raw = tokenizers.Tokenizer(models.BPE({piece: i for i, piece in enumerate(PIECES)}, []))
    raw.decoder = decoders.Fuse()
    raw.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({}))
    return Tokenizer(folder)


def scripted(*words):
    """A model that continues each word's first piece with its second and so on, at probability ~1: a chain
    per word.
    """
    config = ModelConfig(
        "LlamaForCausalLM",
        vocab_size=len(PIECES),
        width=len(PIECES),
        layers=1,
        heads=1,
        kv_heads=1,
        head_dim=2,
        mlp_width=2,
        max_positions=64,
    )
    model = Transformer.random(config)
    with torch.no_grad():
        model.blocks[0].o.weight.zero_()
        model.blocks[0].down.weight.zero_()
        model.embed.weight.copy_(torch.eye(len(PIECES)))
        model.head.weight.zero_()
        for word in words:
            for piece, following in zip(word, word[1:]):
                model.head.weight[PIECES.index(following), PIECES.index(piece)] = 10.0
    return model


@pytest.mark.parametrize(
    "word, stops, kept",
    [
        # the newline rides along in the last piece
        (["a", "<", "/", "th", "ink", ">\n", "b"], ["</think>"], 5),
        (["a", "</think", "x>y", "b"], ["</thinkx>", "zz"], 2),  # ends inside a piece
        (["a", "<", "/", "th", "ink", "b", ">", " "], ["</think>"], 8),  # not the string: runs to the limit
        (["a", "b", "<", "/", "th"], ["/", "ab"], 3),  # several: the first to be completed
        (["a", " ", "é", "b", "x>y"], ["é"], 2),
    ],
)
def test_stop_strings_straddle_tokens(tokenizer, word, stops, kept):
    sampler = Sampler(scripted(word), tokenizer, num_pages=8)
    prompt = [PIECES.index(word[0])]
    [[completion]] = sampler.generate([prompt], max_tokens=8, temperature=0, stop=stops)
    assert len(completion.tokens) == kept
    assert [PIECES[t] for t in completion.tokens[: len(word) - 1]] == word[1 : 1 + kept]
    assert completion.finish_reason == ("stop" if kept < 8 else "length")


def test_a_stop_string_is_found_across_a_preemption(tokenizer):
    chain = ["a", "b", " ", "<", "/", "th", "ink", ">", "é"]
    alone = Sampler(scripted(chain), tokenizer, num_pages=8, page_size=2)
    tight = Sampler(scripted(chain), tokenizer, num_pages=5, page_size=2)
    options = dict(max_tokens=9, temperature=0, stop=["</think>"])
    prompts = [[PIECES.index("a")], [PIECES.index("b")]]
    expected = tokens_of(alone.generate(prompts[:1], **options) + alone.generate(prompts[1:], **options))
    assert tokens_of(tight.generate(prompts, **options)) == expected
    assert [len(tokens) for [tokens] in expected] == [7, 6] and tight.forwards.prefill > 0


@pytest.mark.slow
def test_probes_equal_full_forwards_at_a_fraction_of_their_cost():
    """K = 10 episodes of 100 tokens behind a prompt of 100, probes of 25 tokens."""
    config = ModelConfig(
        "Qwen2ForCausalLM",
        vocab_size=V,
        width=16,
        layers=1,
        heads=2,
        kv_heads=1,
        head_dim=8,
        mlp_width=16,
        max_positions=2048,
    )
    model = Transformer.random(config)
    sampler = Sampler(model, num_pages=200)
    prompt, suffix = [t % V for t in range(100)], [(7 * t) % V for t in range(25)]
    cuts = [100 + 100 * k for k in range(11)]
    held = []

    def keep(completion, pages):
        held.extend(pages.fork(cut) for cut in cuts)

    [[completion]] = sampler.generate([prompt], max_tokens=1000, on_finish=keep)
    trunk = sampler.forwards.prefill + sampler.forwards.decode
    scores = sampler.score(held, [suffix] * 11)
    probes = sampler.forwards.probe
    full = sum(cut + 25 for cut in cuts)
    assert (trunk, probes, full) == (99 + 1000, 11 * 25, 6875)
    assert full >= 5 * (trunk + probes)
    assert sampler.pool.free_pages == 200
    for cut, score in zip(cuts, scores):
        expected, _ = full_forward(model, (prompt + completion.tokens)[:cut] + suffix)
        torch.testing.assert_close(score, expected[-25:], atol=1e-5, rtol=0)


def test_probes_inside_the_callback_while_others_still_decode(model):
    sampler = Sampler(model, num_pages=14, max_rows=8, max_tokens_per_forward=30)
    scores = {}

    def probe(completion, pages):
        cuts = [len(PROMPTS[completion.prompt]), len(pages.tokens)]
        scores[completion.prompt] = sampler.score([pages.fork(cut) for cut in cuts], [[9, 8, 7], [6]])

    expected = Sampler(model, num_pages=200).generate(PROMPTS, max_tokens=40, stop_ids=[3, 4, 5])
    groups = sampler.generate(PROMPTS, max_tokens=40, stop_ids=[3, 4, 5], on_finish=probe)
    assert tokens_of(groups) == tokens_of(expected)
    for p, (first, last) in scores.items():
        torch.testing.assert_close(
            first, full_forward(model, PROMPTS[p] + [9, 8, 7])[0][-3:], atol=1e-5, rtol=0
        )
        whole = PROMPTS[p] + groups[p][0].tokens
        torch.testing.assert_close(last, full_forward(model, whole + [6])[0][-1:], atol=1e-5, rtol=0)
    assert len(scores) == len(PROMPTS) and sampler.pool.free_pages == 14


def test_continuations_start_from_forked_pages(model):
    sampler = Sampler(model, num_pages=100)
    prompt = [t % V for t in range(50)]
    trunk = sampler.prefill(prompt)
    thought = sampler.prefill([4, 5, 6], prefix=trunk)
    assert sampler.forwards.prefill == 49 + 3
    options = dict(n=3, max_tokens=10, seed=1)
    continued = sampler.generate([[], [8]], prefix=[thought, trunk], **options)
    assert sampler.forwards.prefill == 49 + 3 + 0 + 1
    thought.release()
    trunk.release()
    assert sampler.pool.free_pages == 100
    assert tokens_of(continued) == tokens_of(sampler.generate([[*prompt, 4, 5, 6], [*prompt, 8]], **options))


@pytest.mark.parametrize("stop", [[], ["b</", "/th"]])
def test_a_host_that_looks_rarely_sees_the_same(tokenizer, stop):
    """As on a GPU: rows that ended go on standing still until the next look."""
    model = random_model(vocab=len(PIECES))
    every_step, rarely = (Sampler(model, tokenizer, num_pages=30, max_rows=5) for _ in range(2))
    rarely.look_every = 8
    options = dict(n=4, max_tokens=21, stop=stop, stop_ids=[3], return_hidden=True)
    prompts = [[1, 2], [5] * 17, list(range(11))]
    expected, groups = every_step.generate(prompts, **options), rarely.generate(prompts, **options)
    assert tokens_of(groups) == tokens_of(expected)
    for a, b in zip(sum(groups, []), sum(expected, [])):
        assert a.finish_reason == b.finish_reason and len(a.hidden) == len(a.tokens)
        torch.testing.assert_close(a.hidden, b.hidden, atol=1e-4, rtol=0)
    assert {completion.finish_reason for group in groups for completion in group} == {"stop", "length"}
    assert rarely.pool.free_pages == 30


@pytest.mark.parametrize("look_every, num_pages", [(1, None), (8, None), (1, 8)])
def test_tokens_are_shown_while_they_are_written(tokenizer, look_every, num_pages):
    """Each look shows what the last one did and more; the last one, the completion. Nothing behind a stop
    string, and nothing twice from a completion that lost its pages.
    """
    sampler = Sampler(random_model(vocab=tokenizer.vocab_size), tokenizer, num_pages)
    sampler.look_every = look_every
    shown: dict[tuple[int, int], list[list[int]]] = {}
    groups = sampler.generate(
        [[1, 2, 3], [4] * 9],
        n=2,
        max_tokens=40,
        stop=["ab", "c"],
        on_tokens=lambda prompt, sample, tokens: shown.setdefault((prompt, sample), []).append(tokens),
    )
    for prompt, group in enumerate(groups):
        for sample, completion in enumerate(group):
            looks = shown[prompt, sample]
            assert looks[-1] == completion.tokens and len(looks) > len(completion.tokens) // (2 * look_every)
            assert all(b[: len(a)] == a for a, b in pairwise(looks))


def test_completions_of_prompts_are_counted_and_their_continuations_are_not(model):
    sampler, counted = Sampler(model), []

    def fork_and_go_on(completion, pages):
        sampler.generate([[]], 3, max_tokens=2, prefix=[pages])

    sampler.on_completion = lambda: counted.append(1)
    sampler.generate(PROMPTS, 2, max_tokens=4, on_finish=fork_and_go_on)
    assert len(counted) == 2 * len(PROMPTS)


def test_a_sampler_leaves_its_callers_model_as_it_was():
    model = random_model()
    before = [dict(vars(module)) for module in model.modules()]
    Sampler(model, num_pages=20).generate(PROMPTS[:1], n=8, max_tokens=4)
    assert [dict(vars(module)) for module in model.modules()] == before
    tokens, cu_seqlens = torch.arange(20), torch.tensor([0, 20], dtype=torch.int32)
    model(tokens, cu_seqlens).sum().backward()
    assert all(block.down.weight.grad.abs().sum() > 0 for block in model.blocks)


@pytest.mark.slow
def test_a_callback_may_sample_from_the_forks_it_made(model):
    """A call inside a call, in a pool so small that the outer one must give way."""
    sampler = Sampler(model, num_pages=11, max_rows=3)
    inner, options = {}, dict(max_tokens=40, stop_ids=[3, 4, 5])

    def on_finish(completion, pages):
        fork = pages.fork(len(PROMPTS[completion.prompt]) + 1)
        inner[completion.prompt] = sampler.generate(
            [[]], n=2, max_tokens=20, prefix=[fork], keys=[(7, 0), (7, 1)]
        )
        fork.release()

    groups = sampler.generate(PROMPTS, **options, on_finish=on_finish)
    roomy = Sampler(model, num_pages=200)
    assert tokens_of(groups) == tokens_of(roomy.generate(PROMPTS, **options))
    for p, [[a, b]] in inner.items():
        prefix = PROMPTS[p] + groups[p][0].tokens[:1]
        expected = roomy.generate([prefix], n=2, max_tokens=20, keys=[(7, 0), (7, 1)])
        assert [[a.tokens, b.tokens]] == tokens_of(expected)
    assert len(inner) == len(PROMPTS) and sampler.pool.free_pages == 11
    assert sampler.forwards.prefill > sum(map(len, PROMPTS)), (
        "nothing gave way: the test shows less than it says"
    )


def test_an_idle_fork_gives_its_pages_back_and_is_recomputed(model):
    sampler, options = Sampler(model, num_pages=4), dict(max_tokens=20, stop_ids=[])
    kept = sampler.prefill(list(range(40)))
    [expected] = sampler.score([kept.fork()], [[1, 2]])
    with pytest.raises(UserError, match="release forks"):
        sampler.generate([[1] * 30], **options)
    sampler.idle.add(kept)
    sampler.generate([[1] * 30], **options)
    assert sampler.pool.free_pages == 4, "a page that nobody else could give was needed"
    [recomputed] = sampler.score([kept], [[1, 2]])
    torch.testing.assert_close(recomputed, expected)
    assert sampler.pool.free_pages == 4


@pytest.mark.slow
@settings(max_examples=15, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    lengths=st.lists(st.integers(1, 40), min_size=1, max_size=5),
    n=st.integers(1, 4),
    max_tokens=st.integers(1, 40),
    spare=st.integers(0, 12),
    max_rows=st.integers(1, 8),
    fail_at=st.none() | st.integers(1, 6),
    fork=st.booleans(),
)
def test_no_workload_leaks_pages(model, lengths, n, max_tokens, spare, max_rows, fail_at, fork):
    """From the smallest pool that can work at all; callbacks keep forks, and fail while they hold some."""
    num_pages = -(-(max(lengths) + max_tokens - 1) // 16) + spare
    sampler = Sampler(model, num_pages=num_pages, max_rows=max_rows)
    finished, held = [], []

    def on_finish(completion, pages):
        finished.append(completion)
        if fork and spare == 12 and len(held) < 3:
            held.append(pages.fork(1 + len(finished) % len(pages.tokens)))
        if len(finished) == fail_at:
            raise RuntimeError("a callback failed")

    prompts = [list(range(length)) for length in lengths]
    options = dict(n=n, max_tokens=max_tokens, stop_ids=[1, 2, 3], on_finish=on_finish)
    if fail_at and fail_at <= len(lengths) * n:
        with pytest.raises(RuntimeError):
            sampler.generate(prompts, **options)
        assert sampler.pool.free_pages == num_pages
    else:
        try:
            groups = sampler.generate(prompts, **options)
            assert len(finished) == sum(len(group) for group in groups) == len(lengths) * n
        except UserError as error:
            assert held and "release forks" in str(error)
        for kept in held:
            kept.release()
        assert sampler.pool.free_pages == num_pages
        sampler.release_pool()


def test_load_weights_changes_what_is_sampled(model):
    own = random_model(seed=1)
    sampler = Sampler(own, num_pages=50)
    pointers = [parameter.data_ptr() for parameter in own.parameters()]
    before = tokens_of(sampler.generate(PROMPTS, max_tokens=10))
    sampler.load_weights(model)
    after = tokens_of(sampler.generate(PROMPTS, max_tokens=10))
    assert after != before
    assert after == tokens_of(Sampler(model, num_pages=50).generate(PROMPTS, max_tokens=10))
    assert pointers == [parameter.data_ptr() for parameter in own.parameters()], "copied in place"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_load_weights_gathers_a_sharded_policy(dtype, model, monkeypatch):
    """In the sampler's dtype: fp32 weights rounded after they were gathered would be twice the traffic."""
    world, gathered = start("cpu"), []
    monkeypatch.setattr("thinkrl.sampler.whole", lambda x: gathered.append(x.dtype) or whole(x))
    try:
        policy = random_model()
        expected = {name: parameter.to(dtype) for name, parameter in policy.named_parameters()}
        sampler = Sampler(random_model(seed=1).to(dtype), num_pages=50)
        sampler.load_weights(shard(policy, world, dtype))
        for name, parameter in sampler.model.named_parameters():
            assert torch.equal(parameter, expected[name]), name
        assert gathered == [dtype] * len(expected)
    finally:
        stop()


def test_weights_of_another_architecture_are_refused(model):
    with pytest.raises(UserError, match="not of the sampler's architecture"):
        Sampler(model).load_weights(random_model(layers=3))


@pytest.mark.parametrize(
    "prompts, options, message",
    [
        ([[]], {}, "prompt 0 is empty"),
        ([[1]], {"max_tokens": 0}, "max_tokens = 0"),
        ([[1]], {"n": 0}, "n = 0"),
        ([[1]], {"temperature": -1.0}, "temperature = -1.0"),
        (
            [[1], [1] * 250],
            {"max_tokens": 7},
            "prompt 1: 250 tokens and 7 more exceed the model's context of 256",
        ),
        ([[1] * 100], {"max_tokens": 80}, "needs 12 KV pages of 16, but the pool has only 10"),
        ([[V]], {}, "outside the vocabulary"),
        ([[1]], {"stop_ids": [V]}, "stop_ids"),
        ([[1]], {"stop": ["</think>"]}, "need the tokenizer"),
        ([[1]], {"n": 2, "keys": [(0, 1)]}, "1 keys for 1 prompts × 2 samples"),
    ],
)
def test_mistakes_get_a_sentence(model, prompts, options, message):
    sampler = Sampler(model, num_pages=10)
    with pytest.raises(UserError, match=message):
        sampler.generate(prompts, **({"max_tokens": 4} | options))
    assert sampler.pool.free_pages == 10


def test_a_probe_beyond_the_context_is_refused_and_its_fork_released(model):
    sampler = Sampler(model, num_pages=20)
    pages = sampler.prefill([1] * 250)
    with pytest.raises(UserError, match="probe: 250 tokens and 7 more exceed the model's context of 256"):
        sampler.score([pages], [[1] * 7])
    assert sampler.pool.free_pages == 20


def test_the_pool_sizes_itself_and_can_be_given_back(model):
    sampler = Sampler(model, max_rows=4)
    first = tokens_of(sampler.generate(PROMPTS, max_tokens=10))
    assert sampler.pool.num_pages == sampler.pool.free_pages == 4 * 256 // 16, (
        "four rows of the model's whole context"
    )
    sampler.release_pool()
    assert tokens_of(sampler.generate(PROMPTS, max_tokens=10)) == first


def test_the_pool_takes_its_share_of_what_the_allocator_can_free(model, monkeypatch):
    """After an update, 900 of 1,000 pages' bytes are in the allocator's cache: they are free, once it is
    emptied.
    """
    page_bytes, cached = 2 * 2 * 16 * 2 * 8 * 4, [900]  # K and V, layers, tokens, key heads, width, fp32
    monkeypatch.setattr(torch.cuda, "empty_cache", cached.clear)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: ((1000 - sum(cached)) * page_bytes, None))
    monkeypatch.setattr(Sampler, "device", torch.device("cuda", 0))
    assert Sampler(model, max_rows=1000, memory_share=0.5)._default_pages() == 500


def test_nothing_asked_for_gives_nothing(model):
    assert Sampler(model, num_pages=4).generate([]) == []
    assert Sampler(model, num_pages=4).score([], []) == []

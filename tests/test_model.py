"""The decoder against transformers on random checkpoints, and its parts against numbers from the head."""

import dataclasses
import math

import pytest
import torch
import transformers

from thinkrl import UserError
from thinkrl.checkpoint import load_model
from thinkrl.model import (
    ModelConfig,
    Rope,
    Transformer,
    fast_linear,
    inverse_frequencies,
    make_rotate,
    pack_weight,
    sequence_positions,
)

LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
CASES = {
    "qwen2-gqa6-tied": (
        "Qwen2",
        {"num_attention_heads": 6, "num_key_value_heads": 1, "tie_word_embeddings": True},
    ),
    "qwen2-gqa7": ("Qwen2", {"num_attention_heads": 14, "num_key_value_heads": 2, "hidden_size": 56}),
    "qwen3-head-dim": ("Qwen3", {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 10}),
    "qwen3-tied": (
        "Qwen3",
        {"num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 32, "tie_word_embeddings": True},
    ),
    "llama3-scaled": (
        "Llama",
        {"num_attention_heads": 4, "num_key_value_heads": 2, "rope_parameters": LLAMA3},
    ),
    "llama-linear": (
        "Llama",
        {
            "num_attention_heads": 3,
            "num_key_value_heads": 3,
            "rope_parameters": {"rope_type": "linear", "factor": 4.0},
        },
    ),
}


def oracle(case: str) -> transformers.PreTrainedModel:
    """A random model of transformers' whose norms and biases are random too, so that none of them can be
    forgotten.
    """
    family, options = CASES[case]
    base = {"vocab_size": 97, "hidden_size": 48, "intermediate_size": 80, "num_hidden_layers": 2}
    base |= {"max_position_embeddings": 256, "rms_norm_eps": 1e-5}
    config = getattr(transformers, f"{family}Config")(**base | options)
    torch.manual_seed(0)
    model = getattr(transformers, f"{family}ForCausalLM")(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def cumulative(*lengths: int) -> torch.Tensor:
    return torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)


@pytest.mark.parametrize("case", CASES)
def test_logits_gradients_and_greedy_tokens_are_those_of_transformers(case, tmp_path):
    theirs = oracle(case)
    theirs.save_pretrained(tmp_path)
    ours = load_model(tmp_path)
    tokens = torch.randint(97, (120,))
    their_logits = theirs(tokens[None]).logits[0]
    our_logits = ours.logits(ours(tokens, cumulative(120)))
    assert (our_logits - their_logits).abs().max() < 1e-4
    assert their_logits.abs().max() > 1  # or 1e-4 would mean nothing

    their_logits.logsumexp(-1).sum().backward()
    our_logits.logsumexp(-1).sum().backward()
    expected = theirs.model.embed_tokens.weight.grad
    assert (ours.embed.weight.grad - expected).abs().max() < 1e-4 * expected.abs().max()

    prompt = tokens[:5]
    expected = theirs.generate(
        prompt[None], max_new_tokens=12, do_sample=False, eos_token_id=None, pad_token_id=0
    )[0]
    row = prompt
    with torch.no_grad():
        for _ in range(12):
            row = torch.cat([row, ours.logits(ours(row, cumulative(len(row)))[-1:]).argmax(-1)])
    assert row.tolist() == expected.tolist()


def test_a_bf16_forward_errs_at_most_twice_as_much_as_that_of_transformers(tmp_path):
    theirs = oracle("qwen3-tied")
    theirs.save_pretrained(tmp_path)
    tokens = torch.randint(97, (60,))
    with torch.no_grad():
        exact = theirs.double()(tokens[None]).logits[0]
        their_error = (theirs.bfloat16()(tokens[None]).logits[0] - exact).norm()
        rounded = load_model(tmp_path, torch.bfloat16)
        our_error = (rounded.logits(rounded(tokens, cumulative(60))) - exact).norm()
    assert rounded(tokens, cumulative(60)).dtype == torch.bfloat16
    assert 0 < our_error < 2 * their_error


def test_packed_sequences_do_not_see_each_other():
    model = Transformer.random(tiny("Qwen2ForCausalLM"))
    tokens = torch.randint(50, (30,))
    packed = model(tokens, cumulative(7, 0, 1, 22))
    alone = [model(part, cumulative(len(part))) for part in tokens.split([7, 1, 22])]
    assert torch.allclose(packed, torch.cat(alone), atol=1e-5)


def test_attention_is_passed_in():
    model = Transformer.random(tiny("Qwen3ForCausalLM"))
    seen = []

    def attend(layer, q, k, v):
        seen.append((layer, q.shape, k.shape, v.shape))
        # every token attends to itself: what causal attention does at length 1
        return v.repeat_interleave(2, dim=1)

    tokens = torch.tensor([3, 1, 4])
    hidden = model(tokens, positions=torch.tensor([0, 0, 0]), attend=attend)
    assert seen == [(layer, (3, 4, 6), (3, 2, 6), (3, 2, 6)) for layer in (0, 1)]
    assert torch.allclose(hidden, model(tokens, cumulative(1, 1, 1)), atol=1e-6)


def test_positions_start_again_in_every_sequence():
    assert sequence_positions(cumulative(3, 0, 2), 5).tolist() == [0, 1, 2, 0, 1]
    assert sequence_positions(cumulative(), 0).tolist() == []


def test_rotation_turns_a_pair_by_its_position():
    rotate = make_rotate(torch.tensor([0, 1, 5]), head_dim=2, rope=Rope())
    turned = rotate(torch.tensor([1.0, 0.0]).expand(3, 1, 2))
    expected = [[math.cos(p), math.sin(p)] for p in (0, 1, 5)]
    assert torch.allclose(turned[:, 0], torch.tensor(expected))
    assert rotate(torch.ones(3, 1, 2, dtype=torch.bfloat16)).dtype == torch.bfloat16


def test_llama3_keeps_short_wavelengths_and_stretches_long_ones():
    # theta = 10^4 over 8 dimensions: frequencies 1, 0.1, 0.01, 0.001, and 2π/frequency is the wavelength in
    # tokens. Within 628 tokens they make 100, 10, 1 and 0.1 turns: 3 turns or fewer are stretched whole, 23
    # or more kept, and 10 turns are 7/20 of the way between.
    rope = Rope(
        10000.0, "llama3", factor=4.0, low_freq_factor=3, high_freq_factor=23, original_max_positions=628
    )
    frequency = inverse_frequencies(8, rope, torch.device("cpu"))
    expected = torch.tensor([1.0, 0.1 * (0.35 + 0.65 / 4), 0.01 / 4, 0.001 / 4])
    assert torch.allclose(frequency, expected, rtol=1e-3)


def test_a_model_from_the_meta_device_lacks_nothing_but_its_parameters():
    config = tiny("LlamaForCausalLM")
    source, target = Transformer.random(config, seed=1), Transformer.empty(config)
    target.load_state_dict(source.state_dict())
    tokens = torch.arange(9)
    assert torch.equal(target(tokens, cumulative(9)), source(tokens, cumulative(9)))


def test_a_model_that_has_sampled_can_still_be_trained():
    # no cached frequencies
    model = Transformer.random(dataclasses.replace(tiny("Qwen2ForCausalLM"), rope=Rope(theta=77.0)))
    with torch.inference_mode():
        sampled = model(torch.arange(4), cumulative(4))
    trained = model(torch.arange(4), cumulative(4))
    trained.square().sum().backward()
    assert torch.equal(sampled, trained) and model.blocks[0].qkv.weight.grad.abs().max() > 0


def test_random_weights_repeat_and_have_the_stated_spread():
    config = tiny("Qwen2ForCausalLM")
    one, same, other = (Transformer.random(config, seed) for seed in (0, 0, 1))
    assert torch.equal(one.embed.weight, same.embed.weight)
    assert not torch.equal(one.embed.weight, other.embed.weight)
    assert one.blocks[0].qkv.weight.std().item() == pytest.approx(0.02, rel=0.1)
    assert one.blocks[0].down.weight.std().item() == pytest.approx(0.01, rel=0.1)  # 0.02 / sqrt(2 * 2 layers)
    assert one.blocks[0].qkv.bias.abs().max() == 0 and one.norm.weight.min() == 1


def test_both_layouts_of_a_rope_config_mean_the_same():
    raw = raw_config("LlamaForCausalLM")
    old = raw | {"rope_theta": 500.0, "rope_scaling": {k: v for k, v in LLAMA3.items() if k != "rope_theta"}}
    new = raw | {"rope_parameters": LLAMA3}
    assert ModelConfig.from_hf(old) == ModelConfig.from_hf(new)
    assert ModelConfig.from_hf(ModelConfig.from_hf(old).to_hf()) == ModelConfig.from_hf(new)


@pytest.mark.parametrize(
    "change, words",
    [
        (
            {"architectures": ["MistralForCausalLM"]},
            "MistralForCausalLM.*Qwen2ForCausalLM, Qwen3ForCausalLM, LlamaForCausalLM",
        ),
        ({"architectures": ["Qwen3MoeForCausalLM"]}, "Qwen3MoeForCausalLM is not supported"),
        ({"architectures": None}, "none is not supported"),
        ({"use_sliding_window": True}, "use_sliding_window = True"),
        ({"layer_types": ["full_attention", "sliding_attention"]}, "layer_types"),
        ({"attention_bias": True}, "attention_bias = True"),
        ({"hidden_act": "gelu"}, "hidden_act = 'gelu'"),
        (
            {"rope_scaling": {"type": "yarn", "factor": 4.0}},
            "'yarn' is not supported; supported are default, linear, llama3",
        ),
        ({"rope_scaling": {"type": "linear"}}, "needs the number factor"),
        ({"vocab_size": "50"}, "vocab_size must be an integer, it is '50'"),
        ({"hidden_size": None}, "hidden_size must be an integer"),
        ({"num_key_value_heads": 3}, "4 heads must be a multiple of 3"),
    ],
)
def test_a_config_that_would_give_wrong_numbers_is_refused(change, words):
    with pytest.raises(UserError, match=f"some/config.json: .*{words}"):
        ModelConfig.from_hf(raw_config("LlamaForCausalLM") | change, where="some/config.json")


def raw_config(architecture: str) -> dict:
    return {
        "architectures": [architecture],
        "vocab_size": 50,
        "hidden_size": 24,
        "intermediate_size": 40,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 6,
        "max_position_embeddings": 64,
    }


def tiny(architecture: str) -> ModelConfig:
    return ModelConfig.from_hf(raw_config(architecture))


@pytest.mark.parametrize("rows", [1, 64])
@pytest.mark.parametrize("prepare", [lambda weight: weight, pack_weight], ids=["plain", "packed"])
def test_the_fast_product_is_the_plain_one(rows, prepare, monkeypatch):
    monkeypatch.setattr("thinkrl.model.PACKED_FROM", 0)
    generator = torch.Generator().manual_seed(0)
    x, weight = (torch.randn(*shape, generator=generator) for shape in [(rows, 300), (200, 300)])
    exact = x.double() @ weight.double().T
    with torch.inference_mode():
        fast = fast_linear(x, prepare(weight))
    # Either sums 300 products in some order of its own: both are within a few roundings of the largest
    # partial sum.
    assert (fast - exact).abs().max() < 300**0.5 * 2.0**-23 * exact.abs().max()
    with torch.inference_mode():  # oneDNN has no bf16 product for a processor without AVX-512
        fast = fast_linear(x.bfloat16(), prepare(weight.bfloat16())).double()
    bf16_exact = x.bfloat16().double() @ weight.bfloat16().double().T
    assert (fast - bf16_exact).abs().max() <= 2.0**-8 * bf16_exact.abs().max()

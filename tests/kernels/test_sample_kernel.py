"""The draw: its distribution, its address, and the fused paths against the specification."""

from __future__ import annotations

import math

import pytest
import torch

from kernels.sample import (
    hash_key,
    sample_token,
    sample_token_ref,
    sample_token_torch,
    sample_token_triton,
    uniform,
)

pytestmark = pytest.mark.gpu
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
FAST = [sample_token_torch, sample_token_triton]
MASK = 2**64 - 1


def random_logits(rows, vocab, dtype=torch.float32, seed=0):
    """Logits [B, V], keys [B] and positions [B] of which no two are alike."""
    logits = 3 * torch.randn(rows, vocab, generator=torch.Generator().manual_seed(seed))
    return logits.to(DEVICE, dtype), hash_key(seed, torch.arange(rows)).to(DEVICE), positions(rows)


def positions(rows):
    return torch.arange(rows, device=DEVICE) * 7


def splitmix64(state: int) -> int:
    """The published generator's next output, in Python's unbounded integers."""
    state = (state + 0x9E3779B97F4A7C15) & MASK
    state = (state ^ state >> 30) * 0xBF58476D1CE4E5B9 & MASK
    state = (state ^ state >> 27) * 0x94D049BB133111EB & MASK
    return state ^ state >> 31


def test_hash_is_splitmix64():
    assert splitmix64(0) == 0xE220A8397B1DCDAF  # the first output of the generator seeded with 0
    for words in ([0], [7, 1], [123, -5, 2**62]):
        expected = 0
        for word in words:
            expected = splitmix64(expected ^ word & MASK)
        assert hash_key(*words).item() & MASK == expected


def test_hash_broadcasts_chains_and_depends_on_order():
    problem, sample = torch.arange(3)[:, None], torch.arange(4)
    keys = hash_key(5, problem, sample)
    assert keys.shape == (3, 4) and keys.dtype == torch.int64 and len(keys.unique()) == 12
    assert keys[2, 3] == hash_key(5, 2, 3) and keys[2, 3] != hash_key(5, 3, 2)


@pytest.mark.parametrize(
    "words", [(torch.arange(10_000),), (3, torch.arange(100)[:, None], torch.arange(100))]
)
def test_uniforms_fill_their_bins(words):
    """10,000 numbers in 50 bins: chi-square of 49 degrees, 85.4 at one in a thousand. Likewise pairs of
    neighbours.
    """
    u = uniform(hash_key(*words)).flatten()
    assert u.min() > 0 and u.max() < 1
    chi_square = ((u.histc(50, 0, 1) - 200) ** 2 / 200).sum()
    assert chi_square < 85.4
    pairs = (u[::2] * 7).floor() * 7 + (u[1::2] * 7).floor()  # 49 cells of 5,000 / 49; 48 degrees: 84.0
    expected = 5000 / 49
    assert ((pairs.histc(49, 0, 49) - expected) ** 2 / expected).sum() < 84.0


@pytest.mark.parametrize("sample", [sample_token_ref, *FAST, sample_token])
def test_draw_by_hand(sample):
    """Probabilities 1/4, 1/2, 0, 1/4: the cumulative sum is crossed at 1/4 and 3/4, and token 2 never
    comes.
    """
    logits = torch.tensor([1.0, 2.0, 0.0, 1.0], device=DEVICE).log().expand(8, 4)
    keys = hash_key(0, torch.arange(8)).to(DEVICE)
    u = uniform(hash_key(keys, positions(8)))
    token, logprob, logsumexp = sample(logits, keys, positions(8))
    assert token.tolist() == torch.where(u < 0.25, 0, torch.where(u < 0.75, 1, 3)).tolist()
    assert len(set(token.tolist())) == 3
    expected = torch.tensor([0.25, 0.5, 0.0, 0.25], device=DEVICE).log()[token]
    torch.testing.assert_close(logprob, expected)
    torch.testing.assert_close(logsumexp, torch.full_like(logsumexp, math.log(4)))


@pytest.mark.parametrize("sample", [sample_token_ref, *FAST, sample_token])
def test_greedy_takes_the_first_of_equals_and_reports_temperature_1(sample):
    logits = torch.tensor([[0.0, math.log(2), math.log(2), 0.0]], device=DEVICE)
    token, logprob, logsumexp = sample(logits, positions(1), positions(1), temperature=0)
    assert token.item() == 1
    assert logprob.item() == pytest.approx(math.log(1 / 3)) and logsumexp.item() == pytest.approx(math.log(6))


@pytest.mark.parametrize("sample", FAST)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rows, vocab", [(6, 1), (20, 33), (10, 500), (3, 9001)])
def test_fast_matches_specification(rows, vocab, dtype, sample):
    """The same token from the same key, its numbers to fp32 rounding, at sizes on both sides of a block."""
    logits, keys, at = random_logits(rows, vocab, dtype)
    if vocab > 64:
        logits[:, 5] = logits[:, 64:] = float("-inf")  # whole blocks without a token that can be drawn
        logits[:, -1] = 4.0
    for temperature in (0, 0.7, 1.0):
        token, *numbers = sample(logits, keys, at, temperature)
        expected, *expected_numbers = sample_token_ref(logits, keys, at, temperature)
        assert token.dtype == torch.int64 and torch.equal(token, expected)
        for ours, theirs in zip(numbers, expected_numbers):
            assert ours.dtype == torch.float32
            torch.testing.assert_close(ours, theirs, rtol=0, atol=4e-6)  # an ulp of a logit of 16 is 1e-6


@pytest.mark.parametrize("sample", FAST)
def test_a_row_depends_on_nothing_but_its_address_and_logits(sample):
    logits, keys, at = random_logits(12, 600)
    whole = sample(logits, keys, at, 0.8)
    order = torch.tensor([7, 3, 11], device=DEVICE)
    for full, part in zip(whole, sample(logits[order], keys[order], at[order], 0.8)):
        assert torch.equal(full[order], part)


def test_tokens_come_as_often_as_they_should():
    """20,000 draws over 150 tokens: chi-square of 149 degrees, 205.6 at one in a thousand.

    Once as 150 neighbours, once spread over a vocabulary of 600, most of which can never be drawn.
    """
    logits, *_ = random_logits(1, 150)
    logits = logits.cpu() / 3
    keys, at = hash_key(1, torch.arange(20_000)), torch.zeros(20_000, dtype=torch.int64)
    expected = 20_000 * logits[0].softmax(0)
    assert expected.min() > 5
    spread = torch.full((1, 600), float("-inf"))
    spread[:, 1::4] = logits
    for row, place in ((logits, torch.arange(150)), (spread, torch.arange(1, 600, 4))):
        token, logprob, _ = sample_token_torch(row.expand(20_000, -1), keys, at, 1.0)
        counts = token.bincount(minlength=row.shape[-1])[place]
        assert counts.sum() == 20_000 and ((counts - expected) ** 2 / expected).sum() < 205.6
        torch.testing.assert_close(logprob, row[0].log_softmax(0)[token])


def test_nan_logits_give_a_nan_logprob():
    for vocab in (100, 600):
        logits, keys, at = random_logits(2, vocab)
        logits[1, 3] = float("nan")
        token, logprob, _ = sample_token_torch(logits, keys, at)
        assert logprob.isnan().tolist() == [False, True] and 0 <= token[1] < vocab


def test_keys_and_positions_must_match_rows():
    logits, keys, at = random_logits(3, 10)
    for mismatch in ((keys[:2], at), (keys, at[:2])):
        with pytest.raises(ValueError, match="one key and position per row"):
            sample_token(logits, *mismatch)

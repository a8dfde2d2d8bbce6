import pytest
import torch

from kernels import fisher
from kernels.fisher import (
    diagonal_fisher,
    diagonal_fisher_ref,
    episode_quadratic,
    episode_quadratic_ref,
    episode_quadratic_torch,
    episode_quadratic_triton,
    ghost_norm,
    ghost_norm_ref,
    ghost_norm_torch,
    ghost_norm_triton,
)

pytestmark = pytest.mark.gpu
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# empty first and in the middle, single token, two tokens outside at each end
RAGGED = [2, 2, 3, 20, 20, 57, 60]
QUADRATICS = [episode_quadratic_ref, episode_quadratic_torch, episode_quadratic_triton, episode_quadratic]
GHOSTS = [ghost_norm_ref, ghost_norm_torch, ghost_norm_triton, ghost_norm]


def factors(T=62, D1=37, D2=21, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    x, g, weight = (torch.randn(*shape, generator=generator) for shape in ((T, D1), (T, D2), (D2, D1)))
    return x.to(DEVICE, dtype), g.to(DEVICE, dtype), weight.abs().to(DEVICE)


def exact(reference, *tensors, **kwargs):
    """The reference in fp64."""
    return reference(
        *(t.double() if t is not None and t.is_floating_point() else t for t in tensors), **kwargs
    )


@pytest.mark.parametrize("quadratic", QUADRATICS)
def test_two_episodes_by_hand(quadratic):
    x = torch.tensor([[1.0, 2.0], [0.0, 1.0], [3.0, 0.0]], device=DEVICE)
    g = torch.tensor([[1.0], [2.0], [1.0]], device=DEVICE)
    cu = torch.tensor([0, 2, 3])  # G_0 = 1·(1, 2) + 2·(0, 1) = (1, 4), G_1 = (3, 0)
    weight = torch.tensor([[10.0, 1.0]], device=DEVICE)
    assert quadratic(x, g, cu).tolist() == [17.0, 9.0]
    assert quadratic(x, g, cu, weight).tolist() == [26.0, 90.0]
    assert quadratic(x, g, cu, weight, power=1).tolist() == [14.0, 30.0]
    assert quadratic(x, g, cu, power=1).tolist() == [5.0, 3.0]


@pytest.mark.parametrize("ghost", GHOSTS)
def test_ghost_norm_by_hand(ghost):
    x = torch.tensor([[1.0, 2.0], [0.0, 1.0], [3.0, 0.0]], device=DEVICE)
    g = torch.tensor([[1.0], [2.0], [1.0]], device=DEVICE)
    assert ghost(x, g, torch.tensor([0, 2, 2, 3])).tolist() == [17.0, 0.0, 9.0]


def test_diagonal_fisher_by_hand():
    x, g = torch.tensor([[1.0, 2.0], [3.0, 0.0]], device=DEVICE), torch.tensor([[1.0], [2.0]], device=DEVICE)
    assert diagonal_fisher(x, g).tolist() == [[18.5, 2.0]]  # ((1·1)² + (2·3)²) / 2, ((1·2)² + 0) / 2
    assert diagonal_fisher(x[:0], g[:0]).tolist() == [[0.0, 0.0]]


def test_identities_in_fp64():
    x, g, weight = factors(dtype=torch.float64)
    cu = torch.tensor(RAGGED)
    gradients = torch.stack([g[a:b].T @ x[a:b] for a, b in zip(RAGGED, RAGGED[1:])])
    close = dict(rtol=1e-13, atol=1e-13)
    for p in (1, 2):
        torch.testing.assert_close(episode_quadratic(x, g, cu, None, p), (gradients**p).sum((1, 2)), **close)
        expected = (weight.double() * gradients**p).sum((1, 2))
        torch.testing.assert_close(episode_quadratic(x, g, cu, weight.double(), p), expected, **close)
    torch.testing.assert_close(ghost_norm(x, g, cu), episode_quadratic(x, g, cu), **close)
    per_token = torch.einsum("ti,tj->tij", g, x)
    torch.testing.assert_close(diagonal_fisher(x, g), (per_token**2).mean(0), **close)
    # a rank-one weight is a rescaling of the factors, so the cheap ghost norm computes it too
    a, b = g[0].abs(), x[0].abs()
    rank_one = episode_quadratic(x, g, cu, torch.outer(a, b))
    torch.testing.assert_close(ghost_norm(x * b.sqrt(), g * a.sqrt(), cu), rank_one, **close)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "T, D1, D2, cu", [(62, 37, 21, RAGGED), (40, 16, 48, [0, 1, 2, 40]), (5, 1, 3, [0, 0, 5, 5])]
)
def test_error_is_at_most_twice_that_of_plain_torch(dtype, T, D1, D2, cu):
    x, g, weight = factors(T, D1, D2, dtype)
    cu = torch.tensor(cu, dtype=torch.int32)

    eps = torch.finfo(torch.float32).eps

    def budget(truth, plain, chance=0.0):
        """Twice plain torch's error, where that is not small by luck: at least the rounding of one fp32
        number of the result's size, and twice what chance makes.
        """
        return 2 * (plain - truth).abs().max() + max(eps * truth.abs().max().item(), chance)

    def twice_chance(w):
        """A sum of n products of either sign, rounded n times by up to eps / 2 of what it is by then, errs by
        about eps / 2 * sqrt(n / 2) * (root of the sum of the products' squares).
        """
        x2, g2, w2 = (None if t is None else t.double().square() for t in (x, g, w))
        norm = episode_quadratic_ref(x2, g2, cu, w2, power=1).sqrt()
        return (eps * (cu.diff().to(norm) / 2).sqrt() * norm).max().item()

    for p, w in [(1, None), (1, weight), (2, None), (2, weight)]:
        truth = exact(episode_quadratic_ref, x, g, cu, w, power=p)
        plain = episode_quadratic_ref(x, g, cu, None if w is None else w.to(dtype), p)
        allowed = budget(truth, plain, twice_chance(w) if p == 1 else 0.0)  # squares have one sign
        for quadratic in (episode_quadratic_torch, episode_quadratic_triton):
            error = (quadratic(x, g, cu, w, p) - truth).abs().max()
            assert error <= allowed, (quadratic.__name__, p, w is None)
    truth, plain = exact(ghost_norm_ref, x, g, cu), ghost_norm_ref(x, g, cu)
    for ghost in (ghost_norm_torch, ghost_norm_triton):
        assert (ghost(x, g, cu) - truth).abs().max() <= budget(truth, plain), ghost.__name__
    truth, plain = exact(diagonal_fisher_ref, x, g), diagonal_fisher_ref(x, g)
    assert (diagonal_fisher(x, g).double() - truth).abs().max() <= budget(truth, plain)


@pytest.mark.parametrize("op", [*QUADRATICS, *GHOSTS])
def test_empty_episodes_are_zero_in_poisoned_memory(op, monkeypatch):
    poison = lambda *shape, **kwargs: torch.full(shape, float("nan"), **kwargs)  # noqa: E731
    monkeypatch.setattr(fisher.torch, "empty", poison)
    x, g, _ = factors()
    values = op(x, g, torch.tensor(RAGGED))
    assert values[0] == 0 and values[3] == 0
    assert values.isfinite().all() and (values[[1, 2, 4, 5]] != 0).all()
    assert op(x[:0], g[:0], torch.tensor([0, 0])).tolist() == [0.0]
    assert op(x, g, torch.tensor([7])).shape == (0,)


@pytest.mark.parametrize("op", [*QUADRATICS[1:3], *GHOSTS[1:3]])
def test_tokens_of_other_episodes_cannot_leak(op):
    x, g, _ = factors()
    clean = op(x, g, torch.tensor(RAGGED))
    x[20:57] = float("nan")
    x[:2] = x[60:] = float("inf")
    values = op(x, g, torch.tensor(RAGGED))
    assert torch.equal(values[[0, 1, 2, 3, 5]], clean[[0, 1, 2, 3, 5]]) and values[4].isnan()


@pytest.mark.slow
@pytest.mark.parametrize("op", [*QUADRATICS[1:3], *GHOSTS[1:3]])
def test_slots_are_summed_in_fp64(op):
    """Two tokens in different tiles and rows: 2^24 + 1, which fp32 does not have."""
    x, g = torch.zeros(2, 65, 129, device=DEVICE)
    x[0, 0], g[0, 0] = 4096, 1
    x[64, 128] = g[64, 128] = 1
    assert op(x, g, torch.tensor([0, 65])).tolist() == [2.0**24 + 1]


@pytest.mark.slow
@pytest.mark.parametrize(
    "op, weighted",
    [
        *((op, weighted) for op in QUADRATICS[1:3] for weighted in (False, True)),
        *((op, False) for op in GHOSTS[1:3]),
    ],
)
@pytest.mark.parametrize("D1, D2", [(37, 21), (16, 16), (64, 5)])
def test_shuffled_responses_give_the_same_bits(op, weighted, D1, D2):
    lengths = [5, 1, 0, 17, 16, 3, 30, 2, 9, 12]
    x, g, weight = factors(sum(lengths), D1, D2)
    fixed = (weight,) if weighted else ()
    values = op(x, g, torch.tensor([0, *lengths]).cumsum(0), *fixed)
    assert torch.equal(values, op(x, g, torch.tensor([0, *lengths]).cumsum(0), *fixed))
    for seed in range(2):
        order = torch.randperm(len(lengths), generator=torch.Generator().manual_seed(seed)).tolist()
        pieces = [(xs, gs) for xs, gs in zip(x.split(lengths), g.split(lengths))]
        shuffled_x, shuffled_g = (torch.cat([pieces[k][part] for k in order]) for part in (0, 1))
        cu = torch.tensor([0, *(lengths[k] for k in order)]).cumsum(0)
        assert torch.equal(op(shuffled_x, shuffled_g, cu, *fixed), values[order]), seed


def test_gradients_are_made_in_bounded_chunks(monkeypatch):
    x, g, weight = factors(200, 8, 8)
    cu = torch.arange(0, 201, 10)
    whole = episode_quadratic_torch(x, g, cu, weight)
    monkeypatch.setattr(fisher, "CHUNK", 3 * 16 * 16)  # three episodes of 16 rows at once
    batches = [len(k) for k, _, _ in fisher._equal_lengths(x, g, cu, lambda n: 64)]
    assert batches == [3, 3, 3, 3, 3, 3, 2]
    assert torch.equal(episode_quadratic_torch(x, g, cu, weight), whole)


def test_misfits_are_refused():
    x, g, weight = factors()
    cu = torch.tensor(RAGGED)
    for bad in [(x[1:], g, cu), (x.double(), g, cu), (x, g, cu, weight.T), (x, g, cu, weight, 3)]:
        with pytest.raises(ValueError):
            episode_quadratic(*bad)

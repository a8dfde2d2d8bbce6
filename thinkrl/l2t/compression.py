"""Compression: a PAC-Bayes penalty on how far a gradient step on an episode moves the parameters.

                                                                                           L2T §4.2, App. B

    C_k = KL(N(θ + D_k, P⁻¹) || N(θ, P⁻¹)) = ½ Σ_j (N F_jj + λ) D_kj²,   D_k = η ∇ log p(z_k | s_k)      diag

The gradient of a matrix over an episode is a sum over its tokens of g_t x_tᵀ, output gradient times input;
every C_k here is a statistic of such sums, and kernels/fisher.py computes it for all episodes in one pass
without forming a gradient. The proxy chooses the matrices: by default the SVD core of the LM head, which
needs only the hidden states that the sampler kept and one pass of the LM head.

Departures: Eq. 4 is (g_k · D_k)² with D_k the change of the parameters, but a rollout does not change them.
`diag` is the PAC-Bayes form with D_k a virtual gradient step; the printed form is `rank1`; other readings of
D_k are `invariant`, `natural` and `drift`. `diag` measures a Euclidean step in the Fisher's metric, so a few
coordinates with large Fisher values dominate it. `invariant` takes the step from the Fisher too, and all
coordinates contribute alike.

The gradient is the *sum* over an episode's tokens. The scores of sampled tokens are martingale differences,
so a completion's expected total does not depend on how it is cut into episodes. With means instead, C would
fall as an episode gets longer, and a policy would be rewarded for leaving out tags.

Letters: T tokens and K episodes of a row of completions, S completions, D width, V vocabulary, r rank.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from kernels.attention import packed_attention
from kernels.fisher import diagonal_fisher, episode_quadratic, ghost_norm
from kernels.logprob import linear_logprob, linear_score
from thinkrl import UserError
from thinkrl.l2t.episodes import Episodes
from thinkrl.model import Transformer, make_rotate, sequence_positions
from thinkrl.types import Turn


@dataclass(frozen=True)
class Row:
    """Prompts and completions in one packed row, with the completions' episodes."""

    tokens: Tensor  # [L] int64, prompts included
    cu_seqlens: Tensor  # [S+1] int32
    own: Tensor  # [T] int64, positions of the completions' tokens in the row
    cuts: list[int]  # the K+1 bounds of episodes among the T own tokens, known to the host
    cu_episodes: Tensor  # [K+1] int64, the same
    longest: int  # tokens of the longest sequence
    hidden: Tensor | None  # [T, D], the states that predicted those tokens, if the sampler kept them

    @staticmethod
    def of(turns: Sequence[Turn], episodes: Sequence[Episodes], device: torch.device | str = "cpu") -> Row:
        tokens: list[int] = []
        own: list[int] = []
        lengths, cu = [0], [0]
        for turn, cut in zip(turns, episodes):
            own += range(
                len(tokens) + len(turn.prompt), len(tokens) + len(turn.prompt) + len(turn.completion)
            )
            tokens += turn.prompt + turn.completion
            lengths.append(len(tokens))
            before = cu[-1]
            cu += [before + end + 1 for end in cut.ends.tolist()]
        kept = [turn.hidden for turn in turns if turn.hidden is not None]
        return Row(
            torch.tensor(tokens, device=device),
            torch.tensor(lengths, dtype=torch.int32, device=device),
            torch.tensor(own, device=device),
            cu,
            torch.tensor(cu, device=device),
            max(b - a for a, b in pairwise(lengths)),
            torch.cat(kept).to(device) if len(kept) == len(turns) else None,
        )


# per matrix [D2, D1]: x [T, D1], g [T, D2]; an episode's gradient is its sum of g_t x_tᵀ
Factors = list[tuple[Tensor, Tensor]]


def svd_basis(weight: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Compute V [D, r] and S [r] of W = U S Vᵀ [V, D], largest first; r is `rank` or the rank of W.

    They come from the eigenvectors of WᵀW in fp64, so singular values below 1e-6 of the largest are dropped.
    U = W V / S is not needed.
    """
    gram = sum(rows.double().T @ rows.double() for rows in weight.detach().split(8192))
    squares, vectors = torch.linalg.eigh(gram)
    squares, vectors = squares.flip(0)[:rank], vectors.flip(1)[:, :rank]
    keep = squares > 1e-12 * squares[0]
    dtype = torch.promote_types(weight.dtype, torch.float32)
    return vectors[:, keep].to(dtype).contiguous(), squares[keep].sqrt().to(dtype)


def svd_factors(hidden: Tensor, weight: Tensor, targets: Tensor, V: Tensor, S: Tensor) -> Factors:
    """Gradient of the LM head projected on its SVD, U_rᵀ G V_r [r, r], as factors of width r instead of V.

    The logits' gradient δ_t enters only as Wᵀδ_t, the score: U_rᵀ δ_t = S_r⁻¹ V_rᵀ Wᵀ δ_t. Exact for the W
    that was decomposed; 0.5 % off after W has changed by 1e-3 of its norm.
    """
    _, score = linear_score(hidden, weight, targets)
    return [((hidden.to(V.dtype) @ V).to(hidden.dtype), (score @ V / S).to(hidden.dtype))]


def head_factors(hidden: Tensor, weight: Tensor, targets: Tensor) -> Factors:
    """Gradient of the whole LM head: x_t = h_t, g_t = onehot - softmax, [T, V]. A tied head counts as head
    only.
    """
    logits = (hidden @ weight.T).to(torch.promote_types(hidden.dtype, torch.float32))
    g = logits.softmax(-1).neg_()
    g[torch.arange(len(targets), device=g.device), targets] += 1
    return [(hidden, g.to(hidden.dtype))]


def block_factors(model: Transformer, row: Row, layer: int = -1) -> Factors:
    """Gradients of a block's q, o, gate and up (one matrix) and down, as factors from one backward.

    An episode's gradient is the sum over its own tokens only where a token's output does not affect other
    tokens' log-probs: in the last block, except for k and v. In earlier blocks these factors are 55-150 %
    off.
    """
    layer %= len(model.blocks)
    block = model.blocks[layer]
    captured: list[tuple[Tensor, Tensor]] = []  # input and output of each Linear
    rotate = make_rotate(
        sequence_positions(row.cu_seqlens, len(row.tokens)), block.head_dim, model.config.rope
    )

    def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return packed_attention(q, k, v, row.cu_seqlens, row.longest)

    def capture(module, inputs, output):
        captured.append((inputs[0].detach(), output))

    with torch.no_grad():
        x = model.embed(row.tokens)
        for earlier in model.blocks[:layer]:
            x = earlier(x, rotate, attend)
    hooks = [
        linear.register_forward_hook(capture) for linear in (block.qkv, block.o, block.gate_up, block.down)
    ]
    try:
        with torch.enable_grad():
            x = x.detach().requires_grad_()
            for later in model.blocks[layer:]:
                x = later(x, rotate, attend)
            hidden = model.norm(x)[row.own - 1]
            logprob, _ = linear_logprob(hidden, model.head_weight.detach(), row.tokens[row.own])
            gradients = torch.autograd.grad(logprob.sum(), [output for _, output in captured])
    finally:
        for hook in hooks:
            hook.remove()
    factors = [(x[row.own - 1], g[row.own - 1]) for (x, _), g in zip(captured, gradients)]
    q_rows = block.heads * block.head_dim
    return [(x, g[:, :q_rows] if i == 0 else g) for i, (x, g) in enumerate(factors)]


def parameter_factors(model: Transformer, row: Row, parameters: Sequence[Tensor]) -> Factors:
    """Exact gradients of any parameters, by one backward per episode (slow), as factors [K, 1] and [K, P]."""
    with torch.enable_grad():
        hidden = model(row.tokens, row.cu_seqlens, longest=row.longest)[row.own - 1]
        logprob, _ = linear_logprob(hidden, model.head_weight, row.tokens[row.own])
        flat = []
        for start, end in pairwise(row.cuts):
            gradients = torch.autograd.grad(logprob[start:end].sum(), parameters, retain_graph=True)
            flat.append(torch.cat([gradient.flatten() for gradient in gradients]))
    return [(torch.stack(flat), torch.ones(len(flat), 1, dtype=flat[0].dtype, device=flat[0].device))]


DAMPING = 1e-5  # paper App. F; the precision of a parameter whose gradient is 0 at every token


def compression(
    kind: str,
    factors: Factors,
    cu_episodes: Tensor,
    fisher: Sequence[Tensor],
    count: float,
    move: Sequence[Tensor] = (),
    longest: int | None = None,
) -> Tensor:
    """Compression C_k of every episode, [K] fp64, for gradients g_k given as factors.

    fisher   per matrix [D2, D1], the sum over N = `count` tokens of squared token gradients: N F
    diag     ½ Σ_j (N F_jj + λ) D_kj²      KL between Gaussians of precision N F + λ      L2T §4.2, Eq. 8
    invariant  ½ Σ_j g_kj² / (N F_jj + λ)  the same KL for the natural step D_k = (N F + λ)⁻¹ g_k: up to λ it
             does not change when a parameter is rescaled
    rank1    (g_k · D_k)² = ‖g_k‖⁴         as printed                                      L2T Eq. 4
    natural  (g_k · D_k)², D_k = (F + λ)⁻¹ g_k
    drift    (g_k · D_k)², D_k = `move`, the parameters' change since the start of training

    The step size η is left out: it is a common factor, which `normalise_compression` removes.
    """
    zeros = torch.zeros(len(cu_episodes) - 1, dtype=torch.float64, device=factors[0][0].device)

    def quadratic(weights: Iterable[Tensor], power: int = 2) -> Tensor:
        """Σ_j w_j g_kj^power over all matrices, [K]."""
        terms = (episode_quadratic(x, g, cu_episodes, w, power=power) for (x, g), w in zip(factors, weights))
        return sum(terms, zeros)

    if kind == "diag":
        return 0.5 * quadratic(nF + DAMPING for nF in fisher)
    if kind == "invariant":
        return 0.5 * quadratic(1 / (nF + DAMPING) for nF in fisher)
    if kind == "rank1":
        return sum((ghost_norm(x, g, cu_episodes, longest) for x, g in factors), zeros) ** 2  # L2T Eq. 4
    if kind == "natural":
        return quadratic(1 / (nF / max(count, 1) + DAMPING) for nF in fisher) ** 2
    if kind == "drift":
        return quadratic(move, power=1) ** 2
    raise ValueError(f"compression must be diag, invariant, rank1, natural or drift, not {kind!r}")


def _alone(value: Tensor) -> Tensor:
    """Sum over ranks where there is one rank: the value itself."""
    return value


def normalise_compression(
    C: Sequence[Tensor], kappa: float, reduce: Callable[[Tensor], Tensor] = _alone
) -> list[Tensor]:
    """Scale C so that a completion's penalties sum to kappa, on average over the completions of all ranks.

    C: list of [K_i]. reduce sums a tensor over ranks. Returns kappa C / (mean over completions of the sum of
    C), or zeros where that mean is 0.
    """
    total, count = reduce(
        torch.tensor([sum(float(c.sum()) for c in C), len(C)], dtype=torch.float64)
    ).tolist()
    return [kappa * count / total * c if total > 0 else torch.zeros_like(c) for c in C]


class Proxy:
    """The parameters whose gradient enters the penalty, and their running diagonal Fisher.

    svd         core of the LM head's SVD, rank = `rank_share` of the width, renewed every `refresh_every`
                steps
    lm_head     the LM head
    last_block  q, o, gate, up and down of the last block
    layers      30 % of the blocks, drawn once: slow, a backward per episode, and memory for every episode's
                gradient

    F is the mean over the completion tokens of earlier steps of the squared score gradients at temperature 1,
    not weighted by advantages; every step multiplies older sums by `decay`, and N is the token count with the
    same decay. A refresh restarts F in the new basis. The first step, and the first after a refresh, use the
    F of their own tokens. `layers` only has gradients of whole episodes: there N F is the sum of their
    squares, which is equal in expectation because the scores of an episode's tokens are uncorrelated.

    model       whole on this rank, in the weights that sampled (the sampler's own copy)
    drift       keep the start weights, for compression="drift"; in bf16, changes below its rounding are lost
    """

    def __init__(
        self,
        model: Transformer,
        kind: str = "svd",
        rank_share: float = 0.1,
        decay: float = 0.95,
        refresh_every: int = 50,
        drift: bool = False,
        seed: int = 0,
    ):
        if kind not in ("svd", "lm_head", "last_block", "layers"):
            raise ValueError(f"proxy must be svd, lm_head, last_block or layers, not {kind!r}")
        if not 0 < rank_share <= 1:
            raise UserError(f"rank share {rank_share} is outside (0, 1]")
        self.model, self.kind, self.decay, self.refresh_every = model, kind, decay, refresh_every
        self.rank = max(1, round(rank_share * model.config.width))
        layers = len(model.blocks)
        drawn = torch.randperm(layers, generator=torch.Generator().manual_seed(seed))[
            : max(1, round(0.3 * layers))
        ].tolist()
        self.parameters = [
            p for layer in sorted(drawn) for p in model.blocks[layer].parameters() if p.ndim == 2
        ]
        empty = torch.empty(0)
        # svd: factors of the LM head; U only where drift needs it
        self.V = self.S = self.U = empty
        self.start = [matrix.clone() for matrix in self._matrices()] if drift else []
        self.fisher: list[Tensor] = []  # per matrix [D2, D1]: N F
        self.count = 0.0  # N
        self.forwards = 0  # tokens of the last step that went through the model

    @property
    def reads_hidden(self) -> bool:
        """Whether the hidden states that the sampler keeps (`Turn.hidden`) replace a forward."""
        return self.kind in ("svd", "lm_head")

    def begin(self, step: int) -> None:
        """Prepare a step's `penalties`: decompose the LM head again every `refresh_every` steps."""
        self.forwards = 0
        if self.kind == "svd" and (not len(self.S) or step % self.refresh_every == 0):
            weight = self.model.head_weight.detach()
            self.V, self.S = svd_basis(weight, self.rank)
            if self.start:
                self.U = weight.to(self.V.dtype) @ self.V / self.S
            self.fisher, self.count = [], 0.0

    def penalties(
        self,
        kind: str,
        turns: Sequence[Turn],
        episodes: Sequence[Episodes],
        budget: int = 8192,
        reduce: Callable[[Tensor], Tensor] = _alone,
    ) -> list[Tensor]:
        """Compute raw C_k, list of [K_i] fp64 on the CPU; then update the running Fisher with these tokens.

        kind as in `compression`; one forward takes at most `budget` tokens, prompts included; reduce sums a
        tensor over ranks, and every rank calls it equally often.
        """
        assert self.kind != "svd" or len(self.S), "begin(step) comes first"
        first = not self.fisher
        if first:
            squares = self._zeros()
            for row in self._rows(turns, episodes, budget):
                _add_squares(squares, self.factors(row))
            self._update_fisher(squares, turns, reduce)
        move = self._move() if kind == "drift" else []
        squares, values = self._zeros(), []
        for row in self._rows(turns, episodes, budget):
            factors = self.factors(row)
            cu_episodes, longest = row.cu_episodes, max(b - a for a, b in pairwise(row.cuts))
            if self.kind == "layers":  # an episode's gradient is laid out as one token
                cu_episodes, longest = torch.arange(len(row.cuts)), 1
            values.append(compression(kind, factors, cu_episodes, self.fisher, self.count, move, longest))
            _add_squares(squares, factors)
        if not first:
            self._update_fisher(squares, turns, reduce)
        if not values:
            return []
        return list(torch.cat(values).cpu().split([len(e) for e in episodes]))  # one wait for all rows

    def factors(self, row: Row) -> Factors:
        """The gradient factors of a row's completion tokens."""
        if not self.reads_hidden or row.hidden is None:
            self.forwards += len(row.tokens)
        if self.kind == "last_block":
            return block_factors(self.model, row)
        if self.kind == "layers":
            return parameter_factors(self.model, row, self.parameters)
        hidden, weight, targets = row.hidden, self.model.head_weight.detach(), row.tokens[row.own]
        if hidden is None:
            with torch.no_grad():
                hidden = self.model(row.tokens, row.cu_seqlens, longest=row.longest)[row.own - 1]
        if self.kind == "lm_head":
            return head_factors(hidden, weight, targets)
        return svd_factors(hidden, weight, targets, self.V, self.S)

    def state_dict(self) -> dict:
        return {name: getattr(self, name) for name in ("V", "S", "U", "start", "fisher", "count")}

    def load_state_dict(self, state: dict) -> None:
        def place(value):
            if isinstance(value, list):
                return [place(v) for v in value]
            return value.to(self.model.embed.weight.device) if isinstance(value, Tensor) else value

        for name, value in state.items():
            setattr(self, name, place(value))

    def _rows(self, turns: Sequence[Turn], episodes: Sequence[Episodes], budget: int) -> Iterator[Row]:
        lengths = [len(turn.prompt) + len(turn.completion) for turn in turns]
        start = size = 0
        for i, length in enumerate(lengths):
            if i > start and (size + length > budget or self.kind == "layers"):
                yield Row.of(turns[start:i], episodes[start:i], self.model.embed.weight.device)
                start, size = i, 0
            size += length
        if lengths:
            yield Row.of(turns[start:], episodes[start:], self.model.embed.weight.device)

    def _matrices(self) -> list[Tensor]:
        """Current parameters of the proxy, a matrix [D2, D1] for each factor pair."""
        if self.kind == "last_block":
            block = self.model.blocks[-1]
            q = block.qkv.weight[: block.heads * block.head_dim]
            return [w.detach() for w in (q, block.o.weight, block.gate_up.weight, block.down.weight)]
        if self.kind == "layers":
            return [torch.cat([p.detach().flatten() for p in self.parameters])[None]]
        return [self.model.head_weight.detach()]

    def _move(self) -> list[Tensor]:
        """Change of the proxy's parameters since the start of training."""
        assert self.start, 'compression "drift" needs Proxy(drift=True)'
        way = [
            (now - start).to(torch.promote_types(now.dtype, torch.float32))
            for now, start in zip(self._matrices(), self.start)
        ]
        return [self.U.T @ d @ self.V for d in way] if self.kind == "svd" else way

    def _zeros(self) -> list[Tensor]:
        if self.kind == "svd":
            return [self.V.new_zeros(len(self.S), len(self.S))]
        return [
            torch.zeros_like(m, dtype=torch.promote_types(m.dtype, torch.float32)) for m in self._matrices()
        ]

    def _update_fisher(
        self, squares: list[Tensor], turns: Sequence[Turn], reduce: Callable[[Tensor], Tensor]
    ) -> None:
        """Decay the running sums, then add a step's squared gradients and tokens, summed over ranks."""
        squares = [reduce(s).to(s) for s in squares]
        count = float(reduce(torch.tensor(float(sum(len(turn.completion) for turn in turns)))))
        self.fisher = (
            [self.decay * old + new for old, new in zip(self.fisher, squares)] if self.fisher else squares
        )
        self.count = self.decay * self.count + count


def _add_squares(squares: list[Tensor], factors: Factors) -> None:
    """Add the factors' squared token gradients, summed over tokens, to `squares` in place."""
    for total, (x, g) in zip(squares, factors):
        total += diagonal_fisher(x, g) * len(x)

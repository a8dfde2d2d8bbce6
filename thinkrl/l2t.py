"""L2T: a dense reward per episode, information gained minus parameters moved, and the token advantages made of it.

    r_prg_k = (J_k - J_{k-1}) - beta C_k                                                                        Eq. 3
    R_k     = r_out / K + alpha r_prg_k                                                                         Alg. 1 l. 9
    r_t     = R_k w_t / sum_{t' in k} w_t',    w_t = -log p_old(z_t | s_t)                                      Alg. 1 l. 10-11
    A_t     = A r_t / r~,                      A the group-normalised statistic of the completion               Alg. 1 l. 13-15

J_k, predicted correctness, is the probability of the gold answer when thinking is cut off after episode k (or of a correct
one, by sampling). C_k, compression, is what episode k would move the parameters: the KL divergence that a step along its
gradient costs under a Gaussian whose precision is the diagonal Fisher, measured in a proxy of few parameters.

Departures (the README measures them):
1. The group statistic is by default the return r_out + alpha sum r_prg, which the paper's objective (Eq. 2, 5) maximises.
   Line 13's truncated mean is a reward per token, an implicit length penalty: `statistic="token_trunc_mean"`.
2. Line 15 reverses its meaning where A and r~ differ in sign, and explodes where r~ is near 0: `mode="guarded"` then
   spreads A evenly, and clips the ratio elsewhere. `mode="paper"` is the line as printed.
3. A group without differences, or with differences of rounding size, gets zero advantage.
4. Eq. 4 is (g_k . D_k)^2 with D_k the parameters' move, which no rollout makes. `diag`, the default, is the PAC-Bayes form of
   §4.2 with D_k a virtual gradient step; the printed form is `rank1`; two more readings of D_k are `natural` and `drift`.
5. g_k is the *sum* over an episode's tokens. Scores of sampled tokens are martingale differences, so E C_k grows with the
   number of tokens, and the expected total does not depend on how a completion is cut; with means it would, and the policy
   would be paid for long episodes and for dropping its tags.

Letters: T tokens and K episodes of one completion (or of one row of them), G completions of one problem, D width,
V vocabulary, r rank.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from kernels.attention import packed_attention
from kernels.fisher import diagonal_fisher, episode_quadratic, ghost_norm
from kernels.logprob import linear_logprob, linear_score
from thinkrl.episodes import Episodes
from thinkrl.grpo import group_advantages
from thinkrl.model import Transformer, make_rotate, sequence_positions
from thinkrl.pages import Pages
from thinkrl.sampler import Completion, Sampler
from thinkrl.tokenizer import Tokenizer
from thinkrl.types import Turn, UserError

SURPRISE_FLOOR = 1e-8  # an episode of certain tokens spreads its reward evenly instead of dividing 0 by 0
GUARD = 0.02  # guarded credit: means closer to 0 than this share of the group's are no divisor
ROUNDING = 1e-6  # relative; what is smaller is not a reward


def process_reward(J: Tensor, C: Tensor, beta: float) -> Tensor:
    """Reward of each episode, [K]: fitting gain J_k - J_{k-1} of predicted correctness J [K+1] minus beta C [K]."""
    return J.diff() - beta * C  # L2T Eq. 3


def released_reward(J: Tensor, lengths: Tensor, malformed: bool) -> Tensor:
    """What the released code sums per episode [K]: the gain J_k - J_{k-1} once for each token, nothing for the first episode.

    Nothing at all where the tags are malformed. A longer episode earns more: this is not Eq. 3, it is `--profile code`.
    """
    gain = J.diff() * lengths
    return torch.zeros_like(gain) if malformed else torch.where(torch.arange(len(gain)) > 0, gain, 0.0)


def episode_rewards(r_out: float, r_prg: Tensor, alpha: float) -> Tensor:
    """R [K]: an equal share of the outcome reward, and alpha times the process reward r_prg [K]."""
    return r_out / max(len(r_prg), 1) + alpha * r_prg  # L2T Alg. 1 l. 9


def surprise(old_logprob: Tensor) -> Tensor:
    """How unexpected each token was under the policy that sampled it, [T] fp64, positive."""
    return (-old_logprob.double()).clamp(min=0) + SURPRISE_FLOOR  # L2T Alg. 1 l. 10


def token_rewards(R: Tensor, episode_ids: Tensor, old_logprob: Tensor) -> Tensor:
    """Each episode's reward R [K] spread over its tokens in proportion to their surprise: [T] fp64.

    episode_ids [T] says which episode a token belongs to. The tokens of an episode sum to its R.
    """
    w = surprise(old_logprob)
    total = w.new_zeros(len(R)).index_add(0, episode_ids, w)
    return w / total[episode_ids] * R.double()[episode_ids]  # L2T Alg. 1 l. 11


def truncated_mean(values: Tensor, keep: float = 0.95) -> Tensor:
    """Mean of the central share `keep` of values [T]: floor((1 - keep) / 2 · T) are dropped at each end. Scalar."""
    drop = math.floor((1 - keep) / 2 * len(values) + 1e-9)  # the sum rounds: 0.05 · 20 may come out below 1
    return values.sort().values[drop : len(values) - drop].mean()  # L2T Alg. 1 l. 13


def group_normalise(values: Tensor, eps: float = 1e-6, std: str = "sample") -> Tensor:
    """(v - mean) / (std + eps) over one group, [G] -> [G]; zeros for equal values and for a group of one."""
    if len(values) == 1 and std != "none":
        return torch.zeros_like(values)
    return group_advantages(values[None], std, eps)[0]  # L2T Alg. 1 l. 14


def credit(A: Tensor, r: Tensor, center: Tensor, mode: str, scale: Tensor | float = 0.0, max_ratio: float = 10.0) -> Tensor:
    """Spread a completion's advantage A (scalar) over its tokens by their rewards r [T], relative to `center`: [T].

    uniform   A for every token
    paper     A r_t / center as printed; A where center is 0 up to rounding
    guarded   A clip(r_t / center, ±max_ratio), or A for every token where the ratio would mean something else: center of
              the other sign than A, or within GUARD of 0 relative to `scale`, the group's mean |center|
    """
    if mode == "uniform" or center.abs() <= ROUNDING * r.abs().max():
        return A.expand(len(r))
    ratio = r / center
    if mode == "guarded":
        if A * center <= 0 or center.abs() <= GUARD * scale:
            return A.expand(len(r))
        ratio = ratio.clamp(-max_ratio, max_ratio)
    return A * ratio  # L2T Alg. 1 l. 15


def token_advantages(
    rewards: Sequence[Tensor],
    keep: float = 0.95,
    mode: str = "guarded",
    statistic: str = "token_trunc_mean",
    returns: Tensor | None = None,
    eps: float = 1e-8,
    max_ratio: float = 10.0,
    *,
    std: str = "sample",
    to_go: Sequence[Tensor] | None = None,
    J: Sequence[Tensor] | None = None,
    episode_ids: Sequence[Tensor] | None = None,
) -> list[Tensor]:
    """Advantage of every token of one group: G completions with token rewards [T_i] -> list of [T_i] fp64.

    mode        how a completion's advantage is spread over its tokens: uniform, paper, guarded (see `credit`), or to_go (see
                `to_go_advantages`, which needs the last three arguments and neither statistic nor keep)
    statistic   what is compared in the group: "return_sum", the return, divided by std + 1e-6 exactly as GRPO does; or
                "token_trunc_mean", the mean of the central `keep` of the token rewards, whose std is divided with `eps`
    returns     [G] exact returns in fp64 for return_sum; None: the sums of the token rewards, which carry their rounding
    std         "sample", "population" or "none", as in `group_advantages`

    The ratio of paper and guarded credit is taken against the completion's statistic per token: its truncated mean, or the
    mean token reward. Groups without differences get zeros. Raises ValueError for an unknown mode or statistic.
    """
    if mode == "to_go":
        if to_go is None or J is None or episode_ids is None:
            raise ValueError('mode "to_go" needs the arguments to_go, J and episode_ids')
        return to_go_advantages(to_go, J, episode_ids)
    if mode not in ("uniform", "paper", "guarded"):
        raise ValueError(f"mode must be uniform, paper, guarded or to_go, not {mode!r}")
    if statistic not in ("token_trunc_mean", "return_sum"):
        raise ValueError(f"statistic must be token_trunc_mean or return_sum, not {statistic!r}")
    rewards = [r.double() for r in rewards]
    if statistic == "token_trunc_mean":
        centers = torch.stack([truncated_mean(r, keep) for r in rewards])
        A = group_normalise(centers, eps, std)
    else:
        centers = torch.stack([r.mean() for r in rewards])
        A = group_normalise(torch.stack([r.sum() for r in rewards]) if returns is None else returns.double(), std=std)
    scale = centers.abs().mean()
    return [credit(a, r, center, mode, scale, max_ratio) for a, r, center in zip(A, rewards, centers)]


def returns_to_go(r_out: float, r_prg: Tensor, alpha: float) -> Tensor:
    """What episode k and all after it earn, [K] fp64: r_out + alpha sum_{j >= k} r_prg_j. The first is the return."""
    return r_out + alpha * r_prg.double().flip(0).cumsum(0).flip(0)


def to_go_advantages(to_go: Sequence[Tensor], J: Sequence[Tensor], episode_ids: Sequence[Tensor]) -> list[Tensor]:
    """Credit by what came after: an episode's return-to-go minus what its state let expect. List of [T_i] fp64.

        D_ik = G_ik - b_i(J_{i,k-1}, n_{i,k-1})          A_t = D_ik / rms(D over the group's tokens),   k the episode of t

    to_go [K_i] are returns-to-go G_ik; J [K_i + 1] predicted correctness, of which J_{k-1} is that of the state in which
    episode k is written; n_{k-1} the tokens written before it; episode_ids [T_i]. b_i is the least-squares plane of G over J
    and n through the tokens of the *other* completions of the group, held between the smallest and largest G among them.

    Unbiased: the baseline of an episode knows nothing of what it and its successors do, since J_{k-1} and n_{k-1} are known
    before it is written and b_i comes from other completions. Subtracting from a return what does not depend on the action
    leaves the expected policy gradient as it is; so does leaving out what was earned before the action; dividing a group
    by one positive number rescales it.
    A fit, and not J itself, because J enters G too (-alpha J_{k-1}, by telescoping) and may be uncalibrated: where it tells
    nothing its coefficient is 0. So the fitting gain can only help, by telling good states from bad; the token count does the
    same for the penalty still to come.

    Zeros for a group of one, for a group of equal returns, and where only rounding is left.
    """
    G = [values.double() for values in to_go]
    returns = torch.stack([values[0] for values in G])
    size = returns.abs().max()
    targets = [values[ids] for values, ids in zip(G, episode_ids)]
    if len(G) == 1 or returns.max() - returns.min() <= ROUNDING * size:
        return [torch.zeros_like(y) for y in targets]
    longest = max(len(ids) for ids in episode_ids)
    states = []
    for values, ids in zip(J, episode_ids):
        n = torch.searchsorted(ids, ids) / longest  # ids are sorted: as many tokens are of earlier episodes
        states.append(torch.stack([torch.ones_like(n), values[:-1][ids], n], 1).double())
    squares = torch.stack([x.T @ x for x in states])
    products = torch.stack([x.T @ y for x, y in zip(states, targets)])
    inverse = torch.linalg.pinv(squares.sum(0) - squares, rtol=1e-9, hermitian=True)  # J or n may be constant
    planes = (inverse @ (products.sum(0) - products)[..., None])[..., 0]
    D = []
    for i, (x, y, plane) in enumerate(zip(states, targets, planes)):
        others = torch.cat(G[:i] + G[i + 1 :])
        D.append(y - (x @ plane).clamp(others.min(), others.max()))
    rms = torch.cat(D).square().mean().sqrt()
    return [torch.zeros_like(d) if rms <= ROUNDING * size else d / rms for d in D]


@dataclass(frozen=True)
class Probe:
    """What is put behind a prefix to ask for the answer: `forced` closes the thinking, `gold` is what is scored."""

    forced: list[int]
    gold: list[int]  # the gold answer and its terminator: without the terminator 1 would score on the way to 12
    terminator: str = ""


def make_probe(tokenizer: Tokenizer, answer: str, prefix: str, suffix: str) -> Probe:
    """Probe for one problem: `prefix` forces the answer, `suffix` ends it. Each part is encoded by itself.

    Raises UserError for an answer without tokens: its probability would be that of the terminator.
    """
    gold = tokenizer.encode(answer)
    if not gold:
        raise UserError(f"the gold answer {answer!r} tokenizes to nothing: a fitting gain needs an answer to score")
    return Probe(tokenizer.encode(prefix), gold + tokenizer.encode(suffix), suffix)


def answer_probability(logprob: Tensor, probe: Probe) -> Tensor:
    """J: probability of the gold answer and its terminator, from log-probs of the whole suffix. Scalar fp64 in [0, 1]."""
    return logprob[len(probe.forced) :].double().sum().exp()  # L2T Prop. D.1


@torch.no_grad()
def predicted_correctness_ref(
    model: Transformer, prompt: list[int], completion: list[int], episodes: Episodes, probe: Probe
) -> Tensor:
    """J_0, …, J_K, [K+1] fp64: a full forward of each of the K+1 prefixes with its probe. The specification of `Gain`."""
    suffix = probe.forced + probe.gold
    J = []
    for n in episodes.prefixes:
        tokens = torch.tensor(prompt + completion[:n] + suffix, device=model.embed.weight.device)
        hidden = model(tokens, torch.tensor([0, len(tokens)], dtype=torch.int32, device=tokens.device))
        logprob, _ = linear_logprob(hidden[-1 - len(suffix) : -1], model.head_weight, tokens[-len(suffix) :])
        J.append(answer_probability(logprob, probe))
    return torch.stack(J).cpu()


@dataclass(frozen=True)
class _Prefix:
    """The first tokens of a completion, up to cut k, waiting for its J."""

    prompt: int
    sample: int
    k: int
    tokens: list[int]
    fork: Pages


class Gain:
    """J_0, …, J_K of every completion of a `Sampler.generate` call, from forks of its pages. Its `on_finish` is the hook.

    forced     probability of the gold answer behind each prefix, teacher-forced: K+1 short suffixes, no second look at the
               prompt or the completion, once for all samples with that prefix (J_0 above all). Scored while others still
               decode, as soon as a forward is full or pages get short
    mc         share of correct ones among `samples` answers sampled behind the forcing text
    continue   share of correct ones among `samples` continuations to the end, each as long as a completion may be

    The last two sample after the call, when `results` is asked for; until then forks of all completions hold pages.
    probes     one per prompt of the call
    segment    completion tokens -> Episodes
    grade      (prompt index, text of an answer or of a completion) -> bool, for mc and continue
    keys       per prompt, the address of its randomness; what is sampled adds (sample, k, m)
    """

    def __init__(self, sampler: Sampler, probes: Sequence[Probe], segment: Callable[[list[int]], Episodes], kind: str = "forced",
                 *, samples: int = 4, max_tokens: int = 256, grade: Callable[[int, str], bool] | None = None, seed: int = 0,
                 keys: Sequence[tuple[int, ...]] = ()):
        if kind not in ("forced", "mc", "continue"):
            raise ValueError(f"kind must be forced, mc or continue, not {kind!r}")
        self.sampler, self.probes, self.segment, self.kind = sampler, probes, segment, kind
        self.samples, self.max_tokens, self.grade, self.seed, self.keys = samples, max_tokens, grade, seed, keys
        self._seen: dict[tuple[int, int], tuple[Episodes, list]] = {}  # (prompt, sample) -> episodes, keys of J_0, …, J_K
        self._J: dict[tuple[int, ...], float] = {}
        self._waiting: dict[tuple[int, ...], _Prefix] = {}

    def on_finish(self, completion: Completion, pages: Pages) -> None:
        prompt, sample, tokens = completion.prompt, completion.sample, completion.tokens
        episodes, keys = self.segment(tokens), []
        for k, n in enumerate(episodes.prefixes):
            keys.append((prompt, *tokens[:n]) if self.kind == "forced" else (prompt, sample, k))
            if keys[-1] not in self._J and keys[-1] not in self._waiting:
                fork = pages.fork(len(pages.tokens) - len(tokens) + n)
                self._waiting[keys[-1]] = _Prefix(prompt, sample, k, tokens[:n], fork)
        self._seen[prompt, sample] = episodes, keys
        if self.kind == "forced":
            probe, pool = self.probes[prompt], self.sampler.pool
            full = len(self._waiting) * len(probe.forced + probe.gold) >= self.sampler.max_tokens_per_forward
            if full or 4 * pool.free_pages < pool.num_pages:
                self._score()

    def results(self) -> list[tuple[Episodes, Tensor]]:
        """(Episodes, J [K+1] fp64) of all completions seen, prompt by prompt, sample by sample."""
        if self._waiting:
            self._score() if self.kind == "forced" else self._sample()
        J = {place: torch.tensor([self._J[key] for key in keys], dtype=torch.float64) for place, (_, keys) in self._seen.items()}
        return [(self._seen[place][0], J[place]) for place in sorted(J)]

    def _score(self) -> None:
        waiting, self._waiting = self._waiting, {}
        probes = [self.probes[prefix.prompt] for prefix in waiting.values()]
        logprobs = self.sampler.score([prefix.fork for prefix in waiting.values()], [p.forced + p.gold for p in probes])
        for key, probe, logprob in zip(waiting, probes, logprobs):
            self._J[key] = float(answer_probability(logprob, probe))

    def _sample(self) -> None:
        waiting, self._waiting = self._waiting, {}
        prefixes = list(waiting.values())
        if self.kind == "mc":
            forced, stop = [self.probes[p.prompt].forced for p in prefixes], [self.probes[0].terminator]
            longest = 2 * max(len(probe.gold) for probe in self.probes) + 8
        else:
            forced, stop, longest = [[] for _ in prefixes], [], self.max_tokens
        room = self.sampler.model.config.max_positions - max(len(p.fork.tokens) + len(ids) for p, ids in zip(prefixes, forced))
        keys = [(*self.keys[p.prompt], p.sample, p.k, m) for p in prefixes for m in range(self.samples)]
        try:
            answers = self.sampler.generate(forced, self.samples, max_tokens=min(longest, room), stop=[s for s in stop if s],
                                            seed=self.seed, keys=keys, prefix=[p.fork for p in prefixes])
        finally:
            for p in prefixes:
                p.fork.release()
        for key, p, ids, group in zip(waiting, prefixes, forced, answers):
            # a forced answer is graded with the text that forced it, a continuation with the completion it continues
            start = ids if self.kind == "mc" else p.tokens
            correct = [self.grade(p.prompt, self.sampler.tokenizer.decode(start + answer.tokens)) for answer in group]
            self._J[key] = sum(correct) / len(correct)  # L2T Prop. D.1


@dataclass(frozen=True)
class Row:
    """Completions behind their prompts, packed, with their episodes."""

    tokens: Tensor  # [L] int64, prompts included
    cu_seqlens: Tensor  # [S+1] int32
    own: Tensor  # [T] int64, places of the completions' tokens in the row
    cu_episodes: Tensor  # [K+1] int64, over the T own tokens
    hidden: Tensor | None  # [T, D], the states that predicted the own tokens, if the sampler kept them

    @staticmethod
    def of(turns: Sequence[Turn], episodes: Sequence[Episodes], device: torch.device | str = "cpu") -> Row:
        tokens, own, lengths, cu = [], [], [0], [0]
        for turn, cut in zip(turns, episodes):
            own += range(len(tokens) + len(turn.prompt), len(tokens) + len(turn.prompt) + len(turn.completion))
            tokens += turn.prompt + turn.completion
            lengths.append(len(tokens))
            cu += (cut.ends + 1 + cu[-1]).tolist()
        kept = all(turn.hidden is not None for turn in turns)
        return Row(torch.tensor(tokens, device=device), torch.tensor(lengths, dtype=torch.int32, device=device),
                   torch.tensor(own, device=device), torch.tensor(cu, device=device),
                   torch.cat([turn.hidden for turn in turns]).to(device) if kept else None)


Factors = list[tuple[Tensor, Tensor]]  # per matrix [D2, D1]: x [T, D1], g [T, D2]; an episode's gradient is its sum of g_t x_tᵀ


def svd_basis(weight: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """V [D, r] and S [r] of W = U S Vᵀ [V, D], largest first, r = `rank` or what W has. U is W V / S, and never needed.

    From the eigenvectors of WᵀW in fp64, so singular values below 1e-6 of the largest do not count as rank.
    """
    gram = sum(rows.double().T @ rows.double() for rows in weight.detach().split(8192))
    squares, vectors = torch.linalg.eigh(gram)
    squares, vectors = squares.flip(0)[:rank], vectors.flip(1)[:, :rank]
    keep = squares > 1e-12 * squares[0]
    dtype = torch.promote_types(weight.dtype, torch.float32)
    return vectors[:, keep].to(dtype).contiguous(), squares[keep].sqrt().to(dtype)


def svd_factors(hidden: Tensor, weight: Tensor, targets: Tensor, V: Tensor, S: Tensor) -> Factors:
    """The LM head's gradient in the core of its SVD, U_rᵀ G V_r [r, r], without anything of vocabulary size.

    The logits' gradient δ_t enters only as Wᵀδ_t, which is the score: U_rᵀ δ_t = S_r⁻¹ V_rᵀ Wᵀ δ_t. Exact for the W that was
    decomposed, 0.5 % off once W has moved by 1e-3 of its norm.
    """
    _, score = linear_score(hidden, weight, targets)
    return [((hidden.to(V.dtype) @ V).to(hidden.dtype), (score @ V / S).to(hidden.dtype))]


def head_factors(hidden: Tensor, weight: Tensor, targets: Tensor) -> Factors:
    """The whole LM head: x_t = h_t, g_t = onehot - softmax, [T, V]. A tied head counts as a head, not as an embedding."""
    logits = (hidden @ weight.T).to(torch.promote_types(hidden.dtype, torch.float32))
    g = logits.softmax(-1).neg_()
    g[torch.arange(len(targets), device=g.device), targets] += 1
    return [(hidden, g.to(hidden.dtype))]


def block_factors(model: Transformer, row: Row, layer: int = -1) -> Factors:
    """Inputs of q, o, gate and up (one matrix), and down of a block, and the gradient at their outputs, from one backward.

    An episode's gradient is a sum over its own tokens only where a token's output reaches no other token's log-prob: in the
    last block, and there not for k and v. At any earlier layer these factors give wrong gradients (55-150 % off).
    """
    layer %= len(model.blocks)
    block, captured = model.blocks[layer], []
    rotate = make_rotate(sequence_positions(row.cu_seqlens, len(row.tokens)), block.head_dim, model.config.rope)

    def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return packed_attention(q, k, v, row.cu_seqlens)

    def capture(module, inputs, output):
        captured.append((inputs[0].detach(), output))

    with torch.no_grad():
        x = model.embed(row.tokens)
        for earlier in model.blocks[:layer]:
            x = earlier(x, rotate, attend)
    hooks = [linear.register_forward_hook(capture) for linear in (block.qkv, block.o, block.gate_up, block.down)]
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
    """Slow: one backward per episode, exact for any parameters. Each gradient is laid out as a single token of width 1 × P."""
    with torch.enable_grad():
        hidden = model(row.tokens, row.cu_seqlens)[row.own - 1]
        logprob, _ = linear_logprob(hidden, model.head_weight, row.tokens[row.own])
        flat = []
        for start, end in pairwise(row.cu_episodes.tolist()):
            gradients = torch.autograd.grad(logprob[start:end].sum(), parameters, retain_graph=True)
            flat.append(torch.cat([gradient.flatten() for gradient in gradients]))
    return [(torch.stack(flat), torch.ones(len(flat), 1, dtype=flat[0].dtype, device=flat[0].device))]


DAMPING = 1e-5  # paper App. F; the precision of a parameter about which no token says anything


def compression(kind: str, factors: Factors, cu_episodes: Tensor, fisher: Sequence[Tensor], count: float,
                move: Sequence[Tensor] | None = None) -> Tensor:
    """C_k of every episode, [K] fp64, for gradients g_k given as factors: what the virtual step D_k = g_k costs.

    fisher   per matrix [D2, D1], the sum over `count` tokens of squared token gradients: count · F
    diag     ½ Σ_j (N F_jj + λ) D_kj²        KL between Gaussians of precision N F + λ, N = count              L2T §4.2, Eq. 8
    rank1    (g_k · D_k)² = ‖g_k‖⁴           as printed                                                        L2T Eq. 4
    natural  (g_k · D_k)², D_k = (F + λ)⁻¹ g_k
    drift    (g_k · D_k)², D_k = `move`, the parameters' way since the start of training

    The size of the virtual step is left out: it is a common factor, which `normalise_compression` removes.
    """
    if kind == "diag":
        return sum(0.5 * episode_quadratic(x, g, cu_episodes, nF + DAMPING) for (x, g), nF in zip(factors, fisher))
    if kind == "rank1":
        return sum(ghost_norm(x, g, cu_episodes) for x, g in factors) ** 2  # L2T Eq. 4
    if kind == "natural":
        damped = [1 / (nF / max(count, 1) + DAMPING) for nF in fisher]
        return sum(episode_quadratic(x, g, cu_episodes, w) for (x, g), w in zip(factors, damped)) ** 2
    if kind == "drift":
        return sum(episode_quadratic(x, g, cu_episodes, d, power=1) for (x, g), d in zip(factors, move)) ** 2
    raise ValueError(f"compression must be diag, rank1, natural or drift, not {kind!r}")


def _alone(value: Tensor) -> Tensor:
    """The sum over ranks, for a caller that is the only one."""
    return value


def normalise_compression(C: Sequence[Tensor], kappa: float, reduce: Callable[[Tensor], Tensor] = _alone) -> list[Tensor]:
    """kappa C / (mean over all ranks' completions of a completion's total C), so that the mean completion pays kappa.

    C: list of [K_i]. reduce sums a tensor over ranks. Zeros where that mean is 0.
    """
    total, count = reduce(torch.tensor([sum(float(c.sum()) for c in C), len(C)], dtype=torch.float64)).tolist()
    return [kappa * count / total * c if total > 0 else torch.zeros_like(c) for c in C]


class Proxy:
    """The parameters whose gradient the penalty sees, and their running diagonal Fisher.

    svd         core of the LM head's SVD, rank = `rank_share` of the width; decomposed anew every `refresh_every` steps
    lm_head     the LM head
    last_block  q, o, gate, up and down of the last block
    layers      30 % of the blocks, drawn once: slow, a backward per episode, and memory for every episode's gradient

    F is the mean over completion tokens of squared temperature-1 score gradients, unweighted by any advantage, of steps before
    this one, each step fading by `decay`; N is the faded number of those tokens. The first step, and the first after a
    refresh, which starts F anew in the new basis, use their own tokens instead.

    model       whole on this rank, in the weights that sampled (the sampler's own copy)
    drift       keep the starting weights, for compression="drift"; in a bf16 copy, drift below its rounding is lost
    """

    def __init__(self, model: Transformer, kind: str = "svd", rank_share: float = 0.1, decay: float = 0.95,
                 refresh_every: int = 50, drift: bool = False, seed: int = 0):
        if kind not in ("svd", "lm_head", "last_block", "layers"):
            raise ValueError(f"proxy must be svd, lm_head, last_block or layers, not {kind!r}")
        if not 0 < rank_share <= 1:
            raise UserError(f"rank share {rank_share} is outside (0, 1]")
        self.model, self.kind, self.decay, self.refresh_every = model, kind, decay, refresh_every
        self.rank = max(1, round(rank_share * model.config.width))
        layers = len(model.blocks)
        drawn = torch.randperm(layers, generator=torch.Generator().manual_seed(seed))[: max(1, round(0.3 * layers))].tolist()
        self.parameters = [p for layer in sorted(drawn) for p in model.blocks[layer].parameters() if p.ndim == 2]
        self.V = self.S = self.U = None  # svd: basis of the LM head; U only where drift needs it
        self.start = [matrix.clone() for matrix in self._matrices()] if drift else None
        self.fisher: list[Tensor] = []  # per matrix [D2, D1]: N F
        self.count = 0.0  # N

    def begin(self, step: int) -> None:
        """Before a step's `penalties`: decompose the LM head if it is time."""
        if self.kind == "svd" and (self.V is None or step % self.refresh_every == 0):
            weight = self.model.head_weight.detach()
            self.V, self.S = svd_basis(weight, self.rank)
            self.U = (weight.to(self.V.dtype) @ self.V / self.S) if self.start else None
            self.fisher, self.count = [], 0.0

    def penalties(self, kind: str, turns: Sequence[Turn], episodes: Sequence[Episodes], budget: int = 8192,
                  reduce: Callable[[Tensor], Tensor] = _alone) -> list[Tensor]:
        """Raw C_k of each completion, list of [K_i] fp64 on the CPU; afterwards the Fisher learns from these tokens.

        kind as in `compression`; a forward takes completions of at most `budget` tokens, prompts included; reduce sums a
        tensor over ranks and is called equally often on each.
        """
        assert self.kind != "svd" or self.V is not None, "begin(step) comes first"
        rows = list(self._rows(turns, episodes, budget))
        first = not self.fisher
        if first:
            squares = self._zeros()
            for row in rows:
                _add_squares(squares, self.factors(row))
            self._learn(squares, turns, reduce)
        move = self._move() if kind == "drift" else None
        squares, values = self._zeros(), []
        for row in rows:
            factors = self.factors(row)
            cu_episodes = torch.arange(len(row.cu_episodes)) if self.kind == "layers" else row.cu_episodes
            values.append(compression(kind, factors, cu_episodes, self.fisher, self.count, move).cpu())
            _add_squares(squares, factors)
        if not first:
            self._learn(squares, turns, reduce)
        return list(torch.cat(values).split([len(e) for e in episodes])) if values else []

    def factors(self, row: Row) -> Factors:
        """The gradient factors of a row's completion tokens."""
        if self.kind == "last_block":
            return block_factors(self.model, row)
        if self.kind == "layers":
            return parameter_factors(self.model, row, self.parameters)
        hidden, weight, targets = row.hidden, self.model.head_weight.detach(), row.tokens[row.own]
        if hidden is None:
            with torch.no_grad():
                hidden = self.model(row.tokens, row.cu_seqlens)[row.own - 1]
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
        """The proxy's parameters as they stand in the model, a matrix [D2, D1] for each factor pair."""
        if self.kind == "last_block":
            block = self.model.blocks[-1]
            q = block.qkv.weight[: block.heads * block.head_dim]
            return [w.detach() for w in (q, block.o.weight, block.gate_up.weight, block.down.weight)]
        if self.kind == "layers":
            return [torch.cat([p.detach().flatten() for p in self.parameters])[None]]
        return [self.model.head_weight.detach()]

    def _move(self) -> list[Tensor]:
        """How far the proxy's parameters are from the start of training."""
        assert self.start is not None, 'compression "drift" needs Proxy(drift=True)'
        way = [(now - start).to(torch.promote_types(now.dtype, torch.float32)) for now, start in zip(self._matrices(), self.start)]
        return [self.U.T @ d @ self.V for d in way] if self.kind == "svd" else way

    def _zeros(self) -> list[Tensor]:
        if self.kind == "svd":
            return [self.V.new_zeros(len(self.S), len(self.S))]
        return [torch.zeros_like(m, dtype=torch.promote_types(m.dtype, torch.float32)) for m in self._matrices()]

    def _learn(self, squares: list[Tensor], turns: Sequence[Turn], reduce: Callable[[Tensor], Tensor]) -> None:
        """Fade what is known, add a step's squared gradients and tokens, summed over ranks."""
        squares = [reduce(s).to(s) for s in squares]
        count = float(reduce(torch.tensor(float(sum(len(turn.completion) for turn in turns)))))
        self.fisher = [self.decay * old + new for old, new in zip(self.fisher, squares)] if self.fisher else squares
        self.count = self.decay * self.count + count


def _add_squares(squares: list[Tensor], factors: Factors) -> None:
    """Sums over tokens, into `squares`."""
    for total, (x, g) in zip(squares, factors):
        total += diagonal_fisher(x, g) * len(x)

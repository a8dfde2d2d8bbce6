"""L2T, Learning to Think (arXiv 2505.10425): GRPO with a reward for each episode of a completion's thinking.

    J_k       = p(gold answer | prompt, episodes 1 … k, a text that asks for the answer)        gain.py
    C_k       = ½ Σ_j (N F_jj + λ) Δ_kj²,   Δ_k = η ∇ log π(episode k)                          compression.py
    r_prg_k   = (J_k − J_{k−1}) − β C_k                                                  Eq. 3  credit.py
    r_t, A_t  episode rewards spread over tokens, compared within the group              Alg. 1     credit.py

Read in this order:

    episodes        a completion's token ids -> episodes: spans for credit, cuts for probes
    gain            J_0, …, J_K from short probes on the KV pages of a finished completion
    compression     what a gradient step on an episode moves, for all episodes in one pass (kernels/fisher.py)
    credit          process rewards, token rewards, token advantages: the paper's Algorithm 1
    preset          the three steps of a training step: rollout, reward, advantages
    exits           S-GRPO, another paper: the forced answers themselves are trained on
    prm, prm_training    a step reward model as another estimator of J, and how it is trained

docs/l2t.md is the walk through them, with what was measured and where the code departs from the paper.
Nothing outside this folder imports it, except train.py and tools/.
"""

from thinkrl.l2t.compression import Proxy, normalise_compression
from thinkrl.l2t.credit import (
    episode_rewards,
    process_reward,
    returns_to_go,
    to_go_advantages,
    token_advantages,
    token_rewards,
)
from thinkrl.l2t.episodes import Episodes, segment

__all__ = [
    "Episodes",
    "Proxy",
    "episode_rewards",
    "normalise_compression",
    "process_reward",
    "returns_to_go",
    "segment",
    "to_go_advantages",
    "token_advantages",
    "token_rewards",
]

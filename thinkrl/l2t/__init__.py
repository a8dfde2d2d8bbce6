"""L2T, Learning to Think (arXiv 2505.10425)."""

from thinkrl.l2t.compression import Proxy, normalise_compression
from thinkrl.l2t.credit import episode_rewards, process_reward, returns_to_go, token_advantages, token_rewards
from thinkrl.l2t.episodes import Episodes, segment

__all__ = [
    "Episodes",
    "Proxy",
    "episode_rewards",
    "normalise_compression",
    "process_reward",
    "returns_to_go",
    "segment",
    "token_advantages",
    "token_rewards",
]

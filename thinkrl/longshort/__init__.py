"""Long⊗Short, Not All Thoughts are Generated Equal (arXiv 2505.11827)."""

from thinkrl.longshort.conversation import assemble, build
from thinkrl.longshort.protocol import format_reward, length_reward
from thinkrl.longshort.thoughts import importance, label

__all__ = ["assemble", "build", "format_reward", "importance", "label", "length_reward"]

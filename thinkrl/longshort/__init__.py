"""Long⊗Short, Not All Thoughts are Generated Equal (arXiv 2505.11827): two policies answer in turns.

    M(y_i)    importance of the i-th thought of a long chain, from rollouts       Eq. 1  thoughts.py
    long      writes <think>…</think>, the important thoughts
    short     writes <answer>…</rethink> to ask for another thought, or <answer>…</answer> to finish
    reward    η·EM + λ·FM + µ·LM: the answer, the form and length of own turns    Eq. 9  protocol.py

Read in this order:

    conversation    the roles' prompts and tags, and the one builder of prompt ids for SFT, RL and evaluation
    thoughts        a long chain -> thoughts -> importance -> "long" | "short": what chunk.py writes for the
                    cold start
    protocol        many conversations at once, the role rewards, the rounds
    cold_start      chunk.py's rows for train.py sft
    preset          the alternation: each round trains one role by GRPO against the other one, frozen

docs/longshort.md is the walk through them, with what was measured and where the code departs from the paper.
Nothing outside this folder imports it, except train.py, sample.py, chunk.py and tools/.
"""

from thinkrl.longshort.conversation import assemble, build
from thinkrl.longshort.protocol import format_reward, length_reward
from thinkrl.longshort.thoughts import importance, label

__all__ = ["assemble", "build", "format_reward", "importance", "label", "length_reward"]

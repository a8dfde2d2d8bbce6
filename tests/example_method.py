"""A whole method: REINFORCE, whose baseline is the mean reward of the step's completions, over all ranks.

A_i = r_i - mean_j r_j          one number for all tokens of completion i
"""

import torch

from thinkrl.distributed import global_sum
from thinkrl.learner import model_path, new_actor
from thinkrl.presets import Preset
from thinkrl.rollout import TRAINING, prompt_ids, require_room, rollout
from thinkrl.tokenizer import Tokenizer


class Reinforce(Preset):
    def __init__(self, config, world):
        self.config, path = config, model_path(config.model)
        self.tokenizer = Tokenizer(path)
        self.learners = {"policy": new_actor(path, config, world, self.tokenizer)}

    def require_room(self, problems, training):
        c, context = self.config, self.learners["policy"].policy.config.max_positions
        prompts = [prompt_ids(problem, self.tokenizer, c.system, c.suffix) for problem in problems]
        require_room(problems, prompts, context, c.max_tokens)

    def begin_step(self, step):
        return self.learners["policy"]

    def attempt(self, problems, n, temperature, address):
        c, sampler = self.config, self.learners["policy"].sampler
        drawn = dict(max_tokens=c.max_tokens, temperature=temperature, seed=c.seed, address=address)
        asked = dict(system=c.system, suffix=c.suffix)
        return rollout(sampler, self.tokenizer, problems, group_size=n, **drawn, **asked)

    def rollout(self, problems, step, tally):
        return self.attempt(problems, self.config.group_size, self.config.temperature, (TRAINING, step))

    def advantages(self, trajectories, step, tally):
        rewards = torch.tensor([t.reward for t in trajectories])
        total, count = global_sum(torch.stack([rewards.sum(), torch.tensor(float(len(rewards)))]))
        return [(t.reward - total / count).float().expand(t.tokens) for t in trajectories]

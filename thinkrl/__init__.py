"""thinkrl: reinforcement learning of efficient reasoning, from scratch, to be read. Start with train.py."""

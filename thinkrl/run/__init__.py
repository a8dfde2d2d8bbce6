"""A run as others see it: its folder, who may write there, what it logs, and how it is asked to stop.

folder    names and opens the folder of a run; finds, reads and compares old ones
lock      lets one process at a time write to a folder
signals   ends a run where nothing is lost
metrics   adds up a step's numbers over all ranks and writes metrics.jsonl and samples.jsonl
sinks     sends the same to Weights & Biases and TensorBoard
files     writes files that are whole or not there
parts     keeps results line by line, so that an interrupted program continues
"""

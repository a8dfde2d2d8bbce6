"""A run's folder, its lock, logs, and stop signals.

folder    names and opens the folder of a run; finds, reads and compares earlier ones
lock      lets one process at a time write to a folder
signals   stop a run after a step, with a checkpoint
watch     ends a job of which one rank stalls, and names it
metrics   sum a step's numbers over all ranks and write metrics.jsonl and samples.jsonl
sinks     send the same to Weights & Biases and TensorBoard
batch     keeps the rows of a step that was not finite
files     read JSON files, and write them atomically
parts     store results line by line, so that an interrupted program can continue
"""

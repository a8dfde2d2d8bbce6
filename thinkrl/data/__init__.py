"""From published files to the problems of a run.

Read in this order:

    rows        files and datasets as rows: JSON, CSV, parquet, the hub
    layouts     a row -> a problem with its gold answer
    chats       a row -> a chat to train on (train.py sft)
    problems    the order of the problems on every rank, and the prompt of a problem
"""

"""Decoding with a paged KV cache; `thinkrl.sampler` is what callers see of it.

Read in this order:

    pages          which pages of the KV cache belong to which sequence
    paged_model    the model's layers, reading keys and values from pages
    step           one token for every running row, eager or as a CUDA graph
    loop           many requests through a fixed number of rows: admit, step, finish, preempt
"""

"""Decoding with a paged KV cache; callers use it through `thinkrl.sampler`.

Read in this order:

    pages          which pages of the KV cache belong to which sequence
    paged_model    the model's layers, reading keys and values from pages
    step           one token for every running row, eager or as a CUDA graph
    loop           many requests in a limited number of rows: admit, reserve, step, retire
"""

"""One operation per file: formula, PyTorch reference, Triton kernel, dispatch, benchmark. Imports nothing of
thinkrl.
"""

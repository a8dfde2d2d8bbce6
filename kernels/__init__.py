"""One file = one operation: formula, slow twin, Triton kernel, dispatch, benchmark. Knows nothing of
thinkrl.
"""

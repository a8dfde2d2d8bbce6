"""The compiler and the interpreter exclude each other: a process has one or the other.

pytest                                          everything but test_aot.py, kernels in the interpreter without
                                                a GPU
THINKRL_AOT=1 pytest tests/kernels/test_aot.py  the ahead-of-time compile checks
"""

import os

collect_ignore = [] if "THINKRL_AOT" in os.environ else ["test_aot.py"]

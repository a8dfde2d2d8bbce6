"""No GPU: Triton kernels run in the interpreter, which must be chosen before triton is imported."""

import os

import torch

if not torch.cuda.is_available() and "THINKRL_AOT" not in os.environ:
    os.environ["TRITON_INTERPRET"] = "1"
    torch.set_num_threads(1)  # tests that launch ranks set their own; many tiny ops gain nothing from two

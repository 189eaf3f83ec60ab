"""What every file of tests of Triton kernels needs: where they run, and on what condition.

They are interpreted where there is no GPU and compiled where there is one. Without either, importing this module skips
the file that does.
"""

import pytest
import torch

from minids import triton_env

pytest.importorskip("triton")
if triton_env.mode() == "absent":
    pytest.skip("triton was imported without TRITON_INTERPRET=1 and there is no GPU", allow_module_level=True)
if triton_env.mode() == "interpreter" and (fault := triton_env.interpreter_fault()):
    pytest.skip(f"there is no GPU, and of the interpreter: {fault}", allow_module_level=True)

DEVICE = "cuda" if triton_env.mode() == "gpu" else "cpu"
MARKS = [pytest.mark.usefixtures("poison")]
MARKS += [pytest.mark.gpu] if DEVICE == "cuda" else []  # `make gpu` runs all of such a file
on_a_gpu = pytest.mark.skipif(DEVICE == "cpu", reason="there is no GPU: the other tests of this file are interpreted")
interpreted = pytest.mark.skipif(DEVICE == "cuda", reason="the meter counts in the interpreter; set TRITON_INTERPRET=1")
DTYPES = [torch.float32, torch.float16, torch.bfloat16]

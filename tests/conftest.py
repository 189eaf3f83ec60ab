"""Before any test imports triton (transformers does), choose the interpreter where there is no GPU; one thread each."""

import torch

from minids import triton_env  # noqa: F401

torch.set_num_threads(1)  # the tensors of tests are small, and tests run beside one another

"""Before any test imports triton (transformers does), choose the interpreter where there is no GPU."""

from minids import triton_env  # noqa: F401

"""What a GPU would compile when a model trains and writes, compiled as it is launched: see rehearsal.py."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from minids import triton_env

pytestmark = pytest.mark.skipif(not triton_env.installed(), reason="triton is not installed")
CASES = ("train tiny bf16, short", "train tiny fp8, short", "write tiny fp32")


@pytest.fixture(scope="module")
def parts():
    """{(case, part): {"launches", "compiled"}} of CASES for Hopper, from one process; an error fails every test."""
    command = [sys.executable, str(Path(__file__).with_name("rehearsal.py")), "90", *CASES]
    root = str(Path(__file__).parents[1])
    done = subprocess.run(command, env={**os.environ, "PYTHONPATH": root}, capture_output=True, text=True)
    found = [json.loads(line) for line in done.stdout.splitlines()]
    errors = [one["error"] for one in found if "error" in one]
    assert done.returncode == 0 and not errors, f"{done.stderr[-3000:]}\n{errors}"
    return {(one["case"], one["part"]): one for one in found}


def test_a_step_compiles_once_and_a_ragged_batch_nothing(parts):
    for (case, part), one in parts.items():
        assert sum(one["launches"].values()) > 1, (case, part)
        again = part in ("the next", "a ragged batch", "another") or (part == "1 x 37 + 2" and "write" in case)
        assert not again or not one["compiled"], (case, part, [found["given"] for found in one["compiled"]])
    assert parts["train tiny bf16, short", "a step"]["compiled"]


def test_what_is_compiled_fits_and_uses_the_tensor_cores(parts):
    for (case, part), one in parts.items():
        for found in one["compiled"]:
            assert found["spills"] == 0 and found["shared"] <= 227 * 1024, (case, part, found)
            multiplies = found["kernel"] in ("matmul_kernel", "up_kernel", "down_backward_kernel", "dw_kernel")
            assert "fp32" in case or not multiplies or found["wgmma"] >= 4, found


def test_every_kernel_of_a_step_is_launched(parts):
    launched = {name for one in parts.values() for name in one["launches"]}
    assert launched >= {
        *("rms_norm_kernel", "rms_norm_backward_kernel", "rope_kernel", "silu_mul_kernel", "silu_mul_backward_kernel"),
        *("count_kernel", "place_kernel", "combine_kernel", "up_kernel", "product_kernel", "down_backward_kernel"),
        *("dw_kernel", "cross_entropy_kernel", "decode_kernel", "merge_kernel"),
        *("tiles_kernel", "blocks_kernel", "matmul_kernel"),
    }

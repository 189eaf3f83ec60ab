"""Kernels that Triton's interpreter runs and its compiler refuses are told apart by their text."""

import pytest
from cells import Notebook

from minids.lab import compilable, exercises
from minids.lab.exercise import REGISTRY
from minids.lab.judge import FAIL, judge

pytest.importorskip("triton")
HEAD = """
@triton.jit
def add_kernel(x, y, out, n, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
"""
ADD = "tl.store(out + at, tl.load(x + at, mask=at < n) + tl.load(y + at, mask=at < n), mask=at < n)"
PRODUCT = "tl.dot(tl.zeros((16, 16), tl.float16), tl.zeros((16, 16), tl.float16))"


@pytest.fixture
def kernel():
    """A function that gives add_kernel with `body` behind its first line, in a notebook that knows WIDE and helper."""
    notebook = Notebook()
    notebook.cell("import triton\nimport triton.language as tl\nWIDE = 2\nC = tl.constexpr(2)\ndef helper(x): return x")
    notebook.cell("@triton.jit\ndef jitted(x):\n    return x\n")
    return lambda body: notebook.cell(HEAD + "".join(f"    {line}\n" for line in body.splitlines()))


@pytest.mark.parametrize(
    "body, line, words",
    [
        (f"while True:\n    {ADD}\n    break", 5, "a kernel has no `break`"),
        (f"for i in range(n):\n    if i == 0:\n        {ADD}\n        return", 3, "a kernel has no `return`"),
        (f"f = lambda a: a\n{ADD}", 3, "a kernel has no `lambda`"),
        (f"import math\n{ADD}", 3, "a kernel has no `import`"),
        (f"yield {ADD}", 3, "a kernel has no `yield`"),
        (f"wide = WIDE\n{ADD}", 3, "WIDE is a number from outside"),
        (f"at = helper(at)\n{ADD}", 3, "helper is a plain function"),
        (f"s = 0.0\nfor i in range(n):\n    s += {PRODUCT}\n{ADD}", 5, "s is a number before the loop"),
        (f"s = 0\nwhile n < 0:\n    s = 2 * {PRODUCT}.to(tl.float32)\n{ADD}", 5, "s is a number before the loop"),
    ],
)
def test_what_a_compiler_refuses_is_named(kernel, body, line, words):
    outcome = judge(exercises.find("05.2"), kernel(body))
    assert outcome.verdict == FAIL and outcome.details[0].startswith(f"line {line} of add_kernel: {words}"), outcome


@pytest.mark.parametrize(
    "body",
    [
        ADD,
        f"at = jitted(at)\nwide = C\n{ADD}",
        f"WIDE = n\nwide = WIDE + 1\n{ADD}",
        f"s = tl.zeros((16, 16), tl.float32)\nfor i in range(n):\n    s += {PRODUCT}\n{ADD}",
        f"s = 0.0\nfor i in tl.static_range(2):\n    s += {PRODUCT}\n{ADD}",
        f"s = 0.0\nfor i in range(n):\n    s += tl.sum(tl.sum({PRODUCT}, 0), 0)\n{ADD}",
        f"if n == 0:\n    return\n{ADD}",
    ],
)
def test_what_compiles_is_let_through(kernel, body):
    assert compilable.problem(kernel(body)) == ""


def test_the_reference_kernels_are_let_through():
    kernels = [exercise.kernel for exercise in REGISTRY.values() if exercise.kernel is not None]
    assert len(kernels) > 5 and not any(map(compilable.problem, kernels))

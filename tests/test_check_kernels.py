"""check of a Triton kernel: values, accesses, bytes, stubs, the learner's line; without Triton, and on a GPU."""

import functools
import os
import re
import subprocess
import sys

import pytest
import torch
from cells import Notebook
from no_triton import HIDE

from minids import triton_env
from minids.lab import check, exercises, hint, launching, mine, progress, tiles
from minids.lab.exercise import REGISTRY, Exercise, cases
from minids.lab.judge import FAIL, NOT_ATTEMPTED, PASS, judge

triton = pytest.importorskip("triton")
tl = pytest.importorskip("triton.language")
pytestmark = pytest.mark.skipif(triton_env.mode() == "gpu", reason="kernels are compiled here; set TRITON_INTERPRET=1")


@triton.jit
def double_kernel(x, out, N, stride, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK)
    row = tl.program_id(0)
    tl.store(out + row * N + at, 2 * tl.load(x + row * stride + at, mask=at < N), mask=at < N)


@triton.jit
def reads_twice(x, out, N, stride, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK)
    row = tl.program_id(0)
    value = tl.load(x + row * stride + at, mask=at < N) + tl.load(x + row * stride + at, mask=at < N)
    tl.store(out + row * N + at, value, mask=at < N)


@triton.jit
def no_mask(x, out, N, stride, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK)
    row = tl.program_id(0)
    tl.store(out + row * N + at, 2 * tl.load(x + row * stride + at))


def launch(kernel, x):
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    kernel[(len(x),)](x, out, x.shape[1], x.stride(0), BLOCK=triton.next_power_of_2(x.shape[1]))
    return out


CELL = """
@triton.jit
def double_kernel(x, out, N, stride, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK)
    inside = at < N
    row = tl.program_id(0)
    value = tl.load(x + row * stride + at, mask=inside)
    tl.store(out + row * N + at, value + value, mask=inside)
"""
LAST = "    tl.store(out + row * N + at, value + value, mask=inside)\n"


@pytest.fixture
def double():
    """An exercise about double_kernel, in the registry while a test runs."""
    sizes = [{"M": 2, "N": 8}, {"M": 3, "N": 5}, {"M": 1, "N": 7}]
    exercise = Exercise(
        "95.1",
        lambda x: 2 * x,
        minutes=1,
        sizes=sizes,
        hints=["one", "two"],
        dtypes=(torch.float32, torch.float16),
        kernel=double_kernel,
        launch=launch,
        traffic=lambda x: 2 * x.nbytes,
    )
    exercise.inputs(lambda r, M, N: r.normal(M, N))
    yield exercise
    del REGISTRY["95.1"]


@pytest.fixture
def cell():
    """A function that runs a cell in which triton and tl are imported, and gives the kernel that it defines."""
    notebook = Notebook()
    notebook.cell("import triton\nimport triton.language as tl\n")
    return notebook.cell


def last_line(text):
    """CELL with `text` in the place of its last line."""
    return CELL.replace(LAST, text)


def lines(capsys):
    return capsys.readouterr().out.splitlines()


# The verdict ---------------------------------------------------------------------------------------------------------


def test_a_right_kernel_passes_with_its_score(double, cell, capsys):
    kernel = cell(CELL)
    assert check(kernel) is kernel
    assert lines(capsys) == [
        "95.1 double_kernel: PASS",
        "  bytes moved / fewest for this algorithm: 1.00, and no access out of bounds, in 10 cases",
        "  your kernel is used from here on; 1 of 1 in lesson 95",
    ]


def test_a_wrong_value_gives_the_reference_kernel(double, cell, capsys):
    assert check(cell(last_line(LAST.replace("value + value", "value + 1")))) is double_kernel
    said = lines(capsys)
    assert said[0] == "95.1 double_kernel: FAIL at M=2, N=8, float32"
    assert said[1].startswith("  the result[0, 0]: got ") and "10 of 10 cases fail" in said[2]
    x = torch.randn(3, 5)
    assert torch.equal(launch(exercises.reference("95.1"), x), 2 * x)


def test_an_access_out_of_bounds_fails_though_the_values_are_right(double, cell, capsys):
    check(cell(CELL.replace("at, mask=inside)\n    tl", "at)\n    tl")))
    said = "\n".join(lines(capsys))
    assert "95.1 double_kernel: FAIL at M=3, N=5, float32" in said
    assert "load out of bounds at element 15 of x, which has 15 (program (2, 0, 0), 3 lanes)" in said
    assert "double_kernel, line 6: value = tl.load(x + row * stride + at)" in said
    assert "→ A lane reads or writes outside of the tensor" in said


def test_waste_fails_with_both_numbers(double, capsys):
    assert check(reads_twice, "95.1") is double_kernel
    said = "\n".join(lines(capsys))
    assert "it took 192 bytes (128 loaded, 64 stored) where 128 are enough: 1.50 times as many" in said
    assert "→ The values are right, the traffic is not" in said


def test_a_little_waste_passes(double, monkeypatch):
    monkeypatch.setattr(double, "traffic", lambda x: 2 * x.nbytes / 1.04)
    assert judge(double, double_kernel).verdict == PASS
    monkeypatch.setattr(double, "traffic", lambda x: 2 * x.nbytes / 1.06)
    assert judge(double, double_kernel).verdict == FAIL


def test_without_traffic_bytes_do_not_count(double, monkeypatch):
    monkeypatch.setattr(double, "traffic", None)
    assert judge(double, reads_twice).verdict == PASS


def test_changing_the_argument_fails_with_its_own_sentence(double, cell, capsys):
    check(cell(last_line(LAST + "    tl.store(x + row * stride + at, value + 1, mask=inside)\n")))
    said = "\n".join(lines(capsys))
    assert "its argument x is not what it was before the call" in said
    assert "→ It writes into x, which it must only read" in said


def test_memory_that_was_never_written_is_nan(double, cell, capsys):
    check(cell(last_line(LAST.replace("mask=inside", "mask=at < 4"))))
    said = "\n".join(lines(capsys))
    assert "got nan" in said and "→ The result holds NaN: part of it was never written" in said


def test_nan_that_is_meant_explains_nothing(double, cell, capsys):
    double.reference = lambda x: torch.where(x > 0, 2 * x, float("nan"))
    check(cell(last_line(LAST.replace("value + value", 'tl.where(value > 0, value + 3, float("nan"))'))))
    said = "\n".join(lines(capsys))
    assert "95.1 double_kernel: FAIL" in said and "NaN" not in said


def test_rows_that_are_apart_are_tried(double, cell, capsys):
    tried = cases(double)
    apart = [case.args[0] for case in tried if case.strided]
    assert [x.stride() for x in apart] == [(16, 1), (16, 1), (10, 1), (10, 1)]
    base = apart[2]._base
    assert base[:, 5:].isnan().all() and not apart[2].isnan().any()
    check(cell(CELL.replace("row * stride", "row * N")))
    said = "\n".join(lines(capsys))
    assert "FAIL at M=2, N=8, float32, not contiguous" in said and "→ It is right for contiguous inputs only" in said


def test_cases_of_one_dimension_have_no_rows_to_part(double):
    double.inputs(lambda r, M, N: r.normal(N))
    assert not any(case.strided for case in cases(double))


SUM = """
@triton.jit
def double_kernel(x, out, N, stride, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK)
    row = tl.program_id(0)
    value = tl.load(x + row * stride + at, mask=at < N{other})
    total = tl.sum({value}, 0)
    tl.store(out + row * N + at, 2 * value + 0 * total, mask=at < N)
"""


def test_a_masked_lane_without_other_is_undefined(double, cell):
    wrong = judge(double, cell(SUM.format(other="", value="value")))
    assert wrong.verdict == FAIL and "got nan" in wrong.details[0] and "masked load without `other`" in wrong.diagnosis
    assert judge(double, cell(SUM.format(other=", other=0.0", value="value"))).verdict == PASS
    assert judge(double, cell(SUM.format(other="", value="tl.where(at < N, value, 0.0)"))).verdict == PASS


SINGLE = """
@triton.jit
def double_kernel(x, out, N, stride, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK)
    row = tl.program_id(0)
    nothing = tl.load(x + row, mask=row < 0, other=0.0)
    tl.store(out + row * N + at, 2 * tl.load(x + row * stride + at, mask=at < N) + nothing, mask=at < N)
"""


def test_a_single_number_that_is_masked_off_is_its_other(double, cell):
    assert judge(double, cell(SINGLE)).verdict == PASS
    assert judge(double, cell(SINGLE.replace(", other=0.0", ""))).verdict == FAIL


def test_a_whole_number_that_is_masked_off_is_no_place():
    assert launching.undefined(tl.int64, torch.arange(1).numpy().dtype) == 10**9
    assert launching.undefined(tl.int8, torch.zeros(1, dtype=torch.int8).numpy().dtype) == 42


NO_STORE = LAST.replace("tl.store(out + row * N + at, value + value, mask=inside)", "out = value + value")


@pytest.mark.parametrize(
    "last, sentence",
    [
        (NO_STORE, "Nothing is stored: a kernel gives nothing back"),
        (LAST + LAST, "The values are right, but numbers are stored more than once"),
        (
            f"    for i in range(1, 3):\n        wide = i.to(tl.float32)\n{LAST}",
            "In Triton's interpreter a single number",
        ),
    ],
)
def test_what_is_wrong_with_a_kernel_is_said(double, cell, last, sentence):
    outcome = judge(double, cell(last_line(last)))
    assert outcome.verdict == FAIL and outcome.diagnosis.startswith(sentence)


def test_lanes_that_are_sent_elsewhere_are_waste(double, cell):
    double.sizes[0] = {"M": 8, "N": 8}
    outcome = judge(double, cell(CELL.replace("at, mask=inside)\n    tl", "at % N)\n    tl")))
    assert outcome.diagnosis.startswith("The values are right, the traffic is not where a block is not full")


def test_the_interpreter_is_as_it_was(double):
    from triton.language.semantic import TritonSemantic
    from triton.runtime.interpreter import interpreter_builder

    before = type(interpreter_builder).create_masked_load, TritonSemantic.load
    judge(double, no_mask)
    assert (type(interpreter_builder).create_masked_load, TritonSemantic.load) == before
    assert "create_masked_load" not in vars(interpreter_builder)


# Known wrong kernels -------------------------------------------------------------------------------------------------


def test_known_wrong_kernels_are_told_apart(double, cell):
    double.wrong("no mask at all")(no_mask)
    double.wrong("x is read twice")(reads_twice)
    assert judge(double, cell(CELL.replace(", mask=inside", ""))).diagnosis == "no mask at all"
    twice = CELL.replace("value + value", "value + tl.load(x + row * stride + at, mask=inside)")
    assert judge(double, cell(twice)).diagnosis == "x is read twice"
    half = judge(double, cell(CELL.replace("at, mask=inside)\n    tl", "at)\n    tl"))).diagnosis
    assert half.startswith("A lane reads or writes outside")
    thrice = twice.replace("+ value", "- value + 2 * tl.load(x + row * stride + at, mask=inside)")
    thrice = thrice.replace("value - value", "value - value + 0 * tl.load(x + row * stride + at, mask=inside)")
    assert judge(double, cell(thrice)).verdict == FAIL


def test_another_amount_of_waste_is_another_mistake(double, cell):
    double.wrong("x is read twice")(reads_twice)
    often = LAST.replace("value + value", "value + value + 0 * (" + " + ".join(["MORE"] * 3) + ")")
    outcome = judge(double, cell(last_line(often.replace("MORE", "tl.load(x + row * stride + at, mask=inside)"))))
    assert outcome.diagnosis.startswith("The values are right, the traffic is not")


# What is no answer, and what raises ----------------------------------------------------------------------------------

HEAD = CELL[: CELL.index("    at =")]


STUBS = ["raise NotImplementedError  # your code here", "pass", "'''text alone'''"]
STUBS += ["'''text'''\n    raise NotImplementedError('later')"]


@pytest.mark.parametrize("body", STUBS)
def test_a_stub_is_not_attempted(double, cell, capsys, body):
    assert check(cell(f"{HEAD}    {body}\n")) is double_kernel
    assert lines(capsys)[0] == "95.1 double_kernel: NOT ATTEMPTED"


def test_a_stub_is_seen_in_its_source(cell):
    assert launching.is_stub(cell(f"{HEAD}    for at in range(N):\n        raise NotImplementedError\n    at = 2\n"))
    assert launching.is_stub(cell(f"{HEAD}    at = 1\n    raise NotImplementedError  # your code here\n"))
    assert not launching.is_stub(cell(CELL)) and not launching.is_stub(double_kernel)
    assert not launching.is_stub(cell(f"{HEAD}    raise ValueError('NotImplementedError')\n"))


def test_the_reference_kernel_is_not_attempted(double, capsys):
    assert check(double_kernel) is double_kernel
    assert lines(capsys)[:2] == [
        "95.1 double_kernel: NOT ATTEMPTED",
        "  this is the reference; run the cell with your own function",
    ]


@pytest.mark.parametrize(
    "body, error, line",
    [
        ("tl.store(out + missing, value)", "NameError: name 'missing' is not defined", "line 6"),
        ("tl.store(out + tl.arange(0, 3), value)", "ValueError: arange's range must be a power of 2", "line 6"),
        ("raise IndexError('mine')", "IndexError: mine", "line 6"),
    ],
)
def test_an_exception_shows_the_learners_line(double, cell, capsys, body, error, line):
    check(cell(last_line(f"    {body}\n")))
    said = "\n".join(lines(capsys))
    assert error in said and "InterpreterError" not in said
    assert re.search(rf"in {line}|in line \d of double_kernel: {re.escape(body)}", said), said


def test_an_endless_kernel_is_stopped(double, cell, monkeypatch):
    monkeypatch.setattr(double, "limit", 0.3)
    outcome = judge(double, cell(last_line("    while True:\n        value = value + 1\n")))
    assert outcome.verdict == FAIL and "more than 0.3 seconds" in outcome.diagnosis
    assert judge(double, double_kernel).verdict == PASS


def test_other_parameters_are_refused(double, cell, capsys):
    check(cell(CELL.replace("N, stride,", "width, stride,").replace("* N", "* width").replace("< N", "< width")))
    takes = (
        "your kernel takes (x, out, width, stride, BLOCK); it must take (x, out, N, stride, BLOCK), as the stub does"
    )
    assert lines(capsys)[1] == f"  {takes}"


def test_a_function_without_its_decorator_is_refused(double, cell, capsys):
    check(cell(CELL.replace("@triton.jit\n", "")))
    assert "double_kernel must be a kernel: write @triton.jit" in lines(capsys)[1]


def test_a_kernel_is_refused_where_a_function_is_asked_for(cell, capsys):
    check(cell(CELL), "01.1")
    assert lines(capsys)[1].startswith("  a plain function is asked for here, without @triton.jit")


def test_no_warning_of_numpy_is_shown(double, cell, recwarn):
    judge(double, cell(last_line(LAST.replace("value + value", "2 * value / (value - value)"))))
    assert not [w for w in recwarn if issubclass(w.category, RuntimeWarning)]


# What is kept --------------------------------------------------------------------------------------------------------


def test_a_kernel_that_passed_is_kept_with_what_it_uses(double, cell, capsys):
    cell("FACTOR: tl.constexpr = 2\n")
    cell("@triton.jit\ndef twice(value):\n    return value + value\n")
    kernel = cell(CELL.replace("value + value", "twice(value)"))
    assert check(kernel) is kernel
    source = progress.kept_path(double).read_text()
    assert "import triton\n" in source and "import triton.language as tl\n" in source
    assert source.count("@triton.jit\n") == 2 and "def twice(value)" in source
    kept = mine("double_kernel")
    assert kept is not kernel and tiles.is_kernel(kept) and judge(double, kept).verdict == PASS
    assert capsys.readouterr().err == ""


def test_the_hint_ends_with_a_kernel(double, capsys):
    hint("95.1", 3)
    assert "@triton.jit\ndef double_kernel(x, out, N, stride, BLOCK: tl.constexpr):" in "\n".join(
        line.removeprefix("  ") for line in lines(capsys)
    )


# A GPU ---------------------------------------------------------------------------------------------------------------


@pytest.fixture
def gpu(monkeypatch):
    """As on a GPU, where kernels are compiled and nothing counts; the interpreter plays the device."""
    monkeypatch.setattr(triton_env, "mode", lambda: "gpu")
    monkeypatch.setattr(launching, "on_device", functools.partial(launching.on_device, device="cpu"))


def test_on_a_gpu_the_values_alone_are_checked(double, cell, gpu):
    for right in (double_kernel, reads_twice):
        outcome = judge(double, right)
        assert (outcome.verdict, outcome.details) == (PASS, [launching.ON_GPU])
    wrong = judge(double, cell(last_line(LAST.replace("value + value", "value"))))
    assert wrong.verdict == FAIL and launching.ON_GPU in wrong.details
    assert judge(double, cell(f"{HEAD}    raise NotImplementedError\n")).verdict == NOT_ATTEMPTED


def test_arguments_go_to_the_device_and_back():
    x = torch.arange(12.0).view(3, 4)[:, :3]

    def change(kernel, x):
        assert x.stride() == (4, 1) and x.device.type == kernel
        return x.mul_(2)

    got = launching.on_device(change, "cpu", x, device="cpu")
    assert torch.equal(got, x) and torch.equal(x[1], torch.tensor([8.0, 10.0, 12.0]))


def test_count_gives_the_meter_where_there_is_one(double, monkeypatch):
    x = torch.randn(3, 5)
    result, counted = tiles.count(launch, double_kernel, x)
    assert torch.equal(result, 2 * x) and counted.bytes == 2 * x.nbytes
    monkeypatch.setattr(triton_env, "mode", lambda: "gpu")
    monkeypatch.setattr(torch.Tensor, "cuda", lambda self: self + 1)
    result, counted = tiles.count(launch, double_kernel, x)
    assert torch.equal(result, 2 * (x + 1)) and counted is None
    monkeypatch.setattr(triton_env, "mode", lambda: "absent")
    assert tiles.count(launch, double_kernel, x) == (None, None)


# No Triton -----------------------------------------------------------------------------------------------------------

EARLY = "import triton\nimport triton.language\n"
USE = """
import torch
from minids import triton_env
from minids.lab import check, exercises, hint
from minids.lab.exercise import Exercise
from minids.lab.tiles import tl, triton

@triton.jit
def one_kernel(x, out, BLOCK: tl.constexpr):
    raise NotImplementedError

@triton.jit(do_not_specialize=["n"])
def two_kernel(x, n):
    at = tl.arange(0, 4)

exercise = Exercise("95.2", torch.relu, 1, [{"n": 8}], ["one", "two"], kernel=one_kernel, launch=None)
exercise.inputs(lambda r, n: r.normal(n))
assert two_kernel.arg_names == ["x", "n"]
assert (triton.cdiv(7, 4), triton.cdiv(8, 4)) == (2, 2)
assert [triton.next_power_of_2(n) for n in (1, 2, 3, 5, 8)] == [1, 2, 4, 8, 8]

@triton.jit
def one_kernel(x, out, BLOCK: tl.constexpr):
    tl.store(out, tl.load(x))

print(check(one_kernel) is exercise.kernel)
"""
LAUNCH = """
try:
    one_kernel[(1,)](torch.ones(1), torch.ones(1), BLOCK=1)
except triton_env.TritonUnavailable as error:
    print(error)
"""


def run(code, folder):
    """The lines that Python prints for `code`, in a file of `folder`: Triton reads the source of a kernel."""
    (folder / "cells.py").write_text(code)
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    env |= {"MINIDS_HOME": str(folder)}
    command = [sys.executable, folder / "cells.py"]
    done = subprocess.run(command, capture_output=True, text=True, env=env, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def test_without_triton_a_kernel_is_not_attempted(tmp_path):
    verdict, why, same, error = run(HIDE + USE + LAUNCH, tmp_path)
    assert verdict == "95.2 one_kernel: NOT ATTEMPTED" and same == "True"
    assert why.startswith("  Triton is missing here (") and "arithmetic work" in why
    assert error.startswith("one_kernel needs Triton, but triton is not installed")


def test_triton_imported_too_early_asks_for_a_restart(tmp_path):
    if torch.cuda.is_available():
        pytest.skip("kernels are compiled here")
    verdict, why, *_ = run(EARLY + USE, tmp_path)
    assert verdict == "95.2 one_kernel: NOT ATTEMPTED" and "restart the notebook's kernel" in why

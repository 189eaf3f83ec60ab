"""check, hint, status and mine say what they should, and survive whatever a learner hands in."""

import asyncio
import functools
import json
import random
import re
import signal
import sys
import threading
import time
import types

import numpy as np
import pytest
import torch
from cells import RMS_NORM, Notebook

from minids import layers
from minids.lab import check, exercises, hint, mine, progress, sandbox, solution, status
from minids.lab.exercise import REGISTRY, Exercise
from minids.lab.judge import FAIL, judge

RMS, BITS = exercises.find("01.1"), exercises.find("01.5")
REFERENCE = exercises.reference("01.1")


@pytest.fixture
def notebook():
    return Notebook()


@pytest.fixture
def quick(monkeypatch):
    """Exercises whose calls may take a fifth of a second."""
    for exercise in (RMS, BITS):
        monkeypatch.setattr(exercise, "limit", 0.2)


def right(x, weight, eps):
    return layers.rms_norm(x, weight, eps)


def right_bits(nats_per_token, tokens, nbytes):
    return BITS.reference(nats_per_token, tokens, nbytes)


def rejected(answer, said, *parts, name="01.1"):
    """Assert that `answer` fails, that the reference comes back, and that `parts` are said; gives the lines."""
    given = check(answer, name)
    lines = said()
    assert re.match(r"\d\d\.\d \w+: FAIL( |$)", lines[0]), lines
    assert given is exercises.reference(name)
    text = "\n".join(lines)
    for part in parts:
        assert part in text, text
    return lines


def accepted(answer, said, name="01.1"):
    assert check(answer, name) is answer
    assert said()[0] == f"{exercises.find(name).title}: PASS"


# The verdict ---------------------------------------------------------------------------------------------------------


def test_a_right_answer_passes_and_comes_back(notebook, said):
    rms_norm = notebook.cell(RMS_NORM)
    assert check(rms_norm) is rms_norm
    of_lesson = len(exercises.by_lesson()["01"])
    assert said() == [
        "01.1 rms_norm: PASS",
        f"  your function is used from here on; 1 of {of_lesson} in lesson 01",
    ]


def test_a_pass_alone_renews_the_landing_page(said, monkeypatch):
    from minids.lab import landing

    renewed = []
    monkeypatch.setattr(landing, "renew", lambda: renewed.append(True))
    rejected(lambda x, weight, eps: x, said)
    assert not renewed
    accepted(right, said)
    assert renewed == [True]


def test_a_wrong_answer_gives_the_reference_and_says_why(notebook, said):
    rms_norm = notebook.cell(RMS_NORM.replace(".mean", ".sum"))
    assert check(rms_norm) is REFERENCE
    first, difference, count, help_, why = said()
    assert first == "01.1 rms_norm: FAIL at B=1, T=8, D=16, float32"
    assert re.fullmatch(
        r"  the result\[0, 0, 0\]: got \S+, expected \S+ \(128 of 128 are wrong\); "
        r"error \S+ of the result's scale, allowed 1e-05",
        difference,
    )
    assert count == f"  {len(RMS.sizes) + 2} of {len(RMS.sizes) + 2} cases fail"
    assert help_ == "  the cells below use the reference; for help: hint('rms_norm')"
    assert why.startswith("  → You divide by the root of the SUM of squares")


STUBS = [
    "raise NotImplementedError  # your code here",
    "raise NotImplementedError('later')",
    "...",
    "pass",
    "'''text alone'''",
    "return",
]


@pytest.mark.parametrize("body", STUBS)
def test_a_stub_is_not_attempted(body, notebook, said):
    stub = notebook.cell(f'def rms_norm(x, weight, eps):\n    """Its docstring."""\n    {body}\n')
    assert check(stub) is REFERENCE
    assert said() == [
        "01.1 rms_norm: NOT ATTEMPTED",
        "  to try it: replace the line that raises, run its cell, then this one",
        "  the cells below use the reference; for help: hint('rms_norm')",
    ]


def test_an_error_of_torch_is_no_stub(notebook, said):
    fn = notebook.cell("def rms_norm(x, weight, eps):\n    return x.to(torch.float8_e4m3fn).sum()\n")
    rejected(fn, said, "NotImplementedError: ", "line 2 of rms_norm: return x.to(torch.float8_e4m3fn).sum()")


def test_a_stub_in_one_branch_fails(notebook, said):
    fn = notebook.cell(
        "def rms_norm(x, weight, eps):\n    if len(x) > 1:\n        raise NotImplementedError\n    return x\n"
    )
    rejected(fn, said, "the result")


def test_the_reference_is_not_attempted(said):
    for given in (REFERENCE, RMS.reference):
        assert check(given) is REFERENCE
        assert said() == [
            "01.1 rms_norm: NOT ATTEMPTED",
            "  this is the reference; run the cell with your own function",
        ]


def test_a_wrong_answer_after_a_right_one_leaves_what_passed(notebook, said):
    check(notebook.cell(RMS_NORM))
    said()
    rejected(notebook.cell(RMS_NORM.replace(".mean", ".sum")), said)
    assert "01.1" in progress.load().passed


# What is no plain function -------------------------------------------------------------------------------------------


class Callable:
    def __init__(self, answer=right):
        self.answer = answer

    def __call__(self, x, weight, eps):
        return self.answer(x, weight, eps)

    def rms_norm(self, x, weight, eps):
        return self.answer(x, weight, eps)


class Hostile:
    def __getattr__(self, name):
        raise RuntimeError(name)

    def __repr__(self):
        raise RuntimeError("no text")

    __str__ = __repr__

    def __bool__(self):
        raise RuntimeError("neither")


OBJECTS = {
    "None": (None, "None"),
    "number": (5, "5 was given"),
    "nothing": (0, "0 was given"),
    "huge": (10**5000, "a huge integer"),
    "tensor": (torch.ones(2, 3), "a tensor [2, 3] float32"),
    "array": (np.ones(3), "a numpy array [3] float64"),
    "list": ([1], "a list of 1"),
    "class": (Callable, "the class Callable"),
    "module": (torch, "a module"),
}


@pytest.mark.parametrize("kind", OBJECTS)
def test_an_object_that_is_no_function_fails(kind, said):
    answer, text = OBJECTS[kind]
    rejected(answer, said, "check takes a function; ", text)


@pytest.mark.parametrize("kind", OBJECTS)
def test_an_object_of_no_exercise_comes_back_unchecked(kind, said):
    answer = OBJECTS[kind][0]
    assert check(answer) is answer
    first, second = said()
    assert first.startswith("check: ")
    assert second == "  nothing was checked: what you gave is given back as it is"


@pytest.mark.parametrize("kind", ["nothing", "id", "hostile", "tensor", "number", "empty", "nonsense", "function"])
def test_check_never_raises(kind):
    hostile = Hostile()
    names = {"nothing": None, "id": "01.1", "hostile": hostile, "tensor": torch.ones(2), "number": 5, "empty": ""}
    name = {**names, "nonsense": "nonsense", "function": right}[kind]
    for answer in (hostile, lambda: hostile, lambda *a: hostile, type("Odd", (Hostile,), {}), Exception("x"), b"x"):
        check(answer, name)


def test_the_name_of_a_function_is_no_function(said):
    rejected("rms_norm", said, "check takes the function itself: check(rms_norm), without quotes")
    assert check("rms_norm") is REFERENCE


def test_a_function_of_that_name_in_a_class_fails(said):
    rejected(type("rms_norm", (), {}), said, "check takes a function; the class rms_norm was given")


def test_names_that_are_nearly_right_are_guessed(notebook, said):
    for name in ("rms_nrom", "rmsnorm"):
        fn = notebook.cell(RMS_NORM.replace("rms_norm", name))
        assert check(fn) is fn
        assert said()[0] == f"check: there is no exercise {name!r}; did you mean rms_norm?"
    fn = notebook.cell("def something_else(x):\n    return x\n")
    check(fn)
    assert said()[0] == "check: there is no exercise 'something_else'; status() shows what there is"
    check(right, "77.1")
    assert said()[0] == "check: there is no exercise '77.1'; status() shows what there is"


@pytest.fixture
def twin():
    """A second exercise called rms_norm, in lesson 98."""
    made = Exercise("98.1", layers.rms_norm, minutes=1, sizes=RMS.sizes, hints=["a", "b"])
    made.inputs(RMS.draw)
    yield made
    del REGISTRY["98.1"]


def test_a_name_of_two_lessons_is_asked_for(twin, notebook, said):
    fn = notebook.cell(RMS_NORM)
    assert check(fn) is fn
    assert said()[0] == "check: rms_norm is the name of several exercises; say which: 01.1, 98.1"
    accepted(fn, said, "98.1")
    accepted(fn, said, "01.1 rms_norm")


def test_an_argument_changed_in_place_fails_without_gradients_too(twin, said):
    def in_place(x, weight, eps):
        y = right(x, weight, eps)
        x.zero_()
        return y

    before = "its argument x is not what it was before the call"
    rejected(in_place, said, before, "It changes its argument x in place", name="98.1")


@pytest.fixture
def codes():
    """An exercise whose first argument is FP8: codes, one of them NaN."""

    def widen(x_fp8, scale):
        return x_fp8.to(scale.dtype) * scale

    made = Exercise("98.2", widen, minutes=1, sizes=[{"n": 8}, {"n": 3}], hints=["a", "b"])
    made.inputs(lambda r, n: (torch.arange(125, 125 + n).to(torch.uint8).view(torch.float8_e4m3fn), r.normal(1)))
    yield made
    del REGISTRY["98.2"]


def test_fp8_arguments_arrive_as_codes(codes, said):
    seen = []

    def widen(x_fp8, scale):
        seen.append((x_fp8.dtype, x_fp8.view(torch.uint8)[0].item(), scale.dtype))
        return x_fp8.float() * scale

    accepted(widen, said, "98.2")
    assert set(seen) == {(torch.float8_e4m3fn, 125, torch.float32)}

    def in_place(x_fp8, scale):
        y = x_fp8.float() * scale
        x_fp8.copy_(y)
        return y

    before = "its argument x_fp8 is not what it was before the call"
    rejected(in_place, said, before, "It changes its argument x_fp8 in place", name="98.2")


class Rude(Callable):
    @property
    def __signature__(self):
        raise RuntimeError("none of your business")


def test_an_object_that_breaks_the_check_fails(said):
    rejected(Rude(), said, "your answer cannot be tried: RuntimeError (none of your business)")


def test_a_function_of_another_lesson_is_judged_as_what_it_is_called(said):
    lines = rejected(layers.swiglu, said, "your function takes (x, w_gate, w_up, w_down")
    assert lines[1].endswith("; it must take (x, weight, eps), as the stub does")


def test_lambdas_need_a_name(said):
    answer = lambda x, weight, eps: right(x, weight, eps)  # noqa: E731
    assert check(answer) is answer
    assert said()[0].startswith("check: a lambda has no name; ")
    accepted(answer, said)


def test_the_wrong_number_of_arguments_is_said(notebook, said):
    rejected(lambda x: x, said, "your function takes (x); it must take (x, weight, eps), as the stub does")
    rejected(lambda x, *, weight, eps: x, said, "it must take (x, weight, eps)")
    accepted(lambda x, weight, eps, more=3: right(x, weight, eps), said)
    accepted(lambda *args: right(*args), said)


def test_whatever_can_be_called_can_pass(said):
    accepted(functools.partial(right), said)
    accepted(Callable().rms_norm, said)
    accepted(Callable(), said)
    accepted(torch.no_grad()(lambda *a: BITS.reference(*a)), said, "01.5")
    wrapped = functools.wraps(right)(lambda *args: right(*args))
    accepted(wrapped, said)


def test_a_compiled_function_is_tried_as_it_was_written(notebook, said):
    fn = torch.compile(notebook.cell(RMS_NORM))
    assert check(fn) is fn
    assert said()[0] == "01.1 rms_norm: PASS"
    assert mine("01.1") is not REFERENCE


async def answer_later(x, weight, eps):
    await asyncio.sleep(0)
    return right(x, weight, eps)


def one_by_one(x, weight, eps):
    yield from right(x, weight, eps)


async def one_by_one_later(x, weight, eps):
    yield right(x, weight, eps)


@pytest.mark.parametrize("fn, word", [(answer_later, "async def"), (one_by_one, "yield"), (one_by_one_later, "yield")])
def test_async_functions_and_generators_fail(fn, word, said, recwarn):
    rejected(fn, said, f"your function has `{word}`; a plain function that gives its result by `return` is needed")
    assert not recwarn.list


# Time, prints, state -------------------------------------------------------------------------------------------------


def in_a_thread(fn):
    thread = threading.Thread(target=fn, daemon=True)
    thread.start()
    thread.join(20)
    assert not thread.is_alive()


def forever(*_):
    while True:
        pass


def forever_catching(*_):
    while True:
        try:  # noqa: SIM105
            time.sleep(0.001)
        except Exception:
            pass


def forever_catching_all(*_):
    n = 0
    while True:
        try:  # noqa: SIM105
            n += 1
        except:  # noqa: E722
            pass


def forever_asleep(*_):
    while True:
        try:  # noqa: SIM105
            time.sleep(0.01)
        except:  # noqa: E722
            pass


def forever_printing(*_):
    while True:
        print("again" * 100)


@pytest.mark.parametrize("loop", [forever, forever_catching, forever_catching_all, forever_printing])
@pytest.mark.parametrize("place", ["main", "thread"])
def test_a_function_that_never_returns_is_stopped(loop, place, quick, capsys):
    given, began = [], time.monotonic()
    run = (lambda f: f()) if place == "main" else in_a_thread
    run(lambda: given.append(check(loop, "01.1")))
    assert given == [REFERENCE] and time.monotonic() - began < 10
    out = capsys.readouterr().out
    assert out.startswith("01.1 rms_norm: FAIL at B=1, T=8, D=16, float32\n") and len(out) < 3000
    assert "One call took more than 0.2 seconds and was stopped: is there a loop that never ends?" in out
    time.sleep(0.05)  # no alarm comes late


class Endless(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        while True:
            time.sleep(0.001)


@pytest.mark.skipif(not hasattr(signal, "setitimer"), reason="without alarms a bare except: swallows what stops it")
def test_a_bare_except_around_a_long_call_is_stopped(quick, said):
    rejected(forever_asleep, said, "One call took more than 0.2 seconds")


def test_an_alarm_outside_of_the_call_does_nothing():
    stop = sandbox.by_signal(100)
    try:
        signal.raise_signal(signal.SIGALRM)
    finally:
        stop()


def test_a_backward_pass_that_never_returns_is_stopped(quick, said):
    rejected(lambda x, w, eps: Endless.apply(right(x, w, eps)), said, "One call took more than 0.2 seconds")


def test_a_time_limit_leaves_the_alarm_as_it_was(quick):
    before = signal.signal(signal.SIGALRM, ring := lambda *_: None)
    try:
        check(forever, "01.1")
        assert signal.getsignal(signal.SIGALRM) is ring and signal.getitimer(signal.ITIMER_REAL) == (0, 0)
    finally:
        signal.signal(signal.SIGALRM, before)


@pytest.mark.parametrize("place", ["main", "thread"])
def test_calls_on_the_edge_of_the_limit_leave_no_alarm_behind(place):
    def calls():
        for i in range(60):
            seen.add(type(sandbox.call(time.sleep, (0.002,), 0.0019 + 0.00001 * (i % 30)).error))

    seen = set()
    calls() if place == "main" else in_a_thread(calls)
    assert seen <= {type(None), sandbox.TimeLimit}
    assert signal.getitimer(signal.ITIMER_REAL) == (0, 0)


def test_what_it_prints_is_shown_in_short(said):
    def chatty(x, weight, eps):
        for i in range(20):
            print("line", i)
        return right(x, weight, eps)

    check(chatty, "01.1")
    lines = said()
    assert lines[0] == "01.1 rms_norm: PASS"
    assert lines[1] == "  it printed, in the first case:"
    assert lines[2:10] == [f"      line {i}" for i in range(8)] and lines[10] == "  … and 12 more lines"


def test_a_flood_of_prints_is_kept_small():
    out = sandbox.Printed()
    for _ in range(10_000):
        out.write("x" * 99 + "\n")
    text = out.getvalue()
    assert len(text) < sandbox.KEPT + 100 and text.endswith("more lines\n")


def test_half_a_character_can_be_shown(said):
    def odd(x, weight, eps):
        print("\udc80 <b>")
        return x

    rejected(odd, said, "? <b>")


def test_a_console_without_the_arrow(monkeypatch, tmp_path):
    with open(tmp_path / "console", "w", encoding="ascii") as console:
        monkeypatch.setattr(sys, "stdout", console)
        check(lambda x, weight, eps: x, "01.1")
    assert "  ? It returns its argument x as it is" in (tmp_path / "console").read_text()


def test_a_function_that_remembers_fails(notebook, said):
    fn = notebook.cell("""
calls = []
def bits_per_byte(nats_per_token, tokens, nbytes):
    calls.append(1)
    return nats_per_token / math.log(2) * tokens / nbytes * (len(calls) < 4)
""")
    lines = rejected(fn, said, "the function keeps something between calls", name="01.5")
    assert lines[0].endswith(", tried again")


def test_a_result_in_memory_that_is_used_again_passes(said):
    memory = {}

    def reuse(x, weight, eps):
        if torch.is_grad_enabled() and x.requires_grad:
            return right(x, weight, eps)
        out = memory.setdefault(x.shape, torch.empty(x.shape))
        return out.copy_(right(x, weight, eps))

    accepted(reuse, said)


def state():
    return (
        torch.random.get_rng_state().tolist(),
        random.getstate(),
        np.random.get_state()[1].tolist(),
        torch.get_default_dtype(),
        torch.get_default_device(),
        torch.is_grad_enabled(),
        torch.get_num_threads(),
        torch.get_deterministic_debug_mode(),
        torch.utils.deterministic.fill_uninitialized_memory,
    )


def vandal(x, weight, eps):
    torch.manual_seed(7)
    random.seed(7)
    np.random.seed(7)
    torch.set_default_dtype(torch.float64)
    torch.set_default_device("meta")
    torch.set_grad_enabled(False)
    torch.set_num_threads(2)
    torch.use_deterministic_algorithms(False)
    sys.stdout = None
    raise SystemExit("enough")


def test_the_state_of_the_notebook_is_put_back(said):
    before, out = state(), sys.stdout
    rejected(vandal, said, "SystemExit: enough")
    assert state() == before and sys.stdout is out


def test_the_state_of_the_notebook_does_not_matter(notebook, said):
    fn = notebook.cell(RMS_NORM.replace("* weight", "* weight * torch.ones(len(weight))"))
    torch.set_default_dtype(torch.float64)
    torch.set_default_device("meta")
    try:
        with torch.no_grad():
            accepted(fn, said)
            rejected(lambda x, w, e: x.double(), said, "has dtype float64, expected float32")
        with torch.inference_mode():
            accepted(fn, said)
        assert torch.get_default_dtype() == torch.float64 and torch.get_default_device().type == "meta"
    finally:
        torch.set_default_dtype(torch.float32)
        torch.set_default_device(None)


def test_an_exit_does_not_end_the_notebook(said):
    rejected(lambda x, weight, eps: sys.exit(3), said, "SystemExit: 3")


def test_an_interrupt_interrupts(said):
    def interrupted(x, weight, eps):
        raise KeyboardInterrupt

    before = state()
    with pytest.raises(KeyboardInterrupt):
        check(interrupted, "01.1")
    assert state() == before


# Results -------------------------------------------------------------------------------------------------------------

RESULTS = {
    "float64": (
        lambda x, w, e: right(x, w, e).double(),
        "the result has dtype float64, expected float32, as the inputs",
    ),
    "numpy": (
        lambda x, w, e: right(x.detach(), w.detach(), e).numpy(),
        "the result is a numpy array [1, 8, 16] float32",
    ),
    "list": (
        lambda x, w, e: right(x, w, e).tolist(),
        "the result is a list of 1, expected a tensor [1, 8, 16] float32",
    ),
    "pair": (lambda x, w, e: (right(x, w, e), x), "the result is a tuple of 2"),
    "nan": (lambda x, w, e: right(x, w, e) * float("nan"), "The result holds NaN"),
    "empty": (lambda x, w, e: torch.empty_like(x), "memory from torch.empty starts as NaN here"),
    "shape": (lambda x, w, e: right(x, w, e)[..., None], "the result has shape [1, 8, 16, 1], expected [1, 8, 16]"),
    "detached": (lambda x, w, e: right(x, w, e).detach(), "the result has no gradient", "is something detached"),
    "in place": (lambda x, w, e: x.mul_(torch.rsqrt(x.square().mean(-1, True) + e)).mul_(w), "changes its argument x"),
    "sparse": (lambda x, w, e: right(x, w, e).detach().to_sparse(), "is a tensor of torch.sparse_coo"),
    "meta": (
        lambda x, w, e: right(x, w, e).to("meta"),
        "the result is a tensor of meta, expected an ordinary one on cpu",
    ),
    "complex": (lambda x, w, e: right(x, w, e) + 0j, "the result has dtype complex64"),
    "nested": (lambda x, w, e: torch.nested.nested_tensor([x]), "the result is"),
    "text": (lambda x, w, e: "x" * 10**6, "the result is 'xxx"),
    "function": (lambda x, w, e: right, "the result is a function"),
    "itself": (lambda x, w, e: (a := [], a.append(a))[0], "the result is a list of 1"),
    "hostile": (lambda x, w, e: Hostile(), "the result is "),
}


@pytest.mark.parametrize("name", ["08.1", "10.1"])  # of whole numbers
def test_a_dtype_that_is_not_the_inputs_is_not_said_to_be(name, said):
    reference = exercises.find(name).reference
    lines = rejected(lambda *args: reference(*args).double(), said, name=name)
    assert "the result has dtype float64, expected float32" in [line.strip() for line in lines]


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
@pytest.mark.parametrize("kind", RESULTS)
def test_results_of_another_kind_fail(kind, said):
    answer, *parts = RESULTS[kind]
    lines = rejected(answer, said, *parts)
    assert all(len(line) < 500 for line in lines)


def test_a_right_value_in_another_dtype_is_not_called_a_factor(said):
    assert "times what it should be" not in "\n".join(rejected(RESULTS["float64"][0], said))


def test_nan_where_the_reference_has_it_is_no_diagnosis():
    exercise = exercises.find("decode_e4m3")
    outcome = judge(exercise, lambda codes: exercise.reference(codes) + codes.int() % 3)
    assert outcome.verdict == FAIL and not outcome.diagnosis


def test_a_function_without_return_is_told(said):
    def silent(x, weight, eps):
        y = right(x, weight, eps)
        y = y + 1

    rejected(
        silent, said, "the result is None (is there a `return`?)", "It returns None: is there a `return` at the end?"
    )


def test_numbers_of_numpy_and_torch_are_numbers(said):
    accepted(lambda a, b, c: np.float64(right_bits(a, b, c)), said, "01.5")
    accepted(lambda a, b, c: torch.tensor(right_bits(a, b, c), dtype=torch.float64), said, "01.5")
    rejected(lambda a, b, c: 10**5000, said, "the result is", name="01.5")
    rejected(lambda a, b, c: True, said, "the result is True, expected the number", name="01.5")
    rejected(lambda a, b, c: float("inf"), said, "the result is inf", name="01.5")


# Exceptions ----------------------------------------------------------------------------------------------------------


def test_an_exception_shows_the_learners_line(notebook, said):
    fn = notebook.cell("def rms_norm(x, weight, eps):\n    y = x\n    return y.view(7, -1)\n")
    lines = rejected(fn, said, "RuntimeError: shape", "in line 3 of rms_norm: return y.view(7, -1)")
    assert not any("site-packages" in line or "minids" in line for line in lines)


def test_an_exception_in_a_helper_shows_the_helpers_line(notebook, said):
    notebook.cell("def helper(x):\n    # why\n    return x.nonsense\n")
    fn = notebook.cell("def rms_norm(x, weight, eps):\n    return helper(x)\n")
    rejected(
        fn, said, "AttributeError: 'Tensor' object has no attribute 'nonsense'", "in line 3 of helper: return x.non"
    )


def test_an_exception_in_torch_s_python_shows_the_learners_line(notebook, said):
    fn = notebook.cell("def rms_norm(x, weight, eps):\n    return torch.einsum('bt,d->x', x, weight)\n")
    rejected(fn, said, "in line 2 of rms_norm: return torch.einsum('bt,d->x', x, weight)")


class Mute(Exception):
    def __str__(self):
        raise RuntimeError("no text")


def raising(error):
    def answer(x, weight, eps):
        raise error

    return answer


ERRORS = [Mute(), ValueError("x" * 10**6), RecursionError(), GeneratorExit(), asyncio.CancelledError(), StopIteration()]


@pytest.mark.parametrize("error", ERRORS, ids=lambda e: type(e).__name__)
def test_any_exception_is_a_fail(error, said):
    lines = rejected(raising(error), said, type(error).__name__, "in line 2 of answer: raise error")
    assert all(len(line) < 500 for line in lines)


def test_endless_recursion_is_a_fail(notebook, said):
    fn = notebook.cell("def rms_norm(x, weight, eps):\n    return rms_norm(x, weight, eps)\n")
    rejected(fn, said, "RecursionError: maximum recursion depth exceeded", "in line 2 of rms_norm")


def test_a_backward_pass_that_raises_is_a_fail(notebook, said):
    fn = notebook.cell("""
def rms_norm(x, weight, eps):
    y = x.exp()
    z = y * weight
    y += 1
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * weight + 0 * z
""")
    rejected(fn, said, "RuntimeError: one of the variables needed for gradient computation has been modified")


# Hints, status, mine -------------------------------------------------------------------------------------------------


def test_hints_go_up_and_are_remembered(said, monkeypatch, home):
    hint("rms_norm")
    assert said() == ["01.1 rms_norm, hint 1 of 3", f"  {RMS.hints[0]}", "  hint('rms_norm') again says more"]
    hint(right, 1)
    assert said() == ["hint: there is no exercise 'right'; status() shows what there is"]
    hint(layers.rms_norm)
    assert said() == ["01.1 rms_norm, hint 2 of 3", f"  {RMS.hints[1]}", "  hint('rms_norm') again says more"]
    assert json.loads((home / "progress.json").read_text())["hints"] == {"01.1": 2}
    for target in ("01.1", REFERENCE):
        hint(target)
        first, kind, *solved = said()
        assert (first, kind) == ("01.1 rms_norm, hint 3 of 3", "  one solution:")
        assert solved[0] == "  def rms_norm(x, weight, eps):" and not any("SOLUTION" in line for line in solved)


def test_a_level_can_be_asked_for(said, home):
    for level, shown in ((1, 1), (3, 3), (0, 1), (99, 3), (-5, 1)):
        hint("01.1", level)
        assert said()[0] == f"01.1 rms_norm, hint {shown} of 3"
    hint("01.1", "two")
    assert said() == ["hint: the level is a number from 1 to 3; 'two' was given"]
    assert not (home / "progress.json").exists()


def test_hint_takes_any_object(said):
    for target, words in (
        ("rms_nrom", "did you mean rms_norm?"),
        (None, "None"),
        (5, "5 was given"),
        (Callable(), "a Ca"),
    ):
        hint(target)
        (line,) = said()
        assert line.startswith("hint: ") and words in line
    hint(Hostile())


def test_the_solution_of_an_installed_package_is_the_reference(monkeypatch, tmp_path, said):
    monkeypatch.setattr(solution, "SOLUTIONS", tmp_path / "nowhere")
    hint("rms_norm", 3)
    assert "F.rms_norm" in "\n".join(said())


def test_the_solution_ends_where_the_function_ends(tmp_path, monkeypatch):
    body = ["# BEGIN SOLUTION", "y = x", "# END SOLUTION", "return y"]
    lines = ["class A:", "    @property", "    def rms_norm(x):", *(f"        {line}" for line in body), "x = 1"]
    (tmp_path / "01_x.py").write_text("\n".join(lines))
    monkeypatch.setattr(solution, "SOLUTIONS", tmp_path)
    assert solution.of(RMS) == "@property\ndef rms_norm(x):\n    y = x\n    return y"


def test_status_shows_what_has_passed(notebook, said):
    check(notebook.cell(RMS_NORM))
    said()
    status()
    lines = said()
    total = len(exercises.by_lesson()["01"])
    assert lines[0] == "minids: your progress"
    (line,) = [line for line in lines if f"1 of {total}" in line]
    assert re.fullmatch(rf"  ▰▱{{{total - 1}}} +1 of {total}  +\d+ min left  01 .+", line)
    assert len({line.index(" min left") for line in lines[1:]}) == 1, "the columns of lessons are not aligned"


def test_status_works_without_the_lessons_sources(notebook, said, monkeypatch):
    from minids.lab import landing, source

    check(notebook.cell(RMS_NORM))
    said()
    for table in (lambda: [], lambda: (_ for _ in ()).throw(source.BuildError("bad"))):
        monkeypatch.setattr(landing, "rows", table)
        status()
        lines = said()
        assert len(lines) == 1 + len(exercises.by_lesson())
        assert any(re.fullmatch(r"  ▰▱+ +1 of \d+  +\d+ min left  lesson 01", line) for line in lines)
        assert len({line.index(" min left") for line in lines[1:]}) == 1


def test_mine_gives_what_passed(notebook, said):
    assert mine("rms_norm") is REFERENCE
    assert said() == ["01.1 rms_norm: the reference"]
    fn = notebook.cell(RMS_NORM)
    check(fn)
    said()
    for name in ("rms_norm", "01.1", fn, REFERENCE):
        again = mine(name)
        assert said() == ["01.1 rms_norm: yours"]
        x = torch.randn(2, 3, 8)
        assert again is not REFERENCE and torch.equal(again(x, torch.ones(8), 1e-5), fn(x, torch.ones(8), 1e-5))
    assert check(again) is again
    assert said()[0] == "01.1 rms_norm: PASS"
    assert mine("01.1") is not REFERENCE
    for name in ("nonsense", None, 5, Callable):
        with pytest.raises(ValueError, match=r"^mine: "):
            mine(name)


# Jupyter -------------------------------------------------------------------------------------------------------------


@pytest.fixture
def jupyter(monkeypatch):
    """What is displayed in a kernel: a list of the data of each display."""
    import IPython
    import IPython.display

    shown = []
    monkeypatch.setattr(IPython, "get_ipython", lambda: types.SimpleNamespace(kernel=object()))
    monkeypatch.setattr(IPython.display, "display", lambda data, raw: shown.append(data))
    return shown


def test_details_are_framed_in_jupyter(jupyter, said):
    def shouting(x, weight, eps):
        print("<script>alert('&')</script>")
        return x

    check(shouting, "01.1")
    assert said() == ["01.1 rms_norm: FAIL at B=1, T=8, D=16, float32"]
    (data,) = jupyter
    assert set(data) == {"text/html", "text/plain"}
    assert "<script>" not in data["text/html"]
    assert "&lt;script&gt;alert(&#x27;&amp;&#x27;)&lt;/script&gt;" in data["text/html"]
    assert "<b>It returns its argument x as it is: nothing is computed yet.</b>" in data["text/html"]
    assert "      <script>alert('&')</script>\n" in data["text/plain"]
    assert data["text/plain"].splitlines()[-1].startswith("  → It returns its argument x")


def test_the_edge_of_the_frame_has_the_verdicts_colour(jupyter, notebook):
    check(notebook.cell(RMS_NORM))
    check(lambda x, weight, eps: x, "01.1")
    check(REFERENCE)
    assert [re.search(r"solid (#\w+)", data["text/html"])[1] for data in jupyter] == ["#009e73", "#d55e00", "#888888"]


def test_a_terminal_is_no_notebook(monkeypatch, said):
    import IPython

    for shell in (None, types.SimpleNamespace()):
        monkeypatch.setattr(IPython, "get_ipython", lambda shell=shell: shell)
        hint("01.1", 1)
        assert len(said()) == 3

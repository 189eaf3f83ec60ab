"""What is said of an answer that fails, beside the known wrong ones: rounding, one wrong part, names from outside."""

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from cells import Notebook

from minids.lab import exercises
from minids.lab.judge import FAIL, PASS, judge


def outcome(name, answer):
    made = judge(exercises.find(name), answer)
    assert made.verdict == FAIL
    return made


def why(name, answer):
    return outcome(name, answer).diagnosis


def changed(name, change):
    """The reference of an exercise, with change(its result)."""
    reference = exercises.reference(name)
    return lambda *args: change(reference(*args))


ROUNDED = {
    "down to a whole number": math.floor,
    "up to a whole number": math.ceil,
    "to 1 decimal": lambda value: round(value, 1),
    "to 3 decimals": lambda value: round(value, 3),
}


@pytest.mark.parametrize("how", ROUNDED)
def test_a_rounded_number_is_told(how):
    assert why("14.5", changed("14.5", ROUNDED[how])).startswith(f"It is right, but rounded {how}:")
    assert not why("14.5", changed("14.5", lambda value: ROUNDED[how](value) + 1.5)).startswith("It is right, but")


def test_the_same_number_everywhere_is_told():
    assert why("14.5", lambda *args: 2.67) == "It gives the same for every input: does it use its arguments?"


def test_one_wrong_part_of_two_is_told():
    said = why("14.3", changed("14.3", lambda value: (value[0], value[1] / 100)))
    assert said.startswith("The result[1] is always 0.01 times what it should be, the rest is right:")
    said = why("14.3", changed("14.3", lambda value: (value[0] + 700, value[1])))
    assert said == "Only result[0] is wrong, the rest is right in every case."
    said = why("02.2", changed("02.2", lambda value: (value[0], value[1], value[2].relu())))
    assert said == "Only result[2] is wrong, the rest is right in every case."


def test_what_is_nearly_right_is_not_called_a_factor():
    assert why("01.5", changed("01.5", lambda value: value * 1.0002)).startswith("It is right to about a hundredth")
    assert why("14.1", changed("14.1", lambda value: (value[0] + 40, value[1] + 40))).endswith("or counted twice?")
    coarse = changed("00.4", lambda value: value + (value.bfloat16() - value).detach())
    assert why("00.4", coarse).startswith("It is right to about a hundredth")


def test_nan_that_comes_later_alone_is_not_what_is_wrong():
    def head_cut(q, k, v, length, scale):  # inf beyond `length` gives NaN, in the last case alone
        return exercises.reference("02.1")(q, k, v, k.shape[1], 2 * scale)

    assert why("02.1", head_cut) == ""


def test_an_error_for_batches_is_not_put_down_to_the_first_sequence():
    def one_row(x, scale):
        return x * scale.reshape(1, -1, 1)

    assert why("00.4", one_row).startswith("It is right for batch 1 only: shapes that do not fit")


def test_an_error_that_a_known_wrong_answer_raises_too_is_told_as_a_guess():
    def columns_apart(x, cos, sin):  # the angles along the heads, as known; and the columns in another order
        even, odd = x[..., 0::2], x[..., 1::2]
        return torch.cat((even * cos - odd * sin, even * sin + odd * cos), -1)

    assert why("01.2", columns_apart).startswith("Perhaps this: The angles go along the heads")
    assert why("01.2", lambda x, cos, sin: x.reshape(7, -1)) == ""


def test_a_named_tuple_is_called_a_tuple():
    assert "the result is 3, expected a tuple of 2" in outcome("14.1", lambda cfg: 3).details


@pytest.fixture
def notebook():
    return Notebook()


@pytest.mark.parametrize("kind", [torch.tensor, np.array])
def test_a_number_with_an_axis_is_none_for_a_lesson_prints_it(kind):
    made = outcome("00.1", lambda flops, nbytes: kind([flops / nbytes]))
    assert "[1]" in made.details[0] and made.details[0].endswith("expected the number 2.66667")


def test_numbers_and_tensors_from_outside_are_told(notebook):
    notebook.scope["cfg"] = SimpleNamespace()  # no data
    notebook.cell("length, gaps = 7, torch.ones(3)\ndef half(x):\n    return x / 2\n")
    fn = notebook.cell(
        "def arithmetic_intensity(flops, nbytes):\n    gaps_of = (lambda: gaps.sum() * math.pi)()\n"
        "    return half(length) * nbytes + 0 * gaps_of.numel() + 0 * len(vars(cfg))\n"
    )
    line = "it reads `gaps`, `length` from outside, the same for every input: is one of its arguments meant?"
    assert line in outcome("00.1", fn).details


def test_a_right_answer_may_use_a_constant(notebook):
    notebook.cell("LN2 = math.log(2)\n")
    fn = notebook.cell("def bits_per_byte(a, b, c):\n    return a / LN2 * b / c\n")
    assert judge(exercises.find("01.5"), fn).details == [] and judge(exercises.find("01.5"), fn).verdict == PASS


def test_arguments_in_another_order_are_told():
    def swiglu(x, w_gate, w_down, w_up):
        return exercises.reference("01.4")(x, w_gate, w_up, w_down)

    line = "your function takes (x, w_gate, w_down, w_up); they come in the stub's order, (x, w_gate, w_up, w_down)"
    assert line in outcome("01.4", swiglu).details
    assert not [d for d in outcome("00.4", lambda scale, y: torch.zeros(1)).details if "order" in d]

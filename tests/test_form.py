"""Right numbers in another form are called that: parts, axes and shapes."""

import pytest

from minids.lab import exercises
from minids.lab.exercise import REGISTRY
from minids.lab.judge import FAIL, judge

SPLIT, ABSORB, PART = (exercises.find(i) for i in ("03.2", "04.1", "06.1"))


def said(exercise, change):
    """The diagnosis of the reference's result, changed."""
    outcome = judge(exercise, lambda *args: change(exercise.reference(*args)))
    assert outcome.verdict == FAIL
    assert outcome.diagnosis not in {wrong.why for wrong in exercise.wrongs}
    return outcome.diagnosis


def test_parts_in_another_order():
    assert said(SPLIT, lambda r: (r[1], r[0])).startswith("The parts of the result are right, but in another order")


@pytest.mark.parametrize("order", [(1, 0, 2, 3), (0, 1, 3, 2), (3, 0, 1, 2)])
def test_axes_in_another_order(order):
    back = tuple(order.index(axis) for axis in range(4))
    sentence = said(ABSORB, lambda r: r.permute(order))
    assert "axes stand in another order" in sentence
    assert f".permute({', '.join(map(str, back))})" in sentence


def test_axes_of_one_part_of_two():
    assert ".permute(0, 2, 1)" in said(PART, lambda r: (r[0].mT, r[1]))


@pytest.mark.parametrize("change", [lambda r: r.flatten(2), lambda r: r[None], lambda r: r.flatten()])
def test_another_shape(change):
    assert "their shape is not" in said(ABSORB, change)


def test_a_part_with_an_axis_too_many():
    assert "their shape is not" in said(PART, lambda r: (r[0], r[1].unsqueeze(-1)))


def test_wrong_numbers_are_not_called_right():
    assert "numbers are right" not in said(ABSORB, lambda r: r.mT.flip(0).exp())
    assert "parts of the result are right" not in said(SPLIT, lambda r: (r[1], r[0] + 1))


@pytest.mark.parametrize("value", [None, "no", 3.0, (), [[1, 2]], {"k": 1}])
def test_what_has_no_form_is_survived(value):
    for exercise in (SPLIT, REGISTRY["03.5"]):
        assert "are right" not in judge(exercise, lambda *args: value).diagnosis


def test_parts_with_names_are_no_lost_nan():
    assert said(SPLIT, lambda r: {"key": r[0], "value": r[1]}) == ""

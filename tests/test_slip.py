"""A known wrong answer made from the right one: what is changed, where, and what it says when there is nothing to."""

import inspect

import pytest
import torch

from minids.lab.exercise import REGISTRY, Exercise
from minids.lab.slip import slip

FACTOR = 2


def doubled_and_summed(x):
    total = 0
    for number in x:
        total += FACTOR * number
    return total


def test_a_function_is_written_again():
    wrong = slip(doubled_and_summed, "overwritten", ("total +=", "total ="))
    assert (doubled_and_summed([1, 2, 3]), wrong([1, 2, 3])) == (12, 6)
    assert wrong.__name__ == "overwritten" and "def overwritten(x):" in inspect.getsource(wrong)


def test_changes_come_one_after_the_other_and_in_all_lines():
    wrong = slip(doubled_and_summed, "renamed", ("total", "all_of_it"), ("all_of_it = 0", "all_of_it = 5"))
    assert wrong([1]) == 7


def test_a_further_line_is_indented_as_the_changed_one():
    wrong = slip(doubled_and_summed, "stops", ("total +=", "if number > 1:\n    break\ntotal +="))
    assert wrong([1, 2, 3]) == 2


def test_a_change_of_nothing_is_said():
    with pytest.raises(ValueError, match="lost: no line of doubled_and_summed has 'total -='; give a part of a line"):
        slip(doubled_and_summed, "lost", ("total -=", "total ="))


def test_an_exercise_keeps_its_slips(monkeypatch):
    monkeypatch.setattr("minids.lab.exercise.REGISTRY", dict(REGISTRY))
    exercise = Exercise("98.1", doubled_and_summed, minutes=1, sizes=[{"n": 3}], hints=["nudge", "idea"])
    exercise.slip("undoubled", "The factor is missing.", ("FACTOR * ", ""))
    (wrong,) = exercise.wrongs
    assert (wrong.name, wrong.why, wrong.fn(torch.ones(3)).item()) == ("undoubled", "The factor is missing.", 3)


def test_a_kernel_stays_one():
    pytest.importorskip("triton")
    from minids.lab.exercises.l05 import scale_kernel

    wrong = slip(scale_kernel, "shifted", ("tl.arange(0, BLOCK)", "tl.arange(0, BLOCK) + 1"))
    assert type(wrong) is type(scale_kernel) and wrong.arg_names == scale_kernel.arg_names

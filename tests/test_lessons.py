"""Every lesson runs unsolved from top to bottom, and its executed solution passes every exercise."""

import nbformat
import pytest

from minids.lab import outputs
from minids.lab.exercises import by_lesson
from minids.lab.source import ROOT

LESSONS = [path.stem for path in sorted((ROOT / "solutions").glob("[0-9][0-9]_*.py"))]
each_lesson = pytest.mark.parametrize("slug", LESSONS)


@each_lesson
def test_an_unsolved_lesson_runs_to_its_end(slug):
    notebook = nbformat.read(ROOT / "lessons" / f"{slug}.ipynb", as_version=4)
    outputs.execute(notebook, ROOT / "lessons", fast=True, name=f"lessons/{slug}.ipynb")
    expected = [f"{exercise.title}: NOT ATTEMPTED" for exercise in by_lesson().get(slug[:2], [])]
    assert sorted(outputs.verdicts(notebook)) == expected


@each_lesson
def test_a_solution_passes_every_exercise(slug):
    notebook = nbformat.read(ROOT / "solutions" / f"{slug}.ipynb", as_version=4)
    assert not outputs.faults(notebook)
    assert sorted(outputs.verdicts(notebook)) == [f"{e.title}: PASS" for e in by_lesson().get(slug[:2], [])]


def test_every_exercise_has_its_lesson():
    missing = set(by_lesson()) - {slug[:2] for slug in LESSONS}
    assert not missing, f"lessons {sorted(missing)} have exercises in minids/lab/exercises, but no solutions/NN_name.py"

"""Every lesson runs unsolved from top to bottom, and its executed solution passes every exercise."""

import json
import os
import subprocess
import sys
from pathlib import Path

import nbformat
import no_triton
import pytest

from minids.lab import outputs
from minids.lab.exercises import by_lesson
from minids.lab.source import ROOT, read_all

LESSONS = [path.stem for path in sorted((ROOT / "solutions").glob("[0-9][0-9]_*.py"))]
each_lesson = pytest.mark.parametrize("slug", LESSONS)


@each_lesson
def test_an_unsolved_lesson_runs_to_its_end(slug):
    notebook = nbformat.read(ROOT / "lessons" / f"{slug}.ipynb", as_version=4)
    outputs.execute(notebook, ROOT / "lessons", fast=True, name=f"lessons/{slug}.ipynb")
    expected = [f"{exercise.title}: NOT ATTEMPTED" for exercise in by_lesson().get(slug[:2], [])]
    assert sorted(outputs.verdicts(notebook)) == expected


WALK = """
import contextlib, io, json, sys
import nbformat
from cells import Notebook

for path in sys.argv[1:]:
    lesson, printed = Notebook(), []
    for cell in nbformat.read(path, as_version=4).cells:
        if cell.cell_type == "code":
            with contextlib.redirect_stdout(io.StringIO()) as out:
                lesson.cell(cell.source)
            printed.append(out.getvalue())
    print(json.dumps(printed))
"""


def test_lessons_about_kernels_run_without_triton(tmp_path, monkeypatch):
    """Their cells in one plain Python, for time: kernels in Jupyter start slowly, and draw every figure."""
    no_triton.hide(tmp_path / "path", monkeypatch)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path / "path"), str(Path(__file__).parent)]))
    monkeypatch.setenv("MINIDS_FAST", "1")
    lessons = [lesson for lesson in read_all() if "triton" in lesson.needs]
    paths = [str(ROOT / "lessons" / f"{lesson.slug}.ipynb") for lesson in lessons]
    done = subprocess.run(
        [sys.executable, "-c", WALK, *paths], capture_output=True, text=True, cwd=ROOT / "lessons", check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    for lesson, line in zip(lessons, done.stdout.splitlines(), strict=True):
        first, *rest = json.loads(line)
        of_lesson, told = by_lesson()[lesson.number], "no kernel can run or be checked"
        assert "Triton is missing here" in first
        assert sorted(outputs.VERDICT.findall("".join(rest))) == [f"{e.title}: NOT ATTEMPTED" for e in of_lesson]
        assert "".join(rest).count(told) == sum(exercise.kernel is not None for exercise in of_lesson)
        assert "no kernel" in "".join(text for text in rest if told not in text), "the cells that lack a kernel say so"
        assert "TRITON_INTERPRET" not in "".join(rest)


@each_lesson
def test_a_solution_passes_every_exercise(slug):
    notebook = nbformat.read(ROOT / "solutions" / f"{slug}.ipynb", as_version=4)
    assert not outputs.faults(notebook)
    assert sorted(outputs.verdicts(notebook)) == [f"{e.title}: PASS" for e in by_lesson().get(slug[:2], [])]


def test_every_exercise_has_its_lesson():
    missing = set(by_lesson()) - {slug[:2] for slug in LESSONS}
    assert not missing, f"lessons {sorted(missing)} have exercises in minids/lab/exercises, but no solutions/NN_name.py"

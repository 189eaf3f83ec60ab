"""The landing page shows the lessons, what has passed, and where to go on."""

import json

import pytest

from minids import triton_env
from minids.lab import landing, progress
from minids.lab.exercises import by_lesson
from minids.lab.source import read_all

SOURCE = """# ---
# title: {title}
# promise: You double a number.
# minutes: 40
# difficulty: 2
# needs: [torch]
# objectives: [one, two, three]
# ---
"""
NUMBER, EXERCISES = next(iter(by_lesson().items()))


@pytest.fixture
def page(tmp_path):
    """A function that gives the page of two lessons, the second without exercises, for the exercises that passed."""
    for folder in ("solutions", ".minids"):
        (tmp_path / folder).mkdir()
    for name, title in ((f"{NUMBER}_double", "Doubling"), ("99_end", "The end")):
        (tmp_path / "solutions" / f"{name}.py").write_text(SOURCE.format(title=title))

    def write(passed):
        content = {"version": 1, "passed": {exercise.id: {"name": exercise.name} for exercise in passed}}
        (tmp_path / ".minids" / "progress.json").write_text(json.dumps(content))
        assert landing.main([], tmp_path) == 0
        return (tmp_path / "lessons" / "START.md").read_text(encoding="utf-8")

    return write


def test_it_says_where_to_begin_and_to_go_on(page):
    link, total = f"[{NUMBER} Doubling]({NUMBER}_double.ipynb)", len(EXERCISES)
    assert f"**Begin with {link}**, 40 minutes." in page([])
    one = page(EXERCISES[:1])
    assert f"**Continue with {link}**" in one and f"▰{'▱' * (total - 1)} 1 of {total}" in one
    assert "**Every exercise has passed.**" in page(EXERCISES)


def test_the_minutes_left_go_down_with_each_exercise(page, tmp_path):
    left = []
    for count in range(len(EXERCISES) + 1):
        page(EXERCISES[:count])
        left.append(landing.rows(tmp_path)[0].left)
    assert left[0] == 40 and left[-1] == 0 and left == sorted(left, reverse=True)


def test_kernels_are_counted_apart_where_triton_is_missing(monkeypatch):
    monkeypatch.setattr(triton_env, "installed", lambda: False)
    lessons = {lesson.number: lesson for lesson in read_all()}
    kernels = {number: [e for e in all_ if e.kernel is not None] for number, all_ in by_lesson().items()}
    some, every = "06", "05"  # some of its exercises ask for a kernel, all do
    others = [e.id for e in by_lesson()[some] if e.kernel is None]
    row = landing.row(lessons[some], by_lesson()[some], others)
    assert (row.passed, row.total, row.absent, row.left) == (len(others), len(others), len(kernels[some]), 0)
    assert f"{row.bar} {len(others)} of {len(others)}, 1 needs Triton | 0 min" in (text := landing.page([row]))
    assert "every exercise that this machine can check has passed" in text.lower() and f"lessons {some} works" in text
    row = landing.row(lessons[every], by_lesson()[every], [])
    assert row.state == "5 need Triton |" and row.total == 0
    row = landing.row(lessons[every], by_lesson()[every], [kernels[every][0].id])
    assert (row.passed, row.total, row.absent) == (1, 1, 4), "what passed elsewhere counts"


def test_a_lesson_without_exercises_says_so(page):
    assert "| [99 The end](99_end.ipynb) | 40 | ●●○○○ | torch | no exercises | |" in page([])


def test_a_source_that_cannot_be_read_is_named(page, tmp_path, capsys):
    page([])
    (tmp_path / "solutions" / "50_bad.py").write_text("x = 1\n")
    assert landing.main([], tmp_path) == 1
    assert "START.md cannot be written: 50_bad.py does not begin with front matter" in capsys.readouterr().err


def test_a_pass_renews_the_page(page, tmp_path):
    before, start = page([]), tmp_path / "lessons" / "START.md"
    progress.update(lambda learnt: learnt.passed.update({EXERCISES[0].id: {"name": EXERCISES[0].name}}))
    assert start.read_text(encoding="utf-8") == before
    landing.renew(tmp_path)
    assert "1 of" in start.read_text(encoding="utf-8") != before


def test_a_page_that_is_not_the_learner_s_stays(page, tmp_path, monkeypatch, capsys):
    landing.renew(tmp_path)
    assert not (tmp_path / "lessons").exists(), "none is written where there was none"
    before, start = page([]), tmp_path / "lessons" / "START.md"
    progress.update(lambda learnt: learnt.passed.update({EXERCISES[0].id: {"name": EXERCISES[0].name}}))
    (tmp_path / "solutions" / "50_bad.py").write_text("x = 1\n")
    landing.renew(tmp_path)
    (tmp_path / "solutions" / "50_bad.py").unlink()
    monkeypatch.setenv("MINIDS_HOME", str(tmp_path / "elsewhere"))
    landing.renew(tmp_path)
    assert start.read_text(encoding="utf-8") == before and not any(capsys.readouterr())

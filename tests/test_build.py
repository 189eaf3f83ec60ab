"""The builder of the lessons refuses what would leak or not fit, and the same sources give the same files."""

import json

import nbformat
import pytest

from minids.lab import build, outputs, rules
from minids.lab.source import ROOT, BuildError, read_all, read_cells, read_lesson

FRONT = {
    "title": "Doubling",
    "promise": "You double a number.",
    "minutes": "20",
    "difficulty": "2            # 1 to 5",
    "needs": "[torch, gpu]",
    "objectives": "\n  - one\n  - two\n  - three",
}
BODY = '''
# %% [markdown]
# ## Twice
#
# # BEGIN SOLUTION
# It is the sum of a number and itself.
# # END SOLUTION

# %% id="twice" tags=["exercise"]
def twice(x):
    """2x."""
    # BEGIN SOLUTION
    result = x + x  # no product
    return result
    # END SOLUTION

# %%
print("90.1 twice:", "PASS" if twice(2) == 4 else "FAIL at 2")
'''


def write(folder, body=BODY, name="90_twice", **fields):
    """A source below `folder`; a field that is None is left out."""
    front = [f"# {line}" for key, value in (FRONT | fields).items() if value for line in f"{key}: {value}".split("\n")]
    path = folder / "solutions" / f"{name}.py"
    path.parent.mkdir(exist_ok=True)
    path.write_text("\n".join(["# ---", *front, "# ---", body]), encoding="utf-8")
    (folder / "README.md").write_text("# A\n\n<!-- lessons -->\n<!-- /lessons -->\n\nB\n", encoding="utf-8")
    return path


def made(path):
    """(lesson, solution) of one source."""
    return build.build(read_lesson(path), read_all(path.parents[1]))


def cell(source, kind="code"):
    return nbformat.from_dict({"cell_type": kind, "source": source})


# Markers ---------------------------------------------------------------------------------------------------------


def test_the_lesson_has_a_stub_and_the_solution_has_no_markers(tmp_path):
    lesson, solution = made(write(tmp_path))
    stub = f'def twice(x):\n    """2x."""\n    {rules.STUB}'
    assert (lesson.cells[1].source, lesson.cells[2].source) == (f"## Twice\n\n{rules.ANSWER}", stub)
    assert lesson.cells[2].id == "twice" and lesson.cells[2].metadata == {"tags": ["exercise"]}
    assert lesson.cells[3].id == "90_twice-002"
    assert solution.cells[2].source.endswith("    result = x + x  # no product\n    return result")
    assert solution.cells[1].source.endswith("It is the sum of a number and itself.")


UNPAIRED = [
    "# BEGIN SOLUTION\nx = 1",
    "x = 1\n# END SOLUTION",
    "# BEGIN SOLUTION\n# BEGIN SOLUTION\nx = 1\n# END SOLUTION",
    "# BEGIN SOLUTION\nx = 1\n# END SOLUTION\n# END SOLUTION",
    "# BEGIN SOLUTION\n# END SOLUTION",
]
MISSPELLED = [
    "#BEGIN SOLUTION",
    "# BEGIN SOLUTIONS",
    "# END_SOLUTION",
    "# begin solution",
    "# Begin Solution",
    "#  BEGIN SOLUTION",
    "## BEGIN SOLUTION",
    "### BEGIN SOLUTION ###",
    "# BEGIN SOLUTION:",
    "# BEGINSOLUTION",
    "# BEGIN SOLUTOIN",
    "# BGIN SOLUTION",
    "# ENDE SOLUTION",
    "# BEGIN ANSWER",
    "# END HIDDEN",
    "# START SOLUTION",
    "x = 1  # BEGIN SOLUTION",
]


@pytest.mark.parametrize("text", UNPAIRED)
@pytest.mark.parametrize("kind", ["code", "markdown"])
def test_markers_that_do_not_pair_are_refused(text, kind):
    with pytest.raises(BuildError, match=r"a\.py, cell 1: .*(SOLUTION)"):
        rules.blank(cell(text, kind), "a.py, cell 1")


@pytest.mark.parametrize("line", MISSPELLED)
def test_a_line_that_was_meant_as_a_marker_is_refused(line):
    for text in (f"{line}\nx = 1", f"    {line}\nx = 1\n    # END SOLUTION", f"# BEGIN SOLUTION\nx = 1\n{line}"):
        with pytest.raises(BuildError, match=r"cell 1: .*write `# "):
            rules.blank(cell(text), "cell 1")


@pytest.mark.parametrize("line", ["## The solution", "# resolution", "# the end position", "# begin", "solution = x"])
def test_other_lines_are_no_markers(line):
    assert rules.blank(cell(line), "cell 1") == (line, [])


def test_markdown_may_leave_out_the_sign():
    assert rules.blank(cell("a\n\nBEGIN SOLUTION\nb\nEND SOLUTION", "markdown"), "") == (f"a\n\n{rules.ANSWER}", ["b"])


def test_a_solutions_line_elsewhere_in_the_lesson_is_refused(tmp_path):
    leak = "\n# %% [markdown]\n# Think of `result = x + x  # no product`.\n"
    with pytest.raises(BuildError, match=r"'result = x \+ x  # no product' stands in the lesson too; reword"):
        made(write(tmp_path, BODY + leak))


def test_a_stub_that_is_no_python_is_refused(tmp_path):
    half = "\n# %%\nx = (\n# BEGIN SOLUTION\n    1\n# END SOLUTION\n)\n"
    with pytest.raises(BuildError, match="mark whole statements"):
        made(write(tmp_path, half))


# Limits and front matter -----------------------------------------------------------------------------------------


def test_a_text_cell_has_fewer_than_150_words():
    around = "| a | table |\n$$a + b = c$$ $x y$ <b>\n<details><summary>Answer</summary>\n\nlong it is\n\n</details>\n"
    rules.check_limits(cell(around + "word " * 149 + "– ", "markdown"), "")
    with pytest.raises(BuildError, match="cell 3: 150 words; fewer than 150"):
        rules.check_limits(cell(around + "word " * 150, "markdown"), "cell 3")


def test_a_code_cell_has_fewer_than_25_lines():
    rules.check_limits(cell("x = 1\n\n" * 24), "")
    with pytest.raises(BuildError, match="cell 3: 25 lines; fewer than 25"):
        rules.check_limits(cell("x = 1\n" * 25), "cell 3")


def test_a_second_title_is_refused():
    with pytest.raises(BuildError, match="begin at ##"):
        rules.check_limits(cell("# Title", "markdown"), "")


GAP = "<p><br></p>"
QUIZ = """**1.** Why?
<details><summary>a</summary>No.</details>
<details><summary>b</summary>Yes.</details>
{}**2.** Who?
<details><summary>c</summary>No.</details>{}1. Homework.
"""


@pytest.mark.parametrize("gap", ["", "\n", "\n\n"])
def test_a_question_stands_apart_from_the_answers_before_it(gap):
    assert rules.apart(QUIZ.format(gap, "\n" + gap)) == QUIZ.format(f"\n{GAP}\n\n", f"\n\n{GAP}\n\n")


@pytest.mark.parametrize("text", ["<details><summary>a</summary>No: `x`.</details>", f"{QUIZ.split('{}')[0]}Next."])
def test_markdown_in_a_block_of_html_is_refused(text):
    rules.check_limits(cell(rules.apart(f"a `b`\n{QUIZ.format('', chr(10))}"), "markdown"), "")
    with pytest.raises(BuildError, match=r"cell 3: '<details>.*… is HTML"):
        rules.check_limits(cell(text, "markdown"), "cell 3")


@pytest.mark.parametrize(
    "fields",
    [{key: None} for key in FRONT]
    + [{"title": '"a | b"'}, {"title": "[a]"}, {"promise": "a: b: c"}, {"promise": '"a\\nb"'}, {"minute": "5"}]
    + [{"minutes": value} for value in ("4", "121", "long", "true")]
    + [{"difficulty": value} for value in ("0", "6", "1.5", "true")]
    + [{"needs": value} for value in ("torch", "[]", "[cuda]", "[gpu, gpu]")]
    + [{"objectives": value} for value in ("\n  - a\n  - b", "\n  - a" * 6, "\n  - a: b\n  - c\n  - d")],
    ids=str,
)
def test_a_front_matter_that_is_not_whole_is_refused(tmp_path, fields):
    with pytest.raises(BuildError, match=r"90_twice\.py.*(`?" + next(iter(fields)) + "`?|not YAML)"):
        read_lesson(write(tmp_path, **fields))


@pytest.mark.parametrize("text", ["", "# %%\nx = 1\n", "# ---\n# title: a\n\n# %%\n# ---\n"])
def test_a_source_without_front_matter_is_refused(tmp_path, text):
    path = tmp_path / "90_twice.py"
    path.write_text(text)
    with pytest.raises(BuildError, match="front matter"):
        read_lesson(path)


def test_two_lessons_of_one_number_and_one_id_twice_are_refused(tmp_path):
    again = write(tmp_path, '# %% id="a"\nx = 1\n\n# %% id="a"\nx = 2\n', name="90_thrice")
    with pytest.raises(BuildError, match="each id once"):
        read_cells(read_lesson(again))
    write(tmp_path)
    with pytest.raises(BuildError, match="have one number"):
        read_all(tmp_path)


def test_a_code_cell_does_not_begin_with_empty_lines(tmp_path):
    cells = read_cells(read_lesson(write(tmp_path, '# %% tags=["a"]\n\n\ndef f():\n    return 1\n')))
    assert cells[0].source == "def f():\n    return 1"


# Building --------------------------------------------------------------------------------------------------------


def files(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.suffix in (".md", ".ipynb")}


def test_built_twice_nothing_changes_and_every_page_has_the_lessons(tmp_path):
    write(tmp_path)
    write(tmp_path, name="91_more", title="More")
    assert build.main([], tmp_path) == 0
    before = files(tmp_path)
    assert len(before) == 6 and build.main([], tmp_path) == 0 and files(tmp_path) == before
    readme, index = (
        path.read_text(encoding="utf-8") for path in (tmp_path / "README.md", tmp_path / "lessons/README.md")
    )
    assert "| 91 | [More](lessons/91_more.ipynb) | You double a number. | 20 | ●●○○○ | torch, a GPU |" in readme
    assert readme.startswith("# A\n") and readme.endswith("\n\nB\n") and "[Doubling](90_twice.ipynb)" in index
    first, last = (
        json.loads((tmp_path / f"lessons/{name}.ipynb").read_text())["cells"] for name in ("90_twice", "91_more")
    )
    assert "".join(first[0]["source"]).endswith("3. three\n\n[all lessons](README.md) · [91 More →](91_more.ipynb)")
    solution = "[solution](../solutions/91_more.ipynb)"
    assert (
        "".join(last[-1]["source"]) == f"---\n\n[← 90 Doubling](90_twice.ipynb) · [all lessons](README.md) · {solution}"
    )


def test_check_finds_whatever_is_not_what_the_sources_make(tmp_path, capsys):
    write(tmp_path)
    assert build.main(["--execute"], tmp_path) == 0 and build.main(["--check"], tmp_path) == 0
    for path, text in files(tmp_path).items():
        path.write_bytes(text.replace(b"Doubling", b"Halving"))
        assert build.main(["--check"], tmp_path) == 1, path
        assert "is not what the sources make; run: make lessons" in capsys.readouterr().out
        path.write_bytes(text)
    assert build.main(["--check", "90_twice"], tmp_path) == 0
    assert build.main(["80_none"], tmp_path) == 2
    assert "no lesson '80_none'; the lessons are 90_twice" in capsys.readouterr().err


def test_a_solution_keeps_its_outputs_until_its_code_changes(tmp_path, capsys):
    source = write(tmp_path)
    solution = tmp_path / "solutions/90_twice.ipynb"
    assert build.main([], tmp_path) == 0 and "run: make lessons" in capsys.readouterr().out
    assert build.main(["--check"], tmp_path) == 1 and "is not executed" in capsys.readouterr().out
    assert build.main(["--execute"], tmp_path) == 0
    assert outputs.verdicts(nbformat.read(solution, 4)) == ["90.1 twice: PASS"]
    capsys.readouterr()
    write(tmp_path, BODY.replace("## Twice", "## Two times"))
    assert build.main(["--execute"], tmp_path) == 0 and "running" not in capsys.readouterr().out
    assert "Two times" in solution.read_text() and outputs.was_run(nbformat.read(solution, 4))
    source.write_text(source.read_text().replace("x + x  # no product", "x + x + 1  # wrong"))
    assert build.main([], tmp_path) == 0 and not outputs.was_run(nbformat.read(solution, 4))
    assert build.main(["--execute"], tmp_path) == 1
    assert "has the verdict '90.1 twice: FAIL at 2'" in capsys.readouterr().out


@pytest.mark.parametrize("text", ["", "<<<<<<< HEAD", "{}", "[]", '{"nbformat": 4, "cells": 3}'])
def test_a_damaged_notebook_is_built_anew(tmp_path, text):
    write(tmp_path)
    assert build.main([], tmp_path) == 0
    before = files(tmp_path)
    for folder in ("lessons", "solutions"):
        (tmp_path / folder / "90_twice.ipynb").write_text(text)
    assert build.main(["--check"], tmp_path) == 1
    assert build.main([], tmp_path) == 0 and files(tmp_path) == before


def test_a_solution_that_raises_is_not_stored(tmp_path, capsys):
    write(tmp_path, BODY + "\n# %%\n1 / 0\n")
    assert build.main(["--execute"], tmp_path) == 2
    assert "ZeroDivisionError" in capsys.readouterr().err and not (tmp_path / "solutions/90_twice.ipynb").exists()


def test_widgets_progress_bars_and_folders_are_not_stored():
    def output(**data):
        return nbformat.v4.new_output(
            "display_data", data={kind.replace("_", "/"): text for kind, text in data.items()}
        )

    def stream(text, name="stderr"):
        return nbformat.v4.new_output("stream", name=name, text=text)

    live, still = output(text_plain="IntSlider()"), output(text_plain="A figure", image_png="iVBO")
    for one in (live, still):
        one.data[outputs.WIDGET] = {"model_id": "random"}
    bar, warning = stream("\r 50%|#####     | 1/2 [00:01<00:01]"), stream(f"{ROOT}/minids/a.py:1: UserWarning\n")
    kept = outputs.clean([live, still, bar, warning, stream("a\n", "stdout")])
    assert [one.get("text", "") for one in kept] == ["", "minids/a.py:1: UserWarning\n", "a\n"]
    assert kept[0].data == {"text/plain": "A figure", "image/png": "iVBO"}

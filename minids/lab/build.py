"""Lessons from one source: solutions/NN_name.py becomes lessons/NN_name.ipynb and solutions/NN_name.ipynb.

    python -m minids.lab.build [NAME …] [--check] [--execute] [--force]

The source is described in source.py, its markers and limits in rules.py. The first and the last cell of both notebooks,
lessons/README.md and the table in README.md are made of the front matters; README's ladder by front.py, of its record.
A lesson's bytes depend on the sources alone. A solution is stored with its outputs: `--execute` runs those whose code
is not what was run (`--force`: all), a plain build keeps outputs whose code is unchanged and clears the others.
`--check` writes nothing and fails where a file is not what the sources make, or where a solution is not executed, has
an error, or a verdict that is no PASS.
"""

import argparse
import copy
import sys
from functools import partial

from minids.files import replace_file
from minids.lab import front, outputs, rules
from minids.lab.source import ROOT, BuildError, read_all, read_cells

KERNEL = {"display_name": "Python 3 (ipykernel)", "language": "python", "name": "python3"}
OPEN, CLOSE = "<!-- lessons -->", "<!-- /lessons -->"
LARGE = 1_500_000  # bytes: GitHub and editors show a notebook of this size slowly
INDEX = """# The lessons

Work through them in order. Each is a notebook; its last cell has a link to the solution, which was run.
`make lab` opens them in JupyterLab. This page is made of the sources by `make lessons`.

{table}
Together {hours:.0f} hours.
"""


def build(lesson, lessons):
    """(lesson, solution), two notebooks without outputs, of one of `lessons`; raises BuildError."""
    shown, solved, hidden = [], [], []
    for cell in read_cells(lesson):
        if cell.cell_type == "markdown":
            cell.source = rules.apart(cell.source)
        place = f"{lesson.path.name}, cell {cell.id}"
        text, secret = rules.blank(cell, place)
        hidden += secret
        shown.append({**cell, "source": text})
        solved.append({**cell, "source": rules.unmark(cell, place)})
        if cell.cell_type == "code":
            rules.check_syntax(text, place)
    pair = [notebook(lesson, lessons, cells, folder) for cells, folder in ((shown, "lessons"), (solved, "solutions"))]
    for cell in pair[1].cells[1:-1]:
        rules.check_limits(cell, f"{lesson.path.name}, cell {cell.id}")
    rules.check_leaks([cell.source for cell in pair[0].cells], hidden, lesson.path.name)
    return pair


def notebook(lesson, lessons, cells, folder):
    """A notebook for `folder` of cells, between the heading and the links that every lesson has."""
    import nbformat

    links = navigation(lesson, lessons, folder)
    first = {"id": f"{lesson.slug}-title", "source": f"{heading(lesson)}\n\n{links}"}
    word, other = ("solution", "solutions") if folder == "lessons" else ("lesson to work in", "lessons")
    last = {"id": f"{lesson.slug}-links", "source": f"---\n\n{links} · [{word}](../{other}/{lesson.slug}.ipynb)"}
    around = [{"cell_type": "markdown", "metadata": {}, **cell} for cell in (first, last)]
    metadata = {"kernelspec": KERNEL, "language_info": {"name": "python"}}
    made = {"cells": [around[0], *cells, around[1]], "metadata": metadata, "nbformat": 4, "nbformat_minor": 5}
    made = nbformat.from_dict(made)
    try:
        nbformat.validate(made)
    except nbformat.ValidationError as error:
        reason = str(error).splitlines()[0]
        raise BuildError(f"{lesson.path.name} does not make a valid notebook: {reason}; repair that cell") from None
    return made


def heading(lesson):
    """The first cell's title, promise, facts and objectives."""
    facts = f"{lesson.minutes:g} minutes · difficulty {lesson.dots} · needs {lesson.needed}"
    items = "\n".join(f"{number}. {text}" for number, text in enumerate(lesson.objectives, 1))
    return f"# {lesson.number} {lesson.title}\n\n*{lesson.promise}*\n\n{facts}\n\nYou will\n\n{items}"


def navigation(lesson, lessons, folder):
    """Links to the lesson before, the list of lessons and the lesson after."""
    at = [one.slug for one in lessons].index(lesson.slug)
    before, after = lessons[max(at - 1, 0) : at], lessons[at + 1 : at + 2]
    table = "README.md" if folder == "lessons" else "../lessons/README.md"
    back = [f"[← {one.number} {one.title}]({one.slug}.ipynb)" for one in before]
    onward = [f"[{one.number} {one.title} →]({one.slug}.ipynb)" for one in after]
    return " · ".join([*back, f"[all lessons]({table})", *onward])


def table(lessons, folder=""):
    """The table of lessons, with links into `folder`."""
    rows = ["| | Lesson | What you do | Minutes | Difficulty | Needs |", "|---|---|---|---|---|---|"]
    for one in lessons:
        link = f"[{one.title}]({folder}{one.slug}.ipynb)"
        rows.append(f"| {one.number} | {link} | {one.promise} | {one.minutes:g} | {one.dots} | {one.needed} |")
    return "\n".join(rows) + "\n"


def pages(lessons, root):
    """Pairs (path, text): lessons/README.md, and README.md with its block of lessons filled."""
    hours = sum(one.minutes for one in lessons) / 60
    yield root / "lessons" / "README.md", INDEX.format(table=table(lessons), hours=hours)
    readme = root / "README.md"
    text = readme.read_text(encoding="utf-8") if readme.exists() else ""
    if not (text.count(OPEN) == text.count(CLOSE) == 1 and text.index(OPEN) < text.index(CLOSE)):
        raise BuildError(
            f"README.md has no block for the table of lessons; write the lines {OPEN} and {CLOSE} once each"
        )
    before, after = text.split(OPEN)[0], text.split(CLOSE)[1]
    yield readme, front.fill(f"{before}{OPEN}\n{table(lessons, 'lessons/')}{CLOSE}{after}", front.shown())


def chosen(names, lessons):
    """The lessons named, or all; raises BuildError for a name that is not there."""
    known = {lesson.slug: lesson for lesson in lessons}
    unknown = [name for name in names if name not in known]
    if unknown:
        raise BuildError(f"there is no lesson {unknown[0]!r}; the lessons are {', '.join(known)}")
    return [known[name] for name in names or known]


def store(path, text, check):
    """Write `text` where `path` does not hold it; with `check`, only say that it does not. Returns whether it did."""
    if path.exists() and path.read_text(encoding="utf-8") == text:
        return True
    name = f"{path.parent.name}/{path.name}" if path.parent.name in ("lessons", "solutions") else path.name
    if check:
        print(f"{name} is not what the sources make; run: make lessons")
        return False
    path.parent.mkdir(exist_ok=True)
    replace_file(path, partial(write_text, text=text))
    print(f"wrote {name}" + (f": {len(text) / 1e6:.1f} MB, make its pictures smaller" if len(text) > LARGE else ""))
    return False


def write_text(path, text):
    """Write a file with \\n as the end of a line on every system."""
    path.write_bytes(text.encode("utf-8"))


def stored(path):
    """The notebook at `path`; an empty one where there is none, or a damaged one."""
    import nbformat

    try:
        return nbformat.read(path, as_version=4)
    except Exception:  # of many kinds, by what is wrong with the file
        return nbformat.v4.new_notebook()


def solve(made, path, args):
    """Give the solution `made` its outputs: those stored at `path` if they are of its code, or by running it."""
    kept = outputs.graft(made, stored(path))
    if args.execute and (args.force or not kept or outputs.faults(made)):
        print(f"running solutions/{path.name} …", flush=True)
        ran = copy.deepcopy(made)
        outputs.execute(ran, path.parent, name=f"solutions/{path.name}")
        outputs.graft(made, ran)
    elif not kept and not args.check:
        print(f"solutions/{path.name}: its code is not what was run, so it has no outputs; run: make lessons")


def faulty(made, path, check):
    """Say what is wrong with a solution's outputs; returns whether anything is (not being run: only with `check`)."""
    found = [fault for fault in outputs.faults(made) if check or outputs.was_run(made)]
    for fault in found:
        print(f"solutions/{path.name} {fault}; run: make lessons")
    return bool(found)


def run(args, root):
    """Build or check what `args` say below `root`; returns whether all is as it should be."""
    import nbformat

    lessons, good = read_all(root), True
    for lesson in chosen(args.names, lessons):
        shown, solved = build(lesson, lessons)
        target = lesson.path.with_suffix(".ipynb")
        solve(solved, target, args)
        for path, made in ((root / "lessons" / target.name, shown), (target, solved)):
            same = store(path, nbformat.writes(made, version=4) + "\n", args.check)
            good = good and (same or not args.check)
        good = not faulty(solved, target, args.check) and good
    for path, text in pages(lessons, root):
        good = (store(path, text, args.check) or not args.check) and good
    record, figure = front.shown(), root / front.FIGURE
    if root == ROOT and record and not front.is_of(figure, record):
        good = (store(figure, front.picture(record), args.check) or not args.check) and good
    return good


def main(argv=None, root=ROOT):
    """Build or check as the command line says; the exit code is 0, 1 for a stale notebook, 2 for a bad source."""
    parser = argparse.ArgumentParser("python -m minids.lab.build", description="Build the notebooks of the lessons.")
    parser.add_argument("names", nargs="*", metavar="NAME", help="such as 01_transformer (default: all)")
    parser.add_argument("--check", action="store_true", help="write nothing; fail where something is not up to date")
    parser.add_argument("--execute", action="store_true", help="run the solutions whose code is not what was run")
    parser.add_argument("--force", action="store_true", help="with --execute: run the others too")
    args = parser.parse_args(argv)
    if args.check and args.execute:
        parser.error("--check writes nothing, so it cannot --execute; give one of them")
    try:
        return 0 if run(args, root) else 1
    except BuildError as error:
        print(f"minids.lab.build: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())

"""Lessons from one source: solutions/NN_name.py becomes lessons/NN_name.ipynb and solutions/NN_name.ipynb.

    python -m minids.lab.build [NAME …] [--check]

The source is a notebook in percent format. A region of a code cell between `# BEGIN SOLUTION` and `# END SOLUTION` is
what the learner writes: the lesson has `raise NotImplementedError` in its place. The bytes depend on the source alone,
so `--check` finds every notebook that was edited by hand or not built again.
"""

import argparse
import copy
import re
import sys
from pathlib import Path

from minids.hub import replace_file

ROOT = Path(__file__).resolve().parents[2]
BEGIN, END = re.compile(r"(\s*)# BEGIN SOLUTION\s*"), re.compile(r"\s*# END SOLUTION\s*")
STUB = "raise NotImplementedError  # your code here"
KERNEL = {"display_name": "Python 3 (ipykernel)", "language": "python", "name": "python3"}


class BuildError(ValueError):
    """A source that cannot be built, or a notebook that is not what its source makes."""


def build(source):
    """(lesson, solution) of the file `source`, as the text of two notebooks; raises BuildError."""
    import jupytext
    import nbformat

    notebook = jupytext.read(source, fmt="py:percent")
    notebook.metadata = nbformat.from_dict({"kernelspec": KERNEL, "language_info": {"name": "python"}})
    notebook.nbformat, notebook.nbformat_minor = 4, 5
    for number, cell in enumerate(notebook.cells):
        cell["id"] = f"{source.stem}-{number:03d}"
        cell.metadata.pop("lines_to_next_cell", None)
    lesson, solution = copy.deepcopy(notebook), notebook
    secrets = set()
    for cell in lesson.cells:
        cell.source = blank(cell.source, f"{source.name}, cell {cell['id']}", secrets)
    for cell in solution.cells:
        cell.source = "\n".join(s for s in cell.source.splitlines() if not (BEGIN.fullmatch(s) or END.fullmatch(s)))
    texts = [nbformat.writes(nb, version=4) + "\n" for nb in (lesson, solution)]
    check_leaks(lesson, secrets, source.name)
    return texts


def blank(text, place, secrets):
    """The text of a cell with its solutions replaced by a stub; their lines are added to `secrets`."""
    out, inside = [], False
    for line in text.splitlines():
        begins, ends = BEGIN.fullmatch(line), END.fullmatch(line)
        if (begins and inside) or (ends and not inside):
            raise BuildError(f"{place}: {line.strip()!r} does not match the marker before it; pair BEGIN and END")
        if begins:
            out.append(begins[1] + STUB)
        elif inside and not ends:
            secrets.add(line.strip())
        elif not ends:
            out.append(line)
        inside = bool(begins) or (inside and not ends)
    if inside:
        raise BuildError(f"{place}: BEGIN SOLUTION without END SOLUTION")
    return "\n".join(out)


def check_leaks(lesson, secrets, name):
    """Raise BuildError where a line of a solution (of 20 characters and more) stands elsewhere in the lesson."""
    shown = {line.strip() for cell in lesson.cells for line in cell.source.splitlines()}
    leaked = sorted(line for line in secrets & shown if len(line) >= 20)
    if leaked:
        raise BuildError(f"{name}: the solution's line {leaked[0]!r} stands in the lesson too; reword one of them")


def sources(names, root=ROOT):
    """The files solutions/NN_name.py, all or those named; raises BuildError for a name that is not there."""
    known = {path.stem: path for path in sorted((root / "solutions").glob("[0-9][0-9]_*.py"))}
    unknown = [name for name in names if name not in known]
    if unknown:
        raise BuildError(f"there is no lesson {unknown[0]!r}; the lessons are {', '.join(known)}")
    return [known[name] for name in names or known]


def main(argv=None, root=ROOT):
    """Build or check as the command line says; the exit code is 0, 1 for a stale notebook, 2 for a bad source."""
    parser = argparse.ArgumentParser("python -m minids.lab.build", description="Build the notebooks of the lessons.")
    parser.add_argument("names", nargs="*", metavar="NAME", help="such as 01_transformer (default: all)")
    parser.add_argument("--check", action="store_true", help="write nothing; fail where a notebook is not up to date")
    args, stale = parser.parse_args(argv), 0
    try:
        for source in sources(args.names, root):
            for folder, text in zip(("lessons", "solutions"), build(source), strict=True):
                path = root / folder / f"{source.stem}.ipynb"
                if path.exists() and path.read_text(encoding="utf-8") == text:
                    continue
                if args.check:
                    stale = 1
                    print(f"{folder}/{path.name} is not what solutions/{source.name} makes; run: make lessons")
                else:
                    path.parent.mkdir(exist_ok=True)
                    replace_file(path, lambda temporary, text=text: temporary.write_text(text, encoding="utf-8"))
                    print(f"wrote {folder}/{path.name}")
    except BuildError as error:
        print(f"minids.lab.build: {error}", file=sys.stderr)
        return 2
    return stale


if __name__ == "__main__":
    sys.exit(main())

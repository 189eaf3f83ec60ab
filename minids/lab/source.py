"""The source of a lesson, solutions/NN_name.py: its front matter, then cells in jupytext's percent format.

    # ---
    # title: A working transformer
    # promise: You train a transformer on your own machine, and beat gzip.
    # minutes: 45
    # difficulty: 2            # 1 to 5
    # needs: [torch]           # torch, triton, gpu
    # objectives:
    #   - write RMSNorm and see it equal the reference
    #   - ...                  # three to five
    # ---

All six fields are required. The title, the table of lessons and the links between lessons come from here alone.
"""

import re
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import yaml

ROOT = Path(__file__).resolve().parents[2]
NEEDS = {"torch": "torch", "triton": "Triton", "gpu": "a GPU"}
CELL_ID = re.compile(r"[A-Za-z0-9_-]{1,64}")


class BuildError(ValueError):
    """A source that cannot be built, or a notebook that did not run; the message says where and what to do."""


@dataclass(frozen=True)
class Lesson:
    """What the front matter of one source says, and the text below it."""

    path: Path
    title: str
    promise: str
    minutes: float
    difficulty: int
    needs: tuple
    objectives: tuple
    body: str

    @property
    def slug(self):
        """The name of its files, such as 01_transformer."""
        return self.path.stem

    @property
    def number(self):
        """Its two digits, as text."""
        return self.path.stem[:2]

    @property
    def dots(self):
        """The difficulty as five circles."""
        return "●" * self.difficulty + "○" * (5 - self.difficulty)

    @property
    def needed(self):
        """What it needs, in words."""
        return ", ".join(NEEDS[name] for name in self.needs)


def is_line(value, forbidden="|"):
    """Whether `value` is one line of text that a table of Markdown can hold."""
    return isinstance(value, str) and bool(value.strip()) and not set(value) & {"\n", *forbidden}


def is_minutes(value):
    """Whether `value` is a number of minutes that one sitting can hold."""
    return isinstance(value, int | float) and not isinstance(value, bool) and 5 <= value <= 120


def is_needs(value):
    """Whether `value` is a list of names from NEEDS, each once."""
    return isinstance(value, list) and bool(value) and all(v in list(NEEDS) and value.count(v) == 1 for v in value)


def is_objectives(value):
    """Whether `value` is a list of three to five lines."""
    return isinstance(value, list) and 3 <= len(value) <= 5 and all(is_line(v) for v in value)


FIELDS = {
    "title": (lambda v: is_line(v, "|[]"), "one line of text without | and brackets"),
    "promise": (lambda v: is_line(v, "|*"), "one sentence on one line, without | and *"),
    "minutes": (is_minutes, "a number from 5 to 120"),
    "difficulty": (lambda v: type(v) is int and 1 <= v <= 5, "a whole number from 1 to 5"),
    "needs": (is_needs, "a list with one or more of torch, triton, gpu, such as [torch]"),
    "objectives": (is_objectives, "a list of three to five lines (quote a line that has a colon)"),
}


def read_lesson(path):
    """The Lesson of a source; raises BuildError where its front matter is missing, incomplete or out of range."""
    lines = path.read_text(encoding="utf-8").splitlines()
    if not lines or lines[0].rstrip() != "# ---":
        raise BuildError(f"{path.name} does not begin with front matter; write `# ---` first, see minids/lab/source.py")
    last = next((i for i, line in enumerate(lines) if i and line.rstrip() == "# ---"), None)
    if last is None or any(not line.startswith("#") for line in lines[:last]):
        raise BuildError(f"{path.name}: the front matter is not closed; write a second line `# ---` after its fields")
    try:
        front = yaml.safe_load("\n".join(re.sub("^# ?", "", line) for line in lines[1:last]))
    except yaml.YAMLError as error:
        reason = " ".join(str(error).split())
        raise BuildError(
            f"{path.name}: the front matter is not YAML ({reason}); quote texts that hold a colon"
        ) from None
    check_fields(front if isinstance(front, dict) else {}, path.name)
    values = {key: tuple(value) if isinstance(value, list) else value for key, value in front.items()}
    return Lesson(path=path, body="\n".join(lines[last + 1 :]) + "\n", **values)


def check_fields(front, name):
    """Raise BuildError for the first field that is missing, unknown or of a wrong value."""
    for field, (is_good, expected) in FIELDS.items():
        if field not in front:
            raise BuildError(f"{name}: the front matter lacks `{field}`; add {expected}")
        if not is_good(front[field]):
            raise BuildError(f"{name}: `{field}` is {front[field]!r}; write {expected}")
    unknown = [str(field) for field in front if field not in FIELDS]
    if unknown:
        raise BuildError(f"{name}: the front matter has `{unknown[0]}`; its fields are {', '.join(FIELDS)}")


def read_all(root=ROOT):
    """The Lessons of solutions/NN_name.py in order; raises BuildError, also for two of one number."""
    lessons = [read_lesson(path) for path in sorted((root / "solutions").glob("[0-9][0-9]_*.py"))]
    for one, two in pairwise(lessons):
        if one.number == two.number:
            raise BuildError(f"{one.path.name} and {two.path.name} have one number; give each lesson its own")
    return lessons


def read_cells(lesson):
    """The cells of a lesson as nbformat makes them, with settled ids; raises BuildError for an id that cannot be."""
    import jupytext
    from nbformat import v4

    cells, seen = [], set()
    reads = jupytext.reads(lesson.body.lstrip(), fmt="py:percent").cells
    for number, read in enumerate(cell for cell in reads if cell.source.strip()):
        name = read.metadata.pop("id", None) or f"{lesson.slug}-{number:03d}"
        if not CELL_ID.fullmatch(name) or name in seen:
            raise BuildError(f"{lesson.path.name}: cell id {name!r}; write up to 64 of A-Z a-z 0-9 _ -, each id once")
        seen.add(name)
        for key in ("lines_to_next_cell", "execution", "collapsed"):
            read.metadata.pop(key, None)
        new = {"code": v4.new_code_cell, "markdown": v4.new_markdown_cell, "raw": v4.new_raw_cell}[read.cell_type]
        source = read.source.lstrip("\n")  # ruff wants blank lines above a def, also behind `# %% tags=…`
        cells.append(new(source, id=name, metadata=read.metadata))
    return cells

"""The page that `make lab` opens, lessons/START.md: what there is, what is done, where to go on.

    python -m minids.lab.landing

It is written from the front matters of the lessons and the learner's progress, and git ignores it.
"""

import argparse
import sys
from dataclasses import dataclass

from minids import triton_env
from minids.files import replace_file
from minids.lab import exercises, progress
from minids.lab.source import ROOT, BuildError, Lesson, read_all

PAGE = """# Welcome to minids

You take a working transformer and make it a working mini-DeepSeek: each technique is explained, built by you, and
measured on this machine. The lessons need no network, and send nothing anywhere.

{onward}

{table}{absent}

## How a lesson works

- Run its cells from top to bottom with Shift+Enter. An exercise says `raise NotImplementedError`: write over that line.
- `check(your_function)` says PASS, or where your answer first goes wrong, and why if it knows.
- `hint("name")` gives a nudge; asked again the idea, then a solution.
- `status()` shows what has passed and the minutes left. It is kept in `.minids/` and survives a restart.

This page is written when `make lab` starts and when an exercise passes. One that is open shows it after File → Reload …
from Disk.
"""


@dataclass(frozen=True)
class Row:
    """A lesson, how many of its exercises passed, of how many that this machine can check, and the minutes left.

    `absent` more ask for kernels, and Triton is missing.
    """

    lesson: Lesson
    passed: int
    total: int
    left: float
    absent: int = 0

    @property
    def number(self):
        return self.lesson.number

    @property
    def title(self):
        return self.lesson.title

    @property
    def bar(self):
        """One box for each exercise, the passed ones filled."""
        return "▰" * self.passed + "▱" * (self.total - self.passed)

    @property
    def apart(self):
        """The exercises that are counted apart, in words."""
        return f"{self.absent} need{'s' * (self.absent == 1)} Triton" if self.absent else ""

    @property
    def state(self):
        """What has passed, and the minutes left: two cells of a table in Markdown."""
        if not self.total:
            return f"{self.apart or 'no exercises'} |"
        counted = f"{self.bar} {self.passed} of {self.total}" + (f", {self.apart}" if self.absent else "")
        return f"{counted} | {self.left:.0f} min"

    @property
    def link(self):
        """Its notebook, as Markdown."""
        return f"[{self.number} {self.title}]({self.lesson.slug}.ipynb)"


def rows(root=ROOT):
    """A Row for each lesson in order; the minutes left are less the share of the exercises that passed."""
    passed, of_lesson = progress.load().passed, exercises.by_lesson()
    return [row(lesson, of_lesson.get(lesson.number, []), passed) for lesson in read_all(root)]


def row(lesson, of_lesson, passed):
    """The Row of one lesson with its exercises."""
    done = [exercise for exercise in of_lesson if exercise.id in passed]
    kernels = [exercise for exercise in of_lesson if exercise.kernel is not None and exercise not in done]
    absent = [] if triton_env.installed() else kernels
    whole = sum(exercise.minutes for exercise in of_lesson)
    share = sum(exercise.minutes for exercise in (*done, *absent)) / whole if whole else 0
    return Row(lesson, len(done), len(of_lesson) - len(absent), lesson.minutes * (1 - share), len(absent))


def page(table):
    """The text of START.md for the rows `table`."""
    lines = ["| Lesson | Minutes | Difficulty | Needs | Passed | Left |", "|---|---|---|---|---|---|"]
    for one in table:
        facts = f"{one.lesson.minutes:g} | {one.lesson.dots} | {one.lesson.needed}"
        lines.append(f"| {one.link} | {facts} | {one.state} |")
    return PAGE.format(onward=onward(table), table="\n".join(lines), absent=absent(table))


def absent(table):
    """A paragraph on the exercises that need Triton, where it is missing."""
    lessons = [one.number for one in table if one.absent]
    if not lessons:
        return ""
    remedy = "`pip install triton`" if sys.platform == "linux" else "there is no wheel of it for this system"
    return (
        f"\n\nTriton is missing here ({remedy}), so {sum(one.absent for one in table)} exercises that ask for a kernel "
        f"cannot be checked, and are counted apart. All else in lessons {', '.join(lessons)} works."
    )


def onward(table):
    """Where to go on: the first lesson with an exercise left, or the first of all where nothing has passed yet."""
    if not table:
        return "There are no lessons yet."
    unfinished = [one for one in table if one.passed < one.total]
    if not any(one.passed for one in table):
        return f"**Begin with {table[0].link}**, {table[0].lesson.minutes:g} minutes."
    if not unfinished:
        which = " that this machine can check" if any(one.absent for one in table) else ""
        return f"**Every exercise{which} has passed.** What comes next is yours: `import minids`."
    return f"**Continue with {unfinished[0].link}**, {unfinished[0].left:.0f} minutes left."


def write(root=ROOT):
    """Write lessons/START.md below `root`, whole, and return its path."""
    path, text = root / "lessons" / "START.md", page(rows(root))
    path.parent.mkdir(exist_ok=True)
    replace_file(path, lambda temporary: temporary.write_bytes(text.encode("utf-8")))
    return path


def renew(root=ROOT):
    """Write the page once more where there is one and the progress is kept beside it; what goes wrong is let be."""
    try:
        if (root / "lessons" / "START.md").exists() and progress.home().resolve() == (root / ".minids").resolve():
            write(root)
    except (BuildError, OSError):  # a page of yesterday is no reason to stop a lesson
        pass


def main(argv=None, root=ROOT):
    """Write the page; the exit code is 0, or 1 with the reason."""
    argparse.ArgumentParser("python -m minids.lab.landing", description="Write lessons/START.md.").parse_args(argv)
    try:
        write(root)
    except (BuildError, OSError) as error:
        print(f"minids.lab.landing: lessons/START.md cannot be written: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())

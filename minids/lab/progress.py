"""What a learner has done: passed exercises, hints taken, predictions; and the functions that passed, kept as source.

All of it is in the folder `.minids/` beside `lessons/` (MINIDS_HOME names another):

    progress.json               {"version": 1, "passed": {"01.1": {...}}, "hints": {...}, "predictions": {...}}
    passed/01.1_rms_norm.py     the function that passed, with the imports and helpers it uses

Files are written under a temporary name and renamed. A progress.json that is damaged is kept aside under another name,
and a fresh one begun; the functions in passed/ stay.
"""

import ast
import json
import os
import sys
from dataclasses import asdict, dataclass, field
from datetime import datetime, timezone
from pathlib import Path

from minids.files import replace_file, write_json
from minids.lab import keep
from minids.lab.exercise import REGISTRY

VERSION = 1


@dataclass
class Progress:
    """The content of progress.json: what passed and when, the level of hints taken, predictions."""

    version: int = VERSION
    passed: dict = field(default_factory=dict)
    hints: dict = field(default_factory=dict)
    predictions: dict = field(default_factory=dict)


def home():
    """The folder `.minids`: MINIDS_HOME, else beside the nearest `lessons/` above the current folder, else in it."""
    if os.environ.get("MINIDS_HOME"):
        return Path(os.environ["MINIDS_HOME"])
    here = Path.cwd()
    root = next((p for p in (here, *here.parents) if (p / ".minids").is_dir() or (p / "lessons").is_dir()), here)
    return root / ".minids"


def load():
    """The learner's Progress; a damaged file is kept aside, and said so on stderr."""
    path = home() / "progress.json"
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        progress = Progress(**content)
        if not all(isinstance(value, dict) for value in (progress.passed, progress.hints, progress.predictions)):
            raise TypeError("a part of it is no table")
        return progress
    except FileNotFoundError:
        return Progress()
    except (ValueError, TypeError, AttributeError, OSError) as error:
        aside = set_aside(path)
        print(f"{path} is damaged ({error}); it is kept as {aside.name}, and a fresh one begins", file=sys.stderr)
        return Progress()


def set_aside(path):
    """Rename a damaged file to one that is free, so that nothing in it is lost."""
    number = 1
    while (aside := path.with_name(f"{path.name}.damaged-{number}")).exists():
        number += 1
    os.replace(path, aside)
    return aside


def update(change):
    """Read progress.json, let `change` alter it, and write it whole; a disk that refuses is said on stderr, no more."""
    progress = load()
    change(progress)
    try:
        home().mkdir(parents=True, exist_ok=True)
        write_json(home() / "progress.json", asdict(progress))
    except OSError as error:
        print(f"progress cannot be kept in {home()} ({error}); the lesson goes on without it", file=sys.stderr)
    return progress


def note_pass(exercise, fn):
    """Keep that `exercise` passed, and the source of `fn`."""
    path = kept_path(exercise)
    try:
        source = keep.source_of(fn)
        path.parent.mkdir(parents=True, exist_ok=True)
        replace_file(path, lambda temporary: temporary.write_text(source, encoding="utf-8"))
    except (OSError, keep.CannotKeep) as error:
        print(f"passed, but your function cannot be kept for later lessons: {error}", file=sys.stderr)
    when = datetime.now(timezone.utc).isoformat(timespec="seconds")
    return update(lambda progress: progress.passed.update({exercise.id: {"name": exercise.name, "when": when}}))


def kept_path(exercise):
    return home() / "passed" / f"{exercise.id}_{exercise.name}.py"


def kept(exercise):
    """The learner's function that passed, built again from its source; None where there is none that works."""
    path = kept_path(exercise)
    try:
        source = path.read_text(encoding="utf-8")
        ast.parse(source)
        return keep.function_of(source, exercise.name, path)
    except FileNotFoundError:
        return None
    except Exception as error:  # whatever a file that was edited by hand may raise
        print(f"{path} cannot be used ({type(error).__name__}: {error}); the reference stands in", file=sys.stderr)
        return None


def passed_in(lesson, progress=None):
    """(passed, all) exercises of a lesson such as "01"."""
    progress = progress or load()
    everything = [e for e in REGISTRY.values() if e.lesson == lesson]
    return [e for e in everything if e.id in progress.passed], everything

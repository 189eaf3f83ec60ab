"""What a learner has done: passed exercises, hints taken, predictions; and the functions that passed, kept as source.

All of it is in the folder `.minids/` beside `lessons/` (MINIDS_HOME names another):

    progress.json               {"version": 1, "passed": {"01.1": {...}}, "hints": {...}, "predictions": {...}}
    passed/01.1_rms_norm.py     the function that passed, with the imports and helpers it uses

Files are written under a temporary name and renamed. A progress.json that is damaged (not JSON, a part of a wrong kind)
or of another version is kept aside under another name, and a fresh one begun; the functions in passed/ stay. Keys that
this minids does not know are kept as they are. Where the folder cannot be written that is said once, and what happens
until the kernel ends is remembered in memory.
"""

import json
import os
import sys
from dataclasses import asdict, dataclass, field
from datetime import datetime, timezone
from pathlib import Path

from minids.files import replace_file, write_json
from minids.lab import keep
from minids.lab.exercise import REGISTRY, cases
from minids.lab.observe import observe
from minids.lab.sandbox import plain_state

VERSION = 1
UNSAVED = {}  # folder -> Progress, where the disk refused it


@dataclass
class Progress:
    """The content of progress.json: what passed and when, the level of hints taken, predictions; `rest` is unknown."""

    version: int = VERSION
    passed: dict = field(default_factory=dict)
    hints: dict = field(default_factory=dict)
    predictions: dict = field(default_factory=dict)
    rest: dict = field(default_factory=dict)


class Damaged(ValueError):
    """A progress.json that cannot be used; the message says why."""


def home():
    """The folder `.minids`: MINIDS_HOME, else beside the nearest `lessons/` above the current folder, else in it."""
    if os.environ.get("MINIDS_HOME"):
        return Path(os.environ["MINIDS_HOME"]).expanduser()
    try:
        here = Path.cwd()
    except OSError:  # the current folder was removed
        return Path.home() / ".minids"
    root = next((p for p in (here, *here.parents) if (p / ".minids").is_dir() or (p / "lessons").is_dir()), here)
    return root / ".minids"


def load():
    """The learner's Progress; a damaged file is kept aside, and said so on stderr."""
    folder = home()
    if folder in UNSAVED:
        return UNSAVED[folder]
    path = folder / "progress.json"
    try:
        return read(path)
    except (FileNotFoundError, NotADirectoryError):
        return Progress()
    except (Damaged, OSError) as error:
        try:
            what = f"it is kept as {set_aside(path).name}, and a fresh one begins"
        except OSError:  # a folder that cannot be written: the file stays, and is not written over
            UNSAVED[folder] = Progress()
            what = "the lesson goes on without it"
        print(f"{path} cannot be used ({error}); {what}", file=sys.stderr)
        return UNSAVED.get(folder) or Progress()


def read(path):
    """The Progress in a file; raises Damaged where it is none."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise Damaged(f"it is not JSON: {error}") from None
    if not isinstance(content, dict) or content.get("version", VERSION) != VERSION:
        kind = f"it is of version {content.get('version')!r}" if isinstance(content, dict) else "it is no table"
        raise Damaged(f"{kind}; this minids knows version {VERSION}")
    parts = {"passed": dict, "hints": int, "predictions": int | float}
    for part, kind in parts.items():
        table = content.get(part, {})
        if not isinstance(table, dict) or not all(isinstance(value, kind) for value in table.values()):
            raise Damaged(f"its part {part!r} is not what it should be")
    rest = {key: value for key, value in content.items() if key not in (*parts, "version")}
    return Progress(**{part: content.get(part, {}) for part in parts}, rest=rest)


def set_aside(path):
    """Rename a damaged file to one that is free, so that nothing in it is lost."""
    number = 1
    while (aside := path.with_name(f"{path.name}.damaged-{number}")).exists():
        number += 1
    os.replace(path, aside)
    return aside


def update(change):
    """Read progress.json, let `change` alter it, and write it whole; a disk that refuses is said once on stderr."""
    progress, folder = load(), home()
    change(progress)
    content = asdict(progress)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if folder in UNSAVED and (folder / "progress.json").exists():
            read(folder / "progress.json")  # what cannot be read, nor set aside, is not written over
        write_json(folder / "progress.json", content.pop("rest") | content)
        UNSAVED.pop(folder, None)
    except (OSError, Damaged) as error:
        if folder not in UNSAVED:
            print(f"progress cannot be kept in {folder} ({error}); the lesson goes on without it", file=sys.stderr)
        UNSAVED[folder] = progress
    return progress


def note_pass(exercise, fn):
    """Keep that `exercise` passed, and the source of `fn`."""
    when = datetime.now(timezone.utc).isoformat(timespec="seconds")
    progress = update(lambda progress: progress.passed.update({exercise.id: {"name": exercise.name, "when": when}}))
    try:
        keep_function(exercise, fn)
    except Exception as error:  # whatever its source, or the disk, is like
        if home() not in UNSAVED:
            print(f"passed, but your function cannot be kept for later lessons: {error}", file=sys.stderr)
    return progress


def keep_function(exercise, fn):
    """Write the source of `fn` into passed/, once it has done the same as `fn`; raises CannotKeep or OSError."""
    path = kept_path(exercise)
    source = keep.source_of(fn, exercise.name)
    try:
        copy = keep.function_of(source, exercise.name, path)
        with plain_state():
            seen = observe(exercise, copy, cases(exercise)[0])
    except Exception as error:
        raise keep.CannotKeep(f"its source alone does not run ({type(error).__name__}: {error})") from None
    if seen.failed:
        problem = seen.trouble or f"{type(seen.call.error).__name__}: {seen.call.error}"
        raise keep.CannotKeep(f"its source alone does not do the same ({problem})")
    path.parent.mkdir(parents=True, exist_ok=True)
    replace_file(path, lambda temporary: temporary.write_text(source, encoding="utf-8"))


def kept_path(exercise):
    return home() / "passed" / f"{exercise.id}_{exercise.name}.py"


def kept(exercise):
    """The learner's function that passed, built again from its source; None where there is none that works."""
    path = kept_path(exercise)
    try:
        return keep.function_of(path.read_text(encoding="utf-8"), exercise.name, path)
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (Exception, SystemExit) as error:  # whatever a file that was edited by hand may raise
        print(f"{path} cannot be used ({type(error).__name__}: {error}); the reference stands in", file=sys.stderr)
        return None


def passed_in(lesson, progress=None):
    """(passed, all) exercises of a lesson such as "01"."""
    progress = progress or load()
    everything = [e for e in REGISTRY.values() if e.lesson == lesson]
    return [e for e in everything if e.id in progress.passed], everything

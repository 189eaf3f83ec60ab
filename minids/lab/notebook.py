"""What a notebook calls: check(fn) says whether an answer is right, and if not, why; hint, status, mine, example.

    my_rms_norm = check(rms_norm)          # 01.1 rms_norm: PASS

`check` gives back the learner's function where it passed, else the reference, and says which: a notebook in which
nothing is solved runs from top to bottom all the same.
"""

import contextlib
import difflib

from minids.lab import exercises, progress, solution, tiles
from minids.lab.compare import describe
from minids.lab.exercise import REGISTRY
from minids.lab.judge import FAIL, NOT_ATTEMPTED, PASS, Outcome, judge
from minids.lab.show import show


def check(answer, name=None):
    """Print the verdict on `answer`, a function named as its exercise; gives it if it passed, else the reference.

    `name` ("01.1" or "rms_norm") says which exercise is meant where the function's own name does not. Never raises for
    a wrong answer, whatever it is; what belongs to no exercise is given back unchecked, and that is said.
    """
    exercise, problem = recognise(answer, name)
    if exercise is None:
        show(problem, ["nothing was checked: what you gave is given back as it is"])
        return answer
    outcome = Outcome(exercise, FAIL, "", [problem]) if problem else judged(exercise, answer)
    if outcome.verdict == PASS:
        done, everything = progress.passed_in(exercise.lesson, progress.note_pass(exercise, answer))
        renew_landing_page()
        outcome.details.append(
            f"your {kind(exercise)} is used from here on; {len(done)} of {len(everything)} in lesson {exercise.lesson}"
        )
    elif outcome.verdict == FAIL:
        outcome.details.append(f"the cells below use the reference; for help: hint({exercise.name!r})")
    report(outcome)
    return answer if outcome.verdict == PASS else exercises.reference(exercise.id)


def example(answer, name):
    """Show the verdict of exercise `name` ("00.1") on `answer`, marked as an example; nothing is kept.

    A line that BEGINS with an exercise's number is about the learner's own answer, and the course's tests read it so.
    Raises ValueError where there is no such exercise.
    """
    exercise = exercises.find(name)
    if exercise is None:
        raise ValueError(f"example: there is no exercise {name!r}")
    outcome = judge(exercise, answer)
    show(f"example → {outcome.line}", outcome.details, outcome.diagnosis, outcome.verdict)


def judged(exercise, answer):
    """The Outcome of an answer that can be called; a check that itself goes wrong is a FAIL that says so."""
    if is_reference(answer, exercise):
        return Outcome(exercise, NOT_ATTEMPTED, "", ["this is the reference; run the cell with your own function"])
    try:
        return judge(exercise, answer)
    except (Exception, SystemExit) as error:  # an object that nobody thought of
        return Outcome(exercise, FAIL, "", [f"your answer cannot be tried: {type(error).__name__} ({error})"[:400]])


def recognise(answer, name):
    """(exercise, problem): which exercise is meant, and a sentence where `answer` is no function that can be tried."""
    name = name if name is None or isinstance(name, str) else text_of(name, "__name__") or describe(name)
    own = answer if isinstance(answer, str) else text_of(answer, "__name__") if callable(answer) else ""
    exercise = exercises.find(name or text_of(answer, "minids_exercise") or own)
    if exercise is None:
        return None, "check: " + unknown(name or own, answer)
    if isinstance(answer, str):
        return exercise, f"check takes the function itself: check({exercise.name}), without quotes"
    if exercise.kernel is not None and callable(answer) and not tiles.is_kernel(answer):
        return exercise, f"{exercise.name} must be a kernel: write @triton.jit alone in the line above its def"
    if exercise.kernel is None and tiles.is_kernel(answer):
        return exercise, "a plain function is asked for here, without @triton.jit"
    if isinstance(answer, type) or not callable(answer):
        kind = f"the class {answer.__name__}" if isinstance(answer, type) else describe(answer)
        return exercise, f"check takes a function; {kind} was given"
    return exercise, ""


def unknown(name, given=None):
    """What to say where no exercise is meant by `name`, of what was given."""
    call = "name the exercise, as in check(answer, '01.1'), or give the function of a stub"
    if not isinstance(name, str) or not name:
        return f"{describe(given)} was given; {call}"
    if name == "<lambda>":
        return f"a lambda has no name; {call}"
    same = [e.id for e in REGISTRY.values() if e.name == name]
    if same:
        return f"{name} is the name of several exercises; say which: {', '.join(same)}"
    near = difflib.get_close_matches(name, [e.name for e in REGISTRY.values()], 1)
    meant = f"did you mean {near[0]}?" if near else "status() shows what there is"
    return f"there is no exercise {name!r}; {meant}"


def kind(exercise):
    return "function" if exercise.kernel is None else "kernel"


def is_reference(answer, exercise):
    given = answer is exercise.reference or (exercise.kernel is not None and answer is exercise.kernel)
    return given or bool(text_of(answer, "minids_exercise"))


def renew_landing_page():
    with contextlib.suppress(ImportError):  # without PyYAML there is none
        from minids.lab import landing

        landing.renew()


def report(outcome):
    """Show an outcome: the verdict's line, then details and the diagnosis."""
    extra = list(outcome.details)
    if outcome.verdict == NOT_ATTEMPTED and not extra:
        extra = [
            "to try it: replace the line that raises, run its cell, then this one",
            f"the cells below use the reference; for help: hint({outcome.exercise.name!r})",
        ]
    show(outcome.line, extra, outcome.diagnosis, outcome.verdict)


def hint(target, level=None):
    """Show the next hint for an exercise: a nudge, then the idea, then the solution; `level` 1 to 3 asks for one."""
    exercise, name = named(target)
    if exercise is None:
        return show("hint: " + unknown(name, target).replace("check(answer, '01.1')", "hint('01.1')"))
    if level is not None and not isinstance(level, int):
        return show(f"hint: the level is a number from 1 to 3; {describe(level)} was given")
    texts = [*exercise.hints, "one solution:\n" + solution.of(exercise)]
    if level is None:
        level = min(max(progress.load().hints.get(exercise.id, 0), 0) + 1, len(texts))
        progress.update(lambda p: p.hints.update({exercise.id: level}))
    level = max(1, min(level, len(texts)))
    more = "" if level == len(texts) else f"\nhint({exercise.name!r}) again says more"
    return show(f"{exercise.title}, hint {level} of {len(texts)}", (texts[level - 1] + more).splitlines())


def named(target):
    """(exercise, name) of what a learner names it by: its number, its name, or the function."""
    name = target if isinstance(target, str) else text_of(target, "__name__")
    return exercises.find(text_of(target, "minids_exercise") or name), name


def text_of(value, attribute):
    """An attribute that is text, "" where there is none, whatever kind of object that is."""
    try:
        text = getattr(value, attribute, "")
    except Exception:
        return ""
    return text if isinstance(text, str) else ""


def status():
    """Show what has passed, per lesson, with the minutes that are left."""
    show("minids: your progress", rows() or ["there are no exercises yet"])


def rows():
    """A line for each lesson; where the sources of the lessons are absent or damaged, for each that has exercises."""
    from minids.lab import landing, source

    try:
        table = landing.rows()
    except (source.BuildError, OSError, ImportError):
        table = []
    if table:
        widest = max(r.total for r in table)
        form = "{0.bar:{1}}  {0.passed} of {0.total}  {0.left:3.0f} min left  {0.number} {0.title}{2}"
        return [form.format(row, widest, f" ({row.apart})" if row.absent else "") for row in table]
    learnt, lines = progress.load(), []
    widest = max(map(len, exercises.by_lesson().values()), default=0)
    for lesson, everything in exercises.by_lesson().items():
        done = progress.passed_in(lesson, learnt)[0]
        left = sum(e.minutes for e in everything if e not in done)
        bar = "▰" * len(done) + "▱" * (len(everything) - len(done))
        lines.append(f"{bar:{widest}}  {len(done)} of {len(everything)}  {left:3.0f} min left  lesson {lesson}")
    return lines


def mine(name):
    """The learner's own function that passed exercise `name` ("rms_norm" or "01.1"), else the reference; says which."""
    exercise, text = named(name)
    if exercise is None:
        raise ValueError("mine: " + unknown(text, name).replace("check(answer, '01.1')", "mine('01.1')"))
    fn = progress.kept(exercise)
    show(f"{exercise.title}: {'yours' if fn else 'the reference'}")
    return fn or exercises.reference(exercise.id)

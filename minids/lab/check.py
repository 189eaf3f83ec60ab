"""What a notebook calls: check(fn) says whether an answer is right, and if not, why; hint, status and mine beside it.

    my_rms_norm = check(rms_norm)          # 01.1 rms_norm: PASS

`check` gives back the learner's function where it passed, else the reference, and says which: a notebook in which
nothing is solved runs from top to bottom all the same.
"""

import difflib

from minids.lab import exercises, progress, solution
from minids.lab.exercise import REGISTRY
from minids.lab.judge import FAIL, NOT_ATTEMPTED, PASS, Outcome, judge
from minids.lab.show import show


def check(answer, name=None):
    """Print the verdict on `answer`, a function named as its exercise; gives it if it passed, else the reference.

    `name` ("01.1" or "rms_norm") says which exercise is meant where the function's own name does not. Never raises for
    a wrong answer, whatever it is.
    """
    exercise, problem = recognise(answer, name)
    if exercise is None:
        show(problem)
        return answer
    if problem:
        outcome = Outcome(exercise, FAIL, "", [problem])
    elif is_reference(answer, exercise):
        outcome = Outcome(exercise, NOT_ATTEMPTED, "", ["this is the reference; run the cell with your own function"])
    else:
        outcome = judge(exercise, answer)
    if outcome.verdict == PASS:
        done, everything = progress.passed_in(exercise.lesson, progress.note_pass(exercise, answer))
        outcome.details.append(
            f"your function is used from here on; {len(done)} of {len(everything)} in lesson {exercise.lesson}"
        )
    elif outcome.verdict == FAIL:
        outcome.details.append(f"the cells below use the reference; for help: hint({exercise.name!r})")
    report(outcome)
    return answer if outcome.verdict == PASS else exercises.reference(exercise.id)


def recognise(answer, name):
    """(exercise, problem): which exercise is meant, and a sentence where `answer` is no function that can be tried."""
    kernel = getattr(answer, "fn", answer)
    own = getattr(kernel, "__name__", "") if callable(kernel) else answer if isinstance(answer, str) else ""
    exercise = exercises.find(name or getattr(answer, "minids_exercise", "") or own)
    if exercise is None:
        return None, unknown(name or own, answer)
    if isinstance(answer, str):
        return exercise, f"check takes the function itself: check({exercise.name}), without quotes"
    if isinstance(answer, type) or not callable(answer):
        kind = "the class" if isinstance(answer, type) else "a " + type(answer).__name__
        return exercise, f"check takes a function; {kind} {getattr(answer, '__name__', '')} was given".rstrip()
    return exercise, ""


def unknown(name, answer):
    """What to say where no exercise is meant."""
    if not name or name == "<lambda>":
        given = "a lambda has no name" if name else f"{type(answer).__name__} {str(answer)[:40]!r} was given"
        return f"check: {given}; say which exercise is meant: check(…, '01.1'), or give the function of a stub"
    near = difflib.get_close_matches(name, [e.name for e in REGISTRY.values()], 1)
    meant = f"did you mean {near[0]}?" if near else "status() lists the exercises."
    return f"check: there is no exercise {name!r}; {meant}"


def is_reference(answer, exercise):
    return answer is exercise.reference or hasattr(answer, "minids_exercise")


def report(outcome):
    """Show an outcome: the verdict's line, then details and the diagnosis."""
    extra = list(outcome.details)
    if outcome.verdict == NOT_ATTEMPTED and not extra:
        extra = [
            f"the cells below use the reference; replace the line that raises, or ask: hint({outcome.exercise.name!r})"
        ]
    show(outcome.line, extra, outcome.diagnosis, outcome.verdict)


def hint(target, level=None):
    """Show the next hint for an exercise: a nudge, then the idea, then the solution; `level` 1 to 3 asks for one."""
    name = target if isinstance(target, str) else getattr(target, "__name__", "")
    exercise = exercises.find(name)
    if exercise is None:
        return show(unknown(name, target).replace("check:", "hint:").replace("check(…", "hint(…"))
    texts = [*exercise.hints, "one solution:\n" + solution.of(exercise)]
    if level is None:
        level = min(progress.load().hints.get(exercise.id, 0) + 1, len(texts))
        progress.update(lambda p: p.hints.update({exercise.id: level}))
    level = max(1, min(int(level), len(texts)))
    more = "" if level == len(texts) else f"\nhint({exercise.name!r}) again says more"
    return show(f"{exercise.title}, hint {level} of {len(texts)}", (texts[level - 1] + more).splitlines())


def status():
    """Show what has passed, per lesson, with the minutes that are left."""
    from minids.lab.landing import rows

    table = rows()
    lines = [f"{r.bar}  {r.passed} of {r.total}  {r.left:3.0f} min left  {r.number} {r.title}" for r in table]
    show("minids: your progress", lines or ["there are no exercises yet"])


def mine(name):
    """The learner's own function that passed exercise `name` ("rms_norm" or "01.1"), else the reference; says which."""
    exercise = exercises.find(name)
    if exercise is None:
        raise ValueError(unknown(name, name).replace("check:", "mine:"))
    fn = progress.kept(exercise)
    show(f"{exercise.title}: {'yours' if fn else 'the reference'}")
    return fn or exercises.reference(exercise.id)

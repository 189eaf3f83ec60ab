"""The verdict on one answer: every case run, every result compared, and the likeliest mistake named."""

import dis
import inspect
import types
from dataclasses import dataclass, field

from minids.lab import diagnose, launching, sandbox, tiles
from minids.lab.exercise import cases
from minids.lab.observe import observe
from minids.lab.remarks import remarks

PASS, FAIL, NOT_ATTEMPTED = "PASS", "FAIL", "NOT ATTEMPTED"


@dataclass
class Outcome:
    """The verdict on one answer: `headline` after the verdict, `details` below it, `diagnosis` where one is known."""

    exercise: object
    verdict: str
    headline: str = ""
    details: list = field(default_factory=list)
    diagnosis: str = ""

    @property
    def line(self):
        """The stable first line, such as `01.1 rms_norm: PASS`."""
        return f"{self.exercise.title}: {self.verdict}" + (f" {self.headline}" if self.headline else "")


def judge(exercise, fn):
    """The Outcome of the answer `fn`; runs it on every case, whatever it does."""
    if exercise.kernel is not None and (missing := tiles.missing()):
        return Outcome(exercise, NOT_ATTEMPTED, "", [missing])
    fn = getattr(fn, "_torchdynamo_orig_callable", fn)  # what torch.compile was given: compiling outlasts the limit
    with sandbox.plain_state():
        to_try = cases(exercise)
        if problem := form_problem(exercise, fn, to_try[0]):
            return Outcome(exercise, FAIL, "", [problem])
        if is_empty(fn) or (exercise.kernel is not None and (is_empty(fn.fn) or launching.is_stub(fn))):
            return Outcome(exercise, NOT_ATTEMPTED)
        return verdict(exercise, fn, to_try)


def verdict(exercise, fn, to_try):
    seen = []
    for case in to_try:
        seen.append(observe(exercise, fn, case))
        if len(seen) == 1 and is_stub(seen[0].call):
            return Outcome(exercise, NOT_ATTEMPTED)
        if isinstance(seen[-1].call.error, sandbox.TimeLimit):
            return too_slow(exercise, seen)
    failed = [o for o in seen if o.failed]
    if not seen[0].failed and (again := observe(exercise, fn, seen[0].case)).failed:
        return forgetful(exercise, seen, again)
    if failed:
        return explain(exercise, fn, seen, failed)
    return Outcome(exercise, PASS, "", printed(seen) + launching.notes(seen, passed=True))


def form_problem(exercise, fn, case):
    """A sentence where `fn` is no plain function (or kernel) of the exercise's arguments; "" where it is."""
    if exercise.kernel is not None:
        return launching.form_problem(exercise, fn)
    for kind, is_kind in (("async def", inspect.iscoroutinefunction), ("yield", is_generator)):
        if is_kind(fn):
            return f"your function has `{kind}`; a plain function that gives its result by `return` is needed"
    try:
        signature = inspect.signature(fn)
    except (TypeError, ValueError):
        return ""  # no signature to look at: the call itself will tell
    names = exercise.parameters[: len(case.args)]
    try:
        signature.bind(*names)
    except TypeError:
        return f"your function takes {signature}; it must take ({', '.join(names)}), as the stub does"
    return ""


def is_generator(fn):
    return inspect.isgeneratorfunction(fn) or inspect.isasyncgenfunction(fn)


def is_empty(fn):
    """Whether a function's body does nothing at all: `...`, `pass` or its docstring alone."""
    return isinstance(fn, types.FunctionType) and steps(fn) == steps(lambda: None)


def steps(fn):
    return [(step.opname, step.argval) for step in dis.get_instructions(fn) if step.opname not in ("RESUME", "NOP")]


def is_stub(call):
    """Whether a call ended at the stub's `raise NotImplementedError`; torch raises such errors too, with a text."""
    return isinstance(call.error, NotImplementedError) and (not str(call.error) or ": raise" in call.line)


def forgetful(exercise, seen, again):
    """The Outcome of an answer whose first case was right, and wrong when it was tried again after the others."""
    why = "The first case was right, and wrong when it was tried again: the function keeps something between calls."
    details = error_or_trouble(again)
    return Outcome(exercise, FAIL, f"at {again.case.label}, tried again", details + printed(seen), why)


def too_slow(exercise, seen):
    headline = f"at {seen[-1].case.label}"
    why = (
        f"One call took more than {exercise.limit:g} seconds and was stopped: is there a loop that never ends? "
        "Or one of far too many rounds?"
    )
    return Outcome(exercise, FAIL, headline, printed(seen), why)


def explain(exercise, fn, seen, failed):
    """The Outcome of an answer that failed: the first case, what was wrong there, and the diagnosis."""
    details = [*error_or_trouble(failed[0]), f"{len(failed)} of {len(seen)} cases fail", *remarks(exercise, fn)]
    details += printed(seen)
    details += launching.notes(seen, passed=False)
    return Outcome(exercise, FAIL, f"at {failed[0].case.label}", details, diagnose.diagnosis(exercise, seen))


def error_or_trouble(seen):
    """What went wrong in one case, as lines: the exception with the learner's line, or the difference."""
    error = seen.call.error
    if error is None:
        return [str(seen.trouble)]
    try:
        text = f"{type(error).__name__}: {error}"[:400]
    except Exception:  # an exception that cannot say what it is
        text = type(error).__name__
    return [text] + ([f"in {seen.call.line}"] if seen.call.line else [])


def printed(seen):
    """What the first case printed, as lines to show; further cases stay silent."""
    lines = seen[0].call.printed.splitlines()
    more = [f"… and {len(lines) - 8} more lines"] if len(lines) > 8 else []
    return ["it printed, in the first case:", *(f"    {line[:160]}" for line in lines[:8]), *more] if lines else []

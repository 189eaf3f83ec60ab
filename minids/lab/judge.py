"""The verdict on one answer: every case run, every result compared, and the likeliest mistake named."""

import inspect
from dataclasses import dataclass, field

from minids.lab import diagnose, sandbox
from minids.lab.exercise import cases
from minids.lab.observe import observe

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
    if problem := signature_problem(exercise, fn):
        return Outcome(exercise, FAIL, "", [problem])
    seen = []
    for case in cases(exercise):
        seen.append(observe(exercise, fn, case))
        error = seen[-1].call.error
        if isinstance(error, NotImplementedError) and len(seen) == 1:
            return Outcome(exercise, NOT_ATTEMPTED)
        if isinstance(error, sandbox.TimeLimit):
            return too_slow(exercise, seen)
    failed = [o for o in seen if o.failed]
    if failed:
        return explain(exercise, seen, failed)
    again = observe(exercise, fn, seen[0].case)
    if again.failed:
        why = "The first case was right, and wrong when it was tried again: the function keeps something between calls."
        return Outcome(exercise, FAIL, f"at {again.case.label}", printed(seen), why)
    return Outcome(exercise, PASS, "", printed(seen))


def signature_problem(exercise, fn):
    """A sentence where `fn` cannot be called with the exercise's arguments; "" where it can."""
    try:
        signature = inspect.signature(fn)
    except (TypeError, ValueError):
        return ""  # no signature to look at: the call itself will tell
    try:
        signature.bind(*exercise.parameters)
    except TypeError:
        return f"your function takes {signature}; it must take ({', '.join(exercise.parameters)}), as the stub does"
    return ""


def too_slow(exercise, seen):
    headline = f"at {seen[-1].case.label}"
    why = f"One call took more than {exercise.limit:g} seconds and was stopped: is there a loop that never ends?"
    return Outcome(exercise, FAIL, headline, printed(seen), why)


def explain(exercise, seen, failed):
    """The Outcome of an answer that failed: the first case, what was wrong there, and the diagnosis."""
    first = failed[0]
    if first.call.error is not None:
        error = first.call.error
        details = [f"{type(error).__name__}: {error}"[:400]]
        details += [f"in {first.call.line}"] if first.call.line else []
    else:
        details = [str(first.trouble)]
    details.append(f"{len(failed)} of {len(seen)} cases fail")
    return Outcome(
        exercise, FAIL, f"at {first.case.label}", details + printed(seen), diagnose.diagnosis(exercise, seen)
    )


def printed(seen):
    """What the first case printed, as lines to show; further cases stay silent."""
    lines = seen[0].call.printed.splitlines()
    more = [f"… and {len(lines) - 8} more lines"] if len(lines) > 8 else []
    return ["it printed, in the first case:", *(f"    {line[:160]}" for line in lines[:8]), *more] if lines else []

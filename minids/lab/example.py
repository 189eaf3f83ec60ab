"""What a check says of an answer that is nobody's: shown in lesson 00 before the first exercise."""

from minids.lab import exercises
from minids.lab.judge import judge
from minids.lab.show import show


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

"""Right answers in other styles than the solution's: whoever writes one of them must not be refused."""

import pytest

from minids.lab import exercises
from minids.lab.judge import PASS, judge


def passes(name, answer):
    """Assert that `answer` passes the exercise `name` ("01.1", or "rms_norm"); gives the Outcome."""
    outcome = judge(exercises.find(name), answer)
    assert outcome.verdict == PASS, (outcome.line, *outcome.details, outcome.diagnosis)
    return outcome


class Answers(list):
    """Answers of a test file: @right("01.1") adds the function below it, `right.each` parametrises a test by all."""

    def __call__(self, name):
        def keep(fn):
            self.append(pytest.param(name, fn, id=f"{name}_{fn.__name__}"))
            return fn

        return keep

    @property
    def each(self):
        """The decorator of a test(name, answer)."""
        return pytest.mark.parametrize("name, answer", self)

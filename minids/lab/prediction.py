"""A guess before a measurement: written down, kept, and compared when the number is there."""

import math

from minids.lab import progress
from minids.lab.compare import describe
from minids.lab.show import show


class Prediction:
    """What a learner guessed before a measurement; `compare` says how far off it was."""

    def __init__(self, question, guess, unit=""):
        self.question, self.guess, self.unit = question, guess, unit

    def compare(self, value, how="measured"):
        """Show `value` beside the guess; `how` are the words before it, such as "computed"."""
        came = f"{how} {with_unit(value, self.unit)}"
        if self.guess is None:
            return show(f"{came}; you made no prediction: write a number above, and run again")
        return show(f"you said {with_unit(self.guess, self.unit)}, {came}: {distance(self.guess, value)}")


def with_unit(value, unit):
    return f"{number(value)} {unit}" if unit else number(value)


def number(value):
    return f"{value:,.0f}" if 1000 <= abs(value) < 1e15 else f"{value:.4g}"


def distance(guess, measured):
    """In words, how far a guess is from what was measured: the difference, or the factor from 2 on."""
    way = "too high" if guess > measured else "too low"
    if guess * measured > 0 and max(guess / measured, measured / guess) >= 2:
        factor = max(guess / measured, measured / guess)
        return f"{rounded(factor, 2)} times too {'high' if abs(guess) > abs(measured) else 'low'}"
    close = ", well judged" if abs(guess - measured) <= 0.05 * abs(measured) else ""
    return f"{rounded(abs(guess - measured), 3)} {way}{close}"


def rounded(value, digits):
    """`value` to so many digits, without an exponent where it is large."""
    return number(float(f"{value:.{digits}g}"))


def predict(question, guess, unit=""):
    """Write down a `guess` (a number, or None for none) of `question`; gives a Prediction to compare later."""
    if guess is not None and not is_number(guess):
        show(f"predict takes a number, or None; {describe(guess)} was given")
        guess = None
    if guess is not None:
        progress.update(lambda p: p.predictions.update({question: guess}))
    words = "no guess yet (that is allowed)" if guess is None else f"your guess: {with_unit(guess, unit)}"
    show(f"{question} {words}")
    return Prediction(question, guess, unit)


def is_number(guess):
    """Whether a guess is a finite number that can be compared; True and False are none."""
    if isinstance(guess, bool) or not isinstance(guess, int | float):
        return False
    try:
        return math.isfinite(guess)
    except OverflowError:  # an int beyond every float
        return False

"""A guess before a measurement: written down, kept, and compared when the number is there."""

import math

from minids.lab import progress
from minids.lab.show import show


class Prediction:
    """What a learner guessed before a measurement; `compare` says how far off it was."""

    def __init__(self, question, guess, unit=""):
        self.question, self.guess, self.unit = question, guess, unit

    def compare(self, measured):
        """Show `measured` beside the guess."""
        unit = f" {self.unit}" if self.unit else ""
        if self.guess is None:
            return show(
                f"measured {number(measured)}{unit}; you made no prediction: write a number above, and run again"
            )
        return show(
            f"you said {number(self.guess)}{unit}, measured {number(measured)}{unit}: {distance(self.guess, measured)}"
        )


def number(value):
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"


def distance(guess, measured):
    """In words, how far a guess is from what was measured: the difference, or the factor from 2 on."""
    way = "too high" if guess > measured else "too low"
    if guess * measured > 0 and max(guess / measured, measured / guess) >= 2:
        factor = max(guess / measured, measured / guess)
        return f"{factor:.2g} times too {'high' if abs(guess) > abs(measured) else 'low'}"
    close = ", well judged" if abs(guess - measured) <= 0.05 * abs(measured) else ""
    return f"{abs(guess - measured):.3g} {way}{close}"


def predict(question, guess, unit=""):
    """Write down a `guess` (a number, or None for none) of `question`; gives a Prediction to compare later."""
    if guess is not None and not (isinstance(guess, int | float) and math.isfinite(guess)):
        show(f"predict takes a number, or None; {guess!r} was given")
        guess = None
    if guess is not None:
        progress.update(lambda p: p.predictions.update({question: guess}))
    words = "no guess yet (that is allowed)" if guess is None else f"your guess: {guess:g}{' ' + unit if unit else ''}"
    show(f"{question} {words}")
    return Prediction(question, guess, unit)

"""What lesson 00 introduces: a prediction and how far off it was, and the example of a check."""

import math

import pytest

from minids.lab import example, predict, progress


def test_a_guess_is_kept_and_compared(said):
    guess = predict("How many?", 50, "times")
    assert said() == ["How many? your guess: 50 times"] and progress.load().predictions == {"How many?": 50}
    for value, words in (
        (287.9, "measured 287.9 times: 5.8 times too low"),
        (51, "measured 51 times: 1 too low, well judged"),
        (40, "measured 40 times: 10 too high"),
        (123456, "measured 123,456 times: 2,500 times too low"),
    ):
        guess.compare(value)
        assert said() == [f"you said 50 times, {words}"]
    guess.compare(45, how="here it comes to")
    assert said() == ["you said 50 times, here it comes to 45 times: 5 too high"]


def test_no_guess_is_no_fault(said, home):
    guess = predict("How many?", None)
    guess.compare(3, how="it is")
    assert said() == [
        "How many? no guess yet (that is allowed)",
        "it is 3; you made no prediction: write a number above, and run again",
    ]
    assert not home.exists()


@pytest.mark.parametrize("guess", [True, "many", math.nan, math.inf, 10**400, 10**5000, [3]], ids=range(7))
def test_what_is_no_number_is_refused(said, home, guess):
    assert predict("How many?", guess).guess is None
    assert said()[0].startswith("predict takes a number, or None; ") and not home.exists()


@pytest.mark.parametrize("guess, words", [(-3, "-3"), (0, "0"), (2_000_000, "2,000,000"), (10**300, "1e+300")])
def test_guesses_of_any_size_are_written_plainly(said, guess, words):
    predict("How many?", guess)
    assert said() == [f"How many? your guess: {words}"]


def test_an_example_shows_a_verdict_that_counts_for_nobody(said, home):
    example(lambda flops, nbytes: nbytes / flops, "00.1")
    first, *_, last = said()
    assert first.startswith("example → 00.1 arithmetic_intensity: FAIL at ") and last.startswith("  → Upside down")
    example(lambda flops, nbytes: flops / nbytes, "arithmetic_intensity")
    assert said() == ["example → 00.1 arithmetic_intensity: PASS"] and not home.exists()
    with pytest.raises(ValueError, match=r"no exercise '99\.1'"):
        example(print, "99.1")

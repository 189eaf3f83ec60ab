"""Exceptions and lost NaN: patterns as those of diagnose.py, (exercise, seen) to a sentence or None."""

import torch

from minids.lab.exercise import leaves
from minids.lab.observe import expected, is_right, observe_known
from minids.lab.partly import value_is_right


def asks_a_tensor(exercise, seen):
    if says(seen, "Boolean value of Tensor", "truth value of an array"):
        return (
            "`if`, `while`, `and`, `or` and `not` ask for one True or False, and a tensor has many: use torch.where, "
            "&, | and ~, with each comparison in parentheses."
        )
    return None


def changed_before_backward(exercise, seen):
    if says(seen, "modified by an inplace operation"):
        return (
            "Something is changed in place (+=, x[...] =, names ending in _) that the gradient needs as it was: write "
            "x = x + y, or change a clone()."
        )
    return None


def nan_lost(exercise, seen):
    """NaN is wanted where numbers came, and nothing else is wrong."""
    if all(o.call.error is None and right_but_for_nan(o) for o in seen if o.failed):
        return "Where NaN is wanted you give a number: NaN must stay, or nobody sees that something broke."
    return None


def as_a_known_one(exercise, seen):
    """The first case raises what a known wrong answer raises there, word by word; later ones differ."""
    error, words = seen[0].call.error, str(seen[0].call.error)
    if exercise.kernel is not None or not isinstance(error, RuntimeError | IndexError):
        return None
    for wrong in exercise.wrongs:
        theirs = observe_known(exercise, wrong, seen[0].case).call.error
        if type(theirs) is type(error) and str(theirs) == words:
            return f"Perhaps this: {wrong.why}"
    return None


PATTERNS = [asks_a_tensor, changed_before_backward, nan_lost]


def says(seen, *texts):
    """Whether an exception says one of `texts`."""
    errors = [str(o.call.error) for o in seen if isinstance(o.call.error, Exception)]
    return any(text in error for text in texts for error in errors)


def right_but_for_nan(observation):
    """Whether a result is wrong, and right once it is NaN where that is wanted."""
    want = expected(observation.exercise, observation.case)[0]
    if value_is_right(observation):
        return False
    wanted, got = tensors(want), tensors(observation.call.value)
    if not any(w.is_floating_point() and w.isnan().any() for w in wanted):
        return False
    if [w.shape for w in wanted] != [g.shape for g in got] or not all(
        map(torch.Tensor.is_floating_point, [*wanted, *got])
    ):
        return False
    mended = [torch.where(w.isnan(), torch.nan, g.float()).to(g.dtype) for g, w in zip(got, wanted, strict=True)]
    mended = mended[0] if isinstance(want, torch.Tensor) else mended
    return is_right(observation, mended)


def tensors(value):
    return [leaf for leaf in leaves(value) if isinstance(leaf, torch.Tensor)]

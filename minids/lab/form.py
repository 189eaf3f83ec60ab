"""Answers whose numbers are right and whose form is not: parts in another order, axes exchanged, a shape of their own.

Patterns as those of diagnose.py: each takes (exercise, seen) and gives a sentence, or None.
"""

from itertools import permutations

import torch

from minids.lab.observe import expected, is_right

MOST = 5  # parts or axes, of which all orders are tried


def other_order(exercise, seen):
    value = seen[0].call.value
    count = len(value) if isinstance(value, tuple | list) else 0
    for order in orders(count):
        if becomes_right(seen, lambda got, want, order=order: [got[i] for i in order]):
            return "The parts of the result are right, but in another order: give them as the stub's docstring does."
    return None


def other_axes(exercise, seen):
    value = seen[0].call.value
    parts = value if isinstance(value, tuple | list) else [value]
    for order in orders(max((part.dim() for part in parts if isinstance(part, torch.Tensor)), default=0)):
        if becomes_right(seen, lambda got, want, order=order: each_part(got, want, lambda g, w: turned(g, order))):
            axes = ", ".join(map(str, order))
            return f"The numbers are right, their axes stand in another order: .permute({axes}) would mend that."
    return None


def other_shape(exercise, seen):
    if becomes_right(seen, lambda got, want: each_part(got, want, lambda g, w: g.reshape(w.shape))):
        return (
            "The numbers are right and in the right order, their shape is not: is an axis of length 1 left over or "
            "missing, or are two axes laid together that must stay apart?"
        )
    return None


def orders(count):
    """All orders of `count` things but the given one; none where they are too many."""
    return list(permutations(range(count)))[1:] if 1 < count <= MOST else []


def becomes_right(seen, change):
    """Whether change(result, what was expected) is right in every case."""
    return all(right_after(observation, change) for observation in seen)


def right_after(observation, change):
    want = expected(observation.exercise, observation.case)[0]
    try:
        got = change(observation.call.value, want)
    except Exception:  # the result has no such parts, axes or numbers
        return False
    return is_right(observation, got)


def each_part(got, want, change):
    """change(part, wanted part) of all parts of tuples and lists; of a result in one piece itself."""
    if not isinstance(want, tuple | list):
        return change(got, want)
    return [change(g, w) for g, w in zip(got, want, strict=True)]


def turned(part, order):
    """A part that has as many axes as `order`, with its axes in it; another as it is."""
    return part.permute(order) if part.dim() == len(order) else part


PATTERNS = [other_order, other_axes, other_shape]

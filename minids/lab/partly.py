"""Answers that are right in part: rounded, nearly right, or in some parts of a tuple.

Patterns as those of diagnose.py: each takes (exercise, seen) and gives a sentence, or None.
"""

import math
from functools import partial

import torch

from minids.lab import compare
from minids.lab.exercise import leaves
from minids.lab.observe import expected, is_right, options

ROUNDINGS = {
    "down to a whole number": math.floor,
    "up to a whole number": math.ceil,
    "to a whole number": round,
    **{f"to {n} decimal{'s' if n > 1 else ''}": partial(round, ndigits=n) for n in range(1, 6)},
}
NEARLY = 1e-2  # of a result's scale; bfloat16 has some 4e-3


def the_same_number(exercise, seen):
    pairs = numbers(seen)
    if len({tuple(got.tolist()) for got, _ in pairs}) == 1 < len({tuple(want.tolist()) for _, want in pairs}):
        return "It gives the same for every input: does it use its arguments?"
    return None


def rounded(exercise, seen):
    pairs = [(g, w) for got, want in numbers(seen) for g, w in zip(got.tolist(), want.tolist(), strict=True)]
    if not all(math.isfinite(w) for _, w in pairs):
        return None
    for how, change in ROUNDINGS.items():
        if any(g != w for g, w in pairs) and all(math.isclose(g, change(w)) for g, w in pairs):
            return f"It is right, but rounded {how}: give the number as it is (/ and not //, no round, no int)."
    return None


def one_part(exercise, seen):
    """Some parts of a tuple are right in every case, the others wrong, perhaps by a factor of their own."""
    want = expected(exercise, seen[0].case)[0]
    wrong = wrong_parts(seen) if isinstance(want, tuple | list) else []
    if not 0 < len(wrong) < len(want):
        return None
    names = [f"result[{name}]" for name in getattr(want, "_fields", range(len(want)))]
    if all(part.all() for _, part in numbers(seen)) and numbers(seen):
        ratios = torch.stack([got / part for got, part in numbers(seen)])
        low, high = ratios.min(0).values, ratios.max(0).values
        if all(high[i] - low[i] <= 1e-5 * abs(high[i]) for i in wrong):
            words = " and ".join(f"{names[i]} is always {low[i].item():.4g} times what it should be" for i in wrong)
            return f"The {words}, the rest is right: a constant factor is missing there, or one too many."
    verb = "is" if len(wrong) == 1 else "are"
    return f"Only {' and '.join(names[i] for i in wrong)} {verb} wrong, the rest is right in every case."


def wrong_parts(seen):
    """The places of a tuple's parts that are wrong in some case; [] where a result is no such tuple."""
    wrong = set()
    for observation in seen:
        got, want = observation.call.value, expected(observation.exercise, observation.case)[0]
        if not isinstance(got, tuple | list) or len(got) != len(want):
            return []
        wrong |= {i for i in range(len(want)) if compare.difference(got[i], want[i], **options(observation))}
    return sorted(wrong)


def nearly(exercise, seen):
    pairs = flat_pairs(seen)
    errors = [(got - want).abs().max() / want.abs().max() for got, want in pairs if want.any()]
    if errors and 1e-6 < max(errors) < NEARLY and not any(map(value_is_right, (o for o in seen if o.failed))):
        near, whole = "It is right to about a hundredth, and no nearer", not any(map(has_fraction, seen))
        if whole:
            return f"{near}: is a small term left out, or counted twice?"
        return f"{near}: is a number rounded, a constant written with few digits, or a step done in bfloat16?"
    return None


def has_fraction(observation):
    return any(
        isinstance(leaf, float | torch.Tensor) for leaf in leaves(expected(observation.exercise, observation.case)[0])
    )


# What patterns look at ------------------------------------------------------------------------------------------------


def value_is_right(observation):
    return is_right(observation, observation.call.value)


def numbers(seen):
    """flat_pairs where every result is made of single numbers; else []."""
    wants = [leaf for o in seen for leaf in leaves(expected(o.exercise, o.case)[0])]
    return flat_pairs(seen) if all(isinstance(leaf, int | float) for leaf in wants) else []


def flat_pairs(seen):
    """[(got, want)] of each case as float64 vectors; [] where something raised or has another form."""
    pairs = []
    for observation in seen:
        want = tensors(expected(observation.exercise, observation.case)[0])
        got = tensors(observation.call.value) if observation.call.error is None else []
        same = len(got) == len(want) and all(g.shape == w.shape for g, w in zip(got, want, strict=True))
        if not want or not same or any(g.is_complex() for g in got):
            return []
        pairs.append((flat(got), flat(want)))
    return pairs


def flat(values):
    return torch.cat([v.detach().double().flatten() for v in values])


def tensors(value):
    """All tensors and numbers in a result, as tensors, in order."""
    return [v if isinstance(v, torch.Tensor) else torch.tensor(float(v), dtype=torch.float64) for v in leaves(value)]

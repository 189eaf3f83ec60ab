"""The likeliest mistake behind an answer that failed: a known wrong answer that does the same, or a pattern."""

import math

import torch

from minids.lab import compare, form, launching, mishaps, partly
from minids.lab.exercise import leaves
from minids.lab.observe import expected, observe_known, same_values
from minids.lab.partly import flat_pairs, tensors, value_is_right

NAN = (
    "The result holds NaN: part of it was never written (memory from torch.empty starts as NaN here), "
    "or a division 0/0, a log or a root of a negative number, or a softmax over a row that is masked altogether."
)


def diagnosis(exercise, seen):
    """The sentence that helps, "" where nothing fits; `seen` holds the Observation of every case."""
    try:
        for wrong in exercise.wrongs:
            if does_the_same(exercise, seen, wrong):
                return wrong.why
        patterns = PATTERNS if exercise.kernel is None else [*launching.PATTERNS, *PATTERNS]
        return next(filter(None, (pattern(exercise, seen) for pattern in patterns)), "")
    except Exception:  # a result that cannot be looked at; what it is stands in the details
        return ""


def does_the_same(exercise, seen, wrong):
    """Whether a known wrong answer gives what was seen, case by case; if no value is wrong, errors word by word."""
    wrong_values, same_words = 0, True
    for observation in seen:
        theirs = observe_known(exercise, wrong, observation.case)
        if (theirs.call.error is None) != (observation.call.error is None) or theirs.failed != observation.failed:
            return False
        if theirs.call.error is not None:
            if type(theirs.call.error) is not type(observation.call.error):
                return False
            same_words = same_words and str(theirs.call.error) == str(observation.call.error)
        elif not alike(exercise, observation, theirs):
            return False
        else:
            wrong_values += observation.failed
    return wrong_values > 0 or same_words


def alike(exercise, ours, theirs):
    dtype = ours.case.dtype
    if not launching.alike(ours, theirs):
        return False
    numbers = not any(isinstance(leaf, torch.Tensor) for leaf in leaves(expected(exercise, ours.case)[0]))
    if theirs.changed != ours.changed or shapes(ours.call.value, numbers) != shapes(theirs.call.value, numbers):
        return False
    if not close(ours.call.value, theirs.call.value, dtype, exercise.tolerance):
        return False
    if isinstance(ours.gradients, dict) and isinstance(theirs.gradients, dict):
        return close(ours.gradients, theirs.gradients, dtype, exercise.tolerance)
    return type(ours.gradients) is type(theirs.gradients)


def close(a, b, dtype, tolerance):
    return compare.difference(a, b, dtype, 10 * tolerance) is None


def shapes(value, numbers):
    """The shapes of a result's parts; where `numbers` are wanted, one counts as a tensor without axes."""
    alone = [] if numbers else None
    return [list(leaf.shape) if isinstance(leaf, torch.Tensor) else alone for leaf in leaves(value)]


# Patterns: each takes (exercise, seen) and gives a sentence, or None ---------------------------------------------


def changes_its_input(exercise, seen):
    changed = next((o.changed for o in seen if o.changed), None)
    if changed:
        return (
            f"It changes its argument {changed[0]} in place: work on a copy, without +=, x[...] = or names ending in _."
        )
    return None


def gives_nothing(exercise, seen):
    if all(o.call.error is None and o.call.value is None for o in seen):
        return "It returns None: is there a `return` at the end?"
    return None


def only_gradients(exercise, seen):
    if exercise.gradients and all(o.call.error is None and value_is_right(o) for o in seen):
        return (
            "The values are right, the gradients are not: is something detached, taken by .item() or .data, "
            "or computed under torch.no_grad()?"
        )
    return None


def zeros(exercise, seen):
    pairs = flat_pairs(seen)
    if pairs and all(not g.any() for g, _ in pairs) and any(w.any() for _, w in pairs):
        return "It returns zeros: is the result ever written?"
    return None


def the_input(exercise, seen):
    for position, name in enumerate(exercise.parameters[: len(seen[0].case.args)]):
        values = [(o.call.value, o.case.args[position]) for o in seen]
        if all(is_same_value(v, a) for v, a in values):
            return f"It returns its argument {name} as it is: nothing is computed yet."
    return None


def a_factor(exercise, seen):
    """One factor between what came and what was expected, the same everywhere or one for each case."""
    pairs, factors = flat_pairs(seen), []
    for (got, want), observation in zip(pairs, seen, strict=bool(pairs)):
        numbers = got.isfinite() | (got.nan_to_num(0.5) != want.nan_to_num(0.5))  # NaN or infinity where it must be
        got, want = got[numbers], want[numbers]  # tells nothing
        if got.any() or want.any():  # where both are zero any factor does
            allowed = 10 * exercise.tolerance * compare.TOLERANCE[observation.case.dtype]
            factors.append(factor_between(got, want, allowed))
    if not factors or None in factors:
        return None
    low, high = min(factors), max(factors)
    if max(abs(low - 1), abs(high - 1)) < 5e-3 or high > 1e6 * abs(low):
        return None  # the numbers are right, or nearly so, or a number is added: something else is wrong
    if high - low <= 1e-3 * abs(high):
        return f"Everything is {factors[0]:.4g} times what it should be: a constant factor is missing, or one too many."
    if all(want.numel() == 1 for _, want in pairs):
        return None  # single numbers: any two have a ratio
    return f"All of a result is off by one factor, from {low:.4g} to {high:.4g} with the sizes: a scale is wrong."


def factor_between(got, want, allowed):
    """The one number by which all of `want` was multiplied, None where there is none."""
    factor = ((got * want).sum() / (want * want).sum()).item()
    if not factor or not math.isfinite(factor):
        return None
    return factor if (got - factor * want).abs().max() <= allowed * abs(factor) * want.abs().max() else None


def only_aligned(exercise, seen):
    if not splits(seen, lambda o: o.case.aligned):
        return None
    only = "It is right only for sizes that are multiples of 8"
    if any(isinstance(leaf, torch.Tensor) for leaf in leaves(seen[0].case.args)):
        return f"{only}: what happens to the last, smaller piece?"
    return f"{only}: is something cut down by // or int(), or used that only there has the value of another?"


def only_batch_one(exercise, seen):
    if not splits(seen, lambda o: o.case.batch == 1):
        return None
    only = "It is right for batch 1 only"
    if all(o.call.error is not None for o in seen if o.failed):
        return f"{only}: shapes that do not fit may fit there, where a dimension of 1 is repeated or dropped."
    return f"{only}: does it use the first sequence for all of them?"


def only_contiguous(exercise, seen):
    if splits(seen, lambda o: not o.case.strided):
        return "It is right for contiguous inputs only: does it rely on the order of the numbers in memory?"
    return None


def nan(exercise, seen):
    """NaN in the first case that failed; where it comes later alone, it is not what is wrong there."""
    first = next(o for o in seen if o.failed)
    got, want = tensors(first.call.value), tensors(expected(exercise, first.case)[0])
    alike = len(got) == len(want) and all(g.shape == w.shape for g, w in zip(got, want, strict=True))
    if not alike and any(w.isnan().any() for w in want):
        return None  # it is meant somewhere
    got = [g[~w.isnan()] for g, w in zip(got, want, strict=True)] if alike else got
    if any(g.isnan().any() for g in got):  # where the reference has NaN too, it is meant
        return launching.NAN if exercise.kernel is not None else NAN
    return None


PATTERNS = [
    *mishaps.PATTERNS,
    changes_its_input,
    gives_nothing,
    only_gradients,
    zeros,
    the_input,
    *form.PATTERNS,
    partly.the_same_number,
    partly.rounded,
    a_factor,
    only_batch_one,
    only_aligned,
    only_contiguous,
    nan,
    partly.nearly,
    partly.one_part,
    mishaps.as_a_known_one,
]


def splits(seen, right):
    """Whether exactly the cases for which right(observation) holds did not fail, and there are both kinds."""
    return len({o.failed for o in seen}) == 2 and all(o.failed != right(o) for o in seen)


def is_same_value(value, argument):
    if type(value) is not type(argument):
        return False
    return same_values(value, argument) if leaves(argument) else value == argument

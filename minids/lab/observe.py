"""What an answer does with one case, and whether that is what the reference does."""

from dataclasses import dataclass

import torch

from minids import triton_env
from minids.lab import compare, launching, sandbox
from minids.lab.exercise import Case, Random, copy_of, is_float, leaves, wide

NO_GRADIENT = "the result has no gradient"


@dataclass
class Observation:
    """What an answer did with one case: its call, what it changed of its arguments, its gradients (None: not asked).

    trouble: the Difference from the reference, None where there is none; calls that raised have none either.
    counted: the Meter of a kernel's launch.
    """

    exercise: object
    case: Case
    call: sandbox.Call
    changed: list
    gradients: object = None
    trouble: object = None
    counted: object = None

    @property
    def failed(self):
        return self.call.error is not None or self.trouble is not None


def observe(exercise, fn, case):
    """Run `fn` on a case, and once more for its gradients where they count and the first run went well."""
    args = copy_of(case.args)
    if exercise.kernel is None:
        seen = Observation(exercise, case, sandbox.call(fn, args, exercise.limit), [])
    else:
        call, counted = launching.run(exercise, fn, args)
        seen = Observation(exercise, case, call, [], counted=counted)
    names = exercise.parameters
    seen.changed = [n for n, a, b in zip(names, args, case.args, strict=False) if not same_values(a, b)]
    if seen.call.error is None:
        seen.trouble = trouble(seen)  # now: the next call may write into the same memory
    if exercise.gradients and not seen.failed:
        args = leaf_arguments(copy_of(case.args))
        second = sandbox.call(lambda: gradients(fn(*args), args, names), (), exercise.limit)
        if second.error is not None:
            seen.call = second
        else:
            seen.gradients = second.value
            seen.trouble = trouble_of_gradients(seen)
    return seen


def observe_known(exercise, wrong, case):
    """The Observation of a known wrong answer, made once, for a learner checks again and again.

    That of a kernel on a GPU is made each time: what it reads beyond a tensor is what lies there just then.
    """
    if exercise.kernel is not None and triton_env.mode() == "gpu":
        return observe(exercise, wrong.fn, case)
    key = id(wrong), case.label
    if key not in exercise.observed:
        exercise.observed[key] = observe(exercise, wrong.fn, case)
    return exercise.observed[key]


def trouble(seen):
    """The Difference between an Observation and the reference, in its value, its arguments or a kernel's accesses."""
    if found := launching.out_of_bounds(seen.counted):
        return found
    found = compare.difference(seen.call.value, expected(seen.exercise, seen.case)[0], **options(seen))
    if found is None and seen.changed:
        return compare.Difference(f"its argument {seen.changed[0]} is not what it was before the call")
    return found or launching.wasteful(seen.exercise, seen.case, seen.counted)


def trouble_of_gradients(seen):
    if isinstance(seen.gradients, str):
        return compare.Difference(seen.gradients)
    wanted = expected(seen.exercise, seen.case)[1]
    return compare.difference(seen.gradients, wanted, **options(seen), where="the gradient")


def is_right(seen, value):
    """Whether `value` is what the reference gives for an Observation's case."""
    return compare.difference(value, expected(seen.exercise, seen.case)[0], **options(seen)) is None


def options(seen):
    """What compare.difference needs to know of a case."""
    return {"dtype": seen.case.dtype, "tolerance": seen.exercise.tolerance}


def same_values(a, b):
    """Whether an argument is after the call what it was before; what is neither tensor nor number is not looked at."""
    ours, theirs = leaves(a), leaves(b)
    return len(ours) == len(theirs) and all(map(same_leaf, ours, theirs))


def same_leaf(a, b):
    if not isinstance(a, torch.Tensor) or not isinstance(b, torch.Tensor):
        return type(a) is type(b) and a == b
    if a.shape != b.shape or a.dtype != b.dtype or a.device != b.device or a.layout != b.layout:
        return False
    if is_float(a):
        return bool(((a == b) | (a.isnan() & b.isnan())).all())
    codes = a.is_floating_point()  # FP8: bytes are compared, for NaN is not equal to itself
    return torch.equal(a.view(torch.uint8), b.view(torch.uint8)) if codes else torch.equal(a, b)


def leaf_arguments(args):
    """The arguments with gradients asked of each floating tensor."""
    return [a.detach().requires_grad_() if is_float(a) else a for a in args]


def gradients(value, args, names):
    """{name: gradient} of all floating arguments, for a fixed gradient of the result; a sentence if it has none."""
    random, parts = Random(0), []
    for output in filter(is_float, leaves(value)):
        weights = random.normal(*output.shape).to(output)
        parts += [(output * weights).sum()] if output.requires_grad else []
    if not parts:
        return NO_GRADIENT
    wanted = {n: a for n, a in zip(names, args, strict=False) if is_float(a)}
    found = torch.autograd.grad(sum(parts), list(wanted.values()), allow_unused=True)
    return {n: torch.zeros_like(a) if g is None else g for (n, a), g in zip(wanted.items(), found, strict=True)}


def expected(exercise, case):
    """(value, gradients or None) of the reference in float64."""
    if not hasattr(case, "expected"):
        value, grads = exercise.reference(*wide(case.args)), None
        if exercise.gradients:
            args = leaf_arguments(wide(case.args))
            grads = gradients(exercise.reference(*args), args, exercise.parameters)
        case.expected = value, grads
    return case.expected

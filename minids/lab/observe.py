"""What an answer does with one case, and whether that is what the reference does."""

from dataclasses import dataclass
from functools import cached_property

import torch

from minids.lab import compare, sandbox
from minids.lab.exercise import Case, Random, copy_of, is_float, wide


@dataclass
class Observation:
    """What an answer did with one case: its call, what it changed of its arguments, its gradients (None: not asked)."""

    exercise: object
    case: Case
    call: sandbox.Call
    changed: list
    gradients: object = None

    @cached_property
    def trouble(self):
        """The Difference from the reference, None where there is none; calls that raised have none either."""
        if self.call.error is not None:
            return None
        want, gradients = expected(self.exercise, self.case)
        options = {"dtype": self.case.dtype, "tolerance": self.exercise.tolerance}
        found = compare.difference(self.call.value, want, **options)
        if found is None and self.changed:
            return compare.Difference(f"its argument {self.changed[0]} is not what it was before the call")
        if found is None and gradients is not None:
            if isinstance(self.gradients, str):
                return compare.Difference(self.gradients)
            return compare.difference(self.gradients, gradients, **options, where="the gradient")
        return found

    @property
    def failed(self):
        return self.call.error is not None or self.trouble is not None


def observe(exercise, fn, case):
    """Run `fn` on a case, and once more for its gradients where they count and the first run went well."""
    args = [copy_of(a) for a in case.args]
    call = sandbox.call(fn, args, exercise.limit)
    names = exercise.parameters
    changed = [n for n, a, b in zip(names, args, case.args, strict=False) if not same(a, b)]
    seen = Observation(exercise, case, call, changed)
    if exercise.gradients and call.error is None and not changed:
        args = [copy_of(a).detach().requires_grad_() if is_float(a) else copy_of(a) for a in case.args]
        second = sandbox.call(fn, args, exercise.limit)
        if second.error is not None:
            seen.call = second
        else:
            seen.gradients = gradients(second.value, args, names)
    return seen


def same(a, b):
    if isinstance(a, torch.Tensor):
        return a.shape == b.shape and torch.equal(
            a.nan_to_num() if is_float(a) else a, b.nan_to_num() if is_float(b) else b
        )
    return True


def gradients(value, args, names):
    """{name: gradient} of all floating arguments, for a fixed gradient of the result; a sentence if it has none."""
    outputs = [v for v in (value if isinstance(value, tuple | list) else [value]) if is_float(v)]
    if not all(v.requires_grad for v in outputs) or not outputs:
        return "the result has no gradient"
    random = Random(0)
    total = sum((v * random.normal(*v.shape).to(v.dtype)).sum() for v in outputs)
    wanted = {n: a for n, a in zip(names, args, strict=False) if is_float(a)}
    found = torch.autograd.grad(total, list(wanted.values()), allow_unused=True)
    return {n: torch.zeros_like(a) if g is None else g for (n, a), g in zip(wanted.items(), found, strict=True)}


def expected(exercise, case):
    """(value, gradients or None) of the reference in float64."""
    if not hasattr(case, "expected"):
        args = [wide(a) for a in case.args]
        value, grads = exercise.reference(*args), None
        if exercise.gradients:
            args = [a.requires_grad_() if is_float(a) else a for a in args]
            grads = gradients(exercise.reference(*args), args, exercise.parameters)
        case.expected = value, grads
    return case.expected

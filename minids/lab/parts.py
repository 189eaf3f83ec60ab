"""A function of the model that may be the learner's: tried beside the reference, counted, and named where it fails.

What passed in an exercise is right for the exercise's inputs, in fp32. Before it is used in the model (assemble.py) it
is tried on what the model gives it, values and gradients. One that raises or differs there is named with the reason,
and the reference stands in. Equal scores may be chosen in another order, and roundings fall to either side: so a small
share of the numbers may differ.
"""

import time

import torch

from minids.lab.compare import describe
from minids.lab.exercise import cases, is_float, leaves
from minids.lab.observe import NO_GRADIENT, gradients, leaf_arguments, observe
from minids.lab.sandbox import learners_line, plain_state
from minids.lab.show import show

USED = {  # the exercises whose functions the model can be made of, by the place where they work
    "every layer": ("13.1", "01.1", "01.2"),
    "dense feed-forward": ("01.4",),
    "MHA and GQA": ("01.3", "02.1", "02.3"),
    "MLA": ("03.1", "03.2", "03.3", "03.4"),
    "decoding with MLA": ("04.1", "04.2", "04.3", "04.5"),
    "experts": ("07.2", "07.3", "07.4"),
    "balance": ("08.1", "08.2", "08.3", "08.4"),
    "FP8": ("10.4", "10.5", "11.3", "12.1", "12.2", "12.3", "12.4", "12.5"),
}
KERNELS = {  # exercises whose answers are kernels: for GPUs, where they would do a part's work
    "05.3": "rms_norm",
    "05.5": "the gradient of rms_norm",
    "06.4": "attend_absorbed, over a piece of a long cache",
    "09.3": "the products of moe_forward",
    "09.4": "the gradients of the experts' weights",
    "09.5": "the first half of moe_forward",
    "11.4": "matmul_blockscaled",
}
TIES, CLOSE = 0.02, 1e-3  # the share of numbers that may differ (equal scores, roundings), and what counts as equal


class Part:
    """One function of the model, called like that function: the learner's `own` if it works here, else `reference`.

    `calls` and `seconds` count what was done by whom; `trouble` says why the learner's is not used.
    """

    def __init__(self, exercise, own, reference):
        self.exercise, self.own, self.reference = exercise, own, reference
        self.calls, self.seconds = {"yours": 0, "reference": 0}, {"yours": 0.0, "reference": 0.0}
        self.trouble, self.tried = "", set()

    @property
    def owner(self):
        """Whose function is used: "yours" or "reference"."""
        return "yours" if self.own else "reference"

    def __call__(self, *args):
        mode = torch.is_grad_enabled()
        if self.own and mode not in self.tried:
            self.tried.add(mode)
            self.give_up(self.problem(args))
        if self.own:
            try:
                return self.timed(self.own, args)
            except (Exception, SystemExit) as error:
                self.give_up(words_of(error))
        return self.timed(self.reference, args)

    def timed(self, function, args):
        owner, began = self.owner, time.perf_counter()
        value = function(*args)
        self.calls[owner] += 1
        self.seconds[owner] += time.perf_counter() - began
        return value

    def problem(self, args):
        """Why the learner's function cannot be used for `args`, "" where it does the same as the reference."""
        if any(callable(argument) for argument in args):  # a trial would run parts of the model twice
            with plain_state():
                seen = observe(self.exercise, self.own, cases(self.exercise)[0])
            return str(seen.trouble or words_of(seen.call.error)) if seen.failed else ""
        try:
            got = results(self.own, self.exercise, args)
        except (Exception, SystemExit) as error:
            return words_of(error)
        return disagreement(got, results(self.exercise.reference, self.exercise, args))

    def give_up(self, problem):
        """Let the reference stand in from here on, and say so, if there is a problem."""
        if problem:
            self.trouble, self.own = problem, None
            show(f"{self.exercise.title}: yours passed, and does not work in this model; the reference stands in")
            show(f"    {problem}")


def words_of(error):
    """An exception in one line, with the learner's line where there is one."""
    line = learners_line(error)
    words = " ".join(f"{type(error).__name__}: {error}".split())[:300]
    return f"{words} (in {line})" if line else words


def results(function, exercise, args):
    """What `function` gives for copies of `args`: its results, then the gradients of its floating arguments."""
    if not torch.is_grad_enabled():
        return leaves(function(*args))
    args = leaf_arguments(args)
    value = function(*args)
    found = gradients(value, args, exercise.parameters) if any(map(is_float, args)) else NO_GRADIENT
    return leaves(value) + (leaves(found) if found != NO_GRADIENT else [])


def disagreement(got, want):
    """In words, how results differ from the reference's, but for ties and rounding; "" where they do not."""
    if len(got) != len(want):
        return f"with gradients it gives {len(got)} results, and {len(want)} are needed"
    for ours, theirs in zip(got, want, strict=True):
        ours, theirs = (value if isinstance(value, torch.Tensor) else torch.tensor(value) for value in (ours, theirs))
        if ours.shape != theirs.shape or ours.dtype != theirs.dtype:
            return f"it gives {describe(ours)} where {describe(theirs)} is needed"
        a, b = ours.double(), theirs.double()
        finite = b[b.isfinite()].abs()
        same = (a == b) | ((a - b).abs() <= CLOSE * (finite.max() if finite.numel() else 0))
        off = 1 - same.double().mean().item() if same.numel() else 0.0
        if off > TIES:
            return f"{off:.0%} of the numbers that it gives here are not the reference's"
    return ""

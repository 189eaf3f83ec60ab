"""What an exercise is: a reference that is the oracle, inputs to try, and the wrong answers that learners really write.

    RMS_NORM = Exercise("01.1", layers.rms_norm, minutes=6, sizes=[dict(B=1, T=8, D=16), ...], hints=[nudge, idea])

    @RMS_NORM.inputs
    def _(r, B, T, D):
        return r.normal(B, T, D), r.normal(D), 1e-5

    @RMS_NORM.wrong("You subtract the mean first: that is LayerNorm. RMSNorm divides by the root mean square alone.")
    def mean_centred(x, weight, eps): ...

    RMS_NORM.slip("no_eps", "eps is missing: a row of zeros gives NaN.", (" + eps", ""))

`inputs` draws the arguments of one case in float64; the checks cast them to each of `dtypes` and give the same numbers
to the learner's function in that dtype and to the reference in float64. FP8 tensors are codes, and stay as they were
drawn. Nothing is written twice: the reference is the function of minids that the exercise is about.
"""

import copy
import inspect
from dataclasses import dataclass, field

import torch

from minids.lab.slip import slip

REGISTRY = {}  # "01.1" -> Exercise, in the order of the lessons


@dataclass(frozen=True)
class Wrong:
    """A known wrong answer: `fn` computes it, `why` is the sentence that helps whoever wrote it."""

    name: str
    fn: object = field(repr=False)
    why: str


@dataclass(eq=False)
class Exercise:
    """One exercise: `reference` and the answer to check take what `inputs` draws for each of `sizes`.

    sizes: the cases, one dict each; a size named B is a batch. Sizes other than B that are all multiples of 8 make an
    aligned case. The first two are tried again with gaps between the numbers; let one of them be aligned. dtypes: in
    which the learner's function is tried. gradients: whether those of all floating arguments are compared too;
    constant: names of those that must get none.
    minutes: what it takes. limit: seconds that one call may take. tolerance: factor on the dtype's. hints: two texts,
    the nudge and the idea (the solution comes from solutions/). kernel, launch, traffic: of an exercise whose answer is
    a Triton kernel, see launching.py; its second cases have gaps between rows instead of numbers.
    """

    id: str
    reference: object
    minutes: float
    sizes: list
    hints: list
    dtypes: tuple = (torch.float32,)
    gradients: bool = False
    constant: tuple = ()
    limit: float = 10.0
    tolerance: float = 1.0
    name: str = ""
    kernel: object = None  # the reference kernel; `reference` is what it computes, in torch
    launch: object = None  # (kernel, *arguments of the reference) -> the result
    traffic: object = None  # (*arguments of the reference) -> the fewest bytes that a launch can move
    wrongs: list = field(default_factory=list)
    observed: dict = field(default_factory=dict, repr=False)  # what known wrong answers do, see observe.py
    draw: object = None

    def __post_init__(self):
        self.name = self.name or (self.reference if self.kernel is None else self.kernel).__name__
        if self.id in REGISTRY:
            raise ValueError(
                f"exercise {self.id} is there already ({REGISTRY[self.id].name}); give {self.name} another"
            )
        REGISTRY[self.id] = self

    @property
    def lesson(self):
        return self.id.split(".")[0]

    @property
    def title(self):
        return f"{self.id} {self.name}"

    @property
    def parameters(self):
        """The names of the reference's arguments, which are those of the stub too."""
        return list(inspect.signature(self.reference).parameters)

    def inputs(self, draw):
        """Decorate the function draw(r, **sizes) that gives the arguments of one case; r is a Random."""
        self.draw = draw
        return draw

    def wrong(self, why):
        """Decorate a known wrong answer; `why` is its diagnosis."""

        def keep(fn):
            self.wrongs.append(Wrong(fn.__name__, fn, why))
            return fn

        return keep

    def slip(self, name, why, *changes):
        """Add the known wrong answer that is the solution with `changes` in its lines, pairs (old, new) of slip.py."""
        self.wrong(why)(slip(self.reference if self.kernel is None else self.kernel, name, *changes))


class Random:
    """What `inputs` draws from: float64 tensors that depend on the seed alone."""

    def __init__(self, seed):
        self.generator = torch.Generator().manual_seed(seed)

    def normal(self, *shape):
        return torch.randn(shape, generator=self.generator, dtype=torch.float64)

    def uniform(self, low, high, *shape):
        return low + (high - low) * torch.rand(shape, generator=self.generator, dtype=torch.float64)

    def integers(self, low, high, *shape):
        """Whole numbers from low up to high - 1, int64."""
        return torch.randint(low, high, shape, generator=self.generator)

    def permutation(self, n):
        return torch.randperm(n, generator=self.generator)


@dataclass
class Case:
    """One call to compare: arguments as the learner gets them, and the sizes they were drawn for."""

    sizes: dict
    dtype: torch.dtype
    strided: bool
    args: tuple

    @property
    def label(self):
        sizes = ", ".join(f"{name}={value}" for name, value in self.sizes.items())
        kind = str(self.dtype).removeprefix("torch.") if any(map(is_float, leaves(self.args))) else ""
        return ", ".join(filter(None, (sizes, kind, "not contiguous" if self.strided else "")))

    @property
    def batch(self):
        return self.sizes.get("B", 1)

    @property
    def aligned(self):
        return all(size % 8 == 0 for name, size in self.sizes.items() if name != "B" and isinstance(size, int))


def is_float(value):
    """Whether a value is a floating tensor that is cast and spread; FP8 is not: a code has no wider neighbour."""
    return isinstance(value, torch.Tensor) and value.is_floating_point() and value.itemsize > 1


def cases(exercise):
    """All cases: every dict of sizes in every dtype; then the first two again, with inputs that are not contiguous."""
    made = []
    for strided in (False, True):
        for number, sizes in enumerate(exercise.sizes[:2] if strided else exercise.sizes):
            for dtype in exercise.dtypes:
                args = exercise.draw(Random(1000 + number + 100 * strided), **sizes)
                args = args if isinstance(args, tuple) else (args,)
                last = exercise.kernel is None  # the gaps of a kernel's cases are between rows
                args = each(args, lambda a, dtype=dtype, gap=strided, last=last: prepare(a, dtype, gap, last))
                if not strided or any(is_float(a) and not a.is_contiguous() for a in leaves(args)):
                    made.append(Case(sizes, dtype, strided, args))
    return made


def prepare(value, dtype, strided, last=True):
    """A tensor as the learner gets it; a strided one has gaps of NaN: after each element of its `last` dimension, or
    after each row of it.
    """
    if not is_float(value):
        return value
    value = value.to(dtype)
    if not strided or value.dim() == 0:
        return value
    if not last:
        return torch.cat((value, torch.full_like(value, float("nan"))), -1)[..., : value.shape[-1]]
    room = torch.full((*value.shape, 2), float("nan"), dtype=dtype)
    room[..., 0] = value
    return room[..., 0]


def wide(value):
    """The same argument for the reference: float64, contiguous, a copy."""
    return each(value, lambda a: a.double().contiguous() if is_float(a) else a.clone())


def copy_of(value):
    """A copy that keeps tensors' strides, so that a call cannot change the case's own arguments."""
    return each(value, copy_of_tensor)


def copy_of_tensor(value):
    if value.is_contiguous():
        return value.clone()
    base = value._base if value._base is not None else value
    return base.clone().as_strided(value.shape, value.stride(), value.storage_offset())


# Tensors and numbers, alone or in lists, tuples and dicts -------------------------------------------------------------


def each(value, change):
    """`value` with change(tensor) in the place of every tensor; anything else is copied."""
    if isinstance(value, torch.Tensor):
        return change(value)
    if isinstance(value, dict):
        return {key: each(part, change) for key, part in value.items()}
    if isinstance(value, tuple | list):
        parts = [each(part, change) for part in value]
        return type(value)(*parts) if hasattr(value, "_fields") else type(value)(parts)
    return copy.deepcopy(value)


def leaves(value):
    """All tensors and numbers in a value, in order."""
    if isinstance(value, torch.Tensor | int | float) and not isinstance(value, bool):
        return [value]
    parts = value.values() if isinstance(value, dict) else value if isinstance(value, tuple | list) else []
    return [leaf for part in parts for leaf in leaves(part)]

"""How an answer that is a Triton kernel is tried: launched, every access watched, every byte counted.

    SCALE = Exercise("05.1", scale, kernel=scale_kernel, launch=launch_scale, traffic=lambda x, factor: 2 * x.nbytes, …)

`launch(kernel, *arguments)` allocates the result, launches and returns it; `reference(*arguments)` is the same in
torch, and `traffic(*arguments)` the fewest bytes that a launch can move. In Triton's interpreter an access out of
bounds fails, and so does a right result that took more than SLACK times the fewest bytes. What is undefined on a GPU is
NaN here: memory that was never written, and lanes that a load masks off without `other`. Where kernels are compiled for
a GPU, values alone are compared, and that is said.
"""

import ast
import inspect
import textwrap
from collections import Counter
from contextlib import contextmanager
from functools import partial

import numpy as np

from minids import triton_env
from minids.lab import compare, compilable, meter_hooks, sandbox
from minids.lab.exercise import each, leaves
from minids.lab.traffic import meter

SLACK = 1.05
ON_GPU = (
    "on this GPU the values alone were checked; accesses and bytes are counted in Triton's interpreter "
    "(start Jupyter with TRITON_INTERPRET=1)"
)
NAN = (
    "The result holds NaN: part of it was never written (memory from torch.empty is NaN here), a masked load "
    "without `other` got into a sum or a maximum (such lanes are NaN here), or something is 0/0."
)
NO_TO = ("'int' object has no attribute 'to'", "'float' object has no attribute 'to'")


class Wasteful(compare.Difference):
    """A right result that took more bytes than it needs."""


def run(exercise, kernel, args):
    """(Call, Meter) of a launch on `args`; the Meter is None where kernels are compiled for a GPU."""
    if triton_env.mode() == "gpu":
        return sandbox.call(partial(on_device, exercise.launch, kernel), args, exercise.limit), None
    with undefined_lanes(), np.errstate(all="ignore"), meter() as counted:
        call = sandbox.call(partial(exercise.launch, kernel), args, exercise.limit)
    while type(call.error).__name__ == "InterpreterError" and call.error.__cause__ is not None:
        call.error = call.error.__cause__  # what the learner's line raised
        call.line = sandbox.learners_line(call.error)
    return call, counted


def on_device(launch, kernel, *args, device="cuda"):
    """The result of a launch on copies of `args` on `device`, back on the CPU, and so is what it changed of them."""
    moved = each(args, lambda a: whole(a).to(device).as_strided(a.shape, a.stride(), a.storage_offset()))
    result = each(launch(kernel, *moved), lambda a: a.cpu())
    for ours, theirs in zip(leaves(args), leaves(moved), strict=True):
        if hasattr(ours, "copy_"):
            ours.copy_(theirs)
    return result


def whole(tensor):
    return tensor if tensor._base is None else tensor._base


@contextmanager
def undefined_lanes():
    """Have lanes that a load masks off without `other` be NaN: on a GPU they may be anything.

    Whether there is an `other` is asked before Triton's own question, `if other`, which takes a single 0 for none.
    """
    from triton.language.semantic import TritonSemantic
    from triton.runtime import interpreter

    builder, given = type(interpreter.interpreter_builder), []
    load, masked_load = TritonSemantic.load, builder.create_masked_load

    def noted(self, pointer, mask, other, *rest, **options):
        given.append(other is not None)
        try:
            return load(self, pointer, mask, other, *rest, **options)
        finally:
            given.pop()

    def poisoned(self, pointers, mask, other, *rest, **options):
        result = masked_load(self, pointers, mask, other, *rest, **options)
        if other is None and not any(given):
            poison = undefined(pointers.get_element_ty(), result.data.dtype)
            np.copyto(result.data, np.asarray(poison, result.data.dtype), where=~np.asarray(mask.data, bool))
        return result

    TritonSemantic.load, builder.create_masked_load = noted, poisoned
    try:
        yield
    finally:
        TritonSemantic.load, builder.create_masked_load = load, masked_load


def undefined(element, numpy_dtype):
    """What a masked lane without `other` holds here: NaN, or a whole number that is no place in any tensor."""
    whole = element.is_int() and numpy_dtype.kind in "iu"
    return min(10**9, np.iinfo(numpy_dtype).max // 3) if whole else meter_hooks._poison(element, numpy_dtype)


# What is wrong with it -----------------------------------------------------------------------------------------------


def out_of_bounds(counted):
    """The Difference of a launch that left its tensors, None of one that did not."""
    found = counted.out_of_bounds if counted else []
    more = f"\n    and at {len(found) - 1} more of the kernel's lines" if len(found) > 1 else ""
    return compare.Difference(f"{found[0]}{more}") if found else None


def wasteful(exercise, case, counted):
    """The Wasteful of a launch that moved more than SLACK times the fewest bytes, None of one that did not."""
    if not counted or exercise.traffic is None or ratio(exercise, case, counted) <= SLACK:
        return None
    return Wasteful(
        f"the result is right, but it took {counted.bytes:,} bytes ({counted.loaded:,} loaded, {counted.stored:,} "
        f"stored) where {exercise.traffic(*case.args):,} are enough: {ratio(exercise, case, counted):.2f} times as many"
    )


def ratio(exercise, case, counted):
    return counted.bytes / exercise.traffic(*case.args)


def form_problem(exercise, kernel):
    """A sentence where a kernel does not take what the exercise's launch gives it, or no GPU takes it; else ""."""
    ours, theirs = exercise.kernel.arg_names, kernel.arg_names
    if ours == theirs:
        return compilable.problem(kernel)
    return f"your kernel takes ({', '.join(theirs)}); it must take ({', '.join(ours)}), as the stub does"


def is_stub(kernel):
    """Whether a kernel still has the stub's `raise NotImplementedError`; a compiler refuses it with another error."""
    try:
        (definition,) = ast.parse(textwrap.dedent(inspect.getsource(kernel.fn))).body
    except (OSError, TypeError, SyntaxError, ValueError):
        return False
    raised = [ast.unparse(line.exc) for line in ast.walk(definition) if isinstance(line, ast.Raise) and line.exc]
    return any(what.startswith("NotImplementedError") for what in raised)


def notes(seen, passed):
    """What to say below a verdict: how near to the fewest bytes a kernel came, or that nothing counts here."""
    exercise = seen[0].exercise
    if exercise.kernel is None:
        return []
    if any(o.counted is None for o in seen):
        return [ON_GPU]
    if not passed or exercise.traffic is None:
        return []
    worst = max(ratio(exercise, o.case, o.counted) for o in seen)
    return [f"bytes moved / fewest for this algorithm: {worst:.2f}, and no access out of bounds, in {len(seen)} cases"]


def alike(ours, theirs):
    """Whether two launches left their tensors as often, and wasted as much."""
    if lanes(ours.counted) != lanes(theirs.counted):
        return False
    waste = [isinstance(one.trouble, Wasteful) for one in (ours, theirs)]
    return not any(waste) or (all(waste) and all(map(as_many, traffic(ours.counted), traffic(theirs.counted))))


def traffic(counted):
    return counted.loaded, counted.stored


def as_many(ours, theirs):
    return abs(ours - theirs) <= 0.02 * theirs


def lanes(counted):
    """{kind of access: lanes out of bounds}."""
    found = Counter()
    for one in counted.out_of_bounds if counted else []:
        found[one.kind] += one.lanes
    return found


# Patterns of kernels, as in diagnose.py ------------------------------------------------------------------------------


def leaves_its_tensors(exercise, seen):
    if any(lanes(o.counted) for o in seen):
        return (
            "A lane reads or writes outside of the tensor: print the offsets of the last program on paper, and give "
            "tl.load and tl.store a mask that is False where there is nothing."
        )
    return None


def writes_its_argument(exercise, seen):
    changed = next((o.changed for o in seen if o.changed), None)
    if changed:
        return f"It writes into {changed[0]}, which it must only read: is tl.store given another pointer?"
    return None


def stores_nothing(exercise, seen):
    if all(o.counted and o.counted.launches and not o.counted.stored and o.call.error is None for o in seen):
        return (
            "Nothing is stored: a kernel gives nothing back, neither by `return` nor by assigning to a pointer's name. "
            "tl.store(pointer + offsets, values) writes the result."
        )
    return None


def plain_loop_number(exercise, seen):
    if all(isinstance(o.call.error, AttributeError) and str(o.call.error) in NO_TO for o in seen):
        return (
            "In Triton's interpreter a single number, such as eps or that of a `range` loop, may be a plain one, "
            "without the .to that it has on a GPU; tl.cast(number, tl.int64) works in both."
        )
    return None


def moves_too_much(exercise, seen):
    if not all(not o.failed or isinstance(o.trouble, Wasteful) for o in seen):
        return None
    if len({o.case.aligned for o in seen}) == 2 and not any(o.failed and o.case.aligned for o in seen):
        return (
            "The values are right, the traffic is not where a block is not full: lanes without a number must be masked "
            "off. Sent to another number instead (by %, tl.minimum or tl.where) they move bytes for nothing."
        )
    if any(o.counted and o.counted.stored > SLACK * sum(t.nbytes for t in leaves(o.call.value)) for o in seen):
        return (
            "The values are right, but numbers are stored more than once: do several programs the same work, or is "
            "tl.store in a loop that it belongs behind?"
        )
    return (
        "The values are right, the traffic is not: load each number once and keep it in a variable, and load "
        "before a loop what does not change in it."
    )


PATTERNS = [stores_nothing, leaves_its_tensors, writes_its_argument, plain_loop_number, moves_too_much]

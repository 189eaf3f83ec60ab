"""What the text of an answer that failed tells beside its results: arguments in another order, numbers from outside."""

import dis
import inspect
import types

import numpy as np
import torch

from minids.config import ModelConfig

DATA = int | float | torch.Tensor | np.ndarray | ModelConfig


def remarks(exercise, fn):
    """Lines to show below the difference."""
    if exercise.kernel is not None:
        return []
    return [line for line in (other_order(exercise, fn), from_outside(fn)) if line]


def other_order(exercise, fn):
    """A sentence where the arguments are those of the stub in another order."""
    try:
        names = list(inspect.signature(fn).parameters)
    except (TypeError, ValueError):
        return ""
    wanted = exercise.parameters[: len(names)]
    if names == wanted or sorted(names) != sorted(wanted):
        return ""
    return f"your function takes ({', '.join(names)}); they come in the stub's order, ({', '.join(wanted)})"


def from_outside(fn):
    """A sentence where the function reads numbers, tensors or a config that no argument gives it."""
    code = getattr(fn, "__code__", None)
    if not isinstance(code, types.CodeType):
        return ""
    scope = fn.__globals__
    names = [f"`{n}`" for n in sorted(set(globals_of(code))) if isinstance(scope.get(n), DATA)]
    if not names:
        return ""
    return f"it reads {', '.join(names)} from outside, the same for every input: is one of its arguments meant?"


def globals_of(code):
    """The names that a function, and the functions inside it, look up outside."""
    names = [step.argval for step in dis.get_instructions(code) if step.opname == "LOAD_GLOBAL"]
    inner = [const for const in code.co_consts if isinstance(const, types.CodeType)]
    return names + [name for one in inner for name in globals_of(one)]

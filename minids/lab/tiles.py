"""`triton` and `tl` for the cells of a lesson: the real ones, or stand-ins where Triton is not installed.

    from minids.lab.tiles import count, tl, triton

A stand-in lets a cell define its kernels, and a launch raises TritonUnavailable; `missing` says what is the matter. So
a lesson about kernels runs from top to bottom on every machine.
"""

import sys
import types

from minids import triton_env  # before triton: it chooses the interpreter where there is no GPU


class Marked:
    """A kernel where there is no Triton: it knows its name and its parameters, and cannot be launched."""

    def __init__(self, fn):
        self.fn, self.__name__ = fn, fn.__name__
        self.arg_names = list(fn.__code__.co_varnames[: fn.__code__.co_argcount])

    def __getitem__(self, grid):
        return self

    def __call__(self, *args, **kwargs):
        triton_env.require(self.__name__)
        raise triton_env.TritonUnavailable(f"{self.__name__} was defined without Triton; run its cell again")


class NoLanguage:
    """`tl` where there is no Triton: it has every name, for annotations such as tl.constexpr, and none does a thing."""

    def __getattr__(self, name):
        if name.startswith("__"):
            raise AttributeError(name)
        return name


def _jit(fn=None, **options):
    """@triton.jit, with or without options: mark the function."""
    return Marked(fn) if fn is not None else Marked


def _cdiv(a, b):
    return -(-a // b)


def _next_power_of_2(n):
    return 1 << max(0, n - 1).bit_length()


if triton_env.installed():
    import triton
    import triton.language as tl
else:
    tl = NoLanguage()
    triton = types.SimpleNamespace(jit=_jit, cdiv=_cdiv, next_power_of_2=_next_power_of_2, language=tl)


def missing():
    """What keeps kernels from running here, in a sentence; "" where they run."""
    if triton_env.mode() != "absent":
        return ""
    if triton_env.installed():
        return (
            "Triton was imported before minids chose its interpreter, so no kernel can run: restart the notebook's "
            "kernel and run the cells from the top"
        )
    remedy = "pip install triton" if sys.platform == "linux" else "there is no wheel of it for this system"
    return (
        f"Triton is missing here ({remedy}), so no kernel can run or be checked; text, figures and arithmetic work, "
        "and the cells below go on without kernels"
    )


def instead():
    """What a cell says in place of a kernel's figures, where no kernel can run; "" where they run."""
    return missing() and "no kernel runs here; the solution (linked at the end) shows this cell's figures"


def is_kernel(answer):
    """Whether something is a function under @triton.jit, of whatever kind Triton makes of it here."""
    try:
        return isinstance(answer.fn, types.FunctionType) and isinstance(answer.arg_names, list)
    except Exception:  # any object may be given to a check
        return False


def count(launch, *args):
    """(result, Meter) of launch(*args), a lesson's own; the Meter is None on a GPU, both are None without Triton."""
    from minids.lab.traffic import call

    if missing():
        return None, None
    if triton_env.mode() == "gpu":
        return launch(*(arg.cuda() if hasattr(arg, "cuda") else arg for arg in args)), None
    return call(launch, *args)

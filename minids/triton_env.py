"""Where Triton is, and how its kernels run on this machine.

Compiled on a GPU; without one Triton's interpreter runs them on the CPU: slowly, with the same values. Triton chooses
when it is imported, by TRITON_INTERPRET. Importing this module sets that to 1 where there is no GPU, unless it is set
already; so a file of kernels imports this module before triton, and `import minids` never imports triton.

A GPU before sm_80 (a T4, sm_75) counts as none here, and impl "auto" takes torch on it: Triton compiles for it without
tensor cores, and the larger kernels spill kilobytes or ask for more shared memory than there is.
"""

import functools
import importlib.metadata
import importlib.util
import os
import sys

import torch
from torch.torch_version import TorchVersion

OLDEST = 80  # Ampere: the first GPUs that kernels are compiled for


class TritonUnavailable(ImportError):
    """A Triton kernel is asked for where none can run."""


def installed():
    """Whether triton can be imported."""
    return importlib.util.find_spec("triton") is not None


def mode():
    """How a kernel runs here: "interpreter" (TRITON_INTERPRET came before triton), else "gpu", else "absent"."""
    if not installed():
        return "absent"
    language = getattr(sys.modules.get("triton"), "language", None)
    if language is not None:  # triton's own library shows what was chosen when it was imported
        interprets = type(language.standard.cdiv).__name__ == "InterpretedFunction"
    else:
        interprets = os.environ.get("TRITON_INTERPRET", "").lower() in ("1", "true", "on")
    if interprets:
        return "interpreter"
    return "absent" if no_gpu() else "gpu"


def no_gpu():
    """Why kernels are not compiled for a GPU here, in words; None where they are."""
    if not torch.cuda.is_available():
        return "there is no GPU"
    arch = gpu(torch.device("cuda"))[0]
    return None if arch >= OLDEST else f"this GPU is sm_{arch} and kernels are compiled for sm_{OLDEST} or newer"


def require(what):
    """Raise TritonUnavailable where `what` (a few words: "the decode kernel") cannot run; else return the mode."""
    if (how := mode()) == "interpreter" and (fault := interpreter_fault()):
        raise TritonUnavailable(f"{what} needs Triton's interpreter here, but {fault}")
    if how != "absent":
        return how
    if not installed():
        missing = "triton is not installed"
        remedy = "pip install triton" if sys.platform == "linux" else "it has no wheel for this system"
        remedy += '; or use impl="torch"'
    else:
        missing = f"{no_gpu()}, and triton was imported without TRITON_INTERPRET=1"
        remedy = 'start again and import minids.triton_env before triton; or use impl="torch"'
    raise TritonUnavailable(f"{what} needs Triton, but {missing}: {remedy}")


@functools.lru_cache
def interpreter_fault():
    """Why the interpreter runs no kernel with a loop here, and what to do; None where it does (triton#9171)."""
    triton, numpy = (TorchVersion(importlib.metadata.version(name)) for name in ("triton", "numpy"))
    if triton >= (3, 7) or numpy < (2, 4):
        return None
    return f"that of triton {triton} fails with numpy {numpy}: pip install 'triton>=3.7', or 'numpy<2.4'"


@functools.lru_cache
def compiles():
    """Whether kernels are compiled for a GPU here; asked once, for layers ask it at every call."""
    return mode() == "gpu"


@functools.lru_cache
def gpu(where):
    """(architecture, processors) of a device: (90, 132) for an H200; (90, 1) without a GPU, for the interpreter."""
    if where.type != "cuda":
        return 90, 1
    found = torch.cuda.get_device_properties(where)
    return 10 * found.major + found.minor, found.multi_processor_count


def need(condition, message):
    """Raise ValueError with `message` unless `condition`: how a kernel's wrapper refuses an argument."""
    if not condition:
        raise ValueError(message)


def cdiv(a, b):
    """ceil(a / b) of integers, for wrappers: triton.cdiv, which also serves inside kernels, is much slower."""
    return -(-a // b)


def next_power_of_2(n):
    """The least power of 2 that is not below n > 0; as cdiv."""
    return 1 << (n - 1).bit_length()


if installed() and "triton" not in sys.modules and no_gpu():
    os.environ.setdefault("TRITON_INTERPRET", "1")

"""Running a learner's function so that nothing it does can hurt: time, prints, global state, exceptions.

What the function prints is kept. Seeds, the default dtype, grad mode and the number of threads are put back. Memory
that torch leaves uninitialised is filled with NaN, so that an output that was never written shows. A call that takes
too long is interrupted.
"""

import contextlib
import ctypes
import io
import linecache
import random
import signal
import threading
import traceback
from dataclasses import dataclass

import numpy as np
import torch


class TimeLimit(BaseException):
    """The call took too long; a BaseException, so that `except Exception` in a loop does not swallow it."""


@dataclass
class Call:
    """What one call gave: its value, or the exception with the learner's line; and what it printed."""

    value: object = None
    error: BaseException | None = None
    line: str = ""
    printed: str = ""


def call(fn, args, limit):
    """Call fn(*args) within `limit` seconds; gives a Call, whatever happens."""
    out, result = io.StringIO(), Call()
    try:
        with kept_state(), poisoned_memory(), contextlib.redirect_stdout(out), time_limit(limit):
            result.value = fn(*args)
    except TimeLimit as error:
        result.error = error
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # SystemExit too: a learner's exit() must not end the kernel
        result.error, result.line = error, learners_line(error, fn)
    result.printed = out.getvalue()
    return result


def learners_line(error, fn):
    """`line N: source` of the last frame in the file or cell where `fn` was written; "" where there is none."""
    home = getattr(getattr(fn, "__code__", None), "co_filename", None)
    frames = [f for f in traceback.extract_tb(error.__traceback__) if f.filename == home]
    if not frames:
        return ""
    begin = fn.__code__.co_firstlineno
    source = linecache.getline(frames[-1].filename, frames[-1].lineno).strip()
    where = f"line {frames[-1].lineno - begin + 1} of {fn.__name__}" if frames[-1].lineno >= begin else "your line"
    return f"{where}: {source}" if source else where


@contextlib.contextmanager
def time_limit(seconds):
    """Raise TimeLimit in this thread after `seconds`, and again every half second until the block is left."""
    if threading.current_thread() is threading.main_thread() and hasattr(signal, "setitimer"):

        def ring(*_):
            raise TimeLimit

        before = signal.signal(signal.SIGALRM, ring)
        signal.setitimer(signal.ITIMER_REAL, seconds, 0.5)
        try:
            yield
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
            signal.signal(signal.SIGALRM, before)
        return
    me = ctypes.c_ulong(threading.get_ident())  # Windows, or not the main thread: ask the interpreter for it
    timer = threading.Timer(seconds, ctypes.pythonapi.PyThreadState_SetAsyncExc, (me, ctypes.py_object(TimeLimit)))
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


@contextlib.contextmanager
def kept_state():
    """Put back seeds, default dtype, grad mode and threads, whatever the block does to them."""
    seeds = torch.random.get_rng_state(), random.getstate(), np.random.get_state()
    dtype, threads, grad = torch.get_default_dtype(), torch.get_num_threads(), torch.is_grad_enabled()
    try:
        yield
    finally:
        torch.random.set_rng_state(seeds[0])
        random.setstate(seeds[1])
        np.random.set_state(seeds[2])
        torch.set_default_dtype(dtype)
        torch.set_grad_enabled(grad)
        if torch.get_num_threads() != threads:
            torch.set_num_threads(threads)


@contextlib.contextmanager
def poisoned_memory():
    """Have torch.empty and its kin give NaN instead of whatever the memory held."""
    flags = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    fill = torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(flags[0], warn_only=flags[1])
        torch.utils.deterministic.fill_uninitialized_memory = fill

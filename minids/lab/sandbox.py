"""Running a learner's function so that nothing it does can hurt: time, prints, global state, exceptions.

What the function prints is kept, up to a limit. Seeds, the default dtype and device, grad mode and the number of
threads are those of a fresh Python while it runs, and are put back to what they were. Memory that torch leaves
uninitialised is filled with NaN, so that an output that was never written shows. A call that takes too long is
interrupted (once torch comes back to Python: a single long operation runs to its end).
"""

import contextlib
import ctypes
import io
import linecache
import random
import signal
import site
import sys
import sysconfig
import threading
import traceback
import warnings
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

KEPT = 20_000  # characters of what a call prints; an endless loop that prints must not fill the memory
PACKAGES = (
    *map(sysconfig.get_path, ("stdlib", "purelib", "platlib")),
    site.getusersitepackages(),
    str(Path(torch.__file__).parent),
    str(Path(__file__).parents[1]),
)


class TimeLimit(BaseException):
    """The call took too long; a BaseException, so that `except Exception` in a loop does not swallow it."""


@dataclass
class Call:
    """What one call gave: its value, or the exception with the learner's line; and what it printed."""

    value: object = None
    error: BaseException | None = None
    line: str = ""
    printed: str = ""


class Printed(io.TextIOBase):
    """What is printed: the first KEPT characters, and the count of all its lines."""

    def __init__(self):
        self.text, self.lines = "", 0

    def writable(self):
        return True

    def write(self, text):
        self.lines += text.count("\n")
        self.text += text[: KEPT - len(self.text)]
        return len(text)

    def getvalue(self):
        missing = self.lines - self.text.count("\n")
        return self.text + (f"\n… and {missing} more lines\n" if missing else "")


def call(fn, args, limit):
    """Call fn(*args) within `limit` seconds; gives a Call, whatever happens. Only KeyboardInterrupt is passed on."""
    out, result = Printed(), Call()
    try:
        with plain_state(), poisoned_memory(), contextlib.redirect_stdout(out), time_limit(limit):
            result.value = body(fn, args)
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # SystemExit too: a learner's exit() must not end the kernel
        result.error, result.line = error, learners_line(error)
    result.printed = out.getvalue()
    return result


def body(fn, args):
    """The call itself. A frame of this function on the stack means that the learner's code runs."""
    return fn(*args)


def runs_body(frame):
    while frame is not None and frame.f_code is not body.__code__:
        frame = frame.f_back
    return frame is not None


def learners_line(error):
    """`line N of name: source` of the last frame that belongs to no installed package; "" where there is none."""
    frames = [(f.f_code, n) for f, n in traceback.walk_tb(error.__traceback__) if is_learners(f.f_code.co_filename)]
    if not frames:
        return ""
    code, number = frames[-1]
    source = linecache.getline(code.co_filename, number).strip()
    where = f"line {number - code.co_firstlineno + 1} of {code.co_name}"
    return f"{where}: {source}" if source else where


def is_learners(filename):
    """Whether a file or cell is the learner's: not of Python, torch or another package, and not of minids itself."""
    return not filename.startswith(("<frozen", "<__array_function__", *PACKAGES))


# The time ------------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def time_limit(seconds):
    """Raise TimeLimit in this thread after `seconds`, again and again, but only while `body` runs."""
    main = threading.current_thread() is threading.main_thread() and hasattr(signal, "setitimer")
    stop = by_signal(seconds) if main else by_thread(seconds)
    try:
        try:
            yield
        finally:
            stop()
    finally:
        stop()  # what by_thread asked for while `body` ran may come in the first


def by_signal(seconds):
    """Have the system's alarm raise TimeLimit in the main thread; gives the function that ends it."""
    rings = 0

    def ring(_, frame):
        nonlocal rings
        if runs_body(frame):
            rings += 1
            if rings > 2:  # a bare `except:` in a loop swallows it: ring again at once, so that one hits the handler
                signal.setitimer(signal.ITIMER_REAL, 1e-6 * (1 + rings % 30), 0.5)
            raise TimeLimit

    def stop():
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before if before is not None else signal.SIG_DFL)

    before = signal.signal(signal.SIGALRM, ring)
    signal.setitimer(signal.ITIMER_REAL, seconds, 0.5)
    return stop


def by_thread(seconds):
    """Have a second thread ask the interpreter for TimeLimit (Windows, or not the main thread); gives what ends it."""
    me, over = threading.get_ident(), threading.Event()
    ask = ctypes.pythonapi.PyThreadState_SetAsyncExc

    def watch():
        pause, rings = seconds, 0
        while not over.wait(pause):
            if runs_body(sys._current_frames().get(me)):
                ask(ctypes.c_ulong(me), ctypes.py_object(TimeLimit))
            pause, rings = (0.5 if rings < 2 else 0.003), rings + 1

    def stop():
        over.set()
        watcher.join()
        ask(ctypes.c_ulong(me), None)  # one that was asked for too late must not come later

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    return stop


# The state -----------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def plain_state():
    """Run the block with torch's defaults; put back seeds, defaults, grad mode and threads, whatever it does to them.

    A notebook in which float64, a GPU or no_grad is the default must not make a right answer wrong.
    """
    seeds = torch.random.get_rng_state(), random.getstate(), np.random.get_state()
    dtype, device = torch.get_default_dtype(), torch.get_default_device()
    threads, grad = torch.get_num_threads(), torch.is_grad_enabled()
    try:
        torch.set_default_dtype(torch.float32)
        set_device(torch.device("cpu"))
        torch.set_grad_enabled(True)
        with torch.inference_mode(False), warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*deterministic.*")  # poisoned_memory asks for it, nobody else
            yield
    finally:
        torch.random.set_rng_state(seeds[0])
        random.setstate(seeds[1])
        np.random.set_state(seeds[2])
        torch.set_default_dtype(dtype)
        set_device(device)
        torch.set_grad_enabled(grad)
        if torch.get_num_threads() != threads:
            torch.set_num_threads(threads)


def set_device(device):
    """Make `device` torch's default where it is not."""
    if torch.get_default_device() != device:
        torch.set_default_device(None if device.type == "cpu" else device)


@contextlib.contextmanager
def poisoned_memory():
    """Have torch.empty and its kin give NaN instead of whatever the memory held."""
    mode, fill = torch.get_deterministic_debug_mode(), torch.utils.deterministic.fill_uninitialized_memory
    torch.set_deterministic_debug_mode("warn")  # use_deterministic_algorithms would load the compiler, slowly
    torch.utils.deterministic.fill_uninitialized_memory = True
    try:
        yield
    finally:
        torch.set_deterministic_debug_mode(mode)
        torch.utils.deterministic.fill_uninitialized_memory = fill

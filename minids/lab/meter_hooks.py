"""How the traffic meter watches Triton's interpreter: one Launch per launch, and hooks around what moves data.

The interpreter copies tensors to the host and gives the kernel their addresses; every access is an array of addresses
and a mask. A hook counts the active lanes, finds those that no argument covers, and masks them off before the access.
During a launch each tensor lies by itself, so that what is beyond one is never another, by chance, in some runs.
"""

import linecache
import os
import sys
from contextlib import ExitStack
from dataclasses import dataclass

import numpy as np
import torch

from minids import triton_env

APART = 2**20  # bytes before and behind each tensor


@dataclass
class OutOfBounds:
    """The first access out of bounds of one line of a kernel, and how many lanes made one there.

    `offset` counts elements from the first of the nearest `argument`, which has `elements` (gaps of strides included).
    """

    kind: str
    kernel: str
    line: int
    text: str
    argument: str
    offset: int
    elements: int
    program: tuple
    lanes: int

    def __str__(self):
        where = f"{self.kernel}, line {self.line}: {self.text}" if self.line else self.kernel
        place = f"element {self.offset} of {self.argument}, which has {self.elements}"
        return f"{self.kind} out of bounds at {place} (program {self.program}, {self.lanes} lanes)\n    {where}"


class Launch:
    """The counts of one launch, and the memory that its tensor arguments cover."""

    def __init__(self, kernel):
        self.kernel, self.program, self.programs = kernel, (0, 0, 0), 0
        self.loaded = self.stored = self.multiply_adds = 0
        self.found = {}
        self.cover({})

    def cover(self, tensors):
        """Take the host's tensors {name: tensor}: merge their ranges of addresses and note which bytes are read."""
        self.ranges = [(name, *_range(tensor)) for name, tensor in tensors.items()]
        merged = [[0, 0]]  # a range that holds nothing, so that every address has a range below it
        for _, low, high, _ in sorted(self.ranges, key=lambda item: item[1]):
            if low < merged[-1][1]:
                merged[-1][1] = max(merged[-1][1], high)
            elif low < high:
                merged.append([low, high])
        self.low, self.high = np.array(merged, np.uint64).T
        self.seen = [np.zeros((high - low + 7) // 8 * 8, bool) for low, high in merged]

    def access(self, kind, pointers, mask, size):
        """Count the active lanes of one access of `size` bytes; (mask without the bad ones, bad lanes or None)."""
        addresses, active = np.broadcast_arrays(pointers, mask)
        where = np.searchsorted(self.low, addresses, side="right") - 1
        offset, room = addresses - self.low[where], (self.high - self.low)[where]
        inside = (room >= size) & (offset <= room - np.uint64(size))
        good, bad = active & inside, active & ~inside
        count = int(np.count_nonzero(active)) * size
        self.loaded += count * (kind != "store")
        self.stored += count * (kind != "load")
        if kind != "store":
            for index in np.unique(where[good]):
                self.see(index, offset[good & (where == index)], size)
        if not bad.any():
            return good, None
        self.report(kind, int(addresses[bad][0]), size, int(np.count_nonzero(bad)))
        return good, bad

    def see(self, index, offsets, size):
        """Note that the `size` bytes at each of `offsets` in the merged range `index` were read."""
        seen = self.seen[index]
        if np.any(offsets % np.uint64(size)):
            for byte in range(size):
                seen[offsets + np.uint64(byte)] = True
        else:  # a whole element at a time
            seen.view(f"u{size}")[offsets // np.uint64(size)] = int.from_bytes(b"\x01" * size, "little")

    def report(self, kind, address, size, lanes):
        """Record an access out of bounds, by the line of the kernel that makes it and the nearest argument."""
        line, text = _kernel_line()
        name, low, elements = "no tensor", address, 0
        alike = [item for item in self.ranges if item[3] == size] or self.ranges
        if alike:
            name, low, high, _ = min(alike, key=lambda item: max(item[1] - address, address - item[2]))
            elements = (high - low) // size
        fresh = OutOfBounds(
            kind, self.kernel, line, text, name, (address - low) // size, elements, self.program, lanes=0
        )
        self.found.setdefault((kind, line, name), fresh).lanes += lanes

    def add_to(self, meter):
        """Add these counts to a meter's."""
        meter.launches += 1
        meter.programs += self.programs
        meter.loaded += self.loaded
        meter.stored += self.stored
        meter.multiply_adds += self.multiply_adds
        meter.distinct_loaded += sum(int(np.count_nonzero(seen)) for seen in self.seen)
        meter.out_of_bounds += self.found.values()


def _range(tensor):
    """(first address, end, element's bytes) of what a tensor's shape and strides reach."""
    size = tensor.element_size()
    steps = sum((n - 1) * step for n, step in zip(tensor.shape, tensor.stride(), strict=True))
    reach = (1 + steps) * size if 0 not in tensor.shape else 0
    return tensor.data_ptr(), tensor.data_ptr() + reach, size


def _kernel_line():
    """(number, text) of the kernel's line that is running: the innermost frame outside triton and the hooks."""
    import triton

    hooks = os.path.join(os.path.dirname(__file__), "launching.py")
    ours = (os.path.dirname(triton.__file__) + os.sep, __file__, hooks)
    frame = sys._getframe()
    while frame and frame.f_code.co_filename.startswith(ours):
        frame = frame.f_back
    if frame is None:
        return 0, ""
    return frame.f_lineno, linecache.getline(frame.f_code.co_filename, frame.f_lineno).strip()


# --- the hooks, in place while a meter is open ------------------------------------------------------------------------

_meters, _launches, _undo = [], [], ExitStack()


def enter(meter):
    """Open `meter`: it gets the counts of every launch until it leaves; raises triton_env.TritonUnavailable."""
    if triton_env.require("the traffic meter") != "interpreter":
        raise triton_env.TritonUnavailable(
            "the traffic meter counts in Triton's interpreter, and kernels are compiled here; "
            "start a fresh process with TRITON_INTERPRET=1 in its environment"
        )
    if not _meters:
        _install()
    _meters.append(meter)


def leave(meter):
    """Close `meter`; with the last one the interpreter is as it was."""
    _meters.remove(meter)
    if not _meters:
        _undo.close()


def _install():
    from triton.runtime import interpreter

    builder, executor = interpreter.interpreter_builder, interpreter.GridExecutor
    hooks = {"set_grid_idx": _program, "create_masked_load": _load, "create_masked_store": _store}
    hooks |= {"create_atomic_rmw": _atomic, "create_atomic_cas": _compare_and_swap, "create_dot": _dot}
    for name, hook in hooks.items():  # all other loads and stores of the builder go through the masked ones
        setattr(builder, name, _before(getattr(builder, name), hook))
        _undo.callback(delattr, builder, name)
    for name, hook in {"__call__": _launch, "_init_args_hst": _arguments}.items():
        _undo.callback(setattr, executor, name, getattr(executor, name))
        setattr(executor, name, _before(getattr(executor, name), hook))


def _before(original, hook):
    return lambda *args, **kwargs: hook(original, *args, **kwargs)


def _launch(original, executor, *args, **kwargs):
    launch = Launch(executor.fn.__name__)
    _launches.append(launch)
    try:
        return original(executor, *args, **kwargs)
    finally:
        _launches.pop()
        for meter in {id(meter): meter for meter in _meters}.values():
            launch.add_to(meter)


def _arguments(original, executor, args_dev, kwargs):
    host_args, host_kwargs = original(executor, args_dev, kwargs)
    tensors = {}
    for name, value in [*zip(executor.arg_names, host_args, strict=False), *host_kwargs.items()]:
        parts = {f"{name}[{i}]": part for i, part in enumerate(value)} if isinstance(value, tuple) else {name: value}
        parts = {name: getattr(part, "base", part) for name, part in parts.items()}  # of a descriptor, a reinterpret
        tensors |= {name: part for name, part in parts.items() if hasattr(part, "data_ptr")}
    given = {id(value) for value in (*args_dev, *kwargs.values())}
    _lay_apart([part for part in tensors.values() if id(part) not in given])
    _launches[-1].cover(tensors)
    return host_args, host_kwargs


def _lay_apart(tensors):
    """Copy the host's tensors to memory with room around it; the interpreter copies them back after the launch."""
    copies = {}
    for tensor in tensors:
        storage = tensor.untyped_storage()
        if size := storage.nbytes():
            if storage.data_ptr() not in copies:
                room = np.empty(size + 2 * APART, np.uint8)
                copy = torch.frombuffer(room, dtype=torch.uint8, count=size, offset=APART).untyped_storage()
                copies[storage.data_ptr()] = copy.copy_(storage)
            tensor.set_(copies[storage.data_ptr()], tensor.storage_offset(), tensor.size(), tensor.stride())


def _program(original, x, y, z):
    _launches[-1].program, _launches[-1].programs = (x, y, z), _launches[-1].programs + 1
    return original(x, y, z)


def _load(original, pointers, mask, other, *rest, **options):
    mask, bad = _access("load", pointers, mask)
    result = original(pointers, mask, other, *rest, **options)
    if bad is not None:
        result.data[bad] = _poison(pointers.get_element_ty(), result.data.dtype)
    return result


def _store(original, pointers, value, mask, *rest, **options):
    return original(pointers, value, _access("store", pointers, mask)[0], *rest, **options)


def _atomic(original, operation, pointers, value, mask, *rest):
    return original(operation, pointers, value, _access("atomic", pointers, mask)[0], *rest)


def _compare_and_swap(original, pointers, compare, value, *rest):
    from triton.runtime.interpreter import TensorHandle

    good, bad = _access("atomic", pointers, None)
    if bad is None:
        return original(pointers, compare, value, *rest)
    result = np.zeros(pointers.data.shape, compare.data.dtype)
    if good.data.any():
        wide = [(np.broadcast_to(x.data, result.shape)[good.data], x.dtype) for x in (pointers, compare, value)]
        result[good.data] = original(*(TensorHandle(*pair) for pair in wide), *rest).data
    return TensorHandle(result, compare.dtype.scalar)


def _dot(original, a, b, *rest):
    _launches[-1].multiply_adds += a.data.size * b.data.shape[-1]
    return original(a, b, *rest)


def _access(kind, pointers, mask):
    """The lanes that may go on, as a mask of the interpreter, and the lanes out of bounds (None for none)."""
    import triton.language as tl
    from triton.runtime import interpreter

    active = np.asarray(True if mask is None else mask.data, dtype=bool)
    size = interpreter._get_np_dtype(pointers.get_element_ty()).itemsize
    good, bad = _launches[-1].access(kind, pointers.data, active, size)
    return interpreter.TensorHandle(good, tl.int1), bad


def _poison(element, numpy_dtype):
    """What a read out of bounds gives: NaN, as its bits where numpy has no such dtype; 0 for integers."""
    if numpy_dtype.kind == "f":
        return np.nan
    return {"bf16": 0x7FC0, "fp8e4nv": 0x7F, "fp8e5": 0x7F}.get(str(element), 0)

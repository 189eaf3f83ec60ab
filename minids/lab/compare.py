"""Whether two results are the same, and if not, where they differ first: tensors, numbers, tuples, lists, dicts."""

import math
from dataclasses import dataclass

import numpy as np
import torch

from minids.numerics import TOLERANCE


@dataclass
class Difference:
    """What is wrong with a result: `what` in one line; `error` and `allowed` relative to the result's scale."""

    what: str
    error: float = math.inf
    allowed: float = 0.0

    def __str__(self):
        if math.isfinite(self.error):
            return f"{self.what}; error {self.error:.1e} of the result's scale, allowed {self.allowed:.0e}"
        return self.what


def difference(got, want, dtype, tolerance=1.0, where="the result"):
    """The first Difference of `got` from `want` (of the reference in float64), None where they agree within `dtype`."""
    try:
        return compared(got, want, dtype, tolerance, where)
    except Exception as error:  # whatever a learner's object does when it is looked at
        kind, problem = type(got).__name__, type(error).__name__
        return Difference(
            f"{where} is of the type {kind} and cannot be compared ({problem}), expected {describe(want)}"
        )


def compared(got, want, dtype, tolerance, where):
    if isinstance(want, torch.Tensor):
        return of_tensors(got, want, dtype, tolerance, where)
    if isinstance(want, dict):
        if not isinstance(got, dict) or got.keys() != want.keys():
            return Difference(f"{where} is {describe(got)}, expected {describe(want)}")
        pairs = [(got[key], want[key], f"{where}[{key!r}]") for key in want]
    elif isinstance(want, tuple | list):
        if not isinstance(got, tuple | list) or len(got) != len(want):
            return Difference(f"{where} is {describe(got)}, expected {describe(want)}")
        names = getattr(want, "_fields", range(len(want)))
        pairs = [(g, w, f"{where}[{n}]") for g, w, n in zip(got, want, names, strict=True)]
    else:
        return of_numbers(got, want, dtype, tolerance, where)
    return next(filter(None, (difference(g, w, dtype, tolerance, place) for g, w, place in pairs)), None)


def of_numbers(got, want, dtype, tolerance, where):
    if isinstance(got, np.generic) or (isinstance(got, torch.Tensor | np.ndarray) and got.ndim == 0):
        got = got.item()
    if isinstance(want, bool) or not isinstance(want, int | float):
        same = type(got) is type(want) and got == want
        return None if same else Difference(f"{where} is {describe(got)}, expected {describe(want)}")
    if isinstance(got, bool) or not isinstance(got, int | float):
        return Difference(f"{where} is {describe(got)}, expected the number {want:.6g}")
    if isinstance(want, int):
        return None if got == want else Difference(f"{where} is {describe(got)}, expected {want!r}")
    allowed = tolerance * TOLERANCE[dtype]
    error = abs(got - want) / abs(want) if want and math.isfinite(got) else abs(got - want)
    good = got == want or error <= allowed or (math.isnan(got) and math.isnan(want))
    return None if good else Difference(f"{where} is {got:.6g}, expected {want:.6g}", error, allowed)


def of_tensors(got, want, dtype, tolerance, where):
    if not isinstance(got, torch.Tensor):
        return Difference(f"{where} is {describe(got)}, expected {describe(want, dtype)}")
    if got.shape != want.shape:
        return Difference(f"{where} has shape {list(got.shape)}, expected {list(want.shape)}")
    if got.layout != want.layout or got.device != want.device:
        kind = got.device if got.layout == want.layout else got.layout
        return Difference(f"{where} is a tensor of {kind}, expected an ordinary one on {want.device}, as the inputs")
    if not want.is_floating_point():
        if got.is_floating_point() or got.is_complex() or (got.dtype == torch.bool) != (want.dtype == torch.bool):
            return Difference(f"{where} has dtype {name(got.dtype)}, expected {name(want.dtype)}")
        return first(got, want, got != want, where)
    if got.dtype not in allowed_dtypes(want.dtype, dtype):
        follows = want.dtype == torch.float64  # that of the reference's inputs
        wish = f"{name(dtype)}, as the inputs" if follows else name(want.dtype)
        return Difference(f"{where} has dtype {name(got.dtype)}, expected {wish}")
    got, want = got.detach().double(), want.detach().double()
    if got.numel() == 0:
        return None
    same = (got == want) | (got.isnan() & want.isnan())
    off = torch.where(same, 0.0, (got - want).abs())
    finite = want[want.isfinite()]
    scale = finite.abs().max().item() if finite.numel() else 1.0
    allowed = tolerance * TOLERANCE[dtype]
    bad = ~(off <= allowed * (scale or 1.0))
    error = off.nan_to_num(math.inf, math.inf).max().item() / (scale or 1.0)
    return first(got, want, bad, where, error, allowed)


def allowed_dtypes(want, dtype):
    """The dtypes that a result may have for inputs of `dtype`: fp32, and theirs or what the reference chose itself."""
    if want.itemsize == 1:
        return {want}  # FP8: the format is the point
    chosen = want if want != torch.float64 else dtype
    return {chosen, torch.float32 if dtype != torch.float64 else dtype}


def first(got, want, bad, where, error=math.inf, allowed=0.0):
    """The Difference at the first True of `bad`; None without one."""
    if not bad.any():
        return None
    place = tuple(bad.nonzero()[0].tolist())
    share = f" ({int(bad.sum())} of {bad.numel()} are wrong)" if bad.numel() > 1 else ""
    index = f"[{', '.join(map(str, place))}]" if place else ""
    what = f"{where}{index}: got {number(got[place])}, expected {number(want[place])}{share}"
    return Difference(what, error, allowed)


def number(value):
    value = value.item()
    return f"{value:.6g}" if isinstance(value, float) else str(value)


def name(dtype):
    return str(dtype).removeprefix("torch.")


def describe(value, dtype=None):
    """A value in a few words: its kind, and a tensor's shape and dtype."""
    if isinstance(value, torch.Tensor):
        if value.layout != torch.strided:
            return f"a tensor of {value.layout}"
        kind = dtype if dtype and value.is_floating_point() else value.dtype
        return f"a tensor {list(value.shape)} {name(kind)}"
    if value is None:
        return "None (is there a `return`?)"
    if isinstance(value, tuple | list):
        return f"a {'tuple' if isinstance(value, tuple) else type(value).__name__} of {len(value)}"
    if isinstance(value, np.ndarray):
        return f"a numpy array {list(value.shape)} {value.dtype}"
    if isinstance(value, int) and abs(value) >= 10**18:
        return "a huge integer"  # Python refuses to print some
    if isinstance(value, str):
        return repr(value[:60])
    if isinstance(value, int | float):
        return repr(value)
    kind = type(value).__name__
    return f"an {kind}" if kind[0] in "aeiouAEIOU" else f"a {kind}"

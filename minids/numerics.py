"""One error metric, one limit per dtype, seeding, and which devices can be used, and are quick in bf16.

The metric is the largest error over the largest wanted value. Errors of single elements say little in a matrix
product: where a sum cancels to almost nothing any rounding is large beside it.
"""

import random

import torch

# A few units of the last place, times the growth of rounding over the sums of a layer.
TOLERANCE = {
    torch.float64: 1e-12,  # 2^-53 is 1.1e-16
    torch.float32: 1e-5,  # 2^-24 is 6.0e-8; a sum of 1000 terms in another order, and a softmax after it
    torch.float16: 4e-3,  # 2^-11 is 4.9e-4
    torch.bfloat16: 3e-2,  # 2^-9 is 2.0e-3; intermediate results are rounded at different places
}


def relative_error(got, want):
    """max|got − want| / max|want| in float64, a float; NaN or infinity where either holds one.

    Raises ValueError where the shapes differ, or where there is nothing to compare.
    """
    if got.shape != want.shape or got.numel() == 0:
        raise ValueError(f"shapes are {list(got.shape)} and {list(want.shape)}; give two equal ones that are not empty")
    got, want = got.detach().cpu().double(), want.detach().cpu().double()
    error, size = (got - want).abs().max().item(), want.abs().max().item()
    return error / size if size else error


def seed_everything(seed):
    """Seed Python's, NumPy's and torch's generators with `seed`, on every device."""
    import numpy  # here: `import minids` needs torch alone

    random.seed(seed)
    numpy.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def device_fault(name):
    """Why torch cannot use the device `name` here, in its own words; None where it can."""
    try:
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError) as error:
        return str(error).partition("\n")[0]
    return None


def has_fast_bf16(device):
    """Whether `device` multiplies bfloat16 matrices in hardware: a recent GPU, a CPU with AVX512-BF16 or AMX."""
    kind = torch.device(device).type
    if kind == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    checks = (getattr(torch.cpu, name, None) for name in ("_is_avx512_bf16_supported", "_is_amx_tile_supported"))
    return kind == "cpu" and any(check() for check in checks if check)

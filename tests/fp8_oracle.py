"""FP8 quantisation in exact rational arithmetic, one number at a time, and the numbers to try: what both tests of FP8
compare with. Nothing here comes from minids: Python's `round` of a Fraction takes the even one of two equally near.
"""

import itertools
import math
from fractions import Fraction

import torch

POWERS = [Fraction(2) ** n for n in range(-126, 122)]
LARGEST = torch.finfo(torch.float32).max


def nearest(value, digits, lowest):
    """The number nearest to `value` of `digits` binary digits; below 2^lowest they become fewer (subnormal)."""
    if value == 0:
        return value
    size = abs(value)
    exponent = size.numerator.bit_length() - size.denominator.bit_length()
    exponent -= size < Fraction(2) ** exponent
    step = Fraction(2) ** (max(exponent, lowest) - digits + 1)
    return round(value / step) * step


def value_of(code):
    """The value of one of E4M3's bytes, a Fraction; None for NaN."""
    sign, exponent, mantissa = (-1) ** (code >> 7), (code >> 3) & 15, code & 7
    if exponent == 15 and mantissa == 7:
        return None
    if exponent == 0:
        return sign * Fraction(mantissa, 8) / 64
    return sign * (1 + Fraction(mantissa, 8)) * Fraction(2) ** (exponent - 7)


CODES = {value_of(code): code for code in range(127)}


def code_of(value, negative):
    """The byte of E4M3 nearest to a Fraction, at most 448; zero has the sign that is given."""
    return CODES[min(nearest(abs(value), 4, -6), Fraction(448))] | negative << 7


def scale_of(numbers, power_of_2):
    """The scale of finite numbers as a Fraction that fp32 holds."""
    scale = nearest(max(abs(Fraction(x)) for x in numbers) / 448, 24, -126)
    scale = max(scale, POWERS[0])
    return next(p for p in POWERS if p >= scale) if power_of_2 else scale


def quantize(numbers, power_of_2):
    """(scale, [codes]) of the fp32 numbers of one tile."""
    if not all(map(math.isfinite, numbers)):
        return math.nan, [0x7F] * len(numbers)
    scale = scale_of(numbers, power_of_2)
    quotients = (nearest(Fraction(x) / scale, 24, -126) for x in numbers)  # fp32's division
    return float(scale), [code_of(q, math.copysign(1, x) < 0) for q, x in zip(quotients, numbers, strict=True)]


def quantize_rows(x, power_of_2):
    """Codes (uint8) [M,K] and scales fp32 [M,ceil(K/128)] of x [M,K] in 1x128 tiles."""
    tiles = [[quantize(tile.tolist(), power_of_2) for tile in row.split(128)] for row in x.float()]
    codes = [[code for _, part in row for code in part] for row in tiles]
    scales = [[scale for scale, _ in row] for row in tiles]
    return torch.tensor(codes, dtype=torch.uint8), torch.tensor(scales, dtype=torch.float64).float()


def dequantize(codes, scale):
    """Codes [N,K] times their scales in float64: of 1x128 tiles [N,ceil(K/128)] or 128x128 blocks [ceil(N/128),…]."""
    rows = 1 if len(scale) == len(codes) else 128
    whole = scale.double().repeat_interleave(rows, 0).repeat_interleave(128, 1)
    return codes.double() * whole[: codes.shape[0], : codes.shape[1]]


def product(a, a_scale, b, b_scale):
    """a b^T of what both stand for, in float64."""
    return dequantize(a, a_scale) @ dequantize(b, b_scale).T


# Numbers to try --------------------------------------------------------------------------------------------------


def from_bits(bits):
    return bits.to(torch.int32).view(torch.float32)


def tiles_of(numbers, largest):
    """[n,128] fp32: the numbers, 127 at a time, each tile begun by `largest`, so that the scale is known."""
    numbers = torch.cat([numbers, numbers.new_zeros(-len(numbers) % 127)]).view(-1, 127)
    return torch.cat([torch.full((len(numbers), 1), largest), numbers], 1)


def ties():
    """Numbers half way between two codes and their neighbours in fp32, of either sign, by scales 1, 2^-9 and 2^20."""
    values = sorted(CODES)
    halves = torch.tensor([float((a + b) / 2) for a, b in itertools.pairwise(values)])
    bits = halves.view(torch.int32)
    near = torch.cat([from_bits(bits + step) for step in (-1, 0, 1)])
    near = torch.cat([near, -near, torch.tensor([448.0, -448.0, 447.99997])])
    return torch.cat([tiles_of(near, 448.0) * 2.0**n for n in (0, -9, 20)])


def special(value):
    """Tiles of random numbers, some with one that is not finite."""
    x = torch.randn(6, 128)
    for row, at in enumerate((0, 64, 127)):
        x[row, at] = value
    return x


def patterns():
    """{name: [n,128] fp32}: every class of number, many at random (torch's generator)."""
    any_bits = torch.randint(-(2**31), 2**31, (24, 128))
    finite = from_bits(torch.where(any_bits & 0x7F800000 == 0x7F800000, any_bits & ~0x40000000, any_bits))
    spread = torch.randn(24, 128) * 2.0 ** torch.randint(-20, 1, (24, 128))  # down to the subnormals of E4M3, and 0
    equal = 2.0 ** (torch.rand(64, 1) * 20 - 10) * torch.ones(128)  # amax / (amax / 448) is above 448 for some
    subnormal = from_bits(torch.randint(-(2**31), 2**31, (6, 128)) & -0x7F800001)
    smallest = torch.rand(8, 128) * 448 * 2.0**-126 * torch.tensor([0.25, 0.5, 1, 1.0001, 1.5, 2, 3, 4])[:, None]
    zeros = torch.zeros(2, 128)
    zeros[1, ::2] = -0.0
    large = torch.randn(4, 128).clamp(-1, 1) * LARGEST
    large[1:3, 5] = torch.tensor([LARGEST, -LARGEST])
    odd_nan = from_bits(torch.tensor([0xFF800001 - 2**32])).item()  # a negative one that signals
    return {
        "normal": torch.randn(24, 128) * 2.0 ** torch.randint(-90, 90, (24, 1)),
        "any finite": finite, "spread": spread, "equal": equal, "ties": ties(), "subnormal": subnormal,
        "smallest scale": smallest, "zeros": zeros, "largest": large,
        "infinity": special(math.inf), "-infinity": special(-math.inf), "NaN": special(math.nan),
        "-NaN": special(odd_nan),
    }  # fmt: skip

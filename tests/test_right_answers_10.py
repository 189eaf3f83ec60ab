"""Lesson 10: right answers in other styles pass: by bits, by frexp, by torch's casts, by tables, in plain Python."""

import math

import numpy as np
import torch
import torch.nn.functional as F
from right_answers import Answers, passes

from minids.fp8.reference import decode_e4m3, power_of_two_scale, round_to_e4m3

E4M3 = torch.float8_e4m3fn
SMALLEST = 2.0**-126
right = Answers()


@right("10.1")
def seen_as_fp8(codes):
    return codes.view(E4M3).float()


@right("10.1")
def shifted_into_float32(codes):
    bits = codes.int()
    value = ((bits & 127) << 20).view(torch.float32) * 2.0**120
    value[(bits & 127) == 127] = torch.nan
    return torch.where(bits > 127, -value, value)


@right("10.1")
def one_by_one(codes):
    def value(code):
        sign, e, m = 1 - 2 * (code // 128), code // 8 % 16, code % 8
        number = sign * math.ldexp(8 + m if e else m, max(e, 1) - 10)
        return math.nan if code % 128 == 127 else number

    return torch.tensor([[value(code) for code in row] for row in codes.tolist()])


@right("10.2")
def by_the_cast(x):
    return x.clamp(-448, 448).to(E4M3).to(x.dtype) + (x - x)  # infinity - infinity is NaN


@right("10.2")
def by_bits(x):
    bits = x.view(torch.int32)
    size = bits & 0x7FFFFFFF
    normal = (size + 0x7FFFF + (size >> 20 & 1) >> 20 << 20).view(torch.float32)
    small = torch.round(x.abs() * 512) / 512
    value = torch.where(size < 121 << 23, small, normal).clamp_max(448)
    return torch.where(size < 0x7F800000, value, torch.nan).copysign(x)


@right("10.2")
def by_the_logarithm(x):
    step = torch.exp2(x.abs().log2().floor().clamp(-6, 8) - 3)
    y = (torch.round(x / step) * step).clamp(min=-448, max=448)
    y[~x.isfinite()] = float("nan")
    return y


@right("10.2")
def by_a_large_number(x):
    large = 1.5 * 2.0 ** (torch.frexp(x).exponent.sub(1).clamp(-6, 8) + 20)
    return torch.where(x.isfinite(), torch.clip((x + large) - large, -448, 448), torch.nan)


@right("10.2")
def nearest_of_a_table(x):
    table = decode_e4m3(torch.arange(127, dtype=torch.uint8))
    middles = (table[1:] + table[:-1]) / 2
    low, high = (torch.bucketize(x.abs(), middles, right=side) for side in (False, True))
    return torch.where(x.isfinite(), table[torch.where(low % 2 == 0, low, high)] * x.sign(), torch.nan)


@right("10.2")
def number_by_number(x):
    out = torch.full_like(x, torch.nan)
    for place, value in np.ndenumerate(x.numpy().astype(float)):
        if math.isfinite(value):
            exponent = max(math.frexp(value)[1] - 1, -6) - 3
            out[place] = min(max(math.ldexp(round(math.ldexp(value, -exponent)), exponent), -448), 448)
    return out


@right("10.3")
def by_logarithms_in_float64(scale):
    return torch.exp2(scale.double().log2().ceil()).float()


@right("10.3")
def added_to_the_bits(scale):
    bits = scale.contiguous().view(torch.int32)
    return ((bits + 0x7FFFFF) & ~0x7FFFFF).view(torch.float32).masked_fill(scale.isnan(), torch.nan)


@right("10.3")
def found_among_powers(scale):
    powers = 2.0 ** torch.arange(-126, 128)
    return powers[torch.searchsorted(powers, scale.contiguous()).clamp_max(253)] + (scale - scale)


@right("10.3")
def doubled_until_it_fits(scale):
    def power(s):
        p = 2.0**-126
        while p < s:
            p *= 2
        return s if math.isnan(s) else p

    return torch.tensor([[power(s) for s in row] for row in scale.tolist()])


@right("10.4")
def tile_by_tile(x, power_of_2=False):
    codes, scales = [], []
    for tile in x.float().split(128, -1):
        scale = (tile.abs().amax(-1, keepdim=True) / 448).clamp(min=SMALLEST)
        scales.append(power_of_two_scale(scale) if power_of_2 else scale)
        codes.append(round_to_e4m3(tile / scales[-1]))
    return torch.cat(codes, -1).to(E4M3), torch.cat(scales, -1)


@right("10.4")
def by_pooling(x, power_of_2=False):
    rows = x.double().reshape(1, -1, x.shape[-1])
    scale = (F.max_pool1d(rows.abs(), 128, ceil_mode=True)[0] * (1 / 448)).float().clamp_min(SMALLEST)
    scale = power_of_two_scale(scale) if power_of_2 else scale
    codes = rows[0].float() * scale.reciprocal()[:, torch.arange(x.shape[-1]) // 128]
    return [codes.clamp(-448, 448).reshape(x.shape).to(E4M3), scale.reshape(*x.shape[:-1], -1)]


@right("10.4")
def by_the_largest_and_the_smallest(x, power_of_2=False):
    K = x.shape[-1]
    padded = torch.zeros(*x.shape[:-1], math.ceil(K / 128) * 128)
    padded[..., :K] = x
    low, high = padded.view(*x.shape[:-1], -1, 128).aminmax(dim=-1)
    scale = torch.maximum(torch.maximum(-low, high) / 448, torch.tensor(SMALLEST))
    scale = power_of_two_scale(scale) if power_of_2 else scale
    return round_to_e4m3(padded / scale.repeat_interleave(128, -1))[..., :K].to(E4M3), scale


@right("10.5")
def block_by_block(w, power_of_2=False):
    codes = torch.empty(w.shape)
    scales = torch.empty(-(-w.shape[0] // 128), -(-w.shape[1] // 128))
    for i, j in np.ndindex(*scales.shape):
        place = slice(128 * i, 128 * i + 128), slice(128 * j, 128 * j + 128)
        scale = (w[place].abs().max() / 448).clamp_min(SMALLEST)
        scales[i, j] = power_of_two_scale(scale) if power_of_2 else scale
        codes[place] = round_to_e4m3(w[place] / scales[i, j])
    return codes.to(E4M3), scales


@right("10.5")
def pooled_and_spread(w, power_of_2=False):
    scale = (F.max_pool2d(w.abs()[None], 128, ceil_mode=True)[0] / 448).clamp_min(SMALLEST)
    scale = power_of_two_scale(scale) if power_of_2 else scale
    spread = torch.kron(scale, torch.ones(128, 128))[: len(w), : w.shape[1]]
    return (w / spread).to(E4M3), scale.T.contiguous().T


@right.each
def test_a_right_answer_passes(name, answer):
    passes(name, answer)

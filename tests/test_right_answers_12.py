"""Lesson 12: right answers in other styles pass."""

import functools
from typing import NamedTuple

import torch
import torch.nn.functional as F
from right_answers import Answers, passes

from minids.fp8 import emulate, reference
from minids.fp8.reference import dequantize_blocks, dequantize_tiles, matmul_blockscaled

right = Answers()


@right("12.1")
def dequantised(x_fp8, x_scale, w_fp8, w_scale):
    x, w = dequantize_tiles(x_fp8, x_scale).double(), dequantize_blocks(w_fp8, w_scale).double()
    return torch.einsum("mk,nk->nm", x, w).float().T


@right("12.1")
def block_by_block(x_fp8, x_scale, w_fp8, w_scale):
    y = torch.zeros(len(x_fp8), len(w_fp8))
    for j, x in enumerate(x_fp8.float().split(128, 1)):
        for i, w in enumerate(w_fp8[:, 128 * j : 128 * j + 128].float().split(128)):
            y[:, 128 * i : 128 * i + 128] += F.linear(x, w) * x_scale[:, j : j + 1] * w_scale[i, j]
    return y


@right("12.2")
def laid_anew(dy_fp8, dy_scale, w_fp8, w_scale):
    return reference.fprop(dy_fp8, dy_scale, w_fp8.mT.contiguous(), w_scale.t().contiguous())


@right("12.2")
def multiplied_wide(dy_fp8, dy_scale, w_fp8, w_scale):
    return dequantize_tiles(dy_fp8, dy_scale) @ dequantize_blocks(w_fp8, w_scale)


@right("12.2")
def scales_of_rows(dy_fp8, dy_scale, w_fp8, w_scale):
    scale = w_scale.T.repeat_interleave(128, 0)[: w_fp8.shape[1]]
    return matmul_blockscaled(dy_fp8, dy_scale, w_fp8.T, scale)


@right("12.3")
def of_two_factors(dy, x_fp8, x_scale, power_of_2=False):
    def along_tokens(t):
        return dequantize_tiles(*emulate.quantize_tiles(t.T.contiguous(), power_of_2))

    return along_tokens(dy) @ along_tokens(dequantize_tiles(x_fp8, x_scale)).T


@right("12.3")
def tokens_in_pieces(dy, x_fp8, x_scale, power_of_2=False):
    quantise = functools.partial(reference.quantize_tiles, power_of_2=power_of_2)
    pieces = zip(dy.split(128), dequantize_tiles(x_fp8, x_scale).split(128), strict=True)
    pairs = [(quantise(a.mT), quantise(b.mT)) for a, b in pieces]
    return sum((a.double() @ b.double().T) * sa * sb.T for (a, sa), (b, sb) in pairs).float()


class Forward(NamedTuple):
    """What a forward pass gives, by name."""

    y: torch.Tensor
    x_fp8: torch.Tensor
    x_scale: torch.Tensor
    w_fp8: torch.Tensor
    w_scale: torch.Tensor


@right("12.4")
def by_name(x, w, power_of_2=False):
    kept = *emulate.quantize_tiles(x, power_of_2), *emulate.quantize_blocks(w, power_of_2)
    return Forward(F.linear(dequantize_tiles(*kept[:2]), dequantize_blocks(*kept[2:])), *kept)


@right("12.4")
def of_turned_weights(x, w, power_of_2=False):
    w_fp8, w_scale = reference.quantize_blocks(w.T, power_of_2=power_of_2)
    kept = [*reference.quantize_tiles(x, power_of_2=power_of_2), w_fp8.T, w_scale.T]
    return [reference.fprop(*kept), *kept]


@right("12.5")
def with_helpers(dy, x_fp8, x_scale, w_fp8, w_scale, power_of_2=False):
    def both(a, b):
        return matmul_blockscaled(*emulate.quantize_tiles(a, power_of_2), *b)

    x = dequantize_tiles(x_fp8, x_scale)
    return both(dy, (w_fp8.T, w_scale.T)), both(dy.T, emulate.quantize_tiles(x.T, power_of_2))


@right("12.5")
def in_float64(dy, x_fp8, x_scale, w_fp8, w_scale, power_of_2=False):
    along_n = dequantize_tiles(*reference.quantize_tiles(dy, power_of_2)).double()
    dx = along_n @ dequantize_blocks(w_fp8, w_scale).double()
    return [dx.float(), reference.wgrad(dy, x_fp8, x_scale, power_of_2)]


@right.each
def test_a_right_answer_passes(name, answer):
    passes(name, answer)

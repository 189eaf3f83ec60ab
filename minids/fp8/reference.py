"""FP8 training in equations: the format, the scales, the products and their sums, as DeepSeek-V3 does it (section 3.3).

E4M3 has a sign, 4 bits of exponent and 3 of mantissa: 254 numbers of at most 448, about 6% apart. A tensor does not fit
into it as it is, so numbers that lie together share a scale, the largest of them divided by 448:

    x ~ x_fp8 * x_scale        1x128 tiles for activations and gradients, 128x128 blocks for weights

Tiles lie along the dimension that a product sums over, so that a scale is a factor of a partial sum, and can be taken
out of it. A Linear y = x W^T has three products, which sum over three different dimensions:

    Fprop  y  [M,N] = x  [M,K] W^T    sums over K    x in 1x128 tiles     W in blocks
    Dgrad  dx [M,K] = dy [M,N] W      sums over N    dy in 1x128 tiles    W in blocks, transposed: the same blocks
    Wgrad  dW [N,K] = dy^T x          sums over M    dy and x in 128x1 tiles: quantised anew

Sums: tensor cores add FP8 products with about 14 bits (Hopper), so every 128 products the partial sum goes, times its
scales, into an fp32 sum ("promotion"). `matmul_limited` imitates the 14 bits; the other functions sum in fp32.

A tile with a NaN or an infinity gets a scale of NaN, so all of it dequantises to NaN: never silently finite. A tile of
zeros gets the smallest scale. A last tile that is not full has fewer numbers, nothing else.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

TILE = 128  # numbers along the sum that share a scale; a block is TILE x TILE
E4M3, LARGEST = torch.float8_e4m3fn, 448.0
SMALLEST_SCALE = 2.0**-126  # the smallest normal fp32 number
STEP = 32  # products that one FP8 instruction of Hopper's tensor cores adds at a time


def decode_e4m3(codes: Tensor) -> Tensor:
    """Values fp32 of E4M3's bytes (uint8), any shape (2209.05433).

    (-1)^s 2^(e-7) (1 + m/8) of sign s, exponent e (4 bits), mantissa m (3 bits); (-1)^s 2^-6 m/8 if e = 0 (subnormal).
    e = 15, m = 7 is NaN; there is no infinity.
    """
    codes = codes.int()
    sign, e, m = 1 - 2 * (codes >> 7), codes >> 3 & 15, codes & 7
    value = torch.where(e == 0, m / 8 * 2.0**-6, torch.ldexp(1 + m / 8, e - 7))
    return torch.where((e == 15) & (m == 7), torch.nan, sign * value)


def round_to_e4m3(x: Tensor) -> Tensor:
    """The E4M3 number nearest to each of x (fp32 or fp64), in x's dtype; of two equally near the even mantissa.

    Beyond 448 it saturates at 448; NaN and infinities give NaN.
    """
    exponent = torch.frexp(x).exponent.sub(1).clamp_min(-6)  # of the leading bit; -6 from the subnormals down
    step = torch.ldexp(torch.ones_like(x), exponent - 3)
    rounded = (x / step).round() * step  # torch.round takes the even one of two
    return torch.where(x.isfinite(), rounded.clamp(-LARGEST, LARGEST), torch.nan)


def power_of_two_scale(scale: Tensor) -> Tensor:
    """The least power of 2 that is at least `scale` (positive fp32): 2^ceil(log2 s); one byte holds it (ue8m0)."""
    mantissa, exponent = torch.frexp(scale)  # the mantissa is 0.5 for a power of 2, then up to 1
    power = torch.ldexp(torch.ones_like(scale), exponent - (mantissa == 0.5).int())
    return torch.where(scale.isfinite(), power, scale)


def scale_of(amax: Tensor, power_of_2: bool = False) -> Tensor:
    """The scale fp32 of tiles whose largest magnitude is `amax`: amax / 448, by which 448 becomes the largest again."""
    amax = torch.where(amax.isfinite(), amax.float(), torch.nan)
    scale = (amax / torch.full_like(amax, LARGEST)).clamp_min(SMALLEST_SCALE)  # by a number: * (1 / 448) on a GPU
    return power_of_two_scale(scale) if power_of_2 else scale


def quantize_tiles(x: Tensor, power_of_2: bool = False) -> tuple[Tensor, Tensor]:
    """x [...,K] in 1x128 tiles: x_fp8 [...,K] e4m3 and x_scale [...,ceil(K/128)] fp32 (V3 3.3.2)."""
    K = x.shape[-1]
    tiles = F.pad(x.float(), (0, -K % TILE)).unflatten(-1, (-1, TILE))
    scale = scale_of(tiles.abs().amax(-1), power_of_2)
    x_fp8 = round_to_e4m3(tiles / scale.unsqueeze(-1)).flatten(-2)[..., :K]
    return x_fp8.to(E4M3), scale


def quantize_blocks(w: Tensor, power_of_2: bool = False) -> tuple[Tensor, Tensor]:
    """w [...,N,K] in 128x128 blocks: w_fp8 [...,N,K] e4m3 and w_scale [...,ceil(N/128),ceil(K/128)] fp32 (V3 3.3.2)."""
    N, K = w.shape[-2:]
    blocks = F.pad(w.float(), (0, -K % TILE, 0, -N % TILE)).unflatten(-1, (-1, TILE)).unflatten(-3, (-1, TILE))
    scale = scale_of(blocks.abs().amax((-3, -1)), power_of_2)
    w_fp8 = round_to_e4m3(blocks / scale[..., None, :, None]).flatten(-2).flatten(-3, -2)[..., :N, :K]
    return w_fp8.to(E4M3), scale


def dequantize_tiles(x_fp8: Tensor, x_scale: Tensor) -> Tensor:
    """x [...,K] fp32 of x_fp8 [...,K] and x_scale [...,ceil(K/128)]."""
    return x_fp8.float() * x_scale.repeat_interleave(TILE, -1)[..., : x_fp8.shape[-1]]


def dequantize_blocks(w_fp8: Tensor, w_scale: Tensor) -> Tensor:
    """w [...,N,K] fp32 of w_fp8 [...,N,K] and w_scale [...,ceil(N/128),ceil(K/128)]; the hub's `weight_scale_inv`."""
    return dequantize_tiles(w_fp8, w_scale.repeat_interleave(TILE, -2)[..., : w_fp8.shape[-2], :])


# The products ----------------------------------------------------------------------------------------------------


def matmul_blockscaled(x_fp8: Tensor, x_scale: Tensor, w_fp8: Tensor, w_scale: Tensor) -> Tensor:
    """y [M,N] fp32 = x w^T, 128 products at a time, each partial sum times its two scales (V3 figure 7b).

    x_fp8 [M,K] with x_scale [M,ceil(K/128)]; w_fp8 [N,K] with w_scale [ceil(N/128),ceil(K/128)] of blocks, or
    [N,ceil(K/128)] of tiles. Raises ValueError for scales of another shape, or where the two have not the same K.
    """
    check_scales("x", x_fp8, x_scale, (x_fp8.shape[0],))
    check_scales("w", w_fp8, w_scale, (w_fp8.shape[0], -(-w_fp8.shape[0] // TILE)))
    if x_fp8.shape[1] != w_fp8.shape[1]:
        shapes = f"x_fp8 is {list(x_fp8.shape)} and w_fp8 {list(w_fp8.shape)}"
        raise ValueError(f"{shapes}; both must end with the size of the sum, so give x [M,K] and w [N,K]")
    if len(w_scale) != len(w_fp8):
        w_scale = w_scale.repeat_interleave(TILE, 0)[: len(w_fp8)]
    y = torch.zeros(len(x_fp8), len(w_fp8), device=x_fp8.device)
    for tile in range(x_scale.shape[1]):
        along = slice(tile * TILE, (tile + 1) * TILE)
        partial = x_fp8[:, along].float() @ w_fp8[:, along].float().T
        y += partial * x_scale[:, tile, None] * w_scale[:, tile]
    return y


def check_scales(name, codes, scale, rows):
    """Raise ValueError unless codes are [*,K] and their `scale` is [one of `rows`, ceil(K/128)]."""
    columns = -(-codes.shape[-1] // TILE)
    if codes.dim() != 2 or scale.dim() != 2 or scale.shape[0] not in rows or scale.shape[1] != columns:
        wanted = " or ".join(str([n, columns]) for n in dict.fromkeys(rows))
        raise ValueError(
            f"{name}_fp8 is {list(codes.shape)} and {name}_scale {list(scale.shape)}; its scales are {wanted}"
        )


def fprop(x_fp8: Tensor, x_scale: Tensor, w_fp8: Tensor, w_scale: Tensor) -> Tensor:
    """y [M,N] fp32 = x W^T; x [M,K] in 1x128 tiles, W [N,K] in 128x128 blocks."""
    return matmul_blockscaled(x_fp8, x_scale, w_fp8, w_scale)


def dgrad(dy_fp8: Tensor, dy_scale: Tensor, w_fp8: Tensor, w_scale: Tensor) -> Tensor:
    """dx [M,K] fp32 = dy W; dy [M,N] in 1x128 tiles, W [N,K] in 128x128 blocks, which stay blocks when transposed."""
    return matmul_blockscaled(dy_fp8, dy_scale, w_fp8.T, w_scale.T)


def wgrad(dy: Tensor, x_fp8: Tensor, x_scale: Tensor, power_of_2: bool = False) -> Tensor:
    """dW [N,K] fp32 = dy^T x, both in 128x1 tiles along the tokens; dy [M,N], x [M,K] stored in 1x128 tiles (V3 3.3.2).

    x is dequantised, transposed and quantised anew: its scales lie along K, which this product does not sum over.
    """
    dy_t = quantize_tiles(dy.T, power_of_2)
    x_t = quantize_tiles(dequantize_tiles(x_fp8, x_scale).T, power_of_2)
    return matmul_blockscaled(*dy_t, *x_t)


# Sums of limited precision ---------------------------------------------------------------------------------------


def add_limited(acc: Tensor, products: Tensor, bits: int = 14) -> Tensor:
    """acc [...] plus products [...,n], each cut to the `bits` places from the largest's leading bit on, then added.

    An imitation of how Hopper's tensor cores add: they align by the largest exponent and drop what is shifted out.
    """
    terms = torch.cat([acc.unsqueeze(-1), products], -1)
    exponent = torch.frexp(terms.abs().amax(-1, keepdim=True)).exponent
    unit = torch.ldexp(torch.ones_like(terms[..., :1]), exponent - bits)
    return ((terms / unit).trunc() * unit).sum(-1)


def matmul_limited(a: Tensor, b: Tensor, bits: int = 14, promote: int | None = None) -> Tensor:
    """y [M,N] fp32 = a b^T, a [M,K], b [N,K], summed 32 products at a time with `bits` bits by `add_limited`.

    With `promote` the sum starts anew after so many products, and what it was goes into an fp32 sum (V3 3.3.2: 128).
    """
    total = acc = torch.zeros(len(a), len(b), device=a.device)
    for begin in range(0, a.shape[1], STEP):
        products = a[:, None, begin : begin + STEP].float() * b[None, :, begin : begin + STEP].float()
        acc = add_limited(acc, products, bits)
        if promote and (begin + STEP) % promote == 0:
            total, acc = total + acc, torch.zeros_like(acc)
    return total + acc

"""FP8 training where no GPU multiplies FP8: the functions of quantize_kernels.py and kernels.py, in torch.

Same names, arguments, results and layouts (xt_fp8 is a view of row-major codes here). What is quantised is quantised to
the same bits as in reference.py. A product dequantises its operands and multiplies them in fp32, or in bf16 where the
result is bf16 and all scales are powers of 2: a number of E4M3 has 4 significant bits, a power of 2 adds none, and bf16
has 8, so bf16 holds the operands exactly, and sums are in fp32 either way.

On a CPU a pass over the numbers costs what it reads and writes, so there are few: magnitudes are compared as integers,
whose order is the same (infinity and NaN come last, so no tile hides them); torch's cast rounds to the nearest E4M3; to
decode, a byte is looked up among 256 numbers, several times faster than by torch's own conversion.
"""

from functools import lru_cache

import torch
import torch.nn.functional as F

from minids.fp8.reference import E4M3, TILE, decode_e4m3, scale_of

MANTISSA = 0x7FFFFF  # of fp32


def cut(x, high, wide):
    """x [...,N,K] as its tiles [...,N/high,high,K/wide,wide], filled up with zeros; a tile is no larger than x."""
    high, wide = min(high, max(x.shape[-2], 1)), min(wide, max(x.shape[-1], 1))
    more = -x.shape[-2] % high, -x.shape[-1] % wide
    x = F.pad(x, (0, more[1], 0, more[0])) if any(more) else x
    return x.unflatten(-1, (-1, wide)).unflatten(-3, (-1, high))


def join(tiles, like):
    """The inverse of `cut`, in the shape of `like`."""
    return tiles.flatten(-2).flatten(-3, -2)[..., : like.shape[-2], : like.shape[-1]]


def quantize(x, high, wide, power_of_2):
    """Codes of x [...,N,K] (fp32, fp16 or bf16) in high x wide tiles, and scales [...,ceil(N/high),ceil(K/wide)]."""
    tiles = cut(x if x.dtype in (torch.float32, torch.bfloat16) else x.float(), high, wide)
    integer = torch.int16 if tiles.element_size() == 2 else torch.int32
    sizes = tiles.view(integer) & torch.iinfo(integer).max  # without the sign
    scale = scale_of(sizes.amax((-3, -1), keepdim=True).view(tiles.dtype), power_of_2)
    tiles = tiles * scale.reciprocal().to(tiles.dtype) if power_of_2 else tiles.float() / scale
    return join(tiles.to(E4M3), x), scale.squeeze(-1).squeeze(-2)


@lru_cache
def table(dtype, device):
    """The numbers of E4M3's 256 bytes."""
    return decode_e4m3(torch.arange(256, dtype=torch.uint8, device=device)).to(dtype)


def decode(codes, dtype):
    """The numbers of E4M3 codes, laid out as these are; NaN where they are."""
    if codes.dim() > 1 and codes.stride(-1) > codes.stride(-2):
        return decode(codes.mT, dtype).mT
    return table(dtype, codes.device).index_select(0, codes.view(torch.uint8).flatten().int()).view(codes.shape)


def dequantize(codes, scale, dtype):
    """codes [...,N,K] times `scale` of their tiles, 1x128 or 128x128; raises ValueError for scales of neither."""
    *batch, N, K = codes.shape
    good = [[*batch, rows, -(-K // TILE)] for rows in (-(-N // TILE), N)]
    if list(scale.shape) not in good:
        expected = " (blocks) or ".join(map(str, good))
        raise ValueError(f"codes are {list(codes.shape)} and their scales {list(scale.shape)}; give {expected} (tiles)")
    tiles = cut(decode(codes, dtype), TILE if list(scale.shape) == good[0] else 1, TILE)
    return join(tiles * scale[..., :, None, :, None].to(dtype), codes)


def operands(out_dtype, *pairs):
    """The dequantised operands of a product, in a dtype that holds them exactly (fp32: to its own rounding)."""
    exact = out_dtype == torch.bfloat16 and not any((s.view(torch.int32) & MANTISSA).any() for _, s in pairs)
    return [dequantize(*pair, torch.bfloat16 if exact else torch.float32) for pair in pairs]


# The functions of the kernels ------------------------------------------------------------------------------------


def quantize_tiles(x, power_of_2=False, both=False, ends=None):
    """As quantize_kernels.quantize_tiles."""
    rows = quantize(x, 1, TILE, power_of_2)
    return (*rows, *quantize_columns(x, power_of_2, ends)) if both else rows


def quantize_columns(x, power_of_2, ends):
    """xt_fp8 [K,M] and xt_scale of x [M,K]; with `ends` of experts [K,P], no tile holding two experts' tokens."""
    codes, scale = quantize(x if ends is None else spread(x, ends), TILE, 1, power_of_2)
    return codes.mT, scale.mT


def requantize_transposed(x_fp8, x_scale, power_of_2=False, ends=None):
    """As quantize_kernels.requantize_transposed."""
    return quantize_columns(*operands(torch.bfloat16, (x_fp8, x_scale)), power_of_2, ends)


def quantize_blocks(w, power_of_2=False, transposed=False):
    """As quantize_kernels.quantize_blocks."""
    codes, scale = quantize(w, TILE, TILE, power_of_2)
    return (codes, scale, codes.mT, scale.mT) if transposed else (codes, scale)


def dequantize_blocks(w_fp8, w_scale, dtype=torch.bfloat16):
    """As quantize_kernels.dequantize_blocks."""
    return dequantize(w_fp8, w_scale, torch.float32).to(dtype)


def matmul_blockscaled(x_fp8, x_scale, w_fp8, w_scale, out_dtype=torch.bfloat16):
    """As kernels.matmul_blockscaled."""
    x, w = operands(out_dtype, (x_fp8, x_scale), (w_fp8, w_scale))
    with torch.autocast(x.device.type, enabled=False):
        return F.linear(x, w).to(out_dtype)


def grouped_matmul(x_fp8, x_scale, w_fp8, w_scale, ends, out_dtype=torch.bfloat16):
    """As kernels.grouped_matmul."""
    x, w = operands(out_dtype, (x_fp8, x_scale), (w_fp8, w_scale))
    with torch.autocast(x.device.type, enabled=False):
        return torch.cat(list(map(F.linear, x.tensor_split(ends[:-1].cpu().long()), w))).to(out_dtype)


def grouped_wgrad(dyt_fp8, dyt_scale, xt_fp8, xt_scale, ends):
    """As kernels.grouped_wgrad."""
    (dyt, xt), first = operands(torch.float32, (dyt_fp8, dyt_scale), (xt_fp8, xt_scale)), (slots(ends) * TILE).tolist()
    with torch.autocast(xt.device.type, enabled=False):
        return torch.stack([d @ x.mT for d, x in zip(*(t.tensor_split(first[1:], 1) for t in (dyt, xt)), strict=True)])


def slots(ends):
    """The slot of 128 padded tokens at which each expert begins (kernels.py)."""
    return F.pad(ends[:-1], (1, 0)) // TILE + torch.arange(len(ends), device=ends.device)


def spread(x, ends):
    """x [N,K] with each expert's rows from its slot on, and zeros between: [P,K], P = (N // 128 + E) * 128."""
    row = torch.arange(len(x), device=x.device, dtype=ends.dtype)
    shift = slots(ends) * TILE - F.pad(ends[:-1], (1, 0))
    place = row + shift.to(ends.dtype)[torch.searchsorted(ends, row, right=True)]
    return x.new_zeros((len(x) // TILE + len(ends)) * TILE, x.shape[1]).index_copy(0, place.long(), x)

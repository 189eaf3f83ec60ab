"""Lesson 12: the three products of a Linear in FP8, and its forward and backward pass made of them."""

import torch

from minids.fp8 import reference
from minids.fp8.reference import (
    TILE,
    dequantize_blocks,
    dequantize_tiles,
    matmul_blockscaled,
    quantize_blocks,
    quantize_tiles,
)
from minids.lab.exercise import Exercise


def uneven(r, rows, columns, spread=2.0):
    """Numbers [rows,columns] whose rows and tiles differ in size, and a large one among them."""
    x = r.normal(rows, columns) * torch.exp(r.uniform(-spread, spread, rows, 1))
    x *= torch.exp(r.uniform(-1, 1, rows, -(-columns // TILE))).repeat_interleave(TILE, 1)[:, :columns]
    x[rows // 2, columns // 3] *= 30
    return x


def uneven_blocks(r, N, K):
    """Weights [N,K] whose blocks differ in size."""
    sizes = torch.exp(r.uniform(-1, 1, -(-N // TILE), -(-K // TILE)))
    return r.normal(N, K) * sizes.repeat_interleave(TILE, 0)[:N].repeat_interleave(TILE, 1)[:, :K]


def per_tensor(x, power_of_2=False):
    """x in codes that all share one scale, which is repeated as the scales of tiles."""
    scale = reference.scale_of(x.float().abs().max(), power_of_2)
    codes = reference.round_to_e4m3(x.float() / scale).to(reference.E4M3)
    return codes, scale.expand(len(x), -(-x.shape[1] // TILE))


def in_blocks(x, power_of_2=False):
    """x in 128x128 blocks, their scales repeated as those of tiles."""
    codes, scale = quantize_blocks(x, power_of_2)
    return codes, scale.repeat_interleave(TILE, 0)[: len(x)]


def first_tokens_scale(x_scale):
    """[ceil(K/128),ceil(M/128)]: of each 128 tokens the first one's scales, as if they were those of blocks."""
    return x_scale[::TILE].T


SHAPES = [
    {"M": 24, "N": 256, "K": 256},
    {"M": 140, "N": 300, "K": 200},
    {"M": 3, "N": 7, "K": 131},
    {"M": 130, "N": 129, "K": 20},
]

# 12.1 ----------------------------------------------------------------------------------------------------------------

FPROP = Exercise(
    "12.1",
    reference.fprop,
    minutes=4,
    sizes=SHAPES,
    hints=[
        "matmul_blockscaled multiplies its first argument by the TRANSPOSE of its second: what is left to do?",
        "One line: return matmul_blockscaled of the four arguments, in the order in which they come. Nothing is transposed "
        "and nothing is quantised anew; the scales of tiles go with x, those of blocks with W.",
    ],
)


@FPROP.inputs
def _(r, M, N, K):
    return *quantize_tiles(uneven(r, M, K)), *quantize_blocks(uneven_blocks(r, N, K))


@FPROP.wrong("W is transposed once too often: matmul_blockscaled(x, W) is x W^T already, so it takes W [N,K] as it is.")
def transposes_w(x_fp8, x_scale, w_fp8, w_scale):
    return matmul_blockscaled(x_fp8, x_scale, w_fp8.T, w_scale.T)


@FPROP.wrong("The result is [N,M]: the rows of y are the tokens, so x comes first and W second.")
def transposed_y(x_fp8, x_scale, w_fp8, w_scale):
    return matmul_blockscaled(x_fp8, x_scale, w_fp8, w_scale).T


@FPROP.wrong("The scales of x and W are exchanged: matmul_blockscaled takes each tensor's codes, then its own scales.")
def scales_exchanged(x_fp8, x_scale, w_fp8, w_scale):
    return matmul_blockscaled(x_fp8, w_scale, w_fp8, x_scale)


@FPROP.wrong("Codes alone are multiplied: each 128 products have two scales, that of x's tile and that of W's block.")
def codes_alone(x_fp8, x_scale, w_fp8, w_scale):
    return x_fp8.float() @ w_fp8.float().T


@FPROP.wrong("W's scales are missing: dequantise it too, or leave both to matmul_blockscaled.")
def codes_of_w(x_fp8, x_scale, w_fp8, w_scale):
    return dequantize_tiles(x_fp8, x_scale).float() @ w_fp8.float().T


@FPROP.wrong("x's scales are missing: dequantise it too, or leave both to matmul_blockscaled.")
def codes_of_x(x_fp8, x_scale, w_fp8, w_scale):
    return x_fp8.float() @ dequantize_blocks(w_fp8, w_scale).float().T


@FPROP.wrong("x has 1x128 tiles, not blocks: each token has scales of its own. You use one token's for 128 of them.")
def x_as_blocks(x_fp8, x_scale, w_fp8, w_scale):
    x = dequantize_blocks(x_fp8, x_scale[::TILE])
    return x.float() @ dequantize_blocks(w_fp8, w_scale).float().T


@FPROP.wrong("The product is computed in bfloat16, 8 bits: the sums of FP8 products are kept in float32.")
def sums_in_bfloat16(x_fp8, x_scale, w_fp8, w_scale):
    x, w = dequantize_tiles(x_fp8, x_scale), dequantize_blocks(w_fp8, w_scale)
    return (x.bfloat16() @ w.bfloat16().T).float()


@FPROP.wrong(
    "W's codes are transposed, its scales are not, and neither should be: matmul_blockscaled(x, W) is x W^T already."
)
def transposes_codes_of_w(x_fp8, x_scale, w_fp8, w_scale):
    return matmul_blockscaled(x_fp8, x_scale, w_fp8.T, w_scale)


@FPROP.wrong(
    "W comes first: its rows would be the rows of y, and blocks are taken for the second factor only. First x, then W."
)
def w_first(x_fp8, x_scale, w_fp8, w_scale):
    return matmul_blockscaled(w_fp8, w_scale, x_fp8, x_scale)


@FPROP.wrong("W's scales are transposed: they are [ceil(N/128), ceil(K/128)], as W is, so hand them on as they come.")
def transposes_scales_of_w(x_fp8, x_scale, w_fp8, w_scale):
    return matmul_blockscaled(x_fp8, x_scale, w_fp8, w_scale.T)


@FPROP.wrong("@ multiplies the codes alone, and its result is FP8 again: scales are missing, and sums need float32.")
def product_of_fp8(x_fp8, x_scale, w_fp8, w_scale):
    return x_fp8 @ w_fp8.T


@FPROP.wrong("You divide by the scales: x is x_fp8 TIMES x_scale.")
def divides_by_scales(x_fp8, x_scale, w_fp8, w_scale):
    return matmul_blockscaled(x_fp8, 1 / x_scale, w_fp8, 1 / w_scale)


@FPROP.wrong(
    "Each token has the scale of its first tile throughout, and W that of its first block: every tile has its own."
)
def first_scales(x_fp8, x_scale, w_fp8, w_scale):
    return x_fp8.float() @ w_fp8.float().T * x_scale[:, :1] * w_scale[0, 0]


@FPROP.wrong(
    "The last tile along K is dropped where 128 does not divide it: there are ceil(K / 128), the last one shorter."
)
def last_tile_of_k(x_fp8, x_scale, w_fp8, w_scale):
    k = x_fp8.shape[1] // TILE * TILE
    return dequantize_tiles(x_fp8, x_scale)[:, :k].float() @ dequantize_blocks(w_fp8, w_scale)[:, :k].float().T


@FPROP.wrong(
    "W's scales are stretched along the columns only, all rows with those of the first block row: a block is 128 rows by 128 "
    "columns."
)
def first_block_row_of_w(x_fp8, x_scale, w_fp8, w_scale):
    return dequantize_tiles(x_fp8, x_scale).float() @ dequantize_tiles(w_fp8, w_scale[:1]).float().T


# 12.2 ----------------------------------------------------------------------------------------------------------------

DGRAD = Exercise(
    "12.2",
    reference.dgrad,
    minutes=8,
    sizes=SHAPES,
    hints=[
        "matmul_blockscaled(a, b) is a b^T and sums over the LAST dimension of both. Here the sum goes over N. Where is N in "
        "dy [M,N], and where is it in W [N,K]?",
        "The second operand must be [K,N], so it is w_fp8.T. A square block stays a block when the matrix is turned, and block "
        "(i, j) comes to (j, i): its scales are w_scale.T. Nothing is quantised anew.",
    ],
)


@DGRAD.inputs
def _(r, M, N, K):
    return *quantize_tiles(uneven(r, M, N)), *quantize_blocks(uneven_blocks(r, N, K))


@DGRAD.wrong(
    "W's codes are transposed, its scales are not: block (i, j) of W is block (j, i) of W^T, so the scales are w_scale.T."
)
def scales_not_transposed(dy_fp8, dy_scale, w_fp8, w_scale):
    return matmul_blockscaled(dy_fp8, dy_scale, w_fp8.T, w_scale)


@DGRAD.wrong(
    "W is not transposed: this is dy W^T, the sum over K. Dgrad sums over N, the outputs, so the second operand is W^T [K,N]."
)
def w_not_transposed(dy_fp8, dy_scale, w_fp8, w_scale):
    return matmul_blockscaled(dy_fp8, dy_scale, w_fp8, w_scale)


@DGRAD.wrong("W's scales are transposed, its codes are not: turn both.")
def codes_not_transposed(dy_fp8, dy_scale, w_fp8, w_scale):
    return matmul_blockscaled(dy_fp8, dy_scale, w_fp8, w_scale.T)


@DGRAD.wrong(
    "reshape does not transpose: it keeps the numbers in their order and cuts the rows elsewhere. Use w_fp8.T and w_scale.T."
)
def reshaped(dy_fp8, dy_scale, w_fp8, w_scale):
    N, K = w_fp8.shape
    return matmul_blockscaled(dy_fp8, dy_scale, w_fp8.reshape(K, N), w_scale.reshape(w_scale.shape[::-1]))


@DGRAD.wrong(
    "W is dequantised, turned, and quantised in 1x128 tiles: a second rounding, for nothing. Its blocks stay blocks when turned."
)
def requantised_in_tiles(dy_fp8, dy_scale, w_fp8, w_scale):
    return matmul_blockscaled(dy_fp8, dy_scale, *quantize_tiles(dequantize_blocks(w_fp8, w_scale).T))


@DGRAD.wrong("The result is [K,M]: rows of dx are tokens, as those of x are.")
def transposed_dx(dy_fp8, dy_scale, w_fp8, w_scale):
    return reference.dgrad(dy_fp8, dy_scale, w_fp8, w_scale).T


@DGRAD.wrong("Codes alone are multiplied: dy's tiles and W's blocks both have scales.")
def dgrad_codes_alone(dy_fp8, dy_scale, w_fp8, w_scale):
    return dy_fp8.float() @ w_fp8.float()


@DGRAD.wrong("W's scales are missing: codes alone are not W, whether you quantise them once more or not.")
def dgrad_without_w_scale(dy_fp8, dy_scale, w_fp8, w_scale):
    return dequantize_tiles(dy_fp8, dy_scale).float() @ w_fp8.float()


@DGRAD.wrong("dy's scales are missing.")
def dgrad_without_dy_scale(dy_fp8, dy_scale, w_fp8, w_scale):
    return dy_fp8.float() @ dequantize_blocks(w_fp8, w_scale).float()


@DGRAD.wrong(
    "W's scales are stretched along the columns only, all rows with those of the first block row: a block is 128 rows high."
)
def first_block_row(dy_fp8, dy_scale, w_fp8, w_scale):
    return dequantize_tiles(dy_fp8, dy_scale).float() @ dequantize_tiles(w_fp8, w_scale[:1]).float()


@DGRAD.wrong("dy has 1x128 tiles: each token has scales of its own. You use one token's for 128 of them.")
def dy_as_blocks(dy_fp8, dy_scale, w_fp8, w_scale):
    return dequantize_blocks(dy_fp8, dy_scale[::TILE]).float() @ dequantize_blocks(w_fp8, w_scale).float()


@DGRAD.wrong(
    "The last tile along N is dropped where 128 does not divide it: there are ceil(N / 128) tiles, the last one shorter."
)
def last_tile_of_n(dy_fp8, dy_scale, w_fp8, w_scale):
    n = len(w_fp8) // TILE * TILE
    return dequantize_tiles(dy_fp8, dy_scale)[:, :n].float() @ dequantize_blocks(w_fp8, w_scale)[:n].float()


@DGRAD.wrong("The product is computed in bfloat16, 8 bits: the sums of FP8 products are kept in float32.")
def dgrad_in_bfloat16(dy_fp8, dy_scale, w_fp8, w_scale):
    dy, w = dequantize_tiles(dy_fp8, dy_scale), dequantize_blocks(w_fp8, w_scale)
    return (dy.bfloat16() @ w.bfloat16()).float()


@DGRAD.wrong(
    "dy is transposed: its N is last already, and dx has a row for each token. W alone must be turned, codes and scales."
)
def dy_turned(dy_fp8, dy_scale, w_fp8, w_scale):
    return matmul_blockscaled(dy_fp8.T, dy_scale.T, w_fp8.T, w_scale.T)


@DGRAD.wrong("W comes first: blocks are taken for the second factor only. First dy, then W, turned.")
def turned_w_first(dy_fp8, dy_scale, w_fp8, w_scale):
    return matmul_blockscaled(w_fp8.T, w_scale.T, dy_fp8, dy_scale)


@DGRAD.wrong("Each token of dy has the scale of its first tile throughout: every tile has its own.")
def first_scale_of_dy(dy_fp8, dy_scale, w_fp8, w_scale):
    return (dy_fp8.float() * dy_scale[:, :1]) @ dequantize_blocks(w_fp8, w_scale).float()


@DGRAD.wrong("W passes through bfloat16, which rounds it once more: stay in float32.")
def w_in_bfloat16(dy_fp8, dy_scale, w_fp8, w_scale):
    return dequantize_tiles(dy_fp8, dy_scale).float() @ dequantize_blocks(w_fp8, w_scale).bfloat16().float()


@DGRAD.wrong("W is turned and quantised anew with powers of 2: a second rounding, for nothing. Turn codes and scales.")
def requantised_in_powers(dy_fp8, dy_scale, w_fp8, w_scale):
    return matmul_blockscaled(dy_fp8, dy_scale, *quantize_blocks(dequantize_blocks(w_fp8, w_scale).T, True))


# 12.3 ----------------------------------------------------------------------------------------------------------------

WGRAD = Exercise(
    "12.3",
    reference.wgrad,
    minutes=14,
    sizes=[{**shape, "power_of_2": power} for shape, power in zip(SHAPES, (False, False, True, True), strict=True)],
    hints=[
        "The sum goes over the tokens M, so both operands must have M last, and tiles along it: dy^T [N,M] and x^T [K,M]. Of "
        "x you have codes whose scales lie along K. What must you do before you can give x^T scales along M?",
        "Get x back first, dequantize_tiles(x_fp8, x_scale); then quantise its transpose: quantize_tiles(x.T, power_of_2). dy "
        "was never quantised: quantize_tiles(dy.T, power_of_2). matmul_blockscaled of the two is [N,K].",
    ],
)


@WGRAD.inputs
def _(r, M, N, K, power_of_2):
    return uneven(r, M, N), *quantize_tiles(uneven(r, M, K), power_of_2), power_of_2


@WGRAD.wrong(
    "The 1x128 tiles are only transposed: then each 128 tokens are multiplied with the scales of the FIRST of them. Scales "
    "that lie along K are no factors of a sum over M: dequantise, transpose, quantise anew."
)
def first_tokens_scales(dy, x_fp8, x_scale, power_of_2=False):
    return matmul_blockscaled(*quantize_tiles(dy.T, power_of_2), x_fp8.T, first_tokens_scale(x_scale))


@WGRAD.wrong(
    "x's codes stay, with the largest of each 128 tokens' scales: the codes were made with their own scales, so most tokens "
    "come out too large. Dequantise, transpose, quantise anew."
)
def largest_tokens_scales(dy, x_fp8, x_scale, power_of_2=False):
    scale = torch.stack([part.amax(0) for part in x_scale.split(TILE)]).T
    return matmul_blockscaled(*quantize_tiles(dy.T, power_of_2), x_fp8.T, scale)


@WGRAD.wrong(
    "x's codes and scales are transposed as they are: the scales [ceil(K/128),M] lie along K, and this product sums over M. "
    "Dequantise, transpose, quantise anew."
)
def both_transposed(dy, x_fp8, x_scale, power_of_2=False):
    return matmul_blockscaled(*quantize_tiles(dy.T, power_of_2), x_fp8.T, x_scale.T)


@WGRAD.wrong("x's codes are quantised anew, but their scales are forgotten: dequantise first.")
def not_dequantised(dy, x_fp8, x_scale, power_of_2=False):
    return matmul_blockscaled(*quantize_tiles(dy.T, power_of_2), *quantize_tiles(x_fp8.float().T, power_of_2))


@WGRAD.wrong(
    "x is dequantised, but not quantised anew along the tokens: this is no product of FP8 numbers. quantize_tiles(x.T)."
)
def x_stays_wide(dy, x_fp8, x_scale, power_of_2=False):
    dy = dequantize_tiles(*quantize_tiles(dy.T, power_of_2))
    return dy @ dequantize_tiles(x_fp8, x_scale).float()


@WGRAD.wrong("dy is multiplied as it is: it must be FP8 too, in tiles along the tokens: quantize_tiles(dy.T).")
def dy_stays_wide(dy, x_fp8, x_scale, power_of_2=False):
    x = dequantize_tiles(*quantize_tiles(dequantize_tiles(x_fp8, x_scale).T, power_of_2))
    return dy.float().T @ x.T


@WGRAD.wrong("Nothing is quantised along the tokens: this is the product of dy and x in float32.")
def all_wide(dy, x_fp8, x_scale, power_of_2=False):
    return dy.float().T @ dequantize_tiles(x_fp8, x_scale).float()


@WGRAD.wrong(
    "dy is quantised along N, as for Dgrad: here the sum goes over the tokens. Quantise its transpose, quantize_tiles(dy.T)."
)
def dy_along_n(dy, x_fp8, x_scale, power_of_2=False):
    dy = dequantize_tiles(*quantize_tiles(dy, power_of_2))
    x = dequantize_tiles(*quantize_tiles(dequantize_tiles(x_fp8, x_scale).T, power_of_2))
    return dy.T @ x.T


@WGRAD.wrong(
    "dy is rounded twice: first along N, then along the tokens. It is at hand as it was: quantise dy.T, once. (Only x has "
    "been stored in FP8.)"
)
def dy_rounded_twice(dy, x_fp8, x_scale, power_of_2=False):
    dy = dequantize_tiles(*quantize_tiles(dy, power_of_2))
    return reference.wgrad(dy, x_fp8, x_scale, power_of_2)


@WGRAD.wrong("dy is quantised in 128x128 blocks: gradients get tiles, here 128 tokens of one output.")
def dy_in_blocks(dy, x_fp8, x_scale, power_of_2=False):
    x = quantize_tiles(dequantize_tiles(x_fp8, x_scale).T, power_of_2)
    return matmul_blockscaled(*quantize_blocks(dy.T, power_of_2), *x)


@WGRAD.wrong("x is quantised anew in 128x128 blocks: activations get tiles, here 128 tokens of one input.")
def x_in_blocks(dy, x_fp8, x_scale, power_of_2=False):
    x = quantize_blocks(dequantize_tiles(x_fp8, x_scale).T, power_of_2)
    return matmul_blockscaled(*quantize_tiles(dy.T, power_of_2), *x)


@WGRAD.wrong("The result is [K,N]: dW has W's shape, so dy^T comes first and x^T second.")
def transposed_dw(dy, x_fp8, x_scale, power_of_2=False):
    return reference.wgrad(dy, x_fp8, x_scale, power_of_2).T


@WGRAD.wrong("power_of_2 is not passed on: hand it to both calls of quantize_tiles.")
def never_powers(dy, x_fp8, x_scale, power_of_2=False):
    return reference.wgrad(dy, x_fp8, x_scale, False)


@WGRAD.wrong("power_of_2 is passed on for x only: dy's scales are rounded to powers of 2 too.")
def powers_for_x(dy, x_fp8, x_scale, power_of_2=False):
    x = quantize_tiles(dequantize_tiles(x_fp8, x_scale).T, power_of_2)
    return matmul_blockscaled(*quantize_tiles(dy.T), *x)


@WGRAD.wrong("power_of_2 is passed on for dy only: x's new scales are rounded to powers of 2 too.")
def powers_for_dy(dy, x_fp8, x_scale, power_of_2=False):
    x = quantize_tiles(dequantize_tiles(x_fp8, x_scale).T)
    return matmul_blockscaled(*quantize_tiles(dy.T, power_of_2), *x)


@WGRAD.wrong("The sum over the tokens is divided by their number: dW is the sum; a mean is the loss's business.")
def mean_over_tokens(dy, x_fp8, x_scale, power_of_2=False):
    return reference.wgrad(dy, x_fp8, x_scale, power_of_2) / len(dy)


@WGRAD.wrong(
    "Between dequantising and quantising x passes through bfloat16, which rounds it once more: stay in float32. (With "
    "power-of-2 scales nobody would notice.)"
)
def through_bfloat16(dy, x_fp8, x_scale, power_of_2=False):
    x = quantize_tiles(dequantize_tiles(x_fp8, x_scale).bfloat16().T, power_of_2)
    return matmul_blockscaled(*quantize_tiles(dy.T, power_of_2), *x)


@WGRAD.wrong("x is not transposed: the tokens must be LAST in both factors, x^T [K,M]. quantize_tiles of x.T.")
def x_not_turned(dy, x_fp8, x_scale, power_of_2=False):
    x = quantize_tiles(dequantize_tiles(x_fp8, x_scale), power_of_2)
    return matmul_blockscaled(*quantize_tiles(dy.T, power_of_2), *x)


@WGRAD.wrong("dy is not transposed: the tokens must be LAST in both factors, dy^T [N,M]. quantize_tiles of dy.T.")
def dy_not_turned(dy, x_fp8, x_scale, power_of_2=False):
    x = quantize_tiles(dequantize_tiles(x_fp8, x_scale).T, power_of_2)
    return matmul_blockscaled(*quantize_tiles(dy, power_of_2), *x)


@WGRAD.wrong("Neither factor is transposed: the tokens must be LAST in both. quantize_tiles of dy.T, and of x.T.")
def neither_turned(dy, x_fp8, x_scale, power_of_2=False):
    x = quantize_tiles(dequantize_tiles(x_fp8, x_scale), power_of_2)
    return matmul_blockscaled(*quantize_tiles(dy, power_of_2), *x)


@WGRAD.wrong(
    "dy is quantised first and turned afterwards: its tiles then lie across the sum. Turn first, then quantise: "
    "quantize_tiles(dy.T)."
)
def dy_turned_after(dy, x_fp8, x_scale, power_of_2=False):
    codes, scale = quantize_tiles(dy, power_of_2)
    x = quantize_tiles(dequantize_tiles(x_fp8, x_scale).T, power_of_2)
    return matmul_blockscaled(codes.T, scale.T, *x)


@WGRAD.wrong("power_of_2 is always True here: hand on the argument.")
def always_powers(dy, x_fp8, x_scale, power_of_2=False):
    return reference.wgrad(dy, x_fp8, x_scale, True)


@WGRAD.wrong("x is transposed before it is dequantised: its scales lie along K, so dequantise first, then transpose.")
def turned_too_early(dy, x_fp8, x_scale, power_of_2=False):
    x = quantize_tiles(dequantize_tiles(x_fp8.T, x_scale.T), power_of_2)
    return matmul_blockscaled(*quantize_tiles(dy.T, power_of_2), *x)


@WGRAD.wrong("dy is rounded to bfloat16 first: take it as it came.")
def dy_in_bfloat16(dy, x_fp8, x_scale, power_of_2=False):
    return reference.wgrad(dy.bfloat16().float(), x_fp8, x_scale, power_of_2)


@WGRAD.wrong("x is divided by its scales: it is x_fp8 TIMES x_scale, which dequantize_tiles gives.")
def x_divided_by_scales(dy, x_fp8, x_scale, power_of_2=False):
    x = quantize_tiles(dequantize_tiles(x_fp8, 1 / x_scale).T, power_of_2)
    return matmul_blockscaled(*quantize_tiles(dy.T, power_of_2), *x)


@WGRAD.wrong(
    "Nothing is quantised, and x's codes lack their scales: dequantise x, then quantise both along the tokens."
)
def wide_dy_with_codes(dy, x_fp8, x_scale, power_of_2=False):
    return dy.float().T @ x_fp8.float()


@WGRAD.wrong(
    "reshape does not transpose: it keeps the numbers in their order and cuts the rows elsewhere. Use dy.T and x.T."
)
def reshaped_not_turned(dy, x_fp8, x_scale, power_of_2=False):
    x = dequantize_tiles(x_fp8, x_scale)
    x = quantize_tiles(x.reshape(x.shape[::-1]), power_of_2)
    return matmul_blockscaled(*quantize_tiles(dy.reshape(dy.shape[::-1]), power_of_2), *x)


@WGRAD.wrong(
    "The last tokens are dropped where 128 does not divide their number: the last tile is shorter, and counts."
)
def last_tokens_dropped(dy, x_fp8, x_scale, power_of_2=False):
    whole = len(dy) // TILE * TILE
    return reference.wgrad(dy[:whole], x_fp8[:whole], x_scale[:whole], power_of_2)


# 12.4 ----------------------------------------------------------------------------------------------------------------


def linear_forward(x, w, power_of_2=False):
    """(y, x_fp8, x_scale, w_fp8, w_scale) of y = x W^T in FP8: the result, and what backward needs."""
    kept = *quantize_tiles(x, power_of_2), *quantize_blocks(w, power_of_2)
    return reference.fprop(*kept), *kept


LINEAR_FORWARD = Exercise(
    "12.4",
    linear_forward,
    minutes=7,
    sizes=WGRAD.sizes,
    hints=[
        "Three things: quantise x, quantise w, multiply. Which of the two gets tiles, and which gets blocks? What is kept for "
        "backward is exactly what was multiplied.",
        "x_fp8, x_scale = quantize_tiles(x, power_of_2); the same for w with quantize_blocks; y = my_fprop of the four; return "
        "y and then the four, in that order.",
    ],
)


@LINEAR_FORWARD.inputs
def _(r, M, N, K, power_of_2):
    return uneven(r, M, K), uneven_blocks(r, N, K), power_of_2


def forward_of(x, w):
    """y of two pairs of codes and scales, and the pairs."""
    return matmul_blockscaled(*x, *w), *x, *w


@LINEAR_FORWARD.wrong(
    "w is quantised in 1x128 tiles along K: for Dgrad it must be turned, and a tile that is turned lies across the sum. "
    "Weights get 128x128 blocks."
)
def w_in_tiles(x, w, power_of_2=False):
    return forward_of(quantize_tiles(x, power_of_2), quantize_tiles(w, power_of_2))


@LINEAR_FORWARD.wrong(
    "x is quantised in 128x128 blocks: 128 tokens then share a scale, and the loudest ruins the others. Activations get tiles."
)
def x_in_128_blocks(x, w, power_of_2=False):
    return forward_of(in_blocks(x, power_of_2), quantize_blocks(w, power_of_2))


@LINEAR_FORWARD.wrong("One scale serves all of x: it is one for each 1x128 tile.")
def x_per_tensor(x, w, power_of_2=False):
    return forward_of(per_tensor(x, power_of_2), quantize_blocks(w, power_of_2))


@LINEAR_FORWARD.wrong("y is the product of the UNQUANTISED x and w: then nothing is gained. Multiply what is kept.")
def y_of_wide(x, w, power_of_2=False):
    return x.float() @ w.float().T, *linear_forward(x, w, power_of_2)[1:]


@LINEAR_FORWARD.wrong("y is computed with the unquantised w: both factors are FP8.")
def y_of_wide_w(x, w, power_of_2=False):
    kept = linear_forward(x, w, power_of_2)[1:]
    return dequantize_tiles(*kept[:2]) @ w.float().T, *kept


@LINEAR_FORWARD.wrong("y is computed with the unquantised x: both factors are FP8.")
def y_of_wide_x(x, w, power_of_2=False):
    kept = linear_forward(x, w, power_of_2)[1:]
    return x.float() @ dequantize_blocks(*kept[2:]).T, *kept


@LINEAR_FORWARD.wrong("y is the product of the codes: scales are missing. fprop takes the four.")
def y_of_codes(x, w, power_of_2=False):
    kept = linear_forward(x, w, power_of_2)[1:]
    return kept[0].float() @ kept[2].float().T, *kept


@LINEAR_FORWARD.wrong(
    "What is kept is dequantised: four bytes a number instead of one. Keep codes and scales; backward works with these."
)
def keeps_wide(x, w, power_of_2=False):
    y, x_fp8, x_scale, w_fp8, w_scale = linear_forward(x, w, power_of_2)
    return y, dequantize_tiles(x_fp8, x_scale), x_scale, dequantize_blocks(w_fp8, w_scale), w_scale


@LINEAR_FORWARD.wrong("x and w themselves are kept, beside the scales: keep the CODES, one byte a number.")
def keeps_the_inputs(x, w, power_of_2=False):
    y, _, x_scale, _, w_scale = linear_forward(x, w, power_of_2)
    return y, x.clone(), x_scale, w.clone(), w_scale


@LINEAR_FORWARD.wrong("Only y comes back: backward needs x_fp8, x_scale, w_fp8 and w_scale too.")
def y_alone(x, w, power_of_2=False):
    return linear_forward(x, w, power_of_2)[0]


@LINEAR_FORWARD.wrong("y comes last: the order is y, x_fp8, x_scale, w_fp8, w_scale.")
def y_comes_last(x, w, power_of_2=False):
    y, *kept = linear_forward(x, w, power_of_2)
    return *kept, y


@LINEAR_FORWARD.wrong("The four are nested in a tuple of their own: give five results in a row, return y, *kept.")
def nested(x, w, power_of_2=False):
    y, *kept = linear_forward(x, w, power_of_2)
    return y, tuple(kept)


@LINEAR_FORWARD.wrong("power_of_2 is not passed on: hand it to both quantisers.")
def forward_never_powers(x, w, power_of_2=False):
    return linear_forward(x, w)


@LINEAR_FORWARD.wrong("power_of_2 is passed on for x only: w's scales are rounded to powers of 2 too.")
def forward_powers_for_x(x, w, power_of_2=False):
    return forward_of(quantize_tiles(x, power_of_2), quantize_blocks(w))


@LINEAR_FORWARD.wrong("y is in bfloat16: the product's sums are float32, and what comes after may round them.")
def y_in_bfloat16(x, w, power_of_2=False):
    y, *kept = linear_forward(x, w, power_of_2)
    return y.bfloat16().float(), *kept


@LINEAR_FORWARD.wrong(
    "x and w themselves are kept: keep what was multiplied, the codes AND scales of both, four tensors."
)
def keeps_x_and_w(x, w, power_of_2=False):
    return linear_forward(x, w, power_of_2)[0], x, w


@LINEAR_FORWARD.wrong("Codes and scales come as two pairs: give five results in a row, with a star before each pair.")
def two_pairs(x, w, power_of_2=False):
    return linear_forward(x, w, power_of_2)[0], quantize_tiles(x, power_of_2), quantize_blocks(w, power_of_2)


@LINEAR_FORWARD.wrong(
    "What is kept of w comes before what is kept of x: the order is y, x_fp8, x_scale, w_fp8, w_scale."
)
def w_kept_first(x, w, power_of_2=False):
    y, x_fp8, x_scale, w_fp8, w_scale = linear_forward(x, w, power_of_2)
    return y, w_fp8, w_scale, x_fp8, x_scale


@LINEAR_FORWARD.wrong("power_of_2 is passed on for w only: x's scales are rounded to powers of 2 too.")
def forward_powers_for_w(x, w, power_of_2=False):
    return forward_of(quantize_tiles(x), quantize_blocks(w, power_of_2))


@LINEAR_FORWARD.wrong("power_of_2 is always True here: hand on the argument.")
def forward_always_powers(x, w, power_of_2=False):
    return linear_forward(x, w, True)


@LINEAR_FORWARD.wrong("Both codes come before both scales: the order is y, x_fp8, x_scale, w_fp8, w_scale.")
def codes_before_scales(x, w, power_of_2=False):
    y, x_fp8, x_scale, w_fp8, w_scale = linear_forward(x, w, power_of_2)
    return y, x_fp8, w_fp8, x_scale, w_scale


@LINEAR_FORWARD.wrong("The scales come before their codes: the order is y, x_fp8, x_scale, w_fp8, w_scale.")
def scales_before_codes(x, w, power_of_2=False):
    y, x_fp8, x_scale, w_fp8, w_scale = linear_forward(x, w, power_of_2)
    return y, x_scale, x_fp8, w_scale, w_fp8


@LINEAR_FORWARD.wrong("The layouts are swapped: x gets 1x128 tiles, w gets 128x128 blocks.")
def layouts_swapped(x, w, power_of_2=False):
    return forward_of(quantize_blocks(x, power_of_2), quantize_tiles(w, power_of_2))


@LINEAR_FORWARD.wrong("y is [N,M]: its rows are the tokens, so x comes first.")
def y_turned(x, w, power_of_2=False):
    y, *kept = linear_forward(x, w, power_of_2)
    return y.T, *kept


@LINEAR_FORWARD.wrong("One scale serves all of w: it is one for each 128x128 block.")
def w_per_tensor(x, w, power_of_2=False):
    codes, scale = per_tensor(w, power_of_2)
    return forward_of(quantize_tiles(x, power_of_2), (codes, scale[::TILE]))


@LINEAR_FORWARD.wrong(
    "What is kept of w is turned: backward turns it itself, keep w_fp8 and w_scale as they were multiplied."
)
def w_kept_turned(x, w, power_of_2=False):
    y, x_fp8, x_scale, w_fp8, w_scale = linear_forward(x, w, power_of_2)
    return y, x_fp8, x_scale, w_fp8.T, w_scale.T


@LINEAR_FORWARD.wrong("x and w are rounded to bfloat16 before they are quantised: quantise them as they come.")
def through_bfloat16_first(x, w, power_of_2=False):
    return linear_forward(x.bfloat16().float(), w.bfloat16().float(), power_of_2)


# 12.5 ----------------------------------------------------------------------------------------------------------------


def linear_backward(dy, x_fp8, x_scale, w_fp8, w_scale, power_of_2=False):
    """(dx, dW) of y = x W^T in FP8, of dy and of what `linear_forward` kept."""
    dx = reference.dgrad(*quantize_tiles(dy, power_of_2), w_fp8, w_scale)
    return dx, reference.wgrad(dy, x_fp8, x_scale, power_of_2)


LINEAR_BACKWARD = Exercise(
    "12.5",
    linear_backward,
    minutes=8,
    sizes=WGRAD.sizes,
    hints=[
        "Both products are there. What does each one need of dy: dy itself or its codes, and with scales along which "
        "dimension?",
        "my_dgrad takes codes: quantize_tiles(dy, power_of_2) gives them, in tiles along N. my_wgrad quantises dy itself, along "
        "the tokens: give it dy as it came. Return (dx, dw).",
    ],
)


@LINEAR_BACKWARD.inputs
def _(r, M, N, K, power_of_2):
    kept = linear_forward(uneven(r, M, K), uneven_blocks(r, N, K), power_of_2)[1:]
    return uneven(r, M, N), *kept, power_of_2


@LINEAR_BACKWARD.wrong(
    "For dx, dy is quantised in 128x128 blocks: the layout with which training diverged at DeepSeek. Gradients get 1x128 tiles."
)
def gradient_in_blocks(dy, x_fp8, x_scale, w_fp8, w_scale, power_of_2=False):
    dx = reference.dgrad(*in_blocks(dy, power_of_2), w_fp8, w_scale)
    return dx, reference.wgrad(dy, x_fp8, x_scale, power_of_2)


@LINEAR_BACKWARD.wrong("For dx, one scale serves all of dy: gradients get one for each 1x128 tile.")
def gradient_per_tensor(dy, x_fp8, x_scale, w_fp8, w_scale, power_of_2=False):
    dx = reference.dgrad(*per_tensor(dy, power_of_2), w_fp8, w_scale)
    return dx, reference.wgrad(dy, x_fp8, x_scale, power_of_2)


@LINEAR_BACKWARD.wrong("dx is made of the unquantised dy: Dgrad is a product of FP8 numbers too. quantize_tiles(dy).")
def dx_of_wide_dy(dy, x_fp8, x_scale, w_fp8, w_scale, power_of_2=False):
    dx = dy.float() @ dequantize_blocks(w_fp8, w_scale).float()
    return dx, reference.wgrad(dy, x_fp8, x_scale, power_of_2)


@LINEAR_BACKWARD.wrong(
    "dW is made of dy as it was rounded for Dgrad, along N, and rounded again along the tokens: give my_wgrad dy itself."
)
def dw_of_rounded_dy(dy, x_fp8, x_scale, w_fp8, w_scale, power_of_2=False):
    dy_tiles = quantize_tiles(dy, power_of_2)
    dx = reference.dgrad(*dy_tiles, w_fp8, w_scale)
    return dx, reference.wgrad(dequantize_tiles(*dy_tiles), x_fp8, x_scale, power_of_2)


@LINEAR_BACKWARD.wrong("dW is made of dy's CODES, without their scales: my_wgrad takes dy itself.")
def dw_of_codes(dy, x_fp8, x_scale, w_fp8, w_scale, power_of_2=False):
    dy_tiles = quantize_tiles(dy, power_of_2)
    dx = reference.dgrad(*dy_tiles, w_fp8, w_scale)
    return dx, reference.wgrad(dy_tiles[0].float(), x_fp8, x_scale, power_of_2)


@LINEAR_BACKWARD.wrong(
    "dW is made of x's forward tiles, with the first token's scale for each 128: my_wgrad quantises x anew."
)
def dw_of_forward_tiles(dy, x_fp8, x_scale, w_fp8, w_scale, power_of_2=False):
    dx = linear_backward(dy, x_fp8, x_scale, w_fp8, w_scale, power_of_2)[0]
    return dx, first_tokens_scales(dy, x_fp8, x_scale, power_of_2)


@LINEAR_BACKWARD.wrong("dW is a product in float32: Wgrad is a product of FP8 numbers too, my_wgrad makes it.")
def dw_wide(dy, x_fp8, x_scale, w_fp8, w_scale, power_of_2=False):
    dx = linear_backward(dy, x_fp8, x_scale, w_fp8, w_scale, power_of_2)[0]
    return dx, all_wide(dy, x_fp8, x_scale)


@LINEAR_BACKWARD.wrong("The order is dx first, then dW, as x comes before w.")
def order_swapped(dy, x_fp8, x_scale, w_fp8, w_scale, power_of_2=False):
    return linear_backward(dy, x_fp8, x_scale, w_fp8, w_scale, power_of_2)[::-1]


@LINEAR_BACKWARD.wrong("dW is [K,N]: it has W's shape, [N,K].")
def dw_turned(dy, x_fp8, x_scale, w_fp8, w_scale, power_of_2=False):
    dx, dw = linear_backward(dy, x_fp8, x_scale, w_fp8, w_scale, power_of_2)
    return dx, dw.T


@LINEAR_BACKWARD.wrong("power_of_2 is not passed on: hand it to quantize_tiles and to my_wgrad.")
def backward_never_powers(dy, x_fp8, x_scale, w_fp8, w_scale, power_of_2=False):
    return linear_backward(dy, x_fp8, x_scale, w_fp8, w_scale)


@LINEAR_BACKWARD.wrong("power_of_2 is not passed on to my_wgrad.")
def powers_for_dx_alone(dy, x_fp8, x_scale, w_fp8, w_scale, power_of_2=False):
    dx = linear_backward(dy, x_fp8, x_scale, w_fp8, w_scale, power_of_2)[0]
    return dx, reference.wgrad(dy, x_fp8, x_scale)


@LINEAR_BACKWARD.wrong("power_of_2 is not passed on to quantize_tiles, where dy is quantised for dx.")
def powers_for_dw_alone(dy, x_fp8, x_scale, w_fp8, w_scale, power_of_2=False):
    dx = reference.dgrad(*quantize_tiles(dy), w_fp8, w_scale)
    return dx, reference.wgrad(dy, x_fp8, x_scale, power_of_2)


@LINEAR_BACKWARD.wrong("The gradients are rounded to bfloat16: both products give float32.")
def gradients_in_bfloat16(dy, x_fp8, x_scale, w_fp8, w_scale, power_of_2=False):
    dx, dw = linear_backward(dy, x_fp8, x_scale, w_fp8, w_scale, power_of_2)
    return dx.bfloat16().float(), dw.bfloat16().float()


@LINEAR_BACKWARD.wrong("Only dx comes back: the weight needs its gradient too.")
def dx_alone(dy, x_fp8, x_scale, w_fp8, w_scale, power_of_2=False):
    return linear_backward(dy, x_fp8, x_scale, w_fp8, w_scale, power_of_2)[0]


@LINEAR_BACKWARD.wrong(
    "dy is never quantised: both products here are in float32. Dgrad takes quantize_tiles(dy); my_wgrad quantises for itself."
)
def nothing_quantised(dy, x_fp8, x_scale, w_fp8, w_scale, power_of_2=False):
    dx = dy.float() @ dequantize_blocks(w_fp8, w_scale).float()
    return dx, all_wide(dy, x_fp8, x_scale)


@LINEAR_BACKWARD.wrong("power_of_2 is always True here: hand on the argument.")
def backward_always_powers(dy, x_fp8, x_scale, w_fp8, w_scale, power_of_2=False):
    return linear_backward(dy, x_fp8, x_scale, w_fp8, w_scale, True)


@LINEAR_BACKWARD.wrong("dx is made by my_fprop, dy W^T, which sums over K: Dgrad sums over N, my_dgrad.")
def fprop_for_dx(dy, x_fp8, x_scale, w_fp8, w_scale, power_of_2=False):
    dx = reference.fprop(*quantize_tiles(dy, power_of_2), w_fp8, w_scale)
    return dx, reference.wgrad(dy, x_fp8, x_scale, power_of_2)


@LINEAR_BACKWARD.wrong("dW is divided by the number of tokens: it is their sum; a mean is the loss's business.")
def dw_as_a_mean(dy, x_fp8, x_scale, w_fp8, w_scale, power_of_2=False):
    dx, dw = linear_backward(dy, x_fp8, x_scale, w_fp8, w_scale, power_of_2)
    return dx, dw / len(dy)


@LINEAR_BACKWARD.wrong(
    "For dx, dy is quantised transposed: Dgrad sums over N, which is last in dy as it is. quantize_tiles(dy)."
)
def dy_turned_for_dx(dy, x_fp8, x_scale, w_fp8, w_scale, power_of_2=False):
    dx = reference.dgrad(*quantize_tiles(dy.T, power_of_2), w_fp8, w_scale)
    return dx, reference.wgrad(dy, x_fp8, x_scale, power_of_2)


@LINEAR_BACKWARD.wrong("x and w are exchanged: dx needs what is kept of w, dW what is kept of x.")
def kept_exchanged(dy, x_fp8, x_scale, w_fp8, w_scale, power_of_2=False):
    dx = reference.dgrad(*quantize_tiles(dy, power_of_2), x_fp8, x_scale)
    return dx, reference.wgrad(dy, w_fp8, w_scale, power_of_2)


@LINEAR_BACKWARD.wrong("dy is rounded to bfloat16 before it is quantised: take it as it came, both times.")
def dy_through_bfloat16(dy, x_fp8, x_scale, w_fp8, w_scale, power_of_2=False):
    return linear_backward(dy.bfloat16().float(), x_fp8, x_scale, w_fp8, w_scale, power_of_2)


@LINEAR_BACKWARD.wrong("Only dW comes back: the layer before needs dx.")
def dw_alone(dy, x_fp8, x_scale, w_fp8, w_scale, power_of_2=False):
    return reference.wgrad(dy, x_fp8, x_scale, power_of_2)

"""Lesson 05: five kernels, from the simplest to the backward pass of a norm; what counts is bytes beside values."""

import torch

from minids import layers
from minids.lab.exercise import Exercise
from minids.lab.tiles import tl, triton

BOTH = (torch.float32, torch.float16)


# 1. One block a program ----------------------------------------------------------------------------------------------


@triton.jit
def scale_kernel(x, out, factor, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(out + at, tl.load(x + at) * factor)


def scale(x, factor, block):
    """x [n] times factor."""
    return x * factor


def launch_scale(kernel, x, factor, block):
    """One program for each block of x, whose length is a multiple of `block`."""
    out = torch.empty_like(x)
    kernel[(x.numel() // block,)](x, out, factor, BLOCK=block)
    return out


SCALE = Exercise(
    "05.1",
    scale,
    kernel=scale_kernel,
    launch=launch_scale,
    traffic=lambda x, factor, block: 2 * x.nbytes,
    minutes=6,
    sizes=[{"n": 64, "block": 16}, {"n": 12, "block": 4}, {"n": 8, "block": 8}, {"n": 96, "block": 8}],
    hints=[
        "Program p owns the numbers from p·BLOCK up to (p+1)·BLOCK - 1. What are their offsets, as a block?",
        "at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK) are the offsets; tl.load(x + at) gives the numbers, and "
        "tl.store(out + at, ...) writes as many.",
    ],
)


@SCALE.inputs
def _(r, n, block):
    return r.normal(n), float(r.uniform(2, 3)), block


SCALE.slip(
    "no_program",
    "Every program works on the same first block: add tl.program_id(0) * BLOCK to the offsets, so that each has its own.",
    ("tl.program_id(0) * BLOCK + ", ""),
)

SCALE.slip(
    "one_apart",
    "The programs overlap: program 1 begins at offset 1 instead of BLOCK. Multiply tl.program_id(0) by BLOCK.",
    ("tl.program_id(0) * BLOCK", "tl.program_id(0)"),
)

SCALE.slip(
    "counts_from_one",
    "tl.arange(0, BLOCK) begins at 0, and so do the offsets: with the + 1 the last program leaves the tensor.",
    ("tl.arange(0, BLOCK)", "tl.arange(0, BLOCK) + 1"),
)

SCALE.slip(
    "in_place",
    "The result goes back into x: tl.store must get the pointer out + at. `out` is never written.",
    ("out + at", "x + at"),
)

SCALE.slip(
    "scaled_offsets",
    "The OFFSETS are multiplied by factor: multiply what tl.load gives, the numbers of x.",
    ("tl.load(x + at)", "at"),
)

SCALE.slip(
    "added_factor",
    "The factor is added: the result is x times factor.",
    ("* factor", "+ factor"),
)

SCALE.slip(
    "copied",
    "The numbers are copied, not scaled: multiply what tl.load gives by factor.",
    (" * factor", ""),
)

SCALE.slip(
    "one_number",
    "Each program handles a single number: its offsets are one number, not a block. Add tl.arange(0, BLOCK) to them.",
    (" + tl.arange(0, BLOCK)", ""),
)


SCALE.slip(
    "loads_the_first_block",
    "Every program LOADS the first block, and stores it at its own place: both use the same offsets, x + at and out + at.",
    ("tl.load(x + at)", "tl.load(x + tl.arange(0, BLOCK))"),
)

SCALE.slip(
    "loads_one_number",
    "tl.load(x) is a single number, the first of all: tl.load(x + at) gives the block of this program.",
    ("tl.load(x + at)", "tl.load(x)"),
)

SCALE.slip(
    "brackets",
    "A pointer has no brackets: x[at] is read by tl.load(x + at), and out[at] = … is tl.store(out + at, …).",
    ("tl.store(out + at, tl.load(x + at) * factor)", "out[at] = x[at] * factor"),
)

SCALE.slip(
    "pointers_multiplied",
    "x + at are ADDRESSES, and an address times factor is nothing: multiply what tl.load(x + at) reads there.",
    ("tl.load(x + at) * factor", "(x + at) * factor"),
)

SCALE.slip(
    "stored_at_the_pointer",
    "A block of numbers is stored at a single place, out: each number needs its own, out + at.",
    ("tl.store(out + at", "tl.store(out"),
)


# 2. A mask -----------------------------------------------------------------------------------------------------------


@triton.jit
def add_kernel(x, y, out, n, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = at < n
    tl.store(out + at, tl.load(x + at, mask=inside) + tl.load(y + at, mask=inside), mask=inside)


def add(x, y, block):
    """x [n] + y [n]."""
    return x + y


def launch_add(kernel, x, y, block):
    """As many programs as it takes; the last one may have lanes without a number."""
    out = torch.empty_like(x)
    n = x.numel()
    kernel[(triton.cdiv(n, block),)](x, y, out, n, BLOCK=block)
    return out


ADD = Exercise(
    "05.2",
    add,
    kernel=add_kernel,
    launch=launch_add,
    traffic=lambda x, y, block: 3 * x.nbytes,
    minutes=8,
    sizes=[{"n": 64, "block": 16}, {"n": 37, "block": 16}, {"n": 5, "block": 8}, {"n": 65, "block": 32}],
    hints=[
        "The last program has more lanes than numbers are left. Which comparison is True for the lanes with a number?",
        "inside = at < n is a block of True and False; give it to BOTH loads and to the store as mask=inside.",
    ],
)


@ADD.inputs
def _(r, n, block):
    return r.normal(n), r.normal(n), block


ADD.slip(
    "no_mask",
    "There is no mask: the last program reads and writes behind the end. inside = at < n, for loads and store.",
    (", mask=inside", ""),
)

ADD.slip(
    "store_without_mask",
    "The loads have their mask, the store has none: it writes behind the end of `out`, into memory of others.",
    ("), mask=inside", ")"),
)

ADD.slip(
    "loads_without_mask",
    "The store has its mask, the loads have none: they read behind the end. The values come out right, and on a GPU the "
    "program may crash all the same.",
    ("at, mask=inside", "at"),
)

ADD.slip(
    "one_load_without_mask",
    "One of the two loads has no mask: x and y end at the same place, so both need it.",
    ("y + at, mask=inside", "y + at"),
)

ADD.slip(
    "mask_too_long",
    "The mask is off by one: the last offset is n - 1, so at < n, without the =.",
    ("at < n", "at <= n"),
)

ADD.slip(
    "mask_too_short",
    "The mask is off by one at the end: the last number, at offset n - 1, is left out.",
    ("at < n", "at < n - 1"),
)

ADD.slip(
    "mask_of_the_lane",
    "The mask compares the offset INSIDE the block, tl.arange, with n; compare the whole offset, `at`.",
    ("at < n", "tl.arange(0, BLOCK) < n"),
)

ADD.slip(
    "mask_of_the_block",
    "The mask compares with BLOCK: only the first program writes. Compare the offsets with n.",
    ("at < n", "at < BLOCK"),
    ("), mask=inside", "), mask=inside & (at < n)"),
)

ADD.slip(
    "whole_blocks_alone",
    "A program whose block is not full is masked off altogether: mask single lanes, at < n, not programs.",
    ("at < n", "(at < n) & ((tl.program_id(0) + 1) * BLOCK <= n)"),
)

ADD.slip(
    "twice_x",
    "x is loaded twice, and y never: the second pointer is y + at.",
    ("y + at", "x + at"),
)

ADD.slip(
    "through_memory",
    "The sum is right, but it is stored, loaded and stored again: add in a variable, and store once, at the end.",
    (
        "tl.store(out + at, tl.load(x + at",
        ("tl.store(out + at, tl.load(x + at, mask=inside), mask=inside)\ntl.store(out + at, tl.load(out + at"),
    ),
)


ADD.slip(
    "add_no_program",
    "Every program works on the same first block: add tl.program_id(0) * BLOCK to the offsets, as in exercise 1.",
    ("tl.program_id(0) * BLOCK + ", ""),
)

ADD.slip(
    "mask_of_the_rest",
    "The mask counts in every block as in the last one, up to n % BLOCK: compare the whole offset, at < n, which is True "
    "for all lanes of a full block.",
    ("at < n", "tl.arange(0, BLOCK) < n % BLOCK"),
)

ADD.slip(
    "one_number_of_y",
    "tl.load(y) is a single number, the first of all, added to each of x: the block is at y + at.",
    ("tl.load(y + at, mask=inside)", "tl.load(y)"),
)


# 3. A row, read once -------------------------------------------------------------------------------------------------


@triton.jit
def rms_norm_kernel(x, weight, y, M, N, stride, eps, BLOCK: tl.constexpr):
    column = tl.arange(0, BLOCK)
    inside = column < N
    w = tl.load(weight + column, mask=inside, other=0.0)
    for row in range(tl.program_id(0), M, tl.num_programs(0)):
        value = tl.load(x + row * stride + column, mask=inside, other=0.0).to(tl.float32)
        r = 1.0 / tl.sqrt(tl.sum(value * value, 0) / N + eps)
        tl.store(y + row * N + column, value * r * w, mask=inside)


def rms_norm(x, weight, eps, programs):
    """x [M,N] over the root mean square of each row, times weight [N]."""
    return layers.rms_norm(x, weight, eps)


def launch_rms_norm(kernel, x, weight, eps, programs):
    """`programs` programs share the rows of x, which may be apart in memory; a block holds a whole row."""
    (M, N), y = x.shape, torch.empty(x.shape, dtype=x.dtype, device=x.device)
    kernel[(programs,)](x, weight, y, M, N, x.stride(0), eps, BLOCK=triton.next_power_of_2(N))
    return y


def rms_norm_bytes(x, weight, eps, programs):
    """Each row read and written once, the weight read once by each program."""
    return 2 * x.nbytes + programs * weight.nbytes


ROWS = [{"M": 16, "N": 8, "programs": 8}, {"M": 7, "N": 37, "programs": 3}, {"M": 3, "N": 5, "programs": 3}]
ROWS += [{"M": 9, "N": 33, "programs": 2}]

RMS_NORM = Exercise(
    "05.3",
    rms_norm,
    kernel=rms_norm_kernel,
    launch=launch_rms_norm,
    traffic=rms_norm_bytes,
    minutes=12,
    dtypes=BOTH,
    sizes=ROWS,
    hints=[
        "Load a row once, into a variable, as float32; everything else is arithmetic on that variable and one store.",
        "For each row: value = tl.load(x + row * stride + column, mask=column < N, other=0.0).to(tl.float32), then "
        "r = 1 / tl.sqrt(tl.sum(value * value, 0) / N + eps). The weight is the same for all rows: load it before.",
    ],
)


@RMS_NORM.inputs
def _(r, M, N, programs):
    x = 300 * r.normal(M, N)  # squares of 300 are beyond float16
    x[1] *= 1e-5  # and beside those of one row eps counts
    return x, r.normal(N), 1e-5, programs


RMS_NORM.slip(
    "no_other",
    "The masked lanes of x are used without `other`: what they hold is undefined (NaN in this check), and the sum takes "
    "them in. Give tl.load other=0.0, which adds nothing.",
    (", other=0.0", ""),
)

RMS_NORM.slip(
    "no_mask_in_a_row",
    "There is no mask: BLOCK is the next power of two, so the last lanes of a row are those of the next row, and behind "
    "the last row there is nothing. Mask with column < N.",
    (", other=0.0", ""),
    (", mask=inside", ""),
)

RMS_NORM.slip(
    "mean_over_block",
    "The mean is over BLOCK lanes: the padding is no number of the row. Divide the sum by N.",
    ("/ N", "/ BLOCK"),
)

RMS_NORM.slip(
    "sum_of_squares",
    "You divide by the root of the SUM of squares: RMSNorm takes their MEAN, so divide the sum by N.",
    (" / N", ""),
)

RMS_NORM.slip(
    "squares_in_float16",
    "The squares are taken in float16, whose largest number is 65504 = 256 squared, nearly: 300 squared is infinite. "
    "Write .to(tl.float32) right behind the load.",
    (".to(tl.float32)", ""),
    ("tl.sum(value * value, 0) / N + eps", "(tl.sum(value * value, 0) / N + eps).to(tl.float32)"),
)

RMS_NORM.slip(
    "no_stride",
    "The rows of x lie `stride` numbers apart, which is more than N where x is a slice of something wider: load from "
    "x + row * stride. (y is new and has no gaps: row * N is right there.)",
    ("row * stride", "row * N"),
)

RMS_NORM.slip(
    "stride_in_y",
    "`stride` is the distance of rows in x. y is new memory without gaps: its rows are N apart.",
    ("row * N", "row * stride"),
)

RMS_NORM.slip(
    "one_row_a_program",
    "Each program does one row only, and there are more rows than programs: program p takes rows p, p + programs, … in a "
    "loop: for row in range(tl.program_id(0), M, tl.num_programs(0)).",
    ("M, tl.num_programs(0)", "tl.program_id(0) + 1"),
)

RMS_NORM.slip(
    "no_weight",
    "The weight is missing: multiply by it before the store.",
    ("r * w", "r"),
)

RMS_NORM.slip(
    "reads_x_twice",
    "The values are right, but x is read twice, once for the sum and once for the result: keep the row in a variable. "
    "Sparing that second trip to memory is what this kernel is for.",
    ("value * r * w", "tl.load(x + row * stride + column, mask=inside, other=0.0).to(tl.float32) * r * w"),
)

RMS_NORM.slip(
    "weight_in_the_loop",
    "The values are right, but the weight is loaded again for each row: it does not change, so load it before the loop.",
    ("w = tl.load(weight + column, mask=inside, other=0.0)", ""),
    ("r * w", "r * tl.load(weight + column, mask=inside, other=0.0)"),
)


RMS_NORM.slip(
    "no_eps",
    "eps is missing: it is added to the mean of the squares, under the root. (A row of small numbers shows it.)",
    (" + eps", ""),
)

RMS_NORM.slip(
    "eps_beside_the_root",
    "eps is added to the root: it belongs UNDER it, to the mean of the squares.",
    ("tl.sqrt(tl.sum(value * value, 0) / N + eps)", "(tl.sqrt(tl.sum(value * value, 0) / N) + eps)"),
)

RMS_NORM.slip(
    "no_root",
    "The root is missing: a row is divided by the ROOT of the mean of its squares.",
    ("tl.sqrt(tl.sum(value * value, 0) / N + eps)", "(tl.sum(value * value, 0) / N + eps)"),
)

RMS_NORM.slip(
    "mean_subtracted",
    "You subtract the row's mean first: that is LayerNorm. RMSNorm divides by the root mean square alone.",
    (
        "r = 1.0",
        "value = tl.where(inside, value - tl.sum(value, 0) / N, 0.0)\nr = 1.0",
    ),
)

RMS_NORM.slip(
    "converted_too_late",
    "The squares are taken in float16, and only then converted: 300 squared is beyond 65504, so it is infinite already. "
    "Write .to(tl.float32) right behind the load.",
    (".to(tl.float32)", ""),
    ("tl.sum(value * value, 0)", "tl.sum((value * value).to(tl.float32), 0)"),
)

RMS_NORM.slip(
    "rows_left_over",
    "Each program does M // P rows, one after the other, and what M leaves over is never written: rows p, p + P, … up to M.",
    (
        "range(tl.program_id(0), M, tl.num_programs(0))",
        "range(tl.program_id(0) * (M // tl.num_programs(0)), (tl.program_id(0) + 1) * (M // tl.num_programs(0)))",
    ),
)


# 4. A row longer than a block ----------------------------------------------------------------------------------------


@triton.jit
def softmax_online_kernel(x, y, N, BLOCK: tl.constexpr):
    row = tl.program_id(0) * N
    column = tl.arange(0, BLOCK)
    largest = -float("inf")
    total = 0.0
    for start in range(0, N, BLOCK):
        at = start + column
        value = tl.load(x + row + at, mask=at < N, other=-float("inf")).to(tl.float32)
        new = tl.maximum(largest, tl.max(value, 0))
        total = total * tl.exp(largest - new) + tl.sum(tl.exp(value - new), 0)
        largest = new
    for start in range(0, N, BLOCK):
        at = start + column
        value = tl.load(x + row + at, mask=at < N).to(tl.float32)
        tl.store(y + row + at, tl.exp(value - largest) / total, mask=at < N)


def softmax(x, block):
    """The softmax of each row of x [M,N]."""
    return x.softmax(-1)


def launch_softmax(kernel, x, block):
    """One program a row; a row is longer than a block."""
    x = x.contiguous()
    y = torch.empty_like(x)
    kernel[(len(x),)](x, y, x.shape[1], BLOCK=block)
    return y


SOFTMAX = Exercise(
    "05.4",
    softmax,
    kernel=softmax_online_kernel,
    launch=launch_softmax,
    traffic=lambda x, block: 3 * x.nbytes,
    minutes=14,
    dtypes=BOTH,
    sizes=[
        {"M": 8, "N": 16, "block": 8, "at": 0},
        {"M": 3, "N": 37, "block": 8, "at": -200},
        {"M": 1, "N": 530, "block": 256, "at": 200},  # more than whoever writes a fixed size expects
        {"M": 2, "N": 5, "block": 8, "at": 0},
    ],
    hints=[
        "A sum of exponentials that was taken with an old maximum m is off by the factor e^(m - new).",
        "For each block: new = tl.maximum(largest, tl.max(value, 0)); total = total * tl.exp(largest - new) + "
        "tl.sum(tl.exp(value - new), 0); largest = new. Lanes without a number are -inf: their e^ is 0.",
    ],
)


@SOFTMAX.inputs
def _(r, M, N, block, at):
    return 3 * r.normal(M, N) + at, block


SOFTMAX.slip(
    "not_rescaled",
    "The sum is not rescaled: the terms that were added under the old maximum must be multiplied by "
    "exp(old maximum - new maximum) before those of this block are added.",
    ("total * tl.exp(largest - new)", "total"),
)

SOFTMAX.slip(
    "max_not_carried",
    "The maximum is not carried: each block takes its own, and the last one's is used for the whole row. "
    "new = tl.maximum(largest, tl.max(value, 0)) keeps the larger one.",
    ("tl.maximum(largest, tl.max(value, 0))", "tl.max(value, 0)"),
    ("total * tl.exp(largest - new)", "total"),
)

SOFTMAX.slip(
    "sum_not_carried",
    "The sum is not carried: each block begins anew, and the row is divided by the sum of its last block. "
    "Add to the (rescaled) total.",
    ("total * tl.exp(largest - new) + ", ""),
)

SOFTMAX.slip(
    "rescaled_upside_down",
    "The factor is upside down: an old sum shrinks when the maximum grows, so exp(old - new), which is at most 1.",
    (
        'largest = -float("inf")',
        'largest = tl.max(tl.load(x + row + column, mask=column < N, other=-float("inf")).to(tl.float32), 0)',
    ),
    ("largest - new", "new - largest"),
)

SOFTMAX.slip(
    "padded_with_zero",
    "The padding is 0, which is a score like any other: e^0 = 1 is added for each lane without a number, and 0 may be the "
    'largest. Use other=-float("inf").',
    ('other=-float("inf")', "other=0.0"),
)

SOFTMAX.slip(
    "undefined_padding",
    "The first load has no `other`: lanes without a number are undefined (NaN in this check), and the sum takes them in. "
    'Use other=-float("inf"), whose exponential is 0.',
    (', other=-float("inf")', ""),
)

SOFTMAX.slip(
    "no_maximum",
    "No maximum is subtracted: e^200 is beyond float32, and e^-200 is 0. Subtract the row's maximum.",
    (" * tl.exp(largest - new)", ""),
    ("value - new", "value"),
    ("value - largest", "value"),
)

SOFTMAX.slip(
    "begins_at_zero",
    "The maximum begins at 0: where all scores are far below, every exponential is 0, and 0/0 is NaN. Begin with "
    '-float("inf").',
    ('largest = -float("inf")', "largest = 0.0"),
)

SOFTMAX.slip(
    "first_block_alone",
    "Only the first block of each row is done: a row is longer than BLOCK, so walk over it, "
    "for start in range(0, N, BLOCK).",
    ("range(0, N, BLOCK)", "range(0, 1)"),
)


@SOFTMAX.wrong(
    "Each block is a softmax of its own: the row as a whole must sum to 1. First walk over all blocks for the maximum and "
    "the sum, then write."
)
@triton.jit
def each_block_alone(x, y, N, BLOCK: tl.constexpr):
    row = tl.program_id(0) * N
    for start in range(0, N, BLOCK):
        at = start + tl.arange(0, BLOCK)
        value = tl.load(x + row + at, mask=at < N, other=-float("inf")).to(tl.float32)
        power = tl.exp(value - tl.max(value, 0))
        tl.store(y + row + at, power / tl.sum(power, 0), mask=at < N)


SOFTMAX.slip(
    "blocks_divide",
    "The block size is assumed to divide the row: the last block runs into the next row, or out of the tensor. "
    "Mask with at < N.",
    (', other=-float("inf")', ""),
    (", mask=at < N", ""),
)


SOFTMAX.slip(
    "maximum_not_kept",
    "`largest` is still -infinity in the next round: write largest = new at the end of the loop, for the second pass and the "
    "next factor need it.",
    ("largest = new", ""),
)

SOFTMAX.slip(
    "all_of_the_sum_rescaled",
    "The terms of this block are rescaled, too: they are taken with the new maximum already. Only the OLD total is "
    "multiplied by exp(largest - new).",
    (
        "total * tl.exp(largest - new) + tl.sum(tl.exp(value - new), 0)",
        "(total + tl.sum(tl.exp(value - new), 0)) * tl.exp(largest - new)",
    ),
)

SOFTMAX.slip(
    "new_terms_with_the_old_maximum",
    "The terms of this block are taken with the OLD maximum: exp(value - new), for the sum is one of the new.",
    ("tl.exp(value - new)", "tl.exp(value - largest)"),
)

SOFTMAX.slip(
    "lane_by_lane",
    "The maximum is still a block, one for each lane: tl.max(value, 0) makes one number of it, which all lanes share.",
    ("tl.max(value, 0)", "value"),
)

SOFTMAX.slip(
    "first_row_alone",
    "The first pass reads the first row in every program: row p begins at `row`, so x + row + at.",
    ("value = tl.load(x + row + at, mask=at < N, other", "value = tl.load(x + at, mask=at < N, other"),
)

SOFTMAX.slip(
    "stored_in_the_first_pass",
    "The values come out right, but the first pass stores too, a trip to memory more: what it writes is overwritten.",
    ("largest = new", "largest = new\ntl.store(y + row + at, tl.exp(value - new), mask=at < N)"),
)


@SOFTMAX.wrong(
    "The values are right, but the row is read three times: for the maximum, for the sum, and to write. Load a block once, "
    "into a variable; carry maximum and sum in ONE pass, and rescale the sum whenever the maximum grows."
)
@triton.jit
def three_passes(x, y, N, BLOCK: tl.constexpr):
    row = tl.program_id(0) * N
    column = tl.arange(0, BLOCK)
    largest = -float("inf")
    for start in range(0, N, BLOCK):
        at = start + column
        value = tl.load(x + row + at, mask=at < N, other=-float("inf")).to(tl.float32)
        largest = tl.maximum(largest, tl.max(value, 0))
    total = 0.0
    for start in range(0, N, BLOCK):
        at = start + column
        value = tl.load(x + row + at, mask=at < N, other=-float("inf")).to(tl.float32)
        total = total + tl.sum(tl.exp(value - largest), 0)
    for start in range(0, N, BLOCK):
        at = start + column
        value = tl.load(x + row + at, mask=at < N).to(tl.float32)
        tl.store(y + row + at, tl.exp(value - largest) / total, mask=at < N)


@SOFTMAX.wrong(
    "The exponentials go to memory and come back to be divided: four trips. Recompute them in the second pass from x, "
    "which is as much to read, and nothing has to be written first."
)
@triton.jit
def numerators_to_memory(x, y, N, BLOCK: tl.constexpr):
    row = tl.program_id(0) * N
    column = tl.arange(0, BLOCK)
    largest = -float("inf")
    for start in range(0, N, BLOCK):
        at = start + column
        value = tl.load(x + row + at, mask=at < N, other=-float("inf")).to(tl.float32)
        largest = tl.maximum(largest, tl.max(value, 0))
    total = 0.0
    for start in range(0, N, BLOCK):
        at = start + column
        power = tl.exp(tl.load(x + row + at, mask=at < N, other=-float("inf")).to(tl.float32) - largest)
        tl.store(y + row + at, power, mask=at < N)
        total = total + tl.sum(power, 0)
    for start in range(0, N, BLOCK):
        at = start + column
        power = tl.load(y + row + at, mask=at < N).to(tl.float32)
        tl.store(y + row + at, power / total, mask=at < N)


# 5. The way back -----------------------------------------------------------------------------------------------------


@triton.jit
def rms_norm_backward_kernel(x, weight, r, dy, dx, M, N, BLOCK: tl.constexpr):
    column = tl.arange(0, BLOCK)
    inside = column < N
    w = tl.load(weight + column, mask=inside, other=0.0)
    for row in range(tl.program_id(0), M, tl.num_programs(0)):
        at = row * N + column
        factor = tl.load(r + row)
        n = tl.load(x + at, mask=inside, other=0.0) * factor
        g = tl.load(dy + at, mask=inside, other=0.0) * w
        tl.store(dx + at, factor * (g - n * (tl.sum(n * g, 0) / N)), mask=inside)


def rms_norm_dx(x, weight, r, dy, programs):
    """The gradient [M,N] of x, of the gradient dy [M,N] of x * r * weight; r [M] is 1/rms of each row."""
    n, g = x * r[:, None], dy * weight
    return r[:, None] * (g - n * (n * g).mean(-1, keepdim=True))


def launch_backward(kernel, x, weight, r, dy, programs):
    """`programs` programs share the rows; a block holds a whole row."""
    x, dy = x.contiguous(), dy.contiguous()
    (M, N), dx = x.shape, torch.empty_like(x)
    kernel[(programs,)](x, weight, r, dy, dx, M, N, BLOCK=triton.next_power_of_2(N))
    return dx


BACKWARD = Exercise(
    "05.5",
    rms_norm_dx,
    kernel=rms_norm_backward_kernel,
    launch=launch_backward,
    traffic=lambda x, weight, r, dy, programs: 3 * x.nbytes + r.nbytes + programs * weight.nbytes,
    minutes=14,
    sizes=ROWS,
    hints=[
        "Two blocks of a row are loaded, x and dy; n and g are made of them in registers; the mean is one number.",
        "n = x * r of the row, g = dy * weight; then dx = r * (g - n * (tl.sum(n * g, 0) / N)).",
    ],
)


@BACKWARD.inputs
def _(r, M, N, programs):
    x = 2 * r.normal(M, N)
    # an eps that counts: whoever computes r again has none
    return x, r.normal(N), torch.rsqrt(x.square().mean(-1) + 0.5), r.normal(M, N), programs


BACKWARD.slip(
    "norm_held_fixed",
    "The norm is treated as a constant: r depends on all of the row, and that gives the second term, - n · mean(n · g).",
    (" - n * (tl.sum(n * g, 0) / N)", ""),
)

BACKWARD.slip(
    "backward_mean_over_block",
    "The mean of n · g is over BLOCK lanes: the padding is no number of the row. Divide the sum by N.",
    ("/ N", "/ BLOCK"),
)

BACKWARD.slip(
    "backward_sum",
    "n · g is summed, and the formula has its mean: divide by N.",
    (" / N", ""),
)

BACKWARD.slip(
    "backward_without_weight",
    "The weight is missing: g is dy TIMES the weight, for y was x · r times the weight.",
    (" * w", ""),
)

BACKWARD.slip(
    "weight_at_the_end",
    "The weight comes too late: it belongs into g, and so into the mean too, not to the result.",
    (" * w", ""),
    ("factor * (", "factor * w * ("),
)

BACKWARD.slip(
    "not_normalised",
    "n must be the NORMALISED row, x times r: you use x itself in the second term.",
    ("other=0.0) * factor", "other=0.0)"),
)

BACKWARD.slip(
    "no_factor",
    "The r in front of the bracket is missing: y is x times r, so each gradient has that factor.",
    ("factor * (g", "(g"),
)

BACKWARD.slip(
    "plus",
    "The sign is wrong: the second term is SUBTRACTED, for a longer row makes every y smaller.",
    ("g - n", "g + n"),
)

BACKWARD.slip(
    "backward_no_other",
    "The masked loads have no `other`, and the sum of n · g takes their lanes in, which are undefined (NaN in this "
    "check): other=0.0.",
    (", other=0.0", ""),
)

BACKWARD.slip(
    "backward_no_mask",
    "There is no mask: BLOCK is the next power of two after N, so a row's last lanes belong to the next row, or to nobody.",
    (", other=0.0", ""),
    (", mask=inside", ""),
)

BACKWARD.slip(
    "backward_reads_twice",
    "The values are right, but x and dy are loaded once for the sum and once more for the result: keep n and g in "
    "variables.",
    (
        "tl.store(dx + at, factor * (g - n * (tl.sum(n * g, 0) / N))",
        (
            "mean = tl.sum(n * g, 0) / N\n"
            "n = tl.load(x + at, mask=inside, other=0.0) * factor\n"
            "g = tl.load(dy + at, mask=inside, other=0.0) * w\n"
            "tl.store(dx + at, factor * (g - n * mean)"
        ),
    ),
)

BACKWARD.slip(
    "backward_weight_in_the_loop",
    "The values are right, but the weight is loaded again for each row: it does not change, so load it before the loop.",
    ("w = tl.load(weight + column, mask=inside, other=0.0)", ""),
    (" * w", " * tl.load(weight + column, mask=inside, other=0.0)"),
)

BACKWARD.slip(
    "r_computed_again",
    "r is given, and you compute it again, without the eps of the forward pass: tl.load(r + row) is one number of the row.",
    ("factor = tl.load(r + row)", "factor = 1.0"),
    (
        "n = tl.load(x + at, mask=inside, other=0.0) * factor",
        ("n = tl.load(x + at, mask=inside, other=0.0)\nfactor = tl.rsqrt(tl.sum(n * n, 0) / N)\nn = n * factor"),
    ),
)

BACKWARD.slip(
    "r_of_the_program",
    "r is that of the program's first row in all of its rows: load it in the loop, tl.load(r + row).",
    ("tl.load(r + row)", "tl.load(r + tl.program_id(0))"),
)

BACKWARD.slip(
    "r_of_the_first_row",
    "tl.load(r) is the first row's: each row has its own, tl.load(r + row).",
    ("tl.load(r + row)", "tl.load(r)"),
)

BACKWARD.slip(
    "r_by_column",
    "r has a number for each ROW, and you load it by column: tl.load(r + row) is one number for the whole row.",
    ("tl.load(r + row)", "tl.load(r + column, mask=inside, other=0.0)"),
)

BACKWARD.slip(
    "mean_without_weight",
    "The mean is of n times dy: the weight belongs into it, for g is dy times the weight.",
    ("g = tl.load(dy + at, mask=inside, other=0.0) * w", "g = tl.load(dy + at, mask=inside, other=0.0)"),
    ("(g - n", "(g * w - n"),
)

BACKWARD.slip(
    "r_squared",
    "With x in place of n, the second term has r three times: once in n, once in the mean, once in front. You have it twice.",
    ("factor * (g - n * (tl.sum(n * g, 0) / N))", "factor * g - n * (tl.sum(n * g, 0) / N)"),
)

BACKWARD.slip(
    "mean_alone_subtracted",
    "The mean is subtracted as it is: it is multiplied by n first, each number of the row by its own.",
    ("n * (tl.sum(n * g, 0) / N)", "tl.sum(n * g, 0) / N"),
)

BACKWARD.slip(
    "mean_over_rows",
    "The sum is divided by M, the number of rows: the mean is over the N numbers of a row.",
    ("/ N", "/ M"),
)

BACKWARD.slip(
    "backward_one_row",
    "Each program does one row only: rows p, p + P, … up to M, in a loop as in exercise 3.",
    ("M, tl.num_programs(0)", "tl.program_id(0) + 1"),
)

BACKWARD.slip(
    "layer_norm_backward",
    "The mean of g is subtracted, too: that is the gradient of LayerNorm, which takes off the mean of x. RMSNorm does not.",
    ("(g - n", "(g - tl.sum(g, 0) / N - n"),
)

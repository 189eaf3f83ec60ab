"""Lesson 00: FLOPs, bytes, and the roofline that bounds their time.

The package itself asks for a GPU by name (accounting.roofline_seconds); a learner's machine has no name, so these
references take its two speeds as numbers.
"""

import torch

from minids.lab.exercise import Exercise


def arithmetic_intensity(flops, nbytes):
    """FLOPs for each byte that moves: I = flops / nbytes (Williams, Waterman and Patterson 2009, the x-axis)."""
    return flops / nbytes


def matmul_cost(M, N, K, itemsize):
    """(FLOPs, bytes) of [M,K] @ [K,N]: 2·M·N·K, and each number of the three matrices moved once."""
    return 2 * M * N * K, itemsize * (M * K + K * N + M * N)


def roofline_time(flops, nbytes, peak, bandwidth):
    """Seconds that work takes at least: its arithmetic and its traffic overlap, so the longer one counts."""
    return max(flops / peak, nbytes / bandwidth)


def scale_rows(x, scale):
    """x [B,T,D] with every row x[b,t] multiplied by its own number scale[b,t]; gives [B,T,D]."""
    return x * scale[..., None]


ARITHMETIC_INTENSITY = Exercise(
    "00.1",
    arithmetic_intensity,
    minutes=2,
    sizes=[
        {"flops": 4096, "nbytes": 1536},
        {"flops": 77, "nbytes": 924},
        {"flops": 1000003, "nbytes": 4099},
        {"flops": 2048, "nbytes": 24576},
    ],
    hints=[
        "Read the unit aloud: FLOPs PER byte. What stands above the line of a fraction, what below?",
        "One division: the number of FLOPs by the number of bytes. It may well be smaller than 1.",
    ],
)


@ARITHMETIC_INTENSITY.inputs
def _(r, flops, nbytes):
    return flops, nbytes


@ARITHMETIC_INTENSITY.wrong("Upside down: that is bytes per FLOP. Divide the FLOPs by the bytes.")
def upside_down(flops, nbytes):
    return nbytes / flops


@ARITHMETIC_INTENSITY.wrong("That is FLOPs per BIT: nbytes counts bytes already, so nothing is multiplied by 8.")
def per_bit(flops, nbytes):
    return flops / (8 * nbytes)


@ARITHMETIC_INTENSITY.wrong(
    "// rounds down to a whole number, so everything below 1 FLOP per byte becomes 0: divide with /."
)
def whole_numbers(flops, nbytes):
    return flops // nbytes


@ARITHMETIC_INTENSITY.wrong("You multiply: FLOPs PER byte is a quotient, flops divided by nbytes.")
def product(flops, nbytes):
    return flops * nbytes


MATMUL_COST = Exercise(
    "00.2",
    matmul_cost,
    minutes=5,
    sizes=[
        {"M": 64, "N": 32, "K": 16, "itemsize": 4},
        {"M": 1, "N": 77, "K": 33, "itemsize": 2},
        {"M": 5, "N": 3, "K": 7, "itemsize": 1},
        {"M": 8, "N": 128, "K": 512, "itemsize": 8},
        {"M": 16, "N": 4096, "K": 4096, "itemsize": 2},  # too large to count one by one, as the lesson's are
    ],
    hints=[
        "Take ONE number of the result first: how many multiplications and additions make it? Then count the results.",
        "M·N results, each a sum of K products: K multiplications and K additions. Bytes: count the numbers of all three "
        "matrices, M·K, K·N and M·N, and multiply by itemsize.",
    ],
)


@MATMUL_COST.inputs
def _(r, M, N, K, itemsize):
    return M, N, K, itemsize


@MATMUL_COST.wrong(
    "The additions are missing: each of the M·N·K products is also ADDED to a sum, so there are 2·M·N·K."
)
def only_multiplications(M, N, K, itemsize):
    return M * N * K, itemsize * (M * K + K * N + M * N)


@MATMUL_COST.wrong(
    "You count K - 1 additions for each result. Here the first addition, to nothing, counts too, as is the custom: K "
    "multiplications and K additions, so 2·M·N·K in all."
)
def first_addition_left_out(M, N, K, itemsize):
    return M * N * (2 * K - 1), itemsize * (M * K + K * N + M * N)


@MATMUL_COST.wrong(
    "That is the number of FLOPs alone. Return a tuple of two, the FLOPs and the bytes: return flops, nbytes"
)
def flops_alone(M, N, K, itemsize):
    return 2 * M * N * K


@MATMUL_COST.wrong("The result is missing from the bytes: its M·N numbers must be written.")
def result_not_written(M, N, K, itemsize):
    return 2 * M * N * K, itemsize * (M * K + K * N)


@MATMUL_COST.wrong("The second matrix is missing from the bytes: its K·N numbers must be read too.")
def second_forgotten(M, N, K, itemsize):
    return 2 * M * N * K, itemsize * (M * K + M * N)


@MATMUL_COST.wrong("The first matrix is missing from the bytes: its M·K numbers must be read too.")
def first_forgotten(M, N, K, itemsize):
    return 2 * M * N * K, itemsize * (K * N + M * N)


@MATMUL_COST.wrong("You count bits: itemsize is in bytes already, so nothing is multiplied by 8.")
def bits(M, N, K, itemsize):
    return 2 * M * N * K, 8 * itemsize * (M * K + K * N + M * N)


@MATMUL_COST.wrong("You count numbers, not bytes: each takes itemsize bytes.")
def numbers(M, N, K, itemsize):
    return 2 * M * N * K, M * K + K * N + M * N


@MATMUL_COST.wrong(
    "You count both operands again for each multiplication. Count each number once: a good program keeps what it has "
    "read near the arithmetic while it is needed."
)
def read_every_time(M, N, K, itemsize):
    return 2 * M * N * K, itemsize * (2 * M * N * K + M * N)


@MATMUL_COST.wrong(
    "You count two reads for each multiplication, and the result not at all. Count each number of the three matrices "
    "once: a good program keeps what it has read near the arithmetic while it is needed."
)
def read_every_time_and_not_written(M, N, K, itemsize):
    return 2 * M * N * K, itemsize * 2 * M * N * K


@MATMUL_COST.wrong("The two results are the wrong way round: first the FLOPs, then the bytes.")
def exchanged(M, N, K, itemsize):
    return itemsize * (M * K + K * N + M * N), 2 * M * N * K


@MATMUL_COST.wrong(
    "itemsize multiplies the last matrix alone: * binds before +, so put the sum of the three into brackets."
)
def brackets_missing(M, N, K, itemsize):
    return 2 * M * N * K, M * K + K * N + M * N * itemsize


@MATMUL_COST.wrong(
    "itemsize multiplies the first matrix alone: * binds before +, so put the sum of the three into brackets."
)
def brackets_missing_behind(M, N, K, itemsize):
    return 2 * M * N * K, itemsize * M * K + K * N + M * N


@MATMUL_COST.wrong("You count 4 bytes for every number, those of float32: take itemsize.")
def always_four(M, N, K, itemsize):
    return 2 * M * N * K, 4 * (M * K + K * N + M * N)


@MATMUL_COST.wrong(
    "itemsize is in your FLOPs too: an operation is one operation in any format, only bytes depend on it."
)
def flops_by_itemsize(M, N, K, itemsize):
    return 2 * M * N * K * itemsize, itemsize * (M * K + K * N + M * N)


@MATMUL_COST.wrong("The result moves twice in your count: here it is written once, and not read before.")
def result_read_too(M, N, K, itemsize):
    return 2 * M * N * K, itemsize * (M * K + K * N + 2 * M * N)


@MATMUL_COST.wrong(
    "That is the number of bytes alone. Return a tuple of two, the FLOPs and the bytes: return flops, nbytes"
)
def bytes_alone(M, N, K, itemsize):
    return itemsize * (M * K + K * N + M * N)


@MATMUL_COST.wrong("That is the intensity, FLOPs per byte: give both numbers as a tuple, return flops, nbytes")
def their_quotient(M, N, K, itemsize):
    return 2 * M * N * K / (itemsize * (M * K + K * N + M * N))


@MATMUL_COST.wrong(
    "You add up the three sizes M, N and K: a matrix of M rows and K columns has M·K numbers, and so on for all three."
)
def sizes_added(M, N, K, itemsize):
    return 2 * M * N * K, itemsize * (M + N + K)


ROOFLINE_TIME = Exercise(
    "00.3",
    roofline_time,
    minutes=4,
    sizes=[
        {"flops": 8000, "nbytes": 4000, "peak": 16000, "bandwidth": 800},  # 0.5 s against 5 s
        {"flops": 9001, "nbytes": 77, "peak": 1003, "bandwidth": 333},  # 9 s against 0.2 s
        {"flops": 1201, "nbytes": 909, "peak": 997, "bandwidth": 701},  # close to the ridge
        {"flops": 4096, "nbytes": 512, "peak": 1024, "bandwidth": 256},  # 4 s against 2 s
        {"flops": 77, "nbytes": 308, "peak": 154, "bandwidth": 1232},  # 0.5 s against 0.25 s
    ],
    hints=[
        "Two clocks run at once, one for the arithmetic and one for the traffic. When is the work done?",
        "flops / peak is the time of the arithmetic, nbytes / bandwidth that of the traffic; they overlap, so the work "
        "ends with the later of the two.",
    ],
)


@ROOFLINE_TIME.inputs
def _(r, flops, nbytes, peak, bandwidth):
    return flops, nbytes, peak, bandwidth


@ROOFLINE_TIME.wrong(
    "You add the two times: a machine computes WHILE it moves data, so the longer of the two counts alone."
)
def added(flops, nbytes, peak, bandwidth):
    return flops / peak + nbytes / bandwidth


@ROOFLINE_TIME.wrong("You take the shorter of the two times: the work is done when the LATER of the two is, so max.")
def shorter(flops, nbytes, peak, bandwidth):
    return min(flops / peak, nbytes / bandwidth)


@ROOFLINE_TIME.wrong("Bits for bytes: nbytes and bandwidth are both in bytes, so nothing is multiplied by 8.")
def in_bits(flops, nbytes, peak, bandwidth):
    return max(flops / peak, 8 * nbytes / bandwidth)


@ROOFLINE_TIME.wrong(
    "Only the arithmetic counts in your answer: the bytes take nbytes / bandwidth, which may be longer."
)
def arithmetic_only(flops, nbytes, peak, bandwidth):
    return flops / peak


@ROOFLINE_TIME.wrong("Only the traffic counts in your answer: the FLOPs take flops / peak, which may be longer.")
def traffic_only(flops, nbytes, peak, bandwidth):
    return nbytes / bandwidth


@ROOFLINE_TIME.wrong("That is the speed under the roof, in FLOP/s. Seconds are wanted: flops divided by that speed.")
def the_speed(flops, nbytes, peak, bandwidth):
    return min(peak, flops / nbytes * bandwidth)


@ROOFLINE_TIME.wrong("The two speeds are exchanged: FLOPs go with peak (FLOP/s), bytes with bandwidth (bytes/s).")
def speeds_exchanged(flops, nbytes, peak, bandwidth):
    return max(flops / bandwidth, nbytes / peak)


@ROOFLINE_TIME.wrong("Your traffic term is upside down: it is nbytes / bandwidth.")
def traffic_upside_down(flops, nbytes, peak, bandwidth):
    return max(flops / peak, bandwidth / nbytes)


@ROOFLINE_TIME.wrong("Your arithmetic term is upside down: it is flops / peak.")
def arithmetic_upside_down(flops, nbytes, peak, bandwidth):
    return max(peak / flops, nbytes / bandwidth)


@ROOFLINE_TIME.wrong(
    "Whether there are more FLOPs than bytes does not decide: compare flops / nbytes with the ridge, peak / bandwidth. Or "
    "take the longer of the two times, which comes to the same."
)
def flops_against_bytes(flops, nbytes, peak, bandwidth):
    return flops / peak if flops > nbytes else nbytes / bandwidth


@ROOFLINE_TIME.wrong("Upside down: an amount divided by a speed is a time; you divide the speeds by the amounts.")
def speed_by_amount(flops, nbytes, peak, bandwidth):
    return max(peak / flops, bandwidth / nbytes)


@ROOFLINE_TIME.wrong("Those are both times: return the longer of the two, one number.")
def both_times(flops, nbytes, peak, bandwidth):
    return flops / peak, nbytes / bandwidth


@ROOFLINE_TIME.wrong("You take the mean of the two times: the work is done when the later of the two is, so max.")
def their_mean(flops, nbytes, peak, bandwidth):
    return (flops / peak + nbytes / bandwidth) / 2


@ROOFLINE_TIME.wrong("You multiply by the speeds: a time is an amount DIVIDED by a speed, the faster the shorter.")
def multiplied(flops, nbytes, peak, bandwidth):
    return max(flops * peak, nbytes * bandwidth)


@ROOFLINE_TIME.wrong("The bytes are multiplied by the bandwidth: their time is nbytes / bandwidth.")
def traffic_multiplied(flops, nbytes, peak, bandwidth):
    return max(flops / peak, nbytes * bandwidth)


@ROOFLINE_TIME.wrong(
    "The bytes are divided by the speed under the roof, which is in FLOP/s: with min(peak, flops / nbytes * bandwidth) it "
    "is the FLOPs that are divided."
)
def bytes_by_flops_speed(flops, nbytes, peak, bandwidth):
    return nbytes / min(peak, flops / nbytes * bandwidth)


@ROOFLINE_TIME.wrong("That says which of the two is longer: return the longer time itself, in seconds.")
def which_is_longer(flops, nbytes, peak, bandwidth):
    return flops / peak > nbytes / bandwidth


SCALE_ROWS = Exercise(
    "00.4",
    scale_rows,
    minutes=4,
    sizes=[
        {"B": 1, "T": 8, "D": 8},
        {"B": 3, "T": 7, "D": 5},
        {"B": 3, "T": 16, "D": 24},
        {"B": 1, "T": 5, "D": 5},
        {"B": 2, "T": 9, "D": 3},
    ],
    gradients=True,
    hints=[
        "x has three dimensions and scale has two. torch aligns shapes from the RIGHT: which dimension must scale gain?",
        "scale[..., None] has the shape [B, T, 1]; a dimension of size 1 is repeated as often as needed, so it fits "
        "[B, T, D].",
    ],
)


@SCALE_ROWS.inputs
def _(r, B, T, D):
    return r.normal(B, T, D), 0.5 + r.normal(B, T)


@SCALE_ROWS.wrong(
    "scale is laid along the COLUMNS, which only works where T = D (and is wrong there too): scale[b, t] belongs to the "
    "whole row x[b, t], so it needs a last dimension of size 1."
)
def along_the_columns(x, scale):
    return x * scale[:, None, :]


@SCALE_ROWS.wrong("You divide by the scale: multiply each row by it.")
def divided(x, scale):
    return x / scale[..., None]


@SCALE_ROWS.wrong("All sequences get the scales of the first one: scale[b, t] depends on b too, so keep all of scale.")
def first_of_the_batch(x, scale):
    return x * scale[0][None, :, None]


@SCALE_ROWS.wrong("You add the scale: multiply each row by it.")
def plus(x, scale):
    return x + scale[..., None]


@SCALE_ROWS.wrong("The rows are summed after they are scaled: the result keeps all of them, [B, T, D].")
def summed(x, scale):
    return torch.einsum("btd,bt->bd", x, scale)


@SCALE_ROWS.wrong("Every row is multiplied by the mean of all scales: each row has a number of its own, scale[b, t].")
def one_for_all(x, scale):
    return x * scale.mean()


@SCALE_ROWS.wrong("The last row of each sequence stays as it was: a loop over the rows goes to range(T), not T - 1.")
def last_row_forgotten(x, scale):
    scale = torch.cat((scale[:, :-1], torch.ones_like(scale[:, -1:])), 1)
    return x * scale[..., None]


@SCALE_ROWS.wrong("All rows of a sequence get the scale of its first: scale[b, t] depends on t too.")
def first_of_the_rows(x, scale):
    return x * scale[:, :1, None]


@SCALE_ROWS.wrong("The scale is multiplied in twice: once is enough.")
def twice(x, scale):
    return x * scale[..., None] * scale[..., None]


@SCALE_ROWS.wrong(
    "The axes come out in the order [B, D, T]: the result has those of x, [B, T, D]. In an einsum, what stands behind -> "
    "is the order."
)
def columns_first(x, scale):
    return torch.einsum("btd,bt->bdt", x, scale)

"""Lesson 11: sums of limited precision, the block-scaled product in torch, and its kernel."""

from contextlib import contextmanager

import torch

from minids import triton_env
from minids.fp8 import reference
from minids.lab.exercise import Exercise
from minids.lab.tiles import tl, triton

STEP, TILE = reference.STEP, reference.TILE

# 11.1 ----------------------------------------------------------------------------------------------------------------

ADD_LIMITED = Exercise(
    "11.1",
    reference.add_limited,
    minutes=12,
    sizes=[
        {"B": 1, "n": 32, "bits": 8},
        {"B": 3, "n": 33, "bits": 14},
        {"B": 2, "n": 7, "bits": 11},
        {"B": 1, "n": 1, "bits": 14},
        {"B": 2, "n": 5, "bits": 9},
    ],
    hints=[
        "Put the old sum beside the products, as one more number: torch.cat([acc.unsqueeze(-1), products], -1). The largest "
        "magnitude of each row says what the unit is; torch.frexp gives its e.",
        "e = torch.frexp(terms.abs().amax(-1, keepdim=True)).exponent; unit = 2.0 ** (e - bits). Then count each term in "
        "units, drop what is behind the point with trunc(), multiply by the unit again, and sum over the last dimension.",
    ],
)


@ADD_LIMITED.inputs
def _(r, B, n, bits):
    acc = torch.ldexp(r.normal(B, 5), r.integers(-6, 7, B, 5))
    products = torch.ldexp(r.normal(B, 5, n), r.integers(-4, 5, B, 5, n))
    if n == 33:
        acc[0, 0], products[0, 0] = 0, 0  # nothing to align to
        acc[0, 1], products[0, 1] = -64, products[0, 1] / 8  # a power of 2 is the largest, and it is negative
    if n == 5:
        acc, products = torch.zeros_like(acc), products / 4096  # the beginning of a sum of small products
    return acc, products, bits


def together(acc, products):
    return torch.cat([acc.unsqueeze(-1), products], -1)


def unit_of(largest, bits):
    """The last place that is kept where `largest` leads."""
    return torch.ldexp(torch.ones_like(largest), torch.frexp(largest).exponent - bits)


def cut(terms, unit):
    return (terms / unit).trunc() * unit


def largest_of(terms):
    return terms.abs().amax(-1, keepdim=True)


@ADD_LIMITED.wrong("You round to the nearest unit: the hardware drops what is shifted out. Use trunc, not round.")
def rounds(acc, products, bits):
    terms = together(acc, products)
    unit = unit_of(largest_of(terms), bits)
    return ((terms / unit).round() * unit).sum(-1)


@ADD_LIMITED.wrong(
    "floor goes down, so a negative number grows in magnitude: here bits are dropped, towards 0. Use trunc."
)
def floors(acc, products, bits):
    terms = together(acc, products)
    unit = unit_of(largest_of(terms), bits)
    return ((terms / unit).floor() * unit).sum(-1)


@ADD_LIMITED.wrong(
    "You align to the old sum alone: a product may be larger, and at the start the sum is 0. The largest of ALL terms counts."
)
def aligned_to_the_sum(acc, products, bits):
    unit = unit_of(acc.abs().unsqueeze(-1), bits)
    return cut(together(acc, products), unit).sum(-1)


@ADD_LIMITED.wrong(
    "You align to the largest product alone: the old sum is a term too, soon the largest, and then it sets the unit."
)
def aligned_to_the_products(acc, products, bits):
    unit = unit_of(largest_of(products), bits)
    return cut(together(acc, products), unit).sum(-1)


@ADD_LIMITED.wrong(
    "The products are cut, the old sum is not: it goes through the same adder, so it is one of the terms, aligned and cut."
)
def sum_is_not_cut(acc, products, bits):
    return acc + cut(products, unit_of(largest_of(products), bits)).sum(-1)


@ADD_LIMITED.wrong(
    "The unit is right for all terms, but the old sum is added as it is: cut it to whole units like the products."
)
def sum_kept_whole(acc, products, bits):
    unit = unit_of(largest_of(together(acc, products)), bits)
    return acc + cut(products, unit).sum(-1)


@ADD_LIMITED.wrong(
    "You keep one bit too few: the leading bit is one of the `bits`. With torch.frexp's e the unit is 2^(e - bits)."
)
def one_bit_less(acc, products, bits):
    terms = together(acc, products)
    return cut(terms, unit_of(largest_of(terms), bits - 1)).sum(-1)


@ADD_LIMITED.wrong(
    "You keep one bit too many: floor(log2) of the largest is the place of its leading bit, e - 1; that one is among the "
    "`bits`, so the unit is 2^(e - bits)."
)
def one_bit_more(acc, products, bits):
    terms = together(acc, products)
    return cut(terms, unit_of(largest_of(terms), bits + 1)).sum(-1)


@ADD_LIMITED.wrong(
    "ceil(log2) is e, except where the largest is a power of 2: 64 has its leading bit at 2^6, so e is 7. torch.frexp knows."
)
def ceil_of_log(acc, products, bits):
    terms = together(acc, products)
    largest = largest_of(terms)
    power = torch.ldexp(torch.ones_like(largest), torch.where(largest > 0, largest, 1).log2().ceil().int() - bits)
    return cut(terms, power).sum(-1)


@ADD_LIMITED.wrong(
    "Where all terms are 0 you get NaN: the log of 0 is -infinity, and 0/0 follows. torch.frexp(0) gives e = 0, which works."
)
def zeros_give_nan(acc, products, bits):
    terms = together(acc, products)
    unit = 2.0 ** (largest_of(terms).log2().floor() + 1 - bits)
    return cut(terms, unit).sum(-1)


@ADD_LIMITED.wrong(
    "The unit is taken from the SUM: the terms are aligned before they are added, to the largest of them. (A sum of large "
    "numbers of both signs may be small.)"
)
def exponent_of_the_result(acc, products, bits):
    terms = together(acc, products)
    return cut(terms, unit_of(terms.sum(-1, keepdim=True).abs(), bits)).sum(-1)


@ADD_LIMITED.wrong(
    "You add exactly and cut the result: the hardware cuts each term BEFORE the addition, which is where the small ones go."
)
def cuts_the_result(acc, products, bits):
    total = together(acc, products).sum(-1)
    return cut(total, unit_of(total.abs(), bits))


@ADD_LIMITED.wrong(
    "You add exactly and then cut the sum to whole units: the hardware cuts each term BEFORE the addition."
)
def cuts_the_sum_to_units(acc, products, bits):
    terms = together(acc, products)
    return cut(terms.sum(-1, keepdim=True), unit_of(largest_of(terms), bits)).squeeze(-1)


@ADD_LIMITED.wrong(
    "You cut the new sum once more: it is cut when the next step takes it as its old sum, not before. Return the sum of "
    "the cut terms."
)
def cuts_the_new_sum_too(acc, products, bits):
    total = reference.add_limited(acc, products, bits)
    return cut(total, unit_of(total.abs(), bits))


@ADD_LIMITED.wrong(
    "The largest of the exponents is not the exponent of the largest: frexp(0) gives 0, more than that of a small term, and "
    "at the start the old sum is 0. First abs() and amax, then frexp."
)
def largest_exponent(acc, products, bits):
    terms = together(acc, products)
    exponent = torch.frexp(terms).exponent.amax(-1, keepdim=True)
    return cut(terms, torch.ldexp(torch.ones_like(terms[..., :1]), exponent - bits)).sum(-1)


@ADD_LIMITED.wrong(
    "The unit has lost the last dimension, so it does not stretch over the terms: amax(-1, keepdim=True) keeps it, with "
    "size 1."
)
def without_keepdim(acc, products, bits):
    terms = together(acc, products)
    return cut(terms, unit_of(terms.abs().amax(-1), bits)).sum(-1)


@ADD_LIMITED.wrong(
    "The old sums have one dimension fewer than the products: acc.unsqueeze(-1), or acc[..., None], makes them one more term."
)
def cat_without_unsqueeze(acc, products, bits):
    return torch.cat([acc, products], -1)


@ADD_LIMITED.wrong(
    "Each term is cut by its own leading bit, as in a floating format: then nothing small is ever lost. All terms share ONE "
    "unit, that of the largest."
)
def each_by_itself(acc, products, bits):
    terms = together(acc, products)
    return cut(terms, unit_of(terms.abs(), bits)).sum(-1)


@ADD_LIMITED.wrong("The largest is meant in magnitude: take abs() before amax, or a large negative term is overlooked.")
def largest_with_sign(acc, products, bits):
    terms = together(acc, products)
    return cut(terms, unit_of(terms.amax(-1, keepdim=True).abs(), bits)).sum(-1)


@ADD_LIMITED.wrong(
    "One unit for the whole tensor: each sum has its own largest term, over its own last dimension (amax(-1, keepdim=True))."
)
def one_unit_for_all(acc, products, bits):
    terms = together(acc, products)
    return cut(terms, unit_of(terms.abs().amax(), bits)).sum(-1)


@ADD_LIMITED.wrong("The old sum is forgotten: it is added to the products, and is one of the terms.")
def forgets_the_sum(acc, products, bits):
    return cut(products, unit_of(largest_of(products), bits)).sum(-1)


@ADD_LIMITED.wrong("The result counts units: multiply by the unit again at the end.")
def in_units(acc, products, bits):
    terms = together(acc, products)
    return (terms / unit_of(largest_of(terms), bits)).trunc().sum(-1)


@ADD_LIMITED.wrong(
    "You add one product after the other, and align anew for each: the hardware takes all n at once, with one unit."
)
def one_after_the_other(acc, products, bits):
    for product in products.unbind(-1):
        acc = reference.add_limited(acc, product.unsqueeze(-1), bits)
    return acc


@ADD_LIMITED.wrong("Nothing is cut: this is the exact sum. Drop of each term what is smaller than the unit.")
def exact_sum(acc, products, bits):
    return together(acc, products).sum(-1)


@ADD_LIMITED.wrong("14 bits are kept, whatever `bits` says: the unit is 2^(e - bits).")
def always_14_bits(acc, products, bits):
    return reference.add_limited(acc, products, 14)


# 11.2 ----------------------------------------------------------------------------------------------------------------

MATMUL_LIMITED = Exercise(
    "11.2",
    reference.matmul_limited,
    minutes=12,
    sizes=[
        {"M": 8, "N": 8, "K": 512, "bits": 8, "promote": 128},
        {"M": 3, "N": 5, "K": 300, "bits": 14, "promote": 128},
        {"M": 5, "N": 2, "K": 200, "bits": 10, "promote": None},
        {"M": 1, "N": 3, "K": 430, "bits": 12, "promote": 64},
        {"M": 2, "N": 1, "K": 1100, "bits": 9, "promote": 32},
    ],
    hints=[
        "Two sums, both [M,N] and 0 at first: acc, which my_add_limited makes, and total, which + makes. A loop over K in "
        "steps of 32; after each step ask whether `promote` products are in acc.",
        "products = a[:, None, k:k+32] * b[None, :, k:k+32] is [M,N,32] (the last slice may be shorter, which is fine). If "
        "promote and (k + 32) % promote == 0: total += acc, and acc is 0 again. What acc holds at the end is added too.",
    ],
)


@MATMUL_LIMITED.inputs
def _(r, M, N, K, bits, promote):
    a, b = (reference.round_to_e4m3(0.5 + r.normal(rows, K)) for rows in (M, N))
    return a, b, bits, promote


def limited(
    a, b, bits, promote, step=STEP, end=None, limit=reference.add_limited, into=torch.add, anew=torch.zeros_like
):
    """(acc, total) after products step by step; at a promotion total is into(total, acc), and acc is anew(acc)."""
    total = acc = a.new_zeros(len(a), len(b))
    for k in range(0, a.shape[1] if end is None else end, step):
        acc = limit(acc, a[:, None, k : k + step] * b[None, :, k : k + step], bits)
        if promote and (k + step) % promote == 0:
            total, acc = into(total, acc), anew(acc)
    return acc, total


def going_on(a, b, bits, promote):
    """(acc, total) where acc stays as it is at a promotion."""
    return limited(a, b, bits, promote, anew=lambda acc: acc)


def both_limited(a, b, bits, promote):
    """(acc, total) where total has as few bits as acc."""

    def add(total, acc):
        return reference.add_limited(total, acc.unsqueeze(-1), bits)

    return limited(a, b, bits, promote, into=add)


@MATMUL_LIMITED.wrong(
    "After a promotion acc goes on from where it was, so everything is counted again at the next one: set acc to 0."
)
def acc_goes_on(a, b, bits, promote):
    acc, total = going_on(a, b, bits, promote)
    return total if promote and a.shape[1] % promote == 0 else total + acc


@MATMUL_LIMITED.wrong(
    "After a promotion acc goes on from where it was, and is added once more at the end: set acc to 0 when it is promoted."
)
def acc_goes_on_to_the_end(a, b, bits, promote):
    return sum(going_on(a, b, bits, promote))


@MATMUL_LIMITED.wrong(
    "After a promotion acc goes on from where it was, so everything is counted again at the next one: set acc to 0. (And "
    "what is left in acc at the end is added too.)"
)
def acc_goes_on_and_is_lost(a, b, bits, promote):
    acc, total = going_on(a, b, bits, promote)
    return total if promote else acc


@MATMUL_LIMITED.wrong(
    "The last partial sum is lost: where K is no multiple of `promote`, something is left in acc. Return total + acc."
)
def last_one_is_lost(a, b, bits, promote):
    acc, total = limited(a, b, bits, promote)
    return total if promote else acc


@MATMUL_LIMITED.wrong(
    "total alone is returned, so what is still in acc is lost, and without `promote` that is everything: return total + acc."
)
def acc_is_lost(a, b, bits, promote):
    return limited(a, b, bits, promote)[1]


@MATMUL_LIMITED.wrong("You promote after each step of 32: `promote` says after how many products, such as 128.")
def promotes_each_step(a, b, bits, promote):
    return sum(limited(a, b, bits, STEP if promote else None))


@MATMUL_LIMITED.wrong(
    "You promote once, at the end: by then the bits are gone. After each `promote` products acc goes into total and "
    "starts anew."
)
def promotes_at_the_end(a, b, bits, promote):
    return sum(limited(a, b, bits, None))


@MATMUL_LIMITED.wrong(
    "total is added up by add_limited too, so it has as few bits as acc: the point of promotion is a float32 sum, by +."
)
def total_is_limited(a, b, bits, promote):
    acc, total = both_limited(a, b, bits, promote)
    return reference.add_limited(total, acc.unsqueeze(-1), bits)


@MATMUL_LIMITED.wrong(
    "total is added up by add_limited too, so it has as few bits as acc; only your last addition is exact. Promotion needs "
    "a float32 sum, by +."
)
def total_is_limited_inside(a, b, bits, promote):
    return sum(both_limited(a, b, bits, promote))


@MATMUL_LIMITED.wrong("All K products are added at once: the hardware takes 32 at a time. Loop over K in steps of 32.")
def all_at_once(a, b, bits, promote):
    return reference.add_limited(a.new_zeros(len(a), len(b)), a[:, None] * b[None], bits)


@MATMUL_LIMITED.wrong(
    "You add `promote` products at once: a step has 32, and a promotion comes after promote / 32 steps."
)
def steps_of_promote(a, b, bits, promote):
    return sum(limited(a, b, bits, promote, step=promote or STEP))


@MATMUL_LIMITED.wrong(
    "You add `promote` products at once, and all of K where it is None: a step has 32, and a promotion comes after "
    "promote / 32 steps."
)
def all_until_the_promotion(a, b, bits, promote):
    return sum(limited(a, b, bits, promote, step=promote or a.shape[1]))


@MATMUL_LIMITED.wrong("You add one product at a time: a step takes 32 of them, aligned to one unit.")
def steps_of_one(a, b, bits, promote):
    return sum(limited(a, b, bits, promote, step=1))


@MATMUL_LIMITED.wrong(
    "The last step is dropped where K is no multiple of 32: range(0, K, 32) with a shorter last slice keeps it."
)
def last_step_is_dropped(a, b, bits, promote):
    return sum(limited(a, b, bits, promote, end=a.shape[1] // STEP * STEP))


@MATMUL_LIMITED.wrong(
    "`promote` counts products, not steps: 128 products are 4 steps. You promote 32 times as rarely as asked."
)
def promote_counts_steps(a, b, bits, promote):
    return sum(limited(a, b, bits, promote and promote * STEP))


@MATMUL_LIMITED.wrong(
    "You promote one step early, the first time after 32 products: after the step at k there are k + 32 products in the sum."
)
def promotes_early(a, b, bits, promote):
    total = acc = a.new_zeros(len(a), len(b))
    for k in range(0, a.shape[1], STEP):
        acc = reference.add_limited(acc, a[:, None, k : k + STEP] * b[None, :, k : k + STEP], bits)
        if promote and k % promote == 0:
            total, acc = total + acc, torch.zeros_like(acc)
    return total + acc


@MATMUL_LIMITED.wrong("promote=None means: never promote. Ask `if promote and …` before you divide by it.")
def none_is_an_error(a, b, bits, promote):
    return sum(limited(a, b, bits, promote)) if promote % STEP == 0 else None


@MATMUL_LIMITED.wrong("`bits` is ignored: pass it on to my_add_limited.")
def always_14(a, b, bits, promote):
    return sum(limited(a, b, 14, promote))


@MATMUL_LIMITED.wrong("This is the exact product: no sum is limited. Add 32 products at a time, by my_add_limited.")
def exact_product(a, b, bits, promote):
    return a @ b.T


@MATMUL_LIMITED.wrong("The result is transposed: a's rows are the rows of y, [M,N].")
def transposed(a, b, bits, promote):
    return sum(limited(a, b, bits, promote)).T


@MATMUL_LIMITED.wrong("128 products are promoted, whatever `promote` says: ask for it in place of 128.")
def always_128(a, b, bits, promote):
    return sum(limited(a, b, bits, promote and 128))


@MATMUL_LIMITED.wrong(
    "Every 32 products begin a new sum, so none is short by more than one step: acc goes on until `promote` products are in "
    "it, and for None to the end."
)
def every_step_anew(a, b, bits, promote):
    return sum(limited(a, b, bits, STEP))


@MATMUL_LIMITED.wrong(
    "The last addition, of total and acc, is add_limited's, and loses bits: return total + acc, a float32 sum."
)
def the_end_is_limited(a, b, bits, promote):
    acc, total = limited(a, b, bits, promote)
    return reference.add_limited(acc, total.unsqueeze(-1), bits)


@MATMUL_LIMITED.wrong(
    "The 32 products of a step are added exactly before add_limited sees them, by @ or sum: give it the products "
    "themselves, [M,N,32], for each of them is cut."
)
def steps_added_exactly(a, b, bits, promote):
    def exactly(acc, products, bits):
        return reference.add_limited(acc, products.sum(-1, keepdim=True), bits)

    return sum(limited(a, b, bits, promote, limit=exactly))


@MATMUL_LIMITED.wrong("A step takes 16 products: it has 32.")
def steps_of_16(a, b, bits, promote):
    return sum(limited(a, b, bits, promote, step=16))


@MATMUL_LIMITED.wrong(
    "acc is promoted when the NEXT part begins, so the last part is still in it at the end: return total + acc."
)
def last_part_is_lost(a, b, bits, promote):
    last = (a.shape[1] - 1) // promote * promote if promote else 0
    return sum(limited(a, b, bits, promote, end=last))


# 11.3 ----------------------------------------------------------------------------------------------------------------

MATMUL_BLOCKSCALED = Exercise(
    "11.3",
    reference.matmul_blockscaled,
    minutes=12,
    sizes=[
        {"M": 24, "N": 24, "K": 256},
        {"M": 5, "N": 300, "K": 300},
        {"M": 3, "N": 7, "K": 131},
        {"M": 1, "N": 130, "K": 20},
    ],
    hints=[
        "A scale can be taken out of a sum only where it is the same for all of the sum's terms: 128 of them. So the loop "
        "goes over tiles of K, and each tile's partial sum [M,N] gets its two scales before it is added.",
        "w_scale has a row for 128 rows of w: w_scale.repeat_interleave(128, 0)[:N] has one for each. Then, with t the tile "
        "and s = slice(128 * t, 128 * (t + 1)): (x_fp8[:, s].float() @ w_fp8[:, s].float().T) times a column [M,1] of x's "
        "scales and a row [N] of w's.",
    ],
)


def quantized(r, M, N, K, loud=1.0):
    """(x_fp8, x_scale, w_fp8, w_scale) of numbers whose tiles differ in size."""
    x, w = r.normal(M, K), r.normal(N, K)
    x *= torch.exp(r.uniform(-1, 1, M, -(-K // TILE))).repeat_interleave(TILE, 1)[:, :K]
    sizes = torch.exp(r.uniform(-1, 1, -(-N // TILE), -(-K // TILE)))
    w *= sizes.repeat_interleave(TILE, 0)[:N].repeat_interleave(TILE, 1)[:, :K]
    return *reference.quantize_tiles(loud * x), *reference.quantize_blocks(loud * w)


@MATMUL_BLOCKSCALED.inputs
def _(r, M, N, K):
    return quantized(r, M, N, K)


def partial_sums(x_fp8, w_fp8):
    """[(tile, partial sum [M,N])], 128 products at a time."""
    tiles = zip(x_fp8.float().split(TILE, 1), w_fp8.float().split(TILE, 1), strict=True)
    return [(t, x @ w.T) for t, (x, w) in enumerate(tiles)]


def per_row(w_scale, w_fp8):
    return w_scale.repeat_interleave(TILE, 0)[: len(w_fp8)]


@MATMUL_BLOCKSCALED.wrong(
    "The whole of K is summed first, and the first tile's scales are used for all of it: each 128 products have their own "
    "scales, so multiply each partial sum."
)
def first_scale(x_fp8, x_scale, w_fp8, w_scale):
    return x_fp8.float() @ w_fp8.float().T * x_scale[:, :1] * per_row(w_scale, w_fp8)[:, 0]


@MATMUL_BLOCKSCALED.wrong(
    "The whole of K is summed first, and then multiplied by the last tile's scales: they belong to its 128 products alone."
)
def last_scale(x_fp8, x_scale, w_fp8, w_scale):
    return x_fp8.float() @ w_fp8.float().T * x_scale[:, -1:] * per_row(w_scale, w_fp8)[:, -1]


@MATMUL_BLOCKSCALED.wrong(
    "The whole of K is summed first, and then multiplied by the mean of the scales: a mean cannot be taken out of a sum "
    "whose terms have different factors."
)
def mean_scale(x_fp8, x_scale, w_fp8, w_scale):
    return x_fp8.float() @ w_fp8.float().T * x_scale.mean(1, keepdim=True) * per_row(w_scale, w_fp8).mean(1)


@MATMUL_BLOCKSCALED.wrong(
    "The scales are on the wrong axes: x's belong to the ROWS of the partial sum, [M,1], and w's to its columns, [N]."
)
def axes_swapped(x_fp8, x_scale, w_fp8, w_scale):
    rows = per_row(w_scale, w_fp8)
    return sum(partial * x_scale[:, t] * rows[:, t, None] for t, partial in partial_sums(x_fp8, w_fp8))


@MATMUL_BLOCKSCALED.wrong(
    "x's scales lie along the columns: x_scale[:, t] broadcasts over the last dimension, which is N. Make it a column, "
    "x_scale[:, t, None]."
)
def x_along_columns(x_fp8, x_scale, w_fp8, w_scale):
    rows = per_row(w_scale, w_fp8)
    return sum(partial * x_scale[:, t] * rows[:, t] for t, partial in partial_sums(x_fp8, w_fp8))


@MATMUL_BLOCKSCALED.wrong("w's scales lie along the rows of the partial sum: they belong to its columns, [N].")
def w_along_rows(x_fp8, x_scale, w_fp8, w_scale):
    rows = per_row(w_scale, w_fp8)
    return sum(partial * x_scale[:, t, None] * rows[:, t, None] for t, partial in partial_sums(x_fp8, w_fp8))


@MATMUL_BLOCKSCALED.wrong("You divide by the scales: a number is code TIMES scale, so multiply.")
def divides(x_fp8, x_scale, w_fp8, w_scale):
    return reference.matmul_blockscaled(x_fp8, 1 / x_scale, w_fp8, 1 / w_scale)


@MATMUL_BLOCKSCALED.wrong("The first block row's scales are used for all of w: row n of w has those of block n // 128.")
def first_block_row(x_fp8, x_scale, w_fp8, w_scale):
    tiles = partial_sums(x_fp8, w_fp8)
    return sum(partial * x_scale[:, t, None] * w_scale[0, t] for t, partial in tiles)


@MATMUL_BLOCKSCALED.wrong(
    "`repeat` puts the block rows one after the other, again and again: 0 1 2 0 1 2. Each must stand 128 times in a row, "
    "0 0 … 1 1 …: repeat_interleave."
)
def repeats_the_list(x_fp8, x_scale, w_fp8, w_scale):
    rows = w_scale.repeat(TILE, 1)[: len(w_fp8)]
    return sum(partial * x_scale[:, t, None] * rows[:, t] for t, partial in partial_sums(x_fp8, w_fp8))


@MATMUL_BLOCKSCALED.wrong(
    "w's scales are transposed: w_scale[j, t] has the block ROW first, 128 rows of w, then the tile of K."
)
def w_scale_transposed(x_fp8, x_scale, w_fp8, w_scale):
    rows = per_row(w_scale.T, w_fp8)
    return sum(partial * x_scale[:, t, None] * rows[:, t] for t, partial in partial_sums(x_fp8, w_fp8))


@MATMUL_BLOCKSCALED.wrong(
    "The last tile is dropped where K is no multiple of 128: there are ceil(K / 128) tiles, the last one shorter."
)
def last_tile_is_dropped(x_fp8, x_scale, w_fp8, w_scale):
    y, rows = torch.zeros(len(x_fp8), len(w_fp8)), per_row(w_scale, w_fp8)
    for t, partial in partial_sums(x_fp8, w_fp8)[: x_fp8.shape[1] // TILE]:
        y += partial * x_scale[:, t, None] * rows[:, t]
    return y


@MATMUL_BLOCKSCALED.wrong("w's scales are missing: each partial sum has two factors, x's and w's.")
def without_w_scale(x_fp8, x_scale, w_fp8, w_scale):
    return reference.matmul_blockscaled(x_fp8, x_scale, w_fp8, torch.ones_like(w_scale))


@MATMUL_BLOCKSCALED.wrong("x's scales are missing: each partial sum has two factors, x's and w's.")
def without_x_scale(x_fp8, x_scale, w_fp8, w_scale):
    return reference.matmul_blockscaled(x_fp8, torch.ones_like(x_scale), w_fp8, w_scale)


@MATMUL_BLOCKSCALED.wrong("No scale is used at all: multiply each partial sum by its two scales.")
def without_scales(x_fp8, x_scale, w_fp8, w_scale):
    return x_fp8.float() @ w_fp8.float().T


@MATMUL_BLOCKSCALED.wrong(
    "The scales multiply the running sum, so earlier tiles are scaled again and again: multiply the PARTIAL sum, then add."
)
def running_sum_is_scaled(x_fp8, x_scale, w_fp8, w_scale):
    y, rows = torch.zeros(len(x_fp8), len(w_fp8)), per_row(w_scale, w_fp8)
    for t, partial in partial_sums(x_fp8, w_fp8):
        y = (y + partial) * x_scale[:, t, None] * rows[:, t]
    return y


@MATMUL_BLOCKSCALED.wrong("Only the last tile is left: y = … in the loop forgets the tiles before. Add up, y += ….")
def only_the_last_tile(x_fp8, x_scale, w_fp8, w_scale):
    t, partial = partial_sums(x_fp8, w_fp8)[-1]
    return partial * x_scale[:, t, None] * per_row(w_scale, w_fp8)[:, t]


@MATMUL_BLOCKSCALED.wrong(
    "The bytes are multiplied as whole numbers: a code is decoded by .float(), not by view(uint8)."
)
def bytes_as_numbers(x_fp8, x_scale, w_fp8, w_scale):
    rows, codes = per_row(w_scale, w_fp8), [one.contiguous().view(torch.uint8) for one in (x_fp8, w_fp8)]
    return sum(partial * x_scale[:, t, None] * rows[:, t] for t, partial in partial_sums(*codes))


@MATMUL_BLOCKSCALED.wrong(
    "w's scales, each 128 times, are more than N where N is no multiple of 128: cut them, "
    "w_scale.repeat_interleave(128, 0)[:N]."
)
def scales_not_cut_to_N(x_fp8, x_scale, w_fp8, w_scale):
    rows = w_scale.repeat_interleave(TILE, 0)
    return sum(partial * x_scale[:, t, None] * rows[:, t] for t, partial in partial_sums(x_fp8, w_fp8))


@MATMUL_BLOCKSCALED.wrong(
    "torch multiplies no FP8 tensor by one of float32, and the product of two FP8 tensors has 8 bits itself: decode them "
    "first, x_fp8[:, s].float()."
)
def not_decoded(x_fp8, x_scale, w_fp8, w_scale):
    return x_fp8[:, :TILE] @ w_fp8[:, :TILE].T * x_scale[:, :1]


@MATMUL_BLOCKSCALED.wrong(
    "The partial sums are in bfloat16, which has 8 bits: FP8 is for the factors. Decode with .float(), so that the sums "
    "are in float32."
)
def sums_in_bf16(x_fp8, x_scale, w_fp8, w_scale):
    rows, codes = per_row(w_scale, w_fp8), [one.bfloat16().split(TILE, 1) for one in (x_fp8, w_fp8)]
    partial = [(x @ w.T).float() for x, w in zip(*codes, strict=True)]
    return sum(p * x_scale[:, t, None] * rows[:, t] for t, p in enumerate(partial))


@MATMUL_BLOCKSCALED.wrong(
    "The product of two FP8 tensors is rounded to FP8: decode them first, x_fp8[:, s].float(), so that the sum has 24 bits."
)
def product_in_fp8(x_fp8, x_scale, w_fp8, w_scale):
    rows = per_row(w_scale, w_fp8)
    sums = [(t, partial.to(torch.float8_e4m3fn).float()) for t, partial in partial_sums(x_fp8, w_fp8)]
    return sum(partial * x_scale[:, t, None] * rows[:, t] for t, partial in sums)


@MATMUL_BLOCKSCALED.wrong("x's scale is that of the first tile in every tile: x_scale[:, t, None].")
def first_tile_of_x(x_fp8, x_scale, w_fp8, w_scale):
    rows = per_row(w_scale, w_fp8)
    return sum(partial * x_scale[:, 0, None] * rows[:, t] for t, partial in partial_sums(x_fp8, w_fp8))


@MATMUL_BLOCKSCALED.wrong(
    "w's scale is that of the first tile in every tile: row n of w has w_scale[n // 128, t] there."
)
def first_tile_of_w(x_fp8, x_scale, w_fp8, w_scale):
    rows = per_row(w_scale, w_fp8)
    return sum(partial * x_scale[:, t, None] * rows[:, 0] for t, partial in partial_sums(x_fp8, w_fp8))


@MATMUL_BLOCKSCALED.wrong(
    "`repeat` puts all scales of a row one after the other, again and again: 0 1 2 0 1 2. Each must stand 128 times in a "
    "row, 0 0 … 1 1 …: repeat_interleave, along K and along N."
)
def repeats_all_scales(x_fp8, x_scale, w_fp8, w_scale):
    K = x_fp8.shape[1]
    w = w_fp8.float() * w_scale.repeat(TILE, TILE)[: len(w_fp8), :K]
    return (x_fp8.float() * x_scale.repeat(1, TILE)[:, :K]) @ w.T


@MATMUL_BLOCKSCALED.wrong(
    "w_scale is asked with the tile first: it has the block ROW first, w_scale[n // 128, t], and as many columns as tiles."
)
def tile_first(x_fp8, x_scale, w_fp8, w_scale):
    rows = torch.arange(len(w_fp8)) // TILE
    tiles = partial_sums(x_fp8, w_fp8)
    return sum(partial * x_scale[:, t, None] * w_scale[t, rows][None, :] for t, partial in tiles)


# 11.4 ----------------------------------------------------------------------------------------------------------------


@triton.jit
def blockscaled_kernel(
    x, x_scale, w, w_scale, y, M, N, K, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, TILE: tl.constexpr
):
    m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)[:, None]
    n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)[None, :]
    k, tiles = tl.arange(0, TILE), tl.cdiv(K, TILE)
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for t in range(0, tiles):
        at = t * TILE + k
        a = tl.load(x + m * K + at[None, :], mask=(m < M) & (at < K)[None, :], other=0.0)
        b = tl.load(w + n * K + at[:, None], mask=(n < N) & (at < K)[:, None], other=0.0)
        sx = tl.load(x_scale + m * tiles + t, mask=m < M, other=0.0)
        sw = tl.load(w_scale + n // TILE * tiles + t, mask=n < N, other=0.0)
        acc += tl.dot(a, b) * sx * sw
    tl.store(y + m * N + n, acc, mask=(m < M) & (n < N))


@triton.jit
def plain_kernel(x, w, y, M, N, K, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, TILE: tl.constexpr):
    """The kernel without scales, for comparison: all of K is one sum of the tensor cores."""
    m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)[:, None]
    n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)[None, :]
    k, tiles = tl.arange(0, TILE), tl.cdiv(K, TILE)
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for t in range(0, tiles):
        at = t * TILE + k
        a = tl.load(x + m * K + at[None, :], mask=(m < M) & (at < K)[None, :], other=0.0)
        b = tl.load(w + n * K + at[:, None], mask=(n < N) & (at < K)[:, None], other=0.0)
        acc = tl.dot(a, b, acc)
    tl.store(y + m * N + n, acc, mask=(m < M) & (n < N))


@triton.jit
def one_scale_kernel(
    x, x_scale, w, w_scale, y, M, N, K, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, TILE: tl.constexpr
):
    """The kernel where BLOCK_N divides TILE: one scale of w is that of all its columns."""
    m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)[:, None]
    n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)[None, :]
    k, tiles = tl.arange(0, TILE), tl.cdiv(K, TILE)
    block = tl.program_id(1) * BLOCK_N // TILE
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for t in range(0, tiles):
        at = t * TILE + k
        a = tl.load(x + m * K + at[None, :], mask=(m < M) & (at < K)[None, :], other=0.0)
        b = tl.load(w + n * K + at[:, None], mask=(n < N) & (at < K)[:, None], other=0.0)
        sx = tl.load(x_scale + m * tiles + t, mask=m < M, other=0.0)
        acc += tl.dot(a, b) * (sx * tl.load(w_scale + block * tiles + t))
    tl.store(y + m * N + n, acc, mask=(m < M) & (n < N))


def with_room(tensor):
    """`tensor` with NaN behind it: what a mistake reaches there is no other tensor's, wherever memory places it."""
    numbers = tensor.numel()
    room = torch.full((numbers + 200 * tensor.shape[1] + TILE,), float("nan"), device=tensor.device).to(tensor.dtype)
    room[:numbers] = tensor.flatten()
    return room[:numbers].view(tensor.shape)


@contextmanager
def fp8_operands():
    """Have the interpreter refuse a tl.dot of other numbers than FP8: on a GPU that would be another, slower product."""
    if triton_env.mode() != "interpreter":
        yield
        return
    from triton.runtime import interpreter

    builder = interpreter.interpreter_builder
    own, original = "create_dot" in vars(builder), builder.create_dot  # its own: the traffic meter's

    def dot(a, b, *rest, **options):
        if not (a.dtype.scalar.is_fp8() and b.dtype.scalar.is_fp8()):
            raise TypeError(f"tl.dot gets {a.dtype.scalar} and {b.dtype.scalar}; give it a and b in FP8, as loaded")
        return original(a, b, *rest, **options)

    builder.create_dot = dot
    try:
        yield
    finally:
        del builder.create_dot
        if own:
            builder.create_dot = original


def launch_blockscaled(kernel, x_fp8, x_scale, w_fp8, w_scale, block_m=16, block_n=32, **options):
    """y [M,N] fp32 of one launch; `options` go to the compiler: num_warps, num_stages."""
    inputs = [with_room(one) for one in (x_fp8, x_scale, w_fp8, w_scale)]
    (M, K), N = x_fp8.shape, len(w_fp8)
    y = with_room(torch.full((M, N), float("nan"), device=x_fp8.device))
    grid = triton.cdiv(M, block_m), triton.cdiv(N, block_n)
    with fp8_operands():
        kernel[grid](*inputs, y, M, N, K, BLOCK_M=block_m, BLOCK_N=block_n, TILE=TILE, **options)
    return y.clone()


def blockscaled_bytes(x_fp8, x_scale, w_fp8, w_scale):
    """x for each 32 columns, w for each 16 rows, with a scale for each number of rows of x and columns of w; y once."""
    (M, N), tiles = (len(x_fp8), len(w_fp8)), x_scale.shape[1]
    across, down = -(-N // 32), -(-M // 16)
    return across * (x_fp8.nbytes + 4 * M * tiles) + down * (w_fp8.nbytes + 4 * N * tiles) + 4 * M * N


BLOCKSCALED_KERNEL = Exercise(
    "11.4",
    reference.matmul_blockscaled,
    kernel=blockscaled_kernel,
    launch=launch_blockscaled,
    traffic=blockscaled_bytes,
    minutes=20,
    tolerance=100,  # 1e-3: on Hopper a partial sum has 14 bits
    sizes=[
        {"M": 16, "N": 32, "K": 256, "loud": 8},
        {"M": 5, "N": 150, "K": 300, "loud": 1},
        {"M": 19, "N": 40, "K": 131, "loud": 1},
        {"M": 1, "N": 7, "K": 33, "loud": 1},
        {"M": 8, "N": 160, "K": 384, "loud": 128},
    ],
    hints=[
        "Exercise 3, seen by one program: its rows m of x and columns n of y (rows of w), a loop over the tiles t of K, and "
        "in each round four loads: a, b, and their scales. A mask for each: m < M, n < N, at < K with at = t * TILE + k.",
        "a is [BLOCK_M,TILE]: x + m * K + at[None, :]. b is [TILE,BLOCK_N]: w + n * K + at[:, None], which is w's tile "
        "transposed. The scales: x_scale + m * tiles + t, a column, and w_scale + n // TILE * tiles + t, a row. Then "
        "acc += tl.dot(a, b) times both.",
    ],
)


@BLOCKSCALED_KERNEL.inputs
def _(r, M, N, K, loud):
    return quantized(r, M, N, K, loud)


BLOCKSCALED_KERNEL.slip(
    "scales_not_advanced",
    "Both scale pointers stand still: every tile gets the first one's scales. Add t: m * tiles + t, and n // TILE * "
    "tiles + t.",
    ("tiles + t", "tiles"),
)

BLOCKSCALED_KERNEL.slip(
    "x_scale_not_advanced",
    "x's scale pointer stands still: every tile gets the first one's. The scale of row m in tile t is at m * tiles + t.",
    ("m * tiles + t", "m * tiles"),
)

BLOCKSCALED_KERNEL.slip(
    "w_scale_not_advanced",
    "w's scale pointer stands still: every tile gets the first one's. It is at n // TILE * tiles + t.",
    ("TILE * tiles + t", "TILE * tiles"),
)

BLOCKSCALED_KERNEL.slip(
    "k_not_masked",
    "The last tile is not masked: behind the end of a row of x and w lie the next rows. at < K belongs into both loads.",
    (" & (at < K)[None, :]", ""),
    (" & (at < K)[:, None]", ""),
)

BLOCKSCALED_KERNEL.slip(
    "k_not_masked_in_x",
    "w's load has the mask at < K, x's has not: its last tile reads behind the end of the row. (Times w's zeros "
    "that does not show, until it reads NaN or leaves the tensor.)",
    (" & (at < K)[None, :]", ""),
)

BLOCKSCALED_KERNEL.slip(
    "k_not_masked_in_w",
    "x's load has the mask at < K, w's has not: its last tile reads behind the end of the row. (Times x's zeros "
    "that does not show, until it reads NaN or leaves the tensor.)",
    (" & (at < K)[:, None]", ""),
)

BLOCKSCALED_KERNEL.slip(
    "m_not_masked",
    "The load of x lacks m < M: the last program has rows that x has not. (Two masks are joined by &; `and` keeps one.)",
    ("(m < M) & (at < K)", "(at < K)"),
)

BLOCKSCALED_KERNEL.slip(
    "n_not_masked",
    "The load of w lacks n < N: the last program has columns that y, and rows that w has not. (Two masks are joined by &; "
    "`and` keeps one.)",
    ("(n < N) & (at < K)", "(at < K)"),
)

BLOCKSCALED_KERNEL.slip(
    "without_other",
    "The masked lanes of the loads are used without `other`: what they hold is undefined, and it goes into the "
    "sum. Give other=0.0.",
    ("[None, :], other=0.0", "[None, :]"),
    ("[:, None], other=0.0", "[:, None]"),
)

BLOCKSCALED_KERNEL.slip(
    "scale_for_each_column",
    "w's scale is taken by column: there is one for 128 of them. Its row is n // TILE.",
    ("n // TILE * tiles", "n * tiles"),
)

BLOCKSCALED_KERNEL.slip(
    "scale_of_the_first_block",
    "The first block row's scales are used for all columns: column n has those of row n // TILE.",
    ("n // TILE * tiles", "n * 0"),
)

BLOCKSCALED_KERNEL.slip(
    "scale_of_the_program",
    "w's scale is taken by program: a program has BLOCK_N columns, and a block row of scales TILE. Use n // TILE.",
    ("n // TILE * tiles", "n * 0 + tl.program_id(1) * tiles"),
)

BLOCKSCALED_KERNEL.slip(
    "x_scale_transposed",
    "x's scales are read as [tiles,M]: they are [M,tiles], so row m begins at m * tiles.",
    ("m * tiles + t", "t * M + m"),
)

BLOCKSCALED_KERNEL.slip(
    "x_scale_without_stride",
    "x's scales of row m begin at m * tiles, not at m: a row has as many of them as there are tiles.",
    ("m * tiles + t", "m + t"),
)

BLOCKSCALED_KERNEL.slip(
    "kernel_without_x_scale",
    "x's scales are missing: the partial sum is multiplied by both.",
    (" * sx", ""),
)

BLOCKSCALED_KERNEL.slip(
    "kernel_without_w_scale",
    "w's scales are missing: the partial sum is multiplied by both.",
    (" * sw", ""),
)

BLOCKSCALED_KERNEL.slip(
    "kernel_divides",
    "You divide by the scales: a number is code TIMES scale.",
    ("* sx * sw", "/ sx / sw"),
)

BLOCKSCALED_KERNEL.slip(
    "scales_the_running_sum",
    "The scales multiply the running sum, so earlier tiles are scaled again and again: acc += tl.dot(a, b) * sx * sw.",
    ("acc += tl.dot(a, b) * sx * sw", "acc = (acc + tl.dot(a, b)) * sx * sw"),
)

BLOCKSCALED_KERNEL.slip(
    "scales_after_the_loop",
    "The scales come after the loop, those of the last tile for everything: each tile's partial sum has its own, "
    "inside the loop.",
    ("acc += tl.dot(a, b) * sx * sw", ("acc += tl.dot(a, b)\nif t == tiles - 1:\n    acc = acc * sx * sw")),
)

BLOCKSCALED_KERNEL.slip(
    "sums_in_half",
    "The sum is kept in float16, which ends at 65504 and has 11 bits: make acc with tl.zeros(…, tl.float32).",
    (
        "acc += tl.dot(a, b) * sx * sw",
        "acc = (acc.to(tl.float16) + (tl.dot(a, b) * sx * sw).to(tl.float16)).to(tl.float32)",
    ),
)

BLOCKSCALED_KERNEL.slip(
    "partial_in_half",
    "The partial sum is in float16: 128 products of codes up to 448 go beyond 65504. Leave tl.dot its float32.",
    ("tl.dot(a, b)", "tl.dot(a, b).to(tl.float16).to(tl.float32)"),
)

BLOCKSCALED_KERNEL.slip(
    "overwrites_the_sum",
    "acc is overwritten in each round: only the last tile is left. Use +=.",
    ("acc +=", "acc ="),
)

BLOCKSCALED_KERNEL.slip(
    "drops_the_last_tile",
    "K // TILE rounds drop the last tile where K is no multiple of 128: there are `tiles` of them.",
    ("range(0, tiles)", "range(0, K // TILE)"),
)

BLOCKSCALED_KERNEL.slip(
    "always_the_first_tile",
    "Every round loads the first tile: the columns are at = t * TILE + k.",
    ("t * TILE + k", "k"),
)

BLOCKSCALED_KERNEL.slip(
    "w_read_as_columns",
    "w is read as [K,N]: it is [N,K], so row n begins at n * K, and b is its tile transposed by the order of the "
    "offsets.",
    ("n * K + at[:, None]", "at[:, None] * N + n"),
)

BLOCKSCALED_KERNEL.slip(
    "columns_one_further",
    "Round t begins at column t: a tile is TILE wide, so the columns are at = t * TILE + k.",
    ("t * TILE + k", "t + k"),
)

BLOCKSCALED_KERNEL.slip(
    "mask_without_brackets",
    "The masks lack their brackets: & binds more tightly than <, so m < M & at < K is m < (M & at) < K. Write "
    "(m < M) & (at[None, :] < K), and so in the other load and in the store.",
    ("(m < M) & (at < K)[None, :]", "m < M & at[None, :] < K"),
    ("(n < N) & (at < K)[:, None]", "n < N & at[:, None] < K"),
    ("(m < M) & (n < N)", "m < M & n < N"),
)

BLOCKSCALED_KERNEL.slip(
    "one_scale_of_the_program",
    "w's scale is taken by program, one for all of its columns: a program has BLOCK_N columns, and a block row of scales "
    "TILE. Row n // TILE has that of column n.",
    ("n // TILE * tiles + t, mask=n < N, other=0.0", "tl.program_id(1) * tiles + t"),
)

BLOCKSCALED_KERNEL.slip(
    "converts_the_codes",
    "a and b are converted before tl.dot, or scaled, which makes them float32 too: a GPU then multiplies float32, not FP8, "
    "and nothing is won. Give tl.dot the codes as they were loaded, and scale what it gives.",
    ("tl.dot(a, b)", "tl.dot(a.to(tl.float32), b.to(tl.float32))"),
)

BLOCKSCALED_KERNEL.slip(
    "cut_to_bf16",
    "The sum is cut to bfloat16, which has 8 bits, before it is stored: y is float32, store acc as it is.",
    ("n, acc", "n, acc.to(tl.bfloat16).to(tl.float32)"),
)

BLOCKSCALED_KERNEL.slip(
    "stores_in_each_round",
    "The values are right, but y is stored in each round: the store comes once, after the loop.",
    (
        "acc += tl.dot(a, b) * sx * sw",
        ("acc += tl.dot(a, b) * sx * sw\ntl.store(y + m * N + n, acc, mask=(m < M) & (n < N))"),
    ),
)

BLOCKSCALED_KERNEL.slip(
    "loads_each_tile_twice",
    "The values are right, but a and b are loaded twice in each round: keep them in variables.",
    (
        "acc +=",
        (
            "a = tl.load(x + m * K + at[None, :], mask=(m < M) & (at < K)[None, :], other=0.0)\n"
            "b = tl.load(w + n * K + at[:, None], mask=(n < N) & (at < K)[:, None], other=0.0)\n"
            "acc +="
        ),
    ),
)

BLOCKSCALED_KERNEL.slip(
    "store_not_masked",
    "The store has no mask: the last program writes behind the end of y. mask=(m < M) & (n < N).",
    (", mask=(m < M) & (n < N)", ""),
)

BLOCKSCALED_KERNEL.slip(
    "row_of_y_is_n_long",
    "A row of y has N numbers: row m begins at m * N.",
    ("m * N", "m * K"),
)

BLOCKSCALED_KERNEL.slip(
    "y_transposed",
    "y is written transposed: it is [M,N], so y + m * N + n.",
    ("m * N + n", "n * M + m"),
)

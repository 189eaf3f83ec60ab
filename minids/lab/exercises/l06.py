"""Lesson 06: a part of a cache, its merge with the others, into how many parts to cut, and the kernel of one part."""

import math
from math import ceil

import torch

from minids.lab.exercise import Exercise
from minids.lab.tiles import tl, triton
from minids.mla import reference

LN_2 = math.log(2)

# 06.1 ----------------------------------------------------------------------------------------------------------------

DECODE_BLOCK = Exercise(
    "06.1",
    reference.decode_block,
    minutes=10,
    sizes=[
        {"B": 1, "H": 8, "n": 16, "C": 32, "R": 8, "loud": 8},
        {"B": 3, "H": 5, "n": 33, "C": 20, "R": 6, "loud": 1},
        {"B": 2, "H": 4, "n": 21, "C": 12, "R": 4, "loud": 136},
        {"B": 1, "H": 3, "n": 1, "C": 7, "R": 5, "loud": 1},
    ],
    hints=[
        "Four steps: scores [B,H,n], their largest for each head, what e makes of score minus largest, and its sum. "
        "The result needs all four; so does the log-sum-exp.",
        "top = scores.amax(-1, keepdim=True); weights = (scores - top).exp(); total = weights.sum(-1, keepdim=True). "
        "The log of the sum of e^score is then top + log(total): the max that was taken away comes back.",
    ],
)


@DECODE_BLOCK.inputs
def _(r, B, H, n, C, R, loud):
    return r.normal(B, H, C + R), r.normal(B, n, C + R), loud * (C + R) ** -0.5, C


def scores_of(q, latents, scale):
    return torch.einsum("bhw,bnw->bhn", q, latents) * scale


def sums(weights, latents, rank):
    return torch.einsum("bhn,bnc->bhc", weights, latents[..., :rank])


@DECODE_BLOCK.wrong(
    "No maximum is taken away before exp (a minimum does not help): e^89 is beyond float32, so large scores give inf, and "
    "inf/inf is NaN. Subtract each head's largest score first."
)
def no_max(q, latents, scale, rank):
    weights = scores_of(q, latents, scale).exp()
    total = weights.sum(-1, keepdim=True)
    return sums(weights / total, latents, rank), total.squeeze(-1).log()


@DECODE_BLOCK.wrong(
    "The output is right, but the log-sum-exp is the plain log of the sum of e^score, which overflows: take it as max + "
    "log(sum of e^(score - max)), or by torch.logsumexp."
)
def lse_overflows(q, latents, scale, rank):
    scores = scores_of(q, latents, scale)
    return sums(scores.softmax(-1), latents, rank), scores.exp().sum(-1).log()


@DECODE_BLOCK.wrong(
    "The log-sum-exp lacks the maximum that you took away: log(sum of e^(s - max)) + max. Without it the parts, each with a "
    "maximum of its own, cannot be compared."
)
def lse_without_max(q, latents, scale, rank):
    scores = scores_of(q, latents, scale)
    return sums(scores.softmax(-1), latents, rank), scores.logsumexp(-1) - scores.amax(-1)


@DECODE_BLOCK.wrong(
    "Your second result is the sum itself: its logarithm is asked for, which no score can make overflow."
)
def sum_without_log(q, latents, scale, rank):
    scores = scores_of(q, latents, scale)
    return sums(scores.softmax(-1), latents, rank), scores.logsumexp(-1).exp()


@DECODE_BLOCK.wrong("Your second result is the maximum alone: the log of the sum is added to it.")
def only_max(q, latents, scale, rank):
    scores = scores_of(q, latents, scale)
    return sums(scores.softmax(-1), latents, rank), scores.amax(-1)


@DECODE_BLOCK.wrong("The logarithm is of base 2: the merge takes e to this power, so use the natural one, log.")
def base_two(q, latents, scale, rank):
    scores = scores_of(q, latents, scale)
    return sums(scores.softmax(-1), latents, rank), scores.logsumexp(-1) / LN_2


@DECODE_BLOCK.wrong("The log-sum-exp is of the unscaled scores: scale them once, before everything else.")
def lse_unscaled(q, latents, scale, rank):
    scores = scores_of(q, latents, scale)
    return sums(scores.softmax(-1), latents, rank), (scores / scale).logsumexp(-1)


@DECODE_BLOCK.wrong(
    "The rope key is among what you sum: the value is the FIRST `rank` numbers of a row, so the output has C numbers."
)
def rope_in_the_value(q, latents, scale, rank):
    scores = scores_of(q, latents, scale)
    return sums(scores.softmax(-1), latents, latents.shape[-1]), scores.logsumexp(-1)


@DECODE_BLOCK.wrong("You sum the LAST `rank` numbers of a row: the latent comes first in it, then the rope key.")
def last_of_the_row(q, latents, scale, rank):
    scores = scores_of(q, latents, scale)
    return sums(scores.softmax(-1), latents[..., -rank:], rank), scores.logsumexp(-1)


@DECODE_BLOCK.wrong(
    "The scores are over the first `rank` numbers only: the rope part, the other R, belongs to the key."
)
def no_rope(q, latents, scale, rank):
    scores = scores_of(q[..., :rank], latents[..., :rank], scale)
    return sums(scores.softmax(-1), latents, rank), scores.logsumexp(-1)


@DECODE_BLOCK.wrong(
    "You scale by (C+R)^-0.5, the width of the row: the scale is an argument, for the scores stand for keys of another width."
)
def scaled_by_the_row(q, latents, scale, rank):
    scores = scores_of(q, latents, q.shape[-1] ** -0.5)
    return sums(scores.softmax(-1), latents, rank), scores.logsumexp(-1)


@DECODE_BLOCK.wrong("The scale is forgotten: multiply the scores by it before the softmax.")
def no_scale(q, latents, scale, rank):
    scores = scores_of(q, latents, 1.0)
    return sums(scores.softmax(-1), latents, rank), scores.logsumexp(-1)


@DECODE_BLOCK.wrong(
    "One maximum is taken from ALL scores: a head whose scores are far below it has only zeros left, and 0/0 is NaN. Take "
    "each head's own, over the positions: amax(-1)."
)
def one_max_for_all(q, latents, scale, rank):
    scores = scores_of(q, latents, scale)
    weights = (scores - scores.max()).exp()
    total = weights.sum(-1, keepdim=True)
    return sums(weights / total, latents, rank), scores.max() + total.squeeze(-1).log()


@DECODE_BLOCK.wrong(
    "The output is not divided by the sum of the weights: normalised outputs are asked for, their weight is in the "
    "log-sum-exp."
)
def not_normalised(q, latents, scale, rank):
    scores = scores_of(q, latents, scale)
    return sums((scores - scores.amax(-1, True)).exp(), latents, rank), scores.logsumexp(-1)


@DECODE_BLOCK.wrong(
    "The softmax runs over the heads: each head's weights sum to 1 over the POSITIONS, the last dimension."
)
def over_heads(q, latents, scale, rank):
    scores = scores_of(q, latents, scale)
    return sums(scores.softmax(1), latents, rank), scores.logsumexp(-1)


@DECODE_BLOCK.wrong(
    "The maximum that comes back is that of the UNSCALED scores: scale them first, before the maximum is taken."
)
def max_unscaled(q, latents, scale, rank):
    scores = scores_of(q, latents, 1.0)
    top = scores.amax(-1, keepdim=True)
    weights = ((scores - top) * scale).exp()
    total = weights.sum(-1, keepdim=True)
    return sums(weights / total, latents, rank), (top + total.log()).squeeze(-1)


@DECODE_BLOCK.wrong("The logarithm is subtracted from the maximum: the two are added, max + log(sum of e^(s - max)).")
def log_subtracted(q, latents, scale, rank):
    scores = scores_of(q, latents, scale)
    return sums(scores.softmax(-1), latents, rank), 2 * scores.amax(-1) - scores.logsumexp(-1)


@DECODE_BLOCK.wrong("The log-sum-exp is of the weights, after the softmax: it is of the scores, before it.")
def lse_of_the_weights(q, latents, scale, rank):
    weights = scores_of(q, latents, scale).softmax(-1)
    return sums(weights, latents, rank), weights.logsumexp(-1)


@DECODE_BLOCK.wrong(
    "Your second result is the log of the MEAN of e^score: of the sum, or parts of unequal length cannot be compared."
)
def log_of_the_mean(q, latents, scale, rank):
    scores = scores_of(q, latents, scale)
    return sums(scores.softmax(-1), latents, rank), scores.logsumexp(-1) - math.log(scores.shape[-1])


@DECODE_BLOCK.wrong("You divide by the scale: it is a factor, 192^-0.5 and the like. Multiply by it.")
def divided_by_the_scale(q, latents, scale, rank):
    scores = scores_of(q, latents, 1 / scale)
    return sums(scores.softmax(-1), latents, rank), scores.logsumexp(-1)


@DECODE_BLOCK.wrong(
    "Large scores are cut off, so they all weigh the same: subtract each head's largest instead, which changes no weight."
)
def scores_cut_off(q, latents, scale, rank):
    scores = scores_of(q, latents, scale).clamp(max=80)
    return sums(scores.softmax(-1), latents, rank), scores.logsumexp(-1)


@DECODE_BLOCK.wrong(
    "A mask hides positions, as if the heads were queries one after the other: the new token sees every position."
)
def masked_by_heads(q, latents, scale, rank):
    scores = scores_of(q, latents, scale)
    H, n = scores.shape[-2:]
    scores = scores.masked_fill(torch.ones(H, n).tril(n - H) == 0, -float("inf"))
    return sums(scores.softmax(-1), latents, rank), scores.logsumexp(-1)


# 06.2 ----------------------------------------------------------------------------------------------------------------

MERGE_SPLITS = Exercise(
    "06.2",
    reference.merge_splits,
    minutes=10,
    sizes=[
        {"N": 8, "B": 1, "H": 8, "C": 16, "loud": 8, "empty": 0},
        {"N": 3, "B": 3, "H": 5, "C": 7, "loud": 200, "empty": 0},
        {"N": 4, "B": 2, "H": 3, "C": 10, "loud": 1, "empty": 1},
        {"N": 5, "B": 1, "H": 2, "C": 9, "loud": 1, "empty": 4},
        {"N": 1, "B": 2, "H": 4, "C": 6, "loud": 200, "empty": 0},
    ],
    hints=[
        "How much of the whole sum of e^score lies in part i? e^lse_i. So the parts are weighed by that, and the weights "
        "sum to 1. What must be taken from the lse's first, so that nothing overflows?",
        "lse = torch.logsumexp(lses, 0) is safe for large numbers and for -inf; the weights are (lses - lse).exp(), 0 for "
        "an empty part. But 0 times NaN is NaN: torch.where(weight == 0, 0.0, weight * outs), then the sum over parts.",
    ],
)


@MERGE_SPLITS.inputs
def _(r, N, B, H, C, loud, empty):
    outs, lses = r.normal(N, B, H, C), loud * r.normal(B, H) + r.normal(N, B, H)
    if empty:  # of the last sequence, so nobody wrote there: one part in front, or several behind
        gone = slice(0, 1) if empty == 1 else slice(-empty, None)
        outs[gone, -1], lses[gone, -1] = float("nan"), -float("inf")
        outs[gone, -1, :, 0] = float("inf")  # anything may lie there
    return outs, lses


def weighed(weights, outs):
    """The sum over parts; what has no weight is not looked at."""
    weights = weights.unsqueeze(-1)
    return torch.where(weights == 0, 0.0, weights * outs).sum(0)


def written(outs, lses):
    """The parts' outputs with zeros where nobody wrote."""
    return torch.where(lses.unsqueeze(-1) == -float("inf"), 0.0, outs)


@MERGE_SPLITS.wrong(
    "You average the parts as if all weighed the same: part i holds e^lse_i of the whole sum, and that is its weight."
)
def plain_mean(outs, lses):
    return written(outs, lses).mean(0), lses.logsumexp(0)


@MERGE_SPLITS.wrong(
    "You average all parts alike, and the empty ones with them, so what nobody wrote (NaN) gets in. Part i weighs e^lse_i, "
    "an empty one 0."
)
def mean_with_empty(outs, lses):
    return outs.mean(0), lses.logsumexp(0)


@MERGE_SPLITS.wrong(
    "e^lse overflows: no maximum is taken away. Subtract the largest lse of each head (or the logsumexp of all parts) "
    "before exp."
)
def no_max_in_the_merge(outs, lses):
    weights = lses.exp()
    return weighed(weights, outs) / weights.sum(0).unsqueeze(-1), weights.sum(0).log()


@MERGE_SPLITS.wrong(
    "The log-sum-exp is the plain log of the sum of e^lse, and e^300 overflows: subtract the largest lse of each head "
    "first, or take torch.logsumexp(lses, 0)."
)
def naive_logsumexp(outs, lses):
    lse = lses.exp().sum(0).log()
    return weighed((lses - lse).exp(), outs), lse


@MERGE_SPLITS.wrong(
    "The output is right, but the log-sum-exp is the plain log of the sum of e^lse, and e^300 overflows: subtract the "
    "largest l first."
)
def naive_lse_alone(outs, lses):
    return weighed(lses.softmax(0), outs), lses.exp().sum(0).log()


@MERGE_SPLITS.wrong(
    "Two things: log of the sum of e^lse overflows (e^300), so subtract the largest l first; and 0 times what nobody wrote "
    "in an empty part is NaN, so take torch.where."
)
def naive_with_empty(outs, lses):
    lse = lses.exp().sum(0).log()
    return ((lses - lse).exp().unsqueeze(-1) * outs).sum(0), lse


@MERGE_SPLITS.wrong(
    "An empty part gives NaN: its weight is 0, but nobody wrote its output, and 0 times NaN is NaN. Put 0 in its place with "
    "torch.where."
)
def zero_times_nan(outs, lses):
    return (lses.softmax(0).unsqueeze(-1) * outs).sum(0), lses.logsumexp(0)


@MERGE_SPLITS.wrong(
    "The weights do not sum to 1: divide by the sum of e^(lse_i - max), or subtract the logsumexp of all."
)
def weights_not_normalised(outs, lses):
    return weighed((lses - lses.amax(0)).exp(), outs), lses.logsumexp(0)


@MERGE_SPLITS.wrong("The new log-sum-exp lacks the maximum that you took away: max + log(sum of e^(lse_i - max)).")
def merged_without_max(outs, lses):
    return weighed(lses.softmax(0), outs), lses.logsumexp(0) - lses.amax(0)


@MERGE_SPLITS.wrong("The logs are added up: what adds up are the SUMS, e^lse. It is the log of the sum of e^lse_i.")
def logs_added(outs, lses):
    return weighed(lses.softmax(0), outs), lses.sum(0)


@MERGE_SPLITS.wrong("The new log-sum-exp is the largest of the old ones: all parts add to it, log(sum of e^lse_i).")
def largest_lse(outs, lses):
    return weighed(lses.softmax(0), outs), lses.amax(0)


@MERGE_SPLITS.wrong("The new log-sum-exp is the mean of the old ones: it is the log of the SUM of e^lse_i.")
def mean_lse(outs, lses):
    return weighed(lses.softmax(0), outs), lses.mean(0)


@MERGE_SPLITS.wrong("The weights sum to 1 over the heads: they must do so over the parts, the FIRST dimension.")
def over_heads_in_the_merge(outs, lses):
    return weighed(lses.softmax(-1), outs), lses.logsumexp(0)


@MERGE_SPLITS.wrong("You weigh by lse itself: it is a logarithm. The weight is e^lse.")
def weighed_by_the_log(outs, lses):
    logs = lses.where(lses > -float("inf"), 0.0)
    return (written(outs, lses) * (logs / logs.sum(0)).unsqueeze(-1)).sum(0), lses.logsumexp(0)


@MERGE_SPLITS.wrong("You weigh by powers of 2: lse is a natural logarithm, so take e to it.")
def powers_of_two(outs, lses):
    return weighed((lses * LN_2).softmax(0), outs), lses.logsumexp(0)


@MERGE_SPLITS.wrong(
    "One maximum is taken from ALL log-sum-exps: a head far below it has no weights left, and 0/0 is NaN. Each head has a "
    "maximum of its own: amax(0)."
)
def one_max_for_all_heads(outs, lses):
    weights = (lses - lses.max()).exp()
    return weighed(weights, outs) / weights.sum(0).unsqueeze(-1), lses.logsumexp(0)


@MERGE_SPLITS.wrong("The sum is divided by the number of parts besides: the weights sum to 1 already.")
def divided_by_parts(outs, lses):
    return weighed(lses.softmax(0), outs) / len(outs), lses.logsumexp(0)


@MERGE_SPLITS.wrong(
    "You put the zeros into outs itself, which belongs to the caller: outs.masked_fill(...) or torch.where gives a copy."
)
def cleaned_in_place(outs, lses):
    outs[lses == -float("inf")] = 0
    return (lses.softmax(0).unsqueeze(-1) * outs).sum(0), lses.logsumexp(0)


@MERGE_SPLITS.wrong(
    "You replace NaN alone: nobody wrote an empty part's output, so infinity may lie there too, and 0 times that is NaN. "
    "Ask lses which parts are empty, not outs."
)
def only_nan_replaced(outs, lses):
    outs = torch.where(outs.isnan(), 0.0, outs)
    return (lses.softmax(0).unsqueeze(-1) * outs).sum(0), lses.logsumexp(0)


@MERGE_SPLITS.wrong("The NaN is replaced too late, in the sum, which has lost the other parts by then: do it before.")
def cleaned_at_the_end(outs, lses):
    return (lses.softmax(0).unsqueeze(-1) * outs).sum(0).nan_to_num(), lses.logsumexp(0)


@MERGE_SPLITS.wrong(
    "An empty part gets a weight: in the place of its -inf you put 0, and e^0 is 1. Leave lses as it is: e^-inf is 0."
)
def empty_weighs_one(outs, lses):
    logs = lses.masked_fill(lses == -float("inf"), 0.0)
    return (logs.softmax(0).unsqueeze(-1) * written(outs, lses)).sum(0), logs.logsumexp(0)


@MERGE_SPLITS.wrong(
    "A part that is empty in ONE sequence is left out for all of them: decide for each sequence and head, torch.where."
)
def empty_for_all(outs, lses):
    there = (lses > -float("inf")).flatten(1).all(1)
    return weighed(lses[there].softmax(0), outs[there]), lses[there].logsumexp(0)


@MERGE_SPLITS.wrong(
    "You average the parts that are not empty as if all weighed the same: part i holds e^lse_i of the whole sum."
)
def mean_of_the_written(outs, lses):
    return written(outs, lses).sum(0) / (lses > -float("inf")).sum(0).unsqueeze(-1), lses.logsumexp(0)


@MERGE_SPLITS.wrong("The sign is turned round: the weight is e^(lse_i - lse), so that a large lse_i weighs much.")
def sign_turned(outs, lses):
    weights = (lses.logsumexp(0) - lses).exp().masked_fill(lses == -float("inf"), 0.0)
    return weighed(weights, outs), lses.logsumexp(0)


@MERGE_SPLITS.wrong("You merge two parts: there are N, and N may be 1.")
def two_parts(outs, lses):
    both = lses[[0, -1]]
    return weighed(both.softmax(0), outs[[0, -1]]), both.logsumexp(0)


@MERGE_SPLITS.wrong(
    "Part by part, what was added before is not weighed again: where lse grows, the output so far shrinks by e^(old - new)."
)
def not_weighed_again(outs, lses):
    out, lse = torch.zeros_like(outs[0]), torch.full_like(lses[0], -float("inf"))
    for part, log in zip(outs, lses, strict=True):
        lse = torch.logaddexp(lse, log)
        out = out + weighed((log - lse).exp()[None], part[None])
    return out, lse


@MERGE_SPLITS.wrong(
    "Part by part, -inf minus -inf is NaN: while all parts so far are empty there is nothing to shrink. Take torch.where, "
    "or the logsumexp of all parts at once."
)
def nothing_minus_nothing(outs, lses):
    out, lse = torch.zeros_like(outs[0]), torch.full_like(lses[0], -float("inf"))
    for part, log in zip(written(outs, lses), lses, strict=True):
        new = torch.logaddexp(lse, log)
        out = (lse - new).exp().unsqueeze(-1) * out + (log - new).exp().unsqueeze(-1) * part
        lse = new
    return out, lse


@MERGE_SPLITS.wrong("Only the heaviest part is taken: all parts count, each with weight e^(lse_i - lse).")
def heaviest_alone(outs, lses):
    best = lses.argmax(0)[None, ..., None].expand(1, *outs.shape[1:])
    return outs.gather(0, best)[0], lses.logsumexp(0)


# 06.3 ----------------------------------------------------------------------------------------------------------------


def choose_splits(batch, heads, length, sms):
    """Into how many parts to cut each of `batch` sequences of `length` cached positions; see lesson 06 for the cost."""
    return cheapest(batch * ceil(heads / 64), ceil(length / 64), sms, extra_of(heads))


def extra_of(heads):
    return 1 + min(heads, 64) / 14


def most_of(blocks):
    """The largest number of parts that is allowed."""
    return max(1, min(blocks // 2, 128))


def cheapest(programs, blocks, sms, extra, most=None, up=ceil, last=False):
    """The n of least waves x (blocks of a part + extra), the smallest of several; extra only where there are parts."""

    def cost(n):
        return up(programs * n / sms) * (up(blocks / n) + (extra if n > 1 else 0))

    allowed = range(1, (most_of(blocks) if most is None else max(1, most)) + 1)
    return min(reversed(allowed) if last else allowed, key=cost)


CHOOSE_SPLITS = Exercise(
    "06.3",
    choose_splits,
    minutes=10,
    sizes=[
        {"batch": 1, "heads": 128, "length": 32768, "sms": 132},
        {"batch": 8, "heads": 64, "length": 8192, "sms": 128},
        {"batch": 3, "heads": 40, "length": 1000, "sms": 132},
        {"batch": 1, "heads": 16, "length": 300, "sms": 132},
        {"batch": 128, "heads": 128, "length": 4096, "sms": 132},
        {"batch": 100, "heads": 100, "length": 5000, "sms": 108},
        {"batch": 1, "heads": 8, "length": 67200, "sms": 132},
        {"batch": 2, "heads": 16, "length": 100, "sms": 24},
        {"batch": 50, "heads": 16, "length": 9000, "sms": 132},
        {"batch": 33, "heads": 130, "length": 67700, "sms": 72},
        {"batch": 33, "heads": 8, "length": 37496, "sms": 128},
        {"batch": 100, "heads": 40, "length": 48, "sms": 108},
        {"batch": 5, "heads": 70, "length": 488, "sms": 114},
    ],
    hints=[
        "Write the time of ONE number of parts as a function cost(parts), then let min(range(...), key=cost) try them all. "
        "Of equal ones min takes the first, which is the smallest number.",
        "programs = batch · ceil(heads/64), blocks = ceil(length/64); cost(parts) = ceil(programs·parts/sms) · "
        "(ceil(blocks/parts) + extra, if parts > 1); parts from 1 up to min(blocks // 2, 128), and 1 where that is 0.",
    ],
)


@CHOOSE_SPLITS.inputs
def _(r, batch, heads, length, sms):
    return batch, heads, length, sms


def work_of(batch, heads, length, sms):
    """What `cheapest` takes: programs, row blocks, SMs, and the extra of a part."""
    return batch * ceil(heads / 64), ceil(length / 64), sms, extra_of(heads)


def with_cost(cost, most=most_of, least=1):
    """The answer that takes the n of least cost(programs, blocks, sms, heads, n), from `least` to most(blocks)."""

    def answer(batch, heads, length, sms):
        programs, blocks = batch * ceil(heads / 64), ceil(length / 64)
        return min(range(least, most(blocks) + 1), key=lambda n: cost(programs, blocks, sms, heads, n))

    return answer


def with_extra(extra):
    """The answer whose parts have extra(heads, n) beside their blocks, where there are several."""
    return with_cost(
        lambda programs, blocks, sms, heads, n: (
            ceil(programs * n / sms) * (ceil(blocks / n) + (extra(heads, n) if n > 1 else 0))
        )
    )


def cost_of(programs, blocks, sms, heads, n):
    """The right cost."""
    return ceil(programs * n / sms) * (ceil(blocks / n) + (extra_of(heads) if n > 1 else 0))


@CHOOSE_SPLITS.wrong(
    "You round down, or not at all: 133 programs on 132 processors take TWO waves, and 65 positions two blocks. Both "
    "divisions round up."
)
def floor_instead_of_ceil(batch, heads, length, sms):
    return cheapest(*work_of(batch, heads, length, sms), up=math.floor)


@CHOOSE_SPLITS.wrong(
    "The blocks of a part are rounded down: 100 blocks in 64 parts are 2 blocks in the longest part, not 1."
)
def blocks_rounded_down(batch, heads, length, sms):
    def cost(programs, blocks, sms, heads, n):
        return ceil(programs * n / sms) * (blocks // n + extra_of(heads) * (n > 1))

    return with_cost(cost)(batch, heads, length, sms)


@CHOOSE_SPLITS.wrong(
    "The batch is forgotten: every sequence has programs of its own, so many sequences fill a GPU without parts."
)
def no_batch(batch, heads, length, sms):
    return choose_splits(1, heads, length, sms)


@CHOOSE_SPLITS.wrong(
    "You count a program for each head: 64 heads share one, for they share what it loads. ceil(heads / 64)."
)
def a_program_a_head(batch, heads, length, sms):
    _, blocks, sms, extra = work_of(batch, heads, length, sms)
    return cheapest(batch * heads, blocks, sms, extra)


@CHOOSE_SPLITS.wrong("The heads are forgotten: more than 64 take several programs, ceil(heads / 64) for each sequence.")
def heads_forgotten(batch, heads, length, sms):
    _, blocks, sms, extra = work_of(batch, heads, length, sms)
    return cheapest(batch, blocks, sms, extra)


@CHOOSE_SPLITS.wrong(
    "Parts may be shorter than allowed: two row blocks, 128 positions, is the least, so at most blocks // 2 parts."
)
def too_short_parts(batch, heads, length, sms):
    programs, blocks, sms, extra = work_of(batch, heads, length, sms)
    return cheapest(programs, blocks, sms, extra, most=min(blocks, 128))


@CHOOSE_SPLITS.wrong(
    "Both limits are forgotten: a part has two row blocks at least, so at most blocks // 2 parts, and never more than 128."
)
def no_limit(batch, heads, length, sms):
    programs, blocks, sms, extra = work_of(batch, heads, length, sms)
    return cheapest(programs, blocks, sms, extra, most=blocks)


@CHOOSE_SPLITS.wrong(
    "The row blocks of a sequence are rounded down: 1000 positions are 16 of them, the last one not full. Take "
    "ceil(length / 64), not length // 64."
)
def positions_rounded_down(batch, heads, length, sms):
    programs, _, sms, extra = work_of(batch, heads, length, sms)
    return cheapest(programs, length // 64, sms, extra)


@CHOOSE_SPLITS.wrong("There may be more than 128 parts in your answer: 128 is the most that is allowed.")
def too_many_parts(batch, heads, length, sms):
    programs, blocks, sms, extra = work_of(batch, heads, length, sms)
    return cheapest(programs, blocks, sms, extra, most=blocks // 2)


@CHOOSE_SPLITS.wrong(
    "What a part costs beside its blocks is forgotten: without `extra` nothing speaks against ever more parts."
)
def parts_for_nothing(batch, heads, length, sms):
    programs, blocks, sms, _ = work_of(batch, heads, length, sms)
    return cheapest(programs, blocks, sms, 0)


@CHOOSE_SPLITS.wrong(
    "You count `extra` once, not in every wave: each wave begins its programs and has its results to merge."
)
def extra_once(batch, heads, length, sms):
    def cost(programs, blocks, sms, heads, n):
        return ceil(programs * n / sms) * ceil(blocks / n) + extra_of(heads) * (n > 1)

    return with_cost(cost)(batch, heads, length, sms)


@CHOOSE_SPLITS.wrong("The waves are forgotten: programs beyond the number of processors wait for those before them.")
def no_waves(batch, heads, length, sms):
    _, blocks, sms, extra = work_of(batch, heads, length, sms)
    return cheapest(1, blocks, 10**9, extra)


@CHOOSE_SPLITS.wrong(
    "You cut until every processor has a part, whatever the last wave and the merge cost: try all, and take the cheapest."
)
def fill_all(batch, heads, length, sms):
    programs, blocks, sms, _ = work_of(batch, heads, length, sms)
    return max(1, min(ceil(sms / programs), blocks // 2, 128))


@CHOOSE_SPLITS.wrong("The DEAREST number of parts comes out: min, not max.")
def dearest(batch, heads, length, sms):
    return with_cost(lambda *given: -cost_of(*given))(batch, heads, length, sms)


@CHOOSE_SPLITS.wrong(
    "Of several equally cheap numbers you take the largest: take the smallest, which has less to merge."
)
def largest_of_equals(batch, heads, length, sms):
    return cheapest(*work_of(batch, heads, length, sms), last=True)


@CHOOSE_SPLITS.wrong(
    "`extra` is charged where nothing is cut, too: a single part is not merged, so it costs its blocks."
)
def extra_for_one(batch, heads, length, sms):
    def cost(programs, blocks, sms, heads, n):
        return ceil(programs * n / sms) * (ceil(blocks / n) + extra_of(heads))

    return with_cost(cost)(batch, heads, length, sms)


@CHOOSE_SPLITS.wrong(
    "`extra` grows with all heads: a head block has 64 at most, so it is 1 + min(heads, 64) / 14, for 128 heads too."
)
def extra_not_capped(batch, heads, length, sms):
    return with_extra(lambda heads, n: 1 + heads / 14)(batch, heads, length, sms)


@CHOOSE_SPLITS.wrong("`extra` is that of 64 heads always: with fewer it is less, 1 + min(heads, 64) / 14.")
def extra_of_64(batch, heads, length, sms):
    return with_extra(lambda heads, n: 1 + 64 / 14)(batch, heads, length, sms)


@CHOOSE_SPLITS.wrong("`extra` lacks its 1, or the 1 is divided too: it is 1 + (min(heads, 64) / 14).")
def extra_without_1(batch, heads, length, sms):
    return with_extra(lambda heads, n: min(heads, 64) / 14)(batch, heads, length, sms)


@CHOOSE_SPLITS.wrong("`extra` is the 1 alone: each head of a head block adds a 14th, min(heads, 64) / 14.")
def extra_of_1(batch, heads, length, sms):
    return with_extra(lambda heads, n: 1)(batch, heads, length, sms)


@CHOOSE_SPLITS.wrong("`extra` is rounded: min(heads, 64) / 14 is no whole number, so divide by / and not by //.")
def extra_rounded(batch, heads, length, sms):
    return with_extra(lambda heads, n: 1 + min(heads, 64) // 14)(batch, heads, length, sms)


@CHOOSE_SPLITS.wrong(
    "`extra` is charged for all parts in each: the parts of a wave run side by side, so it counts once."
)
def extra_times_parts(batch, heads, length, sms):
    return with_extra(lambda heads, n: n * extra_of(heads))(batch, heads, length, sms)


@CHOOSE_SPLITS.wrong("The number of SMs is written into the answer: it is the argument sms, and not always 132.")
def always_132(batch, heads, length, sms):
    return choose_splits(batch, heads, length, 132)


@CHOOSE_SPLITS.wrong(
    "Heads of several sequences share a program in your count: a program has ONE sequence, so programs are "
    "batch * ceil(heads / 64), rounded up before the product."
)
def heads_together(batch, heads, length, sms):
    return cheapest(ceil(batch * heads / 64), ceil(length / 64), sms, extra_of(heads))


@CHOOSE_SPLITS.wrong("Programs are not rounded: 100 heads take two of them, as 128 do. batch * ceil(heads / 64).")
def heads_not_rounded(batch, heads, length, sms):
    return cheapest(batch * heads / 64, ceil(length / 64), sms, extra_of(heads))


@CHOOSE_SPLITS.wrong(
    "Nothing is left to choose from where the sequence is short: up to 127 positions blocks // 2 is 0, or 1. One part is "
    "always allowed: max(1, ...)."
)
def none_allowed(batch, heads, length, sms):
    return with_cost(cost_of, lambda blocks: min(blocks // 2, 128))(batch, heads, length, sms)


@CHOOSE_SPLITS.wrong("One part is not tried: N = 1 is always allowed, and often the cheapest.")
def from_two_on(batch, heads, length, sms):
    return with_cost(cost_of, lambda blocks: max(2, most_of(blocks)), least=2)(batch, heads, length, sms)


@CHOOSE_SPLITS.wrong("The largest number that is allowed is not tried: range(1, most) ends before it, so most + 1.")
def end_left_out(batch, heads, length, sms):
    return with_cost(cost_of, lambda blocks: max(1, most_of(blocks) - 1))(batch, heads, length, sms)


@CHOOSE_SPLITS.wrong("blocks / 2 is rounded up: 5 row blocks allow two parts of two at least, not three. blocks // 2.")
def half_rounded_up(batch, heads, length, sms):
    return with_cost(cost_of, lambda blocks: max(1, min(ceil(blocks / 2), 128)))(batch, heads, length, sms)


@CHOOSE_SPLITS.wrong("You try powers of 2 alone: any number up to the most that is allowed may be the cheapest.")
def powers_of_two_alone(batch, heads, length, sms):
    programs, blocks = batch * ceil(heads / 64), ceil(length / 64)
    allowed = [n for n in (1, 2, 4, 8, 16, 32, 64, 128) if n <= max(1, blocks // 2)]
    return min(allowed, key=lambda n: cost_of(programs, blocks, sms, heads, n))


@CHOOSE_SPLITS.wrong(
    "You stop at the first number that costs more than the one before it: the cost is a staircase, and may fall again. Try "
    "all of them."
)
def first_rise(batch, heads, length, sms):
    programs, blocks, n = batch * ceil(heads / 64), ceil(length / 64), 1
    costs = [cost_of(programs, blocks, sms, heads, parts) for parts in range(1, most_of(blocks) + 1)]
    while n < len(costs) and costs[n] <= costs[n - 1]:
        n += 1
    return n


@CHOOSE_SPLITS.wrong(
    "You give the least COST: the number of parts that has it is asked for, min(range(...), key=cost)."
)
def the_cost_itself(batch, heads, length, sms):
    programs, blocks = batch * ceil(heads / 64), ceil(length / 64)
    return min(cost_of(programs, blocks, sms, heads, n) for n in range(1, most_of(blocks) + 1))


# 06.4 ----------------------------------------------------------------------------------------------------------------


@triton.jit
def decode_block_kernel(
    q, latents, out, lse, scale, H, n, stride_b, stride_n,
    C: tl.constexpr, R: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """BLOCK_H heads of one sequence over its n cached rows; q [B,H,C+R] without gaps, out and lse float32."""
    b, h = tl.program_id(1), tl.program_id(0) * BLOCK_H + tl.arange(0, BLOCK_H)
    c, r, j = tl.arange(0, C)[None, :], tl.arange(0, R)[None, :], tl.arange(0, BLOCK_N)
    row, ours = (b * H + h)[:, None], (h < H)[:, None]
    q_c = tl.load(q + row * (C + R) + c, mask=ours, other=0.0)
    q_r = tl.load(q + row * (C + R) + C + r, mask=ours, other=0.0)
    m = tl.full((BLOCK_H,), float("-inf"), tl.float32)
    total, acc = tl.zeros((BLOCK_H,), tl.float32), tl.zeros((BLOCK_H, C), tl.float32)
    for start in range(0, n, BLOCK_N):
        at, there = latents + b * stride_b + (start + j)[:, None] * stride_n, start + j < n
        c_kv = tl.load(at + c, mask=there[:, None], other=0.0)
        k_rope = tl.load(at + C + r, mask=there[:, None], other=0.0)
        scores = tl.dot(q_c, tl.trans(c_kv)) + tl.dot(q_r, tl.trans(k_rope))
        scores = tl.where(there[None, :], scores * scale, float("-inf"))
        top = tl.maximum(m, tl.max(scores, 1))
        p, shrink = tl.exp(scores - top[:, None]), tl.exp(m - top)
        total = total * shrink + tl.sum(p, 1)
        acc = acc * shrink[:, None] + tl.dot(p.to(c_kv.dtype), c_kv)
        m = top
    tl.store(out + row * C + c, acc / total[:, None], mask=ours)
    tl.store(lse + b * H + h, m + tl.log(total), mask=h < H)


def with_room(latents):
    """The same rows before free memory: what a kernel reads behind them belongs to no tensor, wherever that lies."""
    reach = sum((size - 1) * stride for size, stride in zip(latents.shape, latents.stride(), strict=True)) + 1
    room = latents.new_full((reach + 64 * latents.stride(1),), float("nan"))
    return room.as_strided(latents.shape, latents.stride()).copy_(latents)


def launch_decode_block(kernel, q, latents, scale, rank, block_h=None, block_n=None, **options):
    """(out [B,H,C], lse [B,H]) in float32 of one launch; `options` go to the compiler: num_warps, num_stages."""
    q, latents, (B, H, width) = q.contiguous(), with_room(latents), q.shape
    block_h, block_n = block_h or (32 if B == 2 else 16), block_n or (32 if B == 3 else 16)  # no kernel may know them
    out, lse = torch.empty(B, H, rank, device=q.device), torch.empty(B, H, device=q.device)
    rows, strides = latents.shape[1], latents.stride()[:2]
    kernel[(triton.cdiv(H, block_h), B)](
        q, latents, out, lse, scale, H, rows, *strides, C=rank, R=width - rank, BLOCK_H=block_h, BLOCK_N=block_n, **options
    )  # fmt: skip
    return out, lse


def decode_block(q, latents, scale, rank):
    """reference.decode_block, computed in float32 where the inputs have 16 bits."""
    if q.dtype != torch.float64:
        q, latents = q.float(), latents.float()
    return reference.decode_block(q, latents, scale, rank)


def decode_block_bytes(q, latents, scale, rank):
    """Queries and results once; every cached row once for each 16 heads."""
    results = 4 * q[..., 0].numel() * (rank + 1)
    return q.numel() * q.element_size() + ceil(q.shape[1] / 16) * latents.numel() * latents.element_size() + results


DECODE_BLOCK_KERNEL = Exercise(
    "06.4",
    decode_block,
    kernel=decode_block_kernel,
    launch=launch_decode_block,
    traffic=decode_block_bytes,
    minutes=20,
    dtypes=(torch.float16,),
    sizes=[
        {"B": 1, "H": 16, "n": 48, "C": 32, "R": 16, "loud": 8},
        {"B": 2, "H": 5, "n": 33, "C": 16, "R": 16, "loud": 1},
        {"B": 3, "H": 20, "n": 40, "C": 32, "R": 16, "loud": 1},
        {"B": 1, "H": 3, "n": 39, "C": 16, "R": 32, "loud": 136},
        {"B": 1, "H": 2, "n": 48, "C": 16, "R": 16, "loud": 0.1},
    ],
    hints=[
        "For each head keep three things from block to block: the largest score so far, the sum of weights, and the weighted "
        "sum of latents. Where the largest grows, the other two shrink by e^(old - new).",
        "In a block: load c_kv [BLOCK_N,C] and k_rope [BLOCK_N,R] with there = start + j < n; scores are two tl.dot with "
        "tl.trans(...), -inf where not there; top = tl.maximum(m, tl.max(scores, 1)). The values are c_kv itself: "
        "tl.dot(p.to(c_kv.dtype), c_kv).",
    ],
)


@DECODE_BLOCK_KERNEL.inputs
def _(r, B, H, n, C, R, loud):
    q, latents = r.normal(B, H, C + R), r.normal(B, n, C + R)
    if loud > 100:  # all scores of the first head are far below 0
        q[:, 0, 0], latents[..., 0] = -15, 2
    if loud < 1:  # sums of latents that 16 bits do not hold
        q[..., 1], latents[..., 1] = 0, 3000
    return q, latents, loud * (C + R) ** -0.5, C


DECODE_BLOCK_KERNEL.slip(
    "latent_twice",
    "The result is right, but each latent is loaded twice, once as key and once as value: it is the same block, so "
    "use c_kv for both.",
    ("tl.dot(p.to(c_kv.dtype), c_kv)", "tl.dot(p.to(c_kv.dtype), tl.load(at + c, mask=there[:, None], other=0.0))"),
)

DECODE_BLOCK_KERNEL.slip(
    "queries_again",
    "The result is right, but the queries are loaded again for each block: they do not change, so load them before "
    "the loop.",
    (
        "c_kv = tl.load",
        (
            "q_c = tl.load(q + row * (C + R) + c, mask=ours, other=0.0)\n"
            "q_r = tl.load(q + row * (C + R) + C + r, mask=ours, other=0.0)\n"
            "c_kv = tl.load"
        ),
    ),
)

DECODE_BLOCK_KERNEL.slip(
    "no_mask",
    "The last block is not masked: where n is no multiple of BLOCK_N it has lanes without a position. there = start "
    "+ j < n belongs into both loads AND the scores.",
    (", mask=there[:, None], other=0.0", ""),
    ('tl.where(there[None, :], scores * scale, float("-inf"))', "scores * scale"),
)

DECODE_BLOCK_KERNEL.slip(
    "loads_without_mask",
    "The scores have their mask, the loads have none: they read behind the last row. Give both mask=there[:, None], "
    "other=0.0.",
    (", mask=there[:, None], other=0.0", ""),
)

DECODE_BLOCK_KERNEL.slip(
    "scores_without_mask",
    "The loads have their mask, the scores have none: a missing row of zeros has score 0, and e^0 is 1. Put -inf "
    "there, with tl.where, before the maximum.",
    ('tl.where(there[None, :], scores * scale, float("-inf"))', "scores * scale"),
)

DECODE_BLOCK_KERNEL.slip(
    "no_other",
    "The masked lanes of the loads are used without `other`: what they hold is undefined (NaN in this check), and "
    "weight 0 times NaN is NaN. Give other=0.0.",
    ("mask=there[:, None], other=0.0", "mask=there[:, None]"),
)

DECODE_BLOCK_KERNEL.slip(
    "no_rope_kernel",
    "The rope part of the scores is missing: add tl.dot(q_r, tl.trans(k_rope)).",
    (" + tl.dot(q_r, tl.trans(k_rope))", ""),
)

DECODE_BLOCK_KERNEL.slip(
    "no_scale_kernel",
    "The scale is forgotten: multiply the scores by it, before the maximum.",
    ("scores * scale", "scores"),
)

DECODE_BLOCK_KERNEL.slip(
    "acc_stays",
    "The accumulator is not rescaled where the maximum grows: what it holds is relative to the OLD maximum, so "
    "multiply it by e^(old - new), as the total.",
    ("acc * shrink[:, None]", "acc"),
)

DECODE_BLOCK_KERNEL.slip(
    "total_stays",
    "The sum of weights is not rescaled where the maximum grows: multiply it by e^(old - new), as the accumulator.",
    ("total * shrink", "total"),
)

DECODE_BLOCK_KERNEL.slip(
    "nothing_shrinks",
    "Neither the total nor the accumulator is rescaled where the maximum grows: multiply both by e^(old - new) first.",
    ("acc * shrink[:, None]", "acc"),
    ("total * shrink", "total"),
)

DECODE_BLOCK_KERNEL.slip(
    "max_of_the_block",
    "The maximum is that of the last block alone: the new one is tl.maximum(m, the block's), or a large score in an "
    "earlier block is forgotten and e^(old - new) may overflow.",
    ("tl.maximum(m, tl.max(scores, 1))", "tl.max(scores, 1)"),
)

DECODE_BLOCK_KERNEL.slip(
    "no_max_kernel",
    "No maximum is taken away before exp: e^89 is beyond float32. Keep the largest score so far, and subtract it.",
    ("tl.maximum(m, tl.max(scores, 1))", "tl.zeros((BLOCK_H,), tl.float32)"),
)

DECODE_BLOCK_KERNEL.slip(
    "starts_at_zero",
    "The maximum starts at 0: where all scores are far below 0 nothing is left of them. Start at -inf.",
    ('tl.full((BLOCK_H,), float("-inf"), tl.float32)', "tl.zeros((BLOCK_H,), tl.float32)"),
)

DECODE_BLOCK_KERNEL.slip(
    "first_block",
    "Every round loads the first block: the positions are start + j.",
    ("(start + j)[:, None]", "j[:, None]"),
)

DECODE_BLOCK_KERNEL.slip(
    "first_sequence",
    "Every program reads the first sequence: add b * stride_b to the pointer.",
    ("latents + b * stride_b", "latents"),
)

DECODE_BLOCK_KERNEL.slip(
    "no_stride",
    "The rows of the cache lie stride_n numbers apart, and the sequences stride_b, which is more than C+R where the "
    "cache has gaps: use the strides.",
    ("b * stride_b", "b * n * (C + R)"),
    ("* stride_n", "* (C + R)"),
)

DECODE_BLOCK_KERNEL.slip(
    "not_divided",
    "The output is not divided by the sum of the weights at the end.",
    ("acc / total[:, None]", "acc"),
)

DECODE_BLOCK_KERNEL.slip(
    "lse_without_max_kernel",
    "The log-sum-exp lacks the maximum: m + log(total).",
    ("m + tl.log(total)", "tl.log(total)"),
)

DECODE_BLOCK_KERNEL.slip(
    "base_two_kernel",
    "The logarithm of the total is of base 2: the merge takes e to it, so use tl.log.",
    ("tl.log(total)", "tl.log2(total)"),
)

DECODE_BLOCK_KERNEL.slip(
    "last_block_left",
    "The last block is left out where it is not full: range(0, n, BLOCK_N) reaches it, and the mask does the rest.",
    ("range(0, n, BLOCK_N)", "range(0, n - BLOCK_N + 1, BLOCK_N)"),
)

DECODE_BLOCK_KERNEL.slip(
    "steps_of_16",
    "The loop goes in steps of a number of its own: BLOCK_N is an argument, 16 in some launches of this check, 32 in others.",
    ("range(0, n, BLOCK_N)", "range(0, n, 16)"),
)

DECODE_BLOCK_KERNEL.slip(
    "half_sums",
    "The weighted sum is kept in 16 bits, which end at 65504: keep it in float32, as tl.dot gives it.",
    (
        "acc * shrink[:, None] + tl.dot(p.to(c_kv.dtype), c_kv)",
        "(acc * shrink[:, None] + tl.dot(p.to(c_kv.dtype), c_kv)).to(c_kv.dtype)",
    ),
)

DECODE_BLOCK_KERNEL.slip(
    "max_not_kept",
    "The new maximum is not kept for the next block: m = the new one, after both sums have shrunk.",
    ("m = top", "m = m"),
)

DECODE_BLOCK_KERNEL.slip(
    "grows_instead",
    "Everything is NaN. Is the factor upside down? It is e^(old - new), 0 at first, where e^(new - old) would be infinite. "
    "Or is nothing stored?",
    ("tl.exp(m - top)", "tl.exp(top - m)"),
)

DECODE_BLOCK_KERNEL.slip(
    "shrunk_too_much",
    "What this block adds is shrunk too: its weights are relative to the new maximum already. Shrink the old sum, then add.",
    (
        "acc * shrink[:, None] + tl.dot(p.to(c_kv.dtype), c_kv)",
        "(acc + tl.dot(p.to(c_kv.dtype), c_kv)) * shrink[:, None]",
    ),
)

DECODE_BLOCK_KERNEL.slip(
    "sum_over_heads",
    "The weights are summed over the heads: axis 1 of [BLOCK_H, BLOCK_N] are the positions, tl.sum(p, 1).",
    ("tl.sum(p, 1)", "tl.sum(p, 0)"),
)

DECODE_BLOCK_KERNEL.slip(
    "max_over_heads",
    "The maximum is over the heads: axis 1 of [BLOCK_H, BLOCK_N] are the positions, tl.max(scores, 1).",
    ("tl.max(scores, 1)", "tl.max(scores, 0)"),
)

DECODE_BLOCK_KERNEL.slip(
    "one_max_for_all_kernel",
    "One maximum is taken of all heads: a head far below it has no weights left, and 0/0 is NaN. tl.max(scores, 1).",
    ("tl.max(scores, 1)", "tl.max(tl.max(scores, 1), 0)"),
)

DECODE_BLOCK_KERNEL.slip(
    "rope_unscaled_kernel",
    "Only the latent's part of the scores is scaled: add both products first, then multiply by the scale.",
    (
        "tl.dot(q_c, tl.trans(c_kv)) + tl.dot(q_r, tl.trans(k_rope))",
        "tl.dot(q_c, tl.trans(c_kv)) + tl.dot(q_r, tl.trans(k_rope)) / scale",
    ),
)

DECODE_BLOCK_KERNEL.slip(
    "powers_of_two_kernel",
    "You take powers of 2: tl.exp is asked for, or tl.exp2 of scores that log2(e) has been multiplied into.",
    ("tl.exp(", "tl.exp2("),
)

DECODE_BLOCK_KERNEL.slip(
    "divided_in_the_loop",
    "The sum is divided in every round: what is added later has another denominator. Divide once, after the loop.",
    ("m = top", "m = top\nacc = acc / total[:, None]"),
)

DECODE_BLOCK_KERNEL.slip(
    "rope_key_from_the_start",
    "The rope key is read from the row's beginning: it lies behind the latent, C numbers later.",
    ("at + C + r", "at + r"),
)

DECODE_BLOCK_KERNEL.slip(
    "rope_key_after_r",
    "The rope key is read R numbers after the row's beginning: it lies behind the latent, C numbers later.",
    ("at + C + r", "at + R + r"),
)

DECODE_BLOCK_KERNEL.slip(
    "one_round",
    "Only the first block is attended to: the loop goes on to n, range(0, n, BLOCK_N).",
    ("range(0, n, BLOCK_N)", "range(0, BLOCK_N, BLOCK_N)"),
)

DECODE_BLOCK_KERNEL.slip(
    "scaled_by_the_row_kernel",
    "You compute a scale of your own: it is an argument, for the scores stand for keys of another width.",
    ("scores * scale", "scores / tl.sqrt(1.0 * (C + R))"),
)

DECODE_BLOCK_KERNEL.slip(
    "not_transposed",
    "The cached block is multiplied as it lies, [BLOCK_N, C]: as a key it must be turned, tl.trans(c_kv), [C, BLOCK_N].",
    ("tl.trans(c_kv)", "c_kv"),
    ("tl.trans(k_rope)", "k_rope"),
)

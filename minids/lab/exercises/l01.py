"""Lesson 01: the parts of a transformer, and the measure of its loss."""

import math

import torch
import torch.nn.functional as F

from minids import layers
from minids.data import bits_per_byte
from minids.lab.exercise import Exercise

HIDDEN = [
    {"B": 1, "T": 8, "D": 16},
    {"B": 3, "T": 7, "D": 10},
    {"B": 3, "T": 8, "D": 32},
    {"B": 1, "T": 5, "D": 33},
    {"rows": 6, "D": 9},  # [..., D] may also be a matrix
]
HEADS = [
    {"B": 1, "T": 16, "H": 8, "d": 8},
    {"B": 3, "T": 7, "H": 3, "d": 6},
    {"B": 2, "T": 8, "H": 8, "d": 16},  # as many heads as positions: mixing them up raises nothing here
    {"B": 1, "T": 13, "H": 2, "d": 10},
]

RMS_NORM = Exercise(
    "01.1",
    layers.rms_norm,
    minutes=5,
    sizes=HIDDEN,
    gradients=True,
    hints=[
        "Three steps: square, average over the last dimension, divide x by the root. Which one keeps the dimension?",
        "x.square().mean(-1, keepdim=True) has the shape [..., 1]; torch.rsqrt gives 1 / sqrt. eps stands under the root.",
    ],
)


@RMS_NORM.inputs
def _(r, D, **before):
    return 0.3 * r.normal(*before.values(), D) + 0.2, 1 + r.normal(D), 0.01


@RMS_NORM.wrong("You subtract the mean first: that is LayerNorm. RMSNorm divides by the root mean square, and no more.")
def mean_centred(x, weight, eps):
    centred = x - x.mean(-1, keepdim=True)
    return centred * torch.rsqrt(centred.square().mean(-1, keepdim=True) + eps) * weight


@RMS_NORM.wrong("eps stands outside the root: it must be added to the mean of the squares, before the root is taken.")
def eps_outside(x, weight, eps):
    return x / (x.square().mean(-1, keepdim=True).sqrt() + eps) * weight


@RMS_NORM.wrong(
    "The weight is multiplied in before the norm, so it changes the size that is divided out: it comes last."
)
def weight_first(x, weight, eps):
    y = x * weight
    return y * torch.rsqrt(y.square().mean(-1, keepdim=True) + eps)


@RMS_NORM.wrong(
    "You divide by the root of the SUM of squares: it must be their mean, or the result shrinks as D grows."
)
def sum_of_squares(x, weight, eps):
    return x * torch.rsqrt(x.square().sum(-1, keepdim=True) + eps) * weight


@RMS_NORM.wrong(
    "The mean is taken over all positions together: each position has a norm of its own, over the last dimension."
)
def over_everything(x, weight, eps):
    return x * torch.rsqrt(x.square().mean() + eps) * weight


@RMS_NORM.wrong("You divide by the mean of the squares: its square root is missing.")
def no_root(x, weight, eps):
    return x / (x.square().mean(-1, keepdim=True) + eps) * weight


@RMS_NORM.wrong("The weight is missing: the normalised x is multiplied by it at the end.")
def no_weight(x, weight, eps):
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)


@RMS_NORM.wrong(
    "eps is not the one that is given: none is added, or a fixed one, or a built-in's own. Add `eps` to the mean of the "
    "squares."
)
def another_eps(x, weight, eps):
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6) * weight


@RMS_NORM.wrong("eps is added to the SUM of the squares: add it to their mean, after the division by D.")
def eps_in_the_sum(x, weight, eps):
    return x * torch.rsqrt((x.square().sum(-1, keepdim=True) + eps) / x.shape[-1]) * weight


@RMS_NORM.wrong(
    "F.normalize divides by the root of the SUM of the squares, and without eps: the mean is needed, and eps inside the root."
)
def length_one(x, weight, eps):
    return F.normalize(x, dim=-1) * weight


@RMS_NORM.wrong(
    "x.norm() is the root of the SUM of the squares: the mean is needed, and eps inside the root, not behind it."
)
def by_the_norm(x, weight, eps):
    return x / (x.norm(dim=-1, keepdim=True) + eps) * weight


@RMS_NORM.wrong(
    "The mean is taken over dimension 1, the positions: each has a norm of its own, over its D numbers, the last dimension."
)
def over_positions(x, weight, eps):
    return x * torch.rsqrt(x.square().mean(1, keepdim=True) + eps) * weight


@RMS_NORM.wrong(
    "The mean has lost its dimension, so its shape [...] does not fit x [..., D]: mean(-1, keepdim=True) keeps it as 1."
)
def dimension_lost(x, weight, eps):
    return x * torch.rsqrt(x.square().mean(-1) + eps) * weight


@RMS_NORM.wrong(
    "The mean is taken over dimension 2, the last one of three only: x may have any number of dimensions, so write -1."
)
def dimension_2(x, weight, eps):
    return x * torch.rsqrt(x.square().mean(2, keepdim=True) + eps) * weight


@RMS_NORM.wrong("You divide by the standard deviation, which subtracts the mean: take the mean of the squares alone.")
def by_the_deviation(x, weight, eps):
    return x / (x.std(-1, keepdim=True) + eps) * weight


@RMS_NORM.wrong(
    "You divide by the root of the variance, from which the mean is subtracted: take the mean of the squares."
)
def by_the_variance(x, weight, eps):
    return x * torch.rsqrt(x.var(-1, keepdim=True) + eps) * weight


@RMS_NORM.wrong("First the squares, then their mean: you square the mean of x, in which the signs cancel.")
def square_of_the_mean(x, weight, eps):
    return x * torch.rsqrt(x.mean(-1, keepdim=True).square() + eps) * weight


@RMS_NORM.wrong(
    "You multiply by the root: x is DIVIDED by it. (torch.rsqrt is 1 / sqrt: x times rsqrt, or x over sqrt.)"
)
def multiplied(x, weight, eps):
    return x * torch.sqrt(x.square().mean(-1, keepdim=True) + eps) * weight


@RMS_NORM.wrong("You multiply by 1 + weight, as Gemma stores it: here the factor is the weight itself.")
def one_plus_weight(x, weight, eps):
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * (1 + weight)


APPLY_ROPE = Exercise(
    "01.2",
    layers.apply_rope,
    minutes=8,
    sizes=HEADS,
    gradients=True,
    hints=[
        "Take the even and the odd columns of x apart: x[..., 0::2] and x[..., 1::2]. Each pair is a point in the plane.",
        "even·cos − odd·sin and even·sin + odd·cos; cos[:, None] lets one angle a position serve all heads. Then "
        "torch.stack(…, dim=-1).flatten(-2) puts the pairs back in their places.",
    ],
)


@APPLY_ROPE.inputs
def _(r, B, T, H, d):
    angles = r.uniform(0.3, 3.0, T, d // 2)
    return r.normal(B, T, H, d), angles.cos(), angles.sin()


def turn(even, odd, cos, sin):
    return even * cos[:, None] - odd * sin[:, None], even * sin[:, None] + odd * cos[:, None]


@APPLY_ROPE.wrong(
    "You pair column i with column i + d/2 (the half-split form of Llama). Here the pairs are neighbours: (0,1), (2,3), …"
)
def half_split(x, cos, sin):
    return torch.cat(turn(*x.chunk(2, -1), cos, sin), -1)


@APPLY_ROPE.wrong("The pairs are turned the wrong way: the minus sign belongs to the even column, even·cos − odd·sin.")
def wrong_way(x, cos, sin):
    return torch.stack(turn(x[..., 0::2], x[..., 1::2], cos, -sin), -1).flatten(-2)


@APPLY_ROPE.wrong("The turned pairs come out as [evens | odds]: stack them on a last dimension, then flatten it.")
def left_apart(x, cos, sin):
    return torch.cat(turn(x[..., 0::2], x[..., 1::2], cos, sin), -1)


@APPLY_ROPE.wrong("The angles are one position off: row t of cos and sin belongs to position t.")
def off_by_one(x, cos, sin):
    return torch.stack(turn(x[..., 0::2], x[..., 1::2], cos.roll(1, 0), sin.roll(1, 0)), -1).flatten(-2)


@APPLY_ROPE.wrong("The odd column is computed from the even one that is turned already: keep both until both are done.")
def one_after_the_other(x, cos, sin):
    even, odd = x[..., 0::2], x[..., 1::2]
    even = even * cos[:, None] - odd * sin[:, None]
    odd = even * sin[:, None] + odd * cos[:, None]
    return torch.stack((even, odd), -1).flatten(-2)


@APPLY_ROPE.wrong(
    "Each column is only multiplied by its cosine: a rotation mixes the two columns of a pair by the sine."
)
def cosine_only(x, cos, sin):
    return x * cos.repeat_interleave(2, -1)[:, None]


@APPLY_ROPE.wrong(
    "The angles go along the heads instead of the positions: cos[:, None] makes [T, 1, d/2], one row for all heads."
)
def along_the_heads(x, cos, sin):
    even, odd = x[..., 0::2], x[..., 1::2]
    return torch.stack((even * cos - odd * sin, even * sin + odd * cos), -1).flatten(-2)


@APPLY_ROPE.wrong("Both signs are plus: that is no rotation. The minus belongs to the even column, even·cos − odd·sin.")
def no_minus(x, cos, sin):
    even, odd, c, s = x[..., 0::2], x[..., 1::2], cos[:, None], sin[:, None]
    return torch.stack((even * c + odd * s, even * s + odd * c), -1).flatten(-2)


@APPLY_ROPE.wrong("The two columns of each pair come out exchanged: the even one first, then the odd one.")
def odd_first(x, cos, sin):
    return torch.stack(turn(x[..., 0::2], x[..., 1::2], cos, sin)[::-1], -1).flatten(-2)


@APPLY_ROPE.wrong("cos and sin are exchanged: even·cos − odd·sin, and even·sin + odd·cos.")
def cos_for_sin(x, cos, sin):
    return torch.stack(turn(x[..., 0::2], x[..., 1::2], sin, cos), -1).flatten(-2)


def spread(x, partner, cos, sin):
    return x * cos[:, None] + partner * sin[:, None]


@APPLY_ROPE.wrong(
    "Angle i belongs to columns 2i and 2i+1: repeat and cat lay the angles out as 0, 1, …, 0, 1, …; repeat_interleave(2, -1) "
    "as 0, 0, 1, 1, …"
)
def angles_repeated(x, cos, sin):
    partner = torch.stack((-x[..., 1::2], x[..., 0::2]), -1).flatten(-2)
    return spread(x, partner, cos.repeat(1, 2), sin.repeat(1, 2))


@APPLY_ROPE.wrong(
    "The angles are laid out for neighbours, but the partner of column i is taken from i + d/2, as in Llama: here columns 2i "
    "and 2i+1 are partners."
)
def partner_of_llama(x, cos, sin):
    a, b = x.chunk(2, -1)
    return spread(x, torch.cat((-b, a), -1), cos.repeat_interleave(2, -1), sin.repeat_interleave(2, -1))


@APPLY_ROPE.wrong("All positions are turned by the angles of position 0: row t of cos and sin belongs to position t.")
def first_position_alone(x, cos, sin):
    return torch.stack(turn(x[..., 0::2], x[..., 1::2], cos[:1], sin[:1]), -1).flatten(-2)


@APPLY_ROPE.wrong(
    "view_as_complex needs the two numbers of a pair side by side in memory, and some inputs here have gaps: .contiguous() "
    "before it. (DeepSeek's own code has none: its tensors never have gaps.)"
)
def as_complex_without_copy(x, cos, sin):
    pairs = torch.view_as_complex(x.unflatten(-1, (-1, 2)))
    return torch.view_as_real(pairs * torch.complex(cos, sin)[:, None]).flatten(-2)


@APPLY_ROPE.wrong("You compute the angles yourself: take cos and sin as they are given, whose angles here are others.")
def own_angles(x, cos, sin):
    d = x.shape[-1]
    angles = torch.arange(x.shape[1])[:, None] * 10000 ** (-2 * torch.arange(d // 2) / d)
    return torch.stack(turn(x[..., 0::2], x[..., 1::2], angles.cos(), angles.sin()), -1).flatten(-2)


CAUSAL_ATTENTION = Exercise(
    "01.3",
    layers.causal_attention,
    minutes=15,
    sizes=HEADS,
    gradients=True,
    hints=[
        "Scores first: one number for each head, query and key, [B, H, T, T]. Then hide the future, then softmax.",
        'torch.einsum("bthd,bshd->bhts", q, k) gives the scores; where a mask torch.ones(T, T).tril() is 0 they become '
        "-inf before the softmax over s, the last dimension; a second einsum sums the values.",
    ],
)


@CAUSAL_ATTENTION.inputs
def _(r, B, T, H, d):
    return r.normal(B, T, H, d), r.normal(B, T, H, d), r.normal(B, T, H, d), 1.3 * d**-0.5


def attend(q, k, v, scale, seen, dim=-1, hidden=float("-inf")):
    scores = torch.einsum("bthd,bshd->bhts", q, k) * scale
    return torch.einsum("bhts,bshd->bthd", scores.masked_fill(~seen, hidden).softmax(dim), v)


def ones(q):
    return torch.ones(q.shape[1], q.shape[1], dtype=torch.bool)


@CAUSAL_ATTENTION.wrong(
    "Nothing hides the future: position t may see positions up to t, so scores with s > t become -inf."
)
def no_mask(q, k, v, scale):
    return attend(q, k, v, scale, ones(q))


@CAUSAL_ATTENTION.wrong(
    "The mask is off by one: each position sees the NEXT one too, which is the answer it must predict."
)
def sees_the_next(q, k, v, scale):
    return attend(q, k, v, scale, ones(q).tril(1))


@CAUSAL_ATTENTION.wrong(
    "The mask is off by one: a position must see itself. As it is, the first one sees nothing at all (NaN)."
)
def not_itself(q, k, v, scale):
    return attend(q, k, v, scale, ones(q).tril(-1))


@CAUSAL_ATTENTION.wrong(
    "The mask is off by one: a position must see itself. As it is, the first one has nothing to see, and gets the mean of "
    "all values, later ones too."
)
def not_itself_but_finite(q, k, v, scale):
    return attend(q, k, v, scale, ones(q).tril(-1), hidden=-1e9)


@CAUSAL_ATTENTION.wrong("The mask hides the past and shows the future: tril keeps s ≤ t, triu the other side.")
def the_future(q, k, v, scale):
    return attend(q, k, v, scale, ones(q).triu())


@CAUSAL_ATTENTION.wrong("The hidden scores are set to 0, which is a score like any other (e^0 = 1): they must be -inf.")
def masked_with_zero(q, k, v, scale):
    return attend(q, k, v, scale, ones(q).tril(), hidden=0.0)


@CAUSAL_ATTENTION.wrong(
    "The softmax runs over the queries: for each query the weights of the KEYS must sum to 1 (the last dimension)."
)
def over_queries(q, k, v, scale):
    return attend(q, k, v, scale, ones(q).tril(), dim=-2)


@CAUSAL_ATTENTION.wrong("The scale is missing: multiply the scores by it before the softmax.")
def no_scale(q, k, v, scale):
    return attend(q, k, v, 1.0, ones(q).tril())


@CAUSAL_ATTENTION.wrong("The scale is applied twice: it is d^-0.5 already, not d.")
def scaled_twice(q, k, v, scale):
    return attend(q, k, v, scale * scale, ones(q).tril())


@CAUSAL_ATTENTION.wrong(
    "The mask comes after the softmax, so the weights that are left do not sum to 1: mask the scores before it."
)
def masked_late(q, k, v, scale):
    weights = (torch.einsum("bthd,bshd->bhts", q, k) * scale).softmax(-1) * ones(q).tril()
    return torch.einsum("bhts,bshd->bthd", weights, v)


@CAUSAL_ATTENTION.wrong(
    "Here the heads attend to one another at each position: the scores must be [B, H, T, T], a query's for every key of ITS head."
)
def heads_among_themselves(q, k, v, scale):
    scores = (q @ k.mT * scale).masked_fill(~ones(q).tril(), float("-inf"))
    return scores.softmax(-1) @ v


def built_in(q, k, v, **how):
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, **how)


@CAUSAL_ATTENTION.wrong(
    "scaled_dot_product_attention expects [B, H, T, d] and took your heads for positions: .transpose(1, 2) before it, for q, "
    "k and v, and again behind it."
)
def built_in_not_transposed(q, k, v, scale):
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale)


@CAUSAL_ATTENTION.wrong(
    "The result's axes are [B, H, T, d]: it must be [B, T, H, d], as q is. .transpose(1, 2) mends it."
)
def heads_first(q, k, v, scale):
    return built_in(q, k, v, scale=scale)


@CAUSAL_ATTENTION.wrong(
    "The result is [B, H, T, d] in memory and reshaped to [B, T, H, d]: reshape cuts the numbers anew, .transpose(1, 2) "
    "moves the axes."
)
def reshaped_back(q, k, v, scale):
    return built_in(q, k, v, scale=scale).reshape(q.shape)


@CAUSAL_ATTENTION.wrong(
    "q, k and v are reshaped from [B, T, H, d] to [B, H, T, d]: reshape cuts the numbers anew and mixes positions with "
    "heads; .transpose(1, 2) moves the axes."
)
def reshaped(q, k, v, scale):
    B, T, H, d = q.shape
    q, k, v = (t.reshape(B, H, T, d).transpose(1, 2) for t in (q, k, v))
    return built_in(q, k, v, scale=scale).reshape(B, T, H, d)


@CAUSAL_ATTENTION.wrong("`scale` is not used: 1/sqrt(d) is taken instead, by you or by a built-in that was not told.")
def own_scale(q, k, v, scale):
    return built_in(q, k, v).transpose(1, 2)


@CAUSAL_ATTENTION.wrong(
    "The scores are scaled twice: by you, and by the built-in's own 1/sqrt(d). Give it scale=scale."
)
def scaled_by_both(q, k, v, scale):
    return built_in(q * scale, k, v).transpose(1, 2)


@CAUSAL_ATTENTION.wrong("You divide by the scale: it is d^-0.5 already, so multiply.")
def divided(q, k, v, scale):
    return attend(q, k, v, 1 / scale, ones(q).tril())


@CAUSAL_ATTENTION.wrong(
    "The weights are scaled after the softmax, so they do not sum to 1: scale the SCORES before it."
)
def scaled_late(q, k, v, scale):
    return scale * attend(q, k, v, 1.0, ones(q).tril())


@CAUSAL_ATTENTION.wrong(
    "The mask is the wrong way round: it hides s ≤ t, what may be seen. masked_fill(m, x) writes x where m is True, so m must "
    "be True for the future, as ones(T, T).triu(1) is."
)
def mask_inverted(q, k, v, scale):
    return attend(q, k, v, scale, ones(q).triu(1))


@CAUSAL_ATTENTION.wrong(
    "A mask of 0 times infinity is NaN, everywhere: use scores.masked_fill(future, -inf), or add torch.full((T, T), "
    "-inf).triu(1)."
)
def times_infinity(q, k, v, scale):
    scores = torch.einsum("bthd,bshd->bhts", q, k) * scale + (1 - ones(q).tril().float()) * float("-inf")
    return torch.einsum("bhts,bshd->bthd", scores.softmax(-1), v)


@CAUSAL_ATTENTION.wrong(
    "The softmax runs over the heads: for each query the weights of the KEYS must sum to 1. In [B, H, T, S] they are last."
)
def over_heads(q, k, v, scale):
    return attend(q, k, v, scale, ones(q).tril(), dim=1)


@CAUSAL_ATTENTION.wrong("There is no softmax: the masked scores are used as weights. They must be ≥ 0 and sum to 1.")
def no_softmax(q, k, v, scale):
    scores = (torch.einsum("bthd,bshd->bhts", q, k) * scale).tril()
    return torch.einsum("bhts,bshd->bthd", scores, v)


@CAUSAL_ATTENTION.wrong("e to the scores is not divided by its sum over s: the weights of a query must sum to 1.")
def not_divided(q, k, v, scale):
    scores = (torch.einsum("bthd,bshd->bhts", q, k) * scale).exp().tril()
    return torch.einsum("bhts,bshd->bthd", scores, v)


@CAUSAL_ATTENTION.wrong(
    "The KEYS are summed at the end: keys give the weights, and what is summed by them are the values."
)
def keys_summed(q, k, v, scale):
    return attend(q, k, k, scale, ones(q).tril())


@CAUSAL_ATTENTION.wrong("Queries and keys are exchanged: in the scores [B, H, t, s] t is the query's position.")
def queries_for_keys(q, k, v, scale):
    return attend(k, q, v, scale, ones(q).tril())


@CAUSAL_ATTENTION.wrong(
    "The hidden scores are too near the others (-10 or so): e^-10 still counts. They must be -inf, or as low as -1e9."
)
def hidden_by_ten(q, k, v, scale):
    return attend(q, k, v, scale, ones(q).tril(), hidden=-10.0)


SWIGLU = Exercise(
    "01.4",
    layers.swiglu,
    minutes=5,
    sizes=[{**s, "W": w} for s, w in zip(HIDDEN, (24, 9, 32, 21, 14), strict=True)],
    gradients=True,
    hints=[
        "Two projections of the same x; one of them goes through silu and opens or shuts the other.",
        "F.linear(x, w) multiplies by w transposed, as nn.Linear does: down of silu(gate of x) times (up of x).",
    ],
)


@SWIGLU.inputs
def _(r, D, W, **before):
    return r.normal(*before.values(), D), r.normal(W, D), r.normal(W, D), r.normal(D, W)


@SWIGLU.wrong("gate and up are swapped: silu belongs to the gate's projection.")
def swapped(x, w_gate, w_up, w_down):
    return F.linear(F.linear(x, w_gate) * F.silu(F.linear(x, w_up)), w_down)


@SWIGLU.wrong("silu is applied to both projections: up stays as it is, only the gate is bent.")
def silu_on_both(x, w_gate, w_up, w_down):
    return F.linear(F.silu(F.linear(x, w_gate)) * F.silu(F.linear(x, w_up)), w_down)


@SWIGLU.wrong("That is the sigmoid alone (GLU): silu(z) is z times sigmoid(z).")
def sigmoid_gate(x, w_gate, w_up, w_down):
    return F.linear(F.linear(x, w_gate).sigmoid() * F.linear(x, w_up), w_down)


@SWIGLU.wrong("silu comes after the product: the gate goes through silu first, then multiplies up.")
def silu_of_the_product(x, w_gate, w_up, w_down):
    return F.linear(F.silu(F.linear(x, w_gate) * F.linear(x, w_up)), w_down)


@SWIGLU.wrong("Gate and up are added: the gate MULTIPLIES up, which is what makes it a gate.")
def added(x, w_gate, w_up, w_down):
    return F.linear(F.silu(F.linear(x, w_gate)) + F.linear(x, w_up), w_down)


@SWIGLU.wrong("The gate has no silu: without it the layer is a plain product of two projections.")
def no_silu(x, w_gate, w_up, w_down):
    return F.linear(F.linear(x, w_gate) * F.linear(x, w_up), w_down)


@SWIGLU.wrong("w_up is not used: silu of the gate must multiply the second projection of x.")
def no_up(x, w_gate, w_up, w_down):
    return F.linear(F.silu(F.linear(x, w_gate)), w_down)


@SWIGLU.wrong(
    "The weights are stored [out, in], so x @ w multiplies by the wrong side: use F.linear(x, w), or x @ w.T."
)
def not_transposed(x, w_gate, w_up, w_down):
    return (F.silu(x @ w_gate) * (x @ w_up)) @ w_down


@SWIGLU.wrong("That is GELU: silu(z) is z times sigmoid(z), F.silu.")
def gelu(x, w_gate, w_up, w_down):
    return F.linear(F.gelu(F.linear(x, w_gate)) * F.linear(x, w_up), w_down)


@SWIGLU.wrong("That is ReLU, z where it is positive: silu(z) is z times sigmoid(z), F.silu.")
def relu(x, w_gate, w_up, w_down):
    return F.linear(F.relu(F.linear(x, w_gate)) * F.linear(x, w_up), w_down)


@SWIGLU.wrong("That is z over 1 + e^z: sigmoid(z) is 1 / (1 + e^-z), with the minus in the exponent.")
def sigmoid_of_minus(x, w_gate, w_up, w_down):
    z = F.linear(x, w_gate)
    return F.linear(z / (1 + z.exp()) * F.linear(x, w_up), w_down)


@SWIGLU.wrong("The last projection is missing: w_down brings the inner width W back to D.")
def no_down(x, w_gate, w_up, w_down):
    return F.silu(F.linear(x, w_gate)) * F.linear(x, w_up)


@SWIGLU.wrong("x is added: the block does that, outside of SwiGLU.")
def with_x(x, w_gate, w_up, w_down):
    return x + F.linear(F.silu(F.linear(x, w_gate)) * F.linear(x, w_up), w_down)


@SWIGLU.wrong("silu is applied to x: it belongs behind the gate's projection, silu(W_gate x).")
def silu_of_x(x, w_gate, w_up, w_down):
    return F.linear(F.linear(F.silu(x), w_gate) * F.linear(x, w_up), w_down)


@SWIGLU.wrong("w_gate is not used: silu of its projection multiplies that of w_up.")
def no_gate(x, w_gate, w_up, w_down):
    return F.linear(F.silu(F.linear(x, w_up)), w_down)


@SWIGLU.wrong("Both factors are the gate's projection: the second one is that of w_up.")
def gate_twice(x, w_gate, w_up, w_down):
    z = F.linear(x, w_gate)
    return F.linear(F.silu(z) * z, w_down)


@SWIGLU.wrong("Both factors are the projection by w_up: silu takes that of w_gate.")
def up_twice(x, w_gate, w_up, w_down):
    z = F.linear(x, w_up)
    return F.linear(F.silu(z) * z, w_down)


@SWIGLU.wrong(
    "w_down is applied from the wrong side: it is [D, W], stored [out, in], so F.linear(h, w_down), or h @ w_down.T."
)
def down_not_transposed(x, w_gate, w_up, w_down):
    return (F.silu(F.linear(x, w_gate)) * F.linear(x, w_up)) @ w_down


@SWIGLU.wrong("The weights are matrices here, no layers that can be called: F.linear(x, w_gate), not w_gate(x).")
def called(x, w_gate, w_up, w_down):
    return w_down(F.silu(w_gate(x)) * w_up(x))


@SWIGLU.wrong("F.linear takes x first, then the weight: F.linear(x, w_gate).")
def matrix_first(x, w_gate, w_up, w_down):
    return F.linear(w_down, F.silu(F.linear(w_gate, x)) * F.linear(w_up, x))


BITS_PER_BYTE = Exercise(
    "01.5",
    bits_per_byte,
    minutes=4,
    sizes=[{"tokens": 1000}, {"tokens": 77}, {"tokens": 12345}],
    hints=[
        "Two conversions: from nats to bits, and from tokens to bytes.",
        "All the nats of the text are nats_per_token · tokens; a bit is ln 2 = 0.693 nats; share them among the bytes.",
    ],
)


@BITS_PER_BYTE.inputs
def _(r, tokens):
    return float(r.uniform(1, 5)), tokens, int(tokens * float(r.uniform(2, 4)))


@BITS_PER_BYTE.wrong("That is the bits of the whole text: share them among its bytes.")
def of_the_text(nats_per_token, tokens, nbytes):
    return nats_per_token * tokens / math.log(2)


@BITS_PER_BYTE.wrong("That is in nats: a bit is ln 2 nats, so divide by math.log(2).")
def nats(nats_per_token, tokens, nbytes):
    return nats_per_token * tokens / nbytes


@BITS_PER_BYTE.wrong(
    "That is bits per TOKEN: a vocabulary of longer tokens would look worse. Share the bits among the bytes."
)
def per_token(nats_per_token, tokens, nbytes):
    return nats_per_token / math.log(2)


@BITS_PER_BYTE.wrong(
    "Tokens and bytes are the wrong way round: there are fewer tokens than bytes, so the number gets smaller."
)
def upside_down(nats_per_token, tokens, nbytes):
    return nats_per_token / math.log(2) * nbytes / tokens


@BITS_PER_BYTE.wrong("You multiply by ln 2: there are MORE bits than nats, so divide by it.")
def times_ln2(nats_per_token, tokens, nbytes):
    return nats_per_token * math.log(2) * tokens / nbytes


@BITS_PER_BYTE.wrong(
    "// cuts the bytes of a token down to a whole number: nbytes / tokens has a fraction, and dividing by it needs no rounding."
)
def whole_bytes_a_token(nats_per_token, tokens, nbytes):
    return nats_per_token / math.log(2) / (nbytes // tokens)


@BITS_PER_BYTE.wrong(
    "nats_per_token is that of ONE token: multiply by the number of tokens before sharing among the bytes."
)
def of_one_token(nats_per_token, tokens, nbytes):
    return nats_per_token / math.log(2) / nbytes


@BITS_PER_BYTE.wrong("A byte has 8 bits, but that is not asked: how many bits the MODEL needs for each byte is.")
def by_eight(nats_per_token, tokens, nbytes):
    return nats_per_token / math.log(2) * tokens / (8 * nbytes)


@BITS_PER_BYTE.wrong("math.log10(2) is for the logarithm to base 10: nats are natural, so divide by math.log(2).")
def base_ten(nats_per_token, tokens, nbytes):
    return nats_per_token / math.log10(2) * tokens / nbytes


@BITS_PER_BYTE.wrong(
    "You take the logarithm of the loss: it is one already. One bit is ln 2 nats, so divide by math.log(2)."
)
def logarithm_of_the_loss(nats_per_token, tokens, nbytes):
    return math.log2(nats_per_token) * tokens / nbytes

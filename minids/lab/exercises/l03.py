"""Lesson 03: Multi-head Latent Attention: what is cached, what is made of it, and the part that RoPE may turn."""

import torch
import torch.nn.functional as F

from minids import accounting
from minids.config import ModelConfig
from minids.lab.exercise import Exercise
from minids.layers import apply_rope, rms_norm
from minids.mla import reference


def tables(r, T, R):
    angles = r.uniform(0.3, 3.0, T, R // 2)
    return angles.cos(), angles.sin()


# 03.1 ------------------------------------------------------------------------------------------------------------

COMPRESS_KV = Exercise(
    "03.1",
    reference.compress_kv,
    minutes=8,
    sizes=[
        {"B": 1, "T": 24, "D": 48, "C": 32, "R": 8},
        {"B": 3, "T": 7, "D": 10, "C": 6, "R": 4},
        {"B": 2, "T": 8, "D": 16, "C": 8, "R": 8},  # C = R = T and C + R = D: mixing them up raises nothing here
        {"B": 1, "T": 5, "D": 33, "C": 9, "R": 6},
    ],
    gradients=True,
    hints=[
        "One product gives C + R columns for each position. Which of them go through the norm, and which are turned?",
        "F.linear(x, w_kv_a).split([C, R], -1) with C = len(norm_weight); layers.rms_norm for the first part. For the "
        "second put a head axis in, layers.apply_rope(k_rope.unsqueeze(-2), cos, sin), and take it out by squeeze(-2).",
    ],
)


@COMPRESS_KV.inputs
def _(r, B, T, D, C, R):
    return r.normal(B, T, D), 0.5 * D**-0.5 * r.normal(C + R, D), 1 + 0.5 * r.normal(C), *tables(r, T, R), 0.01


def parts(x, w_kv_a, norm_weight):
    return F.linear(x, w_kv_a).tensor_split([len(norm_weight)], -1)


def turn(k_rope, cos, sin):
    return apply_rope(k_rope.unsqueeze(-2), cos, sin).squeeze(-2)


@COMPRESS_KV.wrong("The norm is missing: the latent goes through RMSNorm before it is cached.")
def norm_missing(x, w_kv_a, norm_weight, cos, sin, eps):
    c_kv, k_rope = parts(x, w_kv_a, norm_weight)
    return c_kv, turn(k_rope, cos, sin)


@COMPRESS_KV.wrong(
    "The norm runs over latent AND rope part: its mean square is that of the C columns of the latent alone. Split first."
)
def norm_over_both(x, w_kv_a, norm_weight, cos, sin, eps):
    both = F.linear(x, w_kv_a)
    both = rms_norm(both, torch.ones_like(both[0, 0]), eps)
    c_kv, k_rope = both.tensor_split([len(norm_weight)], -1)
    return c_kv * norm_weight, turn(k_rope, cos, sin)


@COMPRESS_KV.wrong("k_rope has been normalised too: it has no norm, it is only turned.")
def norm_on_the_rope_part(x, w_kv_a, norm_weight, cos, sin, eps):
    c_kv, k_rope = parts(x, w_kv_a, norm_weight)
    k_rope = rms_norm(k_rope, torch.ones_like(k_rope[0, 0]), eps)
    return rms_norm(c_kv, norm_weight, eps), turn(k_rope, cos, sin)


@COMPRESS_KV.wrong("norm_weight is not used: the normalised latent is multiplied by it.")
def norm_weight_missing(x, w_kv_a, norm_weight, cos, sin, eps):
    c_kv, k_rope = parts(x, w_kv_a, norm_weight)
    return rms_norm(c_kv, torch.ones_like(norm_weight), eps), turn(k_rope, cos, sin)


@COMPRESS_KV.wrong("eps is not used: it is added to the mean of the squares, as layers.rms_norm(x, weight, eps) does.")
def eps_missing(x, w_kv_a, norm_weight, cos, sin, eps):
    c_kv, k_rope = parts(x, w_kv_a, norm_weight)
    return rms_norm(c_kv, norm_weight, 0.0), turn(k_rope, cos, sin)


@COMPRESS_KV.wrong("k_rope is not turned: what is cached is the key AFTER RoPE, so that no later step turns it again.")
def not_turned(x, w_kv_a, norm_weight, cos, sin, eps):
    c_kv, k_rope = parts(x, w_kv_a, norm_weight)
    return rms_norm(c_kv, norm_weight, eps), k_rope


@COMPRESS_KV.wrong("RoPE is applied to the latent: it turns k_rope alone; the latent must stay free of the position.")
def latent_turned(x, w_kv_a, norm_weight, cos, sin, eps):
    c_kv, k_rope = parts(x, w_kv_a, norm_weight)
    return turn(rms_norm(c_kv, norm_weight, eps), cos, sin), k_rope


@COMPRESS_KV.wrong("Both parts are turned: RoPE is for k_rope alone; the latent must stay free of the position.")
def both_turned(x, w_kv_a, norm_weight, cos, sin, eps):
    c_kv, k_rope = parts(x, w_kv_a, norm_weight)
    return turn(rms_norm(c_kv, norm_weight, eps), cos, sin), turn(k_rope, cos, sin)


@COMPRESS_KV.wrong("The parts are the wrong way round: the first C columns are the latent, the last R the rope key.")
def rope_part_first(x, w_kv_a, norm_weight, cos, sin, eps):
    k_rope, c_kv = F.linear(x, w_kv_a).tensor_split([2 * cos.shape[-1]], -1)
    return rms_norm(c_kv, norm_weight, eps), turn(k_rope, cos, sin)


@COMPRESS_KV.wrong(
    "apply_rope takes [B, T, H, R], and k_rope has no head axis, so the positions pass for heads: put an axis of "
    "length 1 in with unsqueeze(-2), and take it out afterwards."
)
def positions_as_heads(x, w_kv_a, norm_weight, cos, sin, eps):
    c_kv, k_rope = parts(x, w_kv_a, norm_weight)
    return rms_norm(c_kv, norm_weight, eps), apply_rope(k_rope, cos, sin)


@COMPRESS_KV.wrong(
    "The head axis is in the wrong place: k_rope[:, None] puts it BEFORE the positions. apply_rope wants [B, T, 1, R]: "
    "unsqueeze(-2)."
)
def head_axis_in_front(x, w_kv_a, norm_weight, cos, sin, eps):
    c_kv, k_rope = parts(x, w_kv_a, norm_weight)
    return rms_norm(c_kv, norm_weight, eps), apply_rope(k_rope[:, None], cos, sin).squeeze(1)


@COMPRESS_KV.wrong(
    "The head axis is in the wrong place: k_rope[:, None] puts it BEFORE the positions, so all are turned by the first "
    "one's angle. apply_rope wants [B, T, 1, R]: unsqueeze(-2)."
)
def turned_as_the_first(x, w_kv_a, norm_weight, cos, sin, eps):
    c_kv, k_rope = parts(x, w_kv_a, norm_weight)
    return rms_norm(c_kv, norm_weight, eps), apply_rope(k_rope[:, None], cos, sin)[:, 0]


@COMPRESS_KV.wrong("k_rope still has a head axis: it is ONE vector for all heads, [B, T, R]; squeeze(-2) takes it out.")
def head_axis_left(x, w_kv_a, norm_weight, cos, sin, eps):
    c_kv, k_rope = parts(x, w_kv_a, norm_weight)
    return rms_norm(c_kv, norm_weight, eps), apply_rope(k_rope.unsqueeze(-2), cos, sin)


@COMPRESS_KV.wrong("w_kv_a is stored [out, in], so x @ w_kv_a multiplies by the wrong side: use F.linear(x, w_kv_a).")
def weight_not_transposed(x, w_kv_a, norm_weight, cos, sin, eps):
    c_kv, k_rope = (x @ w_kv_a).tensor_split([len(norm_weight)], -1)
    return rms_norm(c_kv, norm_weight, eps), turn(k_rope, cos, sin)


def by_halves(x, cos, sin):
    """RoPE that pairs column i with column i + R/2 of x [B, T, H, R], as Llama's checkpoints do."""
    a, b = x.chunk(2, -1)
    cos, sin = cos[:, None], sin[:, None]
    return torch.cat([a * cos - b * sin, a * sin + b * cos], -1)


def left_apart(x, cos, sin):
    """RoPE of pairs of neighbours, whose results are laid one behind the other instead of side by side."""
    turned = apply_rope(x, cos, sin)
    return torch.cat([turned[..., ::2], turned[..., 1::2]], -1)


HALVES = (
    "You pair column i with column i + R/2: here, as in RoPE's paper, pairs are NEIGHBOURS, (0, 1), (2, 3), … "
    "layers.apply_rope does that."
)
APART = (
    "The pairs are turned rightly, and put together wrongly: neighbours must be neighbours again, torch.stack([…], -1) and "
    "flatten(-2), not torch.cat."
)
BACKWARDS = (
    "The pairs are turned backwards: (a, b) becomes (a cos - b sin, a sin + b cos), with the plus in the second."
)


def latent_of(x, w_kv_a, norm_weight, eps):
    return rms_norm(parts(x, w_kv_a, norm_weight)[0], norm_weight, eps)


@COMPRESS_KV.wrong(HALVES)
def key_by_halves(x, w_kv_a, norm_weight, cos, sin, eps):
    k_rope = by_halves(parts(x, w_kv_a, norm_weight)[1].unsqueeze(-2), cos, sin)
    return latent_of(x, w_kv_a, norm_weight, eps), k_rope.squeeze(-2)


@COMPRESS_KV.wrong(APART)
def key_left_apart(x, w_kv_a, norm_weight, cos, sin, eps):
    k_rope = left_apart(parts(x, w_kv_a, norm_weight)[1].unsqueeze(-2), cos, sin)
    return latent_of(x, w_kv_a, norm_weight, eps), k_rope.squeeze(-2)


@COMPRESS_KV.wrong(BACKWARDS)
def key_backwards(x, w_kv_a, norm_weight, cos, sin, eps):
    return latent_of(x, w_kv_a, norm_weight, eps), turn(parts(x, w_kv_a, norm_weight)[1], cos, -sin)


@COMPRESS_KV.wrong("cos and sin have changed places: apply_rope(x, cos, sin).")
def tables_exchanged(x, w_kv_a, norm_weight, cos, sin, eps):
    return latent_of(x, w_kv_a, norm_weight, eps), turn(parts(x, w_kv_a, norm_weight)[1], sin, cos)


@COMPRESS_KV.wrong("The rope key is turned twice.")
def turned_twice(x, w_kv_a, norm_weight, cos, sin, eps):
    k_rope = turn(turn(parts(x, w_kv_a, norm_weight)[1], cos, sin), cos, sin)
    return latent_of(x, w_kv_a, norm_weight, eps), k_rope


@COMPRESS_KV.wrong("You subtract the mean: that is LayerNorm. RMSNorm divides by the root of the mean square alone.")
def mean_subtracted(x, w_kv_a, norm_weight, cos, sin, eps):
    c_kv, k_rope = parts(x, w_kv_a, norm_weight)
    return F.layer_norm(c_kv, norm_weight.shape, norm_weight, None, eps), turn(k_rope, cos, sin)


@COMPRESS_KV.wrong("eps is added to the root: it belongs under it, to the mean of the squares.")
def eps_behind_the_root(x, w_kv_a, norm_weight, cos, sin, eps):
    c_kv, k_rope = parts(x, w_kv_a, norm_weight)
    rms = c_kv.square().mean(-1, keepdim=True).sqrt() + eps
    return c_kv / rms * norm_weight, turn(k_rope, cos, sin)


@COMPRESS_KV.wrong("The norm divides by the root of the SUM of the squares: it is their mean over the C columns.")
def norm_by_the_sum(x, w_kv_a, norm_weight, cos, sin, eps):
    c_kv, k_rope = parts(x, w_kv_a, norm_weight)
    return c_kv * torch.rsqrt(c_kv.square().sum(-1, keepdim=True) + eps) * norm_weight, turn(k_rope, cos, sin)


@COMPRESS_KV.wrong("The mean square runs over the positions: each position has its own, over its C columns, dim=-1.")
def norm_over_positions(x, w_kv_a, norm_weight, cos, sin, eps):
    c_kv, k_rope = parts(x, w_kv_a, norm_weight)
    return c_kv * torch.rsqrt(c_kv.square().mean(1, keepdim=True) + eps) * norm_weight, turn(k_rope, cos, sin)


@COMPRESS_KV.wrong(
    "x is normalised, before the product: it is the latent, what the product gives, that goes through the norm."
)
def input_normalised(x, w_kv_a, norm_weight, cos, sin, eps):
    c_kv, k_rope = parts(rms_norm(x, torch.ones_like(x[0, 0]), eps), w_kv_a, norm_weight)
    return c_kv * norm_weight, turn(k_rope, cos, sin)


@COMPRESS_KV.wrong("Both parts stand in one tensor: give two, the latent [B, T, C] and the rope key [B, T, R].")
def in_one_tensor(x, w_kv_a, norm_weight, cos, sin, eps):
    return torch.cat([latent_of(x, w_kv_a, norm_weight, eps), turn(parts(x, w_kv_a, norm_weight)[1], cos, sin)], -1)


# 03.2 ------------------------------------------------------------------------------------------------------------

SPLIT_HEADS_KV = Exercise(
    "03.2",
    reference.split_heads_kv,
    minutes=5,
    sizes=[
        {"B": 1, "S": 40, "H": 8, "P": 16, "V": 24},
        {"B": 3, "S": 7, "H": 3, "P": 5, "V": 4},
        {"B": 2, "S": 8, "H": 8, "P": 8, "V": 8},  # all equal: mixing them up raises nothing here
        {"B": 1, "S": 5, "H": 2, "P": 6, "V": 9},
    ],
    gradients=True,
    hints=[
        "Row by row the last dimension reads: key of head 0, value of head 0, key of head 1, value of head 1, … Which "
        "axis must be made first, the head or the two kinds?",
        "The head: kv.unflatten(-1, (heads, -1)) is [B, S, H, P+V]; within a head the first `nope` columns are the key.",
    ],
)


@SPLIT_HEADS_KV.inputs
def _(r, B, S, H, P, V):
    return r.normal(B, S, H * (P + V)), H, P


@SPLIT_HEADS_KV.wrong(
    "You cut the columns into all keys, then all values, as the paper stacks its two matrices. In the weights each head "
    "has its key and its value side by side: make the head axis first."
)
def stacked(kv, heads, nope):
    k_nope, v = kv.tensor_split([heads * nope], -1)
    return k_nope.unflatten(-1, (heads, -1)), v.unflatten(-1, (heads, -1))


@SPLIT_HEADS_KV.wrong(
    "The head is taken as the last axis: neighbouring columns belong to the SAME head, so the view is [H, P+V]."
)
def head_last(kv, heads, nope):
    kv = kv.unflatten(-1, (-1, heads)).mT
    return kv[..., :nope], kv[..., nope:]


@SPLIT_HEADS_KV.wrong("Keys and values are swapped: the first P columns of a head are its key.")
def value_first(kv, heads, nope):
    v, k_nope = kv.unflatten(-1, (heads, -1)).tensor_split([-nope], -1)
    return k_nope, v


@SPLIT_HEADS_KV.wrong(
    "A view as [B, H, S, …] cuts the numbers in the order of memory, positions and heads mixed: keep S where it is, "
    "[B, S, H, P+V]."
)
def heads_before_positions(kv, heads, nope):
    kv = kv.reshape(kv.shape[0], heads, kv.shape[1], -1).transpose(1, 2)
    return kv[..., :nope], kv[..., nope:]


@SPLIT_HEADS_KV.wrong("The axes are [B, H, S, …]; they must stay [B, S, H, …], positions before heads.")
def axes_swapped(kv, heads, nope):
    kv = kv.unflatten(-1, (heads, -1)).transpose(1, 2)
    return kv[..., :nope], kv[..., nope:]


@SPLIT_HEADS_KV.wrong(
    "You cut each head in the middle: its key has `nope` columns, its value the rest, P and V differ."
)
def in_the_middle(kv, heads, nope):
    return kv.unflatten(-1, (heads, -1)).chunk(2, -1)


@SPLIT_HEADS_KV.wrong(
    "The value is the whole block of a head: its first `nope` columns are the key, only the rest is the value."
)
def key_in_the_value(kv, heads, nope):
    kv = kv.unflatten(-1, (heads, -1))
    return kv[..., :nope], kv


@SPLIT_HEADS_KV.wrong(
    "You take every second column: a head's key and value are not mixed, first come all of its key's."
)
def every_second(kv, heads, nope):
    kv = kv.unflatten(-1, (heads, -1))
    return kv[..., ::2], kv[..., 1::2]


@SPLIT_HEADS_KV.wrong("Keys and values stand in one tensor: give two, [B, S, H, P] and [B, S, H, V].")
def not_cut(kv, heads, nope):
    return kv.unflatten(-1, (heads, -1))


# 03.3 ------------------------------------------------------------------------------------------------------------

DECOUPLED_ROPE = Exercise(
    "03.3",
    reference.decoupled_rope,
    minutes=5,
    sizes=[
        {"B": 1, "T": 24, "H": 16, "P": 32, "R": 8},
        {"B": 3, "T": 7, "H": 3, "P": 5, "R": 4},
        {"B": 2, "T": 8, "H": 8, "P": 8, "R": 8},  # all equal: mixing them up raises nothing here
        {"B": 1, "T": 5, "H": 2, "P": 3, "R": 6},
    ],
    gradients=True,
    hints=[
        "As with keys and values: make the head axis first, then cut each head. Which of the two pieces is turned?",
        "q.unflatten(-1, (heads, -1)) is [B, T, H, P+R], the first `nope` columns stay; layers.apply_rope turns the "
        "last R and takes [B, T, H, R] as it is.",
    ],
)


@DECOUPLED_ROPE.inputs
def _(r, B, T, H, P, R):
    return r.normal(B, T, H * (P + R)), H, P, *tables(r, T, R)


def pieces(q, heads, nope):
    return q.unflatten(-1, (heads, -1)).tensor_split([nope], -1)


@DECOUPLED_ROPE.wrong("Nothing is turned: the last R columns of each head go through RoPE.")
def nothing_turned(q, heads, nope, cos, sin):
    return pieces(q, heads, nope)


@DECOUPLED_ROPE.wrong(
    "RoPE turns the nope part: its name says that it has none. Turn the last R columns of each head instead."
)
def nope_turned(q, heads, nope, cos, sin):
    q_nope, q_rope = pieces(q, heads, nope)
    return apply_rope(q_nope, cos, sin), q_rope


@DECOUPLED_ROPE.wrong("Both parts are turned: only the last R columns of each head are; the nope part stays as it is.")
def all_turned(q, heads, nope, cos, sin):
    q_nope, q_rope = pieces(q, heads, nope)
    return apply_rope(q_nope, cos, sin), apply_rope(q_rope, cos, sin)


@DECOUPLED_ROPE.wrong(
    "apply_rope gets all P+R columns of a head, more than its tables have angles for: cut first, turn the last R alone."
)
def whole_query_turned(q, heads, nope, cos, sin):
    return apply_rope(q.unflatten(-1, (heads, -1)), cos, sin).tensor_split([nope], -1)


@DECOUPLED_ROPE.wrong("The rope part is taken from the front: each head's columns are [nope | rope], rope comes last.")
def rope_first(q, heads, nope, cos, sin):
    q_rope, q_nope = q.unflatten(-1, (heads, -1)).tensor_split([-nope], -1)
    return q_nope, apply_rope(q_rope, cos, sin)


@DECOUPLED_ROPE.wrong(
    "All heads get the rope query of head 0: only the KEY is shared. Each head asks with a rope query of its own."
)
def one_query_for_all(q, heads, nope, cos, sin):
    q_nope, q_rope = pieces(q, heads, nope)
    return q_nope, apply_rope(q_rope[:, :, :1], cos, sin).expand_as(q_rope)


@DECOUPLED_ROPE.wrong("The rope queries are averaged over the heads: only the KEY is shared, each head asks by itself.")
def mean_query(q, heads, nope, cos, sin):
    q_nope, q_rope = pieces(q, heads, nope)
    return q_nope, apply_rope(q_rope, cos, sin).mean(2, keepdim=True).expand_as(q_rope)


@DECOUPLED_ROPE.wrong(
    "You cut the columns into all nope parts, then all rope parts. Each head has both, side by side: make the head axis "
    "first."
)
def kinds_stacked(q, heads, nope, cos, sin):
    q_nope, q_rope = (part.unflatten(-1, (heads, -1)) for part in q.tensor_split([heads * nope], -1))
    return q_nope, apply_rope(q_rope, cos, sin)


@DECOUPLED_ROPE.wrong(
    "The head is taken as the last axis: neighbouring columns belong to the SAME head, so the view is [H, P+R]."
)
def heads_last(q, heads, nope, cos, sin):
    q_nope, q_rope = q.unflatten(-1, (-1, heads)).mT.tensor_split([nope], -1)
    return q_nope, apply_rope(q_rope, cos, sin)


@DECOUPLED_ROPE.wrong(
    "The angles run along the heads: apply_rope wants [B, T, H, R], the positions before the heads; do not transpose."
)
def along_the_heads(q, heads, nope, cos, sin):
    q_nope, q_rope = pieces(q, heads, nope)
    return q_nope, apply_rope(q_rope.transpose(1, 2), cos, sin).transpose(1, 2)


@DECOUPLED_ROPE.wrong(HALVES)
def query_by_halves(q, heads, nope, cos, sin):
    q_nope, q_rope = pieces(q, heads, nope)
    return q_nope, by_halves(q_rope, cos, sin)


@DECOUPLED_ROPE.wrong(APART)
def query_left_apart(q, heads, nope, cos, sin):
    q_nope, q_rope = pieces(q, heads, nope)
    return q_nope, left_apart(q_rope, cos, sin)


@DECOUPLED_ROPE.wrong(BACKWARDS)
def query_backwards(q, heads, nope, cos, sin):
    q_nope, q_rope = pieces(q, heads, nope)
    return q_nope, apply_rope(q_rope, cos, -sin)


@DECOUPLED_ROPE.wrong("cos and sin have changed places: apply_rope(x, cos, sin).")
def query_tables_exchanged(q, heads, nope, cos, sin):
    q_nope, q_rope = pieces(q, heads, nope)
    return q_nope, apply_rope(q_rope, sin, cos)


@DECOUPLED_ROPE.wrong(
    "A minus is missing: (a, b) becomes (a cos - b sin, a sin + b cos). With two plus signs it is no rotation."
)
def two_plus_signs(q, heads, nope, cos, sin):
    q_nope, q_rope = pieces(q, heads, nope)
    a, b = q_rope[..., ::2], q_rope[..., 1::2]
    cos, sin = cos[:, None], sin[:, None]
    return q_nope, torch.stack([a * cos + b * sin, a * sin + b * cos], -1).flatten(-2)


@DECOUPLED_ROPE.wrong("All positions are turned by the angles of the first one: row t of the tables is for position t.")
def all_as_the_first(q, heads, nope, cos, sin):
    q_nope, q_rope = pieces(q, heads, nope)
    return q_nope, apply_rope(q_rope, cos[:1], sin[:1])


@DECOUPLED_ROPE.wrong(
    "A view as [B, H, T, …] cuts the numbers in the order of memory, positions and heads mixed: keep T where it is, "
    "[B, T, H, P+R]."
)
def query_heads_before_positions(q, heads, nope, cos, sin):
    q = q.reshape(q.shape[0], heads, q.shape[1], -1).transpose(1, 2)
    return q[..., :nope], apply_rope(q[..., nope:], cos, sin)


@DECOUPLED_ROPE.wrong(
    "You cut each head in the middle: its nope part has `nope` columns, the rest is R wide, P and R differ."
)
def query_in_the_middle(q, heads, nope, cos, sin):
    q_nope, q_rope = q.unflatten(-1, (heads, -1)).chunk(2, -1)
    return q_nope, apply_rope(q_rope, cos, sin)


@DECOUPLED_ROPE.wrong(
    "The rope part is the last R columns of ALL of q, the last head's: each head has R of its own, at its own end."
)
def last_head_for_all(q, heads, nope, cos, sin):
    q_nope, q_rope = pieces(q, heads, nope)
    return q_nope, apply_rope(q_rope[:, :, -1:], cos, sin).expand_as(q_rope)


@DECOUPLED_ROPE.wrong(
    "All columns are given to apply_rope at once, with one head: make the head axis first, then cut, then turn."
)
def turned_before_the_heads(q, heads, nope, cos, sin):
    q = apply_rope(q[:, :, None], cos, sin)[:, :, 0].unflatten(-1, (heads, -1))
    return q[..., :nope], q[..., nope:]


@DECOUPLED_ROPE.wrong("Both parts stand in one tensor: give two, [B, T, H, P] and [B, T, H, R].")
def parts_in_one_tensor(q, heads, nope, cos, sin):
    q_nope, q_rope = pieces(q, heads, nope)
    return torch.cat([q_nope, apply_rope(q_rope, cos, sin)], -1)


# 03.4 ------------------------------------------------------------------------------------------------------------

ATTEND_EXPANDED = Exercise(
    "03.4",
    reference.attend_expanded,
    minutes=12,
    sizes=[
        {"B": 1, "T": 48, "S": 48, "H": 8, "C": 40, "P": 24, "R": 16, "V": 32},
        {"B": 3, "T": 7, "S": 7, "H": 3, "C": 11, "P": 5, "R": 4, "V": 6},
        {"B": 2, "T": 8, "S": 8, "H": 8, "C": 8, "P": 8, "R": 8, "V": 8},  # all equal: mixing up raises nothing here
        {"B": 1, "T": 4, "S": 9, "H": 2, "C": 5, "P": 3, "R": 6, "V": 7},
        {"B": 2, "T": 1, "S": 6, "H": 3, "C": 7, "P": 4, "R": 2, "V": 5},
    ],
    gradients=True,
    hints=[
        "Four steps: keys and values from the latents; two scores, of the nope parts and of the rope parts, added and "
        "scaled; mask and softmax; the weighted sum of the values. Which of them needs the head in its letters?",
        'kv = F.linear(c_kv, kv_b.flatten(0, 1)), cut by your split_heads_kv. Scores "bthp,bshp->bhts" of the nope parts '
        'plus "bthr,bsr->bhts" of the rope parts (the key has no h). Hide where ~torch.ones(T, S).tril(S - T).bool().',
    ],
)


@ATTEND_EXPANDED.inputs
def _(r, B, T, S, H, C, P, R, V):
    queries = r.normal(B, T, H, P), r.normal(B, T, H, R)
    return *queries, r.normal(B, S, C), r.normal(B, S, R), 1.5 * C**-0.5 * r.normal(H, P + V, C), 1.3 * (P + R) ** -0.5


def scores_of(q_nope, q_rope, c_kv, k_rope, kv_b):
    """(scores of the nope parts, of the rope parts, values)."""
    k_nope, v = reference.expand(c_kv, kv_b, q_nope.shape[-1])
    nope = torch.einsum("bthp,bshp->bhts", q_nope, k_nope)
    return nope, torch.einsum("bthr,bsr->bhts", q_rope, k_rope), v


def mix(scores, v, seen=None, dim=-1):
    seen = reference.visible(*scores.shape[-2:]) if seen is None else seen
    return torch.einsum("bhts,bshv->bthv", scores.masked_fill(~seen, float("-inf")).softmax(dim), v)


def with_scale(own):
    """The answer that scales by own(P, R, C) instead of the argument."""

    def answer(q_nope, q_rope, c_kv, k_rope, kv_b, scale):
        nope, rope, v = scores_of(q_nope, q_rope, c_kv, k_rope, kv_b)
        return mix((nope + rope) * own(q_nope.shape[-1], q_rope.shape[-1], c_kv.shape[-1]), v)

    return answer


@ATTEND_EXPANDED.wrong(
    "You scale by the width of the nope part alone, P^-0.5: a head's query has P + R columns. Use the argument `scale`."
)
def scaled_by_nope(q_nope, q_rope, c_kv, k_rope, kv_b, scale):
    return with_scale(lambda P, R, C: P**-0.5)(q_nope, q_rope, c_kv, k_rope, kv_b, scale)


@ATTEND_EXPANDED.wrong(
    "You scale by the latent's width, C^-0.5: the products are of keys, P + R wide, not of latents. Use `scale`."
)
def scaled_by_latent(q_nope, q_rope, c_kv, k_rope, kv_b, scale):
    return with_scale(lambda P, R, C: C**-0.5)(q_nope, q_rope, c_kv, k_rope, kv_b, scale)


@ATTEND_EXPANDED.wrong(
    "You scale by the width of what is cached, (C+R)^-0.5: the products are of keys, P + R wide. Use `scale`."
)
def scaled_by_cache(q_nope, q_rope, c_kv, k_rope, kv_b, scale):
    return with_scale(lambda P, R, C: (C + R) ** -0.5)(q_nope, q_rope, c_kv, k_rope, kv_b, scale)


@ATTEND_EXPANDED.wrong(
    "You compute (P+R)^-0.5 yourself: use the argument `scale`. For texts stretched by YaRN it is another number."
)
def own_scale(q_nope, q_rope, c_kv, k_rope, kv_b, scale):
    return with_scale(lambda P, R, C: (P + R) ** -0.5)(q_nope, q_rope, c_kv, k_rope, kv_b, scale)


@ATTEND_EXPANDED.wrong("The scale is missing: multiply the sum of both scores by it before the softmax.")
def scale_missing(q_nope, q_rope, c_kv, k_rope, kv_b, scale):
    return with_scale(lambda P, R, C: 1.0)(q_nope, q_rope, c_kv, k_rope, kv_b, scale)


@ATTEND_EXPANDED.wrong("Only the nope scores are scaled: add both scores first, then multiply the sum by the scale.")
def rope_unscaled(q_nope, q_rope, c_kv, k_rope, kv_b, scale):
    nope, rope, v = scores_of(q_nope, q_rope, c_kv, k_rope, kv_b)
    return mix(nope * scale + rope, v)


@ATTEND_EXPANDED.wrong(
    "The rope scores are forgotten, so attention knows no positions: add q_rope · k_rope to q_nope · k_nope."
)
def rope_forgotten(q_nope, q_rope, c_kv, k_rope, kv_b, scale):
    nope, _, v = scores_of(q_nope, q_rope, c_kv, k_rope, kv_b)
    return mix(nope * scale, v)


@ATTEND_EXPANDED.wrong(
    "The nope scores are forgotten, so attention knows positions alone: add q_nope · k_nope to q_rope · k_rope."
)
def nope_forgotten(q_nope, q_rope, c_kv, k_rope, kv_b, scale):
    _, rope, v = scores_of(q_nope, q_rope, c_kv, k_rope, kv_b)
    return mix(rope * scale, v)


@ATTEND_EXPANDED.wrong(
    "Each score has a softmax of its own: a query has ONE set of weights. Add the scores, then take the softmax once."
)
def two_softmaxes(q_nope, q_rope, c_kv, k_rope, kv_b, scale):
    nope, rope, v = scores_of(q_nope, q_rope, c_kv, k_rope, kv_b)
    return mix(nope * scale, v) + mix(rope * scale, v)


@ATTEND_EXPANDED.wrong("Nothing hides the future: a query must not see keys that come after it.")
def mask_missing(q_nope, q_rope, c_kv, k_rope, kv_b, scale):
    nope, rope, v = scores_of(q_nope, q_rope, c_kv, k_rope, kv_b)
    return mix((nope + rope) * scale, v, torch.ones(nope.shape[-2:], dtype=torch.bool))


@ATTEND_EXPANDED.wrong(
    "You multiply the scores by the mask: a hidden score becomes 0, and e^0 = 1 still has weight. Overwrite it by -inf: "
    "masked_fill."
)
def mask_multiplied(q_nope, q_rope, c_kv, k_rope, kv_b, scale):
    nope, rope, v = scores_of(q_nope, q_rope, c_kv, k_rope, kv_b)
    scores = (nope + rope) * scale
    return mix(scores * reference.visible(*scores.shape[-2:]), v, torch.ones(scores.shape[-2:], dtype=torch.bool))


@ATTEND_EXPANDED.wrong(
    "Is the mask inverted? masked_fill overwrites where its mask is True, so give it what is HIDDEN: a query that sees "
    "nothing at all comes out as NaN."
)
def mask_inverted(q_nope, q_rope, c_kv, k_rope, kv_b, scale):
    nope, rope, v = scores_of(q_nope, q_rope, c_kv, k_rope, kv_b)
    return mix((nope + rope) * scale, v, ~reference.visible(*nope.shape[-2:]))


@ATTEND_EXPANDED.wrong("The result is [B, H, T, V]: the heads come after the positions here, [B, T, H, V].")
def heads_before_positions_out(q_nope, q_rope, c_kv, k_rope, kv_b, scale):
    return reference.attend_expanded(q_nope, q_rope, c_kv, k_rope, kv_b, scale).transpose(1, 2)


@ATTEND_EXPANDED.wrong(
    "The mask counts the queries from position 0: they are the LAST T of the S positions, so keep tril(S - T)."
)
def mask_from_the_start(q_nope, q_rope, c_kv, k_rope, kv_b, scale):
    nope, rope, v = scores_of(q_nope, q_rope, c_kv, k_rope, kv_b)
    return mix((nope + rope) * scale, v, torch.ones(nope.shape[-2:], dtype=torch.bool).tril())


@ATTEND_EXPANDED.wrong(
    "The softmax runs over the queries: for each query the weights of the KEYS must sum to 1 (the last dimension)."
)
def over_queries(q_nope, q_rope, c_kv, k_rope, kv_b, scale):
    nope, rope, v = scores_of(q_nope, q_rope, c_kv, k_rope, kv_b)
    return mix((nope + rope) * scale, v, dim=-2)


@ATTEND_EXPANDED.wrong(
    "Keys and values are swapped: of the P+V rows that kv_b has for a head, the first P make the key."
)
def keys_and_values_swapped(q_nope, q_rope, c_kv, k_rope, kv_b, scale):
    V = kv_b.shape[1] - q_nope.shape[-1]
    kv_b = torch.cat([kv_b[:, V:], kv_b[:, :V]], 1)
    nope, rope, v = scores_of(q_nope, q_rope, c_kv, k_rope, kv_b)
    return mix((nope + rope) * scale, v)


@ATTEND_EXPANDED.wrong(
    "kv_b is cut into all keys, then all values: it holds one block [P+V, C] for each head, the key's rows first."
)
def kv_b_stacked(q_nope, q_rope, c_kv, k_rope, kv_b, scale):
    H, P = kv_b.shape[0], q_nope.shape[-1]
    keys, values = kv_b.flatten(0, 1).tensor_split([H * P])
    kv_b = torch.cat([keys.unflatten(0, (H, -1)), values.unflatten(0, (H, -1))], 1)
    nope, rope, v = scores_of(q_nope, q_rope, c_kv, k_rope, kv_b)
    return mix((nope + rope) * scale, v)


@ATTEND_EXPANDED.wrong("The mask is off by one: each query sees the NEXT position too: tril(S - T), without the + 1.")
def sees_the_next(q_nope, q_rope, c_kv, k_rope, kv_b, scale):
    nope, rope, v = scores_of(q_nope, q_rope, c_kv, k_rope, kv_b)
    T, S = nope.shape[-2:]
    return mix((nope + rope) * scale, v, torch.ones(T, S, dtype=torch.bool).tril(S - T + 1))


@ATTEND_EXPANDED.wrong(
    "The mask is off by one: a query does not see its OWN position, and the first may see nothing, which is NaN: tril(S - T)."
)
def sees_not_itself(q_nope, q_rope, c_kv, k_rope, kv_b, scale):
    nope, rope, v = scores_of(q_nope, q_rope, c_kv, k_rope, kv_b)
    T, S = nope.shape[-2:]
    return mix((nope + rope) * scale, v, torch.ones(T, S, dtype=torch.bool).tril(S - T - 1))


@ATTEND_EXPANDED.wrong(
    "The mask comes after the softmax: the weights that are left no longer sum to 1. Hide the scores, before it."
)
def masked_too_late(q_nope, q_rope, c_kv, k_rope, kv_b, scale):
    nope, rope, v = scores_of(q_nope, q_rope, c_kv, k_rope, kv_b)
    weights = ((nope + rope) * scale).softmax(-1) * reference.visible(*nope.shape[-2:])
    return torch.einsum("bhts,bshv->bthv", weights, v)


@ATTEND_EXPANDED.wrong(
    "Everything is NaN. Is the mask multiplied by -inf? Where it is 0 that is 0 times infinity, NaN: overwrite the hidden "
    "scores instead, masked_fill. (Memory from torch.empty is NaN here, too.)"
)
def zero_times_infinity(q_nope, q_rope, c_kv, k_rope, kv_b, scale):
    nope, rope, v = scores_of(q_nope, q_rope, c_kv, k_rope, kv_b)
    hidden = (~reference.visible(*nope.shape[-2:])).to(nope) * -float("inf")
    return torch.einsum("bhts,bshv->bthv", ((nope + rope) * scale + hidden).softmax(-1), v)


@ATTEND_EXPANDED.wrong(
    "The mask is added as ones and zeros: that hides nothing. Give scaled_dot_product_attention a BOOLEAN mask, or add -inf."
)
def mask_added(q_nope, q_rope, c_kv, k_rope, kv_b, scale):
    nope, rope, v = scores_of(q_nope, q_rope, c_kv, k_rope, kv_b)
    scores = (nope + rope) * scale + reference.visible(*nope.shape[-2:]).to(nope)
    return torch.einsum("bhts,bshv->bthv", scores.softmax(-1), v)


@ATTEND_EXPANDED.wrong("You divide by the scale: it is a factor, (P+R)^-0.5 and the like. Multiply by it.")
def divided_by_the_scale(q_nope, q_rope, c_kv, k_rope, kv_b, scale):
    nope, rope, v = scores_of(q_nope, q_rope, c_kv, k_rope, kv_b)
    return mix((nope + rope) / scale, v)


@ATTEND_EXPANDED.wrong("The scores are scaled twice, once with the queries perhaps: once is enough.")
def scaled_twice(q_nope, q_rope, c_kv, k_rope, kv_b, scale):
    nope, rope, v = scores_of(q_nope, q_rope, c_kv, k_rope, kv_b)
    return mix((nope + rope) * scale**2, v)


@ATTEND_EXPANDED.wrong("You take the root of the scale: it is (P+R)^-0.5 already, so multiply by it as it is.")
def root_of_the_scale(q_nope, q_rope, c_kv, k_rope, kv_b, scale):
    nope, rope, v = scores_of(q_nope, q_rope, c_kv, k_rope, kv_b)
    return mix((nope + rope) * scale**0.5, v)


@ATTEND_EXPANDED.wrong(
    "The softmax runs over the heads: each head has weights of its own that sum to 1 over the positions (the last dimension)."
)
def over_the_heads(q_nope, q_rope, c_kv, k_rope, kv_b, scale):
    nope, rope, v = scores_of(q_nope, q_rope, c_kv, k_rope, kv_b)
    scores = ((nope + rope) * scale).masked_fill(~reference.visible(*nope.shape[-2:]), -1e30)
    return torch.einsum("bhts,bshv->bthv", scores.softmax(1), v)


@ATTEND_EXPANDED.wrong("There is no softmax: the scores become weights, positive and with the sum 1, by it.")
def softmax_missing(q_nope, q_rope, c_kv, k_rope, kv_b, scale):
    nope, rope, v = scores_of(q_nope, q_rope, c_kv, k_rope, kv_b)
    return torch.einsum("bhts,bshv->bthv", (nope + rope) * scale * reference.visible(*nope.shape[-2:]), v)


@ATTEND_EXPANDED.wrong(
    "The heads are brought behind the positions by a view or reshape, which only relabels the numbers: transpose(1, 2)."
)
def relabelled(q_nope, q_rope, c_kv, k_rope, kv_b, scale):
    out = reference.attend_expanded(q_nope, q_rope, c_kv, k_rope, kv_b, scale)
    return out.transpose(1, 2).reshape(out.shape)


@ATTEND_EXPANDED.wrong(
    "kv_b is turned round by a view or reshape, which only relabels its numbers: it is [H, P+V, C], so use F.linear, or .mT."
)
def weights_relabelled(q_nope, q_rope, c_kv, k_rope, kv_b, scale):
    H, rows, C = kv_b.shape
    kv_b = kv_b.reshape(C, H * rows).T.unflatten(0, (H, rows))
    nope, rope, v = scores_of(q_nope, q_rope, c_kv, k_rope, kv_b)
    return mix((nope + rope) * scale, v)


# 03.5 ------------------------------------------------------------------------------------------------------------


def latent_cache_elements(cfg):
    """How many numbers an MLA layer of `cfg` caches for one token: C+R (V2 table 1)."""
    return accounting.kv_elements_per_token(cfg) // cfg.num_hidden_layers


LATENT_CACHE_ELEMENTS = Exercise(
    "03.5",
    latent_cache_elements,
    minutes=3,
    sizes=[
        {"L": 8, "H": 16, "C": 64, "P": 24, "R": 32, "V": 40},
        {"L": 5, "H": 12, "C": 50, "P": 20, "R": 6, "V": 18},
        {"L": 61, "H": 128, "C": 512, "P": 128, "R": 64, "V": 128},
        {"L": 3, "H": 3, "C": 9, "P": 7, "R": 2, "V": 11},
    ],
    hints=[
        "Which two tensors did compress_kv hand out? Of each, one row is a token's.",
        "cfg.kv_lora_rank numbers of c_kv and cfg.qk_rope_head_dim of k_rope; no head, no layer, no factor of 2.",
    ],
)


@LATENT_CACHE_ELEMENTS.inputs
def _(r, L, H, C, P, R, V):
    heads = {"qk_nope_head_dim": P, "qk_rope_head_dim": R, "v_head_dim": V, "num_attention_heads": H}
    return ModelConfig(num_hidden_layers=L, hidden_size=36 * H, kv_lora_rank=C, n_routed_experts=0, **heads)


@LATENT_CACHE_ELEMENTS.wrong(
    "You count the latent twice, once for keys and once for values: both are made of the same one, so it is kept once."
)
def latent_twice(cfg):
    return 2 * cfg.kv_lora_rank + cfg.qk_rope_head_dim


@LATENT_CACHE_ELEMENTS.wrong(
    "Everything is doubled: one latent serves keys AND values, and the answer is in numbers, not in bytes."
)
def doubled(cfg):
    return 2 * (cfg.kv_lora_rank + cfg.qk_rope_head_dim)


@LATENT_CACHE_ELEMENTS.wrong("The rope key is forgotten: it cannot be made of the latent, so it is cached beside it.")
def no_rope_key(cfg):
    return cfg.kv_lora_rank


@LATENT_CACHE_ELEMENTS.wrong(
    "You count a rope key for each head: all heads share ONE, or the cache would grow with their number again."
)
def rope_key_per_head(cfg):
    return cfg.kv_lora_rank + cfg.num_attention_heads * cfg.qk_rope_head_dim


@LATENT_CACHE_ELEMENTS.wrong(
    "You count what is expanded: keys and values of all heads. They are made of the latent when needed, never cached."
)
def expanded(cfg):
    return cfg.num_attention_heads * (cfg.qk_head_dim + cfg.v_head_dim)


@LATENT_CACHE_ELEMENTS.wrong("You count a latent for each head: there is one per token, whatever the number of heads.")
def latent_per_head(cfg):
    return cfg.num_attention_heads * (cfg.kv_lora_rank + cfg.qk_rope_head_dim)


@LATENT_CACHE_ELEMENTS.wrong("That is for all layers: the question is about one of them.")
def all_layers(cfg):
    return accounting.kv_elements_per_token(cfg)


@LATENT_CACHE_ELEMENTS.wrong(
    "You add the nope width: nope keys are made of the latent, only k_rope is cached beside it."
)
def with_nope(cfg):
    return cfg.kv_lora_rank + cfg.qk_head_dim


@LATENT_CACHE_ELEMENTS.wrong(
    "You count a latent for each head, and one rope key: there is one latent too, whatever the number of heads."
)
def latents_of_all_heads(cfg):
    return cfg.num_attention_heads * cfg.kv_lora_rank + cfg.qk_rope_head_dim


@LATENT_CACHE_ELEMENTS.wrong("You add the values: they are made of the latent when needed, never cached.")
def with_values(cfg):
    return cfg.kv_lora_rank + cfg.qk_rope_head_dim + cfg.v_head_dim


@LATENT_CACHE_ELEMENTS.wrong(
    "You count the rope key twice: its R columns are cached once, turned already, and cos and sin are in no cache."
)
def rope_key_twice(cfg):
    return cfg.kv_lora_rank + 2 * cfg.qk_rope_head_dim


@LATENT_CACHE_ELEMENTS.wrong("Half of the rope key is missing: R/2 is the number of its angles, the key has R columns.")
def half_a_rope_key(cfg):
    return cfg.kv_lora_rank + cfg.qk_rope_head_dim // 2


@LATENT_CACHE_ELEMENTS.wrong("That is one head's key, P + R: what is cached is the latent, C, and the rope key.")
def key_of_a_head(cfg):
    return cfg.qk_head_dim


@LATENT_CACHE_ELEMENTS.wrong(
    "That is the cache of MHA, a key and a value for each head: MLA caches the latent instead."
)
def cache_of_mha(cfg):
    return 2 * cfg.hidden_size


@LATENT_CACHE_ELEMENTS.wrong("The two widths are multiplied: latent and rope key lie side by side, so add them.")
def multiplied(cfg):
    return cfg.kv_lora_rank * cfg.qk_rope_head_dim

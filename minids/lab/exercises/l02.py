"""Lesson 02: decoding against a cache of keys and values, heads that share them, and what the cache costs."""

import math

import torch

from minids import accounting, layers
from minids.config import ModelConfig
from minids.lab.exercise import Exercise


def attend(q, k, v, scale, seen=None, dim=-1, hidden=float("-inf")):
    scores = torch.einsum("bthd,bshd->bhts", q, k) * scale
    scores = scores if seen is None else scores.masked_fill(~seen, hidden)
    return torch.einsum("bhts,bshd->bthd", scores.softmax(dim), v)


# 02.1 ------------------------------------------------------------------------------------------------------------


def decode_attention(q, k, v, length, scale):
    """The newest token's q [B,1,H,d] against the first `length` places of k and v [B,S,H,d]; gives [B,1,H,d]."""
    return layers.causal_attention(q, k[:, :length], v[:, :length], scale)


DECODE_ATTENTION = Exercise(
    "02.1",
    decode_attention,
    minutes=5,
    sizes=[
        {"B": 1, "S": 16, "length": 8, "H": 8, "d": 8},
        {"B": 3, "S": 13, "length": 7, "H": 3, "d": 6},
        {"B": 2, "S": 32, "length": 24, "H": 8, "d": 16},
        {"B": 1, "S": 9, "length": 9, "H": 2, "d": 10},
        {"B": 2, "S": 5, "length": 1, "H": 3, "d": 4},
        {"B": 2, "S": 12, "length": 5, "H": 2, "d": 4, "rest": math.inf},  # what lies beyond `length`
    ],
    hints=[
        "Cut first: k[:, :length] is what the query may see, and it may see all of that. Which mask is left to apply?",
        'No mask is left. torch.einsum("bthd,bshd->bhts", q, k[:, :length]) gives the scores; times scale, softmax '
        "over s, the last dimension; a second einsum sums the values v[:, :length].",
    ],
)


@DECODE_ATTENTION.inputs
def _(r, B, S, length, H, d, rest=None):
    q, k, v = r.normal(B, 1, H, d), r.normal(B, S, H, d), r.normal(B, S, H, d)
    if rest is not None:
        k[:, length:], v[:, length:] = rest, rest
    return q, k, v, length, 1.3 * d**-0.5


@DECODE_ATTENTION.wrong(
    "A weight of 0 does not remove what memory held before: that may be inf or NaN, and 0 times either is NaN. Cut the empty places "
    "off, as in k[:, :length]."
)
def masked_not_cut(q, k, v, length, scale):
    return attend(q, k, v, scale, torch.arange(k.shape[1]) < length)


@DECODE_ATTENTION.wrong(
    "The axes of the result are in the order [B,H,1,d]: it must be [B,1,H,d], as q is. A .transpose(1, 2) mends it."
)
def heads_first(q, k, v, length, scale):
    return decode_attention(q, k, v, length, scale).transpose(1, 2)


@DECODE_ATTENTION.wrong(
    "The axis of the one token is lost: the result must be [B,1,H,d], as q is, so that it fits into the model."
)
def token_axis_lost(q, k, v, length, scale):
    return decode_attention(q, k, v, length, scale)[:, 0]


@DECODE_ATTENTION.wrong(
    "You attend to all S places: those from `length` on hold nothing of this text, only what memory held before."
)
def whole_room(q, k, v, length, scale):
    return attend(q, k, v, scale)


@DECODE_ATTENTION.wrong(
    "The causal mask of a single query has a single row, and tril leaves only position 0 of it. The newest token may "
    "see all that is filled: it needs no mask."
)
def mask_of_one_row(q, k, v, length, scale):
    k, v = k[:, :length], v[:, :length]
    return attend(q, k, v, scale, torch.ones(1, length, dtype=torch.bool).tril())


@DECODE_ATTENTION.wrong(
    "The newest token is left out: `length` counts it too, so the places are 0 to length − 1, written k[:, :length]."
)
def without_the_newest(q, k, v, length, scale):
    return attend(q, k[:, : length - 1], v[:, : length - 1], scale)


@DECODE_ATTENTION.wrong("The scores of the empty places are set to 0, a score like any other (e^0 = 1): cut them off.")
def emptied_with_zero(q, k, v, length, scale):
    return attend(q, k, v, scale, torch.arange(k.shape[1]) < length, hidden=0.0)


@DECODE_ATTENTION.wrong(
    "The softmax runs over the queries, of which there is one, so every weight is 1: it must run over the keys."
)
def over_queries(q, k, v, length, scale):
    return attend(q, k[:, :length], v[:, :length], scale, dim=-2)


@DECODE_ATTENTION.wrong("The scale is missing: multiply the scores by it before the softmax.")
def unscaled(q, k, v, length, scale):
    return attend(q, k[:, :length], v[:, :length], 1.0)


@DECODE_ATTENTION.wrong(
    "One place too many: `length` counts the newest token too, so the filled places are 0 to length − 1, written k[:, :length]."
)
def one_too_many(q, k, v, length, scale):
    return attend(q, k[:, : length + 1], v[:, : length + 1], scale)


@DECODE_ATTENTION.wrong(
    "k[:length] cuts the first dimension, the sequences of the batch: the places are the second, k[:, :length]."
)
def batch_cut(q, k, v, length, scale):
    return attend(q, k[:length], v[:length], scale)


@DECODE_ATTENTION.wrong("You take the LAST `length` places of the room: the filled ones are the first, k[:, :length].")
def last_places(q, k, v, length, scale):
    return attend(q, k[:, -length:], v[:, -length:], scale)


@DECODE_ATTENTION.wrong(
    "You take the places from `length` on, which are empty: the filled ones come before, k[:, :length]."
)
def empty_places(q, k, v, length, scale):
    return attend(q, k[:, length:], v[:, length:], scale)


@DECODE_ATTENTION.wrong("The newest token attends to itself alone: it may see all that is filled, k[:, :length].")
def itself_alone(q, k, v, length, scale):
    return attend(q, k[:, length - 1 : length], v[:, length - 1 : length], scale)


@DECODE_ATTENTION.wrong(
    "k is cut to `length` places and v is not, so the weights do not fit: cut both, v[:, :length] too."
)
def values_not_cut(q, k, v, length, scale):
    scores = torch.einsum("bthd,bshd->bhts", q, k[:, :length]) * scale
    return torch.einsum("bhts,bshd->bthd", scores.softmax(-1), v)


@DECODE_ATTENTION.wrong(
    "The softmax runs over all S places, and only then are `length` of the weights kept: they do not sum to 1. Cut k first."
)
def weights_cut(q, k, v, length, scale):
    weights = (torch.einsum("bthd,bshd->bhts", q, k) * scale).softmax(-1)[..., :length]
    return torch.einsum("bhts,bshd->bthd", weights, v[:, :length])


@DECODE_ATTENTION.wrong(
    "The empty places are set to 0, but a key of 0 has the score 0, which counts like any other (e^0 = 1): cut them off."
)
def zeros_left(q, k, v, length, scale):
    filled = (torch.arange(k.shape[1]) < length)[:, None, None]
    return attend(q, torch.where(filled, k, 0.0), torch.where(filled, v, 0.0), scale)


@DECODE_ATTENTION.wrong("`scale` is not used: 1/sqrt(d) is taken instead, by you or by a built-in that was not told.")
def own_scale(q, k, v, length, scale):
    return attend(q, k[:, :length], v[:, :length], q.shape[-1] ** -0.5)


@DECODE_ATTENTION.wrong("You divide by the scale: it is about d^-0.5 already, so multiply.")
def divided(q, k, v, length, scale):
    return attend(q, k[:, :length], v[:, :length], 1 / scale)


@DECODE_ATTENTION.wrong(
    "The softmax runs over the heads: each head's weights sum to 1 over the KEYS, the last of [B,H,1,S]."
)
def over_heads(q, k, v, length, scale):
    return attend(q, k[:, :length], v[:, :length], scale, dim=1)


@DECODE_ATTENTION.wrong(
    "k and v are reshaped from [B,S,H,d] to [B,H,S,d]: reshape cuts the numbers anew and mixes positions with heads; "
    ".transpose(1, 2) moves the axes."
)
def cache_reshaped(q, k, v, length, scale):
    B, _, H, d = q.shape
    k, v = (t[:, :length].reshape(B, H, length, d).transpose(1, 2) for t in (k, v))
    return attend(q, k, v, scale)


@DECODE_ATTENTION.wrong(
    "The KEYS are summed at the end: keys give the weights, and what is summed by them are the values."
)
def keys_summed(q, k, v, length, scale):
    return attend(q, k[:, :length], k[:, :length], scale)


@DECODE_ATTENTION.wrong(
    "There is no softmax: the scores are used as weights. They must be ≥ 0 and sum to 1 over the keys."
)
def no_softmax(q, k, v, length, scale):
    scores = torch.einsum("bthd,bshd->bhts", q, k[:, :length]) * scale
    return torch.einsum("bhts,bshd->bthd", scores, v[:, :length])


# 02.2 ------------------------------------------------------------------------------------------------------------


def decode_step(q, k, v, k_cache, v_cache, length, cos, sin, scale):
    """One token [B,1,H,d] after the `length` in the caches [B,S,H,d]; gives its attention and both caches with it."""
    row = slice(length, length + 1)
    q, k = (layers.apply_rope(t, cos[row], sin[row]) for t in (q, k))
    cache = layers.Cache(k_cache.shape[0], k_cache.shape[1])
    cache.tensors, cache.length = [k_cache.clone(), v_cache.clone()], length
    return layers.causal_attention(q, *cache.append(k, v), scale), *cache.tensors


DECODE_STEP = Exercise(
    "02.2",
    decode_step,
    minutes=9,
    sizes=[
        {"B": 1, "S": 16, "length": 8, "H": 8, "d": 16},
        {"B": 3, "S": 13, "length": 7, "H": 3, "d": 6},
        {"B": 2, "S": 32, "length": 24, "H": 8, "d": 16},
        {"B": 1, "S": 9, "length": 5, "H": 2, "d": 10},
    ],
    hints=[
        "Four steps in this order: turn q and k by the angles of the token's position, copy the caches, write k and v "
        "into the first free place, attend to what is filled now. Positions count from 0: which is the token's?",
        "The token's position is `length`: layers.apply_rope(q, cos[length : length + 1], sin[length : length + 1]), "
        "the same for k; k_cache = k_cache.clone(), then k_cache[:, length] = k[:, 0], and v without turning; at last "
        "decode_attention with length + 1.",
    ],
)


@DECODE_STEP.inputs
def _(r, B, S, length, H, d):
    angles = r.uniform(0.3, 3.0, S, d // 2)
    token, caches = (r.normal(B, 1, H, d) for _ in range(3)), (r.normal(B, S, H, d) for _ in range(2))
    return *token, *caches, length, angles.cos(), angles.sin(), 1.3 * d**-0.5


def one_step(q, k, v, k_cache, v_cache, length, scale, place=None, seen=None):
    """decode_step of q and k that are turned already or not, at another place, or seeing other positions."""
    k_cache, v_cache, place = k_cache.clone(), v_cache.clone(), length if place is None else place
    k, v = (k, v) if isinstance(place, slice) else (k[:, 0], v[:, 0])
    k_cache[:, place], v_cache[:, place] = k, v
    seen = length + 1 if seen is None else seen
    return attend(q, k_cache[:, :seen], v_cache[:, :seen], scale), k_cache, v_cache


def turned(cos, sin, row, *tensors):
    return [layers.apply_rope(t, cos[row : row + 1], sin[row : row + 1]) for t in tensors]


@DECODE_STEP.wrong(
    "The position starts at 0 again for every token: the newest stands at position `length`, so take that row of cos "
    "and sin."
)
def position_restarts(q, k, v, k_cache, v_cache, length, cos, sin, scale):
    q, k = turned(cos, sin, 0, q, k)
    return one_step(q, k, v, k_cache, v_cache, length, scale)


@DECODE_STEP.wrong(
    "The angles are one position late: `length` tokens stand at positions 0 to length − 1, the next one at `length`."
)
def row_too_late(q, k, v, k_cache, v_cache, length, cos, sin, scale):
    q, k = turned(cos, sin, length + 1, q, k)
    return one_step(q, k, v, k_cache, v_cache, length, scale)


@DECODE_STEP.wrong(
    "The angles are one position early: position length − 1 is taken by the last token in the cache; the new one's is "
    "`length`."
)
def row_too_early(q, k, v, k_cache, v_cache, length, cos, sin, scale):
    q, k = turned(cos, sin, length - 1, q, k)
    return one_step(q, k, v, k_cache, v_cache, length, scale)


@DECODE_STEP.wrong("The key goes into the cache without being turned: RoPE turns q AND k, each once, before caching.")
def key_not_turned(q, k, v, k_cache, v_cache, length, cos, sin, scale):
    (q,) = turned(cos, sin, length, q)
    return one_step(q, k, v, k_cache, v_cache, length, scale)


@DECODE_STEP.wrong("The query is not turned: RoPE turns q and k by the same angles, those of the token's position.")
def query_not_turned(q, k, v, k_cache, v_cache, length, cos, sin, scale):
    (k,) = turned(cos, sin, length, k)
    return one_step(q, k, v, k_cache, v_cache, length, scale)


@DECODE_STEP.wrong("The value is turned as well: RoPE is for queries and keys, values stay as they are.")
def value_turned(q, k, v, k_cache, v_cache, length, cos, sin, scale):
    q, k, v = turned(cos, sin, length, q, k, v)
    return one_step(q, k, v, k_cache, v_cache, length, scale)


@DECODE_STEP.wrong(
    "All keys are turned again: those in the cache were turned when they came in. Turn the new one alone, and write it."
)
def cache_turned_again(q, k, v, k_cache, v_cache, length, cos, sin, scale):
    (q,) = turned(cos, sin, length, q)
    _, k_cache, v_cache = one_step(q, k, v, k_cache, v_cache, length, scale)
    filled = layers.apply_rope(k_cache[:, : length + 1], cos[: length + 1], sin[: length + 1])
    k_cache = torch.cat([filled, k_cache[:, length + 1 :]], 1)
    return attend(q, filled, v_cache[:, : length + 1], scale), k_cache, v_cache


@DECODE_STEP.wrong(
    "The new key and value overwrite those of position 0: the first free place is `length`, where one writes on."
)
def overwritten(q, k, v, k_cache, v_cache, length, cos, sin, scale):
    q, k = turned(cos, sin, length, q, k)
    return one_step(q, k, v, k_cache, v_cache, length, scale, place=0)


@DECODE_STEP.wrong(
    "The new key and value overwrite the last token's: places 0 to length − 1 are taken, the first free one is `length`."
)
def last_overwritten(q, k, v, k_cache, v_cache, length, cos, sin, scale):
    q, k = turned(cos, sin, length, q, k)
    return one_step(q, k, v, k_cache, v_cache, length, scale, place=length - 1, seen=length)


@DECODE_STEP.wrong(
    "The new token does not see itself: after writing, length + 1 places are filled, and it may attend to all of them."
)
def not_itself(q, k, v, k_cache, v_cache, length, cos, sin, scale):
    q, k = turned(cos, sin, length, q, k)
    return one_step(q, k, v, k_cache, v_cache, length, scale, seen=length)


@DECODE_STEP.wrong(
    "The caches come back with length + 1 places instead of S: write into a copy of the room, so that more tokens fit."
)
def room_lost(q, k, v, k_cache, v_cache, length, cos, sin, scale):
    q, k = turned(cos, sin, length, q, k)
    k, v = torch.cat([k_cache[:, :length], k], 1), torch.cat([v_cache[:, :length], v], 1)
    return attend(q, k, v, scale), k, v


@DECODE_STEP.wrong("You write into the caches that were given. Clone the cache first, then write into the clone.")
def written_in_place(q, k, v, k_cache, v_cache, length, cos, sin, scale):
    o, *caches = decode_step(q, k, v, k_cache, v_cache, length, cos, sin, scale)
    k_cache.copy_(caches[0]), v_cache.copy_(caches[1])
    return o, k_cache, v_cache


@DECODE_STEP.wrong("You turned by all S rows of cos and sin; the token needs row `length` alone.")
def turned_by_all_rows(q, k, v, k_cache, v_cache, length, cos, sin, scale):
    q, k = layers.apply_rope(q, cos, sin), layers.apply_rope(k, cos, sin)
    return one_step(q, k, v, k_cache, v_cache, length, scale)


@DECODE_STEP.wrong("The output's axes are in the order [B,H,1,d]: it must be [B,1,H,d], as q is.")
def output_heads_first(q, k, v, k_cache, v_cache, length, cos, sin, scale):
    o, *caches = decode_step(q, k, v, k_cache, v_cache, length, cos, sin, scale)
    return o.transpose(1, 2), *caches


@DECODE_STEP.wrong("Neither q nor k is turned: layers.apply_rope(x, cos, sin) turns each by the row of its position.")
def nothing_turned(q, k, v, k_cache, v_cache, length, cos, sin, scale):
    return one_step(q, k, v, k_cache, v_cache, length, scale)


@DECODE_STEP.wrong("q and k are turned twice: once, by row `length`.")
def turned_twice(q, k, v, k_cache, v_cache, length, cos, sin, scale):
    q, k = turned(cos, sin, length, *turned(cos, sin, length, q, k))
    return one_step(q, k, v, k_cache, v_cache, length, scale)


@DECODE_STEP.wrong("cos and sin are exchanged: layers.apply_rope(x, cos, sin) takes cos first.")
def sin_first(q, k, v, k_cache, v_cache, length, cos, sin, scale):
    q, k = turned(sin, cos, length, q, k)
    return one_step(q, k, v, k_cache, v_cache, length, scale)


@DECODE_STEP.wrong("The last row of cos and sin is taken, the end of the ROOM: the token stands at position `length`.")
def last_row(q, k, v, k_cache, v_cache, length, cos, sin, scale):
    q, k = turned(cos, sin, len(cos) - 1, q, k)
    return one_step(q, k, v, k_cache, v_cache, length, scale)


@DECODE_STEP.wrong(
    "cos[: length + 1] has a row for every position so far; the token needs one, that of its own: cos[length : length + 1]."
)
def rows_so_far(q, k, v, k_cache, v_cache, length, cos, sin, scale):
    q, k = (layers.apply_rope(t, cos[: length + 1], sin[: length + 1]) for t in (q, k))
    _, k_cache, v_cache = one_step(q, k, v, k_cache, v_cache, length, scale)
    return decode_attention(q, k_cache, v_cache, length + 1, scale), k_cache, v_cache


@DECODE_STEP.wrong("The value is not written: v goes into v_cache at place `length`, as k into k_cache.")
def value_not_written(q, k, v, k_cache, v_cache, length, cos, sin, scale):
    q, k = turned(cos, sin, length, q, k)
    return one_step(q, k, v_cache[:, length : length + 1], k_cache, v_cache, length, scale)


@DECODE_STEP.wrong("The key is not written: k, turned, goes into k_cache at place `length`, as v into v_cache.")
def key_not_written(q, k, v, k_cache, v_cache, length, cos, sin, scale):
    q, k = turned(cos, sin, length, q, k)
    return one_step(q, k_cache[:, length : length + 1], v, k_cache, v_cache, length, scale)


@DECODE_STEP.wrong("The key is written into both caches: v_cache gets v.")
def key_in_both(q, k, v, k_cache, v_cache, length, cos, sin, scale):
    q, k = turned(cos, sin, length, q, k)
    return one_step(q, k, k, k_cache, v_cache, length, scale)


@DECODE_STEP.wrong(
    "What you write is lost: k_cache.clone()[:, length] = … writes into a copy that nobody keeps. k_cache = k_cache.clone() "
    "first, then write into it."
)
def copy_thrown_away(q, k, v, k_cache, v_cache, length, cos, sin, scale):
    (q,) = turned(cos, sin, length, q)
    return attend(q, k_cache[:, : length + 1], v_cache[:, : length + 1], scale), k_cache, v_cache


@DECODE_STEP.wrong("Attention comes before the new key and value are written: it reads what memory held there.")
def attends_before_writing(q, k, v, k_cache, v_cache, length, cos, sin, scale):
    q, k = turned(cos, sin, length, q, k)
    o = attend(q, k_cache[:, : length + 1], v_cache[:, : length + 1], scale)
    return o, *one_step(q, k, v, k_cache, v_cache, length, scale)[1:]


@DECODE_STEP.wrong(
    "The token is written one place late, and a place that was never filled lies before it: the first free one is `length`."
)
def place_too_late(q, k, v, k_cache, v_cache, length, cos, sin, scale):
    q, k = turned(cos, sin, length, q, k)
    return one_step(q, k, v, k_cache, v_cache, length, scale, place=length + 1, seen=length + 2)


@DECODE_STEP.wrong(
    "The token is put behind the whole room, at place S (torch.cat with all of the cache): the first free place is `length`, "
    "and the cache keeps its S places."
)
def behind_the_room(q, k, v, k_cache, v_cache, length, cos, sin, scale):
    q, k = turned(cos, sin, length, q, k)
    k_cache, v_cache = torch.cat([k_cache, k], 1), torch.cat([v_cache, v], 1)
    return attend(q, k_cache[:, : length + 1], v_cache[:, : length + 1], scale), k_cache, v_cache


@DECODE_STEP.wrong(
    "The token is put behind the whole room, at place S, and sees all of it: the first free place is `length`, and the "
    "cache keeps its S places."
)
def behind_the_room_seeing_all(q, k, v, k_cache, v_cache, length, cos, sin, scale):
    q, k = turned(cos, sin, length, q, k)
    k_cache, v_cache = torch.cat([k_cache, k], 1), torch.cat([v_cache, v], 1)
    return attend(q, k_cache, v_cache, scale), k_cache, v_cache


@DECODE_STEP.wrong(
    "The token sees the whole room: only length + 1 places are filled, the rest is what memory held before."
)
def sees_the_room(q, k, v, k_cache, v_cache, length, cos, sin, scale):
    q, k = turned(cos, sin, length, q, k)
    return one_step(q, k, v, k_cache, v_cache, length, scale, seen=k_cache.shape[1])


@DECODE_STEP.wrong(
    "The new key and value fill every place from `length` on: write into that one alone, k_cache[:, length]."
)
def written_to_the_end(q, k, v, k_cache, v_cache, length, cos, sin, scale):
    q, k = turned(cos, sin, length, q, k)
    return one_step(q, k, v, k_cache, v_cache, length, scale, place=slice(length, None))


@DECODE_STEP.wrong(
    "The new key and value overwrite all that was filled: write into place `length` alone, k_cache[:, length]."
)
def all_overwritten(q, k, v, k_cache, v_cache, length, cos, sin, scale):
    q, k = turned(cos, sin, length, q, k)
    return one_step(q, k, v, k_cache, v_cache, length, scale, place=slice(0, length + 1))


@DECODE_STEP.wrong(
    "k is [B,1,H,d], and the place k_cache[:, length] is [B,H,d]: write k[:, 0] into it, or k into k_cache[:, length : length "
    "+ 1]. (With batch 1 it fits by chance.)"
)
def token_axis_kept(q, k, v, k_cache, v_cache, length, cos, sin, scale):
    q, k = turned(cos, sin, length, q, k)
    k_cache, v_cache = k_cache.clone(), v_cache.clone()
    k_cache[:, length], v_cache[:, length] = k, v
    return attend(q, k_cache[:, : length + 1], v_cache[:, : length + 1], scale), k_cache, v_cache


@DECODE_STEP.wrong("The scale is missing: multiply the scores by it before the softmax.")
def step_unscaled(q, k, v, k_cache, v_cache, length, cos, sin, scale):
    q, k = turned(cos, sin, length, q, k)
    return one_step(q, k, v, k_cache, v_cache, length, 1.0)


@DECODE_STEP.wrong("The order is: the output, then the cache of keys, then that of values.")
def output_last(q, k, v, k_cache, v_cache, length, cos, sin, scale):
    o, *caches = decode_step(q, k, v, k_cache, v_cache, length, cos, sin, scale)
    return *caches, o


@DECODE_STEP.wrong("The two caches are exchanged: first that of the keys, then that of the values.")
def values_before_keys(q, k, v, k_cache, v_cache, length, cos, sin, scale):
    o, k_cache, v_cache = decode_step(q, k, v, k_cache, v_cache, length, cos, sin, scale)
    return o, v_cache, k_cache


@DECODE_STEP.wrong("You give back the new key and value alone: both CACHES are wanted, with the token in.")
def token_for_caches(q, k, v, k_cache, v_cache, length, cos, sin, scale):
    o, k_cache, v_cache = decode_step(q, k, v, k_cache, v_cache, length, cos, sin, scale)
    return o, k_cache[:, length : length + 1], v_cache[:, length : length + 1]


@DECODE_STEP.wrong("That is the output alone: give three tensors, return output, k_cache, v_cache")
def output_alone(q, k, v, k_cache, v_cache, length, cos, sin, scale):
    return decode_step(q, k, v, k_cache, v_cache, length, cos, sin, scale)[0]


# 02.3 ------------------------------------------------------------------------------------------------------------


def grouped_attention(q, k, v, scale):
    """One query a head, q [B,1,H,d], against k, v [B,S,G,d]; head h uses K/V head h // (H/G); gives [B,1,H,d]."""
    return layers.causal_attention(q, k, v, scale)


GROUPED_ATTENTION = Exercise(
    "02.3",
    grouped_attention,
    minutes=8,
    sizes=[
        {"B": 1, "S": 8, "H": 16, "G": 8, "d": 8},
        {"B": 3, "S": 7, "H": 6, "G": 2, "d": 6},
        {"B": 2, "S": 16, "H": 32, "G": 8, "d": 16},
        {"B": 1, "S": 11, "H": 4, "G": 1, "d": 10},
        {"B": 2, "S": 5, "H": 9, "G": 3, "d": 4},
    ],
    hints=[
        "Neighbouring query heads share: with H = 6 and G = 2, heads 0, 1, 2 use K/V head 0, and 3, 4, 5 use 1. Which "
        "view of q puts those three side by side?",
        "q.reshape(B, G, H // G, d) lists each group's queries (T is 1). Then torch.einsum("
        '"bgnd,bsgd->bgns", q, k) needs no copy of k; softmax over s; "bgns,bsgd->bgnd" sums the values; reshape to '
        "[B, 1, H, d] at the end.",
    ],
)


@GROUPED_ATTENTION.inputs
def _(r, B, S, H, G, d):
    return r.normal(B, 1, H, d), r.normal(B, S, G, d), r.normal(B, S, G, d), 1.3 * d**-0.5


@GROUPED_ATTENTION.wrong(
    "Head h uses K/V head h % G, as repeat lays them out: 0, 1, 0, 1, … It must be h // (H/G): neighbours share, "
    "0, 0, 1, 1, …, as repeat_interleave does."
)
def interleaved(q, k, v, scale):
    n = q.shape[2] // k.shape[2]
    return attend(q, k.repeat(1, 1, n, 1), v.repeat(1, 1, n, 1), scale)


@GROUPED_ATTENTION.wrong(
    "Keys are shared by neighbours, values by every G-th head: both must be laid out in the same way, h // (H/G)."
)
def values_interleaved(q, k, v, scale):
    n = q.shape[2] // k.shape[2]
    return attend(q, k.repeat_interleave(n, 2), v.repeat(1, 1, n, 1), scale)


@GROUPED_ATTENTION.wrong("All heads use K/V head 0: that is MQA whatever G is. Head h belongs to group h // (H/G).")
def first_head_only(q, k, v, scale):
    H = q.shape[2]
    return attend(q, k[:, :, :1].expand(-1, -1, H, -1), v[:, :, :1].expand(-1, -1, H, -1), scale)


@GROUPED_ATTENTION.wrong(
    "The queries of a group are averaged, so its heads all give the same: they share keys and values, but each asks "
    "its own question."
)
def mean_query(q, k, v, scale):
    G, n = k.shape[2], q.shape[2] // k.shape[2]
    q = q.unflatten(2, (G, n)).mean(3).repeat_interleave(n, 2)
    return attend(q, k.repeat_interleave(n, 2), v.repeat_interleave(n, 2), scale)


@GROUPED_ATTENTION.wrong(
    "The keys and values of all groups are averaged into one: each group keeps its own, and only its heads use them."
)
def mean_of_groups(q, k, v, scale):
    H = q.shape[2]
    return attend(q, *(t.mean(2, keepdim=True).expand(-1, -1, H, -1) for t in (k, v)), scale)


@GROUPED_ATTENTION.wrong(
    "The heads come out in another order, [H/G, G] instead of [G, H/G]: o_proj expects head h in place h."
)
def order_lost(q, k, v, scale):
    G, n = k.shape[2], q.shape[2] // k.shape[2]
    o = attend(q, k.repeat_interleave(n, 2), v.repeat_interleave(n, 2), scale)
    return o.unflatten(2, (G, n)).transpose(2, 3).flatten(2, 3)


@GROUPED_ATTENTION.wrong(
    "q has H heads, k and v have G, and nothing brings these, dimension 2, together (with G = 1 it works by chance): view "
    "q as [B,G,H/G,d], so that each group meets its own K/V head."
)
def heads_not_matched(q, k, v, scale):
    return attend(q, k, v, scale)


@GROUPED_ATTENTION.wrong(
    "The axes of the result are in the order [B,H,1,d]: it must be [B,1,H,d], as q is. A .reshape(B, 1, H, d) mends it."
)
def grouped_heads_first(q, k, v, scale):
    return grouped_attention(q, k, v, scale).transpose(1, 2)


@GROUPED_ATTENTION.wrong(
    "The heads come out by groups, [B,G,H/G,d]: bring them side by side at the end, .reshape(B, 1, H, d)."
)
def groups_left(q, k, v, scale):
    return grouped_attention(q, k, v, scale).flatten(1, 2).unflatten(1, (k.shape[2], -1))


@GROUPED_ATTENTION.wrong("The scale is missing: multiply the scores by it before the softmax.")
def grouped_unscaled(q, k, v, scale):
    n = q.shape[2] // k.shape[2]
    return attend(q, k.repeat_interleave(n, 2), v.repeat_interleave(n, 2), 1.0)


@GROUPED_ATTENTION.wrong(
    "The head's number is divided by G: h // G. It is h // (H/G), H/G query heads share a K/V head."
)
def divided_by_groups(q, k, v, scale):
    G = k.shape[2]
    heads = torch.arange(q.shape[2]) // G
    return attend(q, k[:, :, heads], v[:, :, heads], scale)


def by_groups(q, k, v, scale, dim):
    """Grouped attention with a softmax over dimension `dim` of the scores [B,G,H/G,S]."""
    scores = torch.einsum("bgnd,bsgd->bgns", q[:, 0].unflatten(1, (k.shape[2], -1)), k) * scale
    return torch.einsum("bgns,bsgd->bgnd", scores.softmax(dim), v).flatten(1, 2)[:, None]


@GROUPED_ATTENTION.wrong(
    "The softmax runs over the heads of a group: it must run over the keys, the last of [B,G,H/G,S]."
)
def over_the_group(q, k, v, scale):
    return by_groups(q, k, v, scale, 2)


@GROUPED_ATTENTION.wrong("The softmax runs over the groups: it must run over the keys, the last of [B,G,H/G,S].")
def over_groups(q, k, v, scale):
    return by_groups(q, k, v, scale, 1)


@GROUPED_ATTENTION.wrong(
    "The scores of a group's queries are added up, so its heads all give the same: keep their axis, as in bgnd,bsgd->bgns."
)
def scores_added(q, k, v, scale):
    G, n = k.shape[2], q.shape[2] // k.shape[2]
    q = q.unflatten(2, (G, n)).sum(3).repeat_interleave(n, 2)
    return attend(q, k.repeat_interleave(n, 2), v.repeat_interleave(n, 2), scale)


@GROUPED_ATTENTION.wrong(
    "k and v are reshaped from [B,S,G,d] to [B,G,S,d]: reshape cuts the numbers anew and mixes positions with heads; "
    ".transpose(1, 2) moves the axes."
)
def grouped_reshaped(q, k, v, scale):
    B, S, G, d = k.shape
    return grouped_attention(q, *(t.reshape(B, G, S, d).transpose(1, 2) for t in (k, v)), scale)


@GROUPED_ATTENTION.wrong("`scale` is not used: 1/sqrt(d) is taken instead, by you or by a built-in that was not told.")
def grouped_own_scale(q, k, v, scale):
    return grouped_attention(q, k, v, q.shape[-1] ** -0.5)


@GROUPED_ATTENTION.wrong("You divide by the scale: it is about d^-0.5 already, so multiply.")
def grouped_divided(q, k, v, scale):
    return grouped_attention(q, k, v, 1 / scale)


@GROUPED_ATTENTION.wrong(
    "The KEYS are summed at the end: keys give the weights, and what is summed by them are the values."
)
def grouped_keys_summed(q, k, v, scale):
    return grouped_attention(q, k, k, scale)


@GROUPED_ATTENTION.wrong(
    "Each K/V head serves one query head, so only the first G heads are there: all H must come out."
)
def first_heads(q, k, v, scale):
    return attend(q[:, :, : k.shape[2]], k, v, scale)


@GROUPED_ATTENTION.wrong("A causal mask of a single query leaves position 0 alone: the newest token may see all S.")
def grouped_mask_of_one_row(q, k, v, scale):
    return grouped_attention(q, k[:, :1], v[:, :1], scale)


# 02.4 ------------------------------------------------------------------------------------------------------------

KV_BYTES = Exercise(
    "02.4",
    accounting.kv_bytes_per_token,
    minutes=3,
    sizes=[
        {"L": 8, "H": 16, "G": 8, "d": 64, "dtype": torch.bfloat16},
        {"L": 5, "H": 12, "G": 3, "d": 50, "dtype": torch.float32},
        {"L": 61, "H": 9, "G": 9, "d": 0, "dtype": torch.float16},
        {"L": 32, "H": 32, "G": 8, "d": 128, "dtype": torch.float8_e4m3fn},
        {"L": 3, "H": 4, "G": 1, "d": 18, "dtype": torch.bfloat16},
        {"L": 7, "H": 6, "G": 2, "d": 26, "dtype": torch.bfloat16, "attention": "mha"},  # which ignores G
    ],
    hints=[
        "What does one layer keep of one token? A vector for each of … heads, and of which two kinds?",
        "Numbers: layers × 2 (keys and values) × kv_heads × attention_head_dim; each takes dtype.itemsize bytes.",
    ],
)


@KV_BYTES.inputs
def _(r, L, H, G, d, dtype, attention="gqa"):
    names = {"num_hidden_layers": L, "num_attention_heads": H, "num_key_value_heads": G, "head_dim": d}
    return ModelConfig(attention=attention, hidden_size=36 * H, **names), dtype


def numbers(cfg, heads=None):
    return cfg.num_hidden_layers * (heads or cfg.kv_heads) * cfg.attention_head_dim


@KV_BYTES.wrong("You count keys or values, not both: the cache keeps a key AND a value, a factor of 2.")
def only_keys(cfg, dtype):
    return numbers(cfg) * dtype.itemsize


@KV_BYTES.wrong(
    "You count the query heads: queries are not kept. What is kept has kv_heads heads, and that is the point of GQA."
)
def query_heads(cfg, dtype):
    return 2 * numbers(cfg, cfg.num_attention_heads) * dtype.itemsize


@KV_BYTES.wrong("That is in bits: dtype.itemsize is in bytes already, there is nothing to multiply by 8.")
def bits(cfg, dtype):
    return 8 * 2 * numbers(cfg) * dtype.itemsize


@KV_BYTES.wrong("That is how many NUMBERS are kept: each takes dtype.itemsize bytes.")
def elements(cfg, dtype):
    return 2 * numbers(cfg)


@KV_BYTES.wrong("You count 2 bytes for every number: that is bfloat16's; other dtypes differ, so take dtype.itemsize.")
def two_bytes(cfg, dtype):
    return 2 * numbers(cfg) * 2


@KV_BYTES.wrong("That is a single layer's: every layer keeps keys and values of its own.")
def one_layer(cfg, dtype):
    return 2 * cfg.kv_heads * cfg.attention_head_dim * dtype.itemsize


@KV_BYTES.wrong(
    "You take hidden_size for the width of all keys: they have kv_heads · attention_head_dim columns, a number of "
    "their own."
)
def hidden_width(cfg, dtype):
    return 2 * cfg.num_hidden_layers * cfg.hidden_size * dtype.itemsize


@KV_BYTES.wrong(
    "head_dim is 0 in a config that leaves it to be computed: attention_head_dim is the width of a head in any case."
)
def raw_head_dim(cfg, dtype):
    return 2 * cfg.num_hidden_layers * cfg.kv_heads * cfg.head_dim * dtype.itemsize


@KV_BYTES.wrong(
    'cfg.num_key_value_heads is what stands in the config, and multi-head attention ("mha") ignores it: cfg.kv_heads '
    "is the number of K/V heads in any case."
)
def raw_kv_heads(cfg, dtype):
    return 2 * numbers(cfg, cfg.num_key_value_heads) * dtype.itemsize


@KV_BYTES.wrong(
    "A head's width is hidden_size // num_attention_heads in your count: a config may set another, "
    "cfg.attention_head_dim knows."
)
def share_of_hidden(cfg, dtype):
    return 2 * cfg.num_hidden_layers * cfg.kv_heads * (cfg.hidden_size // cfg.num_attention_heads) * dtype.itemsize


@KV_BYTES.wrong("You count 4 bytes for every number: that is float32's; other dtypes differ, so take dtype.itemsize.")
def four_bytes(cfg, dtype):
    return 2 * numbers(cfg) * 4


@KV_BYTES.wrong("That is the cache of a single K/V head: there are cfg.kv_heads in each layer.")
def one_head(cfg, dtype):
    return 2 * cfg.num_hidden_layers * cfg.attention_head_dim * dtype.itemsize


@KV_BYTES.wrong("The width of a head is missing: each K/V head keeps cfg.attention_head_dim numbers, twice.")
def no_width(cfg, dtype):
    return 2 * cfg.num_hidden_layers * cfg.kv_heads * dtype.itemsize


@KV_BYTES.wrong("Queries are in your count too: only keys and values are kept, for an old query nobody asks again.")
def queries_too(cfg, dtype):
    return (2 * numbers(cfg) + numbers(cfg, cfg.num_attention_heads)) * dtype.itemsize


@KV_BYTES.wrong("You count query heads AND K/V heads: only the latter are kept, cfg.kv_heads of them.")
def both_heads(cfg, dtype):
    return 2 * numbers(cfg) * cfg.num_attention_heads * dtype.itemsize


# 02.5 ------------------------------------------------------------------------------------------------------------


def users_that_fit(memory, weights, bytes_per_token, context):
    """How many users with `context` tokens each fit into `memory` beside `weights` (both bytes); whole, 0 or more."""
    return max(0, int((memory - weights) // (bytes_per_token * context)))


USERS = Exercise(
    "02.5",
    users_that_fit,
    minutes=3,
    sizes=[
        {"memory": 80 * 10**9, "weights": 16 * 10**9, "bytes_per_token": 512_000, "context": 4096},
        {"memory": 141 * 10**9, "weights": 70 * 10**9, "bytes_per_token": 70_272, "context": 1001},
        {"memory": 24 * 10**9, "weights": 40 * 10**9, "bytes_per_token": 131_072, "context": 2048},
        {"memory": 97 * 10**9, "weights": 33 * 10**9, "bytes_per_token": 1_000_000, "context": 8001},
        {"memory": 81 * 10**9, "weights": 7 * 10**9, "bytes_per_token": 327_680, "context": 32768},
        {"memory": 40 * 10**9, "weights": 10**10, "bytes_per_token": 10**6, "context": 3000},  # filled to the last byte
    ],
    hints=[
        "What is left for the caches once the weights are in? And how much of it does one user take?",
        "(memory − weights) divided by bytes_per_token · context, rounded down with //, and max(0, …) for weights that "
        "do not fit at all.",
    ],
)


@USERS.inputs
def _(r, memory, weights, bytes_per_token, context):
    return memory, weights, bytes_per_token, context


@USERS.wrong("You round up: the last user's cache does not fit as a whole. Round down.")
def rounded_up(memory, weights, bytes_per_token, context):
    return max(0, math.ceil((memory - weights) / (bytes_per_token * context)))


@USERS.wrong("Where the caches fill the memory to the last byte, the last one still fits: ≤, not <.")
def never_full(memory, weights, bytes_per_token, context):
    return max(0, (memory - weights - 1) // (bytes_per_token * context))


@USERS.wrong("You round to the nearest number, which can be up: a cache that fits by half does not fit. Round down.")
def rounded(memory, weights, bytes_per_token, context):
    return max(0, round((memory - weights) / (bytes_per_token * context)))


@USERS.wrong("That is a fraction of a user: give a whole number, rounded down (//).")
def a_fraction(memory, weights, bytes_per_token, context):
    return max(0, (memory - weights) / (bytes_per_token * context))


@USERS.wrong("The weights are forgotten: they lie in the same memory, and are subtracted first.")
def no_weights(memory, weights, bytes_per_token, context):
    return memory // (bytes_per_token * context)


@USERS.wrong("The weights are counted once for each user: all users share one copy, subtracted once.")
def weights_each(memory, weights, bytes_per_token, context):
    return memory // (weights + bytes_per_token * context)


@USERS.wrong("That is how many TOKENS fit: each user has `context` of them.")
def tokens_not_users(memory, weights, bytes_per_token, context):
    return max(0, (memory - weights) // bytes_per_token)


@USERS.wrong("Where the weights do not fit there are 0 users, not fewer than none: max(0, …).")
def fewer_than_none(memory, weights, bytes_per_token, context):
    return (memory - weights) // (bytes_per_token * context)


@USERS.wrong(
    "Without brackets // and * go from left to right: a // b * c is (a // b) * c. Divide by (bytes_per_token * context)."
)
def brackets_missing(memory, weights, bytes_per_token, context):
    return max(0, (memory - weights) // bytes_per_token * context)


@USERS.wrong("Without brackets // comes before −: write (memory − weights) // (…).")
def divided_before_subtracting(memory, weights, bytes_per_token, context):
    return max(0, memory - weights // (bytes_per_token * context))


@USERS.wrong("bytes_per_token and context are added: each of the `context` tokens takes bytes_per_token, so multiply.")
def added_up(memory, weights, bytes_per_token, context):
    return max(0, (memory - weights) // (bytes_per_token + context))


@USERS.wrong("The weights are added to the memory: they take room away from the caches, so subtract them.")
def weights_added(memory, weights, bytes_per_token, context):
    return max(0, (memory + weights) // (bytes_per_token * context))


@USERS.wrong("Where the weights do not fit nobody can be served: abs makes users of what is missing. Use max(0, …).")
def absolute(memory, weights, bytes_per_token, context):
    return abs(memory - weights) // (bytes_per_token * context)


@USERS.wrong("int() cuts towards 0, and still gives fewer than none where the weights do not fit: max(0, …) around it.")
def cut_below_none(memory, weights, bytes_per_token, context):
    return int((memory - weights) / (bytes_per_token * context))


@USERS.wrong("That is a fraction, and below 0 where the weights do not fit: give a whole number, rounded down, or 0.")
def a_fraction_below_none(memory, weights, bytes_per_token, context):
    return (memory - weights) / (bytes_per_token * context)


@USERS.wrong("At least one user in your answer: where the weights do not fit there are 0, so max(0, …).")
def at_least_one(memory, weights, bytes_per_token, context):
    return max(1, (memory - weights) // (bytes_per_token * context))


@USERS.wrong("min(0, …) never gives more than 0: max(0, …) never gives less.")
def min_for_max(memory, weights, bytes_per_token, context):
    return min(0, (memory - weights) // (bytes_per_token * context))


@USERS.wrong("One user too few: the weights are subtracted already, and // rounds down already.")
def one_too_few(memory, weights, bytes_per_token, context):
    return max(0, (memory - weights) // (bytes_per_token * context) - 1)


@USERS.wrong("The keys and values are in bytes_per_token both: there is no 2 to multiply by.")
def keys_and_values_again(memory, weights, bytes_per_token, context):
    return max(0, (memory - weights) // (2 * bytes_per_token * context))

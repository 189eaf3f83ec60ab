"""Lesson 04: MLA over the latents themselves: what absorbs, what projects, the attention between, and what it costs."""

import torch

from minids.lab.exercise import Exercise
from minids.mla import reference

SIZES = [
    {"B": 1, "T": 16, "H": 8, "P": 24, "V": 40, "C": 32},
    {"B": 3, "T": 5, "H": 2, "P": 6, "V": 10, "C": 7},
    {"B": 2, "T": 4, "H": 4, "P": 9, "V": 9, "C": 9},  # T = H and P = V = C: mixing them up raises nothing here
    {"B": 1, "T": 1, "H": 3, "P": 10, "V": 4, "C": 21},
]


def paper_order(kv_b, rows, first):
    """Rows `first` on of the H heads, as if kv_b stacked the paper's two matrices: all keys' rows, then all values'."""
    H, _, C = kv_b.shape
    return kv_b.flatten(0, 1)[first : first + H * rows].view(H, rows, C)


# 04.1 ----------------------------------------------------------------------------------------------------------------

ABSORB_QUERY = Exercise(
    "04.1",
    reference.absorb_query,
    minutes=5,
    sizes=SIZES,
    gradients=True,
    hints=[
        "The first P rows of each head in kv_b are W_UK; P is the width of q_nope. Which letter must be summed away?",
        "w_uk = kv_b[:, :P] is [H,P,C]. A query [B,T,H,P] meets the matrix of its OWN head, and P is summed: in an "
        'einsum, h stands in both inputs and in the result, p in both inputs only: "bthp,hpc->…".',
    ],
)


@ABSORB_QUERY.inputs
def _(r, B, T, H, P, V, C):
    return r.normal(B, T, H, P), r.normal(H, P + V, C) * C**-0.5


def w_uk(q_nope, kv_b):
    return kv_b[:, : q_nope.shape[-1]]


@ABSORB_QUERY.wrong(
    "You take W_UV: of each head's rows in kv_b, the first P make its keys (W_UK), the other V its values."
)
def value_rows(q_nope, kv_b):
    return torch.einsum("bthp,hpc->bthc", q_nope, kv_b[:, q_nope.shape[-1] :])


@ABSORB_QUERY.wrong(
    "The matrix is the wrong way round, which works only where P = C (and is wrong there too): W_UK [P,C] makes keys of "
    "latents, so the query meets its P side: sum over P."
)
def transposed(q_nope, kv_b):
    return torch.einsum("bthp,hcp->bthc", q_nope, w_uk(q_nope, kv_b))


@ABSORB_QUERY.wrong(
    "Every query meets the SUM of all heads' matrices: h must be the same letter in both inputs of the einsum, and stay in the result."
)
def heads_mixed(q_nope, kv_b):
    return torch.einsum("bthp,gpc->bthc", q_nope, w_uk(q_nope, kv_b))


@ABSORB_QUERY.wrong("The heads are summed: each head keeps a query of its own, so h stays in the result, [B,T,H,C].")
def heads_summed(q_nope, kv_b):
    return torch.einsum("bthp,hpc->btc", q_nope, w_uk(q_nope, kv_b))


@ABSORB_QUERY.wrong("All heads use the matrix of head 0: kv_b has one for each head, kv_b[h].")
def first_head_for_all(q_nope, kv_b):
    return torch.einsum("bthp,pc->bthc", q_nope, w_uk(q_nope, kv_b)[0])


@ABSORB_QUERY.wrong(
    "You read kv_b as the paper's two matrices stacked, all keys' rows first. Its rows go head by head: P for the keys of head 0, V for its values, then head 1."
)
def stacked(q_nope, kv_b):
    return torch.einsum("bthp,hpc->bthc", q_nope, paper_order(kv_b, q_nope.shape[-1], 0))


@ABSORB_QUERY.wrong(
    "You multiply by all P+V rows of kv_b: the first P of each head are W_UK, kv_b[:, :P]; the others make values."
)
def all_key_rows(q_nope, kv_b):
    return torch.einsum("bthp,hpc->bthc", q_nope, kv_b)


@ABSORB_QUERY.wrong("You take the LAST P rows of each head: the first P make its keys (W_UK), the other V its values.")
def last_rows(q_nope, kv_b):
    return torch.einsum("bthp,hpc->bthc", q_nope, kv_b[:, -q_nope.shape[-1] :])


@ABSORB_QUERY.wrong("You cut kv_b in the middle, which is right only where P = V: P is the width of q_nope.")
def cut_in_the_middle(q_nope, kv_b):
    return torch.einsum("bthp,hpc->bthc", q_nope, kv_b[:, : kv_b.shape[1] // 2])


@ABSORB_QUERY.wrong("The result is [B,H,T,C]: the heads come after the positions here, [B,T,H,C].")
def heads_first(q_nope, kv_b):
    return torch.einsum("bthp,hpc->bhtc", q_nope, w_uk(q_nope, kv_b))


@ABSORB_QUERY.wrong(
    "A view or reshape as [C, P] only relabels the numbers of W_UK: to turn it round, take .mT, or sum over p in the einsum."
)
def relabelled(q_nope, kv_b):
    matrix = w_uk(q_nope, kv_b)
    return torch.einsum("bthp,hcp->bthc", q_nope, matrix.reshape(len(matrix), -1, matrix.shape[1]))


@ABSORB_QUERY.wrong(
    "A view as [H, B·T, P] cuts the numbers in the order of memory, heads and positions mixed: permute(2, 0, 1, 3) first."
)
def heads_by_view(q_nope, kv_b):
    B, T, H, P = q_nope.shape
    return torch.bmm(q_nope.reshape(H, B * T, P), w_uk(q_nope, kv_b)).reshape(B, T, H, -1)


@ABSORB_QUERY.wrong(
    "A plain @ takes the last two dimensions, [H, P], for a matrix, and pairs the POSITIONS with the heads of kv_b: let h "
    "be a letter of an einsum, or transpose(1, 2) before and after."
)
def positions_for_heads(q_nope, kv_b):
    return q_nope @ w_uk(q_nope, kv_b)


@ABSORB_QUERY.wrong("All queries meet the MEAN of the heads' matrices: each head has one of its own, kv_b[h].")
def mean_matrix(q_nope, kv_b):
    return torch.einsum("bthp,pc->bthc", q_nope, w_uk(q_nope, kv_b).mean(0))


@ABSORB_QUERY.wrong(
    "You cut the COLUMNS of kv_b, its last dimension: W_UK is the first P rows of each head, kv_b[:, :P]."
)
def columns_cut(q_nope, kv_b):
    return torch.einsum("bthp,hcp->bthc", q_nope, kv_b[..., : q_nope.shape[-1]])


# 04.2 ----------------------------------------------------------------------------------------------------------------

PROJECT_VALUES = Exercise(
    "04.2",
    reference.project_values,
    minutes=4,
    sizes=SIZES,
    gradients=True,
    hints=[
        "The mirror image of exercise 1: which rows of kv_b are left, and which letter is summed away now?",
        "w_uv = kv_b[:, nope:] is [H,V,C]; C is summed, h stays: a latent [B,T,H,C] becomes a value [B,T,H,V].",
    ],
)


@PROJECT_VALUES.inputs
def _(r, B, T, H, P, V, C):
    return r.normal(B, T, H, C), r.normal(H, P + V, C) * C**-0.5, P


@PROJECT_VALUES.wrong(
    "You take W_UK: of each head's rows in kv_b, the first `nope` make its keys, and the OTHERS its values, kv_b[:, nope:]."
)
def key_rows(latent, kv_b, nope):
    return torch.einsum("bthc,hvc->bthv", latent, kv_b[:, :nope])


@PROJECT_VALUES.wrong(
    "You take all rows of kv_b, those of the keys too: nope is not used. The values begin at row nope."
)
def all_rows(latent, kv_b, nope):
    return torch.einsum("bthc,hvc->bthv", latent, kv_b)


@PROJECT_VALUES.wrong("You cut kv_b in the middle, which is right only where P = V: the values begin at row nope.")
def cut_values_in_the_middle(latent, kv_b, nope):
    return torch.einsum("bthc,hvc->bthv", latent, kv_b[:, kv_b.shape[1] // 2 :])


@PROJECT_VALUES.wrong(
    "You take the mean over the heads: each head gives a value of its own, and o_proj behind it mixes them."
)
def mean_of_heads(latent, kv_b, nope):
    return torch.einsum("bthc,hvc->bthv", latent, kv_b[:, nope:]).mean(2)


@PROJECT_VALUES.wrong(
    "The heads are summed: each head gives a value of its own, so h stays in the result, [B,T,H,V]; o_proj behind it mixes them."
)
def sum_of_heads(latent, kv_b, nope):
    return torch.einsum("bthc,hvc->btv", latent, kv_b[:, nope:])


@PROJECT_VALUES.wrong(
    "Every head is projected by the SUM of all heads' matrices: h must be the same letter in both inputs of the einsum."
)
def value_heads_mixed(latent, kv_b, nope):
    return torch.einsum("bthc,gvc->bthv", latent, kv_b[:, nope:])


@PROJECT_VALUES.wrong("All heads use the matrix of head 0: kv_b has one for each head, kv_b[h].")
def first_values_for_all(latent, kv_b, nope):
    return torch.einsum("bthc,vc->bthv", latent, kv_b[0, nope:])


@PROJECT_VALUES.wrong(
    "The matrix is the wrong way round, which works only where V = C (and is wrong there too): W_UV [V,C] has the latent on its C side, so C is summed."
)
def values_transposed(latent, kv_b, nope):
    return torch.einsum("bthc,hcv->bthv", latent, kv_b[:, nope:])


@PROJECT_VALUES.wrong(
    "You read kv_b as the paper's two matrices stacked, all values' rows last. Its rows go head by head: `nope` for the keys of head 0, V for its values, then head 1."
)
def values_stacked(latent, kv_b, nope):
    H, rows = kv_b.shape[:2]
    return torch.einsum("bthc,hvc->bthv", latent, paper_order(kv_b, rows - nope, H * nope))


@PROJECT_VALUES.wrong("The result is [B,H,T,V]: the heads come after the positions here, [B,T,H,V].")
def values_heads_first(latent, kv_b, nope):
    return torch.einsum("bthc,hvc->bhtv", latent, kv_b[:, nope:])


@PROJECT_VALUES.wrong("The heads are laid side by side, [B,T,H·V]: that comes later, before o_proj; here [B,T,H,V].")
def flattened(latent, kv_b, nope):
    return torch.einsum("bthc,hvc->bthv", latent, kv_b[:, nope:]).flatten(-2)


@PROJECT_VALUES.wrong(
    "A view or reshape as [C, V] only relabels the numbers of W_UV: to turn it round, take .mT, or sum over c in the einsum."
)
def values_relabelled(latent, kv_b, nope):
    matrix = kv_b[:, nope:]
    return torch.einsum("bthc,hcv->bthv", latent, matrix.reshape(len(matrix), -1, matrix.shape[1]))


@PROJECT_VALUES.wrong(
    "A view as [H, B·T, C] cuts the numbers in the order of memory, heads and positions mixed: permute(2, 0, 1, 3) first."
)
def values_heads_by_view(latent, kv_b, nope):
    B, T, H, C = latent.shape
    return torch.bmm(latent.reshape(H, B * T, C), kv_b[:, nope:].mT).reshape(B, T, H, -1)


@PROJECT_VALUES.wrong(
    "You take the LAST `nope` rows of each head: the values are all rows from `nope` on, kv_b[:, nope:]."
)
def last_nope_rows(latent, kv_b, nope):
    return torch.einsum("bthc,hvc->bthv", latent, kv_b[:, -nope:])


@PROJECT_VALUES.wrong("You take `nope` rows for the values too: they are all the rest, V of them, kv_b[:, nope:].")
def as_many_as_keys(latent, kv_b, nope):
    return torch.einsum("bthc,hvc->bthv", latent, kv_b[:, nope : 2 * nope])


@PROJECT_VALUES.wrong(
    "Each latent is projected by the matrices of ALL heads: head h's latent meets head h's matrix alone."
)
def all_on_all(latent, kv_b, nope):
    return torch.einsum("bthc,gvc->bthgv", latent, kv_b[:, nope:]).flatten(-2)


@PROJECT_VALUES.wrong("The latents go through a softmax: they are sums of cached latents already, only project them.")
def softmax_of_latents(latent, kv_b, nope):
    return torch.einsum("bthc,hvc->bthv", latent.softmax(-1), kv_b[:, nope:])


# 04.3 ----------------------------------------------------------------------------------------------------------------

ATTEND_ABSORBED = Exercise(
    "04.3",
    reference.attend_absorbed,
    minutes=12,
    sizes=[
        {"B": 1, "T": 8, "S": 24, "H": 16, "P": 48, "R": 32, "V": 40, "C": 56},
        {"B": 3, "T": 5, "S": 11, "H": 2, "P": 6, "R": 4, "V": 9, "C": 7},
        {"B": 2, "T": 7, "S": 7, "H": 7, "P": 10, "R": 10, "V": 10, "C": 10},  # one width, T = S = H
        {"B": 1, "T": 1, "S": 13, "H": 3, "P": 10, "R": 6, "V": 4, "C": 21},  # decode
        {"B": 3, "T": 9, "S": 9, "H": 2, "P": 5, "R": 6, "V": 3, "C": 12},  # prefill
    ],
    gradients=True,
    hints=[
        "Lesson 01's attention, with other parts: the query is exercise 1's, the one key of all heads is the cached row, "
        "the value is its latent, and exercise 2 turns the sum into values. RoPE's part of the scores is added.",
        'scores = einsum("bthc,bsc->bhts", q_latent, c_kv) + einsum("bthr,bsr->bhts", q_rope, k_rope), times scale. '
        "Query t of T stands at position S - T + t: torch.ones(T, S).tril(S - T) is 1 where it may look. Softmax over "
        "the last dimension; the weights sum c_kv; exercise 2 projects the sum.",
    ],
)


@ATTEND_ABSORBED.inputs
def _(r, B, T, S, H, P, R, V, C):
    queries = r.normal(B, T, H, P), r.normal(B, T, H, R)
    cached = r.normal(B, S, C), r.normal(B, S, R)
    return *queries, *cached, r.normal(H, P + V, C) * C**-0.5, 1.3 * (P + R) ** -0.5


def latent_scores(q_nope, c_kv, kv_b):
    return torch.einsum("bthc,bsc->bhts", reference.absorb_query(q_nope, kv_b), c_kv)


def rope_scores(q_rope, k_rope):
    return torch.einsum("bthr,bsr->bhts", q_rope, k_rope)


def all_scores(q_nope, q_rope, c_kv, k_rope, kv_b):
    return latent_scores(q_nope, c_kv, kv_b) + rope_scores(q_rope, k_rope)


def causal(scores, after=None, hidden=float("-inf"), dim=-1):
    """Softmax of scores [B,H,T,S] with all hidden that lies `after` positions right of the diagonal (None: S - T)."""
    T, S = scores.shape[-2:]
    seen = torch.ones(T, S, dtype=torch.bool).tril(S - T if after is None else after)
    return scores.masked_fill(~seen, hidden).softmax(dim)


def finish(weights, c_kv, q_nope, kv_b):
    """The weighted sums of latents as values."""
    return reference.project_values(torch.einsum("bhts,bsc->bthc", weights, c_kv), kv_b, q_nope.shape[-1])


@ATTEND_ABSORBED.wrong(
    "You scale by (C+R)^-0.5, the width of what is multiplied now. The scores are the SAME numbers as in the expanded form, so their scale is too: use the argument."
)
def scaled_by_the_latent(q_nope, q_rope, c_kv, k_rope, kv_b, scale):
    scale = (c_kv.shape[-1] + k_rope.shape[-1]) ** -0.5
    return finish(causal(all_scores(q_nope, q_rope, c_kv, k_rope, kv_b) * scale), c_kv, q_nope, kv_b)


@ATTEND_ABSORBED.wrong(
    "You compute the scale anew as (P+R)^-0.5 and forget the argument: with YaRN it is another number, so take it as given."
)
def scale_of_its_own(q_nope, q_rope, c_kv, k_rope, kv_b, scale):
    scale = (q_nope.shape[-1] + q_rope.shape[-1]) ** -0.5
    return finish(causal(all_scores(q_nope, q_rope, c_kv, k_rope, kv_b) * scale), c_kv, q_nope, kv_b)


@ATTEND_ABSORBED.wrong("The scale is forgotten: multiply the scores by it before the softmax.")
def no_scale(q_nope, q_rope, c_kv, k_rope, kv_b, scale):
    return finish(causal(all_scores(q_nope, q_rope, c_kv, k_rope, kv_b)), c_kv, q_nope, kv_b)


@ATTEND_ABSORBED.wrong("Only the latent's part of the scores is scaled: add RoPE's part first, then scale the sum.")
def half_scaled(q_nope, q_rope, c_kv, k_rope, kv_b, scale):
    scores = latent_scores(q_nope, c_kv, kv_b) * scale + rope_scores(q_rope, k_rope)
    return finish(causal(scores), c_kv, q_nope, kv_b)


@ATTEND_ABSORBED.wrong(
    "RoPE's part of the scores is forgotten: q_rope · k_rope is added to them, or no position knows where it stands."
)
def no_rope(q_nope, q_rope, c_kv, k_rope, kv_b, scale):
    return finish(causal(latent_scores(q_nope, c_kv, kv_b) * scale), c_kv, q_nope, kv_b)


@ATTEND_ABSORBED.wrong("Only RoPE's part of the scores is there: the absorbed queries times the latents are missing.")
def only_rope(q_nope, q_rope, c_kv, k_rope, kv_b, scale):
    return finish(causal(rope_scores(q_rope, k_rope) * scale), c_kv, q_nope, kv_b)


@ATTEND_ABSORBED.wrong(
    "There is no causal mask: query t of T stands at position S - T + t, and may see nothing after it."
)
def no_mask(q_nope, q_rope, c_kv, k_rope, kv_b, scale):
    return finish((all_scores(q_nope, q_rope, c_kv, k_rope, kv_b) * scale).softmax(-1), c_kv, q_nope, kv_b)


@ATTEND_ABSORBED.wrong(
    "The mask forgets what is cached: the T queries are the LAST of the S positions, so query 0 sees S - T + 1 of them: tril(S - T)."
)
def mask_from_zero(q_nope, q_rope, c_kv, k_rope, kv_b, scale):
    return finish(causal(all_scores(q_nope, q_rope, c_kv, k_rope, kv_b) * scale, after=0), c_kv, q_nope, kv_b)


@ATTEND_ABSORBED.wrong("The mask is off by one: each position sees the NEXT one too: tril(S - T), without the + 1.")
def sees_the_next(q_nope, q_rope, c_kv, k_rope, kv_b, scale):
    T, S = q_nope.shape[1], c_kv.shape[1]
    scores = all_scores(q_nope, q_rope, c_kv, k_rope, kv_b) * scale
    return finish(causal(scores, after=S - T + 1), c_kv, q_nope, kv_b)


@ATTEND_ABSORBED.wrong("The hidden scores are set to 0, which is a score like any other (e^0 = 1): they must be -inf.")
def masked_with_zero(q_nope, q_rope, c_kv, k_rope, kv_b, scale):
    scores = all_scores(q_nope, q_rope, c_kv, k_rope, kv_b) * scale
    return finish(causal(scores, hidden=0.0), c_kv, q_nope, kv_b)


@ATTEND_ABSORBED.wrong(
    "The softmax runs over the queries: for each query the weights of the POSITIONS must sum to 1 (the last dimension of [B,H,T,S])."
)
def over_queries(q_nope, q_rope, c_kv, k_rope, kv_b, scale):
    scores = all_scores(q_nope, q_rope, c_kv, k_rope, kv_b) * scale
    return finish(causal(scores, dim=-2), c_kv, q_nope, kv_b)


@ATTEND_ABSORBED.wrong(
    "Is the mask inverted? masked_fill overwrites where its mask is True, so give it what is HIDDEN: a query that sees nothing at all comes out as NaN."
)
def mask_inverted(q_nope, q_rope, c_kv, k_rope, kv_b, scale):
    scores = all_scores(q_nope, q_rope, c_kv, k_rope, kv_b) * scale
    seen = torch.ones(scores.shape[-2:], dtype=torch.bool).tril(scores.shape[-1] - scores.shape[-2])
    return finish(scores.masked_fill(seen, float("-inf")).softmax(-1), c_kv, q_nope, kv_b)


@ATTEND_ABSORBED.wrong(
    "The softmax runs over the heads: each head has weights of its own that sum to 1 over the positions (the last dimension of [B,H,T,S])."
)
def over_heads(q_nope, q_rope, c_kv, k_rope, kv_b, scale):
    return finish(
        causal(all_scores(q_nope, q_rope, c_kv, k_rope, kv_b) * scale, hidden=-1e30, dim=1), c_kv, q_nope, kv_b
    )


@ATTEND_ABSORBED.wrong(
    "The cached rope key is among what you sum: the value is the latent c_kv alone, the FIRST C numbers of a cached row."
)
def last_of_the_row(q_nope, q_rope, c_kv, k_rope, kv_b, scale):
    row = torch.cat([c_kv, k_rope], -1)[..., -c_kv.shape[-1] :]
    return finish(causal(all_scores(q_nope, q_rope, c_kv, k_rope, kv_b) * scale), row, q_nope, kv_b)


@ATTEND_ABSORBED.wrong("You sum the rope keys: the weights sum the latents, c_kv; k_rope serves for the scores alone.")
def sums_rope_keys(q_nope, q_rope, c_kv, k_rope, kv_b, scale):
    return finish(causal(all_scores(q_nope, q_rope, c_kv, k_rope, kv_b) * scale), k_rope, q_nope, kv_b)


@ATTEND_ABSORBED.wrong(
    "W_UV comes too early and mixes the heads: one value for all of them is made of each latent. Sum the latents with each head's weights first, then project each head by its own W_UV."
)
def values_too_early(q_nope, q_rope, c_kv, k_rope, kv_b, scale):
    v = torch.einsum("bsc,hvc->bsv", c_kv, kv_b[:, q_nope.shape[-1] :])
    return torch.einsum("bhts,bsv->bthv", causal(all_scores(q_nope, q_rope, c_kv, k_rope, kv_b) * scale), v)


@ATTEND_ABSORBED.wrong("W_UV is missing at the end: the sum of latents [B,T,H,C] must become values [B,T,H,V].")
def not_projected(q_nope, q_rope, c_kv, k_rope, kv_b, scale):
    weights = causal(all_scores(q_nope, q_rope, c_kv, k_rope, kv_b) * scale)
    return torch.einsum("bhts,bsc->bthc", weights, c_kv)


@ATTEND_ABSORBED.wrong(
    "The queries are not absorbed: q_nope [P] meets the latent [C] as it is, which works only where P = C (and is wrong there too)."
)
def not_absorbed(q_nope, q_rope, c_kv, k_rope, kv_b, scale):
    scores = torch.einsum("bthc,bsc->bhts", q_nope, c_kv) + rope_scores(q_rope, k_rope)
    return finish(causal(scores * scale), c_kv, q_nope, kv_b)


@ATTEND_ABSORBED.wrong(
    "The sum is projected by W_UK, the first P rows of each head: values come from the rows after them."
)
def projected_by_w_uk(q_nope, q_rope, c_kv, k_rope, kv_b, scale):
    weights = causal(all_scores(q_nope, q_rope, c_kv, k_rope, kv_b) * scale)
    latent = torch.einsum("bhts,bsc->bthc", weights, c_kv)
    return torch.einsum("bthc,hpc->bthp", latent, w_uk(q_nope, kv_b))


@ATTEND_ABSORBED.wrong("A query does not see its OWN position: the mask is off by one, tril(S - T), without the - 1.")
def sees_not_itself(q_nope, q_rope, c_kv, k_rope, kv_b, scale):
    T, S = q_nope.shape[1], c_kv.shape[1]
    scores = all_scores(q_nope, q_rope, c_kv, k_rope, kv_b) * scale
    return finish(causal(scores, after=S - T - 1), c_kv, q_nope, kv_b)


@ATTEND_ABSORBED.wrong(
    "The mask comes after the softmax: the weights that are left no longer sum to 1. Hide the scores, before it."
)
def masked_too_late(q_nope, q_rope, c_kv, k_rope, kv_b, scale):
    weights = (all_scores(q_nope, q_rope, c_kv, k_rope, kv_b) * scale).softmax(-1)
    return finish(weights.tril(weights.shape[-1] - weights.shape[-2]), c_kv, q_nope, kv_b)


@ATTEND_ABSORBED.wrong(
    "Everything is NaN. Is the mask multiplied by -inf? Where it is 0 that is 0 times infinity, NaN: overwrite the hidden "
    "scores instead, masked_fill. (Memory from torch.empty is NaN here, too.)"
)
def zero_times_infinity(q_nope, q_rope, c_kv, k_rope, kv_b, scale):
    scores = all_scores(q_nope, q_rope, c_kv, k_rope, kv_b) * scale
    hidden = torch.ones_like(scores).triu(scores.shape[-1] - scores.shape[-2] + 1)
    return finish((scores + hidden * -float("inf")).softmax(-1), c_kv, q_nope, kv_b)


@ATTEND_ABSORBED.wrong(
    "The mask is added as ones and zeros: that hides nothing. Give scaled_dot_product_attention a BOOLEAN mask, or add -inf."
)
def mask_added(q_nope, q_rope, c_kv, k_rope, kv_b, scale):
    scores = all_scores(q_nope, q_rope, c_kv, k_rope, kv_b) * scale
    return finish(
        (scores + torch.ones_like(scores).tril(scores.shape[-1] - scores.shape[-2])).softmax(-1), c_kv, q_nope, kv_b
    )


@ATTEND_ABSORBED.wrong("You divide by the scale: it is a factor, (P+R)^-0.5 and the like. Multiply by it.")
def divided_by_the_scale(q_nope, q_rope, c_kv, k_rope, kv_b, scale):
    return finish(causal(all_scores(q_nope, q_rope, c_kv, k_rope, kv_b) / scale), c_kv, q_nope, kv_b)


@ATTEND_ABSORBED.wrong("The scores are scaled twice, once with the queries perhaps: once is enough.")
def scaled_twice(q_nope, q_rope, c_kv, k_rope, kv_b, scale):
    return finish(causal(all_scores(q_nope, q_rope, c_kv, k_rope, kv_b) * scale**2), c_kv, q_nope, kv_b)


@ATTEND_ABSORBED.wrong("You scale by the latent's width, C^-0.5: the scale is an argument, for keys of P+R numbers.")
def scaled_by_c(q_nope, q_rope, c_kv, k_rope, kv_b, scale):
    scores = all_scores(q_nope, q_rope, c_kv, k_rope, kv_b) * c_kv.shape[-1] ** -0.5
    return finish(causal(scores), c_kv, q_nope, kv_b)


@ATTEND_ABSORBED.wrong("You scale by the nope width alone, P^-0.5: the scale is an argument, for keys of P+R numbers.")
def scaled_by_p(q_nope, q_rope, c_kv, k_rope, kv_b, scale):
    scores = all_scores(q_nope, q_rope, c_kv, k_rope, kv_b) * q_nope.shape[-1] ** -0.5
    return finish(causal(scores), c_kv, q_nope, kv_b)


@ATTEND_ABSORBED.wrong("There is no softmax: the scores become weights, positive and with the sum 1, by it.")
def no_softmax(q_nope, q_rope, c_kv, k_rope, kv_b, scale):
    scores = all_scores(q_nope, q_rope, c_kv, k_rope, kv_b) * scale
    return finish(scores.tril(scores.shape[-1] - scores.shape[-2]), c_kv, q_nope, kv_b)


@ATTEND_ABSORBED.wrong(
    "Each score has a softmax of its own: a query has ONE set of weights. Add the scores, then take the softmax once."
)
def two_softmaxes(q_nope, q_rope, c_kv, k_rope, kv_b, scale):
    both = latent_scores(q_nope, c_kv, kv_b), rope_scores(q_rope, k_rope)
    return finish(sum(causal(scores * scale) for scores in both), c_kv, q_nope, kv_b)


@ATTEND_ABSORBED.wrong(
    "Query and cached row are put together in different orders: if one is [latent, rope], the other must be too."
)
def orders_differ(q_nope, q_rope, c_kv, k_rope, kv_b, scale):
    query = torch.cat([reference.absorb_query(q_nope, kv_b), q_rope], -1)
    scores = torch.einsum("bthw,bsw->bhts", query, torch.cat([k_rope, c_kv], -1)) * scale
    return finish(causal(scores), c_kv, q_nope, kv_b)


@ATTEND_ABSORBED.wrong(
    "You read kv_b as the paper's two matrices stacked, all keys' rows first: its rows go head by head, P and then V."
)
def stacked_in_attention(q_nope, q_rope, c_kv, k_rope, kv_b, scale):
    (H, rows, _), P = kv_b.shape, q_nope.shape[-1]
    kv_b = torch.cat([paper_order(kv_b, P, 0), paper_order(kv_b, rows - P, H * P)], 1)
    return reference.attend_absorbed(q_nope, q_rope, c_kv, k_rope, kv_b, scale)


@ATTEND_ABSORBED.wrong("Only the last query is attended for: T of them are given, so the result is [B,T,H,V].")
def last_query_alone(q_nope, q_rope, c_kv, k_rope, kv_b, scale):
    return reference.attend_absorbed(q_nope[:, -1:], q_rope[:, -1:], c_kv, k_rope, kv_b, scale)


# 04.4 ----------------------------------------------------------------------------------------------------------------

DECODE_FLOPS = Exercise(
    "04.4",
    reference.decode_flops,
    minutes=8,
    sizes=[
        {"form": "expanded", "H": 8, "C": 64, "R": 16, "P": 40, "V": 24, "T": 16, "S": 128},
        {"form": "absorbed", "H": 3, "C": 20, "R": 6, "P": 11, "V": 9, "T": 5, "S": 33},
        {"form": "absorbed", "H": 128, "C": 512, "R": 64, "P": 128, "V": 128, "T": 8, "S": 4096},
        {"form": "expanded", "H": 5, "C": 21, "R": 4, "P": 13, "V": 10, "T": 1, "S": 77},
    ],
    hints=[
        "Each form has two parts: what is done once per position or per query with kv_b, and what is done for each pair "
        "of a query and a position. Which part has S alone, which T alone, which both?",
        "A head, in multiply-adds. Expanded: S·C·(P+V) to expand, T·S·(P+R) for scores, T·S·V for sums. Absorbed: "
        "T·C·(P+V) for exercises 1 and 2, T·S·(C+R) for scores, T·S·C for sums. Then H heads, and 2 FLOPs each.",
    ],
)


@DECODE_FLOPS.inputs
def _(r, form, H, C, R, P, V, T, S):
    return form, H, C, R, P, V, T, S


def cost(form, expanded, absorbed):
    return expanded if form == "expanded" else absorbed


def count(form, H, C, R, P, V, T, S, rows=None, columns=None, width=None, pairs=None):
    """The FLOPs with a part replaced: rows that meet kv_b, what it makes of each; width of scores and sums, pairs."""
    rows = cost(form, S, T) if rows is None else rows
    columns = P + V if columns is None else columns
    width = cost(form, P + R + V, C + R + C) if width is None else width
    return 2 * H * (rows * C * columns + (T * S if pairs is None else pairs) * width)


@DECODE_FLOPS.wrong(
    "You expand the cache once for every QUERY: keys and values of a position are the same for all T, so S·C·(P+V) has no T."
)
def expanded_for_each_query(form, H, C, R, P, V, T, S):
    return count(form, H, C, R, P, V, T, S, rows=cost(form, T * S, T))


@DECODE_FLOPS.wrong(
    "You expand the T new positions only: the cache holds latents, not keys, so all S are expanded at every step. That is the whole trouble."
)
def only_new_expanded(form, H, C, R, P, V, T, S):
    return count(form, H, C, R, P, V, T, S, rows=T)


@DECODE_FLOPS.wrong("Expanding is forgotten: keys and values must be made of the S latents, S·C·(P+V) for a head.")
def nothing_expanded(form, H, C, R, P, V, T, S):
    return count(form, H, C, R, P, V, T, S, rows=cost(form, 0, T))


@DECODE_FLOPS.wrong("That is one head: all H of them are computed.")
def one_head(form, H, C, R, P, V, T, S):
    return reference.decode_flops(form, 1, C, R, P, V, T, S)


@DECODE_FLOPS.wrong("You count multiply-adds: each is two FLOPs, one multiplication and one addition.")
def multiply_adds(form, H, C, R, P, V, T, S):
    return reference.decode_flops(form, H, C, R, P, V, T, S) // 2


@DECODE_FLOPS.wrong(
    "The absorbed form's price is forgotten: its scores are over C+R numbers and its sums over C, not over P+R and V."
)
def narrow_absorbed(form, H, C, R, P, V, T, S):
    return count(form, H, C, R, P, V, T, S, width=P + R + V)


@DECODE_FLOPS.wrong(
    "The absorbed scores are over C+R numbers: the latent's C and the rope key's R, added. You count C alone."
)
def absorbed_without_rope(form, H, C, R, P, V, T, S):
    return count(form, H, C, R, P, V, T, S, width=cost(form, P + R + V, 2 * C))


@DECODE_FLOPS.wrong(
    "The absorbed form sums latents, C numbers for each query and position; V numbers are what the projection makes at the end."
)
def absorbed_sums_values(form, H, C, R, P, V, T, S):
    return count(form, H, C, R, P, V, T, S, width=cost(form, P + R + V, C + R + V))


@DECODE_FLOPS.wrong(
    "Exercises 1 and 2 are not free: W_UK on each query and W_UV on each sum are T·C·(P+V) multiply-adds a head."
)
def absorbing_is_free(form, H, C, R, P, V, T, S):
    return count(form, H, C, R, P, V, T, S, rows=cost(form, S, 0))


@DECODE_FLOPS.wrong(
    "Only the query is absorbed in your count: W_UV on each sum is T·C·V more; likewise expanding makes values too."
)
def keys_only(form, H, C, R, P, V, T, S):
    return count(form, H, C, R, P, V, T, S, columns=P)


@DECODE_FLOPS.wrong("Expanding makes values too: kv_b makes P + V numbers of each position, and you count P.")
def expanded_keys_alone(form, H, C, R, P, V, T, S):
    return count(form, H, C, R, P, V, T, S, columns=cost(form, P, P + V))


@DECODE_FLOPS.wrong("Exercise 2 is missing in the absorbed form: W_UV on each sum of latents is T·C·V more.")
def absorbed_query_alone(form, H, C, R, P, V, T, S):
    return count(form, H, C, R, P, V, T, S, columns=cost(form, P + V, P))


@DECODE_FLOPS.wrong("The expanded scores are over P+R numbers, RoPE's columns too: you count P alone.")
def expanded_without_rope(form, H, C, R, P, V, T, S):
    return count(form, H, C, R, P, V, T, S, width=cost(form, P + V, C + R + C))


@DECODE_FLOPS.wrong("The expanded form sums values after its scores: V numbers more for each query and position.")
def expanded_scores_only(form, H, C, R, P, V, T, S):
    return count(form, H, C, R, P, V, T, S, width=cost(form, P + R, C + R + C))


@DECODE_FLOPS.wrong("The absorbed form sums latents after its scores: C numbers more for each query and position.")
def absorbed_scores_only(form, H, C, R, P, V, T, S):
    return count(form, H, C, R, P, V, T, S, width=cost(form, P + R + V, C + R))


@DECODE_FLOPS.wrong("RoPE's part of the scores is forgotten: they are over P+R numbers in one form, C+R in the other.")
def rope_forgotten(form, H, C, R, P, V, T, S):
    return reference.decode_flops(form, H, C, 0, P, V, T, S)


@DECODE_FLOPS.wrong(
    "The sums have RoPE's columns in them: scores are over C+R numbers, but only C of them are summed, so 2C+R together."
)
def rope_twice(form, H, C, R, P, V, T, S):
    return count(form, H, C, R, P, V, T, S, width=cost(form, P + R + V, 2 * (C + R)))


@DECODE_FLOPS.wrong("The sum over positions is forgotten: scores are half of attention, V (or C) numbers come after.")
def scores_only(form, H, C, R, P, V, T, S):
    return count(form, H, C, R, P, V, T, S, width=cost(form, P + R, C + R))


@DECODE_FLOPS.wrong("The two forms are exchanged: the expanded one has S·C·(P+V), the absorbed one T·C·(P+V).")
def exchanged(form, H, C, R, P, V, T, S):
    return reference.decode_flops("absorbed" if form == "expanded" else "expanded", H, C, R, P, V, T, S)


@DECODE_FLOPS.wrong("The argument form is not used: you count the expanded form always.")
def always_expanded(form, H, C, R, P, V, T, S):
    return reference.decode_flops("expanded", H, C, R, P, V, T, S)


@DECODE_FLOPS.wrong("The argument form is not used: you count the absorbed form always.")
def always_absorbed(form, H, C, R, P, V, T, S):
    return reference.decode_flops("absorbed", H, C, R, P, V, T, S)


@DECODE_FLOPS.wrong(
    "You leave out the scores that the mask hides: a plain product computes them all, T·S pairs, and the text counts them."
)
def seen_pairs_alone(form, H, C, R, P, V, T, S):
    return count(form, H, C, R, P, V, T, S, pairs=T * S - T * (T - 1) // 2)


@DECODE_FLOPS.wrong("S counts the new tokens already: the T queries are among the S positions, so do not add T to S.")
def new_ones_added(form, H, C, R, P, V, T, S):
    return reference.decode_flops(form, H, C, R, P, V, T, S + T)


@DECODE_FLOPS.wrong("The queries look at T positions in your count: at all S, the cached ones too, so T·S pairs.")
def new_positions_alone(form, H, C, R, P, V, T, S):
    return count(form, H, C, R, P, V, T, S, pairs=T * T)


@DECODE_FLOPS.wrong(
    "Absorbing is done for the T queries, once each: T·C·(P+V). With S you count the absorbed form as if it expanded too."
)
def absorbed_for_positions(form, H, C, R, P, V, T, S):
    return count(form, H, C, R, P, V, T, S, rows=S)


@DECODE_FLOPS.wrong("The rope columns are not made by kv_b: it has P+V rows a head, without R.")
def rope_expanded(form, H, C, R, P, V, T, S):
    return count(form, H, C, R, P, V, T, S, columns=P + R + V)


@DECODE_FLOPS.wrong("kv_b has rows for every head: its products count H times too, as scores and sums do.")
def kv_b_of_one_head(form, H, C, R, P, V, T, S):
    return count(form, H, C, R, P, V, T, S, rows=0) + 2 * cost(form, S, T) * C * (P + V)


@DECODE_FLOPS.wrong(
    "All heads SHARE what they read in the absorbed form, but each computes its own scores and sums: H counts there too."
)
def shared_by_heads(form, H, C, R, P, V, T, S):
    absorbed = 2 * H * T * C * (P + V) + 2 * T * S * (2 * C + R)
    return cost(form, reference.decode_flops(form, H, C, R, P, V, T, S), absorbed)


@DECODE_FLOPS.wrong("P and V are multiplied: keys have P rows of kv_b and values V, which together is P + V.")
def rows_multiplied(form, H, C, R, P, V, T, S):
    return count(form, H, C, R, P, V, T, S, columns=P * V)


@DECODE_FLOPS.wrong("The factor 2·H stands before the first term alone: put all terms in parentheses.")
def parentheses_missing(form, H, C, R, P, V, T, S):
    return 2 * H * cost(form, S, T) * C * (P + V) + T * S * cost(form, P + R + V, 2 * C + R)


@DECODE_FLOPS.wrong(
    "Scores and sums are counted as one FLOP each: they are multiply-adds too, two FLOPs for each number."
)
def two_in_one_part(form, H, C, R, P, V, T, S):
    return H * (2 * cost(form, S, T) * C * (P + V) + T * S * cost(form, P + R + V, 2 * C + R))


@DECODE_FLOPS.wrong(
    'Nothing comes back: is there a `return`, and is form compared with its two values, "expanded" and "absorbed"?'
)
def another_name(form, H, C, R, P, V, T, S):
    return reference.decode_flops(form, H, C, R, P, V, T, S) if form in ("naive", "absorb") else None


# 04.5 ----------------------------------------------------------------------------------------------------------------

CROSSOVER = Exercise(
    "04.5",
    reference.crossover,
    minutes=6,
    sizes=[
        {"C": 64, "P": 40, "V": 24, "S": 128},
        {"C": 20, "P": 11, "V": 9, "S": 33},
        {"C": 512, "P": 128, "V": 128, "S": 4096},
        {"C": 21, "P": 13, "V": 10, "S": 7},
    ],
    hints=[
        "Write both counts of exercise 4 for one head and set them equal. T·S·R stands on both sides. Then bring all "
        "terms with T to one side.",
        "S·C·(P+V) = T·C·(P+V) + T·S·(2C−P−V): expanding on the left, absorbing and its wider attention on the right. Solve for T.",
    ],
)


@CROSSOVER.inputs
def _(r, C, P, V, S):
    return C, P, V, S


@CROSSOVER.wrong(
    "The absorbed form's wider attention is forgotten: for each query and position it costs 2C - P - V more, so T is smaller than S."
)
def no_extra(C, P, V, S):
    return S * C * (P + V) / (C * (P + V))


@CROSSOVER.wrong(
    "Absorbing itself is forgotten: its T·C·(P+V) stands on T's side too. Your number is what T comes near to for a very long S."
)
def in_the_limit(C, P, V, S):
    return S * C * (P + V) / (S * (2 * C - P - V))


@CROSSOVER.wrong(
    "The expanded form's own attention is forgotten: it has P+V numbers for each query and position, so the absorbed one has 2C - P - V MORE, not 2C."
)
def extra_of_2c(C, P, V, S):
    return S * C * (P + V) / (C * (P + V) + S * 2 * C)


@CROSSOVER.wrong(
    "The latent is used twice, for the scores and for the sum: the extra width is 2C - P - V, not C - P - V."
)
def latent_once(C, P, V, S):
    return S * C * (P + V) / (C * (P + V) + S * (C - P - V))


@CROSSOVER.wrong(
    "A sign is turned round: the absorbed attention is WIDER (2C > P+V), so its extra is added to T's side of the equation."
)
def turned_round(C, P, V, S):
    return S * C * (P + V) / (C * (P + V) - S * (2 * C - P - V))


@CROSSOVER.wrong("Upside down: you give 1/T. What stands with T goes below the line, S·C·(P+V) above.")
def upside_down(C, P, V, S):
    return 1 / reference.crossover(C, P, V, S)


@CROSSOVER.wrong("The number is cut to a whole one: give it as it is; the cells below round it where they need to.")
def rounded_down(C, P, V, S):
    return int(reference.crossover(C, P, V, S))


@CROSSOVER.wrong("That is the share of the positions, T/S: multiply it by S.")
def share(C, P, V, S):
    return reference.crossover(C, P, V, S) / S


@CROSSOVER.wrong("Only the keys are expanded in your equation: kv_b makes V numbers for the values too, so C·(P+V).")
def only_keys(C, P, V, S):
    return S * C * P / (C * P + S * (2 * C - P - V))


@CROSSOVER.wrong(
    "Parentheses are missing below the line: a / b * c divides by b alone, and a / b + c adds c behind. Write a / (b + c)."
)
def without_parentheses(C, P, V, S):
    return S * C * (P + V) / C * (P + V) + S * (2 * C - P - V)


@CROSSOVER.wrong(
    "Parentheses are missing below the line: what stands behind the + is added to the quotient. a / (b + c)."
)
def half_of_the_parentheses(C, P, V, S):
    return S * C * (P + V) / (C * (P + V)) + S * (2 * C - P - V)


@CROSSOVER.wrong("A sign is lost: the extra width is 2C - (P + V), so 2C - P - V and not 2C - P + V.")
def sign_of_v(C, P, V, S):
    return S * C * (P + V) / (C * (P + V) + S * (2 * C - P + V))


@CROSSOVER.wrong(
    "Only the scores are wider in your equation: the sums are too, C numbers instead of V, so the extra is 2C - P - V."
)
def scores_alone(C, P, V, S):
    return S * C * (P + V) / (C * (P + V) + S * (C - P))


@CROSSOVER.wrong("That is the cost of expanding, not T: divide by what stands with T on the other side.")
def not_divided(C, P, V, S):
    return S * C * (P + V)

"""Lesson 07: mixture of experts: what is counted, groups, the router with its bias, and the whole layer."""

import torch
import torch.nn.functional as F

from minids import accounting
from minids.config import ModelConfig
from minids.lab.exercise import Exercise
from minids.layers import swiglu
from minids.moe import reference

# 07.1 ------------------------------------------------------------------------------------------------------------

MOE_PARAMETERS = Exercise(
    "07.1",
    accounting.moe_parameters,
    minutes=6,
    sizes=[
        {"D": 64, "F": 32, "E": 16, "S": 8, "A": 8},
        {"D": 36, "F": 10, "E": 12, "S": 2, "A": 3},
        {"D": 7168, "F": 2048, "E": 256, "S": 1, "A": 8},
        {"D": 20, "F": 7, "E": 5, "S": 0, "A": 1},
    ],
    hints=[
        "How many matrices does one SwiGLU have, and of which size? Which experts does every token visit, which does it "
        "choose, and what must be there for it to choose?",
        "An expert is 3·D·F. Router, bias and shared experts belong to both numbers, E·D + E + S·3·D·F; to the total come "
        "E experts, to the active ones only A.",
    ],
)


@MOE_PARAMETERS.inputs
def _(r, D, F, E, S, A):
    experts = {"n_routed_experts": E, "n_shared_experts": S, "num_experts_per_tok": A, "moe_intermediate_size": F}
    return ModelConfig(hidden_size=D, intermediate_size=5 * F + 1, num_hidden_layers=3, **experts)


def counted(cfg, matrices=3, width=None, router=True, bias=True, shared=None, total=None, active=None):
    """(total, active) with a part of the count replaced."""
    D, E = cfg.hidden_size, cfg.n_routed_experts
    expert = matrices * D * (cfg.moe_intermediate_size if width is None else width)
    shared = cfg.n_shared_experts if shared is None else shared
    always = E * D * router + E * bias + shared * expert
    total, active = E if total is None else total, cfg.num_experts_per_tok if active is None else active
    return always + total * expert, always + active * expert


@MOE_PARAMETERS.wrong("The shared experts are forgotten: every token visits them, so they belong to both numbers.")
def shared_forgotten(cfg):
    return counted(cfg, shared=0)


@MOE_PARAMETERS.wrong(
    "Only A experts are active in your count: a token visits A routed ones and, besides them, all S shared ones."
)
def shared_not_active(cfg):
    return counted(cfg)[0], counted(cfg, shared=0)[1]


@MOE_PARAMETERS.wrong("The number of shared experts is n_shared_experts; you count one of them whatever it says.")
def one_shared(cfg):
    return counted(cfg, shared=1)


@MOE_PARAMETERS.wrong("The router is forgotten: a matrix [E, D] and a bias of E numbers, and every token needs both.")
def router_forgotten(cfg):
    return counted(cfg, router=False, bias=False)


@MOE_PARAMETERS.wrong("The router's matrix [E, D] is forgotten; its bias of E numbers alone makes no scores.")
def matrix_forgotten(cfg):
    return counted(cfg, router=False)


@MOE_PARAMETERS.wrong("The router's bias is forgotten: E numbers, one for each routed expert.")
def bias_forgotten(cfg):
    return counted(cfg, bias=False)


@MOE_PARAMETERS.wrong(
    "The router counts for the total alone: each token is multiplied with all E of its rows, or none could be chosen."
)
def router_not_active(cfg):
    return counted(cfg)[0], counted(cfg, router=False, bias=False)[1]


@MOE_PARAMETERS.wrong("You count two matrices for an expert: a SwiGLU has three, gate, up and down.")
def two_matrices(cfg):
    return counted(cfg, matrices=2)


@MOE_PARAMETERS.wrong("You count one matrix for an expert: a SwiGLU has three, gate, up and down.")
def one_matrix(cfg):
    return counted(cfg, matrices=1)


@MOE_PARAMETERS.wrong(
    "You take intermediate_size, the width of the dense layers: an expert's width is moe_intermediate_size."
)
def dense_width(cfg):
    return counted(cfg, width=cfg.intermediate_size)


@MOE_PARAMETERS.wrong(
    "Both numbers hold all E routed experts: a token visits A = num_experts_per_tok of them, only those are active."
)
def all_active(cfg):
    return counted(cfg, active=cfg.n_routed_experts)


@MOE_PARAMETERS.wrong(
    "The total holds only the A experts that a token visits: all E of them must be there, for other tokens choose others."
)
def total_of_chosen(cfg):
    return counted(cfg, total=cfg.num_experts_per_tok)


@MOE_PARAMETERS.wrong("You return one number, the total: two are wanted, (total, active).")
def total_alone(cfg):
    return counted(cfg)[0]


@MOE_PARAMETERS.wrong("You return one number, the active parameters: two are wanted, (total, active).")
def active_alone(cfg):
    return counted(cfg)[1]


@MOE_PARAMETERS.wrong(
    "Of the router you count only the A rows of the chosen experts as active: a token is compared with all E, or none "
    "could be chosen."
)
def rows_of_the_chosen(cfg):
    total, active = counted(cfg)
    return total, active - (cfg.n_routed_experts - cfg.num_experts_per_tok) * (cfg.hidden_size + 1)


@MOE_PARAMETERS.wrong("The two numbers are swapped: the total comes first, then the active ones.")
def swapped(cfg):
    return counted(cfg)[::-1]


@MOE_PARAMETERS.wrong("That is for all layers of the model: the question is about one of them.")
def all_layers(cfg):
    total, active = counted(cfg)
    return cfg.num_hidden_layers * total, cfg.num_hidden_layers * active


@MOE_PARAMETERS.wrong(
    "You count the numbers that differ, total minus active, for the second: what a token does not visit is not active."
)
def idle(cfg):
    total, active = counted(cfg)
    return total, total - active


@MOE_PARAMETERS.wrong(
    "The bias counts in the total alone: it decides who is chosen, so each token needs it; it is active too."
)
def bias_not_active(cfg):
    return counted(cfg)[0], counted(cfg, bias=False)[1]


@MOE_PARAMETERS.wrong("Your bias has D numbers: it has one for each routed expert, E.")
def bias_of_the_width(cfg):
    total, active = counted(cfg, bias=False)
    return total + cfg.hidden_size, active + cfg.hidden_size


@MOE_PARAMETERS.wrong("Your total counts the shared experts among the E routed ones: they come on top, E + S in all.")
def shared_among_the_routed(cfg):
    return counted(cfg, total=cfg.n_routed_experts - cfg.n_shared_experts)[0], counted(cfg)[1]


@MOE_PARAMETERS.wrong(
    "For the active ones you take the share A / E of everything: only the routed experts are chosen from, router and shared "
    "experts are active as a whole."
)
def share_of_everything(cfg):
    total = counted(cfg)[0]
    return total, total * cfg.num_experts_per_tok // cfg.n_routed_experts


@MOE_PARAMETERS.wrong(
    "Each of the S shared experts gets rows in your router: nobody chooses them, the router has E rows."
)
def router_of_all_experts(cfg):
    total, active = counted(cfg)
    more = cfg.n_shared_experts * (cfg.hidden_size + 1)
    return total + more, active + more


# 07.2 ------------------------------------------------------------------------------------------------------------

GROUP_LIMIT = Exercise(
    "07.2",
    reference.group_limit,
    minutes=10,
    sizes=[
        {"M": 16, "E": 64, "groups": 16, "keep": 8},
        {"M": 7, "E": 15, "groups": 5, "keep": 3},
        {"M": 9, "E": 24, "groups": 3, "keep": 2},
        {"M": 4, "E": 16, "groups": 4, "keep": 2},  # groups as many as their experts, and as tokens
        {"M": 8, "E": 72, "groups": 24, "keep": 8, "signs": "both"},
        {"M": 1, "E": 12, "groups": 4, "keep": 1},
    ],
    hints=[
        "Give the groups an axis of their own: [M, n_group, experts of a group]. What makes one number of each group, and "
        "which groups have the largest? Everything in the other groups must lose against ANY score, a negative one too.",
        "biased.unflatten(-1, (n_group, -1)); .topk(2, -1).values.sum(-1) are the groups' scores, their .topk(topk_group) "
        ".indices the kept ones. A mask of True [M, n_group], scatter False at the kept; masked_fill(-inf); flatten(-2).",
    ],
)


@GROUP_LIMIT.inputs
def _(r, M, E, groups, keep, signs="minus"):
    scores = r.normal(M, E).mul(1.5).sigmoid()
    bias = r.uniform(-2.5, -1.1, E)  # all are negative: 0 would win
    return scores + bias + (1.2 if signs == "both" else 0), groups, keep


def split(biased, n_group):
    return biased.unflatten(-1, (n_group, -1))


def kept(groups, group_scores, topk_group, fill=float("-inf"), largest=True):
    """[M,E]: the scores, `fill` outside the best groups."""
    best = group_scores.topk(topk_group, dim=-1, largest=largest).indices
    dropped = torch.ones_like(group_scores, dtype=torch.bool).scatter(-1, best, False)
    return groups.masked_fill(dropped.unsqueeze(-1), fill).flatten(-2)


def two_best(groups):
    return groups.topk(2, dim=-1).values.sum(-1)


@GROUP_LIMIT.wrong(
    "What is dropped becomes 0: with negative biases 0 is the BEST score, and experts of the dropped groups win. Use -inf."
)
def masked_by_zero(biased, n_group, topk_group):
    groups = split(biased, n_group)
    return kept(groups, two_best(groups), topk_group, fill=0.0)


@GROUP_LIMIT.wrong("A large negative number is not -inf: use float('-inf'), which loses against any score.")
def masked_by_a_number(biased, n_group, topk_group):
    groups = split(biased, n_group)
    return kept(groups, two_best(groups), topk_group, fill=-1e9)


@GROUP_LIMIT.wrong(
    "You multiply the mask by -inf, and 0 · -inf is NaN, so what stays is lost too: write -inf by masked_fill."
)
def mask_times_infinity(biased, n_group, topk_group):
    groups = split(biased, n_group)
    best = two_best(groups).topk(topk_group, dim=-1).indices
    dropped = torch.ones_like(groups[..., 0]).scatter(-1, best, 0.0)
    return (groups + dropped.unsqueeze(-1) * float("-inf")).flatten(-2)


@GROUP_LIMIT.wrong(
    "The mask [M, n_group] meets scores [M, n_group, E / n_group] without an axis for the experts: mask.unsqueeze(-1)."
)
def mask_without_an_axis(biased, n_group, topk_group):
    groups = split(biased, n_group)
    best = two_best(groups).topk(topk_group, dim=-1).indices
    dropped = torch.ones_like(groups[..., 0], dtype=torch.bool).scatter(-1, best, False)
    return groups.masked_fill(dropped, float("-inf")).flatten(-2)


@GROUP_LIMIT.wrong(
    "A group's score is its best expert's: that is V2's rule. V3 adds the TWO best scores of the group, topk(2)."
)
def score_is_max(biased, n_group, topk_group):
    groups = split(biased, n_group)
    return kept(groups, groups.amax(-1), topk_group)


@GROUP_LIMIT.wrong("A group's score is the sum of ALL its scores: only the two best are added, topk(2).")
def score_is_sum(biased, n_group, topk_group):
    groups = split(biased, n_group)
    return kept(groups, groups.sum(-1), topk_group)


@GROUP_LIMIT.wrong("A group's score is its SECOND best score: add the best one to it.")
def score_is_second(biased, n_group, topk_group):
    groups = split(biased, n_group)
    return kept(groups, groups.topk(2, dim=-1).values[..., 1], topk_group)


@GROUP_LIMIT.wrong(
    "A group's score adds the two WORST of its scores: topk takes the largest, sort begins at the smallest."
)
def score_of_the_worst(biased, n_group, topk_group):
    groups = split(biased, n_group)
    return kept(groups, groups.sort(-1).values[..., :2].sum(-1), topk_group)


@GROUP_LIMIT.wrong(
    "Your groups are interleaved, every n_group-th expert: a group is NEIGHBOURS, the first E / n_group experts are one."
)
def interleaved(biased, n_group, topk_group):
    groups = biased.unflatten(-1, (-1, n_group)).mT
    best = two_best(groups).topk(topk_group, dim=-1).indices
    dropped = torch.ones_like(groups[..., 0], dtype=torch.bool).scatter(-1, best, False)
    return groups.masked_fill(dropped.unsqueeze(-1), float("-inf")).mT.flatten(-2)


@GROUP_LIMIT.wrong("n_group is the NUMBER of groups, not the experts in one: unflatten(-1, (n_group, -1)).")
def number_as_size(biased, n_group, topk_group):
    groups = biased.unflatten(-1, (-1, n_group))
    return kept(groups, two_best(groups), topk_group)


@GROUP_LIMIT.wrong("The mask is inverted: you drop the best groups and keep the others.")
def mask_inverted(biased, n_group, topk_group):
    groups = split(biased, n_group)
    best = two_best(groups).topk(topk_group, dim=-1).indices
    dropped = torch.zeros_like(groups[..., 0], dtype=torch.bool).scatter(-1, best, True)
    return groups.masked_fill(dropped.unsqueeze(-1), float("-inf")).flatten(-2)


@GROUP_LIMIT.wrong("You keep the worst groups: those with the LARGEST scores stay.")
def keeps_the_worst(biased, n_group, topk_group):
    groups = split(biased, n_group)
    return kept(groups, two_best(groups), topk_group, largest=False)


@GROUP_LIMIT.wrong("You keep one group only: there are topk_group of them.")
def keeps_one(biased, n_group, topk_group):
    groups = split(biased, n_group)
    return kept(groups, two_best(groups), 1)


@GROUP_LIMIT.wrong("You keep two groups whatever topk_group says: the 2 is for the scores within a group.")
def keeps_two(biased, n_group, topk_group):
    groups = split(biased, n_group)
    return kept(groups, two_best(groups), min(2, n_group))


@GROUP_LIMIT.wrong("You keep n_group - topk_group groups: topk_group is how many STAY.")
def drops_topk_group(biased, n_group, topk_group):
    groups = split(biased, n_group)
    return kept(groups, two_best(groups), n_group - topk_group)


@GROUP_LIMIT.wrong("All tokens get the groups of the sum over tokens: each token, a row, has groups of its own.")
def same_groups_for_all(biased, n_group, topk_group):
    groups = split(biased, n_group)
    return kept(groups, two_best(groups).sum(0, keepdim=True).expand(len(biased), -1), topk_group)


@GROUP_LIMIT.wrong(
    "The numbers of the kept GROUPS are used as numbers of experts: the mask belongs on [M, n_group], before flattening."
)
def groups_as_experts(biased, n_group, topk_group):
    best = two_best(split(biased, n_group)).topk(topk_group, dim=-1).indices
    dropped = torch.ones_like(biased, dtype=torch.bool).scatter(-1, best, False)
    return biased.masked_fill(dropped, float("-inf"))


@GROUP_LIMIT.wrong("The result is still cut into groups, [M, n_group, E / n_group]: flatten the last two into [M, E].")
def not_flattened(biased, n_group, topk_group):
    return split(reference.group_limit(biased, n_group, topk_group), n_group)


@GROUP_LIMIT.wrong("You return the mask: what is wanted are the scores, -inf where the mask drops them.")
def the_mask(biased, n_group, topk_group):
    return (reference.group_limit(biased, n_group, topk_group) > float("-inf")).to(biased.dtype)


@GROUP_LIMIT.wrong("Nothing is dropped: the scores outside the best topk_group groups become -inf.")
def nothing_dropped(biased, n_group, topk_group):
    return biased.clone()


@GROUP_LIMIT.wrong(
    "Only the two best experts of each kept group stay: a kept group keeps ALL its experts, the top-k comes later."
)
def two_of_each(biased, n_group, topk_group):
    groups = split(biased, n_group)
    second = groups.topk(2, dim=-1).values[..., 1:]
    return kept(groups.masked_fill(groups < second, float("-inf")), two_best(groups), topk_group)


@GROUP_LIMIT.wrong(
    "The smallest finite number, finfo.min, is not -inf: use float('-inf'), which loses against any score."
)
def masked_by_the_smallest(biased, n_group, topk_group):
    groups = split(biased, n_group)
    return kept(groups, two_best(groups), topk_group, fill=torch.finfo(biased.dtype).min)


@GROUP_LIMIT.wrong(
    "A group's score adds its best topk_group scores: it is always the TWO best; topk_group counts groups."
)
def score_of_topk_group(biased, n_group, topk_group):
    groups = split(biased, n_group)
    return kept(groups, groups.topk(min(topk_group, groups.shape[-1]), dim=-1).values.sum(-1), topk_group)


@GROUP_LIMIT.wrong(
    "A group's score adds its two FIRST scores, groups[..., :2]: it is the two BEST, topk(2, -1).values."
)
def score_of_the_first_two(biased, n_group, topk_group):
    groups = split(biased, n_group)
    return kept(groups, groups[..., :2].sum(-1), topk_group)


@GROUP_LIMIT.wrong(
    "You compare with the score of the last group that stays, and drop what is <= it: that group goes too. Drop what is < it."
)
def drops_the_last_kept(biased, n_group, topk_group):
    groups = split(biased, n_group)
    scores = two_best(groups)
    least = scores.topk(topk_group, dim=-1).values[..., -1:]
    return groups.masked_fill((scores <= least).unsqueeze(-1), float("-inf")).flatten(-2)


@GROUP_LIMIT.wrong("You keep the best topk_group EXPERTS: whole groups stay, the best topk_group of them.")
def best_experts(biased, n_group, topk_group):
    least = biased.topk(topk_group, dim=-1).values[..., -1:]
    return biased.masked_fill(biased < least, float("-inf"))


@GROUP_LIMIT.wrong("What is dropped becomes +inf, the best score of all: use float('-inf').")
def masked_by_plus_infinity(biased, n_group, topk_group):
    groups = split(biased, n_group)
    return kept(groups, two_best(groups), topk_group, fill=float("inf"))


@GROUP_LIMIT.wrong(
    "The first topk_group groups stay, whatever their scores: take the best ones, scores.topk(topk_group, -1)."
)
def first_groups(biased, n_group, topk_group):
    groups = split(biased, n_group)
    return kept(groups, -torch.arange(n_group).expand(len(biased), -1), topk_group)


# 07.3 ------------------------------------------------------------------------------------------------------------


def route(logits, bias, top_k, n_group, topk_group, factor):
    """The A chosen experts [M,A], best biased score first, and their gates [M,A], by reference.route_v3."""
    indices, gates, scores = reference.route_v3(logits, bias, top_k, n_group, topk_group, factor=factor)
    order = (scores + bias).gather(-1, indices).argsort(-1, descending=True)  # topk may give them in any order
    return indices.gather(-1, order), gates.gather(-1, order)


ROUTE = Exercise(
    "07.3",
    route,
    minutes=10,
    sizes=[
        {"M": 16, "E": 64, "A": 16, "groups": 16, "keep": 8, "factor": 2.5},
        {"M": 7, "E": 15, "A": 3, "groups": 5, "keep": 2, "factor": 1.25},
        {"M": 9, "E": 12, "A": 4, "groups": 4, "keep": 3, "factor": 2.5},
        {"M": 5, "E": 16, "A": 2, "groups": 1, "keep": 1, "factor": 1.5},
        {"M": 1, "E": 24, "A": 5, "groups": 3, "keep": 2, "factor": 2.5},
    ],
    gradients=True,
    constant=("bias",),
    hints=[
        "Two kinds of scores: plain ones, and biased ones. Which do the groups and the top-k see, and which become gates?",
        "scores = logits.sigmoid(); indices = group_limit(scores + bias, n_group, topk_group).topk(top_k).indices; then "
        "scores.gather(-1, indices), divided by its sum over the chosen (keepdim=True), times factor.",
    ],
)


@ROUTE.inputs
def _(r, M, E, A, groups, keep, factor):
    return 1.5 * r.normal(M, E), r.uniform(-2.5, -1.1, E), A, groups, keep, factor


def chosen(biased, top_k, n_group, topk_group):
    return reference.group_limit(biased, n_group, topk_group).topk(top_k, dim=-1).indices


def normalised(gates, factor):
    return gates / gates.sum(-1, keepdim=True) * factor


@ROUTE.wrong(
    "The gates are made of the BIASED scores: the bias counts for the choice alone. Gather from the plain scores (eq. 16)."
)
def gates_of_biased(logits, bias, top_k, n_group, topk_group, factor):
    biased = logits.sigmoid() + bias
    indices = chosen(biased, top_k, n_group, topk_group)
    return indices, normalised(biased.gather(-1, indices), factor)


@ROUTE.wrong("The gates are not normalised: divide them by the sum over the chosen A, before the factor (eq. 13).")
def not_normalised(logits, bias, top_k, n_group, topk_group, factor):
    scores = logits.sigmoid()
    indices = chosen(scores + bias, top_k, n_group, topk_group)
    return indices, scores.gather(-1, indices) * factor


@ROUTE.wrong(
    "You normalise over all E experts: the sum is over the chosen A alone, so normalise AFTER gathering (eq. 13)."
)
def normalised_over_all(logits, bias, top_k, n_group, topk_group, factor):
    scores = logits.sigmoid()
    indices = chosen(scores + bias, top_k, n_group, topk_group)
    return indices, (scores / scores.sum(-1, keepdim=True)).gather(-1, indices) * factor


@ROUTE.wrong(
    "You normalise over all E experts before the bias is added, so bias and scores no longer fit together; the sum is "
    "over the chosen A alone, after the choice."
)
def normalised_before_the_choice(logits, bias, top_k, n_group, topk_group, factor):
    scores = logits.sigmoid()
    scores = scores / scores.sum(-1, keepdim=True)
    indices = chosen(scores + bias, top_k, n_group, topk_group)
    return indices, scores.gather(-1, indices) * factor


@ROUTE.wrong(
    "You take a softmax over the experts: that is V2. V3's score is a sigmoid of each logit by itself (eq. 15)."
)
def softmax_scores(logits, bias, top_k, n_group, topk_group, factor):
    scores = logits.softmax(-1)
    indices = chosen(scores + bias, top_k, n_group, topk_group)
    return indices, normalised(scores.gather(-1, indices), factor)


@ROUTE.wrong(
    "You take a softmax over all experts, as V2 does, and its values as they are: V3's scores are sigmoids, normalised "
    "over the chosen."
)
def softmax_as_in_v2(logits, bias, top_k, n_group, topk_group, factor):
    scores = logits.softmax(-1)
    indices = chosen(scores + bias, top_k, n_group, topk_group)
    return indices, scores.gather(-1, indices) * factor


@ROUTE.wrong(
    "The gates are a softmax of the chosen logits: V3 divides the chosen SIGMOIDS by their sum, which is another number."
)
def softmax_of_chosen(logits, bias, top_k, n_group, topk_group, factor):
    indices = chosen(logits.sigmoid() + bias, top_k, n_group, topk_group)
    return indices, logits.gather(-1, indices).softmax(-1) * factor


@ROUTE.wrong(
    "The gates are a softmax of the chosen scores: divide the scores by their sum, there is no exponential in eq. 13."
)
def softmax_of_scores(logits, bias, top_k, n_group, topk_group, factor):
    scores = logits.sigmoid()
    indices = chosen(scores + bias, top_k, n_group, topk_group)
    return indices, scores.gather(-1, indices).softmax(-1) * factor


@ROUTE.wrong("The factor is forgotten: the gates of a token sum to `factor`, not to 1.")
def factor_forgotten(logits, bias, top_k, n_group, topk_group, factor):
    scores = logits.sigmoid()
    indices = chosen(scores + bias, top_k, n_group, topk_group)
    return indices, normalised(scores.gather(-1, indices), 1.0)


@ROUTE.wrong(
    "The factor multiplies the scores BEFORE the bias is added: it shifts the choice, and cancels when you normalise."
)
def factor_on_the_scores(logits, bias, top_k, n_group, topk_group, factor):
    scores = logits.sigmoid() * factor
    indices = chosen(scores + bias, top_k, n_group, topk_group)
    return indices, normalised(scores.gather(-1, indices), 1.0)


@ROUTE.wrong("The bias is not used: groups and top-k look at the scores PLUS the bias.")
def bias_forgotten_in_route(logits, bias, top_k, n_group, topk_group, factor):
    scores = logits.sigmoid()
    indices = chosen(scores, top_k, n_group, topk_group)
    return indices, normalised(scores.gather(-1, indices), factor)


@ROUTE.wrong("The bias is subtracted: it is added (eq. 16), a higher bias makes an expert win more often.")
def bias_subtracted(logits, bias, top_k, n_group, topk_group, factor):
    scores = logits.sigmoid()
    indices = chosen(scores - bias, top_k, n_group, topk_group)
    return indices, normalised(scores.gather(-1, indices), factor)


@ROUTE.wrong("The bias is added to the logits, before the sigmoid: it belongs to the scores, after it.")
def bias_on_the_logits(logits, bias, top_k, n_group, topk_group, factor):
    indices = chosen((logits + bias).sigmoid(), top_k, n_group, topk_group)
    return indices, normalised(logits.sigmoid().gather(-1, indices), factor)


@ROUTE.wrong("The bias is added to the logits, so it chooses AND weighs: add it to the scores, for the choice alone.")
def bias_on_the_logits_of_gates(logits, bias, top_k, n_group, topk_group, factor):
    scores = (logits + bias).sigmoid()
    indices = chosen(scores, top_k, n_group, topk_group)
    return indices, normalised(scores.gather(-1, indices), factor)


@ROUTE.wrong("The groups are not limited: put the biased scores through group_limit before the top-k.")
def groups_forgotten(logits, bias, top_k, n_group, topk_group, factor):
    scores = logits.sigmoid()
    indices = (scores + bias).topk(top_k, dim=-1).indices
    return indices, normalised(scores.gather(-1, indices), factor)


@ROUTE.wrong(
    "Dropped groups are masked by 0: here every biased score is negative, so 0 wins and experts of dropped groups come "
    "in. Mask by -inf."
)
def groups_masked_by_zero(logits, bias, top_k, n_group, topk_group, factor):
    scores = logits.sigmoid()
    biased = masked_by_zero(scores + bias, n_group, topk_group)
    indices = biased.topk(top_k, dim=-1).indices
    return indices, normalised(scores.gather(-1, indices), factor)


@ROUTE.wrong("The groups are chosen by the plain scores: the bias counts there too, group_limit(scores + bias, …).")
def groups_of_plain(logits, bias, top_k, n_group, topk_group, factor):
    scores = logits.sigmoid()
    dropped = reference.group_limit(scores, n_group, topk_group) == float("-inf")
    indices = (scores + bias).masked_fill(dropped, float("-inf")).topk(top_k, dim=-1).indices
    return indices, normalised(scores.gather(-1, indices), factor)


@ROUTE.wrong("Within the groups you choose by the plain scores: the top-k is taken of the biased ones, too.")
def choice_of_plain(logits, bias, top_k, n_group, topk_group, factor):
    scores = logits.sigmoid()
    dropped = reference.group_limit(scores + bias, n_group, topk_group) == float("-inf")
    indices = scores.masked_fill(dropped, float("-inf")).topk(top_k, dim=-1).indices
    return indices, normalised(scores.gather(-1, indices), factor)


@ROUTE.wrong("A group's score is its best expert's, as in V2: V3 adds the two best.")
def groups_by_max(logits, bias, top_k, n_group, topk_group, factor):
    scores = logits.sigmoid()
    indices = score_is_max(scores + bias, n_group, topk_group).topk(top_k, dim=-1).indices
    return indices, normalised(scores.gather(-1, indices), factor)


@ROUTE.wrong("The sum runs over the tokens: the gates of ONE token are divided by their sum, dim=-1 with keepdim=True.")
def normalised_over_tokens(logits, bias, top_k, n_group, topk_group, factor):
    scores = logits.sigmoid()
    indices = chosen(scores + bias, top_k, n_group, topk_group)
    gates = scores.gather(-1, indices)
    return indices, gates / gates.sum(0, keepdim=True) * factor


@ROUTE.wrong("The experts come in the order of their numbers: give the best first, as topk does.")
def by_number(logits, bias, top_k, n_group, topk_group, factor):
    scores = logits.sigmoid()
    indices = chosen(scores + bias, top_k, n_group, topk_group).sort(-1).values
    return indices, normalised(scores.gather(-1, indices), factor)


@ROUTE.wrong(
    "The experts come in the order of their gates: the largest BIASED score is first, as topk of the biased scores gives "
    "them."
)
def by_gate(logits, bias, top_k, n_group, topk_group, factor):
    scores = logits.sigmoid()
    indices = chosen(scores + bias, top_k, n_group, topk_group)
    gates, order = normalised(scores.gather(-1, indices), factor).sort(-1, descending=True)
    return indices.gather(-1, order), gates


@ROUTE.wrong("The gates are made of the logits: gather from their sigmoids, the scores (eq. 15).")
def gates_of_logits(logits, bias, top_k, n_group, topk_group, factor):
    indices = chosen(logits.sigmoid() + bias, top_k, n_group, topk_group)
    return indices, normalised(logits.gather(-1, indices), factor)


@ROUTE.wrong("The gates of ALL tokens are added up: each token's are divided by their own sum, sum(-1, keepdim=True).")
def normalised_over_everything(logits, bias, top_k, n_group, topk_group, factor):
    scores = logits.sigmoid()
    indices = chosen(scores + bias, top_k, n_group, topk_group)
    gates = scores.gather(-1, indices)
    return indices, gates / gates.sum() * factor


@ROUTE.wrong("The sum has shape [M] and meets gates [M, A]: keep its axis, sum(-1, keepdim=True).")
def sum_without_its_axis(logits, bias, top_k, n_group, topk_group, factor):
    scores = logits.sigmoid()
    indices = chosen(scores + bias, top_k, n_group, topk_group)
    gates = scores.gather(-1, indices)
    return indices, gates / gates.sum(-1) * factor


@ROUTE.wrong("The order is swapped: return the indices first, then the gates.")
def gates_first(logits, bias, top_k, n_group, topk_group, factor):
    return route(logits, bias, top_k, n_group, topk_group, factor)[::-1]


@ROUTE.wrong(
    "The gates are detached from the logits, so the router learns nothing: only the CHOICE has no gradient, the gates "
    "have one."
)
def detached(logits, bias, top_k, n_group, topk_group, factor):
    indices, gates = route(logits, bias, top_k, n_group, topk_group, factor)
    return indices, gates.detach()


@ROUTE.wrong("The factor is 2.5 whatever the argument says: that is V3's, use `factor`.")
def fixed_factor(logits, bias, top_k, n_group, topk_group, factor):
    return route(logits, bias, top_k, n_group, topk_group, 2.5)


@ROUTE.wrong(
    "The gates are topk's values minus the bias, detached there: right numbers, but a gradient flows into the bias. Gather them "
    "from the scores."
)
def gates_of_values(logits, bias, top_k, n_group, topk_group, factor):
    values, indices = reference.group_limit(logits.sigmoid() + bias, n_group, topk_group).topk(top_k, dim=-1)
    return indices, normalised(values - bias.detach()[indices], factor)


@ROUTE.wrong(
    "The chosen come with the smallest biased score first: argsort and sort go upwards. The largest comes first."
)
def smallest_first(logits, bias, top_k, n_group, topk_group, factor):
    indices, gates = route(logits, bias, top_k, n_group, topk_group, factor)
    return indices.flip(-1), gates.flip(-1)


@ROUTE.wrong(
    "scores[indices] takes whole ROWS, the scores of other tokens: scores.gather(-1, indices) stays in each row."
)
def rows_for_columns(logits, bias, top_k, n_group, topk_group, factor):
    scores = logits.sigmoid()
    indices = chosen(scores + bias, top_k, n_group, topk_group)
    return indices, normalised(scores[indices], factor)


@ROUTE.wrong("n_group and topk_group are swapped: group_limit(biased, n_group, topk_group).")
def numbers_swapped(logits, bias, top_k, n_group, topk_group, factor):
    scores = logits.sigmoid()
    indices = chosen(scores + bias, top_k, topk_group, n_group)
    return indices, normalised(scores.gather(-1, indices), factor)


@ROUTE.wrong("The gates are divided by their mean: they are divided by their SUM over the chosen (eq. 13).")
def divided_by_the_mean(logits, bias, top_k, n_group, topk_group, factor):
    return route(logits, bias, top_k, n_group, topk_group, factor * top_k)


@ROUTE.wrong("topk_group experts are chosen: that is how many GROUPS stay; a token chooses top_k experts.")
def as_many_as_groups(logits, bias, top_k, n_group, topk_group, factor):
    return route(logits, bias, topk_group, n_group, topk_group, factor)


# 07.4 ------------------------------------------------------------------------------------------------------------

MOE_FORWARD = Exercise(
    "07.4",
    reference.moe_forward,
    minutes=14,
    sizes=[
        {"M": 16, "D": 24, "E": 16, "F": 8, "A": 8, "W": 16},
        {"M": 7, "D": 10, "E": 5, "F": 6, "A": 2, "W": 9},
        {"M": 8, "D": 8, "E": 8, "F": 8, "A": 8, "W": 8},  # all equal: mixing them up raises nothing here
        {"M": 3, "D": 12, "E": 9, "F": 7, "A": 2, "W": 7},  # some experts have no token
        {"M": 1, "D": 9, "E": 4, "F": 5, "A": 1, "W": 10},
    ],
    gradients=True,
    hints=[
        "For one expert: which rows of `indices` hold its number, and at which of the A places? Only those tokens go through "
        "it, and each result is added to its token, times the gate at that place. No gate touches the shared experts.",
        "token, place = (indices == e).nonzero(as_tuple=True); gate, up = F.linear(x[token], gate_up_proj[e]).chunk(2, -1); "
        "y = F.linear(F.silu(gate) * up, down_proj[e]) * gates[token, place, None]; out = out.index_add(0, token, y), with "
        "layers.swiglu(x, *shared) as the first out.",
    ],
)


@MOE_FORWARD.inputs
def _(r, M, D, E, F, A, W):
    indices = torch.stack([r.permutation(E)[:A] for _ in range(M)])
    gates = r.uniform(0.1, 0.9, M, A)  # not normalised: to do it again is a mistake
    shared = tuple(
        scale * r.normal(*shape) for scale, shape in ((D**-0.5, (W, D)), (D**-0.5, (W, D)), (W**-0.5, (D, W)))
    )
    return r.normal(M, D), indices, gates, D**-0.5 * r.normal(E, 2 * F, D), F**-0.5 * r.normal(E, D, F), shared


def routed(x, indices, gates, gate_up_proj, down_proj, expert=None):
    """The gated sum over a token's experts, all of them computed; expert(x, gate_up, down) is one of them."""
    expert = expert or one_expert
    pairs = zip(gate_up_proj, down_proj, strict=True)
    results = torch.stack([expert(x, gate_up, down) for gate_up, down in pairs], 1)  # [M,E,D]
    weights = torch.zeros(len(x), len(gate_up_proj), dtype=x.dtype).scatter_add(1, indices, gates)
    return torch.einsum("me,med->md", weights, results)


def one_expert(x, gate_up, down):
    gate, up = F.linear(x, gate_up).chunk(2, -1)
    return F.linear(F.silu(gate) * up, down)


def always(x, shared):
    return swiglu(x, *shared, impl="torch")


@MOE_FORWARD.wrong("The shared experts are forgotten: each token gets their result besides that of its chosen experts.")
def shared_missing(x, indices, gates, gate_up_proj, down_proj, shared):
    return routed(x, indices, gates, gate_up_proj, down_proj)


@MOE_FORWARD.wrong("The chosen experts are forgotten: you return the shared ones alone.")
def shared_alone(x, indices, gates, gate_up_proj, down_proj, shared):
    return always(x, shared)


@MOE_FORWARD.wrong("The shared experts are scaled by the gates: they come unscaled, no gate belongs to them (eq. 12).")
def shared_gated(x, indices, gates, gate_up_proj, down_proj, shared):
    return always(x, shared) * gates.sum(-1, keepdim=True) + routed(x, indices, gates, gate_up_proj, down_proj)


@MOE_FORWARD.wrong(
    "The shared experts are added once for each of the A choices: they belong before the loop, once for a token."
)
def shared_for_each_choice(x, indices, gates, gate_up_proj, down_proj, shared):
    return gates.shape[1] * always(x, shared) + routed(x, indices, gates, gate_up_proj, down_proj)


@MOE_FORWARD.wrong("The shared experts are added once for each expert: take them out of the loop.")
def shared_for_each_expert(x, indices, gates, gate_up_proj, down_proj, shared):
    return len(down_proj) * always(x, shared) + routed(x, indices, gates, gate_up_proj, down_proj)


@MOE_FORWARD.wrong("The experts' results are added without their gates: multiply each by gates[token, place].")
def gates_missing(x, indices, gates, gate_up_proj, down_proj, shared):
    return always(x, shared) + routed(x, indices, torch.ones_like(gates), gate_up_proj, down_proj)


@MOE_FORWARD.wrong(
    "The gates multiply the experts' INPUT: an expert is not linear, so that is not the same. Multiply what comes out."
)
def gates_on_the_input(x, indices, gates, gate_up_proj, down_proj, shared):
    out = always(x, shared)
    for place in range(gates.shape[1]):
        scaled = x * gates[:, place, None]
        one = torch.ones_like(gates[:, :1])
        out = out + routed(scaled, indices[:, place, None], one, gate_up_proj, down_proj)
    return out


@MOE_FORWARD.wrong("The gates are applied twice, so a result is multiplied by the square of its gate.")
def gates_twice(x, indices, gates, gate_up_proj, down_proj, shared):
    return always(x, shared) + routed(x, indices, gates * gates, gate_up_proj, down_proj)


@MOE_FORWARD.wrong(
    "You normalise the gates again: they come ready from the router; a factor may be in them, it would be lost."
)
def gates_normalised_again(x, indices, gates, gate_up_proj, down_proj, shared):
    gates = gates / gates.sum(-1, keepdim=True)
    return always(x, shared) + routed(x, indices, gates, gate_up_proj, down_proj)


@MOE_FORWARD.wrong("All choices of a token get the gate of its first: take gates[token, place], not gates[token, 0].")
def first_gate_for_all(x, indices, gates, gate_up_proj, down_proj, shared):
    return always(x, shared) + routed(x, indices, gates[:, :1].expand_as(gates), gate_up_proj, down_proj)


@MOE_FORWARD.wrong(
    "The sum over the chosen experts is divided by their number: it is a sum, the gates are the weights."
)
def mean_of_choices(x, indices, gates, gate_up_proj, down_proj, shared):
    return always(x, shared) + routed(x, indices, gates / gates.shape[1], gate_up_proj, down_proj)


@MOE_FORWARD.wrong("Each token visits only its first choice, indices[:, 0]: all A of them count.")
def first_choice(x, indices, gates, gate_up_proj, down_proj, shared):
    return always(x, shared) + routed(x, indices[:, :1], gates[:, :1], gate_up_proj, down_proj)


@MOE_FORWARD.wrong(
    "A later expert overwrites an earlier one's result, out[token] = y: a token has A experts, ADD to what is there."
)
def overwritten(x, indices, gates, gate_up_proj, down_proj, shared):
    last = indices.argmax(-1, keepdim=True)  # the loop meets the largest number last
    picked = indices.gather(1, last), gates.gather(1, last)
    return always(x, shared) + routed(x, *picked, gate_up_proj, down_proj)


@MOE_FORWARD.wrong(
    "The experts overwrite the shared ones' result, out[token] = y: add to what is there, out[token] + y."
)
def all_overwritten(x, indices, gates, gate_up_proj, down_proj, shared):
    last = indices.argmax(-1, keepdim=True)
    return routed(x, indices.gather(1, last), gates.gather(1, last), gate_up_proj, down_proj)


@MOE_FORWARD.wrong("Gate and up are swapped: the FIRST F rows of gate_up_proj make the gate, which goes through silu.")
def halves_swapped(x, indices, gates, gate_up_proj, down_proj, shared):
    swapped = torch.cat(gate_up_proj.chunk(2, 1)[::-1], 1)
    return always(x, shared) + routed(x, indices, gates, swapped, down_proj)


@MOE_FORWARD.wrong("Gate and up are taken in turns, row by row: the first F rows are the gate, the last F are up.")
def halves_interleaved(x, indices, gates, gate_up_proj, down_proj, shared):
    taken = torch.cat([gate_up_proj[:, 0::2], gate_up_proj[:, 1::2]], 1)
    return always(x, shared) + routed(x, indices, gates, taken, down_proj)


def without(change):
    """The answer with another expert: change(gate, up) is what its down-projection gets."""

    def expert(x, gate_up, down):
        return F.linear(change(*F.linear(x, gate_up).chunk(2, -1)), down)

    def answer(x, indices, gates, gate_up_proj, down_proj, shared):
        return always(x, shared) + routed(x, indices, gates, gate_up_proj, down_proj, expert)

    return answer


@MOE_FORWARD.wrong("silu is missing in the experts: an expert is W_down (silu(gate) · up).")
def silu_missing(x, indices, gates, gate_up_proj, down_proj, shared):
    return without(lambda gate, up: gate * up)(x, indices, gates, gate_up_proj, down_proj, shared)


@MOE_FORWARD.wrong("silu goes over gate AND up: only the gate goes through it, up stays as it is.")
def silu_on_both(x, indices, gates, gate_up_proj, down_proj, shared):
    return without(lambda gate, up: F.silu(gate) * F.silu(up))(x, indices, gates, gate_up_proj, down_proj, shared)


@MOE_FORWARD.wrong("A sigmoid stands where silu belongs: silu(z) = z · sigmoid(z).")
def sigmoid_for_silu(x, indices, gates, gate_up_proj, down_proj, shared):
    return without(lambda gate, up: gate.sigmoid() * up)(x, indices, gates, gate_up_proj, down_proj, shared)


@MOE_FORWARD.wrong("Gate and up are added: silu(gate) MULTIPLIES up.")
def added(x, indices, gates, gate_up_proj, down_proj, shared):
    return without(lambda gate, up: F.silu(gate) + up)(x, indices, gates, gate_up_proj, down_proj, shared)


@MOE_FORWARD.wrong(
    "The input x is added: u_t of eq. 12 is added outside, by the block; the layer gives the two sums alone."
)
def residual_added(x, indices, gates, gate_up_proj, down_proj, shared):
    return x + reference.moe_forward(x, indices, gates, gate_up_proj, down_proj, shared)


@MOE_FORWARD.wrong("All tokens go to the experts of the first: each row of `indices` is another token's choice.")
def experts_of_the_first(x, indices, gates, gate_up_proj, down_proj, shared):
    return always(x, shared) + routed(x, indices[:1].expand_as(indices), gates, gate_up_proj, down_proj)


@MOE_FORWARD.wrong(
    "Each expert gets all tokens, times the sum of all gates that name it: only the tokens that chose it go through it."
)
def all_tokens_through_all(x, indices, gates, gate_up_proj, down_proj, shared):
    weights = torch.zeros(len(down_proj), dtype=x.dtype).scatter_add(0, indices.flatten(), gates.flatten())
    every = torch.arange(len(down_proj)).expand(len(x), -1)
    return always(x, shared) + routed(x, every, weights.expand(len(x), -1), gate_up_proj, down_proj)


@MOE_FORWARD.wrong("Expert 0 is left out: the loop begins at 1, and the numbers of the experts at 0.")
def from_one(x, indices, gates, gate_up_proj, down_proj, shared):
    return always(x, shared) + routed(x, indices, gates * (indices > 0), gate_up_proj, down_proj)


def loop(x, indices, gates, gate_up_proj, down_proj, shared, experts=None, where=None, weight=None, stop=False):
    """The answer of the hint with a part of it replaced; stop: whether an expert without a token ends the loop."""
    out = always(x, shared)
    for e in range(len(down_proj)) if experts is None else experts:
        token, place = (where or torch.Tensor.nonzero)(indices == e, as_tuple=True)
        if stop and not len(token):
            break
        y = one_expert(x[token], gate_up_proj[e], down_proj[e])
        y = y * (gates[token, place, None] if weight is None else weight(token, place, e))
        out = out.index_add(0, token, y)
    return out


@MOE_FORWARD.wrong(
    "Tokens and places are swapped: nonzero gives the ROWS of `indices` first, the tokens, and then the columns, the places."
)
def token_and_place_swapped(x, indices, gates, gate_up_proj, down_proj, shared):
    def where(chosen, as_tuple):
        return chosen.nonzero(as_tuple=as_tuple)[::-1]

    return loop(x, indices, gates, gate_up_proj, down_proj, shared, where=where)


@MOE_FORWARD.wrong(
    "You take gates[token, e]: the columns of `gates` are the A places of a token, not the E experts. "
    "Take gates[token, place]."
)
def gates_by_expert(x, indices, gates, gate_up_proj, down_proj, shared):
    def weight(token, place, e):
        return gates[token, e, None]

    return loop(x, indices, gates, gate_up_proj, down_proj, shared, weight=weight)


@MOE_FORWARD.wrong(
    "The gates, one for each row, meet results [rows, D] without an axis for D: gates[token, place].unsqueeze(-1)."
)
def gates_without_an_axis(x, indices, gates, gate_up_proj, down_proj, shared):
    def weight(token, place, e):
        return gates[token, place]

    return loop(x, indices, gates, gate_up_proj, down_proj, shared, weight=weight)


@MOE_FORWARD.wrong(
    "The loop goes over the first A experts: it must meet all E of them, len(down_proj); A is how many ONE token chose."
)
def first_experts_alone(x, indices, gates, gate_up_proj, down_proj, shared):
    return loop(x, indices, gates, gate_up_proj, down_proj, shared, experts=range(indices.shape[1]))


@MOE_FORWARD.wrong("The last expert is left out: range(n) ends at n - 1, so range(len(down_proj)) meets them all.")
def last_left_out(x, indices, gates, gate_up_proj, down_proj, shared):
    return loop(x, indices, gates, gate_up_proj, down_proj, shared, experts=range(int(indices.max())))


@MOE_FORWARD.wrong(
    "The loop ends at the first expert without a token: go on to the next one, `continue`, or do nothing at all, for "
    "empty rows add nothing."
)
def ends_at_an_idle_expert(x, indices, gates, gate_up_proj, down_proj, shared):
    return loop(x, indices, gates, gate_up_proj, down_proj, shared, stop=True)


@MOE_FORWARD.wrong(
    "Gate and up of the SHARED expert are swapped: `shared` has gate, up, down, in the order of layers.swiglu(x, *shared)."
)
def shared_swapped(x, indices, gates, gate_up_proj, down_proj, shared):
    gate, up, down = shared
    return loop(x, indices, gates, gate_up_proj, down_proj, (up, gate, down))


@MOE_FORWARD.wrong("x @ W does not fit: the weights are [out, in], so the product is x @ W.T, which is F.linear(x, W).")
def not_transposed(x, indices, gates, gate_up_proj, down_proj, shared):
    for e in range(len(down_proj)):
        token, _ = (indices == e).nonzero(as_tuple=True)
        x[token] @ gate_up_proj[e]


@MOE_FORWARD.wrong("`out` begins anew for each expert, so only the last one stays: put its first line before the loop.")
def begins_anew(x, indices, gates, gate_up_proj, down_proj, shared):
    return last_alone(x, indices, gates, gate_up_proj, down_proj, len(down_proj) - 1) + always(x, shared)


@MOE_FORWARD.wrong("Only expert 0 was met: is the `return` inside the loop?")
def returns_in_the_loop(x, indices, gates, gate_up_proj, down_proj, shared):
    return last_alone(x, indices, gates, gate_up_proj, down_proj, 0) + always(x, shared)


def last_alone(x, indices, gates, gate_up_proj, down_proj, number):
    """The gated result of one expert alone."""
    weight = (gates * (indices == number)).sum(-1, keepdim=True)
    return one_expert(x, gate_up_proj[number], down_proj[number]) * weight


@MOE_FORWARD.wrong("The experts see what is in `out` already: each gets the tokens as they came, x[token].")
def experts_see_out(x, indices, gates, gate_up_proj, down_proj, shared):
    out = always(x, shared)
    for e, (gate_up, down) in enumerate(zip(gate_up_proj, down_proj, strict=True)):
        token, place = (indices == e).nonzero(as_tuple=True)
        out = out.index_add(0, token, one_expert(out[token], gate_up, down) * gates[token, place, None])
    return out


@MOE_FORWARD.wrong("silu goes over the product gate · up: it goes over the gate alone, silu(gate) · up.")
def silu_of_the_product(x, indices, gates, gate_up_proj, down_proj, shared):
    def expert(x, gate_up, down):
        gate, up = F.linear(x, gate_up).chunk(2, -1)
        return F.linear(F.silu(gate * up), down)

    return routed(x, indices, gates, gate_up_proj, down_proj, expert) + always(x, shared)


@MOE_FORWARD.wrong(
    "All gates of a token multiply each of its experts: only the gate at the place where this expert stands, "
    "gates[token, place]."
)
def all_gates_of_a_token(x, indices, gates, gate_up_proj, down_proj, shared):
    weights = gates.sum(-1, keepdim=True).expand_as(gates)
    return routed(x, indices, weights, gate_up_proj, down_proj) + always(x, shared)


@MOE_FORWARD.wrong("scatter_add with one number a row adds into ONE column: index_add(0, token, y) adds whole rows.")
def into_one_column(x, indices, gates, gate_up_proj, down_proj, shared):
    out = always(x, shared)
    for e, (gate_up, down) in enumerate(zip(gate_up_proj, down_proj, strict=True)):
        token, place = (indices == e).nonzero(as_tuple=True)
        y = one_expert(x[token], gate_up, down) * gates[token, place, None]
        out = out.scatter_add(0, token[:, None], y)
    return out


@MOE_FORWARD.wrong(
    "nonzero() gives one matrix, a row for each place: nonzero(as_tuple=True) gives the two, token and place."
)
def nonzero_without_tuple(x, indices, gates, gate_up_proj, down_proj, shared):
    out = always(x, shared)
    for e, (gate_up, down) in enumerate(zip(gate_up_proj, down_proj, strict=True)):
        token, place = (indices == e).nonzero()
        out = out.index_add(0, token, one_expert(x[token], gate_up, down) * gates[token, place, None])
    return out

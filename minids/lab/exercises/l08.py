"""Lesson 08: balance: the loads and how they are judged, a loss that evens them out, a bias that needs none."""

import torch

from minids.lab.exercise import Exercise
from minids.moe import reference


def choose(r, scores, A, idle=0):
    """Indices [B,T,A] of the best by `scores` plus a bias, so that some experts are busy; the last `idle` get nothing."""
    E = scores.shape[-1]
    biased = scores + 0.5 * r.normal(E)
    biased[..., E - idle :] = -9.0
    return biased.topk(A, dim=-1).indices


# 08.1 -----------------------------------------------------------------------------------------------------------------

LOAD_FRACTIONS = Exercise(
    "08.1",
    reference.load_fractions,
    minutes=7,
    sizes=[
        {"B": 1, "T": 24, "E": 16, "A": 8, "idle": 0},
        {"B": 3, "T": 7, "E": 9, "A": 2, "idle": 2},
        {"B": 2, "T": 8, "E": 8, "A": 8, "idle": 0},  # each token goes to all: 1 everywhere
        {"B": 4, "T": 15, "E": 6, "A": 1, "idle": 1},
        {"B": 2, "T": 16, "E": 24, "A": 8, "idle": 8},
        {"B": 1, "T": 5, "E": 7, "A": 3, "idle": 1},
    ],
    hints=[
        "Count first: for each sequence, how often does each expert stand in its T rows of A choices? What would each "
        "count be in perfect balance? Divide by that.",
        "indices.flatten(-2) is [B, T·A]; counts = torch.zeros(B, n_experts) and counts.scatter_add_(-1, chosen, ones) "
        "count without a loop (so does torch.bincount with minlength, sequence by sequence); then times E / (A·T).",
    ],
)


@LOAD_FRACTIONS.inputs
def _(r, B, T, E, A, idle):
    return choose(r, r.uniform(0, 1, B, T, E), A, idle), E


def counts_of(indices, n_experts):
    chosen = indices.flatten(-2)
    return torch.zeros(len(chosen), n_experts).scatter_add_(-1, chosen, torch.ones_like(chosen, dtype=torch.float32))


def of_counts(factor):
    """The answer that multiplies the counts by factor(T, A, E)."""
    return lambda indices, n_experts: counts_of(indices, n_experts) * factor(*indices.shape[-2:], n_experts)


@LOAD_FRACTIONS.wrong("These are plain counts: divide them by the mean count, A·T/E, so that 1 means perfect balance.")
def plain_counts(indices, n_experts):
    return of_counts(lambda T, A, E: 1)(indices, n_experts)


@LOAD_FRACTIONS.wrong(
    "These are shares that sum to 1: the factor E is missing. A load of 1 is the mean, so all E of them sum to E."
)
def shares(indices, n_experts):
    return of_counts(lambda T, A, E: 1 / (A * T))(indices, n_experts)


@LOAD_FRACTIONS.wrong(
    "Divided by T alone: these are shares of tokens, which sum to A. The mean count is A·T/E: a token counts A times."
)
def shares_of_tokens(indices, n_experts):
    return of_counts(lambda T, A, E: 1 / T)(indices, n_experts)


@LOAD_FRACTIONS.wrong("The factor A is missing: T tokens make A·T choices, so the mean count is A·T/E.")
def without_top_k(indices, n_experts):
    return of_counts(lambda T, A, E: E / T)(indices, n_experts)


@LOAD_FRACTIONS.wrong(
    "The factor A·T/E is upside down: divide the counts by the mean count A·T/E, which is times E/(A·T)."
)
def upside_down(indices, n_experts):
    return of_counts(lambda T, A, E: A * T / E)(indices, n_experts)


@LOAD_FRACTIONS.wrong(
    "The factor is E·A/T: A stands on the wrong side. More choices make a larger mean count A·T/E, so divide by A too."
)
def top_k_on_the_wrong_side(indices, n_experts):
    return of_counts(lambda T, A, E: E * A / T)(indices, n_experts)


@LOAD_FRACTIONS.wrong(
    "Whole numbers (int64) come out: a load is a fraction of the mean count. Count in float32, use /."
)
def whole_numbers(indices, n_experts):
    return counts_of(indices, n_experts).long() * n_experts // indices[0].numel()


@LOAD_FRACTIONS.wrong("E // (A·T) is a division of whole numbers, 0 whenever A·T is larger: use /.")
def whole_division(indices, n_experts):
    return of_counts(lambda T, A, E: E // (A * T))(indices, n_experts)


@LOAD_FRACTIONS.wrong("T is taken from the first dimension: that is B. The last two of indices are T and A.")
def batch_for_tokens(indices, n_experts):
    return counts_of(indices, n_experts) * n_experts / (indices.shape[-1] * indices.shape[0])


@LOAD_FRACTIONS.wrong(
    "The loads of all sequences are mixed: f has one row [E] for each sequence, [B, E]. Count along the last two "
    "dimensions only."
)
def over_the_batch(indices, n_experts):
    return indices.flatten().bincount(minlength=n_experts) * n_experts / indices.numel()


@LOAD_FRACTIONS.wrong(
    "Each sequence gets the counts of the whole batch, divided by its own length: count sequence by sequence."
)
def batch_in_each_row(indices, n_experts):
    return (counts_of(indices, n_experts).sum(0) * n_experts / indices[0].numel()).expand(len(indices), -1)


@LOAD_FRACTIONS.wrong(
    "bincount stops at the largest expert that was chosen: one that got nothing must have a 0. Give it "
    "minlength=n_experts."
)
def idle_cut_off(indices, n_experts):
    rows = torch.stack([row.flatten().bincount() for row in indices])
    return rows * n_experts / indices[0].numel()


@LOAD_FRACTIONS.wrong(
    "The mean is taken over the experts that got something: an idle expert counts too, the mean count is A·T/E."
)
def mean_of_the_busy(indices, n_experts):
    counts = counts_of(indices, n_experts)
    return counts * (counts > 0).sum(-1, keepdim=True) / indices[0].numel()


@LOAD_FRACTIONS.wrong("Only the first choice of each token is counted: all A of them are load.")
def first_choice(indices, n_experts):
    return counts_of(indices[..., :1], n_experts) * n_experts / indices[0].numel()


@LOAD_FRACTIONS.wrong(
    "Each expert is counted once at most: scatter_ and [...] = 1 overwrite where an expert comes again. Use scatter_add_."
)
def overwritten(indices, n_experts):
    return (counts_of(indices, n_experts) > 0).float() * n_experts / indices[0].numel()


@LOAD_FRACTIONS.wrong("The loads are relative to the largest one: divide by the MEAN count, A·T/E.")
def relative_to_the_largest(indices, n_experts):
    counts = counts_of(indices, n_experts)
    return counts / counts.amax(-1, keepdim=True)


@LOAD_FRACTIONS.wrong(
    "The counts of a sequence are divided by the choices of the whole batch (indices.numel()): its own are A·T."
)
def divided_by_the_batch(indices, n_experts):
    return of_counts(lambda T, A, E: E / (A * T))(indices, n_experts) / len(indices)


@LOAD_FRACTIONS.wrong(
    "scatter_add_ wants values of the dtype of `counts`: torch.ones_like(chosen) is int64 as the indices are; say "
    "dtype=torch.float32."
)
def ones_of_the_indices(indices, n_experts):
    chosen = indices.flatten(-2)
    return torch.zeros(len(chosen), n_experts).scatter_add_(-1, chosen, torch.ones_like(chosen))


@LOAD_FRACTIONS.wrong(
    "unique() leaves out the experts that nobody chose, so counts land at the wrong experts: an idle one must have its 0."
)
def unique_counts(indices, n_experts):
    counts = torch.zeros(len(indices), n_experts)
    for row, chosen in zip(counts, indices, strict=True):
        found = chosen.unique(return_counts=True)[1]
        row[: len(found)] = found
    return counts * n_experts / indices[0].numel()


@LOAD_FRACTIONS.wrong("The number of experts is fixed in yours: take the argument n_experts.")
def always_16(indices, n_experts):
    return reference.load_fractions(indices, 16)


@LOAD_FRACTIONS.wrong("The factor has 16 for E, whatever n_experts is: take the argument.")
def factor_of_16(indices, n_experts):
    return of_counts(lambda T, A, E: 16 / (A * T))(indices, n_experts)


@LOAD_FRACTIONS.wrong("All sequences get the loads of the first: count each sequence's own.")
def first_sequence(indices, n_experts):
    return reference.load_fractions(indices[:1], n_experts).expand(len(indices), -1)


# 08.2 -----------------------------------------------------------------------------------------------------------------

MAX_VIOLATION = Exercise(
    "08.2",
    reference.max_violation,
    minutes=4,
    sizes=[
        {"E": 16, "idle": 0, "low": 8, "busy": 80},
        {"E": 5, "idle": 0, "low": 0, "busy": 0},
        {"E": 8, "idle": 0, "low": 0, "busy": 0},
        {"E": 7, "idle": 2, "low": 20, "busy": 0},
    ],
    hints=[
        "How far is the busiest expert above the mean, measured in means? What must come out when all loads are equal?",
        "(load.max() - load.mean()) / load.mean(): a 0-dim tensor, no .item().",
    ],
)


@MAX_VIOLATION.inputs
def _(r, E, idle, low, busy):
    load = r.integers(20, 60, E).double()
    load[E - idle :] = 0
    load[0] = low  # without a busy one: further below the mean than any is above it
    load[1] += busy
    return load


def violation(load, mean):
    return (load.max() - mean) / mean


@MAX_VIOLATION.wrong(
    "The difference is not divided by the mean: 100 tokens too many are much or little, by the mean load."
)
def not_relative(load):
    return load.max() - load.mean()


@MAX_VIOLATION.wrong("max/mean is 1 in perfect balance: the violation is what goes beyond, (max - mean)/mean.")
def ratio(load):
    return load.max() / load.mean()


@MAX_VIOLATION.wrong("The idlest expert is subtracted: it is the mean, for nobody waits for an idle expert.")
def range_over_mean(load):
    return (load.max() - load.min()) / load.mean()


@MAX_VIOLATION.wrong(
    "The largest deviation in EITHER direction is taken: only the busiest expert counts, all others wait for it."
)
def either_direction(load):
    return (load - load.mean()).abs().max() / load.mean()


@MAX_VIOLATION.wrong("That is how far the idlest expert is below the mean: MaxVio asks for the busiest.")
def idlest(load):
    return (load.mean() - load.min()) / load.mean()


@MAX_VIOLATION.wrong("That is a standard deviation over the mean: MaxVio looks at the busiest expert alone.")
def spread(load):
    return load.std() / load.mean()


@MAX_VIOLATION.wrong(
    "That is a standard deviation over the mean: MaxVio looks at the busiest expert alone, not at how loads vary."
)
def spread_of_all(load):
    return load.std(correction=0) / load.mean()


@MAX_VIOLATION.wrong("That is the mean deviation: MaxVio is the largest, that of the busiest expert.")
def mean_deviation(load):
    return (load - load.mean()).abs().mean() / load.mean()


@MAX_VIOLATION.wrong("The difference is divided by the largest load: divide by the mean, so that it can exceed 1.")
def over_the_largest(load):
    return (load.max() - load.mean()) / load.max()


@MAX_VIOLATION.wrong("The mean leaves out idle experts: they count too, it is their work that the others do.")
def mean_of_the_busy_ones(load):
    return violation(load, load[load > 0].mean())


@MAX_VIOLATION.wrong("The median stands where the mean belongs: (max - mean)/mean.")
def median(load):
    return violation(load, load.median())


@MAX_VIOLATION.wrong(
    "That is max - 1. Was the mean taken for 1? Loads are numbers of tokens, use load.mean(). Or are parentheses missing? "
    "(max - mean) / mean."
)
def mean_of_one(load):
    return violation(load, 1.0)


@MAX_VIOLATION.wrong(
    "The mean is taken for 1/E, as if the loads were shares: they are numbers of tokens. Use load.mean()."
)
def mean_of_one_over_E(load):
    return violation(load, 1 / len(load))


@MAX_VIOLATION.wrong("The sum of all loads stands where their mean belongs: the mean is the sum over E.")
def over_the_sum(load):
    return violation(load, load.sum())


@MAX_VIOLATION.wrong("One value for each expert comes out: MaxVio is a single number, that of the busiest.")
def all_experts(load):
    return (load - load.mean()) / load.mean()


@MAX_VIOLATION.wrong("A Python number comes out: give the tensor, without .item() or float().")
def as_a_number(load):
    return violation(load, load.mean()).item()


@MAX_VIOLATION.wrong("// cuts down to a whole number: divide by /.")
def cut_to_whole(load):
    return (load.max() - load.mean()) // load.mean()


@MAX_VIOLATION.wrong("argmax gives the NUMBER of the busiest expert: its load is load.max().")
def number_of_the_busiest(load):
    return (load.argmax() - load.mean()) / load.mean()


@MAX_VIOLATION.wrong("The mean is taken over the OTHER experts: the busiest one counts in the mean too.")
def mean_of_the_others(load):
    return violation(load, (load.sum() - load.max()) / (len(load) - 1))


@MAX_VIOLATION.wrong("The sum is divided by E - 1: the mean of E loads is their sum over E.")
def over_one_less(load):
    return violation(load, load.sum() / (len(load) - 1))


@MAX_VIOLATION.wrong("The sign is wrong: the mean is subtracted from the largest load, so MaxVio is never negative.")
def negative_violation(load):
    return -violation(load, load.mean())


@MAX_VIOLATION.wrong("The number of experts is 16 in yours, whatever the loads: use load.mean(), or len(load).")
def mean_of_sixteen(load):
    return violation(load, load.sum() / 16)


# 08.3 -----------------------------------------------------------------------------------------------------------------

BALANCE_LOSS = Exercise(
    "08.3",
    reference.balance_loss,
    minutes=12,
    sizes=[
        {"B": 1, "T": 24, "E": 16, "A": 8, "alpha": 0.25},
        {"B": 3, "T": 7, "E": 9, "A": 2, "alpha": 0.1},
        {"B": 2, "T": 8, "E": 16, "A": 8, "alpha": 0.5},
        {"B": 4, "T": 15, "E": 6, "A": 1, "alpha": 0.25},
    ],
    gradients=True,
    hints=[
        "Three steps: shares s' of each token's scores, so that they sum to 1 over the experts; P, their mean over the "
        "tokens of a sequence; and f from exercise 1. What has to be averaged last?",
        "shares = scores / scores.sum(-1, keepdim=True); P = shares.mean(-2) is [B, E], as is f. Multiply f and P, sum "
        "over the experts, take the mean over the sequences, times alpha.",
    ],
)


@BALANCE_LOSS.inputs
def _(r, B, T, E, A, alpha):
    scores = (r.normal(B, T, E) + r.normal(E)).sigmoid()
    return scores, choose(r, scores, A), alpha


def normalised(scores, dim=-1):
    return scores / scores.sum(dim, keepdim=True)


def loads(indices, scores):
    return reference.load_fractions(indices, scores.shape[-1]).to(scores.dtype)


def is_chosen(indices, scores):
    """1 [B,T,E] where an expert was chosen, else 0."""
    return torch.zeros_like(scores).scatter(-1, indices, 1.0)


def total(f, P, alpha):
    return alpha * (f * P).sum(-1).mean()


@BALANCE_LOSS.wrong(
    "f is made of the scores too: it COUNTS choices, f = load_fractions(indices, E). Only P is made of the scores."
)
def f_from_scores(scores, indices, alpha):
    P = normalised(scores).mean(-2)
    return total(scores.shape[-1] * P, P, alpha)


@BALANCE_LOSS.wrong(
    "f adds the scores of the chosen experts: it counts choices, each of them 1, whatever its score (V3 eq. 18)."
)
def f_of_chosen_scores(scores, indices, alpha):
    (T, A), E = indices.shape[-2:], scores.shape[-1]
    f = (is_chosen(indices, scores) * normalised(scores)).sum(-2) * E / (A * T)
    return total(f, normalised(scores).mean(-2), alpha)


@BALANCE_LOSS.wrong(
    "The values are right, but the counts have a gradient: f is a constant, only P leads to the scores. Leave f as "
    "counted, or take f.detach()."
)
def counts_differentiated(scores, indices, alpha):
    (T, A), E = indices.shape[-2:], scores.shape[-1]
    soft = (is_chosen(indices, scores) * normalised(scores)).sum(-2) * E / (A * T)
    return total(loads(indices, scores) + soft - soft.detach(), normalised(scores).mean(-2), alpha)


@BALANCE_LOSS.wrong("f is a plain count: its factor E/(A·T) is missing. Use exercise 1's load_fractions.")
def factor_forgotten(scores, indices, alpha):
    return total(is_chosen(indices, scores).sum(-2), normalised(scores).mean(-2), alpha)


@BALANCE_LOSS.wrong(
    "It is E times too small: are f shares that sum to 1, or is f·P averaged over the experts instead of summed? In "
    "perfect balance the loss is alpha, whatever E is."
)
def experts_forgotten(scores, indices, alpha):
    return total(loads(indices, scores) / scores.shape[-1], normalised(scores).mean(-2), alpha)


@BALANCE_LOSS.wrong("The factor 1/A is missing in f: T tokens make A·T choices (V3 eq. 18).")
def top_k_forgotten(scores, indices, alpha):
    return total(loads(indices, scores) * indices.shape[-1], normalised(scores).mean(-2), alpha)


@BALANCE_LOSS.wrong(
    "P is made of the raw scores: divide each token's scores by their sum first (V3 eq. 19). Else the loss would fall "
    "when ALL scores shrink, which balances nothing."
)
def not_normalised(scores, indices, alpha):
    return total(loads(indices, scores), scores.mean(-2), alpha)


@BALANCE_LOSS.wrong(
    "The scores are divided by their sum over the TOKENS: a token's shares sum to 1 over the experts, the last dimension."
)
def normalised_over_tokens(scores, indices, alpha):
    return total(loads(indices, scores), normalised(scores, -2).mean(-2), alpha)


@BALANCE_LOSS.wrong(
    "The shares are a softmax of the scores: they come out of a sigmoid already, divide them by their sum (V3 eq. 19)."
)
def softmax_of_scores(scores, indices, alpha):
    return total(loads(indices, scores), scores.softmax(-1).mean(-2), alpha)


@BALANCE_LOSS.wrong("P sums over the tokens: it is their mean (V3 eq. 20), or longer sequences would count more.")
def sum_over_tokens(scores, indices, alpha):
    return total(loads(indices, scores), normalised(scores).sum(-2), alpha)


@BALANCE_LOSS.wrong(
    "P takes the scores of the chosen experts alone: it is the mean over all tokens of s', chosen or not (V3 eq. 20)."
)
def P_of_the_chosen(scores, indices, alpha):
    return total(loads(indices, scores), (is_chosen(indices, scores) * normalised(scores)).mean(-2), alpha)


@BALANCE_LOSS.wrong(
    "P is made of the gates: only the chosen scores, divided by THEIR sum. It is the mean of s' over all tokens, and s' "
    "divides by the sum over all E experts, chosen or not (V3 eq. 19)."
)
def P_of_the_gates(scores, indices, alpha):
    return total(loads(indices, scores), normalised(is_chosen(indices, scores) * scores).mean(-2), alpha)


@BALANCE_LOSS.wrong(
    "The mean over the tokens is taken first, and normalised after: divide each TOKEN's scores by their sum, then take "
    "the mean, or tokens with large scores count more."
)
def normalised_after_the_mean(scores, indices, alpha):
    return total(loads(indices, scores), normalised(scores.mean(-2)), alpha)


@BALANCE_LOSS.wrong(
    "The choice is made anew from the scores: count the experts in `indices`, whatever made that choice."
)
def chosen_anew(scores, indices, alpha):
    best = scores.topk(indices.shape[-1], dim=-1).indices
    return total(loads(best, scores), normalised(scores).mean(-2), alpha)


@BALANCE_LOSS.wrong("It is E times too large: the factor E stands in f already, multiply by it once.")
def experts_twice(scores, indices, alpha):
    return total(loads(indices, scores) * scores.shape[-1], normalised(scores).mean(-2), alpha)


@BALANCE_LOSS.wrong(
    "f and P are averaged over the batch before they are multiplied: that is the loss of the whole batch. Here each "
    "sequence has its own product, and the mean comes last."
)
def batch_first(scores, indices, alpha):
    return total(loads(indices, scores).mean(0), normalised(scores).mean(-2).mean(0), alpha)


@BALANCE_LOSS.wrong("The losses of the sequences are added: take their mean, or alpha would depend on the batch.")
def sum_over_batch(scores, indices, alpha):
    return total(loads(indices, scores), normalised(scores).mean(-2), alpha) * len(scores)


@BALANCE_LOSS.wrong("alpha is not used: the loss is multiplied by it.")
def alpha_missing(scores, indices, alpha):
    return total(loads(indices, scores), normalised(scores).mean(-2), 1.0)


@BALANCE_LOSS.wrong("The sign is wrong: training makes the loss small, so a negative one would reward imbalance.")
def negative(scores, indices, alpha):
    return -reference.balance_loss(scores, indices, alpha)


@BALANCE_LOSS.wrong(
    "One value for each sequence comes out: the loss to train on is a single number, the mean over the sequences."
)
def one_for_each_sequence(scores, indices, alpha):
    return alpha * (loads(indices, scores) * normalised(scores).mean(-2)).sum(-1)


@BALANCE_LOSS.wrong("A Python number comes out, by .item() or float(): that cuts the gradient. Give the 0-dim tensor.")
def loss_as_a_number(scores, indices, alpha):
    return reference.balance_loss(scores, indices, alpha).item()


@BALANCE_LOSS.wrong("alpha is fixed in yours: use the argument.")
def fixed_alpha(scores, indices, alpha):
    return reference.balance_loss(scores, indices, 0.25)


@BALANCE_LOSS.wrong("f is multiplied by itself: the second factor is P, the mean shares of the SCORES.")
def f_squared(scores, indices, alpha):
    f = loads(indices, scores)
    return total(f, f, alpha)


@BALANCE_LOSS.wrong("Both are summed before they are multiplied: sum the products f_i · P_i over the experts.")
def summed_before(scores, indices, alpha):
    return alpha * (loads(indices, scores).sum(-1) * normalised(scores).mean(-2).sum(-1)).mean()


# 08.4 -----------------------------------------------------------------------------------------------------------------

UPDATE_BIAS = Exercise(
    "08.4",
    reference.update_bias,
    minutes=6,
    sizes=[
        {"E": 16, "rate": 0.125},
        {"E": 5, "rate": 0.02},
        {"E": 8, "rate": 0.125},
        {"E": 7, "rate": 0.5},
        {"E": 6, "rate": 0.125, "loads": "20 or 21"},
    ],
    hints=[
        "Whose bias should rise: that of an expert with more load than the mean, or with less? By how much: does the "
        "size of the difference matter?",
        "bias + rate * torch.sign(…): the sign is +1, 0 or -1, of the mean load minus the expert's.",
    ],
)


@UPDATE_BIAS.inputs
def _(r, E, rate, loads="any"):
    load = r.integers(0, 50, E).double()
    load[1] += (-load[:-1].sum()) % (E - 1)
    load[-1] = load[:-1].sum() / (E - 1)  # a whole number: the last expert has exactly the mean load
    if loads == "20 or 21":
        load = 20.0 + (load % 2)
        load[:2] = torch.tensor([20.0, 21.0])  # the mean lies between, near all
    return 0.5 * r.normal(E), load, rate


def moved(direction):
    """The answer that moves the bias by rate times direction(load)."""
    return lambda bias, load, rate: bias + rate * direction(load)


@UPDATE_BIAS.wrong(
    "The sign is flipped: a busy expert's bias rises, so that it gets even more. Below the mean load up, above it down."
)
def flipped(bias, load, rate):
    return moved(lambda load: torch.sign(load - load.mean()))(bias, load, rate)


@UPDATE_BIAS.wrong(
    "The step is proportional to the expert's own load, so every bias falls: compare with the mean load, and take the "
    "sign."
)
def by_own_load(bias, load, rate):
    return moved(lambda load: -load)(bias, load, rate)


@UPDATE_BIAS.wrong(
    "The step is proportional to the difference: V3's rule (eq. 16) takes its sign alone, one step of `rate` for all."
)
def by_difference(bias, load, rate):
    return moved(lambda load: load.mean() - load)(bias, load, rate)


@UPDATE_BIAS.wrong(
    "The step is proportional to the relative difference (an expert twice as busy moves further): V3's rule (eq. 16) "
    "takes the sign alone."
)
def by_relative_difference(bias, load, rate):
    return moved(lambda load: (load.mean() - load) / load.mean())(bias, load, rate)


@UPDATE_BIAS.wrong(
    "The load is compared with 1/E, as if it were a share: it is a number of tokens. Compare with load.mean()."
)
def against_one_over_E(bias, load, rate):
    return moved(lambda load: torch.sign(1 / len(load) - load))(bias, load, rate)


@UPDATE_BIAS.wrong(
    "The load is compared with 1, as if it were a multiple of the mean: it is a number of tokens. Compare with "
    "load.mean()."
)
def against_one(bias, load, rate):
    return moved(lambda load: torch.sign(1 - load))(bias, load, rate)


@UPDATE_BIAS.wrong("The load is compared with the median: V3's rule takes the mean, which one busy expert moves.")
def against_the_median(bias, load, rate):
    return moved(lambda load: torch.sign(load.median() - load))(bias, load, rate)


@UPDATE_BIAS.wrong("The load is compared with the sum of all loads, which none exceeds: compare with their mean.")
def against_the_sum(bias, load, rate):
    return moved(lambda load: torch.sign(load.sum() - load))(bias, load, rate)


@UPDATE_BIAS.wrong("The mean is that of the BIASES: what is compared is the load of each expert with the mean load.")
def mean_of_the_biases(bias, load, rate):
    return bias + rate * torch.sign(bias.mean() - bias)


@UPDATE_BIAS.wrong("Only the change comes out: give the new bias, the old one plus the change.")
def change_alone(bias, load, rate):
    return rate * torch.sign(load.mean() - load)


@UPDATE_BIAS.wrong(
    "An expert with exactly the mean load is moved: the sign of 0 is 0, so its bias stays (torch.sign does that)."
)
def no_rest(bias, load, rate):
    return moved(lambda load: torch.where(load < load.mean(), 1.0, -1.0))(bias, load, rate)


@UPDATE_BIAS.wrong("An expert with exactly the mean load is moved up: the sign of 0 is 0, so its bias stays.")
def no_rest_upwards(bias, load, rate):
    return moved(lambda load: torch.where(load <= load.mean(), 1.0, -1.0))(bias, load, rate)


@UPDATE_BIAS.wrong(
    "Idle experts rise, but busy ones stay: the rule goes both ways, down by `rate` above the mean load."
)
def only_up(bias, load, rate):
    return moved(lambda load: (load < load.mean()).to(load.dtype))(bias, load, rate)


@UPDATE_BIAS.wrong("Busy experts fall, but idle ones stay: the rule goes both ways, up by `rate` below the mean load.")
def only_down(bias, load, rate):
    return moved(lambda load: -(load > load.mean()).to(load.dtype))(bias, load, rate)


@UPDATE_BIAS.wrong("Only the busiest and the idlest expert move: all of them do, each by its own sign.")
def extremes_only(bias, load, rate):
    new = bias.clone()
    new[load.argmax()] -= rate
    new[load.argmin()] += rate
    return new


@UPDATE_BIAS.wrong("`rate` is not used: the sign is multiplied by it, or a bias moves by 1 in each step.")
def without_rate(bias, load, rate):
    return bias + torch.sign(load.mean() - load)


@UPDATE_BIAS.wrong("The step is 0.001 whatever `rate` is: V3's value is for V3, use the argument.")
def fixed_rate(bias, load, rate):
    return bias + 0.001 * torch.sign(load.mean() - load)


@UPDATE_BIAS.wrong("The old bias is multiplied: `rate` times the sign is ADDED to it, or a bias of 0 would never move.")
def multiplied(bias, load, rate):
    return bias * (1 + rate * torch.sign(load.mean() - load))


@UPDATE_BIAS.wrong(
    "The old bias decays: nothing pulls it to 0. It is no weight; it stays where balance needs it, however far that is."
)
def decayed(bias, load, rate):
    return (1 - rate) * bias + rate * torch.sign(load.mean() - load)


@UPDATE_BIAS.wrong("The new biases are shifted to a mean of 0: the rule has no such step, each expert moves by itself.")
def centred(bias, load, rate):
    new = reference.update_bias(bias, load, rate)
    return new - new.mean()


@UPDATE_BIAS.wrong(
    "The step is proportional to the difference, up to `rate` at most (clamp): V3's rule takes the sign, a step of `rate` however "
    "small the difference."
)
def by_clamped_difference(bias, load, rate):
    return bias + (rate * (load.mean() - load)).clamp(-rate, rate)


@UPDATE_BIAS.wrong("The difference goes through tanh, which is near its sign for large ones alone: torch.sign.")
def by_tanh(bias, load, rate):
    return bias + rate * torch.tanh(load.mean() - load)


@UPDATE_BIAS.wrong(
    "The difference is divided by its own size: for an expert with exactly the mean load that is 0/0 = NaN. torch.sign(0) is 0."
)
def divided_by_its_size(bias, load, rate):
    difference = load.mean() - load
    return bias + rate * difference / difference.abs()


@UPDATE_BIAS.wrong(
    "The mean is cut or rounded to a whole number (// or round): an expert just beside the mean moves too."
)
def against_a_whole_mean(bias, load, rate):
    return bias + rate * torch.sign(load.sum() // len(load) - load)


@UPDATE_BIAS.wrong("The step is 0.125 whatever `rate` is: use the argument.")
def step_of_an_eighth(bias, load, rate):
    return reference.update_bias(bias, load, 0.125)


@UPDATE_BIAS.wrong(
    "The load is compared with the middle of the largest and the smallest: V3's rule takes the mean of all."
)
def against_the_middle(bias, load, rate):
    return bias + rate * torch.sign((load.max() + load.min()) / 2 - load)
